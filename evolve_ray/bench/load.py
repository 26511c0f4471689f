"""A load generator for OpenAI's chat protocol: a number of clients that take requests from one list, on one connection each."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from evolve_ray.errors import ResourceError

CHAT = "/v1/chat/completions"
Body = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What one request took. `first_s`: until the first token, of a stream."""

    seconds: float
    first_s: float
    tokens: int
    prompt_tokens: int
    text: str


@dataclass(frozen=True)
class Answer:
    """One answer of a client: the replies to its requests, one after the other."""

    seconds: float
    replies: list[Reply]


async def request(session: Any, url: str, body: Body) -> Reply:
    """Sends one request and reads the whole reply. Raises ResourceError for any status but 200."""
    started, first_s, usage, text = time.monotonic(), 0.0, {}, ""
    async with session.post(url + CHAT, json=body) as response:
        if response.status != 200:
            raise ResourceError(f"serve: {url} answered {response.status}: {(await response.text())[:300]}")
        if body.get("stream"):
            async for line in response.content:
                first_s = first_s or time.monotonic() - started
                if b'"usage":{' in line:
                    usage = json.loads(line.removeprefix(b"data: "))["usage"]
        else:
            content = await response.json()
            usage, text = content["usage"], content["choices"][0]["message"]["content"]
    return Reply(time.monotonic() - started, first_s, usage["completion_tokens"], usage["prompt_tokens"], text)


async def drive(
    url: str, works: list[Any], clients: int, seconds: float, work: Callable[[Any, str, Any], Awaitable[list[Reply]]]
) -> tuple[list[Answer], float]:
    """(the answers, the seconds of all): `clients` workers take the works in order, and none after `seconds`."""
    import aiohttp

    answers: list[Answer] = []
    started, waiting = time.monotonic(), iter(works)

    async def client(session: Any) -> None:
        for part in waiting:
            begun = time.monotonic()
            if begun - started > seconds:
                return
            replies = await work(session, url, part)
            answers.append(Answer(time.monotonic() - begun, replies))

    timeout = aiohttp.ClientTimeout(total=seconds + 120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*[client(session) for _ in range(clients)])
    return answers, time.monotonic() - started
