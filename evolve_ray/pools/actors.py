"""Pools of Ray actors: they start once, take new work and new weights from each stage, and end with the driver."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve_ray.errors import StalledError
from evolve_ray.pools.retries import Heartbeat, StartCount
from evolve_ray.pools.work import Work
from evolve_ray.pools.worker import ShardWorker


@dataclass(frozen=True)
class PoolOptions:
    """The size of a pool, the resources of each actor, and its limits. `env` is set before the processes start.

    An actor that dies is restarted: one shard may kill it `restarts` times, then the rows that kill it are searched for. An
    actor that makes no progress for `stall_s` seconds is killed and restarted, also `restarts` times for one shard.
    """

    name: str
    worker: type
    actors: int
    cpus: float
    gpus: float
    restarts: int
    stall_s: float = 1800.0
    env: dict[str, str] = field(default_factory=dict)


class Host:
    """The Ray actor of a pool: builds its worker at the first call, and renews it when a stage brings another spec."""

    def __init__(self, worker_class: type[ShardWorker], index: int = 0, name: str = "worker", restarts: int = 3):
        self.worker_class, self.index, self.name, self.restarts = worker_class, index, name, restarts
        self.worker: ShardWorker | None = None
        self.work = Work(name)

    def __repr__(self) -> str:
        """The name of the actor in Ray's dashboard."""
        return f"{self.name} {self.index}"

    def call(self, spec: Any, verb: str, *arguments: Any) -> Any:
        """Returns `worker.verb(*arguments)`, after the worker was built or renewed for `spec`."""
        started = time.monotonic()
        heartbeat = None
        if verb == "commit_shard":
            heartbeat = Heartbeat(Path(spec.work), self.index)
            heartbeat.start(*arguments)
        if self.worker is None:
            counted = heartbeat or verb in ("answer", "score_texts")  # asked by an actor of another pool: no shard of its own
            place = str(self.index) if heartbeat else f"{self.name}-{self.index}"
            start_count = StartCount(Path(spec.work), place, self.restarts, self.name) if counted else None
            if start_count:
                start_count.begin()
            self.worker = self.worker_class(spec)
            self.worker.name, self.worker.restarts = self.name, self.restarts
            if start_count:
                start_count.reset()
        elif self.worker.spec != spec:
            self.worker.renew(spec)
        self.worker.beat = heartbeat or (lambda: None)
        result = getattr(self.worker, verb)(*arguments)
        self.work.record_call(started, time.monotonic(), result if verb == "commit_shard" else None)
        return result


class Actors(list):
    """The handles of a pool's actors, with the options of the pool."""

    def __init__(self, handles: list[Any], options: PoolOptions):
        super().__init__(handles)
        self.options = options

    def __reduce__(self) -> Any:
        return Actors, (list(self), self.options)

    def stop(self) -> None:
        """Kills the actors, which frees their resources."""
        import ray

        for actor in self:
            ray.kill(actor)


TRAINERS = "trainers"  # the pool of the worker group that trains
SPARE_CPUS = 0.1  # for the dispatchers of shards


class Pools:
    """The actors of a run by pool name; they end with the driver that started them."""

    def __init__(self) -> None:
        self._actors: dict[str, Actors] = {}

    def open(self, options: PoolOptions) -> Actors:
        """Returns the actors of a pool; starts them if the pool is not open.

        They come before an idle worker group: where both might not fit, the group ends, and starts again with the next training.
        """
        import ray

        if options.name not in self._actors:
            if not self.fits(options):
                self.close(TRAINERS)
            # Ray restarts an actor without limit: the actors themselves count their deaths and raise an error (retries.py).
            remote = ray.remote(Host).options(
                num_cpus=options.cpus,
                num_gpus=options.gpus,
                max_restarts=-1,
                max_task_retries=-1,
                runtime_env={"env_vars": options.env} if options.env else None,
            )
            handles = [remote.remote(options.worker, index, options.name, options.restarts) for index in range(options.actors)]
            self._actors[options.name] = Actors(handles, options)
        return self._actors[options.name]

    def opened(self, name: str) -> Actors | None:
        return self._actors.get(name)

    def keep(self, actors: Actors) -> None:
        """Takes actors that were started elsewhere, so that they count and end as those of other pools."""
        self._actors[actors.options.name] = actors

    def fits(self, more: PoolOptions | None = None) -> bool:
        """Whether the cluster has room for all open pools, for `more`, and for what dispatches their work.

        A new pool of actors counts as too large where there are several nodes, because none of them may have enough room for one.
        """
        import ray

        pools = [*(actors.options for actors in self._actors.values()), *([more] if more else [])]
        total = ray.cluster_resources()
        cpus = total.get("CPU", 0.0) - SPARE_CPUS - sum(pool.actors * pool.cpus for pool in pools)
        gpus = total.get("GPU", 0.0) - sum(pool.actors * pool.gpus for pool in pools)
        one_node = more is None or sum(node["Alive"] for node in ray.nodes()) == 1
        return one_node and min(cpus, gpus) > -1e-9

    def close_all(self, *, but: str) -> None:
        """Ends the actors of every other pool."""
        for name in [name for name in self._actors if name != but]:
            self.close(name)

    def close(self, name: str) -> None:
        """Ends the actors of a pool."""
        actors = self._actors.pop(name, None)
        if actors is not None:
            actors.stop()


def call_all(actors: Actors, spec: Any, verb: str, *arguments: Any) -> list[Any]:
    """Returns the result of `verb` from each actor of a pool, in their order; StalledError after `stall_s` seconds."""
    import ray

    options = actors.options
    try:
        return ray.get([actor.call.remote(spec, verb, *arguments) for actor in actors], timeout=options.stall_s)
    except ray.exceptions.GetTimeoutError:
        raise StalledError(
            f"{verb}: the actors ({options.name}) did not answer for {options.stall_s:g} s; see their logs in the Ray dashboard, "
            "then submit the same command again"
        ) from None
