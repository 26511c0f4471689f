"""Advantages of one prompt's answers, by hand: baselines, the bonus on a change, merged texts, and every draft accounted for."""

import random

import pytest

from evolve_ray.config.options import Selection
from evolve_ray.select.advantages import AdvantageArgs, advantages, group_advantages
from evolve_ray.select.check import check_selected

CHAINS = [("a", 0.0, 1.0), ("b", 1.0, 0.0), ("c", 1.0, 1.0)]  # rewards of turn 1 and turn 2
PROMPT = {"prompt_id": "p", "prompt": "q", "file": "f", "line": 1}


def draft(name, score, round=1, parent=None, text=None, finish="stop"):
    return {"draft_id": name, "parent_id": parent, "sample": 0, "round": round, "text": text or name, "finish_reason": finish,
            "score": score}  # fmt: skip


def run(drafts, **args):
    result = advantages(PROMPT, drafts, Selection(name="advantages"), AdvantageArgs(**args))
    check_selected("advantages", PROMPT, drafts, result)
    rows, rejected = result
    return {row["chosen_id"]: row for row in rows}, {row["id"]: row["reason"] for row in rejected}


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("rloo", [2 / 3, 2 / 3, -2 / 3, -2 / 3]),
        ("dr_grpo", [0.5, 0.5, -0.5, -0.5]),
        ("grpo", [0.8659, 0.8659, -0.8659, -0.8659]),  # 0.5 / (sqrt(1 / 3) + 1e-4)
        ("none", [1.0, 1.0, 0.0, 0.0]),
    ],
)
def test_baselines(baseline, expected):
    assert group_advantages([1.0, 1.0, 0.0, 0.0], baseline) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("baseline", ["rloo", "dr_grpo", "grpo"])
def test_a_group_of_equal_rewards_or_of_one_teaches_nothing(baseline):
    assert group_advantages([0.1, 0.1, 0.1], baseline) == [0.0] * 3
    assert group_advantages([3.0], baseline) == [0.0]


def test_each_answer_is_a_row_of_its_own():
    rows, rejected = run([draft("a", 1.0), draft("b", 0.0), draft("c", None)])
    assert {name: row["numbers"] for name, row in rows.items()} == {
        "a": {"advantage": 1.0, "refined": 0.0}, "b": {"advantage": -1.0, "refined": 0.0},
    }  # fmt: skip
    assert rows["a"]["rejected_id"] == "a"
    assert rejected == {"c": "has no finite score"}


def test_a_refinement_is_rewarded_after_its_draft_with_the_bonus_on_its_change():
    """SCoRe with bonus 10: 0 -> 1 is 11, 1 -> 0 is -10, 1 -> 1 is 1 (no baseline)."""
    drafts = [draft(f"{n}{r}", s, r, f"{n}1" if r == 2 else None) for n, *both in CHAINS for r, s in enumerate(both, 1)]
    rows, rejected = run(drafts, baseline="none", bonus=10.0)
    seconds = {name: row["numbers"]["advantage"] for name, row in rows.items() if row["numbers"]["refined"]}
    assert seconds == {"a2": 11.0, "b2": -10.0, "c2": 1.0}
    assert (rows["a2"]["rejected"], rows["b1"]["numbers"]["advantage"]) == ("a1", 1.0)
    assert rejected == {}, "a1 has no row of its own, but stands in that of a2"


def test_equal_texts_are_one_row_with_the_sum():
    rows, rejected = run([draft("a", 1.0, text="same"), draft("b", 1.0, text="same"), draft("c", 0.0)], baseline="dr_grpo")
    assert rows["a"]["numbers"]["advantage"] == pytest.approx(2 / 3)
    assert rejected == {"b": "has the same text as draft a, whose row counts for both"}


def test_a_cut_answer_counts_in_the_baseline_and_is_not_trained():
    rows, rejected = run([draft("a", 1.0), draft("b", 0.0, finish="length")])
    assert (list(rows), rows["a"]["numbers"]["advantage"]) == (["a"], 1.0)
    assert rejected == {"b": "cut by length: has a reward, but is not trained"}


def test_the_order_of_the_drafts_changes_nothing():
    drafts = [
        draft(name, score, text=text) for name, score, text in zip("abcde", [0.3, 0.1, 0.7, 0.3, 0.2], "xyzxy", strict=True)
    ]
    expected = run(drafts)
    for seed in range(5):
        shuffled = random.Random(seed).sample(drafts, len(drafts))
        assert run(shuffled) == expected


def test_the_first_stage_of_score_holds_the_first_turn_and_rewards_the_second():
    """Turn 1 is a row with the advantage 0, whatever its reward; turn 2 has its reward, or no row where it is 0."""
    drafts = [draft(f"{n}{r}", s, r, f"{n}1" if r == 2 else None) for n, *both in CHAINS for r, s in enumerate(both, 1)]
    rows, rejected = run(drafts, baseline="none", rewarded="refined")
    found = {name: (row["numbers"]["refined"], row["numbers"]["advantage"]) for name, row in rows.items()}
    assert found == {"a1": (0.0, 0.0), "b1": (0.0, 0.0), "c1": (0.0, 0.0), "a2": (1.0, 1.0), "c2": (1.0, 1.0)}
    assert rejected == {"b2": "its advantage is 0"}


def test_rows_with_the_advantage_0_are_kept_for_a_divergence():
    drafts = [draft(f"{n}{r}", s, r, f"{n}1" if r == 2 else None) for n, *both in CHAINS for r, s in enumerate(both, 1)]
    rows, rejected = run(drafts, baseline="none", bonus=10.0, keep_zero=True)
    assert {name: row["numbers"]["advantage"] for name, row in rows.items()} == {
        "a1": 0.0, "a2": 11.0, "b1": 1.0, "b2": -10.0, "c1": 1.0, "c2": 1.0,
    }  # fmt: skip
    assert rejected == {}
