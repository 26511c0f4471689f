"""Checks of what a strategy yields: a wrong request ends in one sentence with plug, prompt and line."""

import math
import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.config.plugs import short
from evolve_ray.errors import UserError
from evolve_ray.refine.asks import Ask, Draft, Given, Judge, LogProb, Made, Score, Skip, Verify
from evolve_ray.store.turns import are_messages

REQUESTS = ((Ask, Judge, Verify, Skip, Given, Score, Made, LogProb), (Ask,))  # what a strategy may yield alone, and in a list


def check_request(name: str, prompt_id: str, strategy: Any, request: Any) -> None:
    """Raises UserError if `request`, which the strategy `name` yielded, is of no known kind or holds something wrong."""
    asks = request if isinstance(request, list) else [request]
    for ask in asks:
        fault = fault_of(ask, in_list=isinstance(request, list))
        if fault:
            raise UserError(f"strategy.name: {name!r}, prompt {prompt_id}: yielded {fault}{line_of(strategy)}")


def fault_of(request: Any, *, in_list: bool) -> str:
    """What is wrong with one request; "" if nothing is."""
    if not isinstance(request, REQUESTS[in_list]):
        kinds = ", ".join(kind.__name__ for kind in REQUESTS[0])
        return f"{short(repr(request))}, but must yield one of {kinds}, or a list of Ask"
    kind = type(request).__name__
    article = "an" if kind == "Ask" else "a"
    if isinstance(request, Ask | LogProb) and not are_messages(request.messages):
        messages = f"messages {short(repr(request.messages))}"
        return f"{article} {kind} with {messages}; each message must be a dict with the texts 'role' and 'content'"
    for field, fine, what in PARTS.get(type(request), ()):
        value = getattr(request, field)
        if not fine(value):
            return f"{article} {kind} with {field} {short(repr(value))}; it must be {what}"
    return ""


def line_of(strategy: Any) -> str:
    """`; see FILE.py:LINE` of the place where a generator waits; "" if it is none."""
    while getattr(getattr(strategy, "gi_yieldfrom", None), "gi_frame", None):
        strategy = strategy.gi_yieldfrom
    frame = getattr(strategy, "gi_frame", None)
    return f"; see {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_draft(value: Any) -> bool:
    return isinstance(value, Draft)


def are_drafts(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(is_draft, value))


def is_text(value: Any) -> bool:
    return isinstance(value, str)


PLACE = (
    ("sample", is_whole(0), "a whole number of at least 0"),
    ("round", is_whole(1), "a whole number of at least 1"),
    ("parent_id", lambda value: value is None or is_text(value), "the draft_id of a draft, or None"),
    ("kind", lambda value: is_text(value) and value not in ("", "skipped"), "a text other than 'skipped'"),
)
# The fields of each request: name, whether a value is right, and what it must be.
PARTS: dict[type, tuple[tuple[str, Callable[[Any], bool], str], ...]] = {
    Ask: (
        *PLACE,
        ("temperature", lambda value: value is None or (is_number(value) and value >= 0), "a number of at least 0, or None"),
        ("max_tokens", lambda value: value is None or is_whole(1)(value), "a whole number of at least 1, or None"),
        (
            "stop",
            lambda value: isinstance(value, tuple | list) and all(is_text(part) and part for part in value),
            "a tuple of texts, none of them empty",
        ),
        ("prefix", is_text, "a text"),
        ("model", is_text, "the name of a model of the recipe's [models], or an empty text"),
    ),
    LogProb: (("text", is_text, "a text"), ("finished", lambda value: isinstance(value, bool), "True or False")),
    Judge: (("drafts", are_drafts, "a tuple of Draft"),),
    Verify: (("draft", is_draft, "a Draft"),),
    Skip: (("draft", is_draft, "a Draft"),),
    Score: (("draft", is_draft, "a Draft"), ("value", is_number, "a finite number")),
    Made: (("text", is_text, "a text"), *PLACE, ("parts", are_drafts, "a tuple of Draft")),
}
