"""Named faults of the real command: processes of each role die in each stage, the run ends as its undisturbed twin.

Most of a run is the start of its processes, so a run meets several faults, one after the other.
"""

import itertools
import signal
import time

import pytest

from evolve_ray.store import rows
from evolve_ray.store.manifest import MANIFEST
from tests.faults.harness import (
    DRAFTED,
    after_shards,
    after_step,
    all_of,
    arguments,
    assert_hit_inside,
    await_deaths,
    ended,
    family,
    find,
    finish,
    first_steps_of_trainings,
    held_after_two_steps,
    in_stage,
    last_line,
    last_stored,
    strike,
    strike_shard,
)
from tests.faults.twin import assert_equal_evaluation, assert_equals_twin, assert_kept, committed_files, stage_identity
from tests.real.conftest import assert_gone, fork, start


def test_driver_killed_in_generations_pairs_checkpoint_probe_and_evaluation_of_one_run(small):
    run, members, kept = fork(small, "driver"), [], {}
    moments = {
        "generations": after_shards(1),
        "pairs": in_stage("generations"),
        "checkpoint": after_step(run, 2),
        "probe": in_stage("probe"),
        "evaluation": in_stage("evaluation"),
    }
    for stage, moment in moments.items():
        with ended(start(run, *arguments())) as command:
            if stage == "pairs":  # it takes milliseconds: the driver is stopped again and again until it is there
                command.wait_for(lambda _: num_scored(run) >= 3, 600)
            hit = strike(command, "driver", signal.SIGKILL, moment, stage=stage)
            assert command.process.wait(30) == -signal.SIGKILL
        assert_hit_inside(run, stage)
        if kept:
            assert_kept(kept)
        kept |= committed_files(run)
        members += hit.families
        if stage == "checkpoint":
            assert_other_number_of_workers_refused(run)
    finish(run)
    assert_gone(members)
    assert_kept(kept)
    assert_equals_twin(run, small.run)


def num_scored(run):
    """Shards of iteration 1 with committed scores."""
    return len(list((run / "iteration-01").glob(f"*scores*/shard-*/{MANIFEST}")))


def assert_other_number_of_workers_refused(run):
    """Both numbers and the way out; what is stored stays."""
    with ended(start(run, *arguments("trainer.workers=1"))) as command:
        assert command.wait(600) == 2
    said = last_line(command)
    assert "changed: trainer.workers (2 -> 1); use another --run, or submit with --rerun-changed" in said, said
    assert list((run / "iteration-01").glob(f".checkpoint-*/steps/step-000002/{MANIFEST}"))


@pytest.mark.parametrize("role", ["engine", "engine's child"])
def test_engine_killed_twice_in_a_shard_of_generations_and_in_one_of_the_evaluation(small, role):
    run = fork(small, f"killed-{role.replace(' ', '-').replace(chr(39), '')}")
    # The second process of vLLM exists only where it is asked for; on a CPU it takes new weights only if it may unpickle.
    asked = ('engine.env.VLLM_ENABLE_V1_MULTIPROCESSING="1"', 'engine.env.VLLM_ALLOW_INSECURE_SERIALIZATION="1"')
    child = asked if role == "engine's child" else ()
    with ended(start(run, *arguments("engine.actors=1", *child))) as command:
        for stage, pattern in {"generations": ".generations-*", "evaluation": ".evaluation-*/.generations-*"}.items():
            shard = strike_shard(command, role, pattern)
            await_deaths(command, shard, 1)
            assert in_stage(stage)(command.events()), stage
            assert strike_shard(command, role, pattern, shard=shard, deaths=1) == shard
            await_deaths(command, shard, 2)
            print(f"{role}: {shard.relative_to(run)} counts 2 deaths")
        assert command.wait(1200) == 0
    assert_equals_twin(run, small.run)


def test_reward_actor_killed_in_generations_and_evaluation_and_a_train_worker_between_two_stored_steps(small):
    run = fork(small, "killed-scorer")
    with ended(start(run, *arguments())) as command:
        await_deaths(command, strike_shard(command, "scorer", ".scores-*"), 1)
        with held_after_two_steps(run, lambda: all_of(command.process.pid, "train worker")) as ranks:
            ranks[0].kill()
        await_deaths(command, strike_shard(command, "scorer", ".evaluation-*/.scores-*"), 1)
        assert command.wait(1200) == 0
    assert first_steps_of_trainings(run)[-1] == 2, "the training went on from the stored step"
    assert_equals_twin(run, small.run)


