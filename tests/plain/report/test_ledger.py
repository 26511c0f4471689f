"""What a run cost, counted by hand: the ledger of stages, and quality against tokens."""

import datetime

import pytest

from evolve_ray.report.ledger import TOTALS, compute, ledger
from evolve_ray.store.run import Run, Stage

ENGINE = {"num_prompt_tokens": 100, "num_cached_tokens": 40, "num_tokens": 60}


def stage(run, name, *, iteration=1, **stats):
    made = Stage(run.iteration(iteration) / name, name, name)
    made.start()
    return made.commit(num_in=5, num_rows=2, **stats)


@pytest.fixture
def events(monkeypatch):
    """Writes events at given seconds."""

    def write(run, *lines):
        for second, kind, fields in lines:
            time = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=second)
            monkeypatch.setattr("evolve_ray.store.run.now", lambda time=time: time.isoformat(timespec="milliseconds"))
            run.event(kind, **fields)

    return write


def row(run, name, actors=2):
    return next(line for line in ledger(run, actors)["stages"] if line["stage"] == name)


def test_a_generation_stage_has_rows_tokens_steps_and_engine_time(tmp_path, events):
    run = Run(tmp_path)
    stage(run, "generations", **ENGINE, num_steps=30, engine_seconds=12.0, start_seconds=3.0)
    at = {"stage": "generations", "iteration": 1}
    events(run, (0, "stage_start", at), (10, "stage_end", {**at, "seconds": 10.0}))
    assert row(run, "generations") == {
        "iteration": 1, "stage": "generations", "num_in": 5, "num_rows": 2, "num_rejected": 0, **ENGINE,
        "num_engine_steps": 30, "num_updates": None, "seconds": 10.0, "engine_seconds": 12.0, "start_seconds": 3.0,
        "idle_seconds": 5.0, "score_seconds": None, "train_seconds": None,
        "num_saved_tokens": None, "num_guessed_tokens": None, "num_accepted_tokens": None, "num_thinking_tokens": None,
        "num_without_answer": None, "num_broken": None, "num_judge_asks": None, "num_unparsable": None, "num_refused": None,
        "num_judge_tokens": None, "num_judge_prompt_tokens": None,
    }  # fmt: skip


def test_steps_of_a_training_are_updates(tmp_path, events):
    run = Run(tmp_path)
    stage(run, "checkpoint", num_steps=7)
    events(run, (0, "driver_start", {}))
    line = row(run, "checkpoint")
    assert (line["num_updates"], line["num_engine_steps"], line["idle_seconds"], line["seconds"]) == (7, None, None, 0.0)


def test_an_evaluation_sums_the_stages_inside_it(tmp_path, events):
    run = Run(tmp_path)
    outer = Stage(run.iteration(1) / "evaluation", "evaluation", "k")
    work = outer.start()
    for folder, seconds in ((work, 4.0), (work / "parallel", 6.0)):
        for name, stats in (("generations", {"engine_seconds": seconds, "start_seconds": 1.0, "num_steps": 9}),
                            ("scores", {"score_seconds": 0.5})):  # fmt: skip
            inner = Stage(folder / name, name, name)
            inner.start()
            inner.commit(**stats)
    outer.commit(num_in=5, num_rows=8, **ENGINE)
    for second, name in ((0, "evaluation"), (20, "evaluation"), (40, "base_evaluation")):
        at = {"stage": name, "iteration": 1}
        events(run, (second, "stage_start", at), (second + 8, "stage_end", {**at, "seconds": 8.0}))
    line = row(run, "evaluation")
    assert (line["seconds"], line["engine_seconds"], line["start_seconds"], line["idle_seconds"]) == (16.0, 10.0, 2.0, 20.0)
    assert (line["num_engine_steps"], line["score_seconds"], line["num_tokens"]) == (18, 1.0, 60)


def test_an_attempt_that_was_killed_lasted_until_its_last_event(tmp_path, events):
    run = Run(tmp_path)
    stage(run, "generations", engine_seconds=9.0, start_seconds=0.0)
    at = {"stage": "generations", "iteration": 1}
    events(run, (0, "stage_start", at), (7, "shard", {}), (500, "driver_start", {}), (501, "stage_start", at),
           (504, "stage_end", {**at, "seconds": 3.0}))  # fmt: skip
    line = row(run, "generations", actors=1)
    assert (line["seconds"], line["idle_seconds"]) == (10.0, 1.0)


def test_totals_of_iterations_and_run_add_what_is_known(tmp_path, events):
    run = Run(tmp_path)
    stage(run, "checkpoint", iteration=0, num_steps=4)
    stage(run, "generations", **ENGINE, num_steps=30, engine_seconds=1.5, start_seconds=0.5)
    stage(run, "checkpoint", num_steps=6)
    events(run, *((0, "stage_end", {"stage": "checkpoint", "iteration": n, "seconds": 2.0}) for n in (0, 1)))
    found = ledger(run, 1)
    zero, one = found["iterations"]
    assert (zero["iteration"], zero["num_updates"], zero["seconds"], zero["num_tokens"]) == (0, 4, 2.0, 0)
    assert (one["num_updates"], one["num_engine_steps"], one["num_tokens"], one["engine_seconds"]) == (6, 30, 60, 1.5)
    assert {key: found["total"][key] for key in TOTALS} == {key: zero[key] + one[key] for key in TOTALS}
    assert "num_rows" not in found["total"]


def figures(tokens, mean):
    return {"n": 3, "mean_response_tokens": tokens, "reward": {"mean": mean, "low": mean, "high": mean}}


def test_quality_stands_beside_all_tokens_up_to_its_round():
    rounds = {"1": figures(10.0, 0.1), "10": figures(5.0, 0.4), "2": figures(7.0, 0.3)}  # in the order of their text
    (line,) = compute([{"name": "base", "iteration": 0, "splits": {"held": {"rounds": rounds}}}])
    assert [(point["round"], point["mean_tokens"]) for point in line["chain"]] == [(1, 10.0), (2, 17.0), (10, 22.0)]
    assert [point["reward"]["mean"] for point in line["chain"]] == [0.1, 0.3, 0.4]
    assert (line["model"], line["split"], line["best_of"]) == ("base", "held", None)
    assert "exact_match" not in line["chain"][0]


def test_best_of_as_many_samples_stands_beside_its_tokens():
    side = {"mean_tokens": 40.0, "reward": {"mean": 1.0}, "exact_match": {"mean": 0.5}}
    split = {"rounds": {"1": figures(10.0, 0.1)}, "best_of": {"num_responses": 4, "n": 3, "chain": side, "parallel": side}}
    (line,) = compute([{"name": "base", "iteration": 0, "splits": {"held": split}}])
    assert line["best_of"] == {"num_responses": 4, "chain": side, "parallel": side}


def test_a_split_without_whole_chains_has_no_points():
    (line,) = compute([{"name": "base", "iteration": 0, "splits": {"held": {"rounds": {}}}}])
    assert line["chain"] == []
