"""Refinement strategies: what the model is asked, in which order, and which earlier drafts an ask contains.

A strategy is a plain generator. It yields one `Ask` (or a list) and receives one `Draft` (or a list), or it yields another
request of `asks.py`, for example a `Judge`, and receives scores. At the end it returns all drafts of its prompt. It knows no
engine, so a list of answers is enough to test it. No two drafts of a prompt have the same (sample, round, kind).
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from evolve_ray.config.option import option
from evolve_ray.config.plugs import is_own
from evolve_ray.refine.asks import Ask, Draft, Given, Judge, Score, Skip, Strategy, Verify
from evolve_ray.refine.ratings import mean, read_rating
from evolve_ray.refine.template import Template
from evolve_ray.store.turns import Prompt


def chain(prompt: Prompt, template: Template, options: Any) -> Strategy:
    """`rounds` drafts, each a refinement of the draft before (the paper's choice).

    `stop_unchanged` and `stop_right` may end it earlier.
    """
    draft = yield Ask(template.direct(prompt), sample=0, round=1)
    drafts = [draft]
    for number in range(2, options.rounds + 1):
        if reason := (yield from stop_reason(drafts, options)):
            yield Skip(draft, tuple(range(number, options.rounds + 1)), reason)
            break
        draft = yield Ask(template.refinement(prompt, draft.text), sample=0, round=number, parent_id=draft.draft_id)
        drafts.append(draft)
    return drafts


def stop_reason(drafts: list[Draft], options: Any) -> Generator[Verify, Any, str]:
    """Why a chain needs no further round; "" if it needs one. A chain never stops at a draft that was cut by length."""
    last = drafts[-1]
    if last.finish_reason != "stop":
        return ""
    if options.stop_unchanged and len(drafts) > 1 and last.text == drafts[-2].text:
        return "unchanged"
    if options.stop_right and (yield Verify(last)) == 1.0:
        return "right"
    return ""


def parallel(prompt: Prompt, template: Template, options: Any) -> Strategy:
    """`samples` independent drafts, each from the prompt alone."""
    drafts = yield [Ask(template.direct(prompt), sample=number, round=1) for number in range(options.samples)]
    return drafts


def chains(prompt: Prompt, template: Template, options: Any) -> Strategy:
    """`samples` independent chains of `rounds` drafts: a group of answers in each round, for advantages."""
    batch = yield [Ask(template.direct(prompt), sample, round=1) for sample in range(options.samples)]
    drafts = list(batch)
    for number in range(2, options.rounds + 1):
        asks = [Ask(template.refinement(prompt, draft.text), draft.sample, number, draft.draft_id) for draft in batch]
        batch = yield asks
        drafts += batch
    return drafts


def few_shot(prompt: Prompt, template: Template, options: Any) -> Strategy:
    """Each ask after round 1 contains up to `shots` earlier drafts: the latest, or those with the best scores.

    The latest or best of them stands last.
    """
    draft = yield Ask(template.direct(prompt), sample=0, round=1)
    drafts, scores = [draft], {}
    for number in range(2, options.rounds + 1):
        shown = drafts
        if options.show == "best":
            (scores[draft.draft_id],) = yield Judge((draft,))
            shown = sorted(drafts, key=lambda draft: (scores[draft.draft_id], draft.round))
        shown = shown[-options.shots :]
        messages = template.after_several(prompt, [draft.text for draft in shown])
        draft = yield Ask(messages, sample=0, round=number, parent_id=shown[-1].draft_id)
        drafts.append(draft)
    return drafts


def critique(prompt: Prompt, template: Template, options: Any) -> Strategy:
    """Each round after the first asks for a critique of the draft, then for a better draft that uses the critique.

    With several `critiques` of the first draft each has a revision of its own, the sample of the same number; from then on each
    sample is a chain.
    """
    draft = yield Ask(template.direct(prompt), sample=0, round=1)
    drafts, lines = [draft], [draft] * options.critiques
    for number in range(2, options.rounds + 1):
        asks = [
            Ask(template.critical(prompt, before.text), sample, number, parent_id=before.draft_id, kind="critique")
            for sample, before in enumerate(lines)
        ]
        remarks = yield asks
        lines = yield [
            Ask(template.revision(prompt, before.text, remark.text), sample, number, parent_id=before.draft_id)
            for sample, (before, remark) in enumerate(zip(lines, remarks, strict=True))
        ]
        drafts += [*remarks, *lines]
    return drafts


def best_of(prompt: Prompt, template: Template, options: Any) -> Strategy:
    """`samples` drafts in each round. The next round refines the one with the highest score; of equal ones the first sample."""
    best: Draft | None = None
    drafts: list[Draft] = []
    for number in range(1, options.rounds + 1):
        messages = template.refinement(prompt, best.text) if best else template.direct(prompt)
        parent = best.draft_id if best else None
        batch = yield [Ask(messages, sample, number, parent_id=parent) for sample in range(options.samples)]
        drafts += batch
        if number < options.rounds:
            scores = yield Judge(tuple(batch))
            best = batch[max(range(len(batch)), key=lambda sample: (scores[sample], -sample))]
    return drafts


def feedback(prompt: Prompt, template: Template, options: Any) -> Strategy:
    """A chain in which each ask shows what the verifier says about the draft, for example a failed test; it ends at 1.0."""
    draft = yield Ask(template.direct(prompt), sample=0, round=1)
    drafts = [draft]
    for number in range(2, options.rounds + 1):
        verdict = yield Verify(draft)
        if verdict == 1.0:
            yield Skip(draft, tuple(range(number, options.rounds + 1)), "right")
            break
        messages = template.after_feedback(prompt, draft.text, verdict.text)
        draft = yield Ask(messages, sample=0, round=number, parent_id=draft.draft_id)
        drafts.append(draft)
    return drafts


@dataclass(frozen=True)
class SelfJudgeArgs:
    """Options of `self_judge`, `[strategy.args]`."""

    votes: int = option("ratings that the model writes of each draft; the score is the mean of those that can be read", 3, low=1)
    low: float = option("the worst rating", 1.0)
    high: float = option("the best rating", 10.0)
    temperature: float = option("sampling temperature of the ratings", 1.0, low=0.0)
    max_tokens: int = option("longest rating; 0: as long as an answer", 0, unit="tokens", low=0)


def self_judge(prompt: Prompt, template: Template, options: Any, args: SelfJudgeArgs) -> Strategy:
    """`samples` independent drafts, each rated `votes` times by the model itself (Self-Rewarding, arXiv 2401.10020).

    A draft without a readable rating gets no score.
    """
    drafts = yield [Ask(template.direct(prompt), sample=number, round=1) for number in range(options.samples)]
    asks = []
    for draft in drafts:
        messages = template.judgement(prompt, draft.text, args.low, args.high)
        ask = Ask(messages, draft.sample, 1, draft.draft_id, "verdict", args.temperature, args.max_tokens or None)
        asks += [ask] * args.votes
    verdicts = yield asks
    for number, draft in enumerate(drafts):
        replies = verdicts[number * args.votes : (number + 1) * args.votes]
        rating = mean([read_rating(reply.text, args.low, args.high) for reply in replies])
        if math.isfinite(rating):
            yield Score(draft, rating)
    return [*drafts, *verdicts]


def gives_scores(options: Any) -> bool:
    """Whether a strategy may score its drafts itself. A strategy from outside this package may."""
    return options.name == "self_judge" or is_own(options.name)


def asks_verifier(options: Any) -> bool:
    """Whether a strategy may ask the verifier while it generates. A strategy from outside this package may."""
    return options.stop_right or options.name == "feedback" or is_own(options.name)


def drafts_per_prompt(options: Any) -> int:
    """The number of answers that a shipped strategy asks for on one prompt."""
    counts = {
        "parallel": options.samples,
        "self_judge": options.samples,
        "best_of": options.samples * options.rounds,
        "chains": options.samples * options.rounds,
        "critique": 1 + options.critiques * (options.rounds - 1),
    }
    return counts.get(options.name, options.rounds)


def responses_per_prompt(options: Any) -> int:
    """The number of answers, critiques and verdicts together: the requests to the engine for one prompt."""
    if options.name == "self_judge":
        return options.samples * (1 + options.args.get("votes", SelfJudgeArgs().votes))
    return drafts_per_prompt(options) + (options.critiques * (options.rounds - 1) if options.name == "critique" else 0)


def asks_scorer(options: Any) -> bool:
    """Whether a strategy may ask the scorer while it generates. A strategy from outside this package may."""
    return options.name == "best_of" or (options.name == "few_shot" and options.show == "best") or is_own(options.name)


def asks_models(options: Any) -> bool:
    """Whether a strategy may ask further models: one from outside this package may."""
    return is_own(options.name)


def refine_given(prompt: Prompt, template: Template, options: Any) -> Strategy:
    """A chain whose first draft comes with the prompt, not from the model."""
    draft = yield Given()
    drafts = [draft]
    for number in range(2, options.rounds + 1):
        draft = yield Ask(template.refinement(prompt, draft.text), sample=0, round=number, parent_id=draft.draft_id)
        drafts.append(draft)
    return drafts


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "chain": chain,
    "parallel": parallel,
    "chains": chains,
    "few_shot": few_shot,
    "critique": critique,
    "best_of": best_of,
    "feedback": feedback,
    "self_judge": self_judge,
}

# The strategy of jobs/evaluate.py for given drafts. Stage keys of committed evaluations contain this name, so it must not change,
# although the function has moved to this file.
REFINE_GIVEN = "evolve_ray.probes:refine_given"
ALL_STRATEGIES = STRATEGIES | {REFINE_GIVEN: refine_given}
