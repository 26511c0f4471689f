"""Selection over all rows of an iteration, after the one for each prompt: which of them are kept.

Such a function gets an iterable of small dicts that can be read several times, and `[selection]`. It returns the ids of the pairs
to keep, or `{pair_id: weight}`: then the others are left out, and the weights are the number `weight` of the loss.
"""

import math
from collections.abc import Iterable

from evolve_ray.config.options import Selection
from evolve_ray.errors import UserError

SHOWN = ("pair_id", "prompt_id", "chosen_round", "rejected_round", "chosen_score", "rejected_score")


def summary(pair: dict) -> dict:
    """What a function over all rows sees of a row; lengths are in characters."""
    return {
        **{name: pair[name] for name in SHOWN},
        "kind": pair.get("kind") or "answer",
        "numbers": pair.get("numbers") or {},
        "chosen_length": len(pair["chosen"]),
        "rejected_length": len(pair["rejected"]),
    }


def top_share(rows: Iterable[dict], options: Selection) -> set[str]:
    """The share `options.top_share` of the rows, rounded up, with the largest difference of scores; ties go by id."""
    ranked = sorted((-difference(row), row["pair_id"]) for row in rows)
    return {pair_id for _, pair_id in ranked[: math.ceil(options.top_share * len(ranked))]}


def difference(row: dict) -> float:
    """How much higher the chosen side scores. Raises UserError if a side has no score."""
    if row["chosen_score"] is None or row["rejected_score"] is None:
        raise UserError(
            f"selection.top_share: pair {row['pair_id']} of kind {row['kind']!r} has no two scores to compare; remove the "
            "option, or choose with a function of your own (selection.whole)"
        )
    return row["chosen_score"] - row["rejected_score"]
