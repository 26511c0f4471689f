"""Bodies as bytes: type, size and JSON, before anything looks at what they say."""

import asyncio

import pytest
from starlette.requests import Request

from evolve_ray.serve.body import parse_json, read_bytes
from evolve_ray.serve.errors import RequestError


def read(*parts: bytes, kind="application/json", limit=100):
    async def receive():
        waiting.pop(0)
        return {"type": "http.request", "body": sent.pop(0), "more_body": bool(sent)}

    sent, waiting = list(parts), list(parts)
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())]}
    return asyncio.run(read_bytes(Request(scope, receive), limit)), waiting


def test_a_body_is_read_in_parts():
    assert read(b"{", b"}", kind="application/json; charset=utf-8") == (b"{}", [])


def test_a_body_is_not_read_further_than_its_limit():
    with pytest.raises(RequestError, match="larger than 0 KiB") as caught:
        read(b"x" * 60, b"x" * 60, b"x" * 60)
    assert caught.value.status == 413


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_of_another_site_could_send_is_refused(kind):
    with pytest.raises(RequestError, match="Content-Type") as caught:
        read(b"{}", kind=kind)
    assert caught.value.status == 415


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not valid JSON"),
        (b"{", "the body is not valid JSON"),
        (b"\xff{}", "the body is not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is too large a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the body is not valid JSON"),
        (b"[" * 100_000, "the body is nested too deeply"),
        (b'{"a":' * 100_000, "the body is nested too deeply"),
        (b"[]", "the body must be a JSON object"),
        (b'"text"', "the body must be a JSON object"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
    ],
)
def test_what_is_no_json_object_is_refused(body, message):
    with pytest.raises(RequestError, match=message) as caught:
        parse_json(body)
    assert caught.value.status == 400


def test_whole_surrogate_pairs_and_the_text_of_an_escape_pass():
    assert parse_json(b'{"a": "\\ud83d\\ude00", "b": "\\\\ud800"}') == {"a": "\U0001f600", "b": "\\ud800"}
