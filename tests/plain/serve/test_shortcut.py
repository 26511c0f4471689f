"""The way over socket files: real sockets, a small application behind them."""

import asyncio
import os

import pytest

from evolve_ray.serve import shortcut
from evolve_ray.serve.shortcut import Shortcut, SocketServer
from tests.plain.serve.examples import Exchange


@pytest.fixture
def folder(tmp_path_factory, monkeypatch):
    """A short path: the name of a socket may have about a hundred characters."""
    made = tmp_path_factory.mktemp("s")
    monkeypatch.setattr(shortcut, "sockets_folder", lambda: made)
    return made


class Echo:
    """Replies with its name, the method, the path and the body in two parts; "slow" never ends, "dies" breaks off."""

    def __init__(self, name):
        self.name, self.left = name, 0

    async def __call__(self, scope, receive, send):
        body = (await receive())["body"]
        headers = [(b"content-type", b"text/event-stream"), (b"x-seen", str(len(scope["headers"])).encode())]
        await send({"type": "http.response.start", "status": 202, "headers": headers})
        text = f"{self.name} {scope['method']} {scope['raw_path'].decode()} {body.decode()}".encode()
        await send({"type": "http.response.body", "body": text, "more_body": True})
        if body == b"slow":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left += 1
        if body == b"dies":
            raise RuntimeError("on purpose")
        await send({"type": "http.response.body", "body": b" end"})


async def up(*names):
    servers, apps = [], [Echo(name) for name in names]
    for app in apps:
        server = SocketServer(app, app.name)
        servers.append((server, asyncio.create_task(server.serve())))
        while not server.server.started:
            await asyncio.sleep(0.01)
    return apps, servers


async def down(way, servers):
    for session in way.sessions.values():
        await session.close()
    for server, task in servers:
        server.server.should_exit = True
        await task


async def ask(way, body=b"hi", path="/v1/x%20y"):
    exchange = Exchange(None, "POST", path, body, {"connection": "close", "te": "x", "x-mine": "1"})
    return exchange, await way.forward(exchange.scope, body, exchange.receive, exchange.send)


def test_requests_go_through_unchanged_and_spread_over_replicas(folder):
    async def go():
        way, (apps, servers) = Shortcut(), await up("a", "b")
        exchange, taken = await ask(way)
        assert taken
        assert (exchange.status, exchange.content) == (202, b"a POST /v1/x%20y hi end")
        assert exchange.headers["content-type"] == "text/event-stream"
        slow = asyncio.create_task(ask(way, b"slow"))
        await asyncio.sleep(0.1)
        assert (await ask(way))[0].content.startswith(b"b ")
        slow.cancel()
        await asyncio.wait([slow])
        while not apps[0].left:
            await asyncio.sleep(0.01)
        assert (await ask(way))[0].content.startswith(b"a ")
        await down(way, servers)

    asyncio.run(asyncio.wait_for(go(), 20))


def test_a_client_that_leaves_ends_the_request_in_the_replica(folder):
    async def go():
        way, ((app,), servers) = Shortcut(), await up("a")
        exchange = Exchange(None, "POST", "/", b"slow")
        exchange.body = None
        task = asyncio.create_task(way.forward(exchange.scope, b"slow", exchange.receive, exchange.send))
        while len(exchange.messages) < 2:
            await asyncio.sleep(0.01)
        exchange.leave()
        assert await task
        while not app.left:
            await asyncio.sleep(0.01)
        await down(way, servers)

    asyncio.run(asyncio.wait_for(go(), 20))


def test_a_socket_without_a_process_is_removed_and_the_next_one_tried(folder):
    async def go():
        (folder / "0-dead.sock").touch()
        way, (_, servers) = Shortcut(), await up("a")
        exchange, taken = await ask(way)
        assert (taken, exchange.status) == (True, 202)
        assert [path.name for path in folder.glob("*.sock")] == ["a.sock"]
        servers[0][0].hide()
        servers[0][0].hide()  # a replica may be told to end twice
        exchange, taken = await ask(way)
        assert (taken, exchange.messages) == (False, [])
        await down(way, servers)

    asyncio.run(asyncio.wait_for(go(), 20))


def test_a_replica_that_ends_on_the_way_is_an_error_and_not_a_second_try(folder):
    async def go():
        from aiohttp import ClientError

        way, (_, servers) = Shortcut(), await up("a", "b")
        with pytest.raises(ClientError):
            await ask(way, b"dies")
        assert way.open.total() == 0
        await down(way, servers)

    asyncio.run(asyncio.wait_for(go(), 20))


def test_the_folder_of_the_sockets_is_this_users_alone(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    context = type("Context", (), {"gcs_address": "127.0.0.1:1"})()
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(shortcut.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = shortcut.sockets_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert shortcut.sockets_folder() == folder
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="only this user"):
        shortcut.sockets_folder()
    folder.rmdir()
    os.symlink(tmp_path, folder)
    with pytest.raises(PermissionError):
        shortcut.sockets_folder()
