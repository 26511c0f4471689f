"""Sends server-sent events, and notices at once when the client has gone."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request

from evolve_ray.serve.errors import RequestError, encode

# Of events that come faster than this, several are sent together: each send costs two processes a fixed time. The bytes are the
# same, and the first event never waits.
GROUP_S = 0.02
CLIENT_LEFT = 499  # the status that the metrics count for a request whose client closed the connection
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


async def unless_gone(http: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of some work, which is cancelled when the client closes the connection; then raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnect(http.receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await cancel(task, gone)


async def disconnect(receive: Callable[[], Any]) -> None:
    """Returns when the client has closed the connection; the body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Future) -> None:
    """Cancels the tasks, and waits until they have cleaned up, so that nothing of them runs on in the engine."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)


class EventStream:
    """A response of events, at most `seconds` long. `close` gets its status at the end; `failure` describes an error."""

    def __init__(
        self, lines: AsyncIterator[str], close: Callable[[int], None], failure: Callable[[BaseException], RequestError],
        seconds: float,
    ):  # fmt: skip
        self.lines, self.close, self.failure, self.seconds = lines, close, failure, seconds
        self.waiting: list[str] = []
        self.news = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status: int = CLIENT_LEFT
        tasks: list[asyncio.Future] = []
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            tasks = [asyncio.ensure_future(part) for part in (disconnect(receive), self.write(send), self.read())]
            gone, written, _ = tasks
            await asyncio.wait([gone, written], return_when=asyncio.FIRST_COMPLETED)
            if written.done():
                await written
                status = self.status
        finally:
            await cancel(*tasks)
            await self.lines.aclose()  # type: ignore[attr-defined]
            self.close(status)

    async def read(self) -> None:
        """Collects lines while they come. An error becomes the last event, since the status of the response is sent."""
        self.status = 200
        try:
            async with asyncio.timeout(self.seconds):
                async for line in self.lines:
                    self.waiting.append(line)
                    self.news.set()
        except Exception as error:
            failure = self.failure(error)
            self.status = failure.status
            self.waiting.append(f"data: {encode(failure.body()).decode()}\n\ndata: [DONE]\n\n")
        self.waiting.append("")  # the end
        self.news.set()

    async def write(self, send: Any) -> None:
        """Sends what was collected, the first event at once and then at most every `GROUP_S`."""
        ended, last = False, 0.0
        while not ended:
            await self.news.wait()
            if self.waiting[-1] and (pause := last + GROUP_S - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            self.news.clear()
            lines, self.waiting = self.waiting, []
            ended, last = lines[-1] == "", time.monotonic()
            await send({"type": "http.response.body", "body": "".join(lines).encode(), "more_body": not ended})
