"""One small run of the real command, shared by the tests that look at it, and the means to start and kill others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.plain.conftest import tiny_model

__all__ = ["tiny_model"]

ROOT = Path(__file__).resolve().parents[2]
# The tiny recipe with less of everything: the same parts, a model that has learned little.
SMALL = [
    "toy.base_steps=40", "toy.num_train=300", "toy.num_heldout=24", "toy.num_out_of_domain=8", "toy.num_triples=192",
    "prompts.per_iteration=64", "engine.shard_prompts=16", "ray.dashboard=false", "trainer.checkpoint_steps=2",
    "engine.actors=1",
]  # fmt: skip


@dataclass
class Command:
    """`python jobs/iterate.py` as a child process with its run directory."""

    run: Path
    process: subprocess.Popen
    log: Path

    def wait(self, timeout: float = 1500) -> int:
        code = self.process.wait(timeout)
        if code:
            print(self.log.read_text()[-4000:])
        return code

    def events(self) -> list[dict]:
        path = self.run / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, found, timeout: float = 300, tick: float = 0.05) -> None:
        """Until `found(events)` is true; fails if the command ends first."""
        deadline = time.monotonic() + timeout
        while not found(self.events()):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, "the awaited event did not come"
            time.sleep(tick)

    def kill(self) -> list[psutil.Process]:
        """SIGKILL to the driver; gives back every process that it had started."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        return family


def assert_gone(family: list[psutil.Process]) -> None:
    """Ray's own agents notice the end of their driver within a minute; everything else goes at once."""
    _, alive = psutil.wait_procs(family, timeout=90)
    assert not alive, f"orphans: {[process.name() for process in alive]}"


def start(run: Path, *arguments: str, recipe: str = "tiny", address: str = "", cwd: Path = ROOT) -> Command:
    """The command as a process; with a Ray of its own unless `address` names one."""
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.parent / f"{run.name}-{time.time_ns()}.log"
    command = [
        sys.executable,
        str(ROOT / "jobs/iterate.py"),
        str(ROOT / f"jobs/recipes/{recipe}.toml"),
        "--run",
        str(run),
        *arguments,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if address:
        environment["RAY_ADDRESS"] = address
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, env=environment)
    return Command(run, process, log)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """The folder of all small runs: they share one tiny world there."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def small(place) -> Command:
    """An undisturbed run of one iteration. It has two engines; the others have one and must make the same pairs."""
    command = start(place / "small", *SMALL, "engine.actors=2", "--iterations", "1")
    assert command.wait() == 0
    return command


def fork(small: Command, name: str, *, keep: tuple[str, ...] = ()) -> Path:
    """A run directory in which iteration 0 of the small run is committed; of iteration 1 all but `keep` is still to do."""
    run = small.run.with_name(name)
    shutil.copytree(small.run, run, copy_function=shutil.copy2)
    for path in (run / "iteration-01").iterdir():
        if path.is_file():
            path.unlink()
        elif path.name not in keep:
            shutil.rmtree(path)
    (run / "events.jsonl").unlink()
    return run
