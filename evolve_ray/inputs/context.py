"""A run with its checked inputs, and what every stage does the same way."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve_ray.config.options import Config
from evolve_ray.errors import StalledError
from evolve_ray.models import folders
from evolve_ray.pools.actors import Pools
from evolve_ray.refine.template import Template
from evolve_ray.store import rows
from evolve_ray.store.files import blocks, write_atomic
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Run, Stage
from evolve_ray.watch.trackers import Trackers


@dataclass(frozen=True)
class Policy:
    """A model folder and the hash of its content."""

    folder: Path
    hash: str

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> "Policy":
        return cls(manifest.folder, folders.content_hash(manifest.folder))


@dataclass
class Context:
    """A run with its checked inputs, and the few things that every stage does the same way."""

    config: Config
    run: Run
    say: Callable[[str], None]
    start_ray: Callable[[], None]
    rerun_changed: bool
    template: Template
    policy: Policy
    reward_models: dict[str, Policy] = field(default_factory=dict)  # by their names in the recipe
    initial: Policy | None = None  # what iteration 1 started from
    prompts: dict[int, Manifest] = field(default_factory=dict)
    given: dict[str, Manifest] = field(default_factory=dict)
    held_out: Manifest | None = None
    pools: Pools = field(default_factory=Pools)
    trackers: Trackers = field(default_factory=Trackers)
    changed: str = ""  # the options of the recipe in which this run differs from what it was before
    told: str = ""  # the stage that was said last: one with two parts is said once

    def stage(self, final: Path, name: str, key: dict, inputs: dict[str, str]) -> Stage:
        """The stage at `final` for these inputs; with --rerun-changed, what stands there for others is put aside."""
        stage = Stage(final, name, rows.digest([name, key, inputs]), inputs)
        old = stage.superseded() if self.rerun_changed else None
        if old:
            why, aside = self.why_again(old.inputs, inputs), stage.put_aside()
            self.say(f"  {final.relative_to(self.run.root)}: {why}; the old one is at {aside.name}")
            self.run.event("superseded", folder=str(final), aside=aside.name, why=why)
        return stage

    def why_again(self, before: dict[str, str], now: dict[str, str]) -> str:
        """Why a stage is computed again: what it is made from is other than before, or it is its own options or source."""
        others = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        why = f"is made from other {' and '.join(others)} now" if others else "its options or its source changed"
        return f"{why} (in the recipe: {self.changed})" if self.changed else why

    @contextlib.contextmanager
    def timed(self, stage: str, iteration: int | None) -> Iterator[None]:
        line = f"  {stage}" if iteration is None else f"  iteration {iteration}: {stage}"
        if line != self.told:
            self.say(line)
        self.told = line
        with self.run.timed(stage, iteration):
            yield

    @contextlib.contextmanager
    def followed(self, kind: str, line: Callable[[dict], str]) -> Iterator[None]:
        """Prints the events of `kind` that other processes append meanwhile."""
        done = threading.Event()

        def follow(file: Any) -> None:
            while not done.wait(1.0):
                while raw := file.readline():
                    if not raw.endswith(b"\n"):  # a line that is still being written
                        file.seek(-len(raw), os.SEEK_CUR)
                        break
                    event = json.loads(raw)
                    if event["event"] == kind:
                        self.say(line(event))

        with open(self.run.root / "events.jsonl", "rb") as file:
            file.seek(0, os.SEEK_END)
            thread = threading.Thread(target=follow, args=(file,), daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()

    @contextlib.contextmanager
    def deadline(self, name: str, stall_s: float, progress: Callable[[], Any], advice: str) -> Iterator[None]:
        """Ends a stage of the main thread that for `stall_s` appends no event and changes no `progress`, wherever it waits.

        Where Ray waits, it heeds a KeyboardInterrupt of a handler and drops every other error.
        """
        events = self.run.root / "events.jsonl"
        seen: Any = None
        stalled: list[StalledError] = []
        idle, last, tick = 0.0, time.monotonic(), min(5.0, stall_s / 4)

        def look(*_: Any) -> None:
            nonlocal seen, idle, last
            passed = time.monotonic() - last
            last += passed
            idle += min(passed, 2 * tick)  # a driver that was stopped itself has seen nothing
            now = (events.stat().st_size, progress())
            if now != seen:
                seen, idle = now, 0.0
            elif idle > stall_s:
                stalled.append(StalledError(f"{name}: made no progress for {stall_s:g} s; {advice}"))
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, tick, tick)
        try:
            yield
        except KeyboardInterrupt:
            if stalled:
                raise stalled[0] from None
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def collect_rejected(self, iteration: int) -> None:
        """rejected.jsonl of an iteration: what each of its stages rejected, in the order of the data."""
        folder = self.run.iteration(iteration)
        folder.mkdir(parents=True, exist_ok=True)  # iteration 0 has no stage without held-out prompts and given pairs
        order = ("held_out", "base_evaluation", "activation_pairs", "offline_pairs", "prompts", "generations", "scores", "pairs")
        parts = [folder / name / "rejected.jsonl" for name in (*order, "evaluation")]
        write_atomic(folder / "rejected.jsonl", (block for part in parts if part.exists() for block in blocks(part)))
