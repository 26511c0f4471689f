"""Outcomes paired by prompt, and means over seeds with intervals."""

import json
import os
import re

import numpy as np
import pytest

from evolve_ray.errors import IntegrityError
from evolve_ray.evaluate import intervals
from evolve_ray.study import driver
from evolve_ray.study import results as study_results
from evolve_ray.study import tables as study_tables
from tests.plain.study.examples import outcomes, write_run


def test_differences_pair_by_prompt_and_not_by_order():
    one, other = {"a": 1.0, "b": 0.0, "c": 1.0}, {"c": 0.0, "b": 1.0, "a": 1.0}
    assert study_results.minus(one, other) == {"a": 0.0, "b": -1.0, "c": 1.0}


def test_only_prompts_of_both_sides_are_compared():
    assert study_results.minus({"a": 1.0, "b": 1.0}, {"b": 0.0, "c": 0.0}) == {"b": 1.0}


def test_runs_without_a_common_prompt_are_refused():
    with pytest.raises(IntegrityError, match="no held-out prompt in common"):
        study_results.minus({"a": 1.0}, {"b": 1.0})


def values(*numbers):
    return {str(n): float(number) for n, number in enumerate(numbers)}


def test_pooled_mean_gives_every_seed_the_same_weight():
    assert study_results.pooled([values(1, 1, 0, 0), values(1, 0, 0, 0, 0, 0, 0, 0)])["mean"] == pytest.approx((0.5 + 0.125) / 2)


def test_interval_of_one_seed_agrees_with_the_report():
    numbers = list(np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=400, p=[0.1, 0.6, 0.3]))
    assert study_results.pooled_gain([values(*numbers)]) == intervals.difference(numbers)
    shares = [float(number == 1) for number in numbers]
    assert study_results.pooled([values(*shares)]) == intervals.mean(shares)


def test_two_seeds_narrow_the_interval_by_the_square_root_of_two():
    one = values(*[0, 1] * 200)
    widths = [part["high"] - part["low"] for part in (study_results.pooled([one]), study_results.pooled([one, one]))]
    assert widths[0] / widths[1] == pytest.approx(2**0.5, rel=0.01)


@pytest.mark.parametrize("shares", [(0.02, 0.02), (0.3, 0.7)])
def test_pooled_interval_covers_the_truth_about_95_times_in_100(shares):
    draws = (np.random.default_rng(5).random((500, 2, 150)) < np.array(shares)[None, :, None]).astype(float)
    found = [study_results.pooled([values(*one), values(*other)]) for one, other in draws]
    covered = np.mean([part["low"] <= sum(shares) / 2 <= part["high"] for part in found])
    assert 0.92 <= covered <= 0.99  # more where the seeds differ, since they are taken as one sample


def test_seeds_without_a_right_answer_are_not_certain():
    assert study_results.pooled([values(*[0] * 50)] * 2) == {"mean": 0.0, "low": 0.0, "high": pytest.approx(0.037, abs=1e-3)}


def test_interval_knows_no_order_of_prompts_and_no_chance():
    numbers = [0.0, 1.0, 1.0, -1.0, 0.0]
    assert study_results.pooled([values(*numbers)]) == study_results.pooled([values(*numbers[::-1])])


def test_rounds_are_counted_from_one_and_the_last_is_minus_one():
    part = outcomes({"101": 1, "001": 1})
    assert [part.y(1), part.y(2), part.y(-1)] == [values_p(1, 0), values_p(0, 0), values_p(1, 1)]


def values_p(*numbers):
    return {f"p{n:03}": float(number) for n, number in enumerate(numbers)}


def test_best_of_is_any_right_answer():
    part = outcomes({"0100": 1, "0000": 1}, {"0000": 1, "0001": 1})
    assert (part.best("chain"), part.best("parallel")) == (values_p(1, 0), values_p(0, 1))
    assert study_results.minus(part.tokens("chain"), part.tokens("parallel")) == values_p(0, 0)


def test_cells_of_a_model_are_means_over_seeds():
    cells = study_tables.round_cells([outcomes({"01": 3, "10": 1, "11": 2, "00": 4}), outcomes({"01": 2, "11": 8})], 2)
    assert cells[:2] == ["55.0", "75.0"]
    assert cells[2].startswith("20.0 [")
    assert cells[3:] == ["2.5", "0.5", "10"]


