"""A short way from Serve's proxy to the replicas of the same node: HTTP over a socket file that only this user can open.

Serve's own way costs each request several milliseconds and each piece of a stream half of one (docs/performance.md), more than a
small model needs for a token. It stays in use where no replica is on the node of the proxy.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from evolve_ray.serve.stream import cancel, disconnect

KEEP_ALIVE_S = 60.0  # of idle connections to a replica; replicas keep them longer
CONNECTION = {b"connection", b"keep-alive", b"transfer-encoding"}  # headers about one connection, which are not passed on
HOP_BY_HOP = CONNECTION | {b"content-length", b"host", b"expect", b"upgrade", b"te"}


def sockets_folder() -> Path:
    """The folder of the sockets of this user on this node and cluster; raises PermissionError if someone else has made it."""
    import ray

    cluster = hashlib.sha256(ray.get_runtime_context().gcs_address.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"evolve-ray-{os.getuid()}-{cluster}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{folder}: is not a folder that only this user can read; remove it")
    return folder


class Shortcut:
    """The proxy's side. It sends a request to the replica that has the fewest of its requests."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.sessions: dict[str, Any] = {}  # aiohttp's, by the path of the socket
        self.open: Counter[str] = Counter()

    async def forward(self, scope: Any, body: bytes, receive: Any, send: Any) -> bool:
        """Passes a request and its reply on; False if no replica of this node takes it.

        Raises an error of aiohttp if the replica ends while it works on the request.
        """
        tried: set[str] = set()
        while path := self.choose(tried):
            tried.add(path)
            self.open[path] += 1
            try:
                if await self.exchange(path, scope, body, receive, send):
                    return True
            finally:
                self.open[path] -= 1
        return False

    def choose(self, tried: set[str]) -> str | None:
        """The socket of the least busy replica that was not tried yet."""
        if self.folder is None:
            self.folder = sockets_folder()
        with os.scandir(self.folder) as entries:
            paths = [entry.path for entry in entries if entry.name.endswith(".sock") and entry.path not in tried]
        return min(paths, key=lambda path: (self.open[path], path), default=None)

    async def exchange(self, path: str, scope: Any, body: bytes, receive: Any, send: Any) -> bool:
        """One request to one replica; False if it cannot be reached. Ends early when the client leaves."""
        import asyncio

        from aiohttp import ClientConnectorError

        talk = asyncio.ensure_future(self.talk(path, scope, body, send))
        gone = asyncio.ensure_future(disconnect(receive))
        try:
            await asyncio.wait([talk, gone], return_when=asyncio.FIRST_COMPLETED)
            if talk.done():
                talk.result()
            return True
        except ClientConnectorError:  # its process has ended
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            if session := self.sessions.pop(path, None):
                await session.close()
            return False
        finally:
            await cancel(talk, gone)

    async def talk(self, path: str, scope: Any, body: bytes, send: Any) -> None:
        query = scope["query_string"].decode("latin-1")
        url = f"http://replica{scope['raw_path'].decode('latin-1')}" + (f"?{query}" if query else "")
        headers = [
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"] if name not in HOP_BY_HOP
        ]
        async with self.session(path).request(scope["method"], url, data=body or None, headers=headers) as response:
            kept = [(name.lower(), value) for name, value in response.raw_headers if name.lower() not in CONNECTION]
            await send({"type": "http.response.start", "status": response.status, "headers": kept})
            async for part in response.content.iter_any():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def session(self, path: str) -> Any:
        if path not in self.sessions:
            from aiohttp import ClientSession, ClientTimeout, UnixConnector

            self.sessions[path] = ClientSession(
                connector=UnixConnector(path, limit=0, keepalive_timeout=KEEP_ALIVE_S),
                timeout=ClientTimeout(total=None),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )
        return self.sessions[path]


class SocketServer:
    """The replica's side: serves the application at a socket of its own until `stop`."""

    def __init__(self, app: Any, name: str):
        import uvicorn

        class Server(uvicorn.Server):
            def capture_signals(self) -> Any:
                return contextlib.nullcontext()  # signals are for Ray

        self.path = sockets_folder() / f"{name}.sock"
        config = uvicorn.Config(
            app, uds=str(self.path), lifespan="off", log_config=None, access_log=False, timeout_keep_alive=2 * int(KEEP_ALIVE_S),
            server_header=False, date_header=False,
        )  # fmt: skip
        self.server = Server(config)

    async def serve(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        await self.server.serve()

    def hide(self) -> None:
        """Lets proxies find it no longer; open requests go on."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
