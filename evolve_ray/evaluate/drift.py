"""Drift and diversity of one iteration's drafts: is the scorer right, do lengths run away, do answers become alike?

The drafts were written by the policy that the iteration started from. One shard's texts are in memory at a time.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from evolve_ray.evaluate.figures import distinct

VERSION = 1
DIVERSITY_PROMPTS = 1000  # distinct-2 falls with the size of the sample, so every iteration's is of as many prompts


def figures(shards: Iterable[tuple[list[dict], list[dict]]], pairs: Iterable[dict]) -> dict[str, Any]:
    """Figures of drafts, their scores and the pairs that were selected from them; `shards` gives (drafts, scores) of each.

    Drafts and pairs come in the same order of prompts, so that those of one shard are in memory at a time.

    Lengths are in tokens; rates and shares are from 0 to 1; correlations are Pearson's, null where one side is constant,
    over all drafts and `within_prompt` (deviations from the prompt's mean). `truth` is null without a verifier. In it
    `pair_order` counts pairs of one prompt's drafts: ordered by the scorer as by the verifier, the other way round, or alike
    though the verifier tells them apart. `labels` counts selected pairs whose chosen draft is truly better, equal, worse.
    """
    counts: Counter[str] = Counter()
    winning: Counter[int] = Counter()
    rounds: dict[int, Counter[str]] = defaultdict(Counter)
    texts: dict[int, list[str]] = defaultdict(list)
    columns = {name: array("d") for name in ("prompt", "score", "correct", "tokens")}
    left = iter(pairs)
    pair = next(left, None)
    for drafts, scores in shards:
        score_of = {row["draft_id"]: row for row in scores}
        for group in by_prompt(drafts):
            count_texts(group, counts, rounds)
            if counts["num_prompts"] <= DIVERSITY_PROMPTS:
                for draft in group:
                    texts[draft["round"]].append(draft["text"])
            scored = [{**draft, **score_of[draft["draft_id"]]} for draft in group if draft["draft_id"] in score_of]
            known = [draft for draft in scored if draft["correct"] is not None]
            count_order(known, counts)
            correct_of, ids = {draft["draft_id"]: draft["correct"] for draft in known}, {draft["draft_id"] for draft in group}
            while pair is not None and pair["chosen_id"] in ids:
                winning[pair["chosen_round"]] += 1
                count_label(pair, correct_of, counts)
                pair = next(left, None)
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
    """The answers of each prompt, critiques left out."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for draft in drafts:
        if draft["kind"] == "answer":
            groups[draft["prompt_id"]].append(draft)
    return list(groups.values())


def count_texts(group: list[dict], counts: Counter, rounds: dict[int, Counter]) -> None:
    """Adds one prompt's drafts: how many, how long, cut, the same as another, or the same as the draft they refine."""
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
    """Adds the pairs of one prompt's drafts by how the scorer orders them against the verifier."""
    upper = np.triu_indices(len(group), k=1)
    given, true = (
        np.sign(np.subtract.outer(values, values))[upper]
        for values in (np.array([draft[name] for draft in group], dtype=np.float64) for name in ("score", "correct"))
    )
    counts["truth_ties"] += int(np.sum(true == 0))
    counts["agree"] += int(np.sum((true != 0) & (given == true)))
    counts["disagree"] += int(np.sum((true != 0) & (given == -true)))
    counts["scorer_ties"] += int(np.sum((true != 0) & (given == 0)))


def count_label(pair: dict, correct_of: dict[str, float], counts: Counter) -> None:
    """Adds a selected pair by how the verifier orders its two drafts, where it knows both."""
    if pair["chosen_id"] in correct_of and pair["rejected_id"] in correct_of:
        order = int(np.sign(correct_of[pair["chosen_id"]] - correct_of[pair["rejected_id"]]))
        counts[("equal", "better", "worse")[order]] += 1


def truth(score: np.ndarray, correct: np.ndarray, prompt: np.ndarray, counts: Counter) -> dict[str, Any] | None:
    """The scorer and the selected pairs against the verifier; see `figures`."""
    known = ~np.isnan(correct)
    if not known.any():
        return None
    return {
        "pair_order": {
            "share": ratio(counts["agree"], counts["agree"] + counts["disagree"]),
            **{f"num_{name}": counts[name] for name in ("agree", "disagree", "scorer_ties", "truth_ties")},
        },
        "score_correct": correlations(score[known], correct[known], prompt[known]),
        "labels": {
            "accuracy": ratio(counts["better"], counts["better"] + counts["equal"] + counts["worse"]),
            **{f"num_{name}": counts[name] for name in ("better", "equal", "worse")},
        },
    }


def correlations(one: np.ndarray, other: np.ndarray, prompt: np.ndarray) -> dict[str, float | None]:
    return {"all": correlation(one, other), "within_prompt": correlation(centred(one, prompt), centred(other, prompt))}


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's, or None where a side does not vary."""
    if not len(one):
        return None
    one, other = one - one.mean(), other - other.mean()
    scale = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / scale) if scale > 1e-9 else None


def centred(values: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Deviations from the mean of the values' own prompt."""
    group = prompt.astype(int)
    sums, sizes = np.bincount(group, weights=values), np.bincount(group)
    return values - (sums / np.maximum(sizes, 1))[group]


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def against_first(found: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """`found` with `tokens_ratio` beside every mean response length: that length over the one in iteration 1."""

    def compared(here: dict[str, Any], there: dict[str, Any] | None) -> dict[str, Any]:
        return {**here, "tokens_ratio": ratio(here["mean_response_tokens"], there["mean_response_tokens"]) if there else None}

    rounds = {number: compared(figures, first["rounds"].get(number)) for number, figures in found["rounds"].items()}
    return {**compared(found, first), "rounds": rounds}
