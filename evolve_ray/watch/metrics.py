"""What Prometheus sees of a run, through `ray.util.metrics`: names start with `ray_evolve_` at the metrics port of each Ray node.

Two sources. Actors count what they did after each call (`Work`). The driver follows the run's own events.jsonl and committed
evaluations (`Follower`), so that no stage knows of metrics, and a resumed run shows its earlier evaluations again.
"""

import json
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evolve_ray.store.manifest import MANIFEST
from evolve_ray.store.rows import read_jsonl
from evolve_ray.store.run import Run

INTERVAL_S = 1.0

# Every metric: (kind, what it is, tags). Ray puts `ray_` in front, and `_total` after a counter.
METRICS = {
    "evolve_iteration": ("gauge", "the iteration at work", ("run",)),
    "evolve_stage": ("gauge", "1 for the stage at work, 0 for the others", ("run", "stage")),
    "evolve_shards": ("gauge", "shards of the stage at work that are done and that wait", ("run", "state")),
    "evolve_training": (
        "gauge",
        "figures of the last step told: loss, its terms, rate, gradient norm",
        ("run", "figure"),
    ),
    "evolve_evaluation": (
        "gauge",
        "reward or exact match, and gain over round 1",
        ("run", "model", "split", "round", "figure"),
    ),
    "evolve_rows": ("counter", "rows that actors committed, and rejected ones", ("pool", "kind")),
    "evolve_tokens": ("counter", "tokens: generated, prompt, cached (of the prompt's)", ("kind",)),
    "evolve_actor_seconds": ("counter", "seconds of an actor at work and idle, between its calls", ("pool", "state")),
}
EVENT_FIELDS = ("time", "event", "iteration", "num_steps", "num_pairs")  # of a training event; the others are figures
EVALUATIONS = {"base_evaluation": "base", "evaluation": ""}


class Metrics:
    """The metrics of this process by name, made when first set. A process that is in no Ray has no port to show them at."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._set: dict[tuple[Any, ...], float] = {}  # every gauge's value, by its name and tags

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            from ray.util import metrics  # only where Ray is loaded already

            kind, description, tags = METRICS[name]
            make = metrics.Gauge if kind == "gauge" else metrics.Counter
            self._made[name] = make(name, description=description, tag_keys=tags)
        return self._made[name]

    @staticmethod
    def _in_ray() -> bool:
        ray = sys.modules.get("ray")
        return ray is not None and ray.is_initialized()

    def set(self, name: str, value: float, **tags: str) -> None:
        self._set[name, *tags.items()] = value
        if self._in_ray():
            self._metric(name).set(value, tags=tags)

    def repeat(self) -> None:
        """Sets every gauge to its value again: Ray shows a gauge once after it was set, then Prometheus takes it for gone."""
        for (name, *tags), value in list(self._set.items()):
            self.set(name, value, **dict(tags))

    def forget(self, name: str) -> None:
        """No value of the gauge is repeated any more."""
        self._set = {key: value for key, value in self._set.items() if key[0] != name}

    def count(self, name: str, value: float, **tags: str) -> None:
        if value > 0 and self._in_ray():
            self._metric(name).inc(value, tags=tags)


class Follower:
    """Sets the run's gauges from its events and committed evaluations, in a thread of the driver."""

    def __init__(self, run: Run, name: str, metrics: Metrics | None = None):
        self.run, self.name, self.metrics = run, name, Metrics() if metrics is None else metrics
        self.shown: set[Path] = set()
        self.stage, self.total, self.shards = "", 0, 0
        self.offset = self._size()  # what this driver writes from here on
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._done.set()
            self._thread.join()

    def _size(self) -> int:
        path = self.run.root / "events.jsonl"
        return path.stat().st_size if path.exists() else 0

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._done.wait(INTERVAL_S)
            self.look()
            self.metrics.repeat()

    def look(self) -> None:
        """Takes what is new: whole lines of events, and evaluations."""
        if self._size() > self.offset:
            with open(self.run.root / "events.jsonl", "rb") as file:
                file.seek(self.offset)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self.offset += len(whole)
            self.take(json.loads(line) for line in whole.splitlines())
        for number, folder, path in self._evaluations():
            self.shown.add(path)
            self.evaluated(EVALUATIONS[folder] or (f"iteration {number}" if number else "activation"), read_jsonl(path)[0])

    def _evaluations(self) -> list[tuple[int, str, Path]]:
        found = []
        for path in sorted(self.run.root.glob("iteration-*/*evaluation/summary.jsonl")):
            if path not in self.shown and path.parent.name in EVALUATIONS and (path.parent / MANIFEST).exists():
                found.append((int(path.parent.parent.name.removeprefix("iteration-")), path.parent.name, path))
        return found

    def take(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            if event["event"] == "stage_start":
                self.begin(event)
            elif event["event"] == "stage_end":
                self.metrics.set("evolve_stage", 0, run=self.name, stage=event["stage"])
            elif event["event"] == "shard":
                self.shards += 1
                self._tell_shards(event.get("num_shards") or self.total)
            elif event["event"] == "training":
                for figure, value in event.items():
                    if figure not in EVENT_FIELDS and isinstance(value, int | float):  # the step's key is a text
                        self.metrics.set("evolve_training", value, run=self.name, figure=figure)

    def begin(self, event: dict[str, Any]) -> None:
        if self.stage:
            self.metrics.set("evolve_stage", 0, run=self.name, stage=self.stage)
        self.stage, self.shards = event["stage"], 0
        self.metrics.set("evolve_stage", 1, run=self.name, stage=self.stage)
        if event["iteration"] is not None:
            self.metrics.set("evolve_iteration", event["iteration"], run=self.name)
        self._tell_shards(0)
        if self.stage == "checkpoint":
            self.metrics.forget("evolve_training")  # another objective may have other figures

    def _tell_shards(self, total: int) -> None:
        self.metrics.set("evolve_shards", self.shards, run=self.name, state="done")
        self.metrics.set("evolve_shards", max(0, total - self.shards), run=self.name, state="waiting")

    def evaluated(self, model: str, summary: dict[str, Any]) -> None:
        for split, figures in summary.items():
            for number, of_round in figures["rounds"].items():
                told = {name: of_round[name] for name in ("reward", "exact_match") if name in of_round}
                told |= {f"gain_{name}": value for name, value in of_round.get("gain", {}).items()}
                for figure, value in told.items():
                    tags = {"model": model, "split": split, "round": number, "figure": figure}
                    self.metrics.set("evolve_evaluation", value["mean"], run=self.name, **tags)
