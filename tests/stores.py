"""An S3-compatible server in a process of its own, a proxy before it that goes wrong on demand, and drivers without threads."""

import contextlib
import copy
import http.client
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from evolve_ray.store import object_store
from evolve_ray.store.manifest import Manifest, read_manifest
from evolve_ray.store.mirror import Mirror, committed_places, files_of
from evolve_ray.store.object_lock import Lease
from evolve_ray.store.object_store import Store
from evolve_ray.store.run import Stage

__all__ = ["at", "place", "proxy", "server", "way"]

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "canary-key-id", "AWS_SECRET_ACCESS_KEY": "canary-secret", "AWS_DEFAULT_REGION": "us-east-1"}
SIGNED = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"  # nobody checks it
ERRORS = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}
READ_TIMEOUT_S = 0.5
SLOW_S = 0.8


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server with one bucket, `bucket`; it ends with this process."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", SERVER], text=True, env={**os.environ, **CREDENTIALS}, **pipes)
    try:
        port = int(process.stdout.readline())
        assert request(port, "PUT", "/bucket")[0] == 200
        yield port
    finally:
        process.stdin.close()
        process.wait(20)


def request(port: int, method: str, path: str, body: bytes = b"", headers: dict | None = None) -> tuple[int, bytes, list]:
    """One request past every client."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {"Authorization": SIGNED} if headers is None else headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheaders()
    finally:
        connection.close()


@dataclass
class Proxy:
    """What the proxy saw, and what it does next: `fault(method, path)` names a fault, or nothing.

    `403`, `500` and `503` answer in the server's place, `cut` closes the connection before the server hears of the request,
    `lost` after it has obeyed, `half` in the middle of its answer, `slow` waits for longer than the client does.
    """

    server: int
    port: int = 0
    fault: Callable[[str, str], str] = lambda method, path: ""
    before_hanging_up: Callable[[], None] = lambda: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    fired: list[str] = field(default_factory=list)
    client: Any = None

    def heal(self) -> None:
        """No more faults, and nothing seen yet."""
        self.fault, self.before_hanging_up = (lambda method, path: ""), (lambda: None)
        self.requests.clear()
        self.fired.clear()


@contextlib.contextmanager
def proxy_to(server: int) -> Iterator[Proxy]:
    proxy = Proxy(server)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.requests.append((self.command, self.path))
            fault = proxy.fault(self.command, self.path)
            if fault:
                proxy.fired.append(fault)
            if fault == "cut":
                return self.hang_up()
            if fault in ERRORS:
                told = f"<Error><Code>{ERRORS[fault]}</Code><Message>said so</Message></Error>"
                return self.reply(int(fault), told.encode(), [])
            if fault == "slow":
                time.sleep(SLOW_S)
            status, data, headers = request(proxy.server, self.command, self.path, body, dict(self.headers.items()))
            if fault == "lost":
                return self.hang_up()
            self.reply(status, data, headers, cut=fault == "half")

        def reply(self, status: int, data: bytes, headers: list, *, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = next((value for name, value in headers if name.lower() == "content-length"), len(data))
            self.send_header("Content-Length", str(length if self.command == "HEAD" else len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.hang_up()

        def hang_up(self) -> None:
            proxy.before_hanging_up()
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:  # clients that hang up are no news here
            pass

    listener = Server(("127.0.0.1", 0), Handler)
    proxy.port = listener.server_address[1]
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()


def environment(port: int) -> dict[str, str]:
    """What a client must find to speak to 127.0.0.1:port."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


# Fixtures, for the modules that import them.


@pytest.fixture(scope="module")
def server():
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def way(server):
    """The proxy, with one client that all tests share: making one takes half a second. It repeats nothing by itself, so that
    each fault is ours to see to."""
    impatient = copy.deepcopy(object_store.CLIENTS)
    impatient["s3"]["config_kwargs"] |= {"read_timeout": READ_TIMEOUT_S, "retries": {"max_attempts": 0}}
    with proxy_to(server) as way, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(way.port).items():
            patch.setenv(name, value)
        patch.setattr(object_store, "CLIENTS", impatient)
        way.client = Store("s3://bucket/any")
        yield way


@pytest.fixture
def proxy(way):
    way.heal()
    yield way
    way.heal()


@pytest.fixture
def at(proxy):
    """Gives the store at a URI."""

    def store(uri: str, patience_s: float = 20.0) -> Store:
        found = copy.copy(proxy.client)
        found.uri, found.root, found.patience_s = uri, uri.removeprefix("s3://"), patience_s
        return found

    return store


@pytest.fixture
def place(tmp_path):
    """A URI of its own for each test."""
    return f"s3://bucket/{tmp_path.parent.name}/{tmp_path.name}"


# A driver's side, and a reader's.


def mirror(store: Store, root: Path) -> Mirror:
    """A driver's mirror, without its thread; it takes the lock, whoever holds it."""
    lease = Lease(store, root, stale_s=0.0)
    lease.take()
    lease.stale_s = 60.0
    return Mirror(store, root, lease)


def make(root: Path, place: str = "iteration-01/pairs", key: str = "key", text: str = "rows") -> Manifest:
    """Commits a stage with a file, an empty one, and one in a folder."""
    stage = Stage(root / place, place.rpartition("/")[2], key)
    (stage.start() / "part").mkdir()
    (stage.work / "rows.txt").write_text(text)
    (stage.work / "part" / "deep.txt").write_text("deep")
    return stage.commit()


def fetched(store: Store, folder: Path) -> dict[str, str]:
    """What a driver on a fresh machine starts from: the committed folders, by their identities."""
    Mirror(store, folder, Lease(store, folder)).fetch_all(alone=False)
    return identities(folder)


def identities(folder: Path) -> dict[str, str]:
    """The committed folders of a run, each held against its manifest."""
    found = {name: read_manifest(folder / name, verify=True) for name in committed_places(files_of(folder))}
    return {name: manifest.identity for name, manifest in found.items()}


def objects_of(store: Store) -> list[str]:
    return [name for name in store.names() if not name.startswith("LOCK/")]
