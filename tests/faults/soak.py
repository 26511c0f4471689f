"""Kills a run at seeded random moments until it is done: `python tests/faults/soak.py --kills 20 --seed 0 [--out DIR]`.

Makes an undisturbed twin first (or takes the one in --out), then starts the same command again and again. After the last
kill the run must end as its twin did. Exit code 0 if it did; every kill is printed with its moment.
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

from tests.faults.harness import ROLES, arguments, assert_equals_twin, assert_kept, committed_files, family, finish
from tests.real.conftest import Command, assert_gone, fork, start

LONGEST_S = 40.0  # until a kill: every stage is reached, for what is committed stays
TARGETS = ("driver", "engine", "scorer", "train worker", "raylet")


def targets(command: Command) -> dict[str, psutil.Process]:
    """One process of each role that is there now."""
    found = {"driver": psutil.Process(command.process.pid)}
    for process in family(command.process.pid):
        for role in TARGETS[1:]:
            if role not in found and ROLES[role](process):
                found[role] = process
    return found


def events_of(run: Path, kind: str) -> int:
    path = run / "events.jsonl"
    return path.read_bytes().count(f'"event": "{kind}"'.encode()) if path.exists() else 0


def stage_of(run: Path) -> str:
    """The stage that the last events tell of."""
    path = run / "events.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")] if path.exists() else []
    return next((event["stage"] for event in reversed(told) if event["event"] == "stage_start"), "start")


def soak(out: Path, kills: int, seed: int) -> None:
    chance, done = random.Random(seed), 0
    twin = out / "twin"
    if not (twin / "report.json").exists():
        finish(twin)
    reference = Command(twin, None, out / "twin.log")  # type: ignore[arg-type]
    longest = min(run_seconds(twin), LONGEST_S)
    members: dict[int, psutil.Process] = {}  # all that the killed commands had started
    run = fork(reference, f"soak-{seed}-{time.time_ns()}")
    hits: Counter[str] = Counter()
    started = time.monotonic()
    while done < kills:
        command = start(run, *arguments())
        moment = chance.uniform(2.0, longest)
        role = chance.choice(TARGETS)
        deadline = time.monotonic() + moment
        while time.monotonic() < deadline and command.process.poll() is None:
            time.sleep(0.1)
        if command.process.poll() is not None:
            assert command.process.returncode == 0, command.log.read_text()[-3000:]
            print(f"the run was over before kill {done + 1}; a new one begins", flush=True)
            assert_equals_twin(run, twin)
            run = fork(reference, f"soak-{seed}-{time.time_ns()}")
            continue
        there = targets(command)
        role = role if role in there else "driver"
        before = committed_files(run)
        members |= {process.pid: process for process in family(command.process.pid)}
        os.kill(there[role].pid, signal.SIGKILL)
        done += 1
        hits[f"{role} in {stage_of(run)}"] += 1
        print(f"kill {done} of {kills}: {role} in {stage_of(run)} after {moment:.1f} s", flush=True)
        if role != "driver":
            # The run goes on by itself, or ends with a sentence; either way the next command continues.
            time.sleep(chance.uniform(5.0, 15.0))
            if command.process.poll() is None:
                members |= {process.pid: process for process in family(command.process.pid)}
                os.kill(command.process.pid, signal.SIGKILL)
            else:
                last = command.log.read_text().strip().splitlines()[-1]
                assert command.process.returncode == 0 or last.startswith("error:"), last
        command.process.wait(60)
        assert_kept(before)
    finish(run)
    assert_gone(list(members.values()))
    assert_equals_twin(run, twin)
    shards, expected = events_of(run, "shard"), events_of(twin, "shard")
    print(
        f"{kills} kills, seed {seed}: equal to the twin; {time.monotonic() - started:.0f} s; {shards} shards (twin: {expected})"
    )
    print("; ".join(f"{number} {hit}" for hit, number in hits.most_common()))
    assert shards <= expected + kills, "more was computed again than one shard for each kill"


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
