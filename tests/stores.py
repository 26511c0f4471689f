"""An S3-compatible server in a process of its own, and a proxy before it that goes wrong on demand."""

import contextlib
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

SERVER = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "canary-key-id", "AWS_SECRET_ACCESS_KEY": "canary-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server with one bucket, `bucket`; it ends with this process."""
    given = {**os.environ, **CREDENTIALS}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=given
    )
    try:
        port = int(process.stdout.readline())
        assert request(port, "PUT", "/bucket")[0] == 200
        yield port
    finally:
        process.stdin.close()
        process.wait(20)


def request(port: int, method: str, path: str, body: bytes = b"", headers: dict | None = None) -> tuple[int, bytes, list]:
    """One request past every client: the server checks no signatures."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    default = {
        "Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
    }
    try:
        connection.request(method, path, body, default if headers is None else headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheaders()
    finally:
        connection.close()


@dataclass
class Proxy:
    """What the proxy saw, and what it does next: `fault(method, path)` names a fault, or nothing.

    `500` and `503` answer in the server's place, `cut` closes the connection before the server hears of the request, `lost`
    after it has obeyed, `half` in the middle of its answer, `slow` waits a while.
    """

    server: int
    port: int = 0
    fault: Callable[[str, str], str] = lambda method, path: ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    fired: list[str] = field(default_factory=list)


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
            if fault in ("500", "503"):
                return self.reply(int(fault), b"<Error><Code>InternalError</Code><Message>out of order</Message></Error>", [])
            if fault == "slow":
                time.sleep(0.5)
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
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()


def environment(port: int) -> dict[str, str]:
    """What a client must find to speak to 127.0.0.1:port."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
