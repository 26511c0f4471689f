"""Named faults of the real command: a process of each role dies or hangs, the run ends as its undisturbed twin."""

import os
import shutil
import signal
import time

import pytest

from evolve_ray.store import read_manifest
from tests.faults.harness import (
    after_shards,
    arguments,
    assert_equals_twin,
    assert_kept,
    committed_files,
    ended,
    family,
    find,
    finish,
    in_stage,
    strike,
    title,
)
from tests.real.conftest import assert_gone, fork, start

STAGES = ("generations", "pairs", "checkpoint", "probe", "evaluation")


@pytest.mark.parametrize("stage", STAGES)
def test_driver_killed_in_each_stage(small, stage):
    run = fork(small, f"driver-{stage}")
    with ended(start(run, *arguments())) as command:
        hit = strike(command, "driver", signal.SIGKILL, in_stage(stage))
        assert command.process.wait(30) == -signal.SIGKILL
        before = committed_files(run)
    assert_gone(hit.families)
    finish(run)
    assert_kept(before)
    assert_equals_twin(run, small.run)


AT_WORK = {"generations": after_shards(1), "evaluation": in_stage("evaluation")}


@pytest.mark.parametrize("stage", AT_WORK)
@pytest.mark.parametrize("role", ["engine", "engine's child"])
def test_engine_killed_twice_in_a_row(small, role, stage):
    run = fork(small, f"killed-{role.replace(' ', '-').replace(chr(39), '')}-{stage}")
    # The second process of vLLM exists only where it is asked for.
    child = ('engine.env.VLLM_ENABLE_V1_MULTIPROCESSING="1"',) if role == "engine's child" else ()
    with ended(start(run, *arguments("engine.actors=1", *child))) as command:
        first = strike(command, role, signal.SIGKILL, AT_WORK[stage])
        deadline = time.monotonic() + 300
        while (second := find(command.process.pid, role, 300)).pid == first.pid:
            assert time.monotonic() < deadline, "no new engine was started"
            time.sleep(0.2)
        time.sleep(5)
        os.kill(second.pid, signal.SIGKILL)
        assert command.wait(1200) == 0
    assert_equals_twin(run, small.run)


@pytest.mark.parametrize("stage", AT_WORK)
def test_reward_actor_killed(small, stage):
    run = fork(small, f"killed-scorer-{stage}")
    with ended(start(run, *arguments())) as command:
        strike(command, "scorer", signal.SIGKILL, AT_WORK[stage])
        assert command.wait(1200) == 0
    assert_equals_twin(run, small.run)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_train_worker_killed_at_a_step(small, step):
    """Steps are stored every 2: after 1 nothing is, after 2 and 3 one is."""
    run = fork(small, f"killed-train-{step}")
    reference = run / "iteration-01" / "reference"
    with ended(start(run, *arguments("trainer.checkpoint_steps=1"))) as command:
        stored = f".checkpoint-*/steps/step-{step:06d}/MANIFEST.json"
        strike(command, "train worker", signal.SIGKILL, lambda _: bool(list((run / "iteration-01").glob(stored))))
        kept = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
        assert command.wait(1200) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "the reference was written again"
    assert_equals_twin(run, small.run)


def test_train_worker_killed_before_the_first_step(small):
    """While it computes the reference, or loads what it needs for that."""
    run = fork(small, "killed-reference")
    with ended(start(run, *arguments())) as command:
        strike(command, "train worker", signal.SIGKILL, lambda events: any(e["event"] == "model_loaded" for e in events))
        assert command.wait(1200) == 0
    assert_equals_twin(run, small.run)


def test_train_worker_killed_while_it_stores_a_step(small):
    run = fork(small, "killed-store")
    with ended(start(run, *arguments("trainer.checkpoint_steps=1"))) as command:
        strike(
            command,
            "train worker",
            signal.SIGKILL,
            lambda _: bool(list((run / "iteration-01").glob(".checkpoint-*/steps/.step-*"))),
        )
        assert command.wait(1200) == 0
    assert_equals_twin(run, small.run)


def test_hanging_engine_is_ended_and_its_shard_done_by_the_next(small):
    run = fork(small, "hang")
    with ended(start(run, *arguments("engine.stall_s=90"))) as command:
        hit = strike(command, "engine", signal.SIGSTOP, after_shards(1))
        assert command.wait(1200) == 0
        assert not any(process.pid == hit.pid for process in family(command.process.pid))
    assert_equals_twin(run, small.run)


