"""Kills a run at seeded random moments until it is done: `python tests/faults/soak.py --kills 20 --seed 0 [--out DIR]`.

Makes an undisturbed twin first (or takes the one in --out), then starts the same command again and again. A run that is over
must have ended as its twin did: nothing committed was computed again, and a kill of the training cost one checkpoint interval
at most. Then a new run begins, until all kills are done. Exit code 0 if all did; every kill is printed with its moment.
Where the kill of another process leaves the driver alive, the driver is killed some seconds later: that is a kill like any other.
"""

import argparse
import datetime
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.harness import all_of, arguments, ended, family, finish, last_line, last_stored, title
from tests.faults.twin import Kept, assert_equals_twin, assert_kept, committed_files
from tests.real.conftest import Command, fork, start

LONGEST_S = 60.0  # until a kill: every stage is reached, for what is committed stays
ORPHANS_S = 90.0  # Ray's own agents notice the end of their driver within a minute
TARGETS = ("driver", "engine", "scorer", "train worker", "raylet")  # and every other process of the run, as one role
INTERVAL = 2  # trainer.checkpoint_steps of the small run


def targets(command: Command) -> dict[str, list[psutil.Process]]:
    """The processes of each role that are there now."""
    found = {role: all_of(command.process.pid, role) for role in TARGETS}
    known = {process for processes in found.values() for process in processes}
    found["other"] = [process for process in family(command.process.pid) if process not in known]
    return {role: processes for role, processes in found.items() if processes}


def name_of(process: psutil.Process) -> str:
    """In a word: what a process of Ray calls itself, or the script or program that it runs."""
    words = title(process).split()
    own = (word for word in words if word.startswith("ray::") or word.endswith(".py"))
    return "/".join(next(own, words[0] if words else "?").split("/")[-2:])


def events_of(run: Path) -> list[dict]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")] if path.exists() else []


def told_by(command: Command) -> list[dict]:
    """The events since this driver told of its start."""
    events = events_of(command.run)
    own = (at for at, event in enumerate(events) if (event["event"], event.get("pid")) == ("driver_start", command.process.pid))
    return events[next(own, len(events)) :]


def stage_of(command: Command) -> str:
    """The stage that this driver told of last."""
    return next((event["stage"] for event in reversed(told_by(command)) if event["event"] == "stage_start"), "start")


def work_of(run: Path) -> tuple[Counter[tuple[str, int]], Counter[int]]:
    """How often each shard, by stage, and each training step of iteration 1 was told of."""
    told = [event for event in events_of(run) if event.get("iteration") == 1]
    steps = Counter(step["step"] for event in told if event["event"] == "training" for step in event["steps"])
    return Counter((event["stage"], event["shard"]) for event in told if event["event"] == "shard"), steps


class Victim:
    """A run that is killed again and again, and what must hold of it."""

    def __init__(self, run: Path):
        self.run = run
        self.kept: Kept = {}
        self.kills_of_training = 0
        self.stored: list[tuple[int, int]] = []  # at each kill: how many events were told, the last stored training step

    def kill(self, command: Command, role: str, process: psutil.Process) -> str:
        """SIGKILL; gives back what was hit, "" if the process was over before."""
        self.kept = committed_files(self.run) | self.kept  # what was seen first counts
        try:
            process.suspend()  # so that it cannot end between the look and the kill
            if process.status() == psutil.STATUS_ZOMBIE:
                return ""
            stage, name = stage_of(command), f"{role} ({name_of(process)})" if role == "other" else role
            self.stored.append((len(events_of(self.run)), last_stored(self.run)))
            process.kill()
        except psutil.NoSuchProcess:
            return ""
        self.kills_of_training += stage == "checkpoint"
        if role == "driver":
            assert command.process.wait(60) == -signal.SIGKILL
        return f"{name} in {stage}"

    def settle(self, twin: Path) -> str:
        """Once it is over: it is its twin, no file was written again, and little was computed again."""
        assert_equals_twin(self.run, twin)
        if self.kept:
            assert_kept(self.kept)
        self.assert_resumed()
        return self.assert_little_again(twin)

    def assert_resumed(self) -> None:
        """A training that begins after a kill goes on from the step that was stored then."""
        for number, stored in self.stored:
            later = (event for event in events_of(self.run)[number:] if event.get("iteration") == 1)
            any(event["event"] == "model_loaded" for event in later)  # up to there an older training may tell
            first = next((event["steps"][0]["step"] for event in later if event["event"] == "training"), stored)
            assert first >= stored, f"a training began at step {first}, though step {stored} was stored"

    def assert_little_again(self, twin: Path) -> str:
        """No shard is committed, which is when it is told of, more often than by the twin; few steps come again."""
        (shards, steps), (twin_shards, twin_steps) = work_of(self.run), work_of(twin)
        again = shards - twin_shards
        assert not again, f"committed shards were computed again: {again}"
        repeated, kills = (steps - twin_steps).total(), self.kills_of_training
        assert repeated <= INTERVAL * kills, f"{repeated} training steps were computed again in {kills} kills of the training"
        return f"{shards.total()} shards (twin: {twin_shards.total()}), {repeated} steps again in {kills} kills of the training"


