"""OpenAI's error object: one sentence, whatever the message was."""

import json

import pytest

from evolve_ray.serve.errors import MAX_MESSAGE, RequestError, encode, envelope


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "BadRequestError"), (401, "AuthenticationError"), (418, "BadRequestError"), (429, "RateLimitError"),
     (503, "ServiceUnavailableError"), (502, "InternalServerError")],
)  # fmt: skip
def test_the_type_follows_the_status(status, kind):
    assert envelope(status, "why", "field") == {"error": {"message": "why", "type": kind, "param": "field", "code": status}}


def test_a_message_is_one_line_of_bounded_length():
    message = RequestError("first\n  second\t" + "x" * 9999).body()["error"]["message"]
    assert message.startswith("first second xxx")
    assert len(message) <= MAX_MESSAGE + 4


def test_text_that_is_no_unicode_is_sent_all_the_same():
    assert json.loads(encode({"a": "x\ud800y"})) == {"a": "x?y"}
