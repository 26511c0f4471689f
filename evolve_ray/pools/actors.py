"""Pools of Ray actors: started once, given new work and new weights, ended with the driver."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve_ray.errors import StalledError
from evolve_ray.pools.retries import Builds, Heartbeat
from evolve_ray.pools.work import Work
from evolve_ray.pools.worker import ShardWorker


@dataclass(frozen=True)
class PoolOptions:
    """What a pool of actors takes from the cluster. `env` is set before the processes start.

    An actor that dies is started again: a shard may kill it `restarts` times before its rows are looked at one by one. An
    actor that makes no progress for `stall_s` is ended and started again, `restarts` times as well.
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
    """The Ray actor of a pool: builds its worker at the first shard, renews it when a stage brings another spec."""

    def __init__(self, worker: type[ShardWorker], index: int = 0, name: str = "worker", restarts: int = 3):
        self.make, self.index, self.name, self.restarts = worker, index, name, restarts
        self.worker: ShardWorker | None = None
        self.work = Work(name)

    def __repr__(self) -> str:
        """What Ray's dashboard calls the actor."""
        return f"{self.name} {self.index}"

    def call(self, spec: Any, verb: str, *arguments: Any) -> Any:
        """`worker.verb(*arguments)` of a worker that was built or renewed for `spec`."""
        started = time.monotonic()
        beats = None
        if verb == "commit_shard":
            beats = Heartbeat(Path(spec.work), self.index)
            beats.start(*arguments)
        if self.worker is None:
            builds = Builds(Path(spec.work), self.index, self.restarts, self.name) if beats else None
            if builds:
                builds.begin()
            self.worker = self.make(spec)
            self.worker.name, self.worker.restarts = self.name, self.restarts
            if builds:
                builds.done()
        elif self.worker.spec != spec:
            self.worker.renew(spec)
        self.worker.beat = beats or (lambda: None)
        answer = getattr(self.worker, verb)(*arguments)
        self.work.did(started, time.monotonic(), answer if verb == "commit_shard" else None)
        return answer


class Actors(list):
    """The handles of a pool's actors, and its options."""

    def __init__(self, handles: list[Any], options: PoolOptions):
        super().__init__(handles)
        self.options = options

    def __reduce__(self) -> Any:
        return Actors, (list(self), self.options)


class Pools:
    """The actors of a run by pool name; they die with the driver that made them."""

    def __init__(self) -> None:
        self._actors: dict[str, Actors] = {}

    def open(self, options: PoolOptions) -> Actors:
        import ray

        if options.name not in self._actors:
            # Ray restarts an actor as often as it dies: when that is too often, the actors say so themselves (attempts.py).
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

    def close(self, name: str) -> None:
        """Ends a pool's actors and gives their resources back."""
        import ray

        for actor in self._actors.pop(name, []):
            ray.kill(actor)


def call_all(actors: Actors, spec: Any, verb: str, *arguments: Any) -> list[Any]:
    """What each actor of a pool answers to `verb`, in their order."""
    import ray

    options = actors.options
    try:
        return ray.get([actor.call.remote(spec, verb, *arguments) for actor in actors], timeout=options.stall_s)
    except ray.exceptions.GetTimeoutError:
        raise StalledError(
            f"{verb}: the actors ({options.name}) gave no answer for {options.stall_s:g} s; see their logs in the Ray dashboard, "
            "then submit the same command again"
        ) from None
