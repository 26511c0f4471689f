"""The final answer of a strategy on each held-out prompt, its figures, and its difference to the last round of the chain."""

from collections.abc import Callable, Iterable
from typing import Any

from evolve_ray.evaluate.figures import Tables, differences, values_of, whole_chains

Rows = list[dict]
Same = Callable[[str, str], bool]  # whether two responses give the same answer


def add_final_answers(
    summary: dict[str, Any], prompts: Rows, chains: Tables, tables: Tables, *, name: str, pick: str, same: Same
) -> None:  # fmt: skip
    """Adds `strategy` to each split: the figures of `final_answers`."""
    for split, figures in final_answers(list(summary), prompts, chains, tables, name=name, pick=pick, same=same).items():
        summary[split]["strategy"] = figures


def final_answers(
    splits: list[str], prompts: Rows, chains: Tables, tables: Tables, *, name: str, pick: str, same: Same
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """`{split: figures}` of the answer that `pick` takes from all answers to a prompt.

    `chains` and `tables` are (drafts, scores) of the chain and of the strategy. `mean_tokens` are the generated tokens of all
    asks on a prompt, critiques and verdicts too. `at_chain_tokens` has the same figures with only those responses of the
    strategy, in the order of its asks, that the generated tokens of the prompt's chain pay for (at least the first answer);
    `num_capped` counts the prompts whose chain could pay for more than all of them. Only prompts whose final answer has a score
    are counted, and for `difference` (final answer minus the chain's last round) only those that the chain counts too.
    """
    drafts, scores = (list(table) for table in tables)
    score_of = {row["draft_id"]: row for row in scores}
    by_prompt: dict[str, Rows] = {}
    for draft in drafts:
        by_prompt.setdefault(draft["prompt_id"], []).append({**draft, **score_of.get(draft["draft_id"], {"score": None})})
    complete = whole_chains(prompts, *chains)
    figures: dict[str, dict[str, Any]] = {}
    for split in splits:
        groups = {
            p["prompt_id"]: by_prompt[p["prompt_id"]] for p in prompts if p["split"] == split and p["prompt_id"] in by_prompt
        }
        last = {prompt_id: chain[max(chain)] for prompt_id, chain in complete[split].items()}
        whole = figures_of(groups, last, pick, same)
        if whole is None:
            continue
        budgets = {prompt_id: tokens(chain.values()) for prompt_id, chain in complete[split].items()}
        paid = {prompt_id: affordable(groups[prompt_id], budget) for prompt_id, budget in budgets.items() if prompt_id in groups}
        figures[split] = {"name": name, "pick": pick, **whole}
        at_budget = figures_of(paid, last, pick, same)
        if at_budget:
            capped = sum(tokens(groups[prompt_id]) < budgets[prompt_id] for prompt_id in paid)
            figures[split]["at_chain_tokens"] = {**at_budget, "num_capped": capped}
    return figures


def figures_of(groups: dict[str, Rows], last: dict[str, dict], pick: str, same: Same) -> dict[str, Any] | None:
    """The figures of the final answers to the prompts of `groups`; None if none has a score."""
    finals: dict[str, dict] = {}
    for prompt_id, responses in groups.items():
        final = PICKS[pick]([row for row in responses if row["kind"] == "answer"], same)
        if final is not None and final["score"] is not None:
            finals[prompt_id] = final
    if not finals:
        return None
    mean_tokens = sum(tokens(groups[prompt_id]) for prompt_id in finals) / len(finals)
    both = [(last[prompt_id], final) for prompt_id, final in finals.items() if prompt_id in last]
    difference = {"difference": differences(both)} if both else {}
    return {"n": len(finals), "mean_tokens": mean_tokens, **values_of(list(finals.values())), **difference}


def tokens(responses: Iterable[dict]) -> int:
    """The generated tokens of some responses."""
    return sum(row["num_tokens"] for row in responses)


def affordable(responses: Rows, budget: int) -> Rows:
    """The responses to a prompt, in the order of their asks, that `budget` tokens pay for; at least the first answer."""
    used: Rows = []
    for row in sorted(responses, key=asked_at(responses)):
        if tokens(used) + row["num_tokens"] > budget and any(row["kind"] == "answer" for row in used):
            break
        used.append(row)
    return used


def asked_at(responses: Rows) -> Callable[[dict], tuple]:
    """The place of a response among all to its prompt: by round, and in it critiques, answers, and what follows an answer."""
    place_of = {row["draft_id"]: (row["round"], row["sample"]) for row in responses if row["kind"] == "answer"}

    def key(row: dict) -> tuple:
        is_answer = row["kind"] == "answer"
        follows = not is_answer and place_of.get(row.get("parent_id"), (0, 0))[0] == row["round"]
        return row["round"], follows, row["sample"], is_answer, row["draft_id"]

    return key


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


def returned(answers: Rows, same: Same) -> dict | None:
    """The last answer that the strategy returned; of a shipped strategy that is the `last`."""
    return next((row for row in answers if row.get("returned_last")), None) or last(answers, same)


def in_order(answers: Iterable[dict]) -> Rows:
    return sorted(answers, key=lambda row: (row["round"], row["sample"], row["draft_id"]))


PICKS: dict[str, Callable[[Rows, Same], dict | None]] = {"last": last, "best": best, "vote": vote, "returned": returned}
