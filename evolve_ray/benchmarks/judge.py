"""A language model as judge, behind any server with the OpenAI API."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn
from urllib.parse import urlparse

from evolve_ray.errors import UserError, first_line

RETRIES = 5  # by the OpenAI client, with growing pauses
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Judge:
    """The judge: model, server and number of requests at a time. The key is never written to disk."""

    model: str
    url: str
    concurrency: int
    key: str = field(default="none", repr=False)

    @cached_property
    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=RETRIES, timeout=TIMEOUT_S)

    def answer(self, system: str, user: str, *, temperature: float, max_tokens: int) -> str:
        """Returns the judge's reply; raises UserError if the request fails."""
        import openai

        messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            completion = self.client.chat.completions.create(
                model=self.model, messages=messages, temperature=temperature, max_tokens=max_tokens
            )
        except openai.OpenAIError as error:
            self.fail(error)
        return (completion.choices[0].message.content or "") if completion.choices else ""

    def fail(self, error: Exception) -> NoReturn:
        """Raises a UserError of one sentence for an error of the client; finished judgments stay on disk."""
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"--judge {self.model}: request to {self.url} failed: {reason}; fix that and submit the same command again, which "
            "continues"
        ) from None


def make_judge(model: str, url: str, key_name: str | None, concurrency: int) -> Judge:
    """Returns the judge; its key comes from the environment variable `key_name`, and without a name no key is sent."""
    address = urlparse(url)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise UserError(f"--judge-url {url}: is not an http address; give the server's base URL, e.g. http://127.0.0.1:8000/v1")
    if "@" in address.netloc:  # the address is stored in the results
        raise UserError(
            "--judge-url: contains a password; put it into an environment variable and name the variable with --api-key-env"
        )
    if concurrency < 1:
        raise UserError(f"--concurrency {concurrency}: must be at least 1")
    if key_name is None:
        return Judge(model, url, concurrency)
    if not os.environ.get(key_name):
        raise UserError(f"--api-key-env {key_name}: this environment variable is not set; export it first")
    return Judge(model, url, concurrency, os.environ[key_name])
