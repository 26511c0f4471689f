"""The selection `turn_advantages`: one row for each response of any kind, after its own messages, with its advantage."""

import math
from collections import defaultdict

from evolve_ray.config.options import Selection
from evolve_ray.select.advantages import AdvantageArgs, group_advantages, reward
from evolve_ray.select.pairs import OF_ANOTHER, Selected, make_turn, may_be_chosen, reject_draft


def turn_advantages(prompt: dict, drafts: list[dict], options: Selection, others: list[dict], args: AdvantageArgs) -> Selected:
    """A row for each response whose advantage is not 0; responses of one round and kind are a group.

    An answer has the reward that it has in `advantages`; a response of another kind has the mean reward of the answers of its
    sample and round, which it led to. The numbers are `advantage` and `refined` (0.0: the context is that of the ask, whatever
    the strategy asked). Equal texts after equal messages are one row with the sum of their advantages.
    """
    by_id = {draft["draft_id"]: draft for draft in drafts}
    rewards = {d["draft_id"]: reward(d, by_id, args.bonus) for d in drafts if d["score"] is not None}
    led_to: dict[tuple[int, int], list[float]] = defaultdict(list)
    for draft in sorted(drafts, key=lambda d: d["draft_id"]):
        if draft["draft_id"] in rewards:
            led_to[draft["sample"], draft["round"]].append(rewards[draft["draft_id"]])
    for other in others:
        if values := led_to.get((other["sample"], other["round"])):
            rewards[other["draft_id"]] = math.fsum(values) / len(values)
    everything = sorted([*drafts, *others], key=lambda d: (d["round"], d["kind"], d["draft_id"]))
    groups: dict[tuple[int, str], list[dict]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for draft in everything:
        if draft.get("foreign"):
            reasons[draft["draft_id"]] = OF_ANOTHER
        elif draft["draft_id"] in rewards:
            groups[draft["round"], draft["kind"]].append(draft)
    rows: dict[str, dict] = {}
    for group in groups.values():
        values = group_advantages([rewards[draft["draft_id"]] for draft in group], args.baseline)
        for draft, value in zip(group, values, strict=True):
            if not may_be_chosen(draft, options):
                reasons[draft["draft_id"]] = "cut by length: has a reward, but is not trained"
            elif value == 0.0:
                reasons[draft["draft_id"]] = "its advantage is 0"
            else:
                row = make_turn(prompt, draft, {"advantage": value, "refined": 0.0})
                first = rows.setdefault(row["pair_id"], row)
                if first is not row:
                    first["numbers"]["advantage"] += value
                    reasons[draft["draft_id"]] = f"has the same text as draft {first['chosen_id']}, whose row counts for both"
    used = {row["chosen_id"] for row in rows.values()}
    unused = sorted((draft for draft in everything if draft["draft_id"] not in used), key=lambda d: d["draft_id"])
    default = "has no finite score, and led to no answer that has one"
    return list(rows.values()), [reject_draft(prompt, d, reasons.get(d["draft_id"], default)) for d in unused]
