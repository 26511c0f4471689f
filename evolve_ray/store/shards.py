"""Shards of a stage: slices of a committed prompts table, each committed by itself, and the stage as a whole once all are there.

Rows never pass through the driver: a worker reads its slice, commits what it made of it, and tells counts.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from evolve_ray.errors import EvolveError, IntegrityError
from evolve_ray.store.manifest import Manifest, read_manifest
from evolve_ray.store.rows import read_jsonl, read_table
from evolve_ray.store.run import Stage

SHOWN = 5  # rejected rows that an error lists


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


def total(manifest: Manifest, num_shards: int, name: str) -> int:
    """The sum of one count over the first shards of a committed sharded stage."""
    found = [read_manifest(manifest.folder / shard_name(shard)) for shard in range(num_shards)]
    return sum(part.stats[name] for part in found if part)


@dataclass(frozen=True)
class RejectionLimit:
    """The largest fraction of a stage's rows that may be rejected, the option that sets it, and the error raised above it."""

    allowed: float
    option: str
    error: type[EvolveError]


def finish(stage: Stage, num_shards: int, num_in: int, limit: RejectionLimit | None = None) -> Manifest:
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
    if limit and num_rejected > limit.allowed * num_in:
        shown = "; ".join(f"{row['id']}: {row['reason']}" for row in itertools.islice(rejected, SHOWN))
        raise limit.error(
            f"{stage.final}: {num_rejected} of {num_in} rows were rejected, more than {limit.option} ({limit.allowed:g}) allows: "
            f"{shown}; raise it to go on without them, or mend the cause and delete {stage.work}"
        )
    return stage.commit(rejected, num_in=num_in, num_shards=num_shards, **totals)


def read_rows(manifest: Manifest) -> Iterator[dict]:
    """All rows of a committed sharded stage, shard by shard in order."""
    for name in sorted(name for name in manifest.files if name.endswith("/rows.parquet")):
        yield from read_table(manifest.path(name))
