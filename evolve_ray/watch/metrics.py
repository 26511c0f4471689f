"""The Prometheus metrics of a run, set through `ray.util.metrics`; at the port of a Ray node, names start with `ray_evolve_`.

They have two sources. An actor counts its work after each call (`Work`). The driver reads events.jsonl and the committed
evaluations of the run (`Follower`), so no stage needs to know about metrics, and a resumed run shows its old evaluations again.
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

# Every metric: (kind, description, tags). Ray adds the prefix `ray_`, and the suffix `_total` to a counter.
METRICS = {
    "evolve_iteration": ("gauge", "current iteration", ("run",)),
    "evolve_stage": ("gauge", "1 for the current stage, 0 for the others", ("run", "stage")),
    "evolve_shards": ("gauge", "shards of the current stage, done and waiting", ("run", "state")),
    "evolve_training": (
        "gauge",
        "figures of the last step: loss, its terms, learning rate, gradient norm",
        ("run", "figure"),
    ),
    "evolve_evaluation": (
        "gauge",
        "mean reward and exact match, and their gain over round 1",
        ("run", "model", "split", "round", "figure"),
    ),
    "evolve_rows": ("counter", "rows that actors committed or rejected", ("pool", "kind")),
    "evolve_tokens": ("counter", "tokens: generated, prompt, cached (prompt tokens from the cache)", ("kind",)),
    "evolve_actor_seconds": ("counter", "seconds of an actor: busy in a call, idle between calls", ("pool", "state")),
    # Those of the endpoint. A replica also shows them at its own /metrics.
    "evolve_serve_requests": ("counter", "requests that ended, direct or refined, by HTTP status", ("kind", "status")),
    "evolve_serve_running_rounds": ("gauge", "rounds that are in the engine, running or waiting", ()),
    "evolve_serve_first_token_seconds": ("histogram", "seconds until the engine wrote the first token of a round", ("round",)),
    "evolve_serve_request_seconds": ("histogram", "seconds of a whole request", ("kind",)),
    "evolve_serve_round_tokens": ("counter", "tokens of rounds: generated, prompt, cached", ("round", "kind")),
    "evolve_serve_round_seconds": ("counter", "seconds that rounds took, summed", ("round",)),
    "evolve_serve_aborted_rounds": ("counter", "rounds that were ended in the engine: the client left, or time was over", ()),
    "evolve_serve_stopped": ("counter", "refined requests by the reason why their rounds ended", ("reason",)),
    "evolve_serve_effect": ("counter", "scored requests: the answer against the first draft", ("effect",)),
}
BOUNDARIES = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]  # of histograms, in seconds
EVENT_FIELDS = ("time", "event", "iteration", "num_steps", "num_pairs")  # of a training event; the others are figures
EVALUATIONS = {"base_evaluation": "base", "evaluation": ""}


class Metrics:
    """The metrics of this process, created when they are first set; a process that has not joined Ray only stores gauges."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._gauges: dict[tuple[Any, ...], float] = {}  # the value of every gauge, by name and tags

    def _metric(self, name: str) -> Any:
        if name not in self._metrics:
            from ray.util import metrics  # here, so that Ray is not loaded by a process that does not use it

            kind, description, tags = METRICS[name]
            if kind == "histogram":
                self._metrics[name] = metrics.Histogram(name, description=description, boundaries=BOUNDARIES, tag_keys=tags)
            else:
                metric_class = metrics.Gauge if kind == "gauge" else metrics.Counter
                self._metrics[name] = metric_class(name, description=description, tag_keys=tags)
        return self._metrics[name]

    @staticmethod
    def _in_ray() -> bool:
        ray = sys.modules.get("ray")
        return ray is not None and ray.is_initialized()

    def set(self, name: str, value: float, **tags: str) -> None:
        """Sets a gauge."""
        self._gauges[name, *tags.items()] = value
        if self._in_ray():
            self._metric(name).set(value, tags=tags)

    def repeat(self) -> None:
        """Sets every gauge again: Ray exports a gauge only once after it was set, then it disappears from Prometheus."""
        for (name, *tags), value in list(self._gauges.items()):
            self.set(name, value, **dict(tags))

    def forget(self, name: str) -> None:
        """Stops repeating the values of a gauge."""
        self._gauges = {key: value for key, value in self._gauges.items() if key[0] != name}

    def count(self, name: str, value: float, **tags: str) -> None:
        """Adds to a counter."""
        if value > 0 and self._in_ray():
            self._metric(name).inc(value, tags=tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Adds a value to a histogram."""
        if self._in_ray():
            self._metric(name).observe(value, tags=tags)


class Follower:
    """Sets the gauges of a run from its events and committed evaluations, in a thread of the driver."""

    def __init__(self, run: Run, name: str, metrics: Metrics | None = None):
        self.run, self.name, self.metrics = run, name, Metrics() if metrics is None else metrics
        self.shown: set[Path] = set()  # evaluations whose gauges are set
        self.stage, self.total, self.shards = "", 0, 0
        self.offset = self._size()  # events before this are of earlier drivers
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
            self.poll()
            self.metrics.repeat()

    def poll(self) -> None:
        """Sets gauges from new complete lines of events.jsonl, and from new evaluations."""
        if self._size() > self.offset:
            with open(self.run.root / "events.jsonl", "rb") as file:
                file.seek(self.offset)
                data = file.read()
            lines = data[: data.rfind(b"\n") + 1]
            self.offset += len(lines)
            self.apply_events(json.loads(line) for line in lines.splitlines())
        for number, folder, path in self._evaluations():
            self.shown.add(path)
            self.show_evaluation(EVALUATIONS[folder] or (f"iteration {number}" if number else "activation"), read_jsonl(path)[0])

    def _evaluations(self) -> list[tuple[int, str, Path]]:
        """Returns (iteration, folder name, summary file) of every committed evaluation whose gauges are not set yet."""
        evaluations = []
        for path in sorted(self.run.root.glob("iteration-*/*evaluation/summary.jsonl")):
            if path not in self.shown and path.parent.name in EVALUATIONS and (path.parent / MANIFEST).exists():
                evaluations.append((int(path.parent.parent.name.removeprefix("iteration-")), path.parent.name, path))
        return evaluations

    def apply_events(self, events: Iterable[dict[str, Any]]) -> None:
        """Sets the gauges that follow from events."""
        for event in events:
            if event["event"] == "stage_start":
                self.start_stage(event)
            elif event["event"] == "stage_end":
                self.metrics.set("evolve_stage", 0, run=self.name, stage=event["stage"])
            elif event["event"] == "shard":
                self.shards += 1
                self._set_shards(event.get("num_shards") or self.total)
            elif event["event"] == "training":
                for figure, value in event.items():
                    if figure not in EVENT_FIELDS and isinstance(value, int | float):  # the stage key is a string
                        self.metrics.set("evolve_training", value, run=self.name, figure=figure)

    def start_stage(self, event: dict[str, Any]) -> None:
        """Sets the gauges at the start of a stage."""
        if self.stage:
            self.metrics.set("evolve_stage", 0, run=self.name, stage=self.stage)
        self.stage, self.shards = event["stage"], 0
        self.metrics.set("evolve_stage", 1, run=self.name, stage=self.stage)
        if event["iteration"] is not None:
            self.metrics.set("evolve_iteration", event["iteration"], run=self.name)
        self._set_shards(0)
        if self.stage == "checkpoint":
            self.metrics.forget("evolve_training")  # its objective may have other figures than the last one

    def _set_shards(self, total: int) -> None:
        self.metrics.set("evolve_shards", self.shards, run=self.name, state="done")
        self.metrics.set("evolve_shards", max(0, total - self.shards), run=self.name, state="waiting")

    def show_evaluation(self, model: str, summary: dict[str, Any]) -> None:
        """Sets the gauges of one evaluation from its summary by split."""
        for split, figures in summary.items():
            for number, of_round in figures["rounds"].items():
                intervals = {name: of_round[name] for name in ("reward", "exact_match") if name in of_round}
                intervals |= {f"gain_{name}": value for name, value in of_round.get("gain", {}).items()}
                for figure, value in intervals.items():
                    tags = {"model": model, "split": split, "round": number, "figure": figure}
                    self.metrics.set("evolve_evaluation", value["mean"], run=self.name, **tags)
