"""Runs the shards of one or more stages through pools of actors, with Ray Data: each actor commits its shard, the driver counts.

In each step of a pipeline a shard dispatcher asks an actor of the pool to process a shard and to commit the result. The steps
form one streaming pipeline, so shard k is scored while shard k+1 is generated. A pool belongs to the driver and outlives the
pipeline: engines start once and get new weights.
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
from evolve_ray.pools.retries import Heartbeat, hang_mark
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.run import Stage, now
from evolve_ray.store.shards import shard_name

MAX_RESTARTS = 3  # of a pipeline whose shard dispatcher died, perhaps with its node
START_S = 900.0  # until the first heartbeat of an actor: it needs free resources on a node, a process, and its imports


@dataclass(frozen=True)
class Step:
    """One step of the pipeline: the pool that processes the shards of `stage`, and the spec of its workers."""

    stage: Stage
    pool: PoolOptions
    spec: Any


class ShardDispatcher:
    """The Ray Data actor of a step: hands each shard to a free actor of the pool, and waits until the actor has committed it.

    It is one process with a thread for each actor of the pool. It returns an EvolveError as data, because Ray Data would wrap
    the error in a traceback and lose its class.
    """

    def __init__(self, actors: Actors, stage: str, spec: Any):
        self.actors, self.stage, self.spec = actors, stage, spec
        self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(actors)):
            self.free.put(index)

    def __call__(self, batch: dict) -> dict:
        shard, result = int(batch["shard"][0]), json.loads(batch["result"][0])
        if "error" not in result:
            index, begun = self.free.get(), now()
            try:
                processed = self.process(index, shard)
            finally:
                self.free.put(index)
            if "stats" in processed:
                times = {"begun": begun, "ended": now()}
                processed["steps"] = result.get("steps", {}) | {self.stage: times | seconds_of(processed["stats"])}
            result |= processed
        return {"shard": [shard], "result": [json.dumps(result)]}

    def process(self, index: int, shard: int) -> dict:
        """Returns {"stats": the counts of the shard} from the actor `index`, or {"error": the packed error}."""
        import ray

        actor, pool = self.actors[index], self.actors.options
        try:
            return {"stats": commit_shard(actor, index, shard, pool, self.stage, self.spec)}
        except StalledError as error:
            ray.kill(actor)  # without restart, so that no other call waits for this actor
            return {"error": pack(error)}
        except EvolveError as error:
            return {"error": pack(error)}
        except ray.exceptions.RayActorError as error:
            message = (
                f"{pool.name}: the actor that works on shard {shard} cannot be restarted; see its log in the "
                f"Ray dashboard, then submit the same command again: {first_line(error)}"
            )
            return {"error": pack(ResourceError(message))}


def seconds_of(stats: dict[str, Any]) -> dict[str, float]:
    """The counts of a shard that are seconds: how long an engine or a scorer worked, or started."""
    return {name: value for name, value in stats.items() if name.endswith("_seconds")}


def commit_shard(actor: Any, index: int, shard: int, pool: PoolOptions, stage: str, spec: Any) -> dict:
    """Returns the counts of a shard that an actor commits; an actor without progress for `stall_s` is killed and restarted.

    StalledError if the actor does not start, or makes no progress more than `restarts` times.
    """
    import ray

    call = actor.call.options(name=f"{stage}: shard {shard}").remote(spec, "commit_shard", shard)
    heartbeat, hangs, idle, last = Heartbeat(Path(spec.work), index), 0, 0.0, time.monotonic()
    seen, tick = heartbeat.read(), min(5.0, pool.stall_s / 4)
    advice = "see its log in the Ray dashboard, or allow it more time with stall_s, then submit the same command again"
    while not ray.wait([call], timeout=tick)[0]:
        current, passed = heartbeat.read(), time.monotonic() - last
        last += passed
        idle += min(passed, 2 * tick)  # if this process was suspended, the actor may have worked meanwhile
        if current != seen:
            seen, idle = current, 0.0
        elif current[0] == -1 and idle > max(START_S, pool.stall_s):
            raise StalledError(f"{stage}: shard {shard}: its actor ({pool.name}) did not start within {idle:.0f} s; {advice}")
        elif current[0] == shard and idle > pool.stall_s:  # an actor at another shard is watched by the call for that shard
            hangs += 1
            if hangs > pool.restarts:
                raise StalledError(
                    f"{stage}: shard {shard}: its actor ({pool.name}) made no progress for {pool.stall_s:g} s, {hangs} times; "
                    f"{advice}"
                )
            hang_mark(Path(spec.work), shard).touch()
            heartbeat.path.unlink(missing_ok=True)  # so that the restarted actor counts as not started yet
            ray.kill(actor, no_restart=False)
            idle = 0.0
    return ray.get(call)


def dispatcher_stall_s(steps: list[Step]) -> float:
    """Returns the seconds without a heartbeat after which the shard dispatcher itself must hang.

    It is longer than the time after which the dispatcher kills a hanging actor.
    """
    return 1.5 * max(START_S, *(step.pool.stall_s for step in steps))


def run(pools: Pools, steps: list[Step], num_shards: int, on_shard: Callable[[int, dict], None]) -> None:
    """Processes all shards that are not committed in every step; starts a new pipeline if a shard dispatcher dies.

    `on_shard` is called as in `stream`. ResourceError if shard dispatchers die more than `MAX_RESTARTS` times.
    """
    from ray.exceptions import RayActorError

    for deaths in itertools.count(1):
        todo = [
            {"shard": shard, "result": "{}"}
            for shard in range(num_shards)
            if any(read_manifest(step.stage.work / shard_name(shard), verify=True) is None for step in steps)
        ]
        if not todo:
            return
        try:
            return stream(pools, steps, todo, on_shard)
        except RayActorError as error:  # the dispatcher died, or its node is not reachable
            if deaths > MAX_RESTARTS:
                raise ResourceError(
                    f"{steps[0].stage.name}: the shard dispatcher died {deaths} times; see the Ray dashboard (often out of "
                    f"memory), then submit the same command again: {first_line(error)}"
                ) from None


def stream(pools: Pools, steps: list[Step], todo: list[dict], on_shard: Callable[[int, dict], None]) -> None:
    """Runs one Ray Data pipeline; calls `on_shard` with each finished shard.

    Its second argument has the `stats` of the last step, and by the name of the stage the `steps`: when each began and ended
    (`begun`, `ended`), and how many seconds its actor worked (`engine_seconds`, ...).
    """
    import ray
    from ray.util.annotations import RayDeprecationWarning

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray still writes the rest to its log files
    dataset = ray.data.from_items(todo, override_num_blocks=len(todo))
    dataset.set_name(f"{steps[0].stage.final.parent.name} {' + '.join(step.stage.name for step in steps)}")  # in the dashboard
    for step in steps:
        actors = pools.open(step.pool)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)  # for the `max_...` arguments, which have no successor yet
            dataset = dataset.map_batches(
                ShardDispatcher,
                fn_constructor_kwargs={"actors": actors, "stage": step.stage.name, "spec": step.spec},
                batch_size=1,
                num_cpus=0.01,  # a dispatcher only waits
                compute=ray.data.ActorPoolStrategy(
                    size=1, max_concurrent_calls_per_actor=min(len(actors), len(todo)), enable_true_multi_threading=True
                ),
                max_restarts=0,  # Ray warns about each Ray Data actor that it may restart; `run` starts a new pipeline instead
                max_task_retries=0,
            )
    # Without prefetching, a shard is reported at once, and not when the next one is done, which may never happen.
    for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0):
        result = json.loads(batch["result"][0])
        if "error" in result:
            raise unpack(result["error"])
        on_shard(int(batch["shard"][0]), result)
