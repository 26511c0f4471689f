"""The figures of AlpacaEval: what cannot be computed is said, and never a false number."""

import json
import warnings

import pytest

from evolve_ray.benchmarks import alpaca, driver
from evolve_ray.benchmarks.difficulty import difficulties_from, difficulty_table
from tests.plain.benchmarks.examples import PROMPTS, judge_alpaca, results

pytest.importorskip("alpaca_eval")


def annotations(verdicts):
    """Verdicts from 0 (lost) to 1 (won), None: unreadable."""
    return [
        {"preference": None if verdict is None else 1 + verdict, "index": n, "output_1": "b" * (3 + n % 4),
         "output_2": "a" * (1 + n % 5), "generator_1": "reference", "generator_2": "model"}
        for n, verdict in enumerate(verdicts)
    ]  # fmt: skip


def win_rates(tmp_path, verdicts):
    rows = annotations(verdicts)
    reference = [{"instruction": str(n), "output": "", "index": n} for n in range(len(rows))]
    table, _ = difficulty_table("minimal", None, reference, [row["instruction"] for row in reference], tmp_path, print)
    with difficulties_from(table), alpaca.quiet():
        return alpaca.win_rates(rows, control=alpaca.LENGTH_CONTROLS["minimal"], weights=tmp_path / "weights")


def test_length_control_by_length_alone_has_no_standard_error(tmp_path):
    figures = win_rates(tmp_path, [0.1, 0.9, 0.4, 0.8, 0.3, 0.6] * 10)
    assert 0 < figures["length_controlled_winrate"] < 100
    assert (figures["lc_standard_error"], figures["fit_warning"], figures["no_length_control"]) == (None, None, None)
    assert figures["standard_error"] > 0


def test_interval_of_the_raw_rate_is_wide_where_no_verdict_was_won(tmp_path):
    figures = win_rates(tmp_path, [0.0] * 60)
    assert (figures["win_rate"], figures["low"], figures["high"]) == (0.0, 0.0, pytest.approx(6.02, abs=0.01))
    figures = win_rates(tmp_path, [None] * 6)
    assert (figures["low"], figures["high"], figures["n_total"]) == (None, None, 0)


def fails(*arguments, **named):
    raise ValueError("the solver gave up\nwith many lines")


def warns(*arguments, **named):
    from sklearn.exceptions import ConvergenceWarning

    warnings.warn("Liblinear failed to converge", ConvergenceWarning, stacklevel=1)
    return FIT(*arguments, **named)


FIT = None


@pytest.fixture
def broken(monkeypatch):
    """Puts another fit in place of the package's."""
    global FIT
    from alpaca_eval.metrics import glm_winrate

    FIT = glm_winrate.fit_LogisticRegressionCV
    return lambda fit: monkeypatch.setattr(glm_winrate, "fit_LogisticRegressionCV", fit)


def test_failed_fit_is_a_sentence_and_no_figure(tmp_path, broken):
    broken(fails)
    figures = win_rates(tmp_path, [0.1, 0.9, 0.4, 0.8, 0.3, 0.6] * 2)
    assert figures["win_rate"] == pytest.approx(100 * 3.1 / 6)
    assert (figures["length_controlled_winrate"], figures["no_length_control"]) == (None, "the fit failed")
    assert figures["fit_warning"] == "the fit failed: the solver gave up"


def test_fit_that_does_not_converge_is_said(tmp_path, broken):
    broken(warns)
    figures = win_rates(tmp_path, [0.1, 0.9, 0.4, 0.8, 0.3, 0.6] * 2)
    assert figures["length_controlled_winrate"] is not None
    assert figures["fit_warning"] == "Liblinear failed to converge"


def test_rate_far_from_the_raw_one_is_said(tmp_path, broken, monkeypatch):
    from alpaca_eval.metrics import glm_winrate

    monkeypatch.setattr(glm_winrate, "get_is_extreme_changes", lambda raw, rate: True)
    assert (
        "is far from the raw 51.7 %, which may be a failure of the fit"
        in win_rates(tmp_path, [0.1, 0.9, 0.4, 0.8, 0.3, 0.6])["fit_warning"]
    )


def test_command_prints_what_failed_and_what_rests_on_few_verdicts(place, judge, broken, capsys):
    broken(fails)
    judge.decide = lambda messages: 0.3
    assert judge_alpaca(place, judge, "--length-control", "minimal") == 0
    said = capsys.readouterr().out
    for number in (1, 2):
        assert f"length-controlled rate of org/m y{number}: the fit failed: the solver gave up" in said
    assert "lines with n below 50 rest on too few verdicts: conclude nothing from them" in said
    assert [row["length_controlled_win_rate"] for row in results(place)] == [None, None]
    json.dumps(results(place), allow_nan=False)


def test_no_warning_where_all_is_well():
    row = {"model": "m", "round": 1, "n": 50, "fit_warning": None}
    assert driver.remarks([row]) == []
    assert len(PROMPTS) < 50
