"""The selection `accepted`: a row for each draft that is good enough, to be trained alone (rejection sampling, then SFT)."""

import re
from dataclasses import dataclass

from evolve_ray.config.option import option
from evolve_ray.config.options import Selection
from evolve_ray.select.pairs import CUT, Selected, make_pair, may_be_chosen, reject_draft


@dataclass(frozen=True)
class AcceptedArgs:
    """Options of `accepted`, `[selection.args]`."""

    floor: float = option("smallest score of a kept draft", 1.0)
    keep: str = option("`all` drafts above the floor, or of these the `best`: one answer, that with the highest score", "all",
                       choices=("all", "best"))  # fmt: skip
    pattern: str = option(
        "for `best`: regular expression whose last match (the first group, if it has one) is the answer; empty: the whole text",
        "",
    )


def accepted(prompt: dict, drafts: list[dict], options: Selection, args: AcceptedArgs) -> Selected:
    """A row for each kept draft, chosen and rejected in one, for `objective = "sft"` with `refine_weight = 0`.

    STaR, RFT and Think-Prune-Train (arXiv 2504.18116) keep what is right; LMSI (2210.11610) the `best` by the scorer `vote`. Of
    drafts with the same text the one with the smallest id is kept; of several answers with the highest score, the one of the
    smallest id.
    """
    rows: dict[str, dict] = {}
    unused: list[dict] = []
    ordered = sorted(drafts, key=lambda draft: draft["draft_id"])
    fine = [draft for draft in ordered if draft["score"] is not None and draft["score"] >= args.floor]
    best = max(fine, key=lambda draft: draft["score"], default=None)  # of equal ones the smallest id
    for draft in ordered:
        if draft["score"] is None:
            reason = "has no finite score"
        elif draft["score"] < args.floor:
            reason = f"its score is below selection.args.floor ({args.floor:g})"
        elif args.keep == "best" and best and answer_of(draft, args.pattern) != answer_of(best, args.pattern):
            reason = "gives another answer than the one with the highest score"
        elif not may_be_chosen(draft, options):
            reason = CUT
        elif draft["text"] in rows:
            reason = f"has the same text as draft {rows[draft['text']]['chosen_id']}"
        else:
            rows[draft["text"]] = make_pair(prompt, draft, draft)
            continue
        unused.append(reject_draft(prompt, draft, reason))
    return list(rows.values()), unused


def answer_of(draft: dict, pattern: str) -> str:
    """The answer in a draft; its whole text without a pattern, or where nothing matches."""
    matches = list(re.finditer(pattern, draft["text"])) if pattern else []
    return (matches[-1][1] if matches[-1].re.groups else matches[-1][0]) if matches else draft["text"].strip()