def test_training_whose_meeting_point_controller_and_trainings_are_killed_goes_on_from_the_stored_step(small):
    """Two are Ray Train's own, the third is the actor that runs it; none is a rank that it replaces."""
    run = fork(small, "killed-controller", keep=DRAFTED)
    with ended(start(run, *arguments())) as command:
        with held_after_two_steps(run, lambda: all_of(command.process.pid, "train worker")):
            find(command.process.pid, "meeting point of ranks").kill()
        strike(command, "train controller", signal.SIGKILL, lambda events: num_loaded(events) == 2)
        strike(command, "trainings", signal.SIGKILL, lambda events: num_loaded(events) == 3)
        assert not (run / "iteration-01/checkpoint").exists(), "the fault came after the training"
        assert command.wait(1200) == 0
        assert num_loaded(command.events()) == 4
    assert first_steps_of_trainings(run)[-1] >= 2, "the training went on from the stored step"
    assert_equals_twin(run, small.run)


def num_loaded(events):
    """How many worker groups loaded the model that they train."""
    return sum(event["event"] == "model_loaded" for event in events)


def test_training_whose_workers_die_more_often_than_allowed_ends_with_a_sentence(small):
    run = fork(small, "killed-too-often", keep=DRAFTED)
    with ended(start(run, *arguments("trainer.max_failures=0"))) as command:
        strike(command, "train worker", signal.SIGKILL, lambda events: num_loaded(events) == 1)
        assert command.process.wait(600) == 5
    told = "error: checkpoint: processes of the training died more often than trainer.max_failures (0) allows; see their logs"
    assert last_line(command).startswith(told)
    finish(run)
    assert_equals_twin(run, small.run)


def test_train_worker_killed_before_the_first_step_while_it_stores_a_step_and_after_one(small):
    run = fork(small, "killed-train", keep=DRAFTED)
    iteration = run / "iteration-01"
    with ended(start(run, *arguments("trainer.checkpoint_steps=1", "trainer.max_failures=3"))) as command:
        # While it computes the reference, or loads what it needs for that.
        strike(command, "train worker", signal.SIGKILL, lambda events: any(e["event"] == "model_loaded" for e in events))
        assert not list(iteration.glob(".checkpoint-*/steps/*")), "a step was stored"
        stored = strike_storing(command)
        command.wait_for(lambda _: (iteration / "reference" / MANIFEST).exists())
        reference = {path: path.stat().st_mtime_ns for path in (iteration / "reference").iterdir()}
        strike(command, "train worker", signal.SIGKILL, lambda _: last_stored(run) >= stored, delay=0.1)
        assert not (iteration / "checkpoint").exists(), "the fault came after the training"
        assert command.wait(1200) == 0
    assert {path: path.stat().st_mtime_ns for path in reference} == reference, "the reference was written again"
    begun = first_steps_of_trainings(run)
    assert begun[-1] >= stored, f"attempts began at steps {begun}, though step {stored} was stored"
    assert_equals_twin(run, small.run)


def strike_storing(command):
    """SIGKILL to a train worker while a step is written aside and not committed; which step it was."""
    steps = "iteration-01/.checkpoint-*/steps"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert command.process.poll() is None, "the command was over before the fault"
        if not list(command.run.glob(f"{steps}/.step-*")):
            time.sleep(0.002)
            continue
        workers = all_of(command.process.pid, "train worker")
        for worker in workers:
            worker.suspend()
        try:
            aside = [int(path.name[6:]) for path in command.run.glob(f"{steps}/.step-*")]
            if workers and aside and not list(command.run.glob(f"{steps}/step-{aside[0]:06d}")):
                workers[0].kill()
                return aside[0]
        finally:
            for worker in workers:
                if worker.is_running():
                    worker.resume()
    raise AssertionError("no step was being stored")


def test_engine_and_training_that_hang_are_replaced_or_end_the_run_with_exit_code_seven(small):
    run = fork(small, "hangs")
    patient = ("engine.stall_s=90", "trainer.stall_s=90", "engine.actors=1")
    with ended(start(run, *arguments(*patient, "engine.max_restarts=0"))) as command:
        shard = int(strike_shard(command, "engine", ".generations-*", number=signal.SIGSTOP).stem[6:])
        engine, members = find(command.process.pid, "engine"), family(command.process.pid)
        assert command.process.wait(600) == 7
        assert last_line(command).startswith(f"error: generations: shard {shard}: its actor (engines) made no progress for 90 s")
    assert not engine.is_running(), "the stopped engine was left behind"
    assert_gone(members)

    with ended(start(run, *arguments(*patient))) as command:
        strike_shard(command, "engine", ".generations-*", number=signal.SIGSTOP)
        engine, kept = find(command.process.pid, "engine"), committed_files(run)
        command.wait_for(in_stage("checkpoint"), 600)
        assert not engine.is_running(), "the stopped engine was left behind"
        strike(command, "train worker", signal.SIGSTOP, in_stage("checkpoint"))
        members = family(command.process.pid)
        assert command.process.wait(600) == 7
        assert "checkpoint: made no progress for 90 s" in last_line(command)
    assert_gone(members)
    finish(run)
    assert_kept(kept)
    assert_equals_twin(run, small.run)


