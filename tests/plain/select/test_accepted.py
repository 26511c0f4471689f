"""Drafts that are good enough become rows of their own; what is left out has a reason."""

import itertools

from evolve_ray.config.options import Selection
from evolve_ray.select.accepted import AcceptedArgs, accepted
from evolve_ray.select.check import check_selected

PROMPT = {"prompt_id": "p", "prompt": "q", "file": "f", "line": 1}


def draft(number, text, score, finish="stop"):
    place = {"draft_id": f"d{number}", "parent_id": None, "sample": number, "round": 1}
    return {**place, "text": text, "finish_reason": finish, "score": score}


def select(drafts, *, allow_cut=False, **args):
    options = Selection(allow_cut=allow_cut)
    results = [accepted(PROMPT, list(order), options, AcceptedArgs(**args)) for order in itertools.permutations(drafts)]
    assert all(result == results[0] for result in results), "the order of the drafts must not matter"
    check_selected("accepted", PROMPT, drafts, results[0])
    rows, unused = results[0]
    assert all(row["chosen_id"] == row["rejected_id"] for row in rows)
    return [row["chosen_id"] for row in rows], {row["id"]: row["reason"] for row in unused}


def test_right_distinct_drafts_are_rows():
    drafts = [draft(1, "A", 1.0), draft(2, "A", 1.0), draft(3, "B", 1.0), draft(4, "C", 0.0)]
    assert select(drafts) == (
        ["d1", "d3"],
        {"d2": "has the same text as draft d1", "d4": "its score is below selection.args.floor (1)"},
    )


def test_all_drafts_of_the_largest_vote_are_rows():
    drafts = [draft(n, f"{n}: {answer}", share) for n, answer, share in ((1, 7, 0.75), (2, 7, 0.75), (3, 3, 0.25), (4, 7, 0.75))]
    rows, unused = select(drafts, floor=0.0, keep="best", pattern=r"\d+$")
    assert (rows, unused) == (["d1", "d2", "d4"], {"d3": "gives another answer than the one with the highest score"})


def test_of_a_tie_the_group_with_the_smaller_id_is_kept():
    drafts = [draft(n, f"{n}: {answer}", 0.5) for n, answer in ((1, 3), (2, 7), (3, 7), (4, 3))]
    assert select(drafts, floor=0.0, keep="best", pattern=r": (\d+)")[0] == ["d1", "d4"]


def test_a_cut_draft_and_one_without_a_score_are_no_rows():
    drafts = [draft(1, "A", 1.0, "length"), draft(2, "B", None)]
    assert select(drafts) == ([], {"d1": "cut by length: cannot be chosen", "d2": "has no finite score"})
    assert select(drafts, allow_cut=True)[0] == ["d1"]
