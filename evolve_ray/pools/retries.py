"""Attempts at a shard, recorded on disk: a worker that dies cannot report it, so it writes before each attempt what it starts.

The next worker reads that record. If a shard has killed its worker as often as allowed, its rows are halved until the rows that
kill the worker are found, each alone; those rows are rejected. Heartbeats on the same disk show whether a worker works or hangs.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.errors import ResourceError
from evolve_ray.store.files import write_atomic

FOLDER = ".attempts"  # in the working folder of a stage; a new driver removes it
MAX_DEATHS_ALONE = 2  # deaths with one row alone before it is rejected: the first may have been a kill from outside
MAX_KILLERS = 3  # rows of one shard; if more rows kill the worker, the rows are not the cause
# The first record of a shard: deaths with the whole shard; what the worker runs ("all" or prompt ids); the prompts of which one
# kills the worker; deaths with a single suspect; prompts that are known to kill the worker.
FRESH: dict[str, Any] = {"deaths": 0, "running": None, "suspects": None, "alone": 0, "killers": []}
Processed = tuple[list[dict], list[dict], dict]  # rows, rejected rows, counts


class Attempts:
    """The record of the attempts at one shard. After `limit` deaths with the whole shard, its rows are halved."""

    def __init__(self, work: Path, shard: int, limit: int, name: str):
        self.shard, self.limit, self.name = shard, limit, name
        self.path = work / FOLDER / f"shard-{shard:05d}.json"
        self.path.parent.mkdir(exist_ok=True)
        self.state = FRESH | (json.loads(self.path.read_bytes()) if self.path.exists() else {})
        mark = hang_mark(work, shard)
        if mark.exists():
            mark.unlink()  # the last worker was killed because it hung; that does not count as a death
        elif self.state["running"] is not None:
            self.count_death()
        self.write(running=None)

    def count_death(self) -> None:
        """Records that the last worker died in its attempt; ResourceError if the rows of the shard are not the cause."""
        running = self.state["running"]
        if running == "all":
            self.state["deaths"] += 1
            if self.state["deaths"] > self.limit:
                raise ResourceError(
                    f"{self.name}: the worker died {self.state['deaths']} times on shard {self.shard}, but on none of its rows "
                    "alone; see its log in the Ray dashboard (often out of memory), then submit the same command again"
                )
        elif len(running) > 1:
            self.state |= {"suspects": running, "alone": 0}
        else:
            self.state |= {"suspects": running, "alone": self.state["alone"] + 1}
            if self.state["alone"] >= MAX_DEATHS_ALONE:
                self.state["killers"] += running
                self.state |= {"suspects": None, "alone": 0, "deaths": max(0, self.limit - 1)}
                if len(self.state["killers"]) > MAX_KILLERS:
                    raise ResourceError(
                        f"{self.name}: the worker died on more than {MAX_KILLERS} rows of shard {self.shard}, each alone "
                        f"({', '.join(self.state['killers'])}), so the rows are not the cause; see its log in the Ray "
                        "dashboard, then submit the same command again"
                    )

    def write(self, **changes: Any) -> None:
        """Changes fields of the record, and writes it to the disk."""
        self.state |= changes
        write_atomic(self.path, json.dumps(self.state).encode())

    def process(self, prompts: list[dict], process: Callable[[list[dict]], Processed]) -> tuple[Processed, list[dict]]:
        """Returns (the result of `process` for the prompts that do not kill the worker, the prompts that do)."""
        if self.state["suspects"] or self.state["deaths"] >= self.limit > 0:
            self.find_killers(self.without_killers(prompts), process)
        self.write(running="all")
        return process(self.without_killers(prompts)), [
            prompt for prompt in prompts if prompt["prompt_id"] in self.state["killers"]
        ]

    def without_killers(self, prompts: list[dict]) -> list[dict]:
        return [prompt for prompt in prompts if prompt["prompt_id"] not in self.state["killers"]]

    def find_killers(self, prompts: list[dict], process: Callable[[list[dict]], Processed]) -> None:
        """Halves the suspects; if a half kills this process, the next process continues with that half."""
        suspects = self.state["suspects"] or [prompt["prompt_id"] for prompt in prompts]
        while suspects:
            half = suspects[: max(1, len(suspects) // 2)]
            self.write(running=half, suspects=suspects)
            process([prompt for prompt in prompts if prompt["prompt_id"] in half])
            suspects = suspects[len(half) :]
        self.write(running=None, suspects=None, alone=0)


class Heartbeat:
    """The heartbeat of the actor `index` of a pool, in a file: the shard that it works on, and a count of its progress."""

    def __init__(self, work: Path, index: int):
        self.path = work / FOLDER / f"actor-{index}"
        self.shard, self.count, self.last_write = -1, 0, 0.0

    def start(self, shard: int) -> None:
        """Writes the first heartbeat of a shard."""
        self.shard, self.last_write = shard, 0.0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self()

    def __call__(self) -> None:
        """Counts progress, and writes it at most once a second; nobody reads it any more if the folder is gone."""
        self.count += 1
        if time.monotonic() - self.last_write > 1.0:
            with contextlib.suppress(OSError):
                self.path.write_text(f"{self.shard} {self.count} {time.time_ns()}")
            self.last_write = time.monotonic()

    def read(self) -> tuple[int, str]:
        """Returns (the shard that the actor works on or -1, a text that changes with its progress)."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = self.path.read_text()
            return int(text.split()[0]), text
        return -1, ""


def heartbeats(work: Path) -> list[tuple[str, int]]:
    """Returns (name, mtime in ns) of every file of a stage's attempts: the list changes when any of its actors makes progress."""
    files = []
    with contextlib.suppress(OSError):  # a file may be replaced meanwhile
        for path in sorted((work / FOLDER).iterdir()):
            files.append((path.name, path.stat().st_mtime_ns))
    return files


def hang_mark(work: Path, shard: int) -> Path:
    """Returns the path of a file that exists if the worker of a shard was killed because it hung."""
    return work / FOLDER / f"shard-{shard:05d}.hung"


class StartCount:
    """Counts the starts of an actor whose worker was not built, so that an engine that cannot start is not started forever."""

    def __init__(self, work: Path, place: str, limit: int, name: str):
        self.path = work / FOLDER / f"actor-{place}.builds"
        self.limit, self.name = limit, name

    def begin(self) -> None:
        """Counts a start; ResourceError if the actor died in more than `limit` starts before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        number = int(self.path.read_text()) if self.path.exists() else 0
        if number > self.limit:
            raise ResourceError(
                f"{self.name}: the actor died {number} times while it started; see its log in the Ray dashboard (often out of "
                "memory), then submit the same command again"
            )
        write_atomic(self.path, str(number + 1).encode())

    def reset(self) -> None:
        """Sets the count to 0 after a successful start."""
        write_atomic(self.path, b"0")
