"""What an actor of a pool hosts: it commits each shard once."""

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
            with report_disk_errors(final):
                aside.mkdir()
                write_table(aside / "rows.parquet", made, self.schema)
                write_jsonl(aside / "rejected.jsonl", rejected)
            stats |= {"num_rows": len(made), "num_rejected": len(rejected)}
            manifest = commit(aside, final, stage="shard", key=self.spec.key, **stats)
        return manifest.stats
