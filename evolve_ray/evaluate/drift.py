"""Drift and diversity of the drafts of one iteration: is the scorer right, do lengths grow, do answers become alike?

The drafts come from the policy that the iteration started from. Only the texts of one shard are in memory at a time.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from evolve_ray.evaluate.figures import distinct

VERSION = 1
DIVERSITY_PROMPTS = 1000  # distinct-2 falls with the size of the sample, so each iteration uses the same number of prompts


def figures(
    shards: Iterable[tuple[list[dict], list[dict]]], pairs: Iterable[dict], others: Collection[str] = ()
) -> dict[str, Any]:  # fmt: skip
    """Figures of drafts, their scores and the pairs selected from them; `shards` yields (drafts, scores) of each shard.

    Lengths, diversity and counts leave out the drafts of the models with the hashes `others`, which say nothing of the policy;
    the scorer's figures are of all. Drafts and pairs must come in the same order of prompts; that way only one shard is in memory
    at a time.

    Lengths are in tokens; rates and shares are from 0 to 1. Correlations are Pearson's, over all drafts and `within_prompt`
    (of the deviations from the mean of the prompt); null if one side is constant.

    `truth` compares the scorer with the verifier, and is null without one. Its `pair_order` counts the pairs of drafts of one
    prompt that the scorer orders as the verifier does (`agree`), orders the other way round (`disagree`), or scores equally
    although the verifier does not (`scorer_ties`); `truth_ties` are equal for the verifier. Its `labels` counts the selected
    pairs whose chosen draft is better, equal or worse by the verifier.
    """
    counts: Counter[str] = Counter()
    winning: Counter[int] = Counter()
    rounds: dict[int, Counter[str]] = defaultdict(Counter)
    texts: dict[int, list[str]] = defaultdict(list)
    columns = {name: array("d") for name in ("prompt", "score", "correct", "tokens")}
    remaining = iter(pairs)
    pair = next(remaining, None)
    for drafts, scores in shards:
        score_of = {row["draft_id"]: row for row in scores}
        for group in by_prompt(drafts):
            own = [draft for draft in group if draft.get("model") not in others]
            count_texts(own, counts, rounds)
            if counts["num_prompts"] <= DIVERSITY_PROMPTS:
                for draft in own:
                    texts[draft["round"]].append(draft["text"])
            scored = [{**draft, **score_of[draft["draft_id"]]} for draft in group if draft["draft_id"] in score_of]
            verified = [draft for draft in scored if draft["correct"] is not None]
            count_order(verified, counts)
            correct_of, ids = {draft["draft_id"]: draft["correct"] for draft in verified}, {draft["draft_id"] for draft in group}
            while pair is not None and pair["chosen_id"] in ids:
                winning[pair["chosen_round"]] += 1
                count_label(pair, correct_of, counts)
                pair = next(remaining, None)
            columns["prompt"].extend([counts["num_prompts"] - 1] * len(scored))
            columns["score"].extend(draft["score"] for draft in scored)
            columns["correct"].extend(np.nan if draft["correct"] is None else draft["correct"] for draft in scored)
            columns["tokens"].extend(draft["num_tokens"] for draft in scored)
    assert pair is None, f"pair of {pair['chosen_id']}: the pairs are not in the order of the drafts"
    prompt, score, correct, tokens = (np.frombuffer(columns[name]) if columns[name] else np.empty(0) for name in columns)
    total: Counter[str] = sum(rounds.values(), Counter())
    return {
        "num_prompts": counts["num_prompts"],
        "num_drafts": total["n"],
        "mean_response_tokens": ratio(total["tokens"], total["n"]),
        "rounds": {
            str(number): {
                "n": rounds[number]["n"],
                "mean_response_tokens": ratio(rounds[number]["tokens"], rounds[number]["n"]),
                "distinct_2": distinct(texts[number], 2),
                "num_cut": rounds[number]["cut"],
            }
            for number in sorted(rounds)
        },
        "cut_rate": ratio(total["cut"], total["n"]),
        "duplicate_rate": ratio(counts["duplicates"], total["n"]),
        "unchanged_rate": ratio(counts["unchanged"], counts["refinements"]),
        "winning_rounds": {str(number): n for number, n in sorted(winning.items())},
        "score_tokens": correlations(score, tokens, prompt),
        "truth": truth(score, correct, prompt, counts),
    }


def by_prompt(drafts: list[dict]) -> list[list[dict]]:
    """The answers of each prompt, without critiques."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for draft in drafts:
        if draft["kind"] == "answer":
            groups[draft["prompt_id"]].append(draft)
    return list(groups.values())


