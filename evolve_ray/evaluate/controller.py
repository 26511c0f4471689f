"""Whether a run goes on after an iteration: pure functions of the models so far, as report.json describes them.

A controller sees `models`: every evaluated model in order, the last one being of the iteration that it decides on, each with
`splits`, and those of iterations with `probe`, `drift` and `against_previous`. "stop" ends the run with this iteration's
policy; "roll_back" ends it with the policy before, and the iteration stays on disk and in the report, marked as rolled back.
A difference is significant when its paired 95 % interval does not hold 0: of a model that did not change, one in forty
differences is above 0 so, and one in forty below.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evolve_ray.config.options import Controller

VERSION = 1
ACTIONS = ("continue", "stop", "roll_back")
Models = list[dict[str, Any]]


@dataclass(frozen=True)
class Decision:
    """One of `ACTIONS`, and why, in a sentence with the numbers."""

    action: str
    reason: str


def fixed(models: Models, options: Controller) -> Decision:
    """All iterations of the recipe."""
    return Decision("continue", "the recipe's number of iterations is fixed")


def plateau(models: Models, options: Controller) -> Decision:
    """Stops when neither y_last nor the refinement gain y_last - y1 grew significantly over the model before.

    In none of the last `options.patience` iterations, on `options.split`.
    """
    recent = [model for model in models if model["iteration"]][-options.patience :]
    told = []
    for model in recent:
        moved = model["against_previous"].get(options.split)
        if moved is None:
            return Decision("continue", incomparable(model, options.split))
        told.append(f"{model['name']}: y_last {difference(moved, 'last')}, y_last - y1 {difference(moved, 'gain')}")
    said = f"on {options.split}, against the model before, {'; '.join(told)}"
    moves = [model["against_previous"][options.split] for model in recent]
    if any(moved[part]["low"] > 0 for moved in moves for part in ("last", "gain")):
        return Decision("continue", f"it still improves: {said}")
    if len(recent) < options.patience:
        return Decision("continue", f"no improvement yet, but controller.patience is {options.patience}: {said}")
    return Decision("stop", f"no significant improvement in {count(len(recent), 'iteration')}: {said}")


def guard(models: Models, options: Controller) -> Decision:
    """Stops or rolls back (`options.on_breach`) when the scorer's reward is being gamed or the policy falls apart.

    On `options.split`, any of: the reward of y_last rises while its exact match falls, both significantly; y1 falls
    significantly, both against the model before; the length or the distinct-2 of y_last left the bounds around that of the
    model which iteration 1 started from; KL(policy || that model), nats a response, is above its limit.
    """
    model = models[-1]
    checks = [
        parting(model["against_previous"].get(options.split)),
        falling(model["against_previous"].get(options.split)),
        length(*last_rounds(models, options.split), options.max_length_ratio),
        diversity(*last_rounds(models, options.split), options.min_distinct_ratio),
        divergence(model["probe"], options.max_kl),
    ]
    breaches = [said for broken, said in checks if broken]
    if breaches:
        return Decision(options.on_breach, f"on {options.split}, {'; '.join(breaches)}")
    seen = [said for _, said in checks if said]
    return Decision("continue", f"on {options.split}, {'; '.join(seen)}" if seen else incomparable(model, options.split))


Check = tuple[bool, str]  # whether a bound is broken, and the figure in words; "": it cannot be told


def parting(moved: dict[str, Any] | None) -> Check:
    """Proxy and truth: needs both, a verifier and its values."""
    if moved is None or moved["measure"] != "exact_match":
        return False, ""
    reward, exact = moved["reward"]["last"], moved["last"]
    broken = reward["low"] > 0 and exact["high"] < 0
    verb = "while" if broken else "and"
    return broken, f"reward of y_last {signed(reward)} {verb} exact match {difference(moved, 'last')} against the model before"


def falling(moved: dict[str, Any] | None) -> Check:
    if moved is None:
        return False, ""
    return moved["first"]["high"] < 0, f"y1 {difference(moved, 'first')} against the model before"


def length(here: dict[str, Any], start: dict[str, Any], limit: float) -> Check:
    if not here or not start or not start["mean_response_tokens"]:
        return False, ""
    ratio = here["mean_response_tokens"] / start["mean_response_tokens"]
    said = f"y_last has {here['mean_response_tokens']:.1f} tokens, {ratio:.2f} times the {start['mean_response_tokens']:.1f}"
    broken = ratio > limit or ratio < 1 / limit
    return broken, f"{said} at the start" + (f" (controller.max_length_ratio {limit:g})" if broken else "")


def diversity(here: dict[str, Any], start: dict[str, Any], limit: float) -> Check:
    if not here or not start or not start["distinct_2"]:
        return False, ""
    ratio = here["distinct_2"] / start["distinct_2"]
    said = f"distinct-2 of y_last is {here['distinct_2']:.3f}, {ratio:.2f} times the {start['distinct_2']:.3f} at the start"
    return ratio < limit, said + (f" (controller.min_distinct_ratio {limit:g})" if ratio < limit else "")


def divergence(probe: dict[str, Any] | None, limit: float) -> Check:
    if probe is None:
        return False, ""
    broken = limit > 0 and probe["kl_initial"] > limit
    said = f"KL to the initial policy is {probe['kl_initial']:.2f} nats a response"
    return broken, said + (f" (controller.max_kl {limit:g})" if broken else "")


def last_rounds(models: Models, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of y_last of the last model, and of the model that iteration 1 started from; empty where there are none."""
    start = [model for model in models if not model["iteration"]][-1]
    rounds = [model["splits"].get(split, {"rounds": {}})["rounds"] for model in (models[-1], start)]
    here, there = (found[max(found, key=int)] if found else {} for found in rounds)
    return here, there


def difference(moved: dict[str, Any], part: str) -> str:
    """An interval in words: points of exact match, or units of the reward."""
    if moved["measure"] == "exact_match":
        return signed(moved[part], 100.0, 1) + " points"
    return signed(moved[part])


def signed(figures: dict[str, float], scale: float = 1.0, digits: int = 3) -> str:
    mean, low, high = (figures[name] * scale + 0.0 for name in ("mean", "low", "high"))
    return f"{mean:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def incomparable(model: dict[str, Any], split: str) -> str:
    return f"{model['name']}: no prompt of {split} has a score in every round of this model and of the one before"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


CONTROLLERS: dict[str, Callable[[Models, Controller], Decision]] = {"fixed": fixed, "plateau": plateau, "guard": guard}
