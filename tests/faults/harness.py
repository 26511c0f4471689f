"""Faults from outside: start the real command, wait for a moment in its events, signal a process by its role, submit again.

Nothing in the package knows of this. A fault that found no process to hit, or came too late, fails its test.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from evolve_ray import rows, verify
from evolve_ray.store import read_manifest
from tests.real.conftest import SMALL, Command, start

Moment = Callable[[list[dict]], bool]
ENGINE_MARK = "VLLM_ENABLE_V1_MULTIPROCESSING"  # in the environment of engines alone


def title(process: psutil.Process) -> str:
    """What a process calls itself; "" if it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def is_engine(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return title(process).startswith("ray::") and ENGINE_MARK in process.environ()
    return False


ROLES: dict[str, Callable[[psutil.Process], bool]] = {
    "engine": is_engine,
    "engine's child": lambda process: "EngineCore" in title(process),
    "scorer": lambda process: title(process).startswith(("ray::Host", "ray::scores: shard")) and not is_engine(process),
    "train worker": lambda process: title(process).startswith("ray::RayTrainWorker"),
    "raylet": lambda process: "raylet/raylet" in title(process),
    "gcs": lambda process: "gcs_server" in title(process),
}


def family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def find(pid: int, role: str, timeout: float = 60) -> psutil.Process:
    """A process of that role among those that `pid` started."""
    if role == "driver":
        return psutil.Process(pid)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for process in family(pid):
            if ROLES[role](process):
                return process
        time.sleep(0.2)
    raise AssertionError(f"no {role} among {sorted({title(process)[:60] for process in family(pid)})}")


# Moments in a run, by its events.


def in_stage(stage: str, iteration: int = 1) -> Moment:
    """While the stage runs."""

    def at(events: list[dict]) -> bool:
        kinds = [
            e["event"] for e in events if e.get("stage") == stage and e.get("iteration") == iteration and "stage_" in e["event"]
        ]
        return bool(kinds) and kinds[-1] == "stage_start"

    return at


def after_shards(number: int, stage: str = "generations", iteration: int = 1) -> Moment:
    return lambda events: (
        sum(e["event"] == "shard" and (e["stage"], e["iteration"]) == (stage, iteration) for e in events) >= number
    )


def committed_files(run: Path) -> dict[Path, int]:
    """Every committed file with its time: none of them may ever change."""
    found = {}
    for manifest in run.rglob("MANIFEST.json"):
        with contextlib.suppress(OSError):
            found[manifest] = manifest.stat().st_mtime_ns
    return found


@dataclass
class Hit:
    """What a fault did."""

    role: str
    pid: int
    families: list[psutil.Process]


def strike(
    command: Command, role: str, number: signal.Signals, moment: Moment, *, delay: float = 0.0, timeout: float = 600
) -> Hit:
    """Waits for the moment, then signals a process of the role."""
    command.wait_for(moment, timeout)
    time.sleep(delay)
    target = find(command.process.pid, role)
    assert command.process.poll() is None, "the command was over before the fault"
    members = family(command.process.pid)
    os.kill(target.pid, number)
    return Hit(role, target.pid, members)


def arguments(*overrides: str) -> list[str]:
    return [*SMALL, "--iterations", "1", *overrides]


def finish(run: Path, *overrides: str, timeout: float = 1200) -> Command:
    """The same command again, to its end."""
    command = start(run, *arguments(*overrides))
    assert command.wait(timeout) == 0
    return command


def assert_equals_twin(run: Path, twin: Path) -> None:
    """Rows, pairs, references and losses are those of the undisturbed run, and the run is sound."""
    ours, theirs = run / "iteration-01", twin / "iteration-01"
    assert (ours / "pairs/pairs.parquet").read_bytes() == (theirs / "pairs/pairs.parquet").read_bytes()
    for stage in ("prompts", "generations", "scores", "pairs", "reference"):
        mine, other = read_manifest(ours / stage, verify=True), read_manifest(theirs / stage, verify=True)
        assert mine is not None, stage
        assert other is not None, stage
        assert mine.identity == other.identity, stage
    losses = [[row["loss"] for row in rows.read_jsonl(folder / "checkpoint/training_log.jsonl")] for folder in (ours, theirs)]
    assert losses[0] == losses[1]
    found = verify.verify(run)
    assert found.faults == {}
    assert found.missing == {}


def assert_kept(before: dict[Path, int]) -> None:
    """What was committed before the fault is untouched, or moved whole into its finished stage."""
    for path, mtime in before.items():
        if path.exists():
            assert path.stat().st_mtime_ns == mtime, f"{path} was written again"


@contextlib.contextmanager
def ended(command: Command) -> Iterator[Command]:
    """Ends what is left of a command, by id, whatever the test found."""
    try:
        yield command
    finally:
        members = family(command.process.pid)
        for process in [*members, *([psutil.Process(command.process.pid)] if command.process.poll() is None else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
                process.kill()
