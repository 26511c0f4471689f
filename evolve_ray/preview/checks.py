"""Checks of what usually goes wrong: the chat template, the verifier on the gold answers, the scorer on known answers."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.config.options import Config
from evolve_ray.preview.tokens import decode
from evolve_ray.score.protocol import call_scorer
from evolve_ray.score.verifiers import build_verifier
from evolve_ray.store.turns import Message, assistant, system, user

VERIFIER_SECONDS = 5.0  # for the gold answers: a verifier of mathematics takes milliseconds for each
BATCH = 50
SHOWN = 3


def template_warnings(chat: Any, *, systems: bool) -> list[str]:
    """What a chat template does that a user may not expect; `systems`: whether a prompt of the data has a system prompt."""
    tokenizer, warnings = chat.tokenizer, []
    ids = chat.context_ids((user("question"),))
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        warnings.append(
            f"two begin tokens: a prompt begins with {tokenizer.bos_token!r} twice; remove one from the chat template"
        )
    plain = tokenizer("question")["input_ids"]
    if bos is not None and bos not in ids and plain[:1] == [bos]:
        warnings.append(
            f"no begin token: the tokenizer puts {tokenizer.bos_token!r} before a text, but the chat template does not write it"
        )
    answered = chat.context_ids((user("question"), assistant("answer")), generate=False)
    if chat.end_id not in answered[len(ids) :]:
        warnings.append(
            f"no end token: the chat template writes none after an answer; {decode(chat, [chat.end_id])!r} is trained as the end"
        )

    def rendered(*messages: Message) -> str:
        return decode(chat, chat.context_ids(messages))

    draft = rendered(user("question"), assistant("  first line\n  last line  "), user("again"))
    if "  first line\n  last line  " not in draft and "first line\n  last line" in draft:
        warnings.append(
            "the chat template trims: a draft is shown without the white space around it, but trained as it was written"
        )
    thought = rendered(user("question"), assistant("<think>before</think>after"), user("again"))
    if chat.thinking is None and "before" not in thought and "after" in thought:
        warnings.append(
            "the chat template cuts `<think>` text out of earlier turns, but [thinking] takes a response for all answer: the "
            "next round does not see what is scored"
        )
    if systems and "polite words" not in rendered(system("polite words"), user("question")):
        warnings.append("the chat template does not write system prompts, but prompts of the data have one")
    if "strftime_now" in str(tokenizer.chat_template):
        warnings.append("the chat template writes the date: a run keeps the day on which it began, another run has another day")
    return warnings


def check_verifier(config: Config, prompts: list[dict], wrong: Callable[[int], str | None]) -> tuple[dict[str, Any], list[str]]:
    """(counts, warnings) of the verifier on each gold answer, which must be right, and on `wrong` answers, which must not be."""
    assert config.verifier is not None
    verifier = build_verifier(config.verifier)
    started = time.monotonic()
    counts: dict[str, Any] = {
        "num_answers": len(prompts),
        "num_checked": 0,
        "num_gold_right": 0,
        "num_wrong": 0,
        "num_wrong_right": 0,
    }
    warnings: list[str] = []
    not_right: list[str] = []
    for first in range(0, len(prompts), BATCH):
        if time.monotonic() - started > VERIFIER_SECONDS:
            break
        batch = prompts[first : first + BATCH]
        questions, golds = [row["prompt"] for row in batch], [row["answer"] for row in batch]
        values = call_scorer("verifier", verifier, questions, golds, golds)
        counts["num_checked"] += len(batch)
        counts["num_gold_right"] += sum(value == 1.0 for value in values)
        not_right += [f"{row['file']}:{row['line']}" for row, value in zip(batch, values, strict=True) if value != 1.0]
        pairs = [(row, other) for number, row in enumerate(batch, start=first) if (other := wrong(number)) is not None]
        if pairs:
            others = [other for _, other in pairs]
            values = call_scorer("verifier", verifier, [r["prompt"] for r, _ in pairs], [r["answer"] for r, _ in pairs], others)
            counts["num_wrong"] += len(pairs)
            counts["num_wrong_right"] += sum(value == 1.0 for value in values)
    if not_right:
        warnings.append(
            f"verifier {config.verifier.name}: {len(not_right)} of {counts['num_checked']} gold answers are not right by its own "
            f"measure: {', '.join(not_right[:SHOWN])}"
        )
    if counts["num_wrong_right"]:
        warnings.append(
            f"verifier {config.verifier.name}: takes {counts['num_wrong_right']} of {counts['num_wrong']} gold answers of other "
            "prompts for right"
        )
    return counts, warnings


def other_answer(prompts: list[dict]) -> Callable[[int], str | None]:
    """A function that returns, for the number of a prompt, the gold answer of another prompt that differs from its own."""
    golds = list(dict.fromkeys(row["answer"] for row in prompts))
    place = {answer: number for number, answer in enumerate(golds)}

    def wrong(number: int) -> str | None:
        return golds[(place[prompts[number]["answer"]] + 1) % len(golds)] if len(golds) > 1 else None

    return wrong


def check_scorer(
    config: Config, reward_models: dict[str, Path], pairs: list[dict], day: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """(scores, warnings) of the recipe's scorer on the chosen and the rejected answer of some pairs; `day` as in RewardModel."""
    from evolve_ray.score.combined import build_scorer

    verifier = build_verifier(config.verifier) if config.verifier else None
    scorer = build_scorer(
        config.scorer, {name: str(folder) for name, folder in reward_models.items()}, verifier, day, config.verifier
    )
    prompts, answers = [pair["prompt"] for pair in pairs], [pair.get("answer") for pair in pairs]
    name = f"scorer {config.scorer.name}"
    sides = {side: call_scorer(name, scorer, prompts, answers, [pair[side] for pair in pairs]) for side in ("chosen", "rejected")}
    scores = [{"chosen": float(c), "rejected": float(r)} for c, r in zip(sides["chosen"], sides["rejected"], strict=True)]
    wrong_way = sum(not row["chosen"] > row["rejected"] for row in scores)
    warnings = [f"{name}: does not prefer the chosen answer in {wrong_way} of {len(scores)} pairs"] if wrong_way else []
    return scores, warnings
