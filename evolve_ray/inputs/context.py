"""A run with its checked inputs, and what all stages share: progress lines, timing, deadlines, rejected rows."""

import contextlib
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
from evolve_ray.store.run import Run, Stage, new_events
from evolve_ray.watch.trackers import Trackers


@dataclass(frozen=True)
class Policy:
    """A model folder with the hash of its content."""

    folder: Path
    hash: str

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> "Policy":
        return cls(manifest.folder, folders.content_hash(manifest.folder))


@dataclass
class Context:
    """A run with its checked inputs, and what all stages share."""

    config: Config
    run: Run
    say: Callable[[str], None]
    start_ray: Callable[[], None]
    rerun_changed: bool
    template: Template
    policy: Policy
    reward_models: dict[str, Policy] = field(default_factory=dict)  # by their names in the recipe
    judge: Policy | None = None  # the model of a judge with an engine of its own, if it is none of the policies
    initial: Policy | None = None  # the policy that iteration 1 starts from
    models: dict[str, Policy] = field(default_factory=dict)  # further models by name, the newest of each
    first_models: dict[str, Policy] = field(default_factory=dict)  # those that the recipe names
    prompts: dict[int, Manifest] = field(default_factory=dict)  # by iteration
    triples: dict[str, Manifest] = field(default_factory=dict)  # by table of the recipe: "activation", "offline"
    held_out: Manifest | None = None
    dropout: bool = False  # whether a model was released with dropout, which its training switches off
    pools: Pools = field(default_factory=Pools)
    trackers: Trackers = field(default_factory=Trackers)
    changed: str = ""  # the options that changed since the last run in this run directory, as text
    last_line: str = ""  # the stage that was printed last, so that a stage with two parts is printed once

    def stage(self, final: Path, name: str, key: dict, inputs: dict[str, str]) -> Stage:
        """The stage at `final` for this key and these inputs.

        With --rerun-changed, a committed stage with another key or other inputs is moved aside, so that it is computed again.
        """
        stage = Stage(final, name, rows.digest([name, key, inputs]), inputs)
        old = stage.superseded() if self.rerun_changed else None
        if old:
            why, aside = self.why_again(old.inputs, inputs), stage.put_aside()
            self.say(
                f"  {final.relative_to(self.run.root)}: {why}; it is computed again, and the old one is kept at {aside.name}"
            )
            self.run.event("superseded", folder=str(final), aside=aside.name, why=why)
        return stage

    def why_again(self, before: dict[str, str], now: dict[str, str]) -> str:
        """Why a stage is computed again: its inputs changed, or else its own options or source."""
        changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        why = f"its input changed: {' and '.join(changed)}" if changed else "its options or its source changed"
        return f"{why} (in the recipe: {self.changed})" if self.changed else why

    @contextlib.contextmanager
    def timed(self, stage: str, iteration: int | None) -> Iterator[None]:
        """Prints the name of the stage, and writes events when it starts and ends."""
        line = f"  {stage}" if iteration is None else f"  iteration {iteration}: {stage}"
        if line != self.last_line:
            self.say(line)
        self.last_line = line
        with self.run.timed(stage, iteration):
            yield

    @contextlib.contextmanager
    def print_events(self, kind: str, line: Callable[[dict], str]) -> Iterator[None]:
        """Prints a `line` for each event of `kind` that other processes append to events.jsonl inside the block."""
        done = threading.Event()

        def follow(file: Any) -> None:
            while not done.wait(1.0):
                for event in new_events(file):
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
        """Raises `StalledError` if the block makes no progress for `stall_s` seconds; for the main thread only.

        Progress is a new event in events.jsonl or another value of `progress()`. A timer signal checks both, so the deadline
        also holds while the stage waits inside Ray. There a signal handler can only raise KeyboardInterrupt: Ray drops any
        other exception. So the handler raises that, and the block turns it into the `StalledError`.
        """
        events = self.run.root / "events.jsonl"
        last_progress: Any = None
        stalled: list[StalledError] = []
        idle, last_check, tick = 0.0, time.monotonic(), min(5.0, stall_s / 4)

        def check(*_: Any) -> None:
            nonlocal last_progress, idle, last_check
            passed = time.monotonic() - last_check
            last_check += passed
            idle += min(passed, 2 * tick)  # the driver itself may have been suspended: that time does not count as idle
            now = (events.stat().st_size, progress())
            if now != last_progress:
                last_progress, idle = now, 0.0
            elif idle > stall_s:
                stalled.append(StalledError(f"{name}: made no progress for {stall_s:g} s; {advice}"))
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, check)
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
        """Writes rejected.jsonl of an iteration: the rejected rows of all its stages, in the order of the data."""
        folder = self.run.iteration(iteration)
        folder.mkdir(parents=True, exist_ok=True)  # iteration 0 may have no stage: no held-out prompts, no preference triples
        order = ("held_out", "base_evaluation", "activation_pairs", "offline_pairs", "prompts", "generations", "scores", "pairs")
        second = [f"{name}_pairs" for name in self.config.models]
        parts = [folder / name / "rejected.jsonl" for name in (*order, *second, "evaluation")]
        write_atomic(folder / "rejected.jsonl", (block for part in parts if part.exists() for block in blocks(part)))
