"""The figures of an evaluation by split and round: reward, exact match, changes against earlier rounds, diversity."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from evolve_ray.evaluate import intervals


def summarise(prompts: list[dict], drafts: Iterable[dict], scores: Iterable[dict]) -> dict[str, Any]:
    """`{split: {"num_prompts": n, "rounds": {round: figures}, "gain": figures}}`, from the tables of an evaluation.

    Only prompts with a score in every round are counted, so that all rounds of a split are about the same prompts.
    `num_prompts` is the number of prompts of the split, `n` the number of those that are counted.
    """
    summary: dict[str, Any] = {}
    for split, chains_by_prompt in whole_chains(prompts, drafts, scores).items():
        summary[split] = {"num_prompts": sum(prompt["split"] == split for prompt in prompts), "rounds": {}}
        if not chains_by_prompt:
            continue
        chains = list(chains_by_prompt.values())
        for number in range(1, len(chains[0]) + 1):
            summary[split]["rounds"][str(number)] = round_figures(chains, number)
        summary[split]["gain"] = gain_figures(chains, len(chains[0]))
    return summary


def whole_chains(prompts: list[dict], drafts: Iterable[dict], scores: Iterable[dict]) -> dict[str, dict[str, dict[int, dict]]]:
    """`{split: {prompt id: {round: draft with its score}}}` of the prompts with a score in every round, in their order."""
    drafts = list(drafts)
    splits = list(dict.fromkeys(prompt["split"] for prompt in prompts))
    tables = by_prompt(drafts, scores, "round", splits)
    complete = {}
    for split in splits:
        prompt_ids = [prompt["prompt_id"] for prompt in prompts if prompt["split"] == split]
        num_rounds = max((draft["round"] for draft in drafts if draft["split"] == split), default=0)
        chains = tables[split]
        complete[split] = {
            prompt_id: chains[prompt_id]
            for prompt_id in prompt_ids
            if num_rounds and len(chains.get(prompt_id, ())) == num_rounds
        }
    return complete


def round_figures(chains: list[dict[int, dict]], number: int) -> dict[str, Any]:
    drafts = [chain[number] for chain in chains]
    figures = {
        "n": len(drafts),
        **values_of(drafts),
        "mean_response_tokens": sum(draft["num_tokens"] for draft in drafts) / len(drafts),
        "distinct_2": distinct([draft["text"] for draft in drafts], 2),
        "num_cut": sum(draft["finish_reason"] == "length" for draft in drafts),
    }
    if number > 1:
        figures["against_first"] = changes([(chain[1], chain[number]) for chain in chains])
        figures["against_previous"] = changes([(chain[number - 1], chain[number]) for chain in chains])
        figures["gain"] = gain_figures(chains, number)
    return figures


def changes(moves: list[tuple[dict, dict]]) -> dict[str, int]:
    """Counts of prompts whose reward rose, fell or stayed, whose text stayed, whose answer became or stayed right or wrong."""
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


def gain_figures(chains: list[dict[int, dict]], rounds: int) -> dict[str, Any]:
    """Round `rounds` minus the first round."""
    return differences([(chain[1], chain[rounds]) for chain in chains])


def differences(pairs: list[tuple[dict, dict]]) -> dict[str, Any]:
    """Mean of the second draft minus the first, paired by prompt: of the reward and, with a verifier, of exact match."""
    before, after = zip(*pairs, strict=True)
    figures = {"reward": intervals.paired(*([draft["score"] for draft in drafts] for drafts in (before, after)))}
    if pairs[0][0]["correct"] is not None:
        figures["exact_match"] = intervals.paired(*(list(map(is_right, drafts)) for drafts in (before, after)))
    return figures


def is_right(draft: dict) -> bool:
    return draft["correct"] == 1.0


Tables = Sequence[Iterable[dict]]  # drafts, scores


def add_best_of(summary: dict[str, Any], chains: Tables, samples: Tables) -> None:
    """Adds `best_of` to each split: the scorer's best of a chain against its best of as many parallel samples.

    `chains` and `samples` are (drafts, scores). Both sides have the same number of responses; `mean_tokens` (generated tokens
    of all responses to a prompt) shows whether they also cost the same. Only prompts whose responses all have a score are
    counted. If scores are equal, the earliest response is the best.
    """
    sides = {
        "chain": by_prompt(chains[0], chains[1], "round", summary),
        "parallel": by_prompt(samples[0], samples[1], "sample", summary),
    }
    for split, figures in summary.items():
        rounds = len(figures["rounds"])
        tables = {side: table.get(split, {}) for side, table in sides.items()}
        size = min(rounds, max((len(responses) for responses in tables["parallel"].values()), default=0))
        prompt_ids = (
            [p for p in tables["chain"] if all(len(table.get(p, ())) >= size for table in tables.values())] if size else []
        )
        if not prompt_ids:
            continue
        best: dict[str, list[dict]] = {}
        figures["best_of"] = {"num_responses": size, "n": len(prompt_ids)}
        for side, table in tables.items():
            groups = [[table[prompt_id][place] for place in sorted(table[prompt_id])[:size]] for prompt_id in prompt_ids]
            best[side] = [max(group, key=lambda draft: draft["score"]) for group in groups]
            tokens = sum(draft["num_tokens"] for group in groups for draft in group) / len(groups)
            figures["best_of"][side] = {"mean_tokens": tokens, **values_of(best[side])}
        figures["best_of"]["difference"] = differences(list(zip(best["parallel"], best["chain"], strict=True)))


def against_previous(splits: Iterable[str], before: Tables, now: Tables) -> dict[str, Any]:
    """What changed from the chains of one model to those of the next, by split and paired by prompt; each is (drafts, scores).

    `first`: y1 minus the y1 before; `last`: y_last minus the y_last before; `gain`: the change of y_last - y1. Each has its
    interval, in the unit of `measure`: exact match with a verifier, else the reward. `reward` holds the same three for the
    reward. Only prompts with a score in every round of both models are counted; a split without such a prompt is left out.
    """
    splits = list(splits)
    chains = [by_prompt(drafts, scores, "round", splits) for drafts, scores in (before, now)]
    changes_of: dict[str, Any] = {}
    for split in splits:
        old, new = (table[split] for table in chains)
        rounds = max((max(chain) for table in (old, new) for chain in table.values()), default=0)
        both = [(old[name], new[name]) for name in old if len(old[name]) == len(new.get(name, ())) == rounds]
        if not both:
            continue
        rewards = first_last_gain(both, rounds, lambda draft: draft["score"])
        if both[0][0][1]["correct"] is None:
            changes_of[split] = {"n": len(both), "measure": "reward", **rewards, "reward": rewards}
        else:
            right = first_last_gain(both, rounds, is_right)
            changes_of[split] = {"n": len(both), "measure": "exact_match", **right, "reward": rewards}
    return changes_of


Chain = dict[int, dict]  # by round


def first_last_gain(both: list[tuple[Chain, Chain]], rounds: int, value: Callable[[dict], float]) -> dict[str, Any]:
    """Intervals of the paired differences `first`, `last` and `gain`; see `against_previous`."""

    def of_round(number: int) -> tuple[list[float], list[float]]:
        return [value(old[number]) for old, _ in both], [value(new[number]) for _, new in both]

    first, last = of_round(1), of_round(rounds)
    gains = [[after - before for before, after in zip(*values, strict=True)] for values in zip(first, last, strict=True)]
    return {name: intervals.paired(*models) for name, models in (("first", first), ("last", last), ("gain", gains))}


def by_prompt(drafts: Iterable[dict], scores: Iterable[dict], place: str, splits: Iterable[str]) -> dict[str, dict[str, dict]]:
    """`{split: {prompt id: {round or sample: draft with its score}}}`; `place` is "round" or "sample"."""
    score_of = {row["draft_id"]: row for row in scores}
    table: dict[str, dict[str, dict]] = {split: defaultdict(dict) for split in splits}
    for draft in drafts:
        if draft["draft_id"] in score_of:
            table[draft["split"]][draft["prompt_id"]][draft[place]] = {**draft, **score_of[draft["draft_id"]]}
    return table


def values_of(drafts: list[dict]) -> dict[str, Any]:
    """The reward and, with a verifier, exact match, with their intervals."""
    figures = {"reward": intervals.mean([draft["score"] for draft in drafts])}
    if drafts[0]["correct"] is not None:
        figures["exact_match"] = intervals.mean(list(map(is_right, drafts)))
    return figures


def distinct(texts: list[str], n: int) -> float:
    """Distinct n-grams over all n-grams: of words, or of characters if the texts are mostly single words."""
    split = [text.split() for text in texts]
    units: list[Any] = split if sum(map(len, split)) > 2 * len(texts) else texts
    grams = [tuple(unit[first : first + n]) for unit in units for first in range(len(unit) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
