"""Streams and closed connections: events in order, the first at once; whatever ran is ended when the client leaves."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect

from evolve_ray.serve.errors import RequestError
from evolve_ray.serve.stream import CLIENT_LEFT, EventStream, unless_gone
from tests.plain.serve.examples import Exchange


class Source:
    """Lines with pauses of some seconds between them, and whether the generator was closed."""

    def __init__(self, *parts):
        self.parts, self.closed = parts, False

    async def lines(self):
        try:
            for part in self.parts:
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, str):
                    yield part
                else:
                    await asyncio.sleep(part)
        finally:
            self.closed = True


def send(source, *, leaves_at=None, seconds=5.0):
    """(the exchange, the status that `close` was called with)."""
    statuses = []
    failure = lambda error: error if isinstance(error, RequestError) else RequestError(type(error).__name__, status=504)  # noqa: E731
    stream = EventStream(source.lines(), statuses.append, failure, seconds)

    async def go():
        exchange = Exchange(stream, "POST", "/")
        exchange.body = None  # read before
        if leaves_at is not None:
            exchange.on_send = lambda message: exchange.leave() if leaves_at in message.get("body", b"") else None
        return await exchange.run()

    exchange = asyncio.run(go())
    assert source.closed
    (status,) = statuses
    return exchange, status


def test_lines_arrive_in_order_and_the_last_message_is_the_end():
    exchange, status = send(Source("a", "b", 0.03, "c"))
    assert (exchange.content, exchange.status, status) == (b"abc", 200, 200)
    assert exchange.headers["content-type"].startswith("text/event-stream")
    assert [message.get("more_body") for message in exchange.messages[1:]][-2:] == [True, False] or len(exchange.messages) == 2


def test_lines_that_come_together_are_sent_together_and_the_first_does_not_wait():
    exchange, _ = send(Source("a", 0.001, *"bcdef"))
    assert [message["body"] for message in exchange.messages[1:]] == [b"a", b"bcdef"]


def test_an_error_on_the_way_is_the_last_event():
    exchange, status = send(Source("a", RequestError("no more", status=500)))
    assert (exchange.status, status) == (200, 500)
    assert exchange.content.startswith(b'adata: {"error":{"message":"no more"')
    assert exchange.content.endswith(b"\n\ndata: [DONE]\n\n")


def test_a_stream_that_takes_too_long_is_ended():
    exchange, status = send(Source("a", 30, "b"), seconds=0.1)
    assert status == 504
    assert b"TimeoutError" in exchange.content


def test_a_client_that_leaves_closes_the_generator_at_once():
    exchange, status = send(Source("a", 30, "b"), leaves_at=b"a")
    assert (exchange.content, status) == (b"a", CLIENT_LEFT)


def test_work_is_cancelled_when_the_client_leaves():
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # what has to be cleaned up is waited for
            ended.append(True)

    async def go():
        exchange = Exchange(None, "POST", "/")
        asyncio.get_running_loop().call_later(0.02, exchange.leave)
        await unless_gone(exchange, work())

    with pytest.raises(ClientDisconnect):
        asyncio.run(go())
    assert ended == [True]


def test_work_that_ends_gives_its_result_or_its_error():
    async def work(error=None):
        if error:
            raise error
        return 7

    async def go(error=None):
        return await unless_gone(Exchange(None, "POST", "/"), work(error))

    assert asyncio.run(go()) == 7
    with pytest.raises(KeyError):
        asyncio.run(go(KeyError("x")))
