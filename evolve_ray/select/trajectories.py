"""The selection `trajectories`: whole lines of turns over others, by the scores of their last answers, for `turns_dpo`."""

from collections import defaultdict
from dataclasses import dataclass

from evolve_ray.config.option import option
from evolve_ray.config.options import Selection
from evolve_ray.select.pairs import Selected, make_turn, margin_fault, may_be_chosen, rank, reject_draft


@dataclass(frozen=True)
class TrajectoriesArgs:
    """Options of `trajectories`, `[selection.args]`."""

    turns: int = option("longest trajectory, as in the objective's `turns`; a longer one is in no row", 2, low=1)


def trajectories(prompt: dict, drafts: list[dict], options: Selection, others: list[dict], args: TrajectoriesArgs) -> Selected:
    """Up to `options.max_pairs` rows, the best trajectory over the worst, disjoint; their last answers' scores differ by more
    than `options.margin`.

    A trajectory is all responses of one sample, in order. A row begins where two of them answer the same messages: what both
    have before that is context. Its further turns are `chosen_2`, `rejected_2`, ...
    """
    lines: dict[int, list[dict]] = defaultdict(list)
    for turn in sorted([*drafts, *others], key=lambda d: (d["round"], d["kind"] == "answer", d["draft_id"])):
        lines[turn["sample"]].append(turn)
    finals = [(answers[-1], line) for line in lines.values() if (answers := [turn for turn in line if turn["kind"] == "answer"])]
    scored = sorted((both for both in finals if both[0]["score"] is not None), key=lambda both: rank(both[0]))
    rows: dict[str, dict] = {}
    used: set[str] = set()
    for final, best in scored:
        for other, worst in reversed(scored):
            free = best is not worst and used.isdisjoint((best[-1]["draft_id"], worst[-1]["draft_id"]))
            if not free or margin_fault(final, other, options) or not all(may_be_chosen(turn, options) for turn in best):
                continue
            better, worse = from_same_messages(best, worst)
            differ = [turn["text"] for turn in better] != [turn["text"] for turn in worse]
            if better and differ and max(len(better), len(worse)) <= args.turns and len(rows) < options.max_pairs:
                further = {
                    f"{side}_{number}": line[number - 1] if number <= len(line) else None
                    for number in range(2, args.turns + 1)
                    for side, line in (("chosen", better), ("rejected", worse))
                }
                row = make_turn(prompt, better[0], rejected=worse[0], turns=further)
                if row["pair_id"] not in rows:
                    rows[row["pair_id"]] = row
                    used |= {turn["draft_id"] for turn in (*better, *worse)}
    unused = sorted((d for d in [*drafts, *others] if d["draft_id"] not in used), key=lambda d: d["draft_id"])
    why = "its trajectory is neither among the best nor among the worst, or it is context"
    return list(rows.values()), [reject_draft(prompt, draft, why) for draft in unused]


def from_same_messages(best: list[dict], worst: list[dict]) -> tuple[list[dict], list[dict]]:
    """The two lines from the first place on at which they answer the same messages; empty if there is none."""
    places = [(i, j) for i in range(len(best)) for j in range(len(worst)) if best[i]["messages"] == worst[j]["messages"]]
    i, j = min(places, key=sum, default=(len(best), len(worst)))
    return best[i:], worst[j:]
