"""Pair selection: pure functions of one prompt's drafts.

All keep the same promises. A draft that is in no pair is rejected once, with a reason. The order of the drafts changes
nothing; ties go by id. A pair has two different texts, and no two pairs of a prompt have the same two. A draft that was
cut by length may be dispreferred, but is never chosen unless `options.allow_cut`.
"""

import random
from collections.abc import Callable, Iterable, Iterator

from rapidfuzz.distance import Levenshtein

from evolve_ray.config.options import Selection
from evolve_ray.store.rows import content_id, derive_seed, reject

Selected = tuple[list[dict], list[dict]]  # pairs, rejected drafts
Candidate = tuple[dict, dict, str]  # chosen, rejected, and what speaks against the pair ("": nothing)
CUT = "cut by length: cannot be chosen"
MIN_WORDS = 8  # a shorter text has too few 4-grams to call it repetitive


def reward_model(prompt: dict, drafts: list[dict], options: Selection) -> Selected:
    """The better over the worse by score, more than `options.margin` apart, in up to `options.max_pairs` pairs.

    `drafts` hold `draft_id, parent_id, sample, round, text, finish_reason, score`; one without a score is in no pair.
    """
    return {"extremes": extremes, "neighbours": neighbours}[options.pairing](prompt, drafts, options)


def extremes(prompt: dict, drafts: list[dict], options: Selection) -> Selected:
    """The best draft of all rounds over the worst, the second best over the second worst, and so on, in disjoint pairs."""
    scored = sorted((d for d in drafts if d["score"] is not None), key=by_rank)

    def candidates() -> Iterator[Candidate]:
        for best in (d for d in scored if may_be_chosen(d, options)):
            for worst in (d for d in reversed(scored) if d is not best):
                yield best, worst, margin_fault(best, worst, options)

    reasons = unscored(drafts) | cut(scored, options)
    return settle(prompt, drafts, candidates(), reasons, options, disjoint=True, rest="neither best nor worst")


def neighbours(prompt: dict, drafts: list[dict], options: Selection) -> Selected:
    """Of every draft and its parent the better over the worse; those that differ most are kept.

    A draft may be in several pairs. Drafts without parents (of the strategy `parallel`) have no neighbours and give no pair.
    """
    scored = {d["draft_id"]: d for d in drafts if d["score"] is not None}
    related = [sorted((d, scored[d["parent_id"]]), key=by_rank) for d in scored.values() if d["parent_id"] in scored]
    related.sort(key=lambda pair: (pair[1]["score"] - pair[0]["score"], pair[0]["draft_id"], pair[1]["draft_id"]))

    def candidates() -> Iterator[Candidate]:
        for better, worse in related:
            fault = "" if may_be_chosen(better, options) else "the better of its neighbouring rounds was cut by length"
            yield better, worse, fault or margin_fault(better, worse, options)

    alone = scored.keys() - {d["draft_id"] for pair in related for d in pair}
    reasons = unscored(drafts) | dict.fromkeys(alone, "has no neighbouring round with a score")
    rest = "not among the selection.max_pairs neighbouring rounds that differ most"
    return settle(prompt, drafts, candidates(), reasons, options, disjoint=False, rest=rest)


def rule(prompt: dict, drafts: list[dict], options: Selection) -> Selected:
    """The last round of a sample over its first, without any score; up to `options.max_pairs` samples, in their order.

    That later is better is an assumption, so `guards` keep out what is no improvement on its face.
    """
    samples: dict[int, list[dict]] = {}
    for draft in sorted(drafts, key=lambda d: (d["sample"], d["round"], d["draft_id"])):
        samples.setdefault(draft["sample"], []).append(draft)
    reasons: dict[str, str] = {}
    ends = []
    for rounds in samples.values():
        first, last = rounds[0], max(rounds, key=lambda d: d["round"])  # of equals the first, so the smallest id
        if first["round"] == last["round"]:
            reasons |= {d["draft_id"]: "is in the only round of its sample" for d in rounds}
        else:
            reasons |= {d["draft_id"]: "neither first nor last round" for d in rounds if d is not first and d is not last}
            ends.append((last, first))
    candidates = ((last, first, guards(last, first, options)) for last, first in ends)
    return settle(prompt, drafts, candidates, reasons, options, disjoint=True, rest="beyond selection.max_pairs samples")


