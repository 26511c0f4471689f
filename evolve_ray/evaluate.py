"""What an evaluation says: per split and round the reward, correctness, changes against earlier rounds, and diversity."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from evolve_ray.report import interval


def summarise(prompts: list[dict], drafts: Iterable[dict], scores: Iterable[dict], *, seed: int) -> dict[str, Any]:
    """`{split: {"rounds": {round: figures}, "gain": figures}}`, from the evaluation's own tables.

    Only prompts with a score in every round count, so that all rounds of a split speak of the same prompts; `num_prompts` and
    `n` show how many that is.
    """
    score_of = {row["draft_id"]: row for row in scores}
    chains: dict[str, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    rounds_of: dict[str, int] = defaultdict(int)
    for draft in drafts:
        rounds_of[draft["split"]] = max(rounds_of[draft["split"]], draft["round"])
        if draft["draft_id"] in score_of:
            chains[draft["split"]][draft["prompt_id"]][draft["round"]] = {**draft, **score_of[draft["draft_id"]]}
    summary: dict[str, Any] = {}
    for split in dict.fromkeys(prompt["split"] for prompt in prompts):
        asked = [prompt["prompt_id"] for prompt in prompts if prompt["split"] == split]
        rounds = rounds_of[split]
        whole = [chains[split][prompt_id] for prompt_id in asked if len(chains[split].get(prompt_id, ())) == rounds]
        summary[split] = {"num_prompts": len(asked), "rounds": {}}
        if not whole or not rounds:
            continue
        for number in range(1, rounds + 1):
            summary[split]["rounds"][str(number)] = round_figures(whole, number, seed)
        summary[split]["gain"] = gain_figures(whole, rounds, seed)
    return summary


def round_figures(chains: list[dict[int, dict]], number: int, seed: int) -> dict[str, Any]:
    here = [chain[number] for chain in chains]
    figures = {
        "n": len(here),
        "reward": interval([draft["score"] for draft in here], seed),
        "mean_response_tokens": sum(draft["num_tokens"] for draft in here) / len(here),
        "distinct_2": distinct([draft["text"] for draft in here], 2),
        "num_cut": sum(draft["finish_reason"] == "length" for draft in here),
    }
    if here[0]["correct"] is not None:
        figures["exact_match"] = interval([float(draft["correct"] == 1.0) for draft in here], seed)
    if number > 1:
        figures["against_first"] = changes([(chain[1], chain[number]) for chain in chains])
        figures["against_previous"] = changes([(chain[number - 1], chain[number]) for chain in chains])
    return figures


def changes(moves: list[tuple[dict, dict]]) -> dict[str, int]:
    """Counts of prompts whose reward rose, fell or stayed, whose text stayed, and of answers made right or wrong."""
    counts = {
        "improved": sum(after["score"] > before["score"] for before, after in moves),
        "degraded": sum(after["score"] < before["score"] for before, after in moves),
        "unchanged": sum(after["score"] == before["score"] for before, after in moves),
        "same_text": sum(after["text"] == before["text"] for before, after in moves),
    }
    if moves[0][0]["correct"] is not None:
        counts["wrong_to_right"] = sum(before["correct"] < 1.0 and after["correct"] == 1.0 for before, after in moves)
        counts["right_to_wrong"] = sum(before["correct"] == 1.0 and after["correct"] < 1.0 for before, after in moves)
    return counts


def gain_figures(chains: list[dict[int, dict]], rounds: int, seed: int) -> dict[str, Any]:
    """Last round minus first, paired by prompt, with the interval of the mean difference."""
    figures = {"reward": interval([chain[rounds]["score"] - chain[1]["score"] for chain in chains], seed)}
    if chains[0][1]["correct"] is not None:
        right = [float(chain[rounds]["correct"] == 1.0) - float(chain[1]["correct"] == 1.0) for chain in chains]
        figures["exact_match"] = interval(right, seed)
    return figures


def distinct(texts: list[str], n: int) -> float:
    """Distinct n-grams over all n-grams: of words, or of characters where the texts are single words."""
    split = [text.split() for text in texts]
    units: list[Any] = split if sum(map(len, split)) > 2 * len(texts) else texts
    grams = [tuple(unit[first : first + n]) for unit in units for first in range(len(unit) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
