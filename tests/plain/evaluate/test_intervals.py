"""Intervals that hold the truth as often as they say, also where few prompts are right or few change."""

import math
import random
import statistics

import numpy as np
import pytest
from scipy import stats

from evolve_ray.evaluate import intervals
from tests import coverage
from tests.plain.processes import ROOT


def ends(figures):
    return [figures["low"], figures["high"]]


# --- coverage; tests/coverage.py counts it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", coverage.SHARES)
@pytest.mark.parametrize("n", coverage.SIZES)
def test_share_is_covered_as_often_as_any_interval_can(share, n):
    reached, least = coverage.share_coverage(share, n)
    assert 0.93 <= round(reached, 3) <= max(0.9705, round(least, 3) + 1e-9)


def test_share_of_2_percent_on_60_prompts():
    assert 0.93 <= coverage.share_coverage(0.02, 60)[0] <= 0.97
    assert 0.93 <= coverage.share_coverage(0.98, 60)[0] <= 0.97


def test_no_interval_of_a_share_of_2_percent_on_30_prompts_is_between_93_and_97_percent():
    chances = stats.binom.pmf(np.arange(31), 30, 0.02)
    reachable = {chances[first:last].sum() for first in range(31) for last in range(first + 1, 32)}
    assert [value for value in reachable if 0.93 <= value <= 0.97] == []
    assert coverage.share_coverage(0.02, 30)[0] == pytest.approx(min(value for value in reachable if value > 0.93))


@pytest.mark.parametrize("pair", coverage.PAIRS)
@pytest.mark.parametrize("n", coverage.SIZES)
def test_difference_is_covered_in_93_to_97_percent_or_as_little_above_as_can_be(pair, n):
    reached, least = coverage.pair_coverage(*pair, n)
    assert reached >= 0.93
    if pair[0] == pair[1]:
        assert reached <= max(0.97, least + 0.002)
    elif n >= 60:
        assert reached <= 0.9705


def test_interval_that_three_changes_end_would_hold_0_too_rarely():
    """Why an interval must be above 97 % where fewer changes are expected: the bound of `coverage.pair_coverage`."""
    number = np.arange(40)
    up, down = np.meshgrid(number, number)
    left_out = (up - down) ** 2 >= 3 * (up + down)
    chances = np.outer(stats.poisson.pmf(number, 2.0), stats.poisson.pmf(number, 2.0))
    assert chances[~left_out | (up + down == 0)].sum() < 0.91


@pytest.mark.parametrize("name", coverage.DRAWN)
@pytest.mark.parametrize("n", coverage.DRAWN_SIZES)
def test_other_values_are_covered(name, n):
    few_events = "5 % changed" in name or name == "Arena-Hard win rate 3 %"  # about three: coverage moves in steps
    assert 0.93 <= coverage.drawn_coverage(name, n) <= (1.0 if few_events else 0.97)


def test_page_of_the_evaluation_has_the_tables_that_the_command_prints():
    assert coverage.tables() in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