def assert_ended_with_a_sentence(command: Command) -> None:
    """A driver that a kill of another process ended says why; one that came to its end is done.

    Where its raylet dies while it joins Ray, Ray itself ends it, without a word.
    """
    joined = any(event["event"] == "ray_joined" for event in told_by(command))
    if command.process.returncode and joined:
        said = last_line(command)
        assert said.startswith("error: "), f"exit code {command.process.returncode}, last line: {said}"


def over(command: Command, seconds: float) -> bool:
    """Whether the command ends within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and command.process.poll() is None:
        time.sleep(0.05)
    return command.process.poll() is not None


class Orphans:
    """What killed commands had started: all of it is gone some time after its driver."""

    def __init__(self) -> None:
        self.left: list[tuple[float, list[psutil.Process]]] = []

    def add(self, members: list[psutil.Process]) -> None:
        """Of a driver that has just ended."""
        self.left.append((time.monotonic() + ORPHANS_S, members))

    def check(self, *, wait: bool = False) -> None:
        """Those whose time is over; with `wait`, all."""
        while self.left and (wait or self.left[0][0] < time.monotonic()):
            deadline, members = self.left.pop(0)
            _, alive = psutil.wait_procs(members, timeout=max(1.0, deadline - time.monotonic()))
            assert not alive, f"orphans: {alive}"


def soak(out: Path, kills: int, seed: int) -> None:
    chance, hits, orphans = random.Random(seed), Counter[str](), Orphans()
    twin = out / "twin"
    if not (twin / "report.json").exists():
        finish(twin)
    reference = Command(twin, None, out / "twin.log")  # type: ignore[arg-type]
    longest = min(run_seconds(twin), LONGEST_S)

    def begin() -> Victim:
        return Victim(fork(reference, f"soak-{seed}-{time.time_ns()}"))

    def kill(command: Command, role: str, process: psutil.Process) -> None:
        if hit := victim.kill(command, role, process):
            hits[hit] += 1
            print(f"kill {hits.total()} of {kills}: {hit} {time.monotonic() - begun:.1f} s after its start", flush=True)

    victim, started = begin(), time.monotonic()
    while hits.total() < kills:
        orphans.check()
        begun = time.monotonic()
        with ended(start(victim.run, *arguments())) as command:
            if over(command, chance.uniform(2.0, longest)):
                assert command.process.returncode == 0, command.log.read_text()[-3000:]
                print(f"over before kill {hits.total() + 1}: {victim.settle(twin)}; a new run begins", flush=True)
                victim = begin()
                continue
            there = targets(command)
            role = chance.choice(sorted(there))
            members = set(family(command.process.pid))
            kill(command, role, chance.choice(there[role]))
            if role != "driver":
                # The run goes on by itself, or ends with a sentence; either way the next command continues.
                last = hits.total() == kills
                if over(command, 1200 if last else chance.uniform(5.0, 15.0)):
                    assert_ended_with_a_sentence(command)
                else:
                    assert not last, "the run did not go on after the kill"
                    members |= set(family(command.process.pid))
                    kill(command, "driver", psutil.Process(command.process.pid))
            orphans.add(list(members))
    finish(victim.run)
    told = victim.settle(twin)
    orphans.check(wait=True)
    print(f"{kills} kills, seed {seed}: equal to the twin; {time.monotonic() - started:.0f} s; {told}")
    print("; ".join(f"{number} {hit}" for hit, number in hits.most_common()))


def run_seconds(run: Path) -> float:
    """Seconds from the first to the last event of an undisturbed run."""
    lines = (run / "events.jsonl").read_text().splitlines()
    first, last = (datetime.datetime.fromisoformat(json.loads(lines[at])["time"]) for at in (0, -1))
    return max(10.0, (last - first).total_seconds())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="keeps the twin and the runs there (default: a temporary folder)")
    given = parser.parse_args()
    soak(given.out.resolve() if given.out else Path(tempfile.mkdtemp(prefix="soak-")), given.kills, given.seed)
