"""Pair selection: pure functions of the drafts of one prompt.

All of them keep the same rules. A draft that is in no pair is rejected once, with a reason. The order of the drafts does not
matter; equal drafts are ordered by id. The two texts of a pair differ, and no two pairs of a prompt have the same two texts. A
draft that was cut by length can be rejected in a pair, but is never chosen, except with `options.allow_cut`.
"""

import random
from collections.abc import Iterable, Iterator

from rapidfuzz.distance import Levenshtein

from evolve_ray.config.options import Selection
from evolve_ray.errors import UserError
from evolve_ray.store.rows import TURN, content_id, derive_seed, reject

Selected = tuple[list[dict], list[dict]]  # pairs, rejected drafts
Candidate = tuple[dict, dict, str]  # chosen, rejected, and why the pair must not be used ("": it may be used)
OF_ANOTHER = "was written by another model, so a policy gradient has no ratio for it"
CUT = "cut by length: cannot be chosen"
TURN_NAMES = [field.name for field in TURN]
MIN_WORDS = 8  # a shorter text has too few 4-grams to call it repetitive


def reward_model(prompt: dict, drafts: list[dict], options: Selection) -> Selected:
    """Up to `options.max_pairs` pairs of a draft and one with a lower score; the difference is more than `options.margin`.

    `drafts` have `draft_id, parent_id, sample, round, text, finish_reason, score`; a draft without a score is in no pair.
    """
    return {"extremes": extremes, "neighbours": neighbours}[options.pairing](prompt, drafts, options)


def extremes(prompt: dict, drafts: list[dict], options: Selection) -> Selected:
    """Pairs the best draft of all rounds with the worst, the second best with the second worst, and so on; pairs are disjoint."""
    scored = sorted((d for d in drafts if d["score"] is not None), key=rank)

    def candidates() -> Iterator[Candidate]:
        for best in (d for d in scored if may_be_chosen(d, options)):
            for worst in (d for d in reversed(scored) if d is not best):
                yield best, worst, margin_fault(best, worst, options)

    reasons = unscored_reasons(drafts) | cut_reasons(scored, options)
    return take_pairs(prompt, drafts, candidates(), reasons, options, disjoint=True, default="neither best nor worst")


def neighbours(prompt: dict, drafts: list[dict], options: Selection) -> Selected:
    """Pairs every draft with its parent, the better one chosen; keeps the pairs with the greatest difference of scores.

    A draft can be in several pairs. Drafts without a parent (strategy `parallel`) have no neighbours, so they give no pairs.
    """
    scored = {d["draft_id"]: d for d in drafts if d["score"] is not None}
    parent_pairs = [sorted((d, scored[d["parent_id"]]), key=rank) for d in scored.values() if d["parent_id"] in scored]
    parent_pairs.sort(key=lambda pair: (pair[1]["score"] - pair[0]["score"], pair[0]["draft_id"], pair[1]["draft_id"]))

    def candidates() -> Iterator[Candidate]:
        for better, worse in parent_pairs:
            fault = "" if may_be_chosen(better, options) else "the better of its neighbouring rounds was cut by length"
            yield better, worse, fault or margin_fault(better, worse, options)

    without_neighbour = scored.keys() - {d["draft_id"] for pair in parent_pairs for d in pair}
    reasons = unscored_reasons(drafts) | dict.fromkeys(without_neighbour, "has no neighbouring round with a score")
    default = "not among the selection.max_pairs neighbouring rounds that differ most"
    return take_pairs(prompt, drafts, candidates(), reasons, options, disjoint=False, default=default)


def rule(prompt: dict, drafts: list[dict], options: Selection) -> Selected:
    """Pairs the last round of a sample (chosen) with its first, without scores; up to `options.max_pairs` samples, in order.

    That a later round is better is an assumption, so `guard_fault` leaves out pairs that are obviously no improvement.
    """
    samples: dict[int, list[dict]] = {}
    for draft in sorted(drafts, key=lambda d: (d["sample"], d["round"], d["draft_id"])):
        samples.setdefault(draft["sample"], []).append(draft)
    reasons: dict[str, str] = {}
    ends = []
    for rounds in samples.values():
        first, last = rounds[0], max(rounds, key=lambda d: d["round"])  # of equal rounds the smallest id
        if first["round"] == last["round"]:
            reasons |= {d["draft_id"]: "is in the only round of its sample" for d in rounds}
        else:
            reasons |= {d["draft_id"]: "neither first nor last round" for d in rounds if d is not first and d is not last}
            ends.append((last, first))
    candidates = ((last, first, guard_fault(last, first, options)) for last, first in ends)
    return take_pairs(prompt, drafts, candidates, reasons, options, disjoint=True, default="beyond selection.max_pairs samples")


def random_pairs(prompt: dict, drafts: list[dict], options: Selection) -> Selected:
    """Control: disjoint ordered pairs of different texts, drawn uniformly. The ids alone decide what is drawn."""
    ordered = sorted(drafts, key=lambda d: d["draft_id"])
    shuffled = [(a, b) for a in ordered if may_be_chosen(a, options) for b in ordered if b["text"] != a["text"]]
    seed = derive_seed("random pairs", prompt["prompt_id"], [d["draft_id"] for d in ordered])
    random.Random(seed).shuffle(shuffled)
    candidates = ((chosen, rejected, "") for chosen, rejected in shuffled)
    return take_pairs(prompt, drafts, candidates, cut_reasons(drafts, options), options, disjoint=True, default="was not drawn")


