"""ReflectEvo's pairs by hand: what is reflected on, which reflection is better, and in which context it stands."""

import random

import pytest

from evolve_ray.config.options import Selection
from evolve_ray.select.check import check_selected
from evolve_ray.select.reflections import ReflectionsArgs, reflections

PROMPT = {"prompt_id": "p", "prompt": "sort:hbca", "file": "f", "line": 1}
ASKED = [{"role": "user", "content": "sort:hbca"}, {"role": "assistant", "content": "y1"}, {"role": "user", "content": "check"}]


def draft(name, score, round=1, sample=0, kind="answer", finish="stop", text=None):
    messages = {
        "critique": ASKED,
        "answer": ASKED[:1] if round == 1 else [*ASKED, {"role": "assistant", "content": f"r{sample}"}],
    }
    return {
        "draft_id": name, "parent_id": "y1" if round > 1 else None, "sample": sample, "round": round, "kind": kind,
        "text": text or name, "finish_reason": finish, "score": score, "correct": score, "messages": messages[kind],
    }  # fmt: skip


def drafts(first, *outcomes, **critique):
    """(answers, critiques) of one first draft and a reflection with its revision for each outcome."""
    answers = [draft("y1", first)] + [draft(f"y2{n}", value, 2, n) for n, value in enumerate(outcomes)]
    return answers, [draft(f"r{n}", None, 2, n, "critique", **critique) for n in range(len(outcomes))]


def run(answers, others, *, settings=None, **args):
    result = reflections(PROMPT, answers, Selection(name="reflections", **settings or {}), others, ReflectionsArgs(**args))
    check_selected("reflections", PROMPT, [*answers, *others], result)
    rows, rejected = result
    return rows, {row["id"]: row["reason"] for row in rejected}


def test_reflection_with_a_right_revision_is_chosen_over_one_with_a_wrong_one_after_the_critique_instruction():
    (row,), rejected = run(*drafts(0.5, 0.2, 1.0))
    assert (row["chosen"], row["rejected"], row["kind"], row["context"]) == ("r1", "r0", "critique", ASKED)
    assert set(rejected) == {"y1", "y20", "y21"}


def test_right_first_draft_gives_nothing():
    rows, rejected = run(*drafts(1.0, 0.2, 1.0))
    assert rows == []
    assert rejected["r0"] == rejected["r1"] == "its draft is right"


@pytest.mark.parametrize("outcomes", [(1.0, 1.0), (0.0, 0.5)])
def test_without_both_outcomes_there_is_no_pair(outcomes):
    rows, rejected = run(*drafts(0.0, *outcomes))
    assert (rows, rejected["r0"]) == ([], "no critique of the draft with another outcome is left")


def test_alone_each_right_reflection_and_its_revision_are_rows():
    rows, rejected = run(*drafts(0.0, 1.0, 0.0), form="alone")
    assert [(row["chosen"], row["rejected"], row.get("kind")) for row in rows] == [("r0", "r0", "critique"), ("y20", "y20", None)]
    assert rows[1]["context"][-1]["content"] == "r0"
    assert set(rejected) == {"y1", "y21", "r1"}


def test_pairs_are_disjoint_and_as_many_as_allowed():
    answers, others = drafts(0.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    assert [(row["chosen"], row["rejected"]) for row in run(answers, others, settings={"max_pairs": 5})[0]] == [
        ("r0", "r2"), ("r1", "r3"),
    ]  # fmt: skip
    assert len(run(answers, others)[0]) == 1


def test_equal_cut_and_unvalued_reflections_are_in_no_pair():
    assert run(*drafts(0.0, 1.0, 0.0, text="same"))[0] == []
    rows, rejected = run(*drafts(0.0, 1.0, 0.0, finish="length"))
    assert (rows, rejected["r0"]) == ([], "cut by length: cannot be chosen")
    rows, rejected = run(*drafts(0.0, None, 1.0))
    assert (rows, rejected["r0"]) == ([], "is no critique with a draft and a revision that have a value")


def test_what_is_right_may_be_less_than_exact():
    ((row,), _) = run(*drafts(0.4, 0.6, 0.3), right=0.5)
    assert row["chosen"] == "r0"


def test_the_order_of_the_drafts_changes_nothing():
    answers, others = drafts(0.0, 1.0, 0.0, 1.0, 0.0)
    expected = run(answers, others, settings={"max_pairs": 2})
    for seed in range(5):
        shuffled = [random.Random(seed).sample(part, len(part)) for part in (answers, others)]
        assert run(*shuffled, settings={"max_pairs": 2}) == expected