# --- claims ---------------------------------------------------------------------------------------------------------------------


def test_outcomes_are_read_by_prompt_round_and_split(tmp_path):
    write_run(tmp_path / "run", marks={"base": {"heldout": ["01", "10"], "long": ["00", "11", "01"]}})
    found = study_results.read_result(tmp_path / "run", "tiny", 0).models["base"]
    assert found["heldout"].y(1) == {"heldout-0": 0.0, "heldout-1": 1.0}
    assert found["heldout"].y(-1) == {"heldout-0": 1.0, "heldout-1": 0.0}
    assert study_results.gain(found["long"]) == {"long-0": 0.0, "long-1": 0.0, "long-2": 1.0}
    assert found["long"].tokens("chain") == dict.fromkeys(("long-0", "long-1", "long-2"), 3.0 + 4.0)


def test_outcomes_agree_with_the_report_of_the_run(tmp_path):
    write_run(tmp_path / "run", marks={"base": ["0110", "1001", "0001", "11?1", "1111", "0000"]})
    part = study_results.read_result(tmp_path / "run", "tiny", 0).outcomes("base")
    told = json.loads((tmp_path / "run" / "report.json").read_bytes())["models"][0]["splits"]["heldout"]
    for number in range(1, 5):
        assert np.mean(list(part.y(number).values())) == told["rounds"][str(number)]["exact_match"]["mean"]
    moved = told["rounds"]["4"]["against_first"]
    assert study_tables.round_cells([part], 4)[5:] == [str(moved["wrong_to_right"]), str(moved["right_to_wrong"]), "5"]


def test_prompt_without_a_score_in_every_round_does_not_count(tmp_path):
    write_run(tmp_path / "run", marks={"base": ["01", "?1", "1?"]})
    assert set(study_results.read_result(tmp_path / "run", "tiny", 0).outcomes("base").chain) == {"heldout-0"}


def test_split_without_a_single_verified_chain_is_refused(tmp_path):
    write_run(tmp_path / "run", marks={"base": {"heldout": ["0?", "1?"]}})
    with pytest.raises(IntegrityError, match=r"base_evaluation: no prompt of split heldout has a verified answer in every round"):
        study_results.read_result(tmp_path / "run", "tiny", 0)


def test_evaluation_that_is_gone_is_refused(tmp_path):
    write_run(tmp_path / "run")
    os.rename(tmp_path / "run" / "iteration-01" / "evaluation", tmp_path / "away")
    with pytest.raises(IntegrityError, match=r"iteration-01/evaluation: is listed in report.json but holds no answers"):
        study_results.read_result(tmp_path / "run", "tiny", 0)


def test_as_many_parallel_samples_count_as_the_chain_has_rounds(tmp_path):
    samples = {split: ["001", "010", "?11"] for split in driver.SPLITS}
    write_run(tmp_path / "run", marks={"base": ["00", "00", "11"]}, parallel=samples)
    found = study_results.read_result(tmp_path / "run", "tiny", 0).outcomes("base")
    assert found.best("parallel") == {"heldout-0": 0.0, "heldout-1": 1.0}


@pytest.mark.parametrize("samples", [None, ["1", "1", "1"]])
def test_fewer_samples_than_rounds_are_no_measurement(tmp_path, samples):
    parallel = samples and dict.fromkeys(driver.SPLITS, samples)
    write_run(tmp_path / "run", marks={"base": ["00", "00", "11"]}, parallel=parallel)
    assert study_results.read_result(tmp_path / "run", "tiny", 0).outcomes("base").parallel == {}


def test_labels_are_the_verifiers_order_of_chosen_and_rejected(tmp_path):
    write_run(tmp_path / "run", truths=[(1.0, 0.5), (0.5, 0.5), (0.25, 1.0), (None, 1.0), (1.0, 0.75)])
    found = study_results.read_result(tmp_path / "run", "tiny", 0)
    assert found.labels == {1: {"pair0": 1, "pair1": 0, "pair2": -1, "pair4": 1}}
    table = study_tables.label_table([found])
    assert re.search(r"\| tiny \| 1 \| 4 \| 50\.0 \[.*\] \| 25\.0 \[.*\] \| 25\.0 \[.*\] \|$", table)


# --- sharing iteration 0 --------------------------------------------------------------------------------------------------------
