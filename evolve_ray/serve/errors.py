"""What the endpoint answers when a request cannot be served: a status and OpenAI's error object, in one sentence."""

import json
from typing import Any

TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 405: "MethodNotAllowedError",
    413: "RequestTooLargeError", 415: "UnsupportedMediaTypeError", 429: "RateLimitError", 500: "InternalServerError",
    503: "ServiceUnavailableError", 504: "TimeoutError",
}  # fmt: skip
MAX_MESSAGE = 500  # characters: a message may quote what the client sent


class RequestError(Exception):
    """A request that is not served. `param` names the field of the body; `headers` are sent along."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.headers = message, param, status, headers or {}

    def body(self) -> dict[str, Any]:
        return envelope(self.status, self.message, self.param)


def envelope(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object, with the fields that vLLM gives it."""
    kind = TYPES.get(status) or ("BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": one_sentence(message), "type": kind, "param": param, "code": status}}


def one_sentence(message: str) -> str:
    """A message in one line, and not longer than a few."""
    message = " ".join(message.split())
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " ..."


def encode(content: dict[str, Any]) -> bytes:
    """JSON as a server sends it; a lone surrogate in a text becomes a question mark, because UTF-8 has no place for it."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
