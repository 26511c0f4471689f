"""The selection `advantages`: one row for each answer, with its advantage over the other answers to the prompt."""

import math
from collections import defaultdict
from dataclasses import dataclass

from evolve_ray.config.option import option
from evolve_ray.config.options import Selection
from evolve_ray.select.pairs import OF_ANOTHER, Selected, make_pair, may_be_chosen, reject_draft

EPSILON = 1e-4  # added to the standard deviation, as in GRPO's code


@dataclass(frozen=True)
class AdvantageArgs:
    """Options of `advantages`, `[selection.args]`."""

    baseline: str = option(
        "`rloo`: the mean reward of the others (arXiv 2402.14740); `dr_grpo`: the mean of all (2503.20783); `grpo`: that, and "
        "divided by the standard deviation (2402.03300); `none`: 0",
        "rloo",
        choices=("rloo", "dr_grpo", "grpo", "none"),
    )
    bonus: float = option("factor of the reward's change from the draft that an answer refines (SCoRe, 2409.12917)", 0.0, low=0.0)
    rewarded: str = option(
        "`refined`: only answers that refine a draft have an advantage; the others are rows with the advantage 0, which a KL "
        "divergence holds in place (SCoRe's first stage); `all`: every answer has one",
        "all",
        choices=("all", "refined"),
    )
    keep_zero: bool = option("whether answers with the advantage 0 are rows, for a KL divergence", False)


def advantages(prompt: dict, drafts: list[dict], options: Selection, args: AdvantageArgs) -> Selected:
    """A row for each answer with a score whose advantage is not 0 (with `keep_zero`: each): answers of one round are a group.

    The answer is `chosen`; `rejected` is the draft that it refines, or the answer itself. The numbers are `advantage` and
    `refined` (1.0 after a draft). Answers with the same text after the same text are one row with the sum of their advantages. An
    answer that was cut by length has a reward like every other, but no row, except with `options.allow_cut`. One that a further
    model wrote is in no group.
    """
    by_id = {draft["draft_id"]: draft for draft in drafts}
    groups: dict[int, list[dict]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for draft in sorted(drafts, key=lambda d: d["draft_id"]):
        if draft.get("foreign"):
            reasons[draft["draft_id"]] = OF_ANOTHER
        elif draft["score"] is not None:
            groups[draft["round"]].append(draft)
    rows: dict[tuple[str, str], dict] = {}
    for group in (groups[number] for number in sorted(groups)):
        values = group_advantages([reward(draft, by_id, args.bonus) for draft in group], args.baseline)
        for draft, value in zip(group, values, strict=True):
            parent = by_id.get(draft["parent_id"])
            place = (draft["text"], parent["text"] if parent else draft["text"])
            held = parent is None and args.rewarded == "refined"
            value = 0.0 if held else value
            if not may_be_chosen(draft, options):
                reasons[draft["draft_id"]] = "cut by length: has a reward, but is not trained"
            elif value == 0.0 and not (held or args.keep_zero):
                reasons[draft["draft_id"]] = "its advantage is 0"
            elif place in rows:
                rows[place]["numbers"]["advantage"] += value
                reasons[draft["draft_id"]] = f"has the same text as draft {rows[place]['chosen_id']}, whose row counts for both"
            else:
                numbers = {"advantage": value, "refined": float(parent is not None)}
                rows[place] = make_pair(prompt, draft, parent or draft, numbers)
    used = {row[f"{side}_id"] for row in rows.values() for side in ("chosen", "rejected")}
    unused = sorted((draft for draft in drafts if draft["draft_id"] not in used), key=lambda d: d["draft_id"])
    return list(rows.values()), [reject_draft(prompt, d, reasons.get(d["draft_id"], "has no finite score")) for d in unused]


def reward(draft: dict, by_id: dict[str, dict], bonus: float) -> float:
    """The score, plus `bonus` times its change from the draft before; never the bonus alone, and none without a score before."""
    parent = by_id.get(draft["parent_id"])
    change = draft["score"] - parent["score"] if parent and parent["score"] is not None else 0.0
    return draft["score"] + bonus * change


def group_advantages(rewards: list[float], baseline: str) -> list[float]:
    """The advantage of each of a group's rewards; 0 for one that is alone, except with baseline `none`."""
    size = len(rewards)
    if baseline == "none":
        return list(rewards)
    mean = math.fsum(rewards) / size
    centred = [value - mean for value in rewards]
    if min(rewards) == max(rewards):
        return [0.0] * size
    if baseline == "rloo":
        return [value * size / (size - 1) for value in centred]
    if baseline == "grpo":
        deviation = math.sqrt(math.fsum(value * value for value in centred) / (size - 1))
        return [value / (deviation + EPSILON) for value in centred]
    return centred