def random_pairs(prompt: dict, drafts: list[dict], options: Selection) -> Selected:
    """The control: ordered pairs of different texts, drawn uniformly and disjoint; the draw comes from the ids alone."""
    ordered = sorted(drafts, key=lambda d: d["draft_id"])
    drawn = [(d, other) for d in ordered if may_be_chosen(d, options) for other in ordered if other["text"] != d["text"]]
    seed = derive_seed("random pairs", prompt["prompt_id"], [d["draft_id"] for d in ordered])
    random.Random(seed).shuffle(drawn)
    candidates = ((chosen, rejected, "") for chosen, rejected in drawn)
    return settle(prompt, drafts, candidates, cut(drafts, options), options, disjoint=True, rest="was not drawn")


def settle(
    prompt: dict, drafts: list[dict], candidates: Iterable[Candidate], reasons: dict[str, str], options: Selection,
    *, disjoint: bool, rest: str,
) -> Selected:  # fmt: skip
    """Keeps the first `options.max_pairs` candidates that nothing speaks against, and says why every other draft is unused.

    That is its reason in `reasons`, else the fault of its first candidate pair, else `rest`: there were pairs enough.
    """
    pairs: list[dict] = []
    used: set[str] = set()
    texts: set[frozenset[str]] = set()
    reasons = dict(reasons)
    for chosen, rejected, fault in candidates:
        ids, pair_texts = (chosen["draft_id"], rejected["draft_id"]), frozenset((chosen["text"], rejected["text"]))
        if disjoint and not used.isdisjoint(ids):
            continue
        if len(pair_texts) == 1:
            fault = "has the same text as the draft that it would be paired with"
        elif pair_texts in texts:
            fault = "would repeat the two texts of another pair"
        if fault:
            for name in ids:
                reasons.setdefault(name, fault)
            continue
        pairs.append(make_pair(prompt, chosen, rejected))
        used.update(ids)
        texts.add(pair_texts)
        if len(pairs) == options.max_pairs:
            break
    left = rest if len(pairs) == options.max_pairs else "no draft with another text is left to pair it with"
    unused = sorted((d for d in drafts if d["draft_id"] not in used), key=lambda d: d["draft_id"])
    return pairs, [reject_draft(prompt, d, reasons.get(d["draft_id"], left)) for d in unused]


def guards(chosen: dict, rejected: dict, options: Selection) -> str:
    """What speaks against taking a later text for a better one: a cut, a near-copy, a change of length, repetition."""
    new, old = chosen["text"], rejected["text"]
    if not may_be_chosen(chosen, options):
        return "the last round was cut by length"
    similarity = Levenshtein.normalized_similarity(new, old)
    if similarity >= options.max_similarity:
        return f"last and first round are nearly identical: selection.max_similarity is {options.max_similarity}"
    longer, shorter = max(len(new), len(old)), min(len(new), len(old))
    if longer > options.max_length_ratio * shorter:  # holds for every text over an empty one
        return f"last and first round differ in length: selection.max_length_ratio is {options.max_length_ratio}"
    if repetition(new) > options.max_repetition:
        return f"the last round repeats itself: selection.max_repetition is {options.max_repetition}"
    return ""


def repetition(text: str) -> float:
    """The share of word 4-grams that occurred before in the text; 0 for fewer than `MIN_WORDS` words between spaces."""
    words = text.split()
    if len(words) < MIN_WORDS:
        return 0.0
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return (len(grams) - len(set(grams))) / len(grams)


def by_rank(draft: dict) -> tuple[float, str]:
    return -draft["score"], draft["draft_id"]


def may_be_chosen(draft: dict, options: Selection) -> bool:
    return options.allow_cut or draft["finish_reason"] == "stop"


def margin_fault(better: dict, worse: dict, options: Selection) -> str:
    apart = better["score"] - worse["score"] > options.margin
    return "" if apart else f"scores are not more than the margin apart (selection.margin is {options.margin})"


def unscored(drafts: list[dict]) -> dict[str, str]:
    return {d["draft_id"]: "has no finite score" for d in drafts if d["score"] is None}


def cut(drafts: list[dict], options: Selection) -> dict[str, str]:
    return {d["draft_id"]: CUT for d in drafts if not may_be_chosen(d, options)}


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
        "chosen_score": chosen.get("score"),
        "rejected_score": rejected.get("score"),
    }


SELECTIONS: dict[str, Callable[[dict, list[dict], Selection], Selected]] = {
    "reward_model": reward_model,
    "rule": rule,
    "random": random_pairs,
}
