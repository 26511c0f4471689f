"""What the tests of the endpoint share: its rules, an engine and a scorer that answer from a list, requests over ASGI."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.config import options
from evolve_ray.refine.template import load_template
from evolve_ray.serve.errors import RequestError
from evolve_ray.serve.request import Rules
from evolve_ray.serve.rounds import Piece
from evolve_ray.serve.settings import Settings

TEMPLATE = load_template("tiny", "conversation", "critique")


def rules(*, scorer: bool = True, verifier: bool = True, **limits: Any) -> Rules:
    return Rules(options.Strategy(), TEMPLATE, options.Serve(**limits), scorer, verifier)


def settings(folder: str = "unused", *, keys: tuple[str, ...] = (), name: str = "tiny@3", **serve: Any) -> Settings:
    """Those of the tiny world's verifier, for a model whose folder is not read."""
    config = options.Config(
        name="tiny",
        model=options.Model(path=folder, context_tokens=256),
        prompts=options.Prompts(path="none"),
        scorer=options.Scorer(name="verifier"),
        verifier=options.Verifier(name="evolve_ray.toy.task:SortVerifier"),
        sampling=options.Sampling(max_tokens=24),
        serve=options.Serve(**serve),
    )
    return Settings(name, folder, config, TEMPLATE, {}, True, keys)


class ListEngine:
    """Writes the texts of a list, in the order of the asks, letter by letter; a prompt has one token for each character.

    A text that ends with "..." is cut by its length; "wait" waits for ever after its first letter.
    """

    def __init__(self, *texts: str, context_tokens: int = 10_000, max_tokens: int = 100):
        self.texts, self.context_tokens, self.max_tokens = list(texts), context_tokens, max_tokens
        self.asks: list[Any] = []
        self.seeds: list[int | None] = []
        self.limits: list[int] = []
        self.running = self.closed = 0

    async def encode(self, messages: Any, *, first: bool, prefix: str = "") -> list[int]:
        text = "".join(message["content"] for message in messages)
        if first and len(text) >= self.context_tokens:
            raise RequestError("messages: too long", "messages")
        return list(range(len(text + prefix)))

    def answer(self, text: str, token_ids: list[int]) -> str:
        return text.rpartition("</think>")[2]

    async def write(self, ask: Any, ids: list[int], seed: int | None, max_tokens: int) -> Any:
        text = self.texts[len(self.asks)]
        self.asks.append(ask)
        self.seeds.append(seed)
        self.limits.append(max_tokens)
        self.running += 1
        reason = "length" if text.endswith("...") or len(text) > max_tokens else "stop"
        try:
            letters = text[:max_tokens]
            for place, letter in enumerate(letters):
                await asyncio.sleep(0)
                yield Piece(letter, 1, reason if place + 1 == len(letters) and text != "wait" else None, 2, letter)
                if text == "wait":
                    await asyncio.sleep(60)
        finally:
            self.running -= 1
            self.closed += 1


class ListScorer:
    """Scores by a dict of texts; a text that is not in it has no finite score. The verifier accepts what has the score 1."""

    def __init__(self, **scores: float):
        self.values = scores
        self.scored: list[str] = []

    async def score(self, prompt: str, answer: str | None, texts: list[str]) -> list[float | None]:
        self.scored += texts
        return [self.values.get(text) for text in texts]

    async def verify(self, prompt: str, answer: str | None, text: str) -> float:
        return float(self.values.get(text) == 1.0)

    async def needs_answer(self, part: str, prompt: str) -> bool:
        return False

    async def groups(self, texts: list[str]) -> list[int]:
        return [ord(text[-1]) for text in texts]


class Exchange:
    """One HTTP request to an ASGI application, and the messages of its reply. `leave` closes the client's connection."""

    def __init__(self, app: Any, method: str, path: str, body: bytes | Any = b"", headers: dict[str, str] | None = None):
        self.app = app
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **(headers or {})}
        self.scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "http_version": "1.1",
            "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        self.messages: list[Any] = []
        self.left = asyncio.Event()
        self.on_send: Callable[[Any], None] = lambda message: None

    async def receive(self) -> Any:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        self.on_send(message)

    async def run(self) -> "Exchange":
        await self.app(self.scope, self.receive, self.send)
        return self

    def leave(self) -> None:
        self.left.set()

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {bytes(name).decode().lower(): bytes(value).decode() for name, value in self.messages[0]["headers"]}

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        """The error object of OpenAI's envelope, checked for its form."""
        (body,) = [json.loads(self.content)]
        assert set(body) == {"error"}
        error = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == self.status
        assert "Traceback" not in error["message"]
        assert "\n" not in error["message"]
        return error


def request(app: Any, method: str, path: str, body: Any = b"", headers: dict[str, str] | None = None) -> Exchange:
    return asyncio.run(Exchange(app, method, path, body, headers).run())


def page_source() -> str:
    return (Path(__file__).parents[3] / "evolve_ray" / "serve" / "page.html").read_text(encoding="utf-8")
