"""Counts the work of an actor, for Prometheus."""

from typing import Any

from evolve_ray.watch.metrics import Metrics

TOKENS = {"num_tokens": "generated", "num_prompt_tokens": "prompt", "num_cached_tokens": "cached"}


class Work:
    """Counts the busy and idle seconds of one actor, and the rows and tokens of the shards that it committed."""

    def __init__(self, pool: str, metrics: Metrics | None = None):
        self.pool, self.metrics = pool, Metrics() if metrics is None else metrics
        self.last_end: float | None = None

    def record_call(self, started: float, ended: float, stats: dict[str, Any] | None) -> None:
        """Counts a call from `started` to `ended` (seconds of a monotonic clock); `stats` are the counts of a committed shard."""
        if self.last_end is not None:
            self.metrics.count("evolve_actor_seconds", started - self.last_end, pool=self.pool, state="idle")
        self.metrics.count("evolve_actor_seconds", ended - started, pool=self.pool, state="busy")
        self.last_end = ended
        if stats is None:
            return
        for key, kind in (("num_rows", "committed"), ("num_rejected", "rejected")):
            self.metrics.count("evolve_rows", stats.get(key, 0), pool=self.pool, kind=kind)
        for key, kind in TOKENS.items():
            self.metrics.count("evolve_tokens", stats.get(key, 0), kind=kind)
