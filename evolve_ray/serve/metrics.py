"""The metrics of a replica: for Ray's Prometheus port like those of a run, and at once for `/metrics` of the endpoint.

Replicas of a node share a folder (PROMETHEUS_MULTIPROC_DIR), so each of them shows the counts of all, also of those that died.
"""

import os
from pathlib import Path
from typing import Any

import psutil

from evolve_ray.watch.metrics import BOUNDARIES, METRICS, Metrics

PREFIX = "evolve_serve_"
MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"


def clean(folder: Path) -> None:
    """Makes the folder, and removes the gauges of replicas that died: their rounds do not run any more."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("gauge_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)


class ServeMetrics:
    """Counts of one replica. Each is written twice: through Ray, and through prometheus_client."""

    def __init__(self) -> None:
        if folder := os.environ.get(MULTIPROC):
            clean(Path(folder))
        import prometheus_client

        self.ray = Metrics()
        self.running = 0  # rounds in the engine
        self.local: dict[str, Any] = {}
        for name, (kind, description, tags) in METRICS.items():
            if name.startswith(PREFIX):
                extra: dict[str, Any] = {"buckets": BOUNDARIES} if kind == "histogram" else {}
                extra |= {"multiprocess_mode": "livesum"} if kind == "gauge" else {}
                self.local[name] = getattr(prometheus_client, kind.capitalize())(name, description, tags, **extra)

    def count(self, name: str, value: float = 1, **tags: str) -> None:
        if value > 0:
            self.ray.count(PREFIX + name, value, **tags)
            self._local(name, tags).inc(value)

    def observe(self, name: str, value: float, **tags: str) -> None:
        self.ray.observe(PREFIX + name, value, **tags)
        self._local(name, tags).observe(value)

    def _local(self, name: str, tags: dict[str, str]) -> Any:
        metric = self.local[PREFIX + name]
        return metric.labels(**tags) if tags else metric

    def set_running(self, change: int) -> None:
        self.running += change
        self.ray.set(PREFIX + "running_rounds", self.running)
        self.local[PREFIX + "running_rounds"].set(self.running)

    def round_started(self) -> None:
        self.set_running(+1)

    def round_ended(self, number: int, seconds: float, first_s: float | None, tokens: dict[str, int], *, aborted: bool) -> None:
        """`tokens` by kind: generated, prompt, and cached ones of the prompt."""
        self.set_running(-1)
        label = str(number)
        if first_s is not None:
            self.observe("first_token_seconds", first_s, round=label)
        self.count("round_seconds", seconds, round=label)
        for kind, amount in tokens.items():
            self.count("round_tokens", amount, round=label, kind=kind)
        if aborted:
            self.count("aborted_rounds")

    def request_ended(self, kind: str, status: int, seconds: float) -> None:
        self.count("requests", kind=kind, status=str(status))
        self.observe("request_seconds", seconds, kind=kind)

    def refined(self, stopped: str, first_score: float | None, score: float | None) -> None:
        """Why the rounds of a request ended, and whether refinement helped, where both drafts have a score."""
        self.count("stopped", reason=stopped)
        if first_score is not None and score is not None:
            self.count("effect", effect="better" if score > first_score else "worse" if score < first_score else "equal")

    def text(self) -> bytes:
        """All metrics of this node's replicas and their engines, in Prometheus' format."""
        import prometheus_client
        from prometheus_client import multiprocess

        if not os.environ.get(MULTIPROC):
            return prometheus_client.generate_latest()
        registry = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return prometheus_client.generate_latest(registry)
