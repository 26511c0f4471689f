"""Ray Data over shards: rows fan out to pools of actors, each actor commits its shard, the driver only counts.

Rows never pass through the driver. A shard is a slice of a committed prompts table; a step is an actor class whose call
takes a shard number, commits that shard and returns its counts. Steps follow each other in one streaming pipeline, so
shard k is scored while shard k+1 is generated.
"""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from evolve_ray.errors import IntegrityError
from evolve_ray.rows import read_jsonl, read_table, write_jsonl, write_table
from evolve_ray.store import Manifest, Stage, commit, read_manifest


@dataclass(frozen=True)
class Step:
    """One actor pool of the pipeline: `actor(spec)` is built once per actor and called once per shard."""

    stage: Stage
    actor: type
    spec: Any
    actors: int
    cpus: float
    gpus: float
    restarts: int = 3
    env: dict[str, str] = field(default_factory=dict)


class ShardActor:
    """Base of the pool's actors: commits each shard once, and returns what is committed if it already is.

    A subclass implements `process(prompts) -> (rows, rejected, stats)` and names its schema.
    """

    schema: Any

    def __init__(self, spec: Any):
        self.spec = spec

    def process(self, shard: int, prompts: list[dict]) -> tuple[list[dict], list[dict], dict]:
        raise NotImplementedError

    def __call__(self, batch: dict) -> dict:
        shard = int(batch["shard"][0])
        final = Path(self.spec.work) / shard_name(shard)
        manifest = read_manifest(final)
        if manifest is None:
            prompts = read_slice(Path(self.spec.prompts), shard, self.spec.shard_prompts)
            rows, rejected, stats = self.process(shard, prompts)
            aside = final.parent / f".{final.name}-{uuid.uuid4().hex[:8]}"
            aside.mkdir()
            write_table(aside / "rows.parquet", rows, self.schema)
            write_jsonl(aside / "rejected.jsonl", rejected)
            manifest = commit(
                aside, final, stage="shard", key=self.spec.key, num_rows=len(rows), num_rejected=len(rejected), **stats
            )
        return {"shard": [shard], "stats": [json.dumps(manifest.stats)]}


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def read_slice(path: Path, shard: int, size: int) -> list[dict]:
    return pq.read_table(path).slice(shard * size, size).to_pylist()


def run(steps: list[Step], num_shards: int, on_shard: Callable[[int, dict], None]) -> None:
    """Streams the shards that are not committed in every step through the actor pools."""
    import ray

    todo = [
        {"shard": shard}
        for shard in range(num_shards)
        if any(read_manifest(step.stage.work / shard_name(shard), verify=True) is None for step in steps)
    ]
    if not todo:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.from_items(todo, override_num_blocks=len(todo))
    for step in steps:
        dataset = dataset.map_batches(
            step.actor,
            fn_constructor_args=(step.spec,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(step.actors, len(todo)), max_tasks_in_flight_per_actor=2),
            num_cpus=step.cpus,
            num_gpus=step.gpus or None,
            runtime_env={"env_vars": step.env} if step.env else None,
            max_restarts=step.restarts,
            max_task_retries=step.restarts,
        )
    for row in dataset.iter_rows():
        on_shard(int(row["shard"]), json.loads(row["stats"]))


def finish(stage: Stage, num_shards: int, num_in: int) -> Manifest:
    """Commits a sharded stage as a whole, after the conservation law: rows in = rows out + rejected."""
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
    used, lost = totals.pop("num_in", 0), totals.pop("num_rejected", 0)
    if used != num_in:
        raise IntegrityError(f"{stage.final}: {num_in} rows went in, but {used} were accounted for ({lost} rejected)")
    return stage.commit(rejected, num_in=num_in, num_shards=num_shards, **totals)


def read_rows(manifest: Manifest) -> Iterator[dict]:
    """All rows of a committed sharded stage, shard by shard in order."""
    for name in sorted(name for name in manifest.files if name.endswith("/rows.parquet")):
        yield from read_table(manifest.path(name))
