"""Runs in Serve's proxy, around all that it answers: a short way to the replicas of this node, and one clean error if all fails.

Serve calls `middlewares` if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it when Ray starts on a node. Only the paths of this
endpoint are touched, so other applications of the same cluster are as they were.
"""

from typing import Any

from evolve_ray.serve.errors import encode, envelope
from evolve_ray.serve.shortcut import Shortcut

PATHS = ("/v1/", "/health", "/metrics")
MAX_BODY = 64 << 20  # bytes; a replica applies the limit of its recipe, which is smaller
RETRY_AFTER = (b"retry-after", b"2")
LOST = "the replica that worked on this request has ended; nothing is kept of it, try again"
ABSENT = "the endpoint is starting, or is shutting down; try again"
FULL = "all places are taken; try again"


def middlewares() -> list[Any]:
    from starlette.middleware import Middleware

    return [Middleware(Guard)]


class Guard:
    """An ASGI middleware. A reply of Serve itself is a text; those of the endpoint are JSON, events or the page."""

    def __init__(self, app: Any):
        self.app, self.shortcut = app, Shortcut()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == "/" or path.startswith(PATHS)):
            await self.app(scope, receive, send)
            return
        reply = Reply(send)
        body = await read_body(scope, receive)
        if body is None:
            await reply.fail(413, f"the body is larger than {MAX_BODY >> 20} MiB; send less")
            return
        try:
            if not await self.shortcut.forward(scope, body, receive, reply.send):
                await self.app(scope, Replay(body, receive), reply.send)
        except Exception:
            if reply.is_whole:
                raise
        await reply.finish()


async def read_body(scope: Any, receive: Any) -> bytes | None:
    """The body of a request; None if it is too large. A client that leaves meanwhile has sent all that it will send."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if not length.isdigit() or int(length) > MAX_BODY:
        return None
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > MAX_BODY:
            return None
    return b"".join(parts)


class Replay:
    """Receives a body that was read already, then whatever follows it."""

    def __init__(self, body: bytes, receive: Any):
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Any:
        if self.body is None:
            return await self.receive()
        message = {"type": "http.request", "body": self.body, "more_body": False}
        self.body = None
        return message


class Reply:
    """The reply to one request: passed on as it is, unless it is one of Serve's own texts, or stops before its end."""

    def __init__(self, send: Any):
        self.forward = send
        self.status = 0
        self.kind = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_own = self.is_whole = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = {bytes(name).lower(): bytes(value) for name, value in message["headers"]}
            self.kind = headers.get(b"content-type", b"")
            self.is_own = self.status >= 400 and self.kind.startswith(b"text/plain")
            if self.is_own:  # said again by `finish`, in the form of OpenAI's errors
                self.headers = [(name, value) for name, value in headers.items() if name in (b"retry-after", b"x-request-id")]
                return
        elif self.is_own:
            return
        elif message["type"] == "http.response.body":
            self.is_whole = not message.get("more_body", False)
        await self.forward(message)

    async def finish(self) -> None:
        """Says what Serve has not said well, or what an ended replica has not said at all."""
        if self.is_whole:
            return
        if self.is_own and self.status == 429:
            await self.fail(429, FULL)
        elif self.is_own and self.status in (404, 503):
            await self.fail(503, ABSENT)
        elif not self.status or self.is_own:
            await self.fail(503, LOST)
        elif self.kind.startswith(b"text/event-stream"):
            error = encode(envelope(503, LOST))
            await self.forward({"type": "http.response.body", "body": b"data: " + error + b"\n\ndata: [DONE]\n\n"})

    async def fail(self, status: int, message: str) -> None:
        retry = [] if status == 413 or any(name == b"retry-after" for name, _ in self.headers) else [RETRY_AFTER]
        headers = [(b"content-type", b"application/json"), *self.headers, *retry]
        await self.forward({"type": "http.response.start", "status": status, "headers": headers})
        await self.forward({"type": "http.response.body", "body": encode(envelope(status, message))})
        self.is_whole = True
