"""The protocol of a scorer, and the check of what it returns."""

import math
import numbers
from typing import Any, Protocol, TypeGuard

from evolve_ray.errors import IntegrityError


class Scorer(Protocol):
    """Returns one score for each (prompt, gold answer, response) of a batch; higher is better. NaN: there is no score.

    A prompt is a text, or for a conversation a tuple of messages `{"role": ..., "content": ...}` that ends with a user turn.
    """

    def __call__(self, prompts: list[Any], answers: list[str | None], responses: list[str]) -> list[float]: ...


def call_scorer(name: str, scorer: Scorer, prompts: list[Any], answers: list[str | None], responses: list[str]) -> list[float]:
    """The values of a scorer, one for each response; they may be not finite. Raises IntegrityError if the number differs."""
    values = list(scorer(prompts, answers, responses))
    if len(values) != len(responses):
        raise IntegrityError(
            f"{name}: returned {len(values)} values for {len(responses)} responses; a scorer must return one value for each "
            "response; fix it, then submit the same command again"
        )
    return values


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number, neither NaN nor infinite."""
    return isinstance(value, numbers.Real) and math.isfinite(value)
