"""The chains of an evaluation that are worth reading: those that refinement improved, made worse, or left wrong."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from evolve_ray.report.markup import escape, section
from evolve_ray.store import shards
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.rows import read_table
from evolve_ray.store.run import Run
from evolve_ray.store.turns import last_turn, turns

KINDS = {
    "better": "improved",
    "worse": "made worse",
    "wrong": "wrong and unchanged",
    "cut": "cut by length",
    "talk": "talks about the change",
}
PER_KIND = 6
MAX_SHOWN = 1000  # characters of one text
SCANNED = 240  # characters at the start and at the end of a response: that is where it talks about the change

# A response to a refinement ask should be the answer alone. These patterns find the usual ways to talk about the change instead.
# A prompt that is itself about revising may match too, so they only point out chains to read; nothing is measured with them.
META_TALK = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bhere(?:'s| is| are) (?:the|my|an?) (?:\w+ )?(?:improved|revised|corrected|updated|refined|rewritten|better)\b",
        r"\b(?:improved|revised|corrected|updated|refined|rewritten) (?:version|response|answer|draft)\b",
        r"\bI(?:'ve| have) (?:improved|revised|corrected|updated|refined|rewritten|changed|fixed|made)\b",
        r"\bI (?:improved|revised|corrected|updated|refined|rewrote|changed|fixed)\b",
        r"\b(?:changes|improvements|corrections) (?:I |that I )?(?:made|include)\b",
        r"\b(?:previous|original|earlier|last|first) (?:response|answer|draft)\b",
        r"\b(?:upon|on|after) (?:review|reflection|reconsideration|a second look)\b",
        r"\b(?:I apologi[sz]e|sorry) for (?:the|my) (?:mistake|error|confusion|oversight)",
    )
)

# The page runs no script, so the style sheet makes the choice: it hides the chains of other kinds and models.
STYLE = "".join(
    f".chains:has(#{group}-{value}:checked) .chain:not(.{value}){{display:none}}\n"
    for group, value in [*(("kind", kind) for kind in KINDS), ("model", "m0"), ("model", "m1")]
)


def is_meta_talk(text: str) -> bool:
    """Whether a refined response talks about its change, near its start or its end."""
    scanned = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    scanned = scanned if len(scanned) <= 2 * SCANNED else f"{scanned[:SCANNED]}\n{scanned[-SCANNED:]}"
    return any(pattern.search(scanned) for pattern in META_TALK)


def collect(run: Run, models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chains to read of the first and the last iteration, with counts by kind; of the last model if no iteration exists."""
    trained = [model for model in models if model["iteration"]] or models[-1:]
    first_and_last = trained[:1] + trained[1:][-1:]
    held_out = read_manifest(run.iteration(0) / "held_out")
    if held_out is None:
        return []
    prompts = {row["prompt_id"]: row for row in read_table(held_out.path("prompts.parquet"))}
    collected = []
    for model in first_and_last:
        chains = list(read_chains(run, model, prompts))
        if chains:
            chosen, totals = choose(chains)
            collected.append({"model": model["name"], "num_chains": len(chains), "totals": totals, "chains": chosen})
    return collected


def read_chains(run: Run, model: dict[str, Any], prompts: dict[str, dict]) -> Iterator[dict[str, Any]]:
    """The chains of a model's evaluation that have a score in every round."""
    folder = run.iteration(model["iteration"]) / ("base_evaluation" if model["name"] == "base" else "evaluation")
    drafts, scores = read_manifest(folder / "generations"), read_manifest(folder / "scores")
    if drafts is None or scores is None:
        return
    score_of = {row["draft_id"]: row for row in shards.read_rows(scores)}
    by_prompt: dict[str, list[dict]] = {}
    for draft in shards.read_rows(drafts):
        if draft["draft_id"] in score_of:
            by_prompt.setdefault(draft["prompt_id"], []).append({**draft, **score_of[draft["draft_id"]]})
    num_rounds = {split: len(figures["rounds"]) for split, figures in model["splits"].items()}
    for prompt_id, answers in by_prompt.items():
        split = answers[0]["split"]
        if len(answers) == num_rounds.get(split) and prompt_id in prompts:
            answers.sort(key=lambda draft: draft["round"])
            yield {"prompt_id": prompt_id, "split": split, "prompt": prompts[prompt_id], "rounds": answers}


def kinds_of(chain: dict[str, Any]) -> list[str]:
    first, last = chain["rounds"][0], chain["rounds"][-1]
    before, after = rank(first), rank(last)
    same = all(draft["text"] == first["text"] for draft in chain["rounds"])
    is_kind = {
        "better": after > before,
        "worse": after < before,
        "wrong": len(chain["rounds"]) > 1 and same and last["correct"] is not None and last["correct"] < 1.0,
        "cut": any(draft["finish_reason"] == "length" for draft in chain["rounds"]),
        "talk": any(is_meta_talk(draft["text"]) for draft in chain["rounds"][1:]),
    }
    return [kind for kind, holds in is_kind.items() if holds]


def rank(draft: dict[str, Any]) -> tuple[bool, float]:
    """Sorts drafts: right above wrong if a verifier knows it, then by score."""
    return draft["correct"] == 1.0, draft["score"]


