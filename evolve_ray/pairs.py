"""Pair selection: pure functions of one prompt's scored drafts. Ties go by id, and every unused draft has a reason."""

from collections.abc import Callable
from typing import Any

from evolve_ray.rows import content_id, reject


def reward_model(prompt: dict, drafts: list[dict], options: Any) -> tuple[list[dict], list[dict]]:
    """The best draft of a prompt over its worst, if they differ in text and by more than `options.margin` in score.

    `drafts` hold `draft_id, text, round, finish_reason, score`. A draft that was cut by length is never chosen.
    Returns (pairs, rejected drafts with their reasons).
    """
    unscored = sorted((d for d in drafts if d["score"] is None), key=lambda d: d["draft_id"])
    rejected = [reject_draft(prompt, d, "has no finite score") for d in unscored]
    scored = sorted((d for d in drafts if d["score"] is not None), key=lambda d: (-d["score"], d["draft_id"]))
    complete = [d for d in scored if d["finish_reason"] == "stop"]
    rejected += [reject_draft(prompt, d, "cut by length: cannot be chosen") for d in scored if d["finish_reason"] != "stop"]
    if not complete:
        return [], rejected
    best = complete[0]
    # Among equal scores the worst goes by id too, from the other end, so that a permutation of the drafts changes nothing.
    others = [d for d in scored if d["text"] != best["text"]]
    if not others:
        return [], rejected + [reject_draft(prompt, d, "all drafts are identical") for d in complete]
    worst = others[-1]
    if not best["score"] - worst["score"] > options.margin:
        reason = f"best and worst score are not more than the margin apart ({options.margin})"
        return [], rejected + [reject_draft(prompt, d, reason) for d in complete]
    used = {best["draft_id"], worst["draft_id"]}
    rejected = [r for r in rejected if r["id"] not in used]
    rejected += [reject_draft(prompt, d, "neither best nor worst") for d in complete if d["draft_id"] not in used]
    return [make_pair(prompt, best, worst)], rejected


def reject_draft(prompt: dict, draft: dict, reason: str) -> dict:
    return reject({**prompt, "prompt_id": draft["draft_id"]}, "pairs", reason)


def make_pair(prompt: dict, chosen: dict, rejected: dict) -> dict:
    return {
        "pair_id": content_id("pair", prompt["prompt_id"], prompt["prompt"], chosen["text"], rejected["text"]),
        "prompt_id": prompt["prompt_id"],
        "prompt": prompt["prompt"],
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "chosen_finished": chosen["finish_reason"] == "stop",
        "rejected_finished": rejected["finish_reason"] == "stop",
        "chosen_id": chosen["draft_id"],
        "rejected_id": rejected["draft_id"],
        "chosen_round": chosen["round"],
        "rejected_round": rejected["round"],
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
    }


SELECTIONS: dict[str, Callable[..., tuple[list[dict], list[dict]]]] = {"reward_model": reward_model}
