"""The base class of the workers that the actors of a pool run."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.pools.retries import Attempts
from evolve_ray.store.files import report_disk_errors
from evolve_ray.store.manifest import commit, read_manifest
from evolve_ray.store.rows import reject, write_jsonl, write_table
from evolve_ray.store.shards import read_slice, shard_name


class ShardWorker:
    """Processes shards and commits each once; for a shard that is already committed it only returns the counts.

    A subclass implements `process` and sets the schema of its rows. It calls `beat` after each piece of progress: a worker that
    does not is treated as hanging after `stall_s` seconds.
    """

    schema: Any
    details: Any = None  # further columns, each written only if a row has a value in it
    stage = ""  # the stage name in its rejected rows
    name = "worker"
    restarts = 3  # deaths on one shard before the rows that kill the worker are searched for
    beat: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, spec: Any):
        self.spec = spec

    def renew(self, spec: Any) -> None:
        """Takes another spec of the same run."""
        self.spec = spec

    def process(self, shard: int, prompts: list[dict]) -> tuple[list[dict], list[dict], dict]:
        """Returns (rows, rejected rows, counts) of one slice of prompts."""
        raise NotImplementedError

    def reject_prompt(self, shard: int, prompt: dict, reason: str) -> list[dict]:
        """Returns the rejected rows of a prompt that is not processed, as many as it would have added to `num_in`."""
        return [reject(prompt, self.stage, reason)]

    def commit_shard(self, shard: int) -> dict:
        """Commits a shard, if it is not committed yet; returns its counts."""
        final = Path(self.spec.work) / shard_name(shard)
        manifest = read_manifest(final)
        if manifest is None:
            prompts = read_slice(Path(self.spec.prompts), shard, self.spec.shard_prompts)
            attempts = Attempts(final.parent, shard, self.restarts, self.name)
            (rows, rejected, stats), killers = attempts.process(prompts, lambda part: self.process(shard, part))
            for prompt in killers:
                rejected_rows = self.reject_prompt(shard, prompt, "killed its worker each time, also alone")
                rejected = rejected + rejected_rows
                stats["num_in"] += len(rejected_rows)
            temporary = final.parent / f".{final.name}-{uuid.uuid4().hex[:8]}"
            with report_disk_errors(final):
                temporary.mkdir()
                write_table(temporary / "rows.parquet", rows, self.schema, self.details)
                write_jsonl(temporary / "rejected.jsonl", rejected)
            stats |= {"num_rows": len(rows), "num_rejected": len(rejected)}
            manifest = commit(temporary, final, stage="shard", key=self.spec.key, **stats)
        return manifest.stats