# --- values by hand and from the literature -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 60), (1, 60), (30, 60), (60, 60), (0, 1), (7, 500)])
def test_share_has_wilsons_interval(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    figures = intervals.mean([1.0] * right + [0.0] * (n - right))
    assert ends(figures) == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert figures["mean"] == right / n


def test_none_of_60_is_not_certain():
    assert ends(intervals.mean([0.0] * 60)) == [0.0, pytest.approx(0.0602, abs=1e-4)]
    assert ends(intervals.mean([1.0] * 60)) == [pytest.approx(0.9398, abs=1e-4), 1.0]
    assert ends(intervals.difference([0.0] * 60)) == pytest.approx([-0.0602, 0.0602], abs=1e-4)


def test_difference_has_tangos_interval():
    """21 children before and after a transplantation: 1 changed one way, 7 the other way (Fagerland, Lydersen and Laake 2014)."""
    assert ends(intervals.difference([1.0] * 1 + [-1.0] * 7 + [0.0] * 13)) == pytest.approx([-0.517, -0.026], abs=5e-4)


@pytest.mark.parametrize(("up", "down", "n"), [(0, 0, 40), (1, 0, 60), (5, 2, 90), (30, 11, 60), (60, 0, 60), (0, 1, 1)])
def test_ends_of_a_difference_are_where_the_score_test_is_at_its_quantile(up, down, n):
    """The variance under a true difference, by maximum likelihood found on a grid."""
    for end in ends(intervals.difference([1.0] * up + [-1.0] * down + [0.0] * (n - up - down))):
        if abs(end) > 1 - 1e-9:
            continue
        falls = np.linspace(max(0.0, -end), (1 - end) / 2, 20001)
        likelihood = stats.multinomial.logpmf(
            [[up, down, n - up - down]], n, np.stack([falls + end, falls, 1 - end - 2 * falls], 1)
        )
        fall = falls[np.argmax(likelihood)]
        score = (up - down - n * end) / math.sqrt(n * (2 * fall + end - end**2))
        assert abs(score) == pytest.approx(1.96, abs=2e-3)


def test_four_changes_one_way_of_many_are_the_least_that_show_a_difference():
    assert intervals.difference([1.0] * 3 + [0.0] * 97)["low"] < 0 < intervals.difference([1.0] * 4 + [0.0] * 96)["low"]


def test_rewards_without_bounds_have_the_t_interval():
    values = [3.0, 5.0, 4.5, 8.0, 6.5]
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert ends(intervals.mean(values)) == pytest.approx(expected)
    assert ends(intervals.difference(values)) == pytest.approx(expected)


def test_values_within_bounds_vary_as_they_do_and_not_as_shares():
    near = intervals.mean([0.79, 0.8, 0.81, 0.8] * 30)
    assert near["high"] - near["low"] == pytest.approx(
        2 * 1.98 * statistics.stdev([0.79, 0.8, 0.81, 0.8] * 30) / 120**0.5, rel=0.01
    )


def test_equal_values_are_not_certain():
    """None of 60 prompts had another score: up to 6 % of all may, as far away as a score can be."""
    assert ends(intervals.mean([0.5] * 60)) == pytest.approx([0.5 - 0.0301, 0.5 + 0.0301], abs=1e-4)
    assert ends(intervals.mean([0.25] * 59 + [0.5]))[1] > 0.27
    assert ends(intervals.mean([7.0] * 60)) == [7.0, 7.0], "nothing says how far such a reward may be away"


def test_win_in_few_questions_of_many_battles_is_not_certain():
    """Values of 0, 1 and between with unequal weights, and the smallest probabilities that a judge can give."""
    for values, weights in (([1.0, 0.1], [1, 10]), ([1e-300] * 3 + [0.0] * 50, None), ([0.02] * 59 + [0.9], None)):
        figures = intervals.mean(values, weights)
        assert figures["high"] > figures["mean"] + 0.01
        assert figures["low"] >= 0.0


def test_rewards_of_minus_1_and_1_are_shares_on_another_scale():
    low, high = ends(intervals.mean([0.0] * 57 + [1.0] * 3))
    assert ends(intervals.mean([-1.0] * 57 + [1.0] * 3)) == pytest.approx([2 * low - 1, 2 * high - 1])


def test_halves_in_place_of_whole_points_halve_the_interval():
    low, high = ends(intervals.mean([0.0] * 57 + [1.0] * 3))
    halved = ends(intervals.mean([0.0] * 57 + [0.5] * 3))
    assert halved == pytest.approx([low / 2, high / 2], rel=0.1)
    assert halved[1] > high / 2, "that no prompt has a whole point is not certain"


@pytest.mark.parametrize("unit", [1.0, 0.25, 40.0])
def test_difference_that_few_prompts_moved_grows_with_the_unit(unit):
    values = [1.0] * 3 + [-1.0] * 2 + [0.0] * 55
    figures, plain = intervals.difference([unit * value for value in values], unit), intervals.difference(values)
    assert ends(figures) == pytest.approx([unit * end for end in ends(plain)])


def test_rewards_of_which_none_moved_may_move_as_far_as_two_prompts_differ():
    scores = [float(n) for n in range(60)]
    figures = intervals.paired(scores, scores)
    unit = math.sqrt(2) * statistics.pstdev(scores)
    assert ends(figures) == pytest.approx([-0.0602 * unit, 0.0602 * unit], rel=1e-2)
    assert ends(intervals.paired([7.0] * 60, [7.0] * 60)) == [0.0, 0.0], "nothing says how far such a reward may move"


def test_one_value_is_not_certain():
    for figures in (intervals.mean([1.0]), intervals.mean([0.3]), intervals.difference([-1.0]), intervals.paired([2.0], [9.0])):
        assert figures["high"] - figures["low"] > 0.7, figures


@pytest.mark.parametrize(
    "values", [[0.0], [1.0], [1.0] * 7, [0.1] * 9, [1 / 3] * 5 + [1.0], [-1.0, 1.0], [5.0, 5.0], [0.0, 0.25]]
)
@pytest.mark.parametrize("interval", [intervals.mean, intervals.difference])
def test_the_mean_lies_inside_and_the_ends_are_finite(values, interval):
    figures = interval(values)
    assert figures["low"] <= figures["mean"] <= figures["high"]
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["mean"] == pytest.approx(sum(values) / len(values), abs=1e-15)


def test_order_changes_nothing_and_there_is_no_chance():
    values = [0.0] * 30 + [1.0] * 20 + [-1.0] * 3
    mixed = random.Random(0).sample(values, len(values))
    for interval in (intervals.mean, intervals.difference):
        assert interval(values) == interval(mixed) == interval(mixed)


def test_weights_are_relative_and_equal_ones_change_nothing():
    values = [1.0] * 20 + [0.0] * 40
    for interval in (intervals.mean, intervals.difference):
        assert interval(values, weights=[2.5] * 60) == interval(values)
    assert intervals.mean([1.0, 0.0], weights=[3.0, 1.0])["mean"] == 0.75


def test_unequal_weights_widen_the_interval():
    values, equal, uneven = [1.0, 0.0] * 50, [1.0] * 100, [1.0, 1.0, 3.0, 3.0] * 25
    widths = [np.subtract(*ends(intervals.mean(values, weights=weights))[::-1]) for weights in (equal, uneven)]
    assert widths[1] / widths[0] == pytest.approx(math.sqrt((1 + 9) / 2) / 2, rel=0.02)
