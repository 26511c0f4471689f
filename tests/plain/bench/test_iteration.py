"""The share of an iteration outside of engines and training, from events and ledger lines written by hand."""

import datetime

import pytest

from evolve_ray.bench import iteration
from evolve_ray.errors import UserError

BEGIN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def event(second, kind, stage=None, number=None, **more):
    return {
        "time": (BEGIN + datetime.timedelta(seconds=second)).isoformat(),
        "event": kind,
        "stage": stage,
        "iteration": number,
        **more,
    }


def line(stage, seconds, number=2, **more):
    return {"iteration": number, "stage": stage, "seconds": seconds, "start_seconds": None, "engine_seconds": None,
            "train_seconds": None} | more  # fmt: skip


EVENTS = [
    event(0, "driver_start"),
    event(90, "stage_end", "decision", 1),
    event(100, "stage_start", "generations", 2),
    event(125, "shard", "generations", 2, begun=(BEGIN + datetime.timedelta(seconds=101.5)).isoformat()),
    event(126, "shard", "generations", 2, begun=(BEGIN + datetime.timedelta(seconds=104)).isoformat()),
    event(130, "stage_end", "generations", 2),
    event(131, "stage_start", "checkpoint", 2),
    event(141, "model_loaded", number=2),
    event(143, "model_loaded", number=2),
    event(180, "stage_end", "checkpoint", 2),
    event(190, "stage_end", "decision", 2),
    event(199, "driver_end"),
]
LINES = [
    line("generations", 900.0, number=1, engine_seconds=900.0),
    line("generations", 30.0, engine_seconds=50.0, start_seconds=4.0),
    line("checkpoint", 49.0, train_seconds=35.0),
    line("pairs", 0.0),
    line("drift", 6.0),
]


def test_share_is_of_the_last_iteration_without_its_starts():
    row = iteration.share(EVENTS, LINES, 2, "runs/x")
    # 100 s of wall, 2 + 1.5 + 10 of them starts; two engines worked 25 s side by side, the training 35.
    assert row.values == [pytest.approx(100 * (1 - 60 / 86.5))]
    assert (row.counts["wall, s"], row.counts["start, s"], row.counts["engines and training, s"]) == (100.0, 13.5, 60.0)
    assert row.counts["in no stage, s"] == 15.0
    assert row.counts["checkpoint"] == "49.0 s: start 10.0, work 35.0, rest 4.0"
    assert "pairs" not in row.counts


@pytest.mark.parametrize("events", [EVENTS[:1], EVENTS[2:], [EVENTS[0], *EVENTS]])
def test_run_that_was_resumed_or_has_one_iteration_is_refused(events):
    with pytest.raises(UserError, match="--run runs/x: must have two finished iterations in a row"):
        iteration.share(events, LINES, 2, "runs/x")


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a readable run directory"):
        iteration.run_row(tmp_path)
