"""Reads the body of a request: bytes to JSON to vLLM's own request class. Whatever is wrong with it is the client's error."""

import json
import math
from typing import Any

from starlette.requests import Request

from evolve_ray.errors import first_line
from evolve_ray.serve.errors import RequestError


async def read_bytes(http: Request, limit: int) -> bytes:
    """The body; raises RequestError as soon as it is longer than `limit` bytes, or if it is not JSON by its header."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps out other sites' forms, which a browser sends without asking
        raise RequestError("the header Content-Type must be application/json", status=415)
    parts, length = [], 0
    async for part in http.stream():
        length += len(part)
        if length > limit:
            raise RequestError(f"the body is larger than {limit >> 10} KiB; send less", status=413)
        parts.append(part)
    return b"".join(parts)


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object of real numbers and real text."""
    try:
        content = json.loads(body, parse_constant=refuse_constant, parse_float=finite)
        if b"\\ud" in body.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise RequestError("the body is nested too deeply; send a simpler one") from None
    except UnicodeEncodeError:
        raise RequestError("the body has half of a surrogate pair in a text, which is no character; remove it") from None
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise RequestError('the body must be a JSON object, like {"messages": [...]}')
    return content


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def parse_request(content: dict[str, Any]) -> Any:
    """vLLM's request. Its validators are written for clients that mean well: any error of theirs is a fault of the body."""
    from pydantic import ValidationError
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param

    try:
        request = ChatCompletionRequest.model_validate(content)
        request.messages = [dict(message) for message in request.messages]
        return request
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = clean_loc_for_param(fault["loc"]) if fault["loc"] else None
        raise RequestError(f"{param or 'the body'}: {first_line(ValueError(fault['msg']))}", param) from None
    except RequestError:
        raise
    except Exception as error:
        param = getattr(error, "parameter", None)
        raise RequestError(f"{param or 'the body'}: {first_line(error)}", param) from None
