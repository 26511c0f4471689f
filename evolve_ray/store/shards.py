"""Shards of a stage: slices of a committed table of prompts. Each shard is committed alone, then all together as the stage.

Rows never pass through the driver: a worker reads its slice, commits its results, and returns only counts.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from evolve_ray.errors import EvolveError, IntegrityError
from evolve_ray.store.manifest import Manifest, read_manifest
from evolve_ray.store.rows import from_table, read_jsonl, read_table
from evolve_ray.store.run import Stage

MAX_LISTED = 5  # rejected rows that an error lists


def shard_name(shard: int) -> str:
    """Returns the name of the folder of a shard."""
    return f"shard-{shard:05d}"


def read_slice(path: Path, shard: int, size: int) -> list[dict]:
    """Returns the rows of a shard of `size` rows; reads only the row groups of the table that contain them."""
    first, last = shard * size, (shard + 1) * size
    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        touched = [group for group, end in enumerate(ends) if end > first and end - sizes[group] < last]
        if not touched:
            return []
        before = ends[touched[0]] - sizes[touched[0]]
        return from_table(file.read_row_groups(touched).slice(first - before, size))


def total(manifest: Manifest, num_shards: int, name: str) -> int:
    """Returns the sum of the count `name` over the first `num_shards` shards of a committed stage."""
    manifests = [read_manifest(manifest.folder / shard_name(shard)) for shard in range(num_shards)]
    return sum(part.stats[name] for part in manifests if part)


@dataclass(frozen=True)
class RejectionLimit:
    """The largest fraction of a stage's rows that may be rejected, the option that sets it, and the error raised above it."""

    allowed: float
    option: str
    error: type[EvolveError]


def finish(stage: Stage, num_shards: int, num_in: int, limit: RejectionLimit | None = None) -> Manifest:
    """Commits a stage whose shards are all committed; checks first that no row was lost: rows in = rows accounted for.

    IntegrityError if a shard is missing or the counts differ, `limit.error` if more rows were rejected than `limit` allows.
    """
    names = {shard_name(shard) for shard in range(num_shards)}
    totals: dict[str, float] = {}
    rejected_files: list[Path] = []
    for name in sorted(names):
        manifest = read_manifest(stage.work / name)
        if manifest is None:
            raise IntegrityError(
                f"{stage.work / name}: is missing, although all shards were processed; submit the same command again"
            )
        for key, value in manifest.stats.items():
            totals[key] = totals.get(key, 0) + value
        rejected_files.append(manifest.path("rejected.jsonl"))
    for path in stage.work.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    num_used, num_rejected = totals.pop("num_in", 0), totals.pop("num_rejected", 0)
    rejected = (row for file in rejected_files for row in read_jsonl(file))
    if num_used != num_in:
        raise IntegrityError(
            f"{stage.final}: {num_in} rows went in, but {num_used} were accounted for; delete {stage.work} and submit the same "
            "command again"
        )
    if limit and num_rejected > limit.allowed * num_in:
        examples = "; ".join(f"{row['id']}: {row['reason']}" for row in itertools.islice(rejected, MAX_LISTED))
        raise limit.error(
            f"{stage.final}: {num_rejected} of {num_in} rows were rejected, more than {limit.option} ({limit.allowed:g}) allows: "
            f"{examples}; raise that option to continue without these rows, or fix the cause and delete {stage.work}"
        )
    return stage.commit(rejected, num_in=num_in, num_shards=num_shards, **totals)


def read_rows(manifest: Manifest) -> Iterator[dict]:
    """Yields all rows of a committed stage, shard by shard in order."""
    for name in sorted(name for name in manifest.files if name.endswith("/rows.parquet")):
        yield from read_table(manifest.path(name))
