"""Claims that can be reached, and that can fail."""

import json

import pytest

from evolve_ray.study import tables as study_tables
from tests.plain.study.examples import (
    ACTIVATION,
    ALL,
    BASE,
    ONE,
    SAMPLES,
    THREE,
    claims,
    outcomes,
    result,
    results,
    signs,
    tiny,
)


def test_every_claim_can_be_reached():
    found = claims(results(), "python jobs/study.py --quick")
    assert tuple(found) == ALL
    assert {name: claim["reached"] for name, claim in found.items()} == dict.fromkeys(ALL, True)
    assert {claim["command"] for claim in found.values()} == {"python jobs/study.py --quick"}
    json.dumps(list(found.values()), allow_nan=False)


FLAT = {"11": 60, "00": 40}
AT_NINE, AT_TEN = {"11": 49, "00": 51}, {"11": 50, "00": 50}


@pytest.mark.parametrize(
    ("name", "changes", "effect"),
    [
        ("a", {"tiny": tiny(base={"01": 30, "00": 70})}, 30),
        ("b", {"tiny": tiny(**{"iteration 1": FLAT, "iteration 2": FLAT})}, 40),
        ("c", {"tiny": tiny(**{"iteration 3": AT_NINE})}, 9),
        ("c_direct", {"tiny": tiny(**{"iteration 3": {"01": 50, "11": 40, "00": 10}})}, 0),
        ("c_gain", {"tiny": tiny(**{"iteration 3": ONE})}, 0),
        ("d", {"dpo": {"11": 86, "00": 14}}, 9),
        ("e", {"tiny": tiny(**{"iteration 3": outcomes(THREE, {"10": 96, "00": 4})})}, -1),
        ("e_tokens", {"tiny": tiny(**{"iteration 3": outcomes(THREE, SAMPLES, tokens=6)})}, 2),
        ("ood_long", {"tiny": tiny(**{"iteration 3": {"heldout": THREE, "long": FLAT, "desc": THREE}})}, 0),
        ("ood_desc", {"tiny": tiny(**{"iteration 3": {"heldout": THREE, "long": THREE, "desc": BASE}})}, -30),
        ("rule_label_accuracy", {"labels": {1: signs(52, 0, 48)}}, 52),
        ("trained_reward_model", {"learned": ACTIVATION}, 0),
    ],
)
def test_every_claim_can_fail(name, changes, effect):
    found = claims(results(**changes))[name]
    assert (found["reached"], found["effect"]) == (False, effect)


def test_two_iterations_with_a_gain_are_enough():
    found = claims(results(tiny=tiny(**{"iteration 1": FLAT})))["b"]
    assert found["reached"] is True
    assert [(part["model"], part["effect"]) for part in found["iterations"]] == [
        ("iteration 1", 0), ("iteration 2", 20), ("iteration 3", 40),
    ]  # fmt: skip
    assert [part["interval"][0] > 0 for part in found["iterations"]] == [False, True, True]


def test_floor_of_ten_points_includes_ten():
    assert claims(results(tiny=tiny(**{"iteration 3": AT_TEN})))["c"]["reached"] is True


def test_ten_points_within_noise_are_not_enough():
    noisy = tiny(**{"activation": {"01": 25, "00": 35}, "iteration 3": {"00": 29, "01": 31}})
    found = claims(results(tiny=noisy, seeds=(0,)))["c"]
    assert (found["effect"], found["reached"]) == (10, False)


def test_claim_on_too_few_prompts_is_neither_reached_nor_missed_and_says_so():
    few = tiny(**{"activation": {"00": 24}, "iteration 3": {"01": 24}})
    found = claims(results(tiny=few, seeds=(0, 1)))["c"]
    assert (found["effect"], found["reached"]) == (100, None)
    assert found["note"] == "too few prompts: 48, at least 50 are needed"
    assert "| too few prompts: 48, at least 50 are needed | 100.0 [" in study_tables.claim_table([found])
    enough = tiny(**{"activation": {"00": 25}, "iteration 3": {"01": 25}})
    assert claims(results(tiny=enough, seeds=(0, 1)))["c"]["reached"] is True


def test_best_of_chain_equal_to_best_of_parallel_is_not_below_it():
    level = tiny(**{"iteration 3": outcomes(THREE, {"10": 95, "00": 5})})
    assert (claims(results(tiny=level))["e"]["effect"], claims(results(tiny=level))["e"]["reached"]) == (0, True)


def test_claim_says_each_seed_and_their_mean():
    found = [result("tiny", 1, tiny(**{"iteration 3": ONE})), result("tiny", 0, tiny(**{"iteration 3": THREE}))]
    claim = claims(found)["b"]
    assert claim["seeds"] == [0, 1]
    assert (claim["per_seed"]["0"]["effect"], claim["per_seed"]["1"]["effect"], claim["effect"]) == (40, 20, 30)
    low, high = claim["interval"]
    assert low < 30 < high


def test_seeds_that_only_one_of_two_recipes_ran_are_left_out():
    found = [part for part in results(seeds=(0, 1, 2)) if (part.recipe, part.seed) != ("tiny_iterative_dpo", 1)]
    assert claims(found)["d"]["seeds"] == [0, 2]


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("tiny", set(ALL) - {"rule_label_accuracy", "trained_reward_model"}),
        ("tiny_iterative_dpo", {"d"}),
        ("tiny_rule", {"rule_label_accuracy"}),
        ("tiny_reward_model", {"trained_reward_model"}),
    ],
)
def test_claims_of_an_absent_recipe_are_neither_reached_nor_missed(recipe, names):
    found = claims(results(drop=(recipe,)))
    assert {name for name, claim in found.items() if claim["reached"] is None} == names
    for name in names:
        claim = found[name]
        assert (claim["note"], claim["effect"], claim["interval"], claim["seeds"]) == ("not run", None, None, [])


def test_chain_against_parallel_is_not_measured_without_samples():
    found = claims(results(tiny=tiny(**{"iteration 3": THREE})))
    assert [(found[name]["reached"], found[name]["note"]) for name in ("e", "e_verifier", "e_tokens")] == [
        (None, "not measured")
    ] * 3
    assert "Not measured" in study_tables.best_table(results(tiny=tiny(**{"iteration 3": THREE})))


def test_label_accuracy_is_the_mean_over_iterations_with_equal_pairs_against_it():
    claim = claims(results(labels={1: signs(9, 1, 0), 2: signs(60, 10, 30)}))["rule_label_accuracy"]
    assert claim["effect"] == pytest.approx((90 + 60) / 2)


def test_label_accuracy_without_a_verifier_is_not_measured():
    claim = claims(results(labels={1: {}}))["rule_label_accuracy"]
    assert (claim["reached"], claim["note"]) == (None, "not measured")
