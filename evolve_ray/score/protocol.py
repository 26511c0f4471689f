"""What a scorer is, and what must come back from one."""

import math
import numbers
from typing import Any, Protocol, TypeGuard

from evolve_ray.errors import IntegrityError


class Scorer(Protocol):
    """A batch of (prompt, answer, response) -> one number each; higher is better. NaN: no number can be given."""

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]: ...


def checked(name: str, scorer: Scorer, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
    """What a scorer gives, one value for each response; whether they are finite is for the caller to see."""
    values = list(scorer(prompts, answers, responses))
    if len(values) != len(responses):
        raise IntegrityError(
            f"{name}: gave {len(values)} values for {len(responses)} responses, so nobody can tell whose they are; it must give "
            "one for each: mend it, then submit the same command again"
        )
    return values


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and math.isfinite(value)
