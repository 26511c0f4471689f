"""The selection `tiers`: the shortest of the best drafts over the longest of the worst, so that length wins nothing."""

import dataclasses
from dataclasses import dataclass

from evolve_ray.config.option import option
from evolve_ray.config.options import Selection
from evolve_ray.select.pairs import Selected, margin_fault, may_be_chosen, take_pairs, unscored_reasons


@dataclass(frozen=True)
class TierArgs:
    """Options of `tiers`, `[selection.args]`."""

    rho: float = option("width of the best and of the worst tier, as a share of the range of a prompt's scores", 0.1, low=0.0,
                        high=0.5)  # fmt: skip


def tiers(prompt: dict, drafts: list[dict], options: Selection, args: TierArgs) -> Selected:
    """One pair: the shortest draft of the best tier over the longest of the worst (Meta-Rewarding, arXiv 2407.19594).

    With the highest score S and the lowest s, the best tier is [(1 - rho) S + rho s, S], the worst [s, (1 - rho) s + rho S]. The
    scores of a pair differ by more than `options.margin`. Lengths are those of the texts.
    """
    scored = sorted((draft for draft in drafts if draft["score"] is not None), key=lambda draft: draft["draft_id"])
    free = [draft for draft in scored if may_be_chosen(draft, options)]
    reasons = unscored_reasons(drafts)
    candidates = []
    if free:
        low, high = min(draft["score"] for draft in scored), max(draft["score"] for draft in free)
        width = args.rho * (high - low)
        best = min((draft for draft in free if draft["score"] >= high - width), key=lambda draft: len(draft["text"]))
        worst = max((draft for draft in scored if draft["score"] <= low + width), key=lambda draft: len(draft["text"]))
        candidates = [(best, worst, margin_fault(best, worst, options))]
    one = dataclasses.replace(options, max_pairs=1)
    default = "neither the shortest of the best tier nor the longest of the worst"
    return take_pairs(prompt, drafts, candidates, reasons, one, disjoint=True, default=default)
