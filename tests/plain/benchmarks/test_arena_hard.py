"""The figures of Arena-Hard: no order changes them, nothing is certain from few questions, no category is lost."""

import json
import random

import pytest

from evolve_ray.benchmarks import arena_hard
from evolve_ray.errors import UserError
from evolve_ray.store import rows
from tests.plain.benchmarks.examples import PROMPTS, arena, results, write_evaluation

LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A", None)


def question(first, second):
    return {"games": [{"score": first}, {"score": second}]}


def test_order_of_the_questions_changes_no_figure():
    judged = [question(first, second) for first in LABELS for second in LABELS]
    found = arena_hard.figures(judged)
    assert found["low"] < found["win_rate"] < found["high"]
    assert arena_hard.figures(random.Random(2).sample(judged, len(judged))) == found


def test_interval_is_over_questions_and_not_over_battles():
    """Four decisive wins are 24 battles; an interval over battles would be a point."""
    found = arena_hard.figures([question("B>>A", "A>>B")] * 4)
    assert (found["win_rate"], found["high"]) == (100.0, 100.0)
    assert found["low"] == pytest.approx(51.0, abs=0.1)
    # Questions that differ in nothing but how decisive they are.
    mild, decisive = (arena_hard.figures([question(*pair)] * 30 + [question(*pair[::-1])] * 30) for pair in LIKE)
    assert mild["high"] - mild["low"] == pytest.approx(decisive["high"] - decisive["low"])


LIKE = (("B>A", "B>A"), ("B>>A", "B>>A"))


def test_reference_with_two_answers_to_a_question_is_refused(tmp_path):
    answer = {"messages": [{"role": "assistant", "content": {"answer": "one"}}], "model": "base"}
    rows.write_jsonl(tmp_path / "b.jsonl", [{"uid": "u0", **answer}, {"uid": "u1", **answer}, {"uid": "u0", **answer}])
    with pytest.raises(UserError, match=r"b\.jsonl:3: uid u0 occurs twice in the file"):
        arena_hard.read_baseline(str(tmp_path / "b.jsonl"))


def test_category_without_any_answer_is_listed_and_not_lost(place, judge):
    write_evaluation(place / "lost", lambda prompt, number: f"{number}", lost={(4, 2), (5, 1)})
    (place / "evaluation").rename(place / "away")
    (place / "lost").rename(place / "evaluation")
    assert arena(place, judge) == 0
    found = [row for row in results(place) if row["category"] == "creative_writing"]
    assert [(row["round"], row["n"], row["win_rate"], row["num_missing"]) for row in found] == [(1, 0, None, 2), (2, 0, None, 2)]
    json.dumps(found, allow_nan=False)


def test_lines_of_the_reference_may_stand_in_any_order(place, judge):
    judge.decide = lambda messages: LABELS[int(messages[1]["content"].split("question ")[1][0]) % 5] and "[[A>B]]"
    assert arena(place, judge) == 0
    before, asked = results(place), len(judge.asked)
    for name in ("baseline", "question"):
        lines = rows.read_jsonl(place / f"{name}.jsonl")
        rows.write_jsonl(place / f"{name}.jsonl", lines[::-1])
    assert arena(place, judge) == 0
    assert len(judge.asked) == asked
    by_name = lambda row: (row["round"], row["category"])  # noqa: E731
    assert sorted(results(place), key=by_name) == sorted(before, key=by_name)
    assert len(before) == 4 < len(PROMPTS)
