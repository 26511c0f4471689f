"""Attempts at a shard, on disk: a worker that dies cannot tell, so it writes down beforehand what it starts with.

Who comes after it reads that. A shard that has killed its worker as often as allowed is halved until the rows that do it
are found, each alone; they are rejected by name. Heartbeat on the same disk tell a worker that hangs from one that works.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.errors import ResourceError
from evolve_ray.store.files import write_atomic

FOLDER = ".attempts"  # of a stage's working folder; a new driver starts without it
ALONE = 2  # deaths of a worker with one row alone: the first may have been a kill from outside
MAX_KILLERS = 3  # of a shard; more than that, and it is not the rows
FRESH: dict[str, Any] = {"deaths": 0, "running": None, "suspects": None, "alone": 0, "killers": []}
Processed = tuple[list[dict], list[dict], dict]


class Attempts:
    """What is known of the attempts at one shard. `limit` deaths are retried as they are, then the rows are halved."""

    def __init__(self, work: Path, shard: int, limit: int, name: str):
        self.shard, self.limit, self.name = shard, limit, name
        self.path = work / FOLDER / f"shard-{shard:05d}.json"
        self.path.parent.mkdir(exist_ok=True)
        self.state = FRESH | (json.loads(self.path.read_bytes()) if self.path.exists() else {})
        hung = mark_of(work, shard)
        if hung.exists():
            hung.unlink()  # ended from outside because it hung: no death of its own
        elif self.state["running"] is not None:
            self.died()
        self.write(running=None)

    def died(self) -> None:
        """The attempt before this one was the last thing that its worker did."""
        running = self.state["running"]
        if running == "all":
            self.state["deaths"] += 1
            if self.state["deaths"] > self.limit:
                raise ResourceError(
                    f"{self.name}: the worker died {self.state['deaths']} times on shard {self.shard}, and on none of its rows "
                    "alone; see its log in the Ray dashboard (often memory), then submit the same command again"
                )
        elif len(running) > 1:
            self.state |= {"suspects": running, "alone": 0}
        else:
            self.state |= {"suspects": running, "alone": self.state["alone"] + 1}
            if self.state["alone"] >= ALONE:
                self.state["killers"] += running
                self.state |= {"suspects": None, "alone": 0, "deaths": max(0, self.limit - 1)}
                if len(self.state["killers"]) > MAX_KILLERS:
                    raise ResourceError(
                        f"{self.name}: the worker died on more than {MAX_KILLERS} rows of shard {self.shard}, each alone "
                        f"({', '.join(self.state['killers'])}), so it is not the rows; see its log in the Ray dashboard"
                    )

    def write(self, **changed: Any) -> None:
        self.state |= changed
        write_atomic(self.path, json.dumps(self.state).encode())

    def process(self, prompts: list[dict], process: Callable[[list[dict]], Processed]) -> tuple[Processed, list[dict]]:
        """What `process` makes of the prompts that do not kill it, and those that do."""
        if self.state["suspects"] or self.state["deaths"] >= self.limit > 0:
            self.hunt(self.rest(prompts), process)
        self.write(running="all")
        return process(self.rest(prompts)), [prompt for prompt in prompts if prompt["prompt_id"] in self.state["killers"]]

    def rest(self, prompts: list[dict]) -> list[dict]:
        return [prompt for prompt in prompts if prompt["prompt_id"] not in self.state["killers"]]

    def hunt(self, prompts: list[dict], process: Callable[[list[dict]], Processed]) -> None:
        """Halves the suspects; a half that kills the worker ends this process, and the next one goes on with it."""
        suspects = self.state["suspects"] or [prompt["prompt_id"] for prompt in prompts]
        while suspects:
            half = suspects[: max(1, len(suspects) // 2)]
            self.write(running=half, suspects=suspects)
            process([prompt for prompt in prompts if prompt["prompt_id"] in half])
            suspects = suspects[len(half) :]
        self.write(running=None, suspects=None, alone=0)


class Heartbeat:
    """Signs of life of the actor `index` of a pool: which shard it works on, and how often it got on with it."""

    def __init__(self, work: Path, index: int):
        self.path = work / FOLDER / f"actor-{index}"
        self.shard, self.count, self.told = -1, 0, 0.0

    def start(self, shard: int) -> None:
        self.shard, self.told = shard, 0.0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self()

    def __call__(self) -> None:
        """At most once a second; a folder that is gone means that nobody listens any more."""
        self.count += 1
        if time.monotonic() - self.told > 1.0:
            with contextlib.suppress(OSError):
                self.path.write_text(f"{self.shard} {self.count} {time.time_ns()}")
            self.told = time.monotonic()

    def read(self) -> tuple[int, str]:
        """(the shard that the actor works on, -1 for none; a text that changes whenever it gets on)."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = self.path.read_text()
            return int(text.split()[0]), text
        return -1, ""


def heartbeats(work: Path) -> list[tuple[str, int]]:
    """What all actors of a stage wrote down about their work, by name and time: it changes whenever one of them gets on."""
    found = []
    with contextlib.suppress(OSError):  # what is written meanwhile
        for path in sorted((work / FOLDER).iterdir()):
            found.append((path.name, path.stat().st_mtime_ns))
    return found


def mark_of(work: Path, shard: int) -> Path:
    """Says that the worker of a shard was ended because it hung."""
    return work / FOLDER / f"shard-{shard:05d}.hung"


class Builds:
    """Counts the starts of an actor that never came to work: an engine that cannot be built is not built for ever."""

    def __init__(self, work: Path, index: int, limit: int, name: str):
        self.path = work / FOLDER / f"actor-{index}.builds"
        self.limit, self.name = limit, name

    def begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        number = int(self.path.read_text()) if self.path.exists() else 0
        if number > self.limit:
            raise ResourceError(
                f"{self.name}: the actor died {number} times while it started; see its log in the Ray dashboard (often memory), "
                "then submit the same command again"
            )
        write_atomic(self.path, str(number + 1).encode())

    def done(self) -> None:
        write_atomic(self.path, b"0")
