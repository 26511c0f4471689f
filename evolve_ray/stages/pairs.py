"""generations, scores -> pairs: the selection runs prompt by prompt, with one shard in memory at a time."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evolve_ray.config import options
from evolve_ray.config.plugs import blame, find_plug, sources, with_args
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.inputs.context import Context
from evolve_ray.models.same_tokens import SameTokens
from evolve_ray.select.check import check_selected
from evolve_ray.select.pairs import Selected, reject_draft
from evolve_ray.select.selections import SELECTIONS
from evolve_ray.store import rows, shards
from evolve_ray.store.files import report_disk_errors
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage

Selection = Callable[[dict, list[dict], options.Selection], Selected]
SAME_TOKENS = "is the same tokens as the draft that it would be paired with"


def select(context: Context, iteration: int, drafts: Manifest, scores: Manifest) -> Manifest:
    """Returns the committed preference pairs of one iteration. Raises UserError if there are none."""
    config, prompts = context.config, context.prompts[iteration]
    key = {"selection": resolved(config.selection, runtime=False), **sources(config.selection.name)}
    inputs = {"prompts": prompts.identity, "generations": drafts.identity, "scores": scores.identity}
    stage = context.stage(context.run.iteration(iteration) / "pairs", "pairs", key, inputs)
    manifest = stage.committed()
    if manifest is None:
        with context.timed("pairs", iteration):
            name = config.selection.name
            selection = with_args("selection.args", name, find_plug(SELECTIONS, name, "selection.name"), config.selection.args)
            size = config.engine.shard_prompts
            same = SameTokens(context.policy.folder, context.template.rendering)
            manifest = write_pairs(stage, selection, config.selection, prompts, drafts, scores, size, same)
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
    shard_prompts: int, same_tokens: SameTokens, limit: int | None = None,
) -> Manifest:  # fmt: skip
    """Commits the pairs of all prompts whose drafts have scores (only of the first `limit`, if set), shard by shard."""
    work, schema = stage.start(), rows.with_messages(pair_schema(drafts), prompts.path("prompts.parquet"))
    counts: dict[str, Any] = dict.fromkeys(("num_in", "num_rows", "num_used", "num_rejected"), 0)
    with (
        report_disk_errors(work),  # covers the footers too, which are written when the files close
        contextlib.closing(PairWriter(work / "pairs.parquet", schema, settings.name)) as writer,
        open(work / "rejected.jsonl", "wb") as rejected_file,
    ):
        for shard in range(scores.stats["num_shards"]):
            by_prompt = scored_drafts(drafts, scores, shard)
            shard_rows = shards.read_slice(prompts.path("prompts.parquet"), shard, shard_prompts)
            shard_rows = shard_rows[: None if limit is None else max(0, limit - shard * shard_prompts)]
            pairs, rejected = select_all(shard_rows, by_prompt, selection, settings, counts, same_tokens)
            writer.write(pairs)
            rejected_file.writelines(rows.canonical(row) + b"\n" for row in rejected)
    return stage.commit(**counts)


class PairWriter:
    """Writes pairs shard by shard; a column `numbers` is added if the first pairs have numbers, and then all must."""

    def __init__(self, path: Path, schema: pa.Schema, selection: str):
        self.path, self.schema, self.selection, self.num_empty = path, schema, selection, 0
        self.writer: pq.ParquetWriter | None = None
        self.names: list[str] = []

    def write(self, pairs: list[dict]) -> None:
        if not pairs and self.writer is None:
            self.num_empty += 1  # the schema is not known yet
            return
        if self.writer is None:
            self.open(sorted(pairs[0].get("numbers", {})))
        for pair in pairs:
            if sorted(pair.get("numbers", {})) != self.names:
                raise UserError(
                    f"selection.name: {self.selection!r}, prompt {pair['prompt_id']}: has the numbers "
                    f"{', '.join(sorted(pair.get('numbers', {}))) or 'none'}, but earlier pairs have "
                    f"{', '.join(self.names) or 'none'}; every pair must have the same numbers"
                )
        assert self.writer is not None
        self.writer.write_table(rows.to_table(pairs, rows.numbered(self.schema, self.names)))

    def open(self, names: list[str]) -> None:
        """Starts the file, with a table for each shard so far that has no pair."""
        self.names, schema = names, rows.numbered(self.schema, names)
        self.writer = pq.ParquetWriter(self.path, schema, compression="zstd")
        for _ in range(self.num_empty):
            self.writer.write_table(rows.to_table([], schema))

    def close(self) -> None:
        if self.writer is None:
            self.open([])
        assert self.writer is not None
        self.writer.close()


def pair_schema(drafts: Manifest) -> pa.Schema:
    """The columns of the pairs: those of rows.PAIR, and the details that the drafts of any shard have."""
    files = [name for name in drafts.files if name.endswith("/rows.parquet")]
    known = {column for name in files for column in pq.read_schema(drafts.path(name)).names}
    used = [field for field in rows.PAIR_DETAILS if field.name.partition("_")[2] in known]
    return pa.schema([*rows.PAIR, *used])


def scored_drafts(drafts: Manifest, scores: Manifest, shard: int) -> dict[str, list[dict]]:
    """The answers of a shard by prompt id, each with its `score`, `correct` and `remarks`.

    `score` and `correct` (the verifier's value) are None if there is none. `remarks` are the responses of other kinds that name
    the draft as their parent, for example critiques of it.
    """
    name = f"{shards.shard_name(shard)}/rows.parquet"
    score_of = {row["draft_id"]: (row["score"], row["correct"]) for row in rows.read_table(scores.path(name))}
    by_prompt: dict[str, list[dict]] = {}
    remarks: dict[str, list[dict]] = {}
    for draft in rows.read_table(drafts.path(name)):
        if draft["kind"] == "answer":
            score, correct = score_of.pop(draft["draft_id"], (None, None))
            remarks_on = remarks.setdefault(draft["draft_id"], [])
            row = {**draft, "score": score, "correct": correct, "remarks": remarks_on}
            by_prompt.setdefault(draft["prompt_id"], []).append(row)
        elif draft["kind"] != "skipped" and draft["parent_id"]:
            remarks.setdefault(draft["parent_id"], []).append(draft)
    if score_of:
        raise IntegrityError(
            f"{scores.folder}: has scores of {len(score_of)} drafts that are not in {drafts.folder}; delete both folders"
        )
    return by_prompt


def select_all(
    prompts: list[dict], by_prompt: dict[str, list[dict]], selection: Selection, settings: options.Selection,
    counts: dict[str, int], same_tokens: SameTokens,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Returns (pairs, rejected drafts) of some prompts and adds to `counts`.

    A draft with a fault is never shown to the selection, and pairs of the same tokens are left out. Raises IntegrityError if a
    draft is neither in a pair nor rejected, UserError for a row that is not as it must be.
    """
    pairs: list[dict] = []
    rejected: list[dict] = []
    for prompt in prompts:
        drafts = by_prompt.get(prompt["prompt_id"], [])
        candidates = [draft for draft in drafts if not draft.get("fault")]
        rejected += [reject_draft(prompt, draft, draft["fault"]) for draft in drafts if draft.get("fault")]
        counts["num_in"] += len(drafts) - len(candidates)
        with blame("selection.name", settings.name, f"prompt {prompt['prompt_id']}"):
            result = selection(prompt, candidates, settings)
        used = check_selected(settings.name, prompt, candidates, result)
        selected, unused = result
        by_id = {draft["draft_id"]: draft for draft in candidates}
        # A row of one draft, chosen and rejected, is no pair to tell apart: an objective that needs `chosen` alone trains it.
        apart = [pair for pair in selected if pair["chosen_id"] == pair["rejected_id"] or not same_tokens(*sides(pair, by_id))]
        learnable = [add_details(pair, by_id) for pair in apart]
        lost = used - {pair[member] for pair in learnable for member in ("chosen_id", "rejected_id")}
        rejected += [reject_draft(prompt, by_id[draft_id], SAME_TOKENS) for draft_id in sorted(lost)]
        counts["num_in"] += len(candidates)
        counts["num_used"] += len(used - lost)
        pairs += learnable
        rejected += unused
    counts["num_rows"] += len(pairs)
    counts["num_rejected"] += len(rejected)
    return pairs, rejected


def sides(pair: dict, by_id: dict[str, dict]) -> list[dict]:
    """The two responses of a pair: text, whether it is finished, and the engine's tokens if they are known."""
    token_ids = [by_id.get(pair[f"{side}_id"], {}).get("token_ids") for side in ("chosen", "rejected")]
    return [
        {"text": pair[side], "finished": pair[f"{side}_finished"], "token_ids": ids}
        for side, ids in zip(("chosen", "rejected"), token_ids, strict=True)
    ]


def add_details(pair: dict, by_id: dict[str, dict]) -> dict:
    """The pair with what is known of its drafts beside their texts."""
    details = {}
    for name in rows.PAIR_DETAILS.names:
        side, _, column = name.partition("_")
        value = by_id.get(pair[f"{side}_id"], {}).get(column)
        if value is not None:
            details[name] = value
    return pair | details
