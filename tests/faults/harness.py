"""Faults from outside: start the real command, wait for a moment in its events, signal a process by its role, submit again.

Nothing in the package knows of this. A fault that found no process to hit, or came too late, fails its test.
"""

import contextlib
import functools
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from evolve_ray.store import rows
from evolve_ray.store.manifest import MANIFEST
from evolve_ray.watch.cluster import title
from tests.real.conftest import SMALL, Command, start

Moment = Callable[[list[dict]], object]
POOLS = {"engine": "engines", "scorer": "scorers"}
DRAFTED = ("prompts", "generations", "scores", "pairs")  # the stages before a training


ROLES: dict[str, Callable[[psutil.Process], bool]] = {
    "engine's child": lambda process: "EngineCore" in title(process),
    "train worker": lambda process: title(process).startswith("ray::RayTrainWorker"),
    "train controller": lambda process: title(process).startswith("ray::TrainController"),
    "trainings": lambda process: title(process).startswith("ray::Trainings"),
    "meeting point of ranks": lambda process: title(process).startswith("ray::SynchronizationActor"),
    "raylet": lambda process: "raylet/raylet" in title(process),
    "agent": lambda process: "ray::DashboardAgent" in title(process),
}


def family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


@functools.cache
def authenticate() -> None:
    """Lets this process ask a local Ray, which has the token of its user; the commands that it starts are left as they are."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "")
        patch.delenv("RAY_AUTH_MODE")
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def pool_pids(pid: int, pool: str) -> set[int]:
    """The processes of a pool's actors in the local Ray of a driver, as Ray itself knows them.

    A title names no pool, and while an actor works it is the name of its task.
    """
    from ray._raylet import GcsClientOptions, GlobalStateAccessor
    from ray.core.generated.gcs_pb2 import ActorTableData

    authenticate()
    for process in family(pid):
        address = re.search(r"raylet/raylet .*--gcs-address=(\S+)", title(process))
        if address:
            options = GcsClientOptions.create(address[1], None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
            accessor = GlobalStateAccessor(options)
            actors = map(ActorTableData.FromString, accessor.get_actor_table(None, None) if accessor.connect() else ())
            return {actor.pid for actor in actors if actor.state == ActorTableData.ALIVE and actor.repr_name.startswith(pool)}
    return set()


def all_of(pid: int, role: str) -> list[psutil.Process]:
    """The processes of that role among those that `pid` started."""
    if role == "driver":
        return [psutil.Process(pid)]
    if role in POOLS:
        found = pool_pids(pid, POOLS[role])
        return [process for process in family(pid) if process.pid in found]
    return [process for process in family(pid) if ROLES[role](process)]


def find(pid: int, role: str, timeout: float = 60) -> psutil.Process:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := all_of(pid, role):
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"no {role} among {sorted({title(process)[:60] for process in family(pid)})}")


# Moments in a run, by its events.


def in_stage(stage: str, iteration: int = 1) -> Moment:
    """While the stage runs."""

    def at(events: list[dict]) -> bool:
        told = [e for e in events if e["event"] in ("stage_start", "stage_end")]
        return bool(told) and (told[-1]["event"], told[-1]["stage"], told[-1]["iteration"]) == ("stage_start", stage, iteration)

    return at


def after_shards(number: int, stage: str = "generations", iteration: int = 1) -> Moment:
    return lambda events: (
        sum(e["event"] == "shard" and (e["stage"], e["iteration"]) == (stage, iteration) for e in events) >= number
    )


def after_step(run: Path, step: int) -> Moment:
    """When a training step is stored and the next stored step is not."""
    return lambda _: list((run / "iteration-01").glob(f".checkpoint-*/steps/step-{step:06d}/{MANIFEST}"))


def last_stored(run: Path) -> int:
    """The last step of iteration 1's training that is committed, 0 for none."""
    found = (run / "iteration-01").glob(f".checkpoint-*/steps/step-*/{MANIFEST}")
    return max((int(path.parent.name[5:]) for path in found), default=0)


def first_steps_of_trainings(run: Path) -> list[int]:
    """The first step that each attempt at iteration 1's training tells of; attempts begin with a loaded model."""
    found: list[int] = []
    fresh = True
    for event in rows.read_jsonl(run / "events.jsonl"):
        if event.get("iteration") == 1 and event["event"] == "model_loaded":
            fresh = True
        elif event.get("iteration") == 1 and event["event"] == "training" and fresh:
            found.append(event["steps"][0]["step"])
            fresh = False
    return found


@contextlib.contextmanager
def held_after_two_steps(run: Path, ranks: Callable[[], list[psutil.Process]]) -> Iterator[list[psutil.Process]]:
    """Both workers of a training, stopped once step 2 is stored: so it is not over when a fault comes."""
    deadline, found, stored = time.monotonic() + 600, [], after_step(run, 2)
    while not stored([]):
        assert time.monotonic() < deadline, "no step was stored"
        if len(found) < 2 or not found[0].is_running():
            found = ranks()
        time.sleep(0.005)
    assert len(found) == 2, found
    for rank in found:
        rank.suspend()
    try:
        assert not (run / "iteration-01/checkpoint").exists(), "the training was over before the fault"
        yield found
    finally:
        for rank in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.resume()