def test_engine_that_hangs_every_time_ends_with_exit_code_seven(small):
    run = fork(small, "hangs")
    with ended(start(run, *arguments("engine.stall_s=90", "engine.actors=1", "engine.max_restarts=0"))) as command:
        strike(command, "engine", signal.SIGSTOP, after_shards(1))
        assert command.process.wait(600) == 7
    last = command.log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: generations: shard ")
    finish(run)
    assert_equals_twin(run, small.run)


def test_hanging_training_ends_with_exit_code_seven_and_is_resumed(small):
    run = fork(small, "hanging-training")
    with ended(start(run, *arguments("trainer.stall_s=90"))) as command:
        hit = strike(command, "train worker", signal.SIGSTOP, in_stage("checkpoint"), delay=20)
        assert command.process.wait(600) == 7
        assert "checkpoint: made no progress for 90 s" in command.log.read_text().strip().splitlines()[-1]
    assert_gone(hit.families)
    finish(run)
    assert_equals_twin(run, small.run)


@pytest.mark.parametrize("stage", ["generations", "checkpoint"])
def test_sigterm_ends_the_run_within_thirty_seconds_and_it_can_be_resumed(small, stage):
    run = fork(small, f"sigterm-{stage}")
    with ended(start(run, *arguments())) as command:
        hit = strike(command, "driver", signal.SIGTERM, in_stage(stage), delay=10)
        started = time.monotonic()
        assert command.process.wait(60) == 143
        assert time.monotonic() - started < 30
        assert "continue with: python jobs/iterate.py" in command.log.read_text().strip().splitlines()[-1]
    assert_gone(hit.families)
    finish(run)
    assert_equals_twin(run, small.run)


@pytest.mark.parametrize("stage", ["generations", "checkpoint"])
def test_run_whose_ray_is_lost_ends_within_a_minute_and_can_be_resumed(small, stage):
    """The node under the driver: its raylet is gone, and with it everything on it."""
    run = fork(small, f"lost-node-{stage}")
    with ended(start(run, *arguments())) as command:
        hit = strike(command, "raylet", signal.SIGKILL, in_stage(stage), delay=15)
        started = time.monotonic()
        assert command.process.wait(120) != 0
        assert time.monotonic() - started < 60
    assert_gone(hit.families)
    finish(run)
    assert_equals_twin(run, small.run)


def test_damage_in_a_real_run_is_refused_and_its_repair_makes_the_same_bytes(small):
    run = small.run.with_name("damaged")
    shutil.copytree(small.run, run, copy_function=shutil.copy2)
    path = run / "iteration-01" / "pairs" / "pairs.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    command = start(run, *arguments())
    assert command.wait(120) == 4
    assert f"delete {path.parent}" in command.log.read_text().strip().splitlines()[-1]
    shutil.rmtree(path.parent)
    finish(run)
    assert_equals_twin(run, small.run)


@pytest.mark.parametrize("setting", [{"PYTHONHASHSEED": "7", "LC_ALL": "C"}, {"PYTHONHASHSEED": "8", "LC_ALL": "C.UTF-8"}])
def test_another_hash_seed_and_locale_give_the_same_pairs(small, monkeypatch, setting):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    run = fork(small, f"locale-{setting['PYTHONHASHSEED']}")
    finish(run, "engine.actors=1")
    assert_equals_twin(run, small.run)


def test_another_number_of_train_workers_is_refused_with_both_numbers(small):
    run = fork(small, "world")
    with ended(start(run, *arguments())) as command:
        command.wait_for(lambda _: list((run / "iteration-01").glob(".checkpoint-*/steps/step-000002/MANIFEST.json")))
        command.kill()
    command = start(run, *arguments("trainer.workers=1"))
    assert command.wait(600) == 2
    assert "trainer.workers" in command.log.read_text().strip().splitlines()[-1]


def test_secrets_of_the_environment_are_nowhere_in_the_run(small, monkeypatch):
    secrets = {
        name: f"canary-{number}-7f3a9c" for number, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"))
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run = fork(small, "secrets")
    command = finish(run)
    for path in [command.log, *(path for path in run.rglob("*") if path.is_file())]:
        data = path.read_bytes()
        assert [name for name, value in secrets.items() if value.encode() in data] == [], path


def test_the_dashboard_and_the_job_api_listen_on_loopback_alone(small):
    import psutil

    run = fork(small, "listens")
    with ended(start(run, *arguments("ray.dashboard=true"))) as command:
        command.wait_for(after_shards(1))
        shown = [process for process in family(command.process.pid) if "dashboard/dashboard.py" in title(process)]
        assert shown, "no dashboard was started"
        found = [c.laddr.ip for process in shown for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert set(found) <= {"127.0.0.1", "::1"}, found
    assert read_manifest(run / "iteration-01" / "checkpoint") is None
