"""Where the time of an iteration went, from events written by hand."""

import datetime

from evolve_ray.report.clock import PARTS, clock

BEGIN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def at(second):
    return (BEGIN + datetime.timedelta(seconds=second)).isoformat()


def event(second, kind, stage=None, number=None, **more):
    return {"time": at(second), "event": kind, "stage": stage, "iteration": number, **more}


def step(begun, ended, **seconds):
    return {"begun": at(begun), "ended": at(ended), **seconds}


# Two engines. The first shard of each also starts its engine; the second engine has no third shard, and waits.
SHARDS = [
    {"generations": step(14, 30, engine_seconds=10.0, start_seconds=4.0), "scores": step(30, 33, score_seconds=2.5)},
    {"generations": step(14, 32, engine_seconds=12.0, start_seconds=4.0), "scores": step(33, 36, score_seconds=3.0)},
    {"generations": step(30, 40, engine_seconds=9.0, start_seconds=0.0), "scores": step(40, 42, score_seconds=1.5)},
]
EVENTS = [
    event(0, "driver_start"),
    event(10, "stage_start", "generations", 1),
    *(event(42, "shard", "generations", 1, steps=steps) for steps in SHARDS),
    event(43, "stage_end", "generations", 1),
    event(44, "stage_start", "checkpoint", 1),
    event(50, "model_loaded", number=1),
    event(54, "model_loaded", number=1),
    event(70, "stage_end", "checkpoint", 1),
    event(71, "stage_start", "probe", 1),
    event(71.5, "prober_ready", "probe", 1),
    event(73, "stage_end", "probe", 1),
    event(80, "stage_start", "generations", 2),
    event(86, "stage_end", "generations", 2),
    event(90, "driver_end"),
]
LINES = [{"iteration": 1, "stage": "checkpoint", "train_seconds": 18.0}]


def test_parts_are_those_of_the_events_and_sum_to_the_wall_clock():
    first, second = clock(EVENTS, LINES, actors=2)
    # 26 s of two engines: 15.5 of work, and starts of 4 + 2 s; 0.5 s of commit; the last shard is scored in 1.5 of 2 s.
    assert {name: first[name] for name in PARTS} == {
        "engines": 15.5,
        "scoring": 1.5,
        "updates": 18.0,
        # 10 of the driver, 4 of the pipeline, 6 of the engines, 0.5 of the scorer, 6 of the worker group, 0.5 of the prober
        "starts": 27.0,
        "waiting": 4.0,
        "rest": 7.0,
    }
    assert first["seconds"] == 73.0
    assert second == {"iteration": 2, "seconds": 17.0, "engines": 0, "scoring": 0, "updates": 0, "starts": 0, "waiting": 0,
                      "rest": 17.0}  # fmt: skip


def test_the_time_between_two_drivers_does_not_count_and_a_killed_stage_lasted_until_its_last_event():
    killed = [event(0, "driver_start"), event(5, "stage_start", "drift", 1), event(9, "note")]
    again = [event(100, "driver_start"), event(103, "stage_start", "drift", 1), event(104, "stage_end", "drift", 1)]
    (row,) = clock([*killed, *again], [], actors=1)
    assert row == {"iteration": 1, "seconds": 13.0, "engines": 0, "scoring": 0, "updates": 0, "starts": 8.0, "waiting": 0,
                   "rest": 5.0}  # fmt: skip


def test_a_run_whose_shards_have_no_times_has_no_clock():
    assert clock([event(0, "driver_start"), event(1, "shard", "generations", 1)], [], actors=1) == []