@dataclass
class Hit:
    """What a fault did."""

    role: str
    pid: int
    families: list[psutil.Process]


def strike(
    command: Command,
    role: str,
    number: signal.Signals,
    moment: Moment,
    *,
    stage: str = "",
    iteration: int = 1,
    delay: float = 0.0,
    timeout: float = 600,
) -> Hit:
    """Waits for the moment, then signals a process of the role.

    With `stage`, the process is stopped first, and goes on where the stage is not running: so the fault is inside of it.
    """
    command.wait_for(moment, timeout, tick=0.01)
    time.sleep(delay)
    target = find(command.process.pid, role)
    while stage and role == "driver":
        target.suspend()
        if in_stage(stage, iteration)(command.events()):
            break
        assert not ended_stage(command.events(), stage, iteration), f"{stage} was over before the fault"
        target.resume()
        time.sleep(0.002)
    assert command.process.poll() is None, "the command was over before the fault"
    members = family(command.process.pid)
    os.kill(target.pid, number)
    if number != signal.SIGKILL and stage and role == "driver":
        target.resume()
    return Hit(role, target.pid, members)


def ended_stage(events: list[dict], stage: str, iteration: int) -> bool:
    """Whether the stage ended since the driver's last start."""
    since = max((at for at, e in enumerate(events) if e["event"] == "driver_start"), default=0)
    kinds = [e["event"] for e in events[since:] if (e.get("stage"), e.get("iteration")) == (stage, iteration)]
    return "stage_end" in kinds and kinds[-1] != "stage_start"


def assert_hit_inside(run: Path, stage: str, iteration: int = 1) -> None:
    """The last that the events of a dead driver tell is that this stage began."""
    lines = (run / "events.jsonl").read_text().splitlines()
    assert in_stage(stage, iteration)([json.loads(line) for line in lines]), f"the fault did not hit inside of {stage}"


# Shards at work, by the attempts that their workers write down.


def at_work(run: Path, pattern: str) -> dict[Path, int]:
    """Shards that a worker has begun and not committed, by their attempts file, with the deaths that it counts.

    `pattern` names the working folder of the stage, below the iteration.
    """
    found = {}
    for path in (run / "iteration-01").glob(f"{pattern}/.attempts/shard-*.json"):
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(path.read_bytes())
            if state["running"] == "all" and not (path.parents[1] / path.stem / MANIFEST).exists():
                found[path] = state["deaths"]
    return found


def strike_shard(
    command: Command,
    role: str,
    pattern: str,
    *,
    number: signal.Signals = signal.SIGKILL,
    shard: Path | None = None,
    deaths: int = 0,
    timeout: float = 400,
) -> Path:
    """Signals a process of the role while its pool's worker is inside of a shard that counts so many deaths.

    The worker is stopped, then looked at: so the shard is not committed when it dies. Gives back the shard's attempts file.
    """
    host = "engine" if role.startswith("engine") else role
    deadline, target = time.monotonic() + timeout, None
    while time.monotonic() < deadline:
        assert command.process.poll() is None, "the command was over before the fault"
        wanted = [path for path, count in at_work(command.run, pattern).items() if shard in (None, path) and count == deaths]
        if not wanted and target is not None and target.is_running():
            time.sleep(0.005)
            continue
        if target is None or not target.is_running():
            target = next(iter(all_of(command.process.pid, host)), None)
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            target.suspend()
            inside = at_work(command.run, pattern).get(wanted[0]) == deaths
            if inside:
                hit = target if host == role else find(command.process.pid, role, 20)
                hit.send_signal(number)
            if not inside or host != role:
                target.resume()
            if inside:
                return wanted[0]
    raise AssertionError(f"no {role} was at work in {pattern} with {deaths} deaths")


def await_deaths(command: Command, shard: Path, number: int, timeout: float = 300) -> None:
    """Until the next worker of the shard has written down that so many died of it."""
    deadline, told = time.monotonic() + timeout, None
    while time.monotonic() < deadline and command.process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(shard.read_bytes())["deaths"]
            if told == number:
                return
        time.sleep(0.005)
    raise AssertionError(f"{shard}: counts {told} deaths, not {number}")


# Commands.


def arguments(*overrides: str, iterations: int = 1) -> list[str]:
    return [*SMALL, "--iterations", str(iterations), *overrides]


def finish(run: Path, *overrides: str, iterations: int = 1, timeout: float = 1200) -> Command:
    """The same command again, to its end."""
    with ended(start(run, *arguments(*overrides, iterations=iterations))) as command:
        assert command.wait(timeout) == 0
    return command


def last_line(command: Command) -> str:
    return command.log.read_text(errors="replace").strip().splitlines()[-1]


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
