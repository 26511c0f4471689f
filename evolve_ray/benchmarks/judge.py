"""A language model as a judge, behind any server that speaks the OpenAI protocol."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn
from urllib.parse import urlparse

from evolve_ray.errors import UserError, first_line

RETRIES = 5  # by the client itself, with growing pauses
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Judge:
    """Which model judges, where, and with how many requests at a time. The key stays in memory."""

    model: str
    url: str
    concurrency: int
    key: str = field(default="none", repr=False)

    @cached_property
    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=RETRIES, timeout=TIMEOUT_S)

    def answer(self, system: str, user: str, *, temperature: float, max_tokens: int) -> str:
        """What the judge says; UserError if it cannot be asked."""
        import openai

        messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            found = self.client.chat.completions.create(
                model=self.model, messages=messages, temperature=temperature, max_tokens=max_tokens
            )
        except openai.OpenAIError as error:
            self.fail(error)
        return (found.choices[0].message.content or "") if found.choices else ""

    def fail(self, error: Exception) -> NoReturn:
        """One sentence in place of what the client raised; what is judged already stays."""
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"--judge {self.model}: {self.url} does not judge: {reason}; mend that and submit the same command again, which "
            "continues"
        ) from None


def make_judge(model: str, url: str, key_name: str | None, concurrency: int) -> Judge:
    """A judge whose key is in the environment variable `key_name`; without a name none is sent."""
    parts = urlparse(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--judge-url {url}: is no http address; give the server's base, e.g. http://127.0.0.1:8000/v1")
    if "@" in parts.netloc:  # results name the address
        raise UserError("--judge-url: holds a password; put it into an environment variable and name that with --api-key-env")
    if concurrency < 1:
        raise UserError(f"--concurrency {concurrency}: must be at least 1")
    if key_name is None:
        return Judge(model, url, concurrency)
    if not os.environ.get(key_name):
        raise UserError(f"--api-key-env {key_name}: the environment has no such variable; export it first")
    return Judge(model, url, concurrency, os.environ[key_name])
