"""Ray Data over shards: rows fan out to pools of actors, each actor commits its shard, the driver only counts.

Rows never pass through the driver. A shard is a slice of a committed prompts table; a step asks an actor of its pool to
process that slice and commit the result. Steps follow each other in one streaming pipeline, so shard k is scored while
shard k+1 is generated. A pool belongs to the driver and outlives a pipeline: engines start once and get new weights.
"""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from evolve_ray.errors import EvolveError, IntegrityError, ResourceError, pack, unpack
from evolve_ray.metrics import Work
from evolve_ray.rows import read_jsonl, read_table, write_jsonl, write_table
from evolve_ray.store import Manifest, Stage, commit, read_manifest


@dataclass(frozen=True)
class PoolOptions:
    """What a pool of actors takes from the cluster. `env` is set before the processes start."""

    name: str
    worker: type
    actors: int
    cpus: float
    gpus: float
    restarts: int
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One arrow of the pipeline: which pool processes the shards of `stage`, with what."""

    stage: Stage
    pool: PoolOptions
    spec: Any


class ShardWorker:
    """What an actor hosts: commits each shard once, and returns what is committed if it already is.

    A subclass implements `process` and names the schema of its rows; `renew` gives it another spec of the same run.
    """

    schema: Any

    def __init__(self, spec: Any):
        self.spec = spec

    def renew(self, spec: Any) -> None:
        self.spec = spec

    def process(self, shard: int, prompts: list[dict]) -> tuple[list[dict], list[dict], dict]:
        """(rows, rejected rows, counts) of one slice of prompts."""
        raise NotImplementedError

    def commit_shard(self, shard: int) -> dict:
        """Counts of the committed shard."""
        final = Path(self.spec.work) / shard_name(shard)
        manifest = read_manifest(final)
        if manifest is None:
            made, rejected, stats = self.process(shard, read_slice(Path(self.spec.prompts), shard, self.spec.shard_prompts))
            aside = final.parent / f".{final.name}-{uuid.uuid4().hex[:8]}"
            aside.mkdir()
            write_table(aside / "rows.parquet", made, self.schema)
            write_jsonl(aside / "rejected.jsonl", rejected)
            stats |= {"num_rows": len(made), "num_rejected": len(rejected)}
            manifest = commit(aside, final, stage="shard", key=self.spec.key, **stats)
        return manifest.stats


class Host:
    """The Ray actor of a pool: builds its worker at the first shard, renews it when a stage brings another spec."""

    def __init__(self, worker: type[ShardWorker], pool: str = ""):
        self.make = worker
        self.worker: ShardWorker | None = None
        self.work = Work(pool)

    def call(self, spec: Any, verb: str, *arguments: Any) -> Any:
        """`worker.verb(*arguments)` of a worker that was built or renewed for `spec`."""
        started = time.monotonic()
        if self.worker is None:
            self.worker = self.make(spec)
        elif self.worker.spec != spec:
            self.worker.renew(spec)
        answer = getattr(self.worker, verb)(*arguments)
        self.work.did(started, time.monotonic(), answer if verb == "commit_shard" else None)
        return answer


class Pools:
    """The actors of a run by pool name; they die with the driver that made them."""

    def __init__(self) -> None:
        self._actors: dict[str, list[Any]] = {}

    def open(self, options: PoolOptions) -> list[Any]:
        import ray

        if options.name not in self._actors:
            remote = ray.remote(Host).options(
                num_cpus=options.cpus,
                num_gpus=options.gpus,
                max_restarts=options.restarts,
                max_task_retries=options.restarts,
                runtime_env={"env_vars": options.env} if options.env else None,
            )
            self._actors[options.name] = [remote.remote(options.worker, options.name) for _ in range(options.actors)]
        return self._actors[options.name]

    def close(self, name: str) -> None:
        """Ends a pool's actors and gives their resources back."""
        import ray

        for actor in self._actors.pop(name, []):
            ray.kill(actor)


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def read_slice(path: Path, shard: int, size: int) -> list[dict]:
    return pq.read_table(path).slice(shard * size, size).to_pylist()


