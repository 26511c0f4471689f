"""A stage that gets on with nothing is ended wherever it waits; one that gets on is left alone."""

import signal
import time
from pathlib import Path

import pytest

from evolve_ray import config as options
from evolve_ray.errors import StalledError
from evolve_ray.inputs import Context, Policy
from evolve_ray.refine import load_template
from evolve_ray.store import Run, Stage


@pytest.fixture
def context(recipe, tmp_path):
    run = Run(tmp_path / "run")
    run.iteration(1).mkdir(parents=True)
    run.event("driver_start")
    template = load_template("tiny", "conversation")
    return Context(options.load(recipe()), run, print, print, False, template, Policy(Path(), ""))


def stage_of(context):
    return Stage(context.run.iteration(1) / "checkpoint", "checkpoint", "key")


def test_stage_without_progress_is_ended_with_exit_code_seven(context):
    with pytest.raises(StalledError, match=r"checkpoint: made no progress for 0\.4 s") as caught, \
            context.deadline("checkpoint", 0.4, stage_of(context)):  # fmt: skip
        time.sleep(60)
    assert caught.value.exit_code == 7


def ray_waits():
    """As `ray.get` does: of what a handler raises it drops everything but a KeyboardInterrupt, in whose place comes its own."""
    ended = time.monotonic() + 60
    while time.monotonic() < ended:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None
        except Exception:
            pass


def test_stage_without_progress_is_ended_where_ray_waits(context):
    with pytest.raises(StalledError, match="made no progress"), context.deadline("checkpoint", 0.4, stage_of(context)):
        ray_waits()


def test_interrupt_of_a_stage_that_is_not_stalled_stays_one(context):
    with pytest.raises(KeyboardInterrupt), context.deadline("checkpoint", 60.0, stage_of(context)):
        raise KeyboardInterrupt


@pytest.mark.parametrize("sign", ["event", "step"])
def test_stage_that_gets_on_is_left_alone(context, sign):
    stage = stage_of(context)
    with context.deadline("checkpoint", 2.0, stage):
        for number in range(12):
            time.sleep(0.25)
            if sign == "event":
                context.run.event("training")
            else:
                (stage.work / "steps" / f"step-{number}").mkdir(parents=True)


def test_deadline_is_gone_after_its_stage(context):
    before = signal.getsignal(signal.SIGALRM)
    with context.deadline("checkpoint", 0.4, stage_of(context)):
        pass
    time.sleep(0.6)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
