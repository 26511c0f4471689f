"""Ray Data over shards: rows fan out to pools of actors, each actor commits its shard, the driver only counts.

Rows never pass through the driver. A shard is a slice of a committed prompts table; a step asks an actor of its pool to
process that slice and commit the result. Steps follow each other in one streaming pipeline, so shard k is scored while
shard k+1 is generated. A pool belongs to the driver and outlives a pipeline: engines start once and get new weights.
"""

import itertools
import json
import logging
import queue
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from evolve_ray.attempts import Attempts, Beats, Builds, mark_of
from evolve_ray.errors import EvolveError, IntegrityError, ResourceError, StalledError, first_line, pack, unpack
from evolve_ray.metrics import Work
from evolve_ray.rows import read_jsonl, read_table, reject, write_jsonl, write_table
from evolve_ray.store import Manifest, Stage, commit, full_disk_named, now, read_manifest

SHOWN = 5  # rejected rows that an error lists
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


@dataclass(frozen=True)
class Step:
    """One arrow of the pipeline: which pool processes the shards of `stage`, with what."""

    stage: Stage
    pool: PoolOptions
    spec: Any


class ShardWorker:
    """What an actor hosts: commits each shard once, and returns what is committed if it already is.

    A subclass implements `process` and names the schema of its rows; `renew` gives it another spec of the same run. It calls
    `beat` whenever it got on with a shard: who does not is taken for hanging after a while.
    """

    schema: Any
    stage = ""  # what its rejected rows are called after
    name = "worker"
    restarts = 3  # deaths on a shard before its rows are looked at
    beat: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, spec: Any):
        self.spec = spec

    def renew(self, spec: Any) -> None:
        self.spec = spec

    def process(self, shard: int, prompts: list[dict]) -> tuple[list[dict], list[dict], dict]:
        """(rows, rejected rows, counts) of one slice of prompts."""
        raise NotImplementedError

    def reject_prompt(self, shard: int, prompt: dict, reason: str) -> list[dict]:
        """The rejected rows of a prompt that is not processed: as many as it would have counted in `num_in`."""
        return [reject(prompt, self.stage, reason)]

    def commit_shard(self, shard: int) -> dict:
        """Counts of the committed shard."""
        final = Path(self.spec.work) / shard_name(shard)
        manifest = read_manifest(final)
        if manifest is None:
            prompts = read_slice(Path(self.spec.prompts), shard, self.spec.shard_prompts)
            attempts = Attempts(final.parent, shard, self.restarts, self.name)
            (made, rejected, stats), killers = attempts.process(prompts, lambda some: self.process(shard, some))
            for prompt in killers:
                lost = self.reject_prompt(shard, prompt, "killed its worker each time, also alone")
                rejected = rejected + lost
                stats["num_in"] += len(lost)
            aside = final.parent / f".{final.name}-{uuid.uuid4().hex[:8]}"
            with full_disk_named(final):
                aside.mkdir()
                write_table(aside / "rows.parquet", made, self.schema)
                write_jsonl(aside / "rejected.jsonl", rejected)
            stats |= {"num_rows": len(made), "num_rejected": len(rejected)}
            manifest = commit(aside, final, stage="shard", key=self.spec.key, **stats)
        return manifest.stats


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


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def read_slice(path: Path, shard: int, size: int) -> list[dict]:
    """The rows of a shard; of the table no more is read than the row groups in which they stand."""
    first, last = shard * size, (shard + 1) * size
    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        touched = [group for group, end in enumerate(ends) if end > first and end - sizes[group] < last]
        if not touched:
            return []
        before = ends[touched[0]] - sizes[touched[0]]
        return file.read_row_groups(touched).slice(first - before, size).to_pylist()


class AskPool:
    """The Ray Data actor of a step: hands each shard to an actor of the pool that is free, and waits until it is committed there.

    It is one process with a thread for each actor of the pool. One of our errors goes on as data: Ray Data would wrap it into a
    traceback in which its class is lost.
    """

    def __init__(self, actors: "Actors", stage: str, spec: Any):
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
                f"Ray dashboard, then submit the same command again: {str(error).strip().splitlines()[0]}"
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


def total(manifest: Manifest, num_shards: int, name: str) -> int:
    """The sum of one count over the first shards of a committed sharded stage."""
    found = [read_manifest(manifest.folder / shard_name(shard)) for shard in range(num_shards)]
    return sum(part.stats[name] for part in found if part)


@dataclass(frozen=True)
class Loss:
    """The fraction of a stage's rows that may be rejected, the option that says so, and the error of one that loses more."""

    allowed: float
    option: str
    error: type[EvolveError]


def finish(stage: Stage, num_shards: int, num_in: int, loss: Loss | None = None) -> Manifest:
    """Commits a sharded stage as a whole, after the conservation law: rows in = rows accounted for."""
    names = {shard_name(shard) for shard in range(num_shards)}
    totals: dict[str, float] = {}
    files: list[Path] = []  # of rejected rows, which are read one shard at a time
    for name in sorted(names):
        manifest = read_manifest(stage.work / name)
        if manifest is None:
            raise IntegrityError(f"{stage.work / name}: is missing though its stage ended; submit the same command again")
        for key, value in manifest.stats.items():
            totals[key] = totals.get(key, 0) + value
        files.append(manifest.path("rejected.jsonl"))
    for path in stage.work.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    used, num_rejected = totals.pop("num_in", 0), totals.pop("num_rejected", 0)
    rejected = (row for file in files for row in read_jsonl(file))
    if used != num_in:
        raise IntegrityError(f"{stage.final}: {num_in} rows went in, but {used} were accounted for; delete {stage.work}")
    if loss and num_rejected > loss.allowed * num_in:
        shown = "; ".join(f"{row['id']}: {row['reason']}" for row in itertools.islice(rejected, SHOWN))
        raise loss.error(
            f"{stage.final}: {num_rejected} of {num_in} rows were rejected, more than {loss.option} ({loss.allowed:g}) allows: "
            f"{shown}; raise it to go on without them, or mend the cause and delete {stage.work}"
        )
    return stage.commit(rejected, num_in=num_in, num_shards=num_shards, **totals)


def read_rows(manifest: Manifest) -> Iterator[dict]:
    """All rows of a committed sharded stage, shard by shard in order."""
    for name in sorted(name for name in manifest.files if name.endswith("/rows.parquet")):
        yield from read_table(manifest.path(name))