def ask_pool(batch: dict, actors: list[Any], pool: PoolOptions, spec: Any) -> dict:
    """The Ray Data task of a step: hands one shard to its actor and waits until it is committed there.

    One of our errors goes on as data: Ray Data would wrap it into a traceback in which its class is lost.
    """
    import ray

    shard = int(batch["shard"][0])
    told = json.loads(batch["told"][0])
    if "error" not in told:
        try:
            told = {"stats": ray.get(actors[shard % len(actors)].call.remote(spec, "commit_shard", shard))}
        except EvolveError as error:
            told = {"error": pack(error)}
        except ray.exceptions.RayActorError as error:
            message = (
                f"{pool.name}: the actor that works on shard {shard} died more than {pool.restarts} times; see its log in the "
                f"Ray dashboard, then submit the same command again: {str(error).strip().splitlines()[0]}"
            )
            told = {"error": pack(ResourceError(message))}
    return {"shard": [shard], "told": [json.dumps(told)]}


def run(pools: Pools, steps: list[Step], num_shards: int, on_shard: Callable[[int, dict], None]) -> None:
    """Streams the shards that are not committed in every step through the pools."""
    import ray

    todo = [
        {"shard": shard, "told": "{}"}
        for shard in range(num_shards)
        if any(read_manifest(step.stage.work / shard_name(shard), verify=True) is None for step in steps)
    ]
    if not todo:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its own log files keep the rest
    dataset = ray.data.from_items(todo, override_num_blocks=len(todo))
    for step in steps:
        dataset = dataset.map_batches(
            ask_pool,
            fn_kwargs={"actors": pools.open(step.pool), "pool": step.pool, "spec": step.spec},
            batch_size=1,
            # Tasks only wait for their actor. Two for each keep its queue filled; each is a process, so no more.
            num_cpus=0.01,
            compute=ray.data.TaskPoolStrategy(size=min(2 * step.pool.actors, len(todo))),
        )
    for row in dataset.iter_rows():
        told = json.loads(row["told"])
        if "error" in told:
            raise unpack(told["error"])
        on_shard(int(row["shard"]), told["stats"])


def call_all(actors: list[Any], spec: Any, verb: str, *arguments: Any) -> list[Any]:
    """What each actor of a pool answers to `verb`, in their order."""
    import ray

    return ray.get([actor.call.remote(spec, verb, *arguments) for actor in actors])


def total(manifest: Manifest, num_shards: int, name: str) -> int:
    """The sum of one count over the first shards of a committed sharded stage."""
    found = [read_manifest(manifest.folder / shard_name(shard)) for shard in range(num_shards)]
    return sum(part.stats[name] for part in found if part)


def finish(stage: Stage, num_shards: int, num_in: int) -> Manifest:
    """Commits a sharded stage as a whole, after the conservation law: rows in = rows accounted for."""
    expected = {shard_name(shard) for shard in range(num_shards)}
    totals: dict[str, float] = {}
    rejected: list[dict] = []
    for name in sorted(expected):
        manifest = read_manifest(stage.work / name)
        if manifest is None:
            raise IntegrityError(f"{stage.work / name}: is missing though its stage ended; submit the same command again")
        for key, value in manifest.stats.items():
            totals[key] = totals.get(key, 0) + value
        rejected += read_jsonl(manifest.path("rejected.jsonl"))
    for path in stage.work.iterdir():
        if path.name not in expected:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    used = totals.pop("num_in", 0)
    totals.pop("num_rejected", None)
    if used != num_in:
        raise IntegrityError(f"{stage.final}: {num_in} rows went in, but {used} were accounted for; delete {stage.work}")
    return stage.commit(rejected, num_in=num_in, num_shards=num_shards, **totals)


def read_rows(manifest: Manifest) -> Iterator[dict]:
    """All rows of a committed sharded stage, shard by shard in order."""
    for name in sorted(name for name in manifest.files if name.endswith("/rows.parquet")):
        yield from read_table(manifest.path(name))