def count_texts(group: list[dict], counts: Counter, rounds: dict[int, Counter]) -> None:
    """Counts the drafts of one prompt: number, tokens, cut ones, duplicates, and refinements equal to the draft they refine."""
    text_of = {draft["draft_id"]: draft["text"] for draft in group}
    copies = Counter(text_of.values())
    counts["num_prompts"] += 1
    for draft in group:
        rounds[draft["round"]].update(n=1, tokens=draft["num_tokens"], cut=int(draft["finish_reason"] == "length"))
        counts["duplicates"] += copies[draft["text"]] > 1
        if draft["parent_id"] in text_of:
            counts["refinements"] += 1
            counts["unchanged"] += text_of[draft["parent_id"]] == draft["text"]


def count_order(group: list[dict], counts: Counter) -> None:
    """Counts the pairs of drafts of one prompt by how scorer and verifier order them."""
    upper = np.triu_indices(len(group), k=1)
    scored, true = (
        np.sign(np.subtract.outer(values, values))[upper]
        for values in (np.array([draft[name] for draft in group], dtype=np.float64) for name in ("score", "correct"))
    )
    counts["truth_ties"] += int(np.sum(true == 0))
    counts["agree"] += int(np.sum((true != 0) & (scored == true)))
    counts["disagree"] += int(np.sum((true != 0) & (scored == -true)))
    counts["scorer_ties"] += int(np.sum((true != 0) & (scored == 0)))


def count_label(pair: dict, correct_of: dict[str, float], counts: Counter) -> None:
    """Counts a selected pair by how the verifier orders its two drafts; a pair with an unverified draft is not counted."""
    if pair["chosen_id"] in correct_of and pair["rejected_id"] in correct_of:
        order = int(np.sign(correct_of[pair["chosen_id"]] - correct_of[pair["rejected_id"]]))
        counts[("equal", "better", "worse")[order]] += 1


def truth(score: np.ndarray, correct: np.ndarray, prompt: np.ndarray, counts: Counter) -> dict[str, Any] | None:
    """The scorer and the selected pairs against the verifier; see `figures`."""
    verified = ~np.isnan(correct)
    if not verified.any():
        return None
    return {
        "pair_order": {
            "share": ratio(counts["agree"], counts["agree"] + counts["disagree"]),
            **{f"num_{name}": counts[name] for name in ("agree", "disagree", "scorer_ties", "truth_ties")},
        },
        "score_correct": correlations(score[verified], correct[verified], prompt[verified]),
        "labels": {
            "accuracy": ratio(counts["better"], counts["better"] + counts["equal"] + counts["worse"]),
            **{f"num_{name}": counts[name] for name in ("better", "equal", "worse")},
        },
    }


def correlations(x: np.ndarray, y: np.ndarray, prompt: np.ndarray) -> dict[str, float | None]:
    return {"all": correlation(x, y), "within_prompt": correlation(centred(x, prompt), centred(y, prompt))}


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation; None if a side is constant or empty."""
    if not len(x):
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 1e-9 else None


def centred(values: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Deviations of the values from the mean of their prompt."""
    group = prompt.astype(int)
    sums, sizes = np.bincount(group, weights=values), np.bincount(group)
    return values - (sums / np.maximum(sizes, 1))[group]


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def against_first(now: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """The figures `now` with a `tokens_ratio` beside every mean response length: that length over the one of iteration 1."""

    def compared(part: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
        return {**part, "tokens_ratio": ratio(part["mean_response_tokens"], before["mean_response_tokens"]) if before else None}

    rounds = {number: compared(part, first["rounds"].get(number)) for number, part in now["rounds"].items()}
    return {**compared(now, first), "rounds": rounds}
