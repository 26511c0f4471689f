"""The guard in Serve's proxy: what it passes on unchanged, and what it says where Serve says it badly or not at all."""

import asyncio
import json

import pytest

from evolve_ray.serve import guard
from evolve_ray.serve.guard import Guard
from tests.plain.serve.examples import Exchange, request


class NoShortcut:
    async def forward(self, scope, body, receive, send):
        return False


@pytest.fixture(autouse=True)
def no_shortcut(monkeypatch):
    monkeypatch.setattr(guard, "Shortcut", NoShortcut)


def replying(status, headers, *parts, raises=None):
    """An application that replies with some parts, of which the last is the end only if nothing is raised."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for place, part in enumerate(parts):
            more = raises is not None or place + 1 < len(parts)
            await send({"type": "http.response.body", "body": part, "more_body": more})
        if raises:
            raise raises

    return app


JSON, EVENTS, TEXT = ([(b"content-type", kind)] for kind in (b"application/json", b"text/event-stream", b"text/plain"))


def test_a_reply_of_the_endpoint_passes_as_it_is():
    reply = request(Guard(replying(400, JSON, b'{"error"', b": 1}")), "POST", "/v1/chat/completions")
    assert (reply.status, reply.content, len(reply.messages)) == (400, b'{"error": 1}', 3)


def test_the_application_receives_the_body_and_then_what_follows():
    async def app(scope, receive, send):
        first = await receive()
        assert (first["body"], first["more_body"]) == (b"hello", False)
        assert (await receive())["type"] == "http.disconnect"

    async def go():
        exchange = Exchange(Guard(app), "POST", "/v1/x", b"hello")
        exchange.leave()
        await exchange.run()

    asyncio.run(go())


@pytest.mark.parametrize(("status", "message"), [(404, guard.ABSENT), (429, guard.FULL), (500, guard.LOST), (503, guard.ABSENT)])
def test_a_text_of_serve_becomes_an_error_object(status, message):
    headers = [*TEXT, (b"x-request-id", b"7")]
    reply = request(Guard(replying(status, headers, b"Internal Server Error")), "POST", "/v1/chat/completions")
    assert reply.error["message"] == message
    assert reply.status == (429 if status == 429 else 503)
    assert (reply.headers["retry-after"], reply.headers["x-request-id"]) == ("2", "7")


def test_the_wait_that_serve_names_is_kept():
    reply = request(Guard(replying(429, [*TEXT, (b"Retry-After", b"9")], b"full")), "POST", "/v1/chat/completions")
    assert [value for name, value in reply.messages[0]["headers"] if name == b"retry-after"] == [b"9"]


@pytest.mark.parametrize("raises", [RuntimeError("the actor died"), None])
def test_a_replica_that_says_nothing_is_one_clean_error(raises):
    async def app(scope, receive, send):
        if raises:
            raise raises

    reply = request(Guard(app), "POST", "/v1/chat/completions")
    assert (reply.status, reply.error["message"], reply.headers["retry-after"]) == (503, guard.LOST, "2")


def test_a_stream_that_breaks_ends_with_an_error_event_and_the_end_mark():
    broken = replying(200, EVENTS, b"data: 1\n\n", raises=RuntimeError("died"))
    reply = request(Guard(broken), "POST", "/v1/chat/completions")
    events = [event.removeprefix("data: ") for event in reply.content.decode().split("\n\n") if event]
    assert (events[0], events[2]) == ("1", "[DONE]")
    assert json.loads(events[1])["error"]["code"] == 503
    assert not reply.messages[-1].get("more_body")


def test_an_error_after_the_reply_is_not_hidden():
    async def app(scope, receive, send):
        await replying(200, JSON, b"{}")(scope, receive, send)
        raise RuntimeError("after the end")

    with pytest.raises(RuntimeError, match="after the end"):
        request(Guard(app), "GET", "/v1/models")


@pytest.mark.parametrize("path", ["/other", "/v2/x", "/-/healthz"])
def test_other_applications_are_not_touched(path):
    reply = request(Guard(replying(503, TEXT, b"their own words")), "GET", path)
    assert (reply.status, reply.content) == (503, b"their own words")


@pytest.mark.parametrize("length", [str(guard.MAX_BODY + 1), "many", "-1"])
def test_a_body_whose_length_is_no_good_is_refused_before_it_is_read(length):
    reply = request(Guard(replying(200, JSON, b"{}")), "POST", "/v1/x", headers={"content-length": length})
    assert (reply.status, reply.error["code"]) == (413, 413)
    assert "retry-after" not in reply.headers


def test_a_body_without_a_length_is_read_to_the_limit_only(monkeypatch):
    monkeypatch.setattr(guard, "MAX_BODY", 3)
    assert request(Guard(replying(200, JSON, b"{}")), "POST", "/v1/x", b"1234").status == 413
    assert request(Guard(replying(200, JSON, b"{}")), "POST", "/v1/x", b"123").status == 200
