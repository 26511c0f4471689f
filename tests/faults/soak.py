"""Kills a run at seeded random moments until it is done: `python tests/faults/soak.py --kills 20 --seed 0 [--out DIR]`.

Makes an undisturbed twin first (or takes the one in --out), then starts the same command again and again. A run that is over
must have ended as its twin did: nothing committed was computed again, and a kill of the training cost one checkpoint interval
at most. Then a new run begins, until all kills are done. Exit code 0 if all did; every kill is printed with its moment.
"""

import argparse
import datetime
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.harness import all_of, arguments, family, finish, last_line
from tests.faults.twin import assert_equals_twin, assert_kept, committed_files
from tests.real.conftest import Command, assert_gone, fork, start

LONGEST_S = 60.0  # until a kill: every stage is reached, for what is committed stays
TARGETS = ("driver", "engine", "scorer", "train worker", "raylet")
INTERVAL = 2  # trainer.checkpoint_steps of the small run


def targets(command: Command) -> dict[str, psutil.Process]:
    """One process of each role that is there now."""
    found = {role: all_of(command.process.pid, role) for role in TARGETS}
    return {role: processes[0] for role, processes in found.items() if processes}


def events_of(run: Path) -> list[dict]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")] if path.exists() else []


def stage_of(run: Path) -> str:
    """The stage that the last events tell of."""
    return next((event["stage"] for event in reversed(events_of(run)) if event["event"] == "stage_start"), "start")


def work_of(run: Path) -> tuple[Counter[tuple[str, int]], Counter[int]]:
    """How often each shard, by stage, and each training step of iteration 1 was told of."""
    told = [event for event in events_of(run) if event.get("iteration") == 1]
    steps = Counter(step["step"] for event in told if event["event"] == "training" for step in event["steps"])
    return Counter((event["stage"], event["shard"]) for event in told if event["event"] == "shard"), steps


def assert_little_again(run: Path, twin: Path, hits: Counter[str]) -> str:
    """A shard is told of when it is committed, so no more often than the twin's; steps may come again up to the last stored."""
    (shards, steps), (twin_shards, twin_steps) = work_of(run), work_of(twin)
    again = shards - twin_shards
    assert not again, f"committed shards were computed again: {again}"
    kills = sum(number for hit, number in hits.items() if hit.endswith(" in checkpoint"))
    repeated = (steps - twin_steps).total()
    assert repeated <= INTERVAL * kills, f"{repeated} training steps were computed again in {kills} kills of the training"
    return f"{shards.total()} shards (twin: {twin_shards.total()}), {repeated} steps again in {kills} kills of the training"


def assert_ended_with_a_sentence(command: Command) -> None:
    """A driver that a kill of another process ended says why; one that came to its end is done.

    Where its raylet dies while it joins Ray, Ray itself ends it, without a word.
    """
    told = [event["event"] for event in events_of(command.run)]
    joined = "ray_joined" in told[max(at for at, kind in enumerate(told) if kind == "driver_start") :]
    if command.process.returncode and joined:
        said = last_line(command)
        assert said.startswith("error: "), f"exit code {command.process.returncode}, last line: {said}"


def soak(out: Path, kills: int, seed: int) -> None:
    chance, done = random.Random(seed), 0
    twin = out / "twin"
    if not (twin / "report.json").exists():
        finish(twin)
    reference = Command(twin, None, out / "twin.log")  # type: ignore[arg-type]
    longest = min(run_seconds(twin), LONGEST_S)
    members: dict[int, psutil.Process] = {}  # all that the killed commands had started
    run, hits, every = fork(reference, f"soak-{seed}-{time.time_ns()}"), Counter[str](), Counter[str]()
    started = time.monotonic()
    while done < kills:
        command = start(run, *arguments())
        moment = chance.uniform(2.0, longest)
        deadline = time.monotonic() + moment
        while time.monotonic() < deadline and command.process.poll() is None:
            time.sleep(0.1)
        if command.process.poll() is not None:
            assert command.process.returncode == 0, command.log.read_text()[-3000:]
            assert_equals_twin(run, twin)
            print(
                f"the run was over before kill {done + 1}: {assert_little_again(run, twin, hits)}; a new one begins", flush=True
            )
            run, hits = fork(reference, f"soak-{seed}-{time.time_ns()}"), Counter[str]()
            continue
        there = targets(command)
        role = chance.choice(sorted(there))
        before = committed_files(run)
        members |= {process.pid: process for process in family(command.process.pid)}
        stage = stage_of(run)
        os.kill(there[role].pid, signal.SIGKILL)
        done += 1
        hits[f"{role} in {stage}"] += 1
        every[f"{role} in {stage}"] += 1
        print(f"kill {done} of {kills}: {role} in {stage} after {moment:.1f} s", flush=True)
        if role != "driver":
            # The run goes on by itself, or ends with a sentence; either way the next command continues.
            time.sleep(chance.uniform(5.0, 15.0))
            if command.process.poll() is None:
                members |= {process.pid: process for process in family(command.process.pid)}
                hits[f"driver in {stage_of(run)}"] += 1
                os.kill(command.process.pid, signal.SIGKILL)
            else:
                assert_ended_with_a_sentence(command)
        command.process.wait(60)
        if before:
            assert_kept(before)
    finish(run)
    assert_gone(list(members.values()))
    assert_equals_twin(run, twin)
    told = assert_little_again(run, twin, hits)
    print(f"{kills} kills, seed {seed}: equal to the twin; {time.monotonic() - started:.0f} s; {told}")
    print("; ".join(f"{number} {hit}" for hit, number in every.most_common()))


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
