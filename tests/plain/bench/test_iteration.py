"""The share of an iteration outside of engines and training, from its clock."""

import pytest

from evolve_ray.bench import iteration
from evolve_ray.errors import UserError
from evolve_ray.store import rows

CLOCK = {"iteration": 2, "seconds": 100.0, "engines": 20.0, "scoring": 5.0, "updates": 35.0, "starts": 20.0, "waiting": 8.0,
         "rest": 12.0}  # fmt: skip


def test_shares_without_and_with_the_starts():
    without, with_starts = iteration.shares(CLOCK)
    assert (without.name, without.values) == ("iteration_overhead", [pytest.approx(25.0)])
    assert (with_starts.name, with_starts.values) == ("iteration_outside", [pytest.approx(40.0)])
    assert without.counts == {
        "iteration": 2, "wall, s": 100.0, "engines, s": 20.0, "scoring, s": 5.0, "reference and updates, s": 35.0,
        "starts, s": 20.0, "waiting, s": 8.0, "checks and commits, s": 12.0,
    }  # fmt: skip


def run_with(root, *events):
    root.joinpath("config.json").write_text('{"engine": {"actors": 2}}')
    lines = [
        {"time": f"2026-01-01T00:00:{second:02}+00:00", "event": kind}
        | ({"stage": "drift", "iteration": number, "seconds": 1.0} if number else {})
        for second, (kind, number) in enumerate(events)
    ]
    rows.write_jsonl(root / "events.jsonl", lines)
    return root


TWO = [("driver_start", 0), ("stage_start", 1), ("stage_end", 1), ("stage_start", 2), ("stage_end", 2)]


def test_a_finished_run_is_measured(tmp_path):
    assert iteration.run_rows(run_with(tmp_path, *TWO))[0].counts["iteration"] == 2


@pytest.mark.parametrize("events", [TWO[:1], TWO[:3], [*TWO, ("driver_start", 0)]])
def test_run_that_was_resumed_or_has_one_iteration_is_refused(tmp_path, events):
    with pytest.raises(UserError, match="must have two finished iterations in a row"):
        iteration.run_rows(run_with(tmp_path, *events))


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a readable run directory"):
        iteration.run_rows(tmp_path)
