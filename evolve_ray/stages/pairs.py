"""generations, scores -> pairs: the selection runs prompt by prompt, with one shard in memory at a time."""

from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq

from evolve_ray.config import options
from evolve_ray.config.plugs import find_plug
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.inputs.context import Context
from evolve_ray.select.pairs import SELECTIONS, Selected
from evolve_ray.store import rows, shards
from evolve_ray.store.files import report_disk_errors
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage

Selection = Callable[[dict, list[dict], options.Selection], Selected]


def select(context: Context, iteration: int, drafts: Manifest, scores: Manifest) -> Manifest:
    """Returns the committed preference pairs of one iteration. Raises UserError if there are none."""
    config, prompts = context.config, context.prompts[iteration]
    key = {"selection": resolved(config.selection, runtime=False)}
    inputs = {"prompts": prompts.identity, "generations": drafts.identity, "scores": scores.identity}
    stage = context.stage(context.run.iteration(iteration) / "pairs", "pairs", key, inputs)
    manifest = stage.committed()
    if manifest is None:
        with context.timed("pairs", iteration):
            selection = find_plug(SELECTIONS, config.selection.name, "selection.name")
            size = config.engine.shard_prompts
            manifest = write_pairs(stage, selection, config.selection, prompts, drafts, scores, size)
    check_not_empty(stage, manifest)
    return manifest


def check_not_empty(stage: Stage, manifest: Manifest) -> None:
    if not manifest.stats["num_rows"]:
        raise UserError(
            f"{stage.final}: the selection made no pairs from {manifest.stats['num_in']} drafts (see the reasons in its "
            "rejected.jsonl), so there is nothing to train on; lower selection.margin, raise sampling.temperature, or use other "
            "prompts"
        )


def write_pairs(
    stage: Stage, selection: Selection, settings: options.Selection, prompts: Manifest, drafts: Manifest, scores: Manifest,
    shard_prompts: int, limit: int | None = None,
) -> Manifest:  # fmt: skip
    """Commits the pairs of all prompts whose drafts have scores (only of the first `limit`, if set), shard by shard."""
    work = stage.start()
    schema = rows.with_messages(rows.PAIR, prompts.path("prompts.parquet"))
    counts: dict[str, Any] = dict.fromkeys(("num_in", "num_rows", "num_used", "num_rejected"), 0)
    with (
        report_disk_errors(work),  # covers the footers too, which are written when the files close
        pq.ParquetWriter(work / "pairs.parquet", schema, compression="zstd") as writer,
        open(work / "rejected.jsonl", "wb") as rejected_file,
    ):
        for shard in range(scores.stats["num_shards"]):
            by_prompt = scored_drafts(drafts, scores, shard)
            shard_rows = shards.read_slice(prompts.path("prompts.parquet"), shard, shard_prompts)
            shard_rows = shard_rows[: None if limit is None else max(0, limit - shard * shard_prompts)]
            pairs, rejected = select_all(shard_rows, by_prompt, selection, settings, counts)
            writer.write_table(rows.to_table(pairs, schema))
            rejected_file.writelines(rows.canonical(row) + b"\n" for row in rejected)
    return stage.commit(**counts)


def scored_drafts(drafts: Manifest, scores: Manifest, shard: int) -> dict[str, list[dict]]:
    """The answers of a shard by prompt id, each with its `score`; None if it has no score."""
    name = f"{shards.shard_name(shard)}/rows.parquet"
    score_of = {row["draft_id"]: row["score"] for row in rows.read_table(scores.path(name))}
    by_prompt: dict[str, list[dict]] = {}
    for draft in rows.read_table(drafts.path(name)):
        if draft["kind"] == "answer":
            by_prompt.setdefault(draft["prompt_id"], []).append({**draft, "score": score_of.pop(draft["draft_id"], None)})
    if score_of:
        raise IntegrityError(
            f"{scores.folder}: has scores of {len(score_of)} drafts that are not in {drafts.folder}; delete both folders"
        )
    return by_prompt


def select_all(
    prompts: list[dict], by_prompt: dict[str, list[dict]], selection: Selection, settings: options.Selection,
    counts: dict[str, int],
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Returns (pairs, rejected drafts) of some prompts and adds to `counts`.

    Raises IntegrityError if a draft is neither in a pair nor rejected.
    """
    pairs: list[dict] = []
    rejected: list[dict] = []
    for prompt in prompts:
        candidates = by_prompt.get(prompt["prompt_id"], [])
        selected, unused = selection(prompt, candidates, settings)
        used = {pair[member] for pair in selected for member in ("chosen_id", "rejected_id")}
        if len(used) + len(unused) != len(candidates):
            raise IntegrityError(
                f"selection {settings.name}: prompt {prompt['prompt_id']} has {len(candidates)} drafts, "
                f"but {len(used)} are in pairs and {len(unused)} rejected; a selection must use or reject every draft once"
            )
        counts["num_in"] += len(candidates)
        counts["num_used"] += len(used)
        pairs += selected
        rejected += unused
    counts["num_rows"] += len(pairs)
    counts["num_rejected"] += len(rejected)
    return pairs, rejected
