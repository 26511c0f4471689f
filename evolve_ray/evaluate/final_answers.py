"""The final answer of a strategy on each held-out prompt, its figures, and its difference to the last round of the chain."""

from collections.abc import Callable, Iterable
from typing import Any

from evolve_ray.evaluate.figures import Tables, differences, values_of, whole_chains

Rows = list[dict]
Same = Callable[[str, str], bool]  # whether two responses give the same answer


def add_final_answers(
    summary: dict[str, Any], prompts: Rows, chains: Tables, tables: Tables, *, name: str, pick: str, same: Same
) -> None:  # fmt: skip
    """Adds `strategy` to each split: the figures of the answer that `pick` takes from all answers to a prompt.

    `chains` and `tables` are (drafts, scores) of the chain and of the strategy. `mean_tokens` are the generated tokens of all
    asks on a prompt, critiques too. Only prompts whose final answer has a score are counted, and for `difference` (final answer
    minus the chain's last round) only those that the chain counts too.
    """
    drafts, scores = (list(table) for table in tables)
    score_of = {row["draft_id"]: row for row in scores}
    by_prompt: dict[str, Rows] = {}
    for draft in drafts:
        by_prompt.setdefault(draft["prompt_id"], []).append({**draft, **score_of.get(draft["draft_id"], {"score": None})})
    complete = whole_chains(prompts, *chains)
    for split, figures in summary.items():
        finals: dict[str, dict] = {}
        for prompt in prompts:
            responses = by_prompt.get(prompt["prompt_id"], [])
            final = PICKS[pick]([row for row in responses if row["kind"] == "answer"], same)
            if prompt["split"] == split and final is not None and final["score"] is not None:
                finals[prompt["prompt_id"]] = final
        if not finals:
            continue
        tokens = sum(row["num_tokens"] for prompt_id in finals for row in by_prompt[prompt_id])
        last = {prompt_id: chain[max(chain)] for prompt_id, chain in complete[split].items()}
        both = [(last[prompt_id], final) for prompt_id, final in finals.items() if prompt_id in last]
        figures["strategy"] = {"name": name, "pick": pick, "n": len(finals), "mean_tokens": tokens / len(finals)}
        figures["strategy"] |= values_of(list(finals.values()))
        if both:
            figures["strategy"]["difference"] = differences(both)


def last(answers: Rows, same: Same) -> dict | None:
    """The answer of the last round; of equal rounds that of the last sample."""
    return max(answers, key=lambda row: (row["round"], row["sample"]), default=None)


def best(answers: Rows, same: Same) -> dict | None:
    """The answer with the highest score; of equal ones the earliest."""
    scored = [row for row in answers if row["score"] is not None]
    return max(in_order(scored), key=lambda row: row["score"], default=None)


def vote(answers: Rows, same: Same) -> dict | None:
    """The earliest answer of those that most answers agree with."""
    ordered = in_order(answers)
    return max(ordered, key=lambda row: sum(same(row["text"], other["text"]) for other in ordered), default=None)


def in_order(answers: Iterable[dict]) -> Rows:
    return sorted(answers, key=lambda row: (row["round"], row["sample"], row["draft_id"]))


PICKS: dict[str, Callable[[Rows, Same], dict | None]] = {"last": last, "best": best, "vote": vote}
