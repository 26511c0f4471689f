"""The selection `reflections`: critiques of wrong drafts, judged by the revisions that used them (ReflectEvo, 2505.16475)."""

from dataclasses import dataclass

from evolve_ray.config.option import option
from evolve_ray.config.options import Selection
from evolve_ray.select.pairs import CUT, Selected, make_turn, may_be_chosen, reject_draft


@dataclass(frozen=True)
class ReflectionsArgs:
    """Options of `reflections`, `[selection.args]`."""

    form: str = option(
        "`pairs`: a critique whose revision is right over one of the same draft whose revision is wrong; `alone`: each critique "
        "whose revision is right, and that revision, for objective `sft`",
        "pairs",
        choices=("pairs", "alone"),
    )
    right: float = option("smallest value of the verifier (without one: score) that counts as right", 1.0)


def reflections(prompt: dict, drafts: list[dict], options: Selection, others: list[dict], args: ReflectionsArgs) -> Selected:
    """Up to `options.max_pairs` rows for each wrong draft; the texts of a pair differ, and no critique is in two pairs.

    A critique belongs to its revision by sample and round. One without a value for its revision is in no row.
    """
    value = {d["draft_id"]: d["score"] if d.get("correct") is None else d["correct"] for d in drafts}
    revision = {(d["parent_id"], d["sample"], d["round"]): d for d in drafts}
    reasons: dict[str, str] = {}
    rows: list[dict] = []
    for draft in sorted(drafts, key=lambda d: d["draft_id"]):
        usable: list[tuple[dict, dict]] = []  # a critique that may be chosen, and its revision
        worse: list[dict] = []
        for remark in sorted((d for d in others if d["parent_id"] == draft["draft_id"]), key=lambda d: d["draft_id"]):
            after = revision.get((draft["draft_id"], remark["sample"], remark["round"]))
            if remark["kind"] != "critique" or after is None or None in (value[after["draft_id"]], value[draft["draft_id"]]):
                reasons[remark["draft_id"]] = "is no critique with a draft and a revision that have a value"
            elif value[draft["draft_id"]] >= args.right:
                reasons[remark["draft_id"]] = "its draft is right"
            elif remark["text"] in [one["text"] for one in [*worse, *(better for better, _ in usable)]]:
                reasons[remark["draft_id"]] = "has the same text as another critique of the draft"
            elif value[after["draft_id"]] < args.right:
                worse.append(remark)
            elif may_be_chosen(remark, options):
                usable.append((remark, after))
            else:
                reasons[remark["draft_id"]] = CUT
        if args.form == "pairs":
            rows += [make_turn(prompt, r, rejected=w) for (r, _), w in zip(usable[: options.max_pairs], worse, strict=False)]
        else:
            turns = [turn for both in usable[: options.max_pairs] for turn in both if may_be_chosen(turn, options)]
            rows += [make_turn(prompt, turn) for turn in turns]
    used = {row[f"{side}_id"] for row in rows for side in ("chosen", "rejected")}
    unused = sorted((d for d in [*drafts, *others] if d["draft_id"] not in used), key=lambda d: d["draft_id"])
    default = {"answer": "is not trained itself", "critique": "no critique of the draft with another outcome is left"}
    return rows, [reject_draft(prompt, d, reasons.get(d["draft_id"], default.get(d["kind"], "is no critique"))) for d in unused]
