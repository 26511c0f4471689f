"""Advantages of every response after its own messages: answers in groups by round, critiques by the answers they led to."""

import random

import pytest

from evolve_ray.config.options import Selection
from evolve_ray.select.advantages import AdvantageArgs
from evolve_ray.select.check import check_selected
from evolve_ray.select.turn_advantages import turn_advantages

PROMPT = {"prompt_id": "p", "prompt": "q", "file": "f", "line": 1}


def draft(name, score, round=2, sample=0, kind="answer", text=None, finish="stop", asked="q"):
    return {
        "draft_id": name, "parent_id": "y" if round > 1 else None, "sample": sample, "round": round, "kind": kind,
        "text": text or name, "finish_reason": finish, "score": score, "messages": [{"role": "user", "content": asked}],
    }  # fmt: skip


def run(answers, others=(), **args):
    others = list(others)
    result = turn_advantages(PROMPT, answers, Selection(name="turn_advantages"), others, AdvantageArgs(**args))
    check_selected("turn_advantages", PROMPT, [*answers, *others], result)
    rows, rejected = result
    return {row["chosen_id"]: row for row in rows}, {row["id"]: row["reason"] for row in rejected}


ANSWERS = [draft("y", 0.25, 1), draft("a", 1.0, 2, 0), draft("b", 0.0, 2, 1)]
CRITIQUES = [draft("c", None, 2, 0, "critique"), draft("d", None, 2, 1, "critique")]


def test_a_critique_has_the_advantage_of_the_answer_that_it_led_to():
    rows, rejected = run(ANSWERS, CRITIQUES, baseline="dr_grpo")
    assert {name: row["numbers"] for name, row in rows.items()} == {
        name: {"advantage": value, "refined": 0.0} for name, value in {"a": 0.5, "b": -0.5, "c": 0.5, "d": -0.5}.items()
    }
    assert (rows["c"]["kind"], rows["c"]["context"]) == ("critique", [{"role": "user", "content": "q"}])
    assert rejected == {"y": "its advantage is 0"}


def test_the_bonus_is_on_the_change_from_the_draft():
    rows, _ = run(ANSWERS, baseline="none", bonus=2.0)
    assert {name: row["numbers"]["advantage"] for name, row in rows.items()} == {"y": 0.25, "a": 2.5, "b": -0.5}


def test_equal_texts_are_one_row_only_after_equal_messages():
    answers = [
        draft("a", 1.0, text="same"),
        draft("b", 1.0, text="same"),
        draft("c", 1.0, text="same", asked="other"),
        draft("d", 0.0),
    ]
    rows, rejected = run(answers, baseline="none")
    assert {name: row["numbers"]["advantage"] for name, row in rows.items()} == {"a": 2.0, "c": 1.0}
    assert rejected == {"b": "has the same text as draft a, whose row counts for both", "d": "its advantage is 0"}


def test_cut_and_unscored_responses_have_no_row():
    rows, rejected = run([draft("a", 1.0, finish="length"), draft("b", 0.0), draft("c", None, sample=3)],
                         [draft("d", None, 2, 3, "critique")])  # fmt: skip
    assert rows["b"]["numbers"]["advantage"] == -1.0
    assert rejected == {
        "a": "cut by length: has a reward, but is not trained",
        **dict.fromkeys("cd", "has no finite score, and led to no answer that has one"),
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_drafts_changes_nothing(seed):
    rng = random.Random(seed)
    assert run(rng.sample(ANSWERS, 3), rng.sample(CRITIQUES, 2)) == run(ANSWERS, CRITIQUES)