def test_sigterm_and_a_lost_ray_in_generations_and_in_checkpoint_end_the_run_with_a_sentence_and_it_is_resumed(small):
    """Each of the six within its time; then the same command to its end. A lost Ray is a raylet that is gone, by itself or after
    an agent of it."""
    run, members, kept = fork(small, "ended"), [], {}
    workers = {"generations": "engine", "checkpoint": "train worker"}  # once they are there, the driver has joined its Ray
    for stage, role in itertools.product(workers, ("driver", "raylet", "agent")):
        with ended(start(run, *arguments())) as command:
            command.wait_for(in_stage(stage), 600)
            find(command.process.pid, workers[stage], 120)
            number = signal.SIGTERM if role == "driver" else signal.SIGKILL
            hit = strike(command, role, number, in_stage(stage), delay=2)
            started = time.monotonic()
            code = command.process.wait(120)
            took, said = time.monotonic() - started, last_line(command)
            print(f"{role} in {stage}: exit code {code} after {took:.0f} s: {said}")
        if role == "driver":
            assert (code, took < 30) == (143, True), f"{stage}: {code} after {took:.0f} s"
            assert "continue with: python jobs/iterate.py" in said
        else:
            assert (code, took < 60) == (5, True), f"{stage}: {code} after {took:.0f} s"
            assert said.startswith("error: ray: "), said
            assert "submit the same command again" in said
        assert_hit_inside(run, stage)
        members += hit.families
        if kept:
            assert_kept(kept)
        kept |= committed_files(run)
    finish(run)
    assert_gone(members)
    assert_kept(kept)
    assert_equals_twin(run, small.run)


def test_driver_killed_in_the_base_evaluation_and_in_the_activation_of_a_run_made_from_nothing(small):
    """Only the tiny world is there, which all runs of a folder share."""
    run, members, kept = small.run.with_name("from-nothing"), [], {}
    for stage in ("base_evaluation", "checkpoint"):
        with ended(start(run, *arguments())) as command:
            moment = after_shards(1, stage, 0) if stage == "base_evaluation" else in_stage(stage, 0)
            delay = 0 if stage == "base_evaluation" else 10
            hit = strike(command, "driver", signal.SIGKILL, moment, stage=stage, iteration=0, delay=delay)
            assert command.process.wait(30) == -signal.SIGKILL
        assert_hit_inside(run, stage, 0)
        members += hit.families
        kept |= committed_files(run)
    finish(run)
    assert_gone(members)
    assert_kept(kept)
    ours, theirs = run / "iteration-00", small.run / "iteration-00"
    for stage in ("held_out", "activation_pairs", "checkpoint"):
        assert stage_identity(ours / stage) == stage_identity(theirs / stage), stage
    for stage in ("base_evaluation", "evaluation"):
        assert_equal_evaluation(ours / stage, theirs / stage)
    assert_equals_twin(run, small.run)


def test_driver_killed_in_the_second_iteration_whose_engines_load_fresh_what_the_twin_loads_in_place(small):
    """The twin is one process from iteration 1 on; of the other, iteration 1 is committed and its own engines never had it."""
    twin = fork(small, "two-twin")
    finish(twin, iterations=2)
    events = rows.read_jsonl(twin / "events.jsonl")
    assert sum(event["event"] == "driver_start" for event in events) == 1
    run = fork(small, "two", keep=tuple(path.name for path in (small.run / "iteration-01").iterdir()))
    with ended(start(run, *arguments(iterations=2))) as command:
        moment = after_shards(1, iteration=2)
        hit = strike(command, "driver", signal.SIGKILL, moment, stage="generations", iteration=2)
        assert command.process.wait(30) == -signal.SIGKILL
    assert_hit_inside(run, "generations", 2)
    kept = committed_files(run)
    finish(run, iterations=2)
    assert_gone(hit.families)
    assert_kept(kept)
    for iteration in (1, 2):
        assert_equals_twin(run, twin, iteration)
    pairs = [(run / f"iteration-{number:02d}/pairs/pairs.parquet").read_bytes() for number in (1, 2)]
    assert pairs[0] != pairs[1], "the second iteration is the first one"