def take_pairs(
    prompt: dict, drafts: list[dict], candidates: Iterable[Candidate], reasons: dict[str, str], options: Selection,
    *, disjoint: bool, default: str,
) -> Selected:  # fmt: skip
    """Takes the first `options.max_pairs` candidates without a fault, and rejects every draft that is in no pair.

    The reason of a rejected draft is its entry in `reasons`, else the fault of its first candidate pair. Otherwise it is
    `default` if there are `options.max_pairs` pairs, or that no draft is left to pair it with. With `disjoint` no draft is in
    two pairs.
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
            for draft_id in ids:
                reasons.setdefault(draft_id, fault)
            continue
        pairs.append(make_pair(prompt, chosen, rejected))
        used.update(ids)
        texts.add(pair_texts)
        if len(pairs) == options.max_pairs:
            break
    default_reason = default if len(pairs) == options.max_pairs else "no draft with another text is left to pair it with"
    unused = sorted((d for d in drafts if d["draft_id"] not in used), key=lambda d: d["draft_id"])
    return pairs, [reject_draft(prompt, d, reasons.get(d["draft_id"], default_reason)) for d in unused]


def guard_fault(chosen: dict, rejected: dict, options: Selection) -> str:
    """Why the later text is probably not better: it is cut, nearly a copy, of very different length, or repetitive; "": none."""
    new, old = chosen["text"], rejected["text"]
    if not may_be_chosen(chosen, options):
        return "the last round was cut by length"
    similarity = Levenshtein.normalized_similarity(new, old)
    if similarity >= options.max_similarity:
        return f"last and first round are nearly identical: selection.max_similarity is {options.max_similarity}"
    longer, shorter = max(len(new), len(old)), min(len(new), len(old))
    if longer > options.max_length_ratio * shorter:  # always true if the shorter text is empty
        return f"last and first round differ in length: selection.max_length_ratio is {options.max_length_ratio}"
    if repetition(new) > options.max_repetition:
        return f"the last round repeats itself: selection.max_repetition is {options.max_repetition}"
    return ""


def repetition(text: str) -> float:
    """The share of word 4-grams that are repetitions of earlier ones; 0 for a text of fewer than `MIN_WORDS` words."""
    words = text.split()
    if len(words) < MIN_WORDS:
        return 0.0
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return (len(grams) - len(set(grams))) / len(grams)


def rank(draft: dict) -> tuple[float, str]:
    return -draft["score"], draft["draft_id"]


def may_be_chosen(draft: dict, options: Selection) -> bool:
    return options.allow_cut or draft["finish_reason"] == "stop"


def margin_fault(better: dict, worse: dict, options: Selection) -> str:
    far_enough = better["score"] - worse["score"] > options.margin
    return "" if far_enough else f"scores are not more than the margin apart (selection.margin is {options.margin})"


def unscored_reasons(drafts: list[dict]) -> dict[str, str]:
    return {d["draft_id"]: "has no finite score" for d in drafts if d["score"] is None}


def cut_reasons(drafts: list[dict], options: Selection) -> dict[str, str]:
    return {d["draft_id"]: CUT for d in drafts if not may_be_chosen(d, options)}


def reject_draft(prompt: dict, draft: dict, reason: str) -> dict:
    return reject({**prompt, "prompt_id": draft["draft_id"]}, "pairs", reason)


def make_pair(prompt: dict, chosen: dict, rejected: dict, numbers: dict[str, float] | None = None) -> dict:
    """The pair of two drafts; `numbers` are named numbers for the loss, the same names in every pair of a selection."""
    pair = {
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
    return pair | {"numbers": numbers} if numbers else pair


def make_turn(
    prompt: dict, draft: dict, numbers: dict[str, float] | None = None, rejected: dict | None = None,
    turns: dict[str, dict | None] | None = None,
) -> dict:  # fmt: skip
    """The row that trains a response of any kind after the messages of its ask, `draft["messages"]`.

    It is chosen over `rejected`, another response to the same messages, or stands alone: then both sides are the draft. `turns`
    are further responses by the names that the objective has for them, each after its own messages; None: that turn did not
    happen. Raises UserError for a response without messages, and for two sides with different ones.
    """
    other = draft if rejected is None else rejected
    context = messages_of(draft)
    if messages_of(other) != context:
        raise UserError(
            f"make_turn: drafts {draft['draft_id']} and {other['draft_id']} answer different messages; give a rejected draft of "
            "the same ask, or link the two as turns of an objective that names them"
        )
    further = [make_link(name, turn) for name, turn in (turns or {}).items()]
    row = make_pair(prompt, draft, other, numbers) | {"context": context}
    links = [[turn["name"], turn["context"], turn["text"]] for turn in further]
    row["pair_id"] = content_id("turn", prompt["prompt_id"], context, draft["text"], other["text"], links)
    row |= {"kind": draft["kind"]} if draft.get("kind", "answer") != "answer" else {}
    return row | ({"turns": further} if further else {})


def make_link(name: str, draft: dict | None) -> dict:
    """A further turn of a row, as `rows.TURN` holds it."""
    if draft is None:
        return dict.fromkeys(TURN_NAMES) | {"name": name, "text": "", "finished": False}
    return {
        "name": name,
        "context": messages_of(draft),
        "text": draft["text"],
        "finished": draft["finish_reason"] == "stop",
        "draft_id": draft["draft_id"],
        "token_ids": draft.get("token_ids"),
        "num_thinking_tokens": draft.get("num_thinking_tokens"),
    }


def messages_of(draft: dict) -> list[dict]:
    """The messages that a draft answers."""
    if not draft.get("messages"):
        raise UserError(
            f"make_turn: draft {draft['draft_id']} has no messages; its strategy stored none, so generate again (--rerun-changed)"
        )
    return list(draft["messages"])
