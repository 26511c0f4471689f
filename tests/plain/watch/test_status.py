"""Where a run stands, from directories made by hand: running, finished, failed, dead, on another host."""

import datetime
import json
import os
import socket
import subprocess
import sys

import pytest

from evolve_ray.config.load import load
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError
from evolve_ray.store.manifest import commit
from evolve_ray.store.run import Run, Stage
from evolve_ray.watch.status import describe, main, status
from tests.plain.processes import ROOT

COMMAND = "python jobs/iterate.py recipe.toml --run mine"


@pytest.fixture
def run(tmp_path, recipe):
    """A run whose driver has begun: 10 prompts in shards of 4, evaluations of 6 prompts with parallel samples."""
    run = Run(tmp_path / "run")
    run.root.mkdir()
    more = "[engine]\nshard_prompts = 4\n[evaluation]\nparallel = 2\n"
    (run.root / "config.json").write_text(json.dumps(resolved(load(recipe(more)))))
    hold(run, socket.gethostname())
    run.event("driver_start", pid=1, job=None, command=COMMAND)
    stage(run, 0, "held_out", num_rows=6)
    stage(run, 1, "prompts", num_rows=10)
    return run


def hold(run, host):
    (run.root / "LOCK").write_text(
        json.dumps({"host": host, "pid": 1, "job": "raysubmit_1", "start": "2025-01-01T00:00:00+00:00"})
    )


def stage(run, iteration, name, **stats):
    made = Stage(run.iteration(iteration) / name, name, "key")
    made.start()
    return made.commit([{}] * stats.pop("rejected", 0), num_in=10, **stats)


def shard(folder, number, **stats):
    aside = folder / f".aside-{number}"
    aside.mkdir(parents=True)
    commit(aside, folder / f"shard-{number:05d}", stage="shard", key="key", **stats)


def test_running_generations_tell_shards_tokens_and_the_holder(run):
    run.event("stage_start", stage="generations", iteration=1)
    folder = run.iteration(1)
    for number in range(2):
        stats = {"num_tokens": 300, "num_prompt_tokens": 200, "num_cached_tokens": 50, "engine_seconds": 1.5}
        shard(folder / ".generations-abc", number, **stats)
    shard(folder / ".scores-abc", 0)
    shard(folder / ".generations-older", 7)
    os.utime(folder / ".generations-older", (0, 0))  # of another key, from before
    with run.locked():
        found = status(run)
    assert found["state"] == "running"
    assert found["stage"]["shards"] == {"total": 3, "generations": 2, "scores": 1}
    assert found["engine"] == {"num_tokens": 600, "tokens_per_engine_s": 200.0, "cache_hit_rate": 0.25}
    text = describe(found)
    assert "iteration 1 of 3: generations, generations 2 of 3 shards, scores 1 of 3 shards" in text
    assert "600 tokens generated, 200.0 per second and engine, 25% of the prompt tokens from the cache" in text
    assert text.endswith("next       nothing: the driver is running")


def test_an_evaluation_counts_the_shards_of_its_chains_and_of_its_parallel_samples(run):
    run.event("stage_start", stage="evaluation", iteration=1)
    work = run.iteration(1) / ".evaluation-abc"
    for inside in ("generations", "scores", "parallel/.generations-def"):
        shard(work / inside, 0)
    assert status(run)["stage"]["shards"] == {"total": 4, "generations": 2, "scores": 1}


def test_a_training_tells_its_last_step_and_loss(run):
    run.event("stage_start", stage="checkpoint", iteration=1)
    for step in (4, 9):
        run.event("training", iteration=1, step=step, num_steps=20, loss=0.5 / (step + 1), learning_rate=1e-6, gradient_norm=2.0)
    found = status(run)
    assert found["stage"]["training"] == {"step": 9, "num_steps": 20, "loss": 0.05, "learning_rate": 1e-6, "gradient_norm": 2.0}
    assert "iteration 1 of 3: checkpoint, step 10 of 20, loss 0.0500" in describe(found)


def test_a_driver_that_ended_without_a_word_is_dead_and_the_command_is_next(run):
    run.event("stage_start", stage="pairs", iteration=1)
    found = status(run)
    assert found["state"] == "dead"
    assert found["next"] == COMMAND
    assert f"host {socket.gethostname()}, process 1, job raysubmit_1" in describe(found)


def test_a_failed_driver_tells_its_error_and_a_later_one_calls_it_old(run):
    run.event("driver_failed", error="UserError: model.path: gone\nmore")
    assert status(run)["state"] == "failed"
    assert "error      UserError: model.path: gone\n" in describe(status(run))
    run.event("driver_start", pid=2, job=None, command="")
    with run.locked():
        found = status(run)
    assert (found["state"], found["attempts"]) == ("running", 2)
    assert "old error  UserError: model.path: gone" in describe(found)


def test_a_finished_run_names_rejected_rows_and_the_last_decision(run):
    stage(run, 1, "pairs", rejected=3)
    run.event("decision", iteration=1, action="stop", reason="nothing improves")
    run.event("driver_end", seconds=1.0)
    found = status(run)
    assert found["state"] == "finished"
    assert found["rejected"] == [{"iteration": 1, "stage": "pairs", "num_rejected": 3, "num_in": 10}]
    text = describe(found)
    assert "rejected   iteration 1: pairs: 3 of 10 rows" in text
    assert "decision   iteration 1: stop: nothing improves" in text
    assert text.endswith(f"next       read {run.root}/report.html")


def test_another_hosts_driver_is_unknown_while_its_events_are_fresh(run):
    hold(run, "elsewhere")
    assert status(run)["state"] == "unknown"
    assert "check on host elsewhere whether process 1 is alive; if not: python" in describe(status(run))
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=600)
    assert status(run, later)["state"] == "dead"


def test_a_torn_event_and_a_lock_without_events_are_no_fault(run, tmp_path):
    with open(run.root / "events.jsonl", "ab") as file:
        file.write(b'{"time": "20')
    assert status(run)["torn_events"] == 1
    empty = Run(tmp_path / "empty")
    with empty.locked():
        assert status(empty)["state"] == "running"
    assert status(empty)["state"] == "new"
    assert status(empty)["next"] == f"python jobs/iterate.py RECIPE.toml --run {empty.root}"


def test_looking_changes_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    describe(status(run))
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before
    with run.locked():
        pass


def test_a_folder_that_is_no_run_is_refused_by_the_command(tmp_path, capsys):
    with pytest.raises(UserError, match="is not a run directory"):
        status(Run(tmp_path))
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: is not a run directory")


def test_the_command_prints_json(run):
    result = subprocess.run([sys.executable, ROOT / "jobs" / "status.py", run.root, "--json"], capture_output=True, text=True)
    assert (result.returncode, json.loads(result.stdout)["state"]) == (0, "dead"), result.stderr
