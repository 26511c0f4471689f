"""A stage that gets on with nothing is ended wherever it waits; one that gets on is left alone."""

import signal
import time
from pathlib import Path

import pytest

from evolve_ray.config.load import load
from evolve_ray.errors import StalledError
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.pools.retries import Heartbeat, heartbeats
from evolve_ray.refine.template import load_template
from evolve_ray.store.run import Run


@pytest.fixture
def context(recipe, tmp_path):
    run = Run(tmp_path / "run")
    run.iteration(1).mkdir(parents=True)
    run.event("driver_start")
    template = load_template("tiny", "conversation")
    return Context(load(recipe()), run, print, print, False, template, Policy(Path(), ""))


def deadline(context, stall_s, progress=lambda: None):
    return context.deadline("checkpoint", stall_s, progress, "submit it again")


def test_stage_without_progress_is_ended_with_exit_code_seven(context):
    said = r"^checkpoint: made no progress for 0\.4 s; submit it again$"
    with pytest.raises(StalledError, match=said) as caught, deadline(context, 0.4):
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
    with pytest.raises(StalledError, match="made no progress"), deadline(context, 0.4):
        ray_waits()


def test_interrupt_of_a_stage_that_is_not_stalled_stays_one(context):
    with pytest.raises(KeyboardInterrupt), deadline(context, 60.0):
        raise KeyboardInterrupt


@pytest.mark.parametrize("sign", ["event", "beat"])
def test_stage_that_gets_on_is_left_alone(context, tmp_path, sign):
    beats = Heartbeat(tmp_path, 0)
    beats.start(0)
    with deadline(context, 2.0, lambda: heartbeats(tmp_path)):
        for _ in range(12):
            time.sleep(0.25)
            if sign == "event":
                context.run.event("training")
            else:
                beats()


def test_signs_of_a_stage_that_nobody_works_at_are_none(tmp_path):
    assert heartbeats(tmp_path) == []


def test_deadline_is_gone_after_its_stage(context):
    before = signal.getsignal(signal.SIGALRM)
    with deadline(context, 0.4):
        pass
    time.sleep(0.6)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
