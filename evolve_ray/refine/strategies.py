"""Refinement strategies: who is asked what, in which order, with which drafts in view.

A strategy is a plain generator: it yields one `Ask` (or a list of them) and receives one `Draft` (or a list), or yields a
`Judge` and receives scores; at the end it returns all drafts of its prompt. It knows no engine: a list of answers is enough
to test it. Drafts of one prompt differ in (sample, round, kind).
"""

from collections.abc import Callable, Generator
from typing import Any

from evolve_ray.refine.asks import Ask, Draft, Given, Judge, Skip, Strategy, Verify
from evolve_ray.refine.template import Template


def chain(prompt: str, template: Template, options: Any) -> Strategy:
    """`rounds` drafts, each a refinement of the one before (the paper's choice); fewer where `stop_...` ends it early."""
    draft = yield Ask(template.direct(prompt), sample=0, round=1)
    drafts = [draft]
    for number in range(2, options.rounds + 1):
        if reason := (yield from end_of(drafts, options)):
            yield Skip(draft, tuple(range(number, options.rounds + 1)), reason)
            break
        draft = yield Ask(template.refinement(prompt, draft.text), sample=0, round=number, parent_id=draft.draft_id)
        drafts.append(draft)
    return drafts


def end_of(drafts: list[Draft], options: Any) -> Generator[Verify, Any, str]:
    """Why a chain needs no further round, "" where it does. A draft that was cut by length is never the end."""
    last = drafts[-1]
    if last.finish_reason != "stop":
        return ""
    if options.stop_unchanged and len(drafts) > 1 and last.text == drafts[-2].text:
        return "unchanged"
    if options.stop_right and (yield Verify(last)) == 1.0:
        return "right"
    return ""


def parallel(prompt: str, template: Template, options: Any) -> Strategy:
    """`samples` independent drafts from the prompt alone."""
    drafts = yield [Ask(template.direct(prompt), sample=number, round=1) for number in range(options.samples)]
    return drafts


def few_shot(prompt: str, template: Template, options: Any) -> Strategy:
    """Each round refines with the last or the best `shots` earlier drafts in view, the latest or best of them last."""
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


def critique(prompt: str, template: Template, options: Any) -> Strategy:
    """Each round first asks what is wrong with the draft, then for a better one in the light of that critique."""
    draft = yield Ask(template.direct(prompt), sample=0, round=1)
    drafts = [draft]
    for number in range(2, options.rounds + 1):
        before = draft.draft_id
        found = yield Ask(template.critical(prompt, draft.text), 0, number, parent_id=before, kind="critique")
        draft = yield Ask(template.revision(prompt, draft.text, found.text), 0, number, parent_id=before)
        drafts += [found, draft]
    return drafts


def best_of(prompt: str, template: Template, options: Any) -> Strategy:
    """`samples` drafts in each round; the one that the scorer puts first goes on (of equal ones the earliest sample)."""
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
    """How many answers a shipped strategy makes."""
    return {"parallel": options.samples, "best_of": options.samples * options.rounds}.get(options.name, options.rounds)


def responses_per_prompt(options: Any) -> int:
    """Answers and critiques together: how many requests a prompt costs the engine."""
    return drafts_per_prompt(options) + (options.rounds - 1 if options.name == "critique" else 0)


def asks_scorer(options: Any) -> bool:
    """Whether a strategy may ask the scorer in between; one that is not of this package may."""
    plugged = ":" in options.name and not options.name.startswith("evolve_ray.")
    return options.name == "best_of" or (options.name == "few_shot" and options.show == "best") or plugged


def refine_given(prompt: str, template: Template, options: Any) -> Strategy:
    """A chain whose first draft is not the model's own: it comes with the prompt."""
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

# What jobs/evaluate.py asks with. The keys of committed evaluations hold this name, so it stays whatever file the function is in.
REFINE_GIVEN = "evolve_ray.probes:refine_given"
KNOWN = STRATEGIES | {REFINE_GIVEN: refine_given}
