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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.errors import EvolveError, ResourceError, StalledError, first_line, pack, unpack
from evolve_ray.pools.actors import Actors, PoolOptions, Pools
from evolve_ray.pools.retries import Heartbeat, mark_of
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.run import Stage, now
from evolve_ray.store.shards import shard_name

MAX_LOST = 3  # times that the process of a step which hands out shards may be lost, with its node perhaps
START_S = 900.0  # until an actor's first sign of life: a place on a node, a process, its imports


@dataclass(frozen=True)
class Step:
    """One arrow of the pipeline: which pool processes the shards of `stage`, with what."""

    stage: Stage
    pool: PoolOptions
    spec: Any


class ShardDispatcher:
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
    beats, hangs, idle, last = Heartbeat(Path(spec.work), index), 0, 0.0, time.monotonic()
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


def dispatcher_stall_s(steps: list[Step]) -> float:
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
                ShardDispatcher,
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
