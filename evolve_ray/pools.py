"""Pools of actors and Ray Data over shards: rows fan out, each actor commits its shard, the driver only counts.

A step asks an actor of its pool to process a shard and commit the result. Steps follow each other in one streaming pipeline,
so shard k is scored while shard k+1 is generated. A pool belongs to the driver and outlives a pipeline: engines start once
and get new weights.
"""

import itertools
import json
import logging
import queue
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve_ray.attempts import Beats, Builds, mark_of
from evolve_ray.errors import EvolveError, ResourceError, StalledError, first_line, pack, unpack
from evolve_ray.metrics import Work
from evolve_ray.shards import ShardWorker, shard_name
from evolve_ray.store import Stage, now, read_manifest

MAX_LOST = 3  # times that the process of a step which hands out shards may be lost, with its node perhaps
START_S = 900.0  # until an actor's first sign of life: a place on a node, a process, its imports


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
            beats = Beats(Path(spec.work), self.index)
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


@dataclass(frozen=True)
class Step:
    """One arrow of the pipeline: which pool processes the shards of `stage`, with what."""

    stage: Stage
    pool: PoolOptions
    spec: Any


class AskPool:
    """The Ray Data actor of a step: hands each shard to an actor of the pool that is free, and waits until it is committed there.

    It is one process with a thread for each actor of the pool. One of our errors goes on as data: Ray Data would wrap it into a
    traceback in which its class is lost.
    """

    def __init__(self, actors: Actors, stage: str, spec: Any):
        self.actors, self.stage, self.spec = actors, stage, spec
        self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(actors)):
            self.free.put(index)

    def __call__(self, batch: dict) -> dict:
        shard, told = int(batch["shard"][0]), json.loads(batch["told"][0])
        if "error" not in told:
            index, begun = self.free.get(), now()
            try:
                told = {"begun": begun} | told | self.ask(index, shard)
            finally:
                self.free.put(index)
        return {"shard": [shard], "told": [json.dumps(told)]}

    def ask(self, index: int, shard: int) -> dict:
        import ray

        actor, pool = self.actors[index], self.actors.options
        try:
            return {"stats": watched(actor, index, shard, pool, self.stage, self.spec)}
        except StalledError as error:
            ray.kill(actor)  # for good: nobody else waits for it in vain
            return {"error": pack(error)}
        except EvolveError as error:
            return {"error": pack(error)}
        except ray.exceptions.RayActorError as error:
            message = (
                f"{pool.name}: the actor that works on shard {shard} cannot be started again; see its log in the "
                f"Ray dashboard, then submit the same command again: {first_line(error)}"
            )
            return {"error": pack(ResourceError(message))}


def watched(actor: Any, index: int, shard: int, pool: PoolOptions, stage: str, spec: Any) -> dict:
    """Counts of a shard from an actor that must get on: without a beat for `stall_s` it is ended, and Ray starts it again."""
    import ray

    call = actor.call.options(name=f"{stage}: shard {shard}").remote(spec, "commit_shard", shard)
    beats, hangs, idle, last = Beats(Path(spec.work), index), 0, 0.0, time.monotonic()
    seen, tick = beats.read(), min(5.0, pool.stall_s / 4)
    way_out = "see its log in the Ray dashboard, or allow it more time with stall_s, then submit the same command again"
    while not ray.wait([call], timeout=tick)[0]:
        now, passed = beats.read(), time.monotonic() - last
        last += passed
        idle += min(passed, 2 * tick)  # where this process itself was stopped, nobody can tell what the actor did
        if now != seen:
            seen, idle = now, 0.0
        elif now[0] == -1 and idle > max(START_S, pool.stall_s):
            raise StalledError(f"{stage}: shard {shard}: its actor ({pool.name}) did not start in {idle:.0f} s; {way_out}")
        elif now[0] == shard and idle > pool.stall_s:  # else it is another shard's hang
            hangs += 1
            if hangs > pool.restarts:
                raise StalledError(
                    f"{stage}: shard {shard}: its actor ({pool.name}) made no progress for {pool.stall_s:g} s, {hangs} times; "
                    f"{way_out}"
                )
            mark_of(Path(spec.work), shard).touch()
            beats.path.unlink(missing_ok=True)  # the next one begins anew
            ray.kill(actor, no_restart=False)
            idle = 0.0
    return ray.get(call)


def silence(steps: list[Step]) -> float:
    """Seconds without a sign of any actor after which it is not an actor that hangs: `watched` would have ended it before."""
    return 1.5 * max(START_S, *(step.pool.stall_s for step in steps))


def run(pools: Pools, steps: list[Step], num_shards: int, on_shard: Callable[[int, str, dict], None]) -> None:
    """Streams the shards that are not committed in every step through the pools, again where who hands them out is lost."""
    from ray.exceptions import RayActorError

    for lost in itertools.count(1):
        todo = [
            {"shard": shard, "told": "{}"}
            for shard in range(num_shards)
            if any(read_manifest(step.stage.work / shard_name(shard), verify=True) is None for step in steps)
        ]
        if not todo:
            return
        try:
            return stream(pools, steps, todo, on_shard)
        except RayActorError as error:  # died, or out of reach with its node
            if lost > MAX_LOST:
                raise ResourceError(
                    f"{steps[0].stage.name}: what hands out shards died {lost} times; see the Ray dashboard (often memory), then "
                    f"submit the same command again: {first_line(error)}"
                ) from None


def stream(pools: Pools, steps: list[Step], todo: list[dict], on_shard: Callable[[int, str, dict], None]) -> None:
    """One Ray Data pipeline; tells of each shard that comes out of it, when it went in and the counts of its last step."""
    import ray
    from ray.util.annotations import RayDeprecationWarning

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its own log files keep the rest
    dataset = ray.data.from_items(todo, override_num_blocks=len(todo))
    dataset.set_name(f"{steps[0].stage.final.parent.name} {' + '.join(step.stage.name for step in steps)}")  # in the dashboard
    for step in steps:
        actors = pools.open(step.pool)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)  # of `max_...`, for which there is no other way yet
            dataset = dataset.map_batches(
                AskPool,
                fn_constructor_kwargs={"actors": actors, "stage": step.stage.name, "spec": step.spec},
                batch_size=1,
                num_cpus=0.01,  # it only waits
                compute=ray.data.ActorPoolStrategy(
                    size=1, max_concurrent_calls_per_actor=min(len(actors), len(todo)), enable_true_multi_threading=True
                ),
                max_restarts=0,  # Ray warns of every actor of Ray Data that it may restart; `run` begins anew instead
                max_task_retries=0,
            )
    # Without prefetching: a shard is told at once, not when the one after it is done, which may be never.
    for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0):
        told = json.loads(batch["told"][0])
        if "error" in told:
            raise unpack(told["error"])
        on_shard(int(batch["shard"][0]), told["begun"], told["stats"])


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
