"""generations, scores -> pairs: the selection runs prompt by prompt, with one shard in memory at a time."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evolve_ray.config import options
from evolve_ray.config.plugs import blame, find_plug, is_own, sources, with_args
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.models.same_tokens import SameTokens
from evolve_ray.refine.asked import asked
from evolve_ray.refine.rendering import Rendering
from evolve_ray.select.check import check_selected, used_drafts
from evolve_ray.select.pairs import OF_ANOTHER, Selected, reject_draft
from evolve_ray.select.selections import SELECTIONS
from evolve_ray.stages.pair_table import PairWriter
from evolve_ray.stages.whole import narrow
from evolve_ray.store import rows, shards
from evolve_ray.store.files import report_disk_errors
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage
from evolve_ray.store.turns import Messages

Selection = Callable[..., Selected]
OF_TOKENS = ("token_ids", "logps", "num_thinking_tokens", "num_prefix_tokens")  # what a row says of its tokens
SAME_TOKENS = "is the same tokens as the draft that it would be paired with"


@dataclass(frozen=True)
class Owner:
    """The model that is trained on pairs, and how it renders them. The tokens of drafts that others wrote are not its own.

    With `own` it owns the drafts that it wrote itself; else, as the policy, all but those of the models with the hashes `others`.
    `on_policy` marks drafts of others as `foreign`: a policy gradient trains no such draft, though it may be what one refines.
    """

    model: Policy
    rendering: Rendering
    own: bool = False
    others: frozenset[str] = frozenset()
    on_policy: bool = False

    def taken(self, draft: dict) -> dict:
        """The draft as this model may learn from it."""
        owned = draft["model"] in (self.model.hash, None) if self.own else draft["model"] not in self.others
        if owned:
            return draft
        draft = {name: value for name, value in draft.items() if name not in OF_TOKENS}
        return {**draft, "foreign": True} if self.on_policy else draft


def select(
    context: Context, iteration: int, drafts: Manifest, scores: Manifest, others: Collection[str] = ()
) -> Manifest:  # fmt: skip
    """Returns the committed preference pairs of one iteration. Raises UserError if there are none.

    `others` are the hashes of further models that wrote some of the drafts.
    """
    on_policy, others = context.config.training.objective == "policy_gradient", frozenset(others)
    owner = Owner(context.policy, context.template.rendering, others=others, on_policy=on_policy)
    return select_for(context, iteration, drafts, scores, context.config.selection, "pairs", owner)


def select_for(
    context: Context, iteration: int, drafts: Manifest, scores: Manifest, settings: options.Selection, folder: str, owner: Owner
) -> Manifest:  # fmt: skip
    """Returns the committed rows that a selection makes for the model `owner`. Raises UserError if there are none."""
    config, prompts, name = context.config, context.prompts[iteration], settings.name
    key = {"selection": resolved(settings, runtime=False), **sources(name, settings.whole)}
    inputs = {"prompts": prompts.identity, "generations": drafts.identity, "scores": scores.identity}
    stage = context.stage(context.run.iteration(iteration) / folder, "pairs", key, inputs)
    manifest = stage.committed()
    if manifest is None:
        with context.timed(folder, iteration):
            selection = with_args("selection.args", name, find_plug(SELECTIONS, name, "selection.name"), settings.args)
            size = config.engine.shard_prompts
            same = SameTokens(owner.model.folder, owner.rendering)
            messages = functools.partial(asked, context.template, config.strategy)
            sees = is_own(name) or takes_others(selection)
            manifest = write_pairs(
                stage, selection, settings, prompts, drafts, scores, size, same, messages=messages if sees else None,
                taken=owner.taken,
            )  # fmt: skip
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
    messages: Callable[..., Messages | None] | None = None, taken: Callable[[dict], dict] = lambda draft: draft,
) -> Manifest:  # fmt: skip
    """Commits the pairs of all prompts whose drafts have scores (only of the first `limit`, if set), shard by shard.

    `taken` gives each draft as the model that is trained may learn from it.
    """
    work, schema = stage.start(), rows.with_messages(pair_schema(drafts), prompts.path("prompts.parquet"))
    counts: dict[str, Any] = dict.fromkeys(("num_in", "num_rows", "num_used", "num_rejected"), 0)
    with (
        report_disk_errors(work),  # covers the footers too, which are written when the files close
        contextlib.closing(PairWriter(work / "pairs.parquet", schema, settings.name)) as writer,
        open(work / "rejected.jsonl", "wb") as rejected_file,
    ):
        for shard in range(scores.stats["num_shards"]):
            by_prompt = scored_drafts(drafts, scores, shard, taken)
            shard_rows = shards.read_slice(prompts.path("prompts.parquet"), shard, shard_prompts)
            shard_rows = shard_rows[: None if limit is None else max(0, limit - shard * shard_prompts)]
            pairs, rejected = select_all(shard_rows, by_prompt, selection, settings, counts, same_tokens, messages)
            writer.write(pairs)
            rejected_file.writelines(rows.canonical(row) + b"\n" for row in rejected)
    if settings.top_share < 1 or settings.whole:
        with report_disk_errors(work), open(work / "rejected.jsonl", "ab") as rejected_file:
            lost, counts["num_left_out"] = narrow(writer, settings, prompts, shard_prompts)
            rejected_file.writelines(rows.canonical(row) + b"\n" for row in lost)
        counts["num_rows"] -= counts["num_left_out"]
        counts["num_used"] -= len(lost)
        counts["num_rejected"] += len(lost)
    return stage.commit(**counts)


def pair_schema(drafts: Manifest) -> pa.Schema:
    """The columns of the pairs: those of rows.PAIR, and the details that the drafts of any shard have."""
    files = [name for name in drafts.files if name.endswith("/rows.parquet")]
    known = {column for name in files for column in pq.read_schema(drafts.path(name)).names}
    used = [field for field in rows.PAIR_DETAILS if field.name.partition("_")[2] in known]
    return pa.schema([*rows.PAIR, *used])


def scored_drafts(
    drafts: Manifest, scores: Manifest, shard: int, taken: Callable[[dict], dict] = lambda draft: draft
) -> dict[str, list[dict]]:  # fmt: skip
    """The drafts of a shard by prompt id, of every kind but skipped ones, each with its `score`, `correct` and `remarks`.

    `score` and `correct` (the verifier's value) are None if there is none. `remarks` are the responses of other kinds that name
    the draft as their parent, for example critiques of it.
    """
    name = f"{shards.shard_name(shard)}/rows.parquet"
    score_of = {row["draft_id"]: (row["score"], row["correct"]) for row in rows.read_table(scores.path(name))}
    by_prompt: dict[str, list[dict]] = {}
    remarks: dict[str, list[dict]] = {}
    for draft in rows.read_table(drafts.path(name)):
        if draft["kind"] == "skipped":
            continue
        score, correct = score_of.pop(draft["draft_id"], (None, None))
        draft = taken(draft)
        row = {**draft, "score": score, "correct": correct, "remarks": remarks.setdefault(draft["draft_id"], [])}
        by_prompt.setdefault(draft["prompt_id"], []).append(row)
        if draft["kind"] != "answer" and draft["parent_id"]:
            remarks.setdefault(draft["parent_id"], []).append(draft)
    if score_of:
        raise IntegrityError(
            f"{scores.folder}: has scores of {len(score_of)} drafts that are not in {drafts.folder}; delete both folders"
        )
    return by_prompt


def select_all(
    prompts: list[dict], by_prompt: dict[str, list[dict]], selection: Selection, settings: options.Selection,
    counts: dict[str, int], same_tokens: SameTokens, messages: Callable[..., Messages | None] | None = None,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Returns (pairs, rejected drafts) of some prompts and adds to `counts`.

    A selection gets the answers to a prompt, and by name the responses of other kinds if its signature has `others`; with
    `messages` each has what its ask showed. A draft with a fault is never shown to the selection, and pairs of the same tokens
    are left out. Raises IntegrityError if a draft is neither in a pair nor rejected, UserError for a row that is not as it must
    be.
    """
    pairs: list[dict] = []
    rejected: list[dict] = []
    with_others = takes_others(selection)
    for prompt in prompts:
        everything = by_prompt.get(prompt["prompt_id"], [])
        if messages:
            everything = [{**draft, "messages": messages(prompt["prompt"], draft, everything)} for draft in everything]
        drafts = everything if with_others else [draft for draft in everything if draft["kind"] == "answer"]
        candidates = [draft for draft in drafts if not draft.get("fault")]
        rejected += [reject_draft(prompt, draft, draft["fault"]) for draft in drafts if draft.get("fault")]
        counts["num_in"] += len(drafts) - len(candidates)
        answers = [draft for draft in candidates if draft["kind"] == "answer"]
        others = {"others": [draft for draft in candidates if draft["kind"] != "answer"]} if with_others else {}
        with blame("selection.name", settings.name, f"prompt {prompt['prompt_id']}"):
            result = selection(prompt, answers, settings, **others)
        used = check_selected(settings.name, prompt, candidates, result)
        selected, unused = result
        by_id = {draft["draft_id"]: draft for draft in candidates}
        for pair in selected:
            if by_id[pair["chosen_id"]].get("foreign"):
                raise UserError(
                    f"selection.name: {settings.name!r}, prompt {prompt['prompt_id']}: trains draft {pair['chosen_id']}, which "
                    f"{OF_ANOTHER}; leave it out"
                )
        # A row of one draft, chosen and rejected, is no pair to tell apart: an objective that needs `chosen` alone trains it.
        # Two trajectories may have the same first turn.
        apart = [
            pair
            for pair in selected
            if pair["chosen_id"] == pair["rejected_id"] or pair.get("turns") or not same_tokens(*sides(pair, by_id))
        ]
        learnable = [add_details(pair, by_id) for pair in apart]
        lost = used - set().union(*map(used_drafts, learnable))
        rejected += [reject_draft(prompt, by_id[draft_id], SAME_TOKENS) for draft_id in sorted(lost)]
        counts["num_in"] += len(candidates)
        counts["num_used"] += len(used - lost)
        pairs += learnable
        rejected += unused
    counts["num_rows"] += len(pairs)
    counts["num_rejected"] += len(rejected)
    return pairs, rejected


def takes_others(selection: Selection) -> bool:
    """Whether a selection asks for the responses that are no answers."""
    return "others" in inspect.signature(selection).parameters


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
