"""What an evaluation says: per split and round the reward, correctness, changes against earlier rounds, and diversity."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from evolve_ray.evaluate.intervals import interval


def summarise(prompts: list[dict], drafts: Iterable[dict], scores: Iterable[dict], *, seed: int) -> dict[str, Any]:
    """`{split: {"rounds": {round: figures}, "gain": figures}}`, from the evaluation's own tables.

    Only prompts with a score in every round count, so that all rounds of a split speak of the same prompts; `num_prompts` and
    `n` show how many that is.
    """
    summary: dict[str, Any] = {}
    for split, found in whole_chains(prompts, drafts, scores).items():
        summary[split] = {"num_prompts": sum(prompt["split"] == split for prompt in prompts), "rounds": {}}
        if not found:
            continue
        whole = list(found.values())
        for number in range(1, len(whole[0]) + 1):
            summary[split]["rounds"][str(number)] = round_figures(whole, number, seed)
        summary[split]["gain"] = gain_figures(whole, len(whole[0]), seed)
    return summary


def whole_chains(prompts: list[dict], drafts: Iterable[dict], scores: Iterable[dict]) -> dict[str, dict[str, dict[int, dict]]]:
    """`{split: {prompt id: {round: draft with its score}}}` of the prompts with a score in every round, in their order."""
    drafts = list(drafts)
    splits = list(dict.fromkeys(prompt["split"] for prompt in prompts))
    chains = by_prompt(drafts, scores, "round", splits)
    whole = {}
    for split in splits:
        asked = [prompt["prompt_id"] for prompt in prompts if prompt["split"] == split]
        rounds = max((draft["round"] for draft in drafts if draft["split"] == split), default=0)
        found = chains[split]
        whole[split] = {prompt_id: found[prompt_id] for prompt_id in asked if rounds and len(found.get(prompt_id, ())) == rounds}
    return whole


def round_figures(chains: list[dict[int, dict]], number: int, seed: int) -> dict[str, Any]:
    here = [chain[number] for chain in chains]
    figures = {
        "n": len(here),
        **values_of(here, seed),
        "mean_response_tokens": sum(draft["num_tokens"] for draft in here) / len(here),
        "distinct_2": distinct([draft["text"] for draft in here], 2),
        "num_cut": sum(draft["finish_reason"] == "length" for draft in here),
    }
    if number > 1:
        figures["against_first"] = changes([(chain[1], chain[number]) for chain in chains])
        figures["against_previous"] = changes([(chain[number - 1], chain[number]) for chain in chains])
        figures["gain"] = gain_figures(chains, number, seed)
    return figures


def changes(moves: list[tuple[dict, dict]]) -> dict[str, int]:
    """Counts of prompts whose reward rose, fell or stayed, whose text stayed, and of answers made and kept right or wrong."""
    counts = {
        "improved": sum(after["score"] > before["score"] for before, after in moves),
        "degraded": sum(after["score"] < before["score"] for before, after in moves),
        "unchanged": sum(after["score"] == before["score"] for before, after in moves),
        "same_text": sum(after["text"] == before["text"] for before, after in moves),
    }
    if moves[0][0]["correct"] is not None:
        counts["wrong_to_right"] = sum(before["correct"] < 1.0 and after["correct"] == 1.0 for before, after in moves)
        counts["right_to_wrong"] = sum(before["correct"] == 1.0 and after["correct"] < 1.0 for before, after in moves)
        counts["kept_right"] = sum(before["correct"] == 1.0 and after["correct"] == 1.0 for before, after in moves)
        counts["kept_wrong"] = sum(before["correct"] < 1.0 and after["correct"] < 1.0 for before, after in moves)
    return counts


def gain_figures(chains: list[dict[int, dict]], rounds: int, seed: int) -> dict[str, Any]:
    """Round `rounds` minus the first."""
    return differences([(chain[1], chain[rounds]) for chain in chains], seed)


def differences(pairs: list[tuple[dict, dict]], seed: int) -> dict[str, Any]:
    """Mean of the second minus the first, paired by prompt, of reward and (where there is a verifier) exact match."""
    figures = {"reward": interval([after["score"] - before["score"] for before, after in pairs], seed)}
    if pairs[0][0]["correct"] is not None:
        right = [float(after["correct"] == 1.0) - float(before["correct"] == 1.0) for before, after in pairs]
        figures["exact_match"] = interval(right, seed)
    return figures


Tables = Sequence[Iterable[dict]]  # drafts, scores


def add_best_of(summary: dict[str, Any], chains: Tables, samples: Tables, *, seed: int) -> None:
    """Adds `best_of` to each split: the scorer's best of a chain against its best of as many parallel samples.

    `chains` and `samples` are (drafts, scores). Equal numbers of responses; `mean_tokens` (generated, all responses of a
    prompt) says how equal their cost is. Only prompts count whose responses all have a score. Of equal scores the earliest.
    """
    sides = {
        "chain": by_prompt(chains[0], chains[1], "round", summary),
        "parallel": by_prompt(samples[0], samples[1], "sample", summary),
    }
    for split, figures in summary.items():
        rounds = len(figures["rounds"])
        here = {side: table.get(split, {}) for side, table in sides.items()}
        size = min(rounds, max((len(found) for found in here["parallel"].values()), default=0))
        asked = [p for p in here["chain"] if all(len(table.get(p, ())) >= size for table in here.values())] if size else []
        if not asked:
            continue
        best: dict[str, list[dict]] = {}
        figures["best_of"] = {"num_responses": size, "n": len(asked)}
        for side, table in here.items():
            groups = [[table[prompt_id][place] for place in sorted(table[prompt_id])[:size]] for prompt_id in asked]
            best[side] = [max(group, key=lambda draft: draft["score"]) for group in groups]
            tokens = sum(draft["num_tokens"] for group in groups for draft in group) / len(groups)
            figures["best_of"][side] = {"mean_tokens": tokens, **values_of(best[side], seed)}
        figures["best_of"]["difference"] = differences(list(zip(best["parallel"], best["chain"], strict=True)), seed)


def against_previous(splits: Iterable[str], before: Tables, now: Tables, *, seed: int) -> dict[str, Any]:
    """What changed from one model's chains to the next one's, paired by prompt, per split; (drafts, scores) of each.

    `first`: y1 minus the y1 before; `last`: y_last minus the y_last before; `gain`: the change of y_last - y1. Each with its
    interval, in `measure`: exact match where there is a verifier, else the reward; `reward` has the same three of the reward.
    Only prompts count that have a score in every round of both; a split without such a prompt is left out.
    """
    splits = list(splits)
    chains = [by_prompt(drafts, scores, "round", splits) for drafts, scores in (before, now)]
    found: dict[str, Any] = {}
    for split in splits:
        old, new = (table[split] for table in chains)
        rounds = max((max(chain) for table in (old, new) for chain in table.values()), default=0)
        both = [(old[name], new[name]) for name in old if len(old[name]) == len(new.get(name, ())) == rounds]
        if not both:
            continue
        rewards = first_last_gain(both, rounds, lambda draft: draft["score"], seed)
        if both[0][0][1]["correct"] is None:
            found[split] = {"n": len(both), "measure": "reward", **rewards, "reward": rewards}
        else:
            right = first_last_gain(both, rounds, lambda draft: float(draft["correct"] == 1.0), seed)
            found[split] = {"n": len(both), "measure": "exact_match", **right, "reward": rewards}
    return found


Chain = dict[int, dict]  # by round


def first_last_gain(both: list[tuple[Chain, Chain]], rounds: int, value: Callable[[dict], float], seed: int) -> dict[str, Any]:
    """Intervals of the paired differences `first`, `last` and `gain`; see `against_previous`."""
    first, last = ([value(new[number]) - value(old[number]) for old, new in both] for number in (1, rounds))
    gain = [after - before for before, after in zip(first, last, strict=True)]
    return {name: interval(values, seed) for name, values in (("first", first), ("last", last), ("gain", gain))}


def by_prompt(drafts: Iterable[dict], scores: Iterable[dict], place: str, splits: Iterable[str]) -> dict[str, dict[str, dict]]:
    """`{split: {prompt id: {round or sample: draft with its score}}}`."""
    score_of = {row["draft_id"]: row for row in scores}
    table: dict[str, dict[str, dict]] = {split: defaultdict(dict) for split in splits}
    for draft in drafts:
        if draft["draft_id"] in score_of:
            table[draft["split"]][draft["prompt_id"]][draft[place]] = {**draft, **score_of[draft["draft_id"]]}
    return table


def values_of(drafts: list[dict], seed: int) -> dict[str, Any]:
    """Reward, and exact match where there is a verifier, with their intervals."""
    figures = {"reward": interval([draft["score"] for draft in drafts], seed)}
    if drafts[0]["correct"] is not None:
        figures["exact_match"] = interval([float(draft["correct"] == 1.0) for draft in drafts], seed)
    return figures


def distinct(texts: list[str], n: int) -> float:
    """Distinct n-grams over all n-grams: of words, or of characters where the texts are single words."""
    split = [text.split() for text in texts]
    units: list[Any] = split if sum(map(len, split)) > 2 * len(texts) else texts
    grams = [tuple(unit[first : first + n]) for unit in units for first in range(len(unit) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
