"""The protocol of a scorer, and the check of what it returns."""

import math
import numbers
from typing import Any, Protocol, TypeGuard

from evolve_ray.config.plugs import blame, is_own, short
from evolve_ray.errors import IntegrityError, UserError


class Scorer(Protocol):
    """Returns one score for each (prompt, gold answer, response) of a batch; higher is better. NaN: there is no score.

    A prompt is a text, or for a conversation a tuple of messages `{"role": ..., "content": ...}` that ends with a user turn.
    """

    def __call__(self, prompts: list[Any], answers: list[str | None], responses: list[str]) -> list[float]: ...


def call_scorer(name: str, scorer: Scorer, prompts: list[Any], answers: list[str | None], responses: list[str]) -> list[float]:
    """The values of a scorer, one for each response; they may be not finite. `name` is the option and what it names.

    Tensors and arrays become numbers. Raises IntegrityError if the number of values differs, UserError if somebody's own scorer
    raises an error or returns no list.
    """
    field, _, plug = name.rpartition(" ")
    try:
        with blame(field, plug):
            returned = scorer(prompts, answers, responses)
    except UserError:
        row = failing_row(scorer, prompts, answers, responses) if is_own(plug) else None
        if row is None:
            raise
        with blame(field, plug, f"the response {short(responses[row])!r} to the prompt {short(str(prompts[row]))!r}"):
            returned = scorer(*([column[row]] for column in (prompts, answers, responses)))  # type: ignore[arg-type]
        raise
    if is_own(plug) and (isinstance(returned, str | dict) or not hasattr(returned, "__iter__")):
        raise UserError(
            f"{name}: returned {short(repr(returned))}; a scorer must return a list with one number for each response"
        )
    values = [plain_number(value) for value in returned]
    if len(values) != len(responses):
        raise IntegrityError(
            f"{name}: returned {len(values)} values for {len(responses)} responses; a scorer must return one value for each "
            "response; fix it, then submit the same command again"
        )
    return values


def failing_row(scorer: Scorer, prompts: list[Any], answers: list[str | None], responses: list[str]) -> int | None:
    """The first row on which a scorer fails alone; None if it fails on none."""
    for row, columns in enumerate(zip(prompts, answers, responses, strict=True)):
        try:
            scorer(*([text] for text in columns))  # type: ignore[arg-type]
        except Exception:
            return row
    return None


def plain_number(value: Any) -> Any:
    """The number in a tensor or array of one element; any other value as it is."""
    if isinstance(value, numbers.Real) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (ValueError, RuntimeError, TypeError):
        return value


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number, neither NaN nor infinite."""
    return isinstance(value, numbers.Real) and math.isfinite(value)
