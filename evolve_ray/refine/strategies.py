"""Refinement strategies: what the model is asked, in which order, and which earlier drafts an ask contains.

A strategy is a plain generator. It yields one `Ask` (or a list) and receives one `Draft` (or a list), or it yields another
request of `asks.py`, for example a `Judge`, and receives scores. At the end it returns all drafts of its prompt. It knows no
engine, so a list of answers is enough to test it. No two drafts of a prompt have the same (sample, round, kind).
"""

from collections.abc import Callable, Generator
from typing import Any

from evolve_ray.refine.asks import Ask, Draft, Given, Judge, Skip, Strategy, Verify
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
    """Each round after the first asks for a critique of the draft, then for a better draft that uses the critique."""
    draft = yield Ask(template.direct(prompt), sample=0, round=1)
    drafts = [draft]
    for number in range(2, options.rounds + 1):
        parent_id = draft.draft_id
        remarks = yield Ask(template.critical(prompt, draft.text), 0, number, parent_id=parent_id, kind="critique")
        draft = yield Ask(template.revision(prompt, draft.text, remarks.text), 0, number, parent_id=parent_id)
        drafts += [remarks, draft]
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


def drafts_per_prompt(options: Any) -> int:
    """The number of answers that a shipped strategy asks for on one prompt."""
    return {"parallel": options.samples, "best_of": options.samples * options.rounds}.get(options.name, options.rounds)


def responses_per_prompt(options: Any) -> int:
    """The number of answers and critiques together: the requests to the engine for one prompt."""
    return drafts_per_prompt(options) + (options.rounds - 1 if options.name == "critique" else 0)


def asks_scorer(options: Any) -> bool:
    """Whether a strategy may ask the scorer while it generates. A strategy from outside this package may."""
    is_plug = ":" in options.name and not options.name.startswith("evolve_ray.")
    return options.name == "best_of" or (options.name == "few_shot" and options.show == "best") or is_plug


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
    "few_shot": few_shot,
    "critique": critique,
    "best_of": best_of,
}

# The strategy of jobs/evaluate.py for given drafts. Stage keys of committed evaluations contain this name, so it must not change,
# although the function has moved to this file.
REFINE_GIVEN = "evolve_ray.probes:refine_given"
ALL_STRATEGIES = STRATEGIES | {REFINE_GIVEN: refine_given}
