"""Controllers decide whether a run continues after an iteration: pure functions of the models so far, as in report.json.

`models` are all evaluated models in order; the last one belongs to the iteration that the controller decides on. Each has
`splits`, and those of iterations also have `probe`, `drift` and `against_previous`. "stop" ends the run with the policy of this
iteration. "roll_back" ends it with the policy before; the iteration stays on disk and in the report, marked as rolled back.

A difference is significant if its paired 95 % interval does not contain 0. A model that did not change still has one
difference in forty that is significantly above 0, and one in forty below. Nothing is decided from fewer than
`options.min_prompts` prompts.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evolve_ray.config.options import Controller

VERSION = 1
ACTIONS = ("continue", "stop", "roll_back")
Models = list[dict[str, Any]]


@dataclass(frozen=True)
class Decision:
    """One of `ACTIONS`, and the reason: a sentence with the numbers.

    `options` are options of the recipe by their dotted names, which the iterations after this one have in place of the present.
    """

    action: str
    reason: str
    options: dict[str, Any] = field(default_factory=dict)


def in_words(decision: dict[str, Any]) -> str:
    """The reason of a stored decision, and the options that it changes."""
    changes = ", ".join(f"{name} = {json.dumps(value)}" for name, value in decision.get("options", {}).items())
    return decision["reason"] + (f"; from now on {changes}" if changes else "")


def fixed(models: Models, options: Controller) -> Decision:
    """Continues through all iterations of the recipe."""
    return Decision("continue", "the recipe's number of iterations is fixed")


def plateau(models: Models, options: Controller) -> Decision:
    """Stops if in none of the last `options.patience` iterations the model improved significantly, on `options.split`.

    It improved if y_last or the refinement gain y_last - y1 grew over the model before.
    """
    recent = [model for model in models if model["iteration"]][-options.patience :]
    sentences = []
    for model in recent:
        changes = model["against_previous"].get(options.split)
        if changes is None:
            return Decision("continue", incomparable(model, options.split))
        if changes["n"] < options.min_prompts:
            return Decision("continue", too_few(model, options))
        sentences.append(f"{model['name']}: y_last {difference(changes, 'last')}, y_last - y1 {difference(changes, 'gain')}")
    text = f"on {options.split}, against the model before, {'; '.join(sentences)}"
    by_model = [model["against_previous"][options.split] for model in recent]
    if any(changes[part]["low"] > 0 for changes in by_model for part in ("last", "gain")):
        return Decision("continue", f"it still improves: {text}")
    if len(recent) < options.patience:
        return Decision("continue", f"no improvement yet, but controller.patience is {options.patience}: {text}")
    return Decision("stop", f"no significant improvement in {count(len(recent), 'iteration')}: {text}")


def guard(models: Models, options: Controller) -> Decision:
    """Stops or rolls back (`options.on_breach`) if the policy exploits the scorer or gets worse.

    That is any of these, on `options.split`: against the model before, the reward of y_last rises while its exact match falls,
    both significantly; against the model before, y1 falls significantly; the length or the distinct-2 of y_last leaves its
    bounds around that of the start, the model that iteration 1 started from; KL(policy || start) in nats per response is above
    its limit, which does not depend on the split.
    """
    model = models[-1]
    changes = model["against_previous"].get(options.split)
    kl = divergence(model["probe"], options.max_kl)
    if changes is None or changes["n"] < options.min_prompts:
        why = too_few(model, options) if changes else incomparable(model, options.split)
        return Decision(options.on_breach, f"{kl[1]}; {why}") if kl[0] else Decision("continue", why)
    checks = [
        reward_against_exact_match(changes),
        direct_answers(changes),
        length(*last_rounds(models, options.split), options.max_length_ratio),
        diversity(*last_rounds(models, options.split), options.min_distinct_ratio),
        kl,
    ]
    breaches = [text for broken, text in checks if broken]
    if breaches:
        return Decision(options.on_breach, f"on {options.split}, {'; '.join(breaches)}")
    return Decision("continue", f"on {options.split}, {'; '.join(text for _, text in checks if text)}")


Check = tuple[bool, str]  # whether a bound is broken, and the figure in words ("": the figure was not measured)


def reward_against_exact_match(changes: dict[str, Any]) -> Check:
    """Broken if the reward rises while exact match falls; not measured without a verifier."""
    if changes["measure"] != "exact_match":
        return False, ""
    reward, exact = changes["reward"]["last"], changes["last"]
    broken = reward["low"] > 0 and exact["high"] < 0
    verb = "while" if broken else "and"
    return broken, f"reward of y_last {signed(reward)} {verb} exact match {difference(changes, 'last')} against the model before"


def direct_answers(changes: dict[str, Any]) -> Check:
    """Broken if y1 falls."""
    return changes["first"]["high"] < 0, f"y1 {difference(changes, 'first')} against the model before"


def length(now: dict[str, Any], start: dict[str, Any], limit: float) -> Check:
    if not now or not start or not start["mean_response_tokens"]:
        return False, ""
    ratio = now["mean_response_tokens"] / start["mean_response_tokens"]
    text = f"y_last has {now['mean_response_tokens']:.1f} tokens, {ratio:.2f} times the {start['mean_response_tokens']:.1f}"
    broken = ratio > limit or ratio < 1 / limit
    return broken, f"{text} at the start" + (f" (controller.max_length_ratio {limit:g})" if broken else "")


def diversity(now: dict[str, Any], start: dict[str, Any], limit: float) -> Check:
    if not now or not start or not start["distinct_2"]:
        return False, ""
    ratio = now["distinct_2"] / start["distinct_2"]
    text = f"distinct-2 of y_last is {now['distinct_2']:.3f}, {ratio:.2f} times the {start['distinct_2']:.3f} at the start"
    return ratio < limit, text + (f" (controller.min_distinct_ratio {limit:g})" if ratio < limit else "")


def divergence(probe: dict[str, Any] | None, limit: float) -> Check:
    if probe is None:
        return False, ""
    broken = limit > 0 and probe["kl_initial"] > limit
    text = f"KL to the initial policy is {probe['kl_initial']:.2f} nats a response"
    return broken, text + (f" (controller.max_kl {limit:g})" if broken else "")


def last_rounds(models: Models, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of y_last of the last model, and of the model that iteration 1 started from; empty if it has none."""
    start = [model for model in models if not model["iteration"]][-1]
    both = [model["splits"].get(split, {"rounds": {}})["rounds"] for model in (models[-1], start)]
    now, before = (rounds[max(rounds, key=int)] if rounds else {} for rounds in both)
    return now, before


def difference(changes: dict[str, Any], part: str) -> str:
    """An interval as text, in points of exact match or in units of the reward."""
    if changes["measure"] == "exact_match":
        return signed(changes[part], 100.0, 1) + " points"
    return signed(changes[part])


def signed(figures: dict[str, float], scale: float = 1.0, digits: int = 3) -> str:
    mean, low, high = (figures[name] * scale + 0.0 for name in ("mean", "low", "high"))
    return f"{mean:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def incomparable(model: dict[str, Any], split: str) -> str:
    return f"{model['name']}: no prompt of {split} has a score in every round of this model and of the one before"


def too_few(model: dict[str, Any], options: Controller) -> str:
    n = model["against_previous"][options.split]["n"]
    return (
        f"decided nothing: {model['name']} has {count(n, 'prompt')} of {options.split}, at least {options.min_prompts} are "
        "needed (controller.min_prompts)"
    )


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


CONTROLLERS: dict[str, Callable[[Models, Controller], Decision]] = {"fixed": fixed, "plateau": plateau, "guard": guard}
