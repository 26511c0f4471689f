"""A run of policy gradients by token dies and goes on: numbers of pairs, the engine's log-probabilities and reference tokens
are those of its undisturbed twin, byte by byte."""

import signal

import pytest

from evolve_ray.store import rows
from tests.faults.harness import (
    after_shards,
    after_step,
    all_of,
    arguments,
    assert_hit_inside,
    ended,
    finish,
    first_steps_of_trainings,
    held_after_two_steps,
    strike,
)
from tests.faults.twin import assert_equals_twin, assert_kept, committed_files
from tests.real.conftest import assert_gone, fork, start

OVERRIDES = [
    "strategy.name=chains", "strategy.rounds=2", "strategy.samples=2", "selection.name=advantages", "sampling.logps=true",
    "training.objective=policy_gradient", "training.nll=0", "training.objective_args.level=token",
    "training.objective_args.length=batch", "training.objective_args.mismatch=truncate", "training.objective_args.kl=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def twin(small):
    """An undisturbed run of policy gradients, from the small run's activated model."""
    run = fork(small, "policy-gradient")
    (run / "config.json").unlink()
    command = start(run, *arguments(*OVERRIDES))
    assert command.wait() == 0
    reference = rows.read_table(run / "iteration-01" / "reference" / "reference.parquet")
    assert reference[0]["chosen_tokens"]
    return command


def test_driver_killed_in_generations_and_between_two_stored_steps(twin):
    run, members, kept = fork(twin, "policy-gradient-driver"), [], {}
    for stage, moment in {"generations": after_shards(1), "checkpoint": after_step(run, 2)}.items():
        with ended(start(run, *arguments(*OVERRIDES))) as command:
            hit = strike(command, "driver", signal.SIGKILL, moment, stage=stage)
            assert command.process.wait(30) == -signal.SIGKILL
        assert_hit_inside(run, stage)
        kept |= committed_files(run)
        members += hit.families
    finish(run, *OVERRIDES)
    assert_gone(members)
    assert_kept(kept)
    assert_equals_twin(run, twin.run)


def test_train_worker_killed_between_two_stored_steps(twin):
    run = fork(twin, "policy-gradient-worker", keep=("prompts", "generations", "scores", "pairs"))
    with ended(start(run, *arguments(*OVERRIDES))) as command:
        with held_after_two_steps(run, lambda: all_of(command.process.pid, "train worker")) as ranks:
            ranks[0].kill()
        assert command.wait(1200) == 0
    assert first_steps_of_trainings(run)[-1] == 2, "the training went on from the stored step"
    assert_equals_twin(run, twin.run)