def choose(chains: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(at most `PER_KIND` chains of each kind, the clearest first and the splits in turn; the number of chains of each kind)."""

    def change(chain: dict[str, Any]) -> tuple[int, float]:
        (was, low), (now, high) = rank(chain["rounds"][0]), rank(chain["rounds"][-1])
        return now - was, high - low

    orders: dict[str, Callable[[dict], Any]] = {
        "better": lambda chain: tuple(-value for value in change(chain)),
        "worse": change,
    }
    kinds = [kinds_of(chain) for chain in chains]
    chosen: dict[str, dict[str, Any]] = {}
    totals = {}
    for kind in KINDS:
        of_kind = [chain for chain, chain_kinds in zip(chains, kinds, strict=True) if kind in chain_kinds]
        totals[kind] = len(of_kind)
        clearest = orders.get(kind, lambda chain: chain["rounds"][-1]["score"])
        of_kind.sort(key=lambda chain: (clearest(chain), chain["prompt_id"]))
        turns: dict[str, int] = {}
        queue = []
        for place, chain in enumerate(of_kind):
            turns[chain["split"]] = turns.get(chain["split"], 0) + 1
            queue.append((turns[chain["split"]], place, chain))
        for _, _, chain in sorted(queue, key=lambda entry: entry[:2])[:PER_KIND]:
            chosen.setdefault(chain["prompt_id"], {**chain, "kinds": kinds_of(chain)})
    return list(chosen.values()), totals


def text_block(text: str) -> str:
    """A text as HTML; a long one is cut, and the page shows how much is missing."""
    rest = len(text) - MAX_SHOWN
    more = f'<span class="more"> \N{HORIZONTAL ELLIPSIS} {rest:,} more characters</span>' if rest > 0 else ""
    return f'<pre dir="auto">{escape(text[:MAX_SHOWN])}{more}</pre>' if text else '<p class="more">(empty)</p>'


def verdict(draft: dict[str, Any]) -> str:
    if draft["correct"] is None:
        return ""
    return ", right" if draft["correct"] == 1.0 else ", wrong"


def render_chain(chain: dict[str, Any], place: int, model: str) -> str:
    first, last, prompt = chain["rounds"][0], chain["rounds"][-1], chain["prompt"]
    tags = "".join(f'<span class="tag">{escape(KINDS[kind])}</span>' for kind in chain["kinds"])
    opening = " ".join(last_turn(prompt["prompt"])[:300].split())
    opening = opening if len(opening) <= 70 else opening[:69] + "\N{HORIZONTAL ELLIPSIS}"
    scores = f"{first['score']:.3f}{verdict(first)} \N{RIGHTWARDS ARROW} {last['score']:.3f}{verdict(last)}"
    parts = []
    for message in turns(prompt["prompt"]):
        label = "prompt" if isinstance(prompt["prompt"], str) else f"prompt: {message['role']}"
        parts += [f'<p class="label">{label}</p>', text_block(message["content"])]
    if prompt["answer"] is not None:
        parts += ['<p class="label">gold answer</p>', text_block(prompt["answer"])]
    before = None
    for number, draft in enumerate(chain["rounds"], start=1):
        notes = f"y{number}: score {draft['score']:.3f}{verdict(draft)}, {draft['num_tokens']} tokens"
        notes += ", cut by length" if draft["finish_reason"] == "length" else ""
        notes += ", same text as the round before" if draft["text"] == before else ""
        before = draft["text"]
        parts += [f'<p class="label">{escape(notes)}</p>', text_block(draft["text"])]
    summary = f"<b>{escape(scores)}</b> {tags}<span class='label'>{escape(model)}, {escape(chain['split'])}:</span> "
    classes = " ".join(["chain", f"m{place}", *chain["kinds"]])
    return f'<details class="{classes}"><summary>{summary}{escape(opening)}</summary>{"".join(parts)}</details>'


def render(collected: list[dict[str, Any]]) -> str:
    """The section with the chains, which the reader can filter by kind and model."""
    if not any(part["chains"] for part in collected):
        return ""

    def choice(group: str, title: str, options: dict[str, str]) -> str:
        buttons = "".join(
            f'<label><input type="radio" name="{group}" id="{group}-{value}"{" checked" if value == "all" else ""}> '
            f"{escape(text)}</label>"
            for value, text in {"all": "all", **options}.items()
        )
        return f"<fieldset><legend>{escape(title)}</legend>{buttons}</fieldset>"

    totals = {kind: sum(part["totals"][kind] for part in collected) for kind in KINDS}
    by_kind = choice("kind", "Kind", {kind: f"{title} ({totals[kind]:,})" for kind, title in KINDS.items() if totals[kind]})
    by_model = choice("model", "Model", {f"m{place}": part["model"] for place, part in enumerate(collected)})
    chains = "".join(
        render_chain(chain, place, part["model"]) for place, part in enumerate(collected) for chain in part["chains"]
    )
    sizes = " and ".join(f"{part['num_chains']:,} chains of {part['model']}" for part in collected)
    text = (
        f"Example chains on held-out prompts, from {sizes}: at most {PER_KIND} of each kind and model, the clearest first. "
        "A number in parentheses counts all chains of that kind. Open a chain to read its prompt and all its rounds."
    )
    return section(
        "chains", "Chains", text, f'<div class="chains">{by_kind}{by_model if len(collected) > 1 else ""}{chains}</div>'
    )
