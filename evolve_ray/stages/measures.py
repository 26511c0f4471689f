"""The stages that only read what an iteration committed: drift, and the decision whether the run continues."""

import dataclasses
import json
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow.parquet as pq

from evolve_ray.config.load import from_json
from evolve_ray.config.options import Config
from evolve_ray.config.parse import set_value
from evolve_ray.config.plugs import blame, find_plug, sources, with_args
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError
from evolve_ray.evaluate import controller, drift
from evolve_ray.evaluate.figures import against_previous
from evolve_ray.inputs.context import Context
from evolve_ray.inputs.plugs import check_plugs
from evolve_ray.refine.template import load_template
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import Manifest, read_manifest

CHANGEABLE = ("strategy", "sampling", "selection", "training")  # the tables of which a decision can change options
FIXED = (
    "training.objective",
    "training.reference",
    "training.replay",
    "training.given",
)  # which stages an iteration has is the recipe's


def measure_drift(
    context: Context, iteration: int, drafts: Manifest, scores: Manifest, pairs: Manifest, probe: dict[str, Any] | None,
    models: list[dict[str, Any]], others: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The figures of `drift.figures`, the lengths compared with those of iteration 1, and the KL divergences of the probe.

    `models` are the report's entries so far; iteration 1 is one of them, except in iteration 1 itself. `others` are the hashes of
    further models that wrote some of the drafts.
    """
    inputs = {"generations": drafts.identity, "scores": scores.identity, "pairs": pairs.identity}
    stage = context.stage(context.run.iteration(iteration) / "drift", "drift", {"version": drift.VERSION}, inputs)
    manifest = stage.committed()
    if manifest is None:
        with context.timed("drift", iteration):
            with pq.ParquetFile(pairs.path("pairs.parquet")) as file:
                columns = [
                    name for name in ("chosen_id", "rejected_id", "chosen_round", "kind") if name in file.schema_arrow.names
                ]
                table = (pair for batch in file.iter_batches(columns=columns) for pair in batch.to_pylist())
                # Only answers have scores and a round that wins.
                answers = (pair for pair in table if pair.pop("kind", None) is None)
                figures = drift.figures(by_shard(drafts, scores), answers, others)
            rows.write_jsonl(stage.start() / "drift.jsonl", [figures])
            manifest = stage.commit(num_in=figures["num_drafts"], num_rows=1)
    figures = rows.read_jsonl(manifest.path("drift.jsonl"))[0]
    first = next((model["drift"] for model in models if model["iteration"] == 1), figures)
    return drift.against_first(figures, first) | {name: probe and probe[name] for name in ("kl_iteration", "kl_initial")}


def by_shard(drafts: Manifest, scores: Manifest) -> Iterator[tuple[list[dict], list[dict]]]:
    """Yields (drafts, scores) of each shard, so that only one shard is in memory."""
    for shard in range(drafts.stats["num_shards"]):
        name = f"{shards.shard_name(shard)}/rows.parquet"
        yield rows.read_table(drafts.path(name)), rows.read_table(scores.path(name))


def decide(context: Context, iteration: int, models: list[dict[str, Any]]) -> dict[str, Any]:
    """The controller's decision on the last of `models`: `against_previous`, `decision` and `rolled_back` for the report."""
    config, current, previous = context.config, models[-1], models[-2]
    split = config.controller.split or next(iter(config.evaluation.splits), "")
    settings = dataclasses.replace(config.controller, split=split)
    evaluations = {name: evaluation_of(context, model) for name, model in (("evaluation", current), ("previous", previous))}
    key = {
        "version": controller.VERSION,
        "controller": resolved(settings, runtime=False),
        "seed": config.seed,
        "models": [{name: value for name, value in model.items() if name != "path"} for model in models],
        **sources(settings.name),
    }
    inputs = {name: manifest.identity for name, manifest in evaluations.items() if manifest}
    stage = context.stage(context.run.iteration(iteration) / "decision", "decision", key, inputs)
    manifest = stage.committed()
    if manifest is None:
        with context.run.timed("decision", iteration):
            tables = [chains_of(part) for part in (evaluations["previous"], evaluations["evaluation"]) if part]
            changes = against_previous(list(config.evaluation.splits), *tables) if tables else {}
            control = find_plug(controller.CONTROLLERS, settings.name, "controller.name")
            control = with_args("controller.args", settings.name, control, settings.args)
            with blame("controller.name", settings.name, f"iteration {iteration}"):
                decision = control([*models[:-1], {**current, "against_previous": changes}], settings)
            if not isinstance(decision, controller.Decision) or decision.action not in controller.ACTIONS:
                known = ", ".join(controller.ACTIONS)
                raise UserError(f"controller.name: {settings.name!r} returned {decision!r}; it must return a Decision: {known}")
            with_options(config, decision.options, f"controller.name: {settings.name!r}, iteration {iteration}")
            fields = {"controller": settings.name, "split": split, **dataclasses.asdict(decision)}
            if not decision.options:
                del fields["options"]
            text = json.dumps({**fields, "against_previous": changes}, indent=1, ensure_ascii=False, allow_nan=False)
            (stage.start() / "decision.json").write_text(text, encoding="utf-8")
            manifest = stage.commit(num_in=len(models), num_rows=1)
            context.run.event("decision", iteration=iteration, **fields)
    stored = json.loads(manifest.path("decision.json").read_bytes())
    context.say(f"  iteration {iteration}: {stored['action'].replace('_', ' ')}: {controller.in_words(stored)}")
    changes = stored.pop("against_previous")
    return {"against_previous": changes, "decision": stored, "rolled_back": stored["action"] == "roll_back"}


def with_options(config: Config, changes: Any, where: str) -> Config:
    """The configuration with the options that a decision changes, checked as a recipe is; `where` begins every error."""
    if not isinstance(changes, dict):
        raise UserError(f"{where}: options of the decision are {changes!r}, but must be a dict by dotted names")
    if not changes:
        return config
    for name in changes:
        if str(name).partition(".")[0] not in CHANGEABLE or name in FIXED or "." not in name:
            raise UserError(
                f"{where}: changes {name!r}, but a decision can change options of {', '.join(CHANGEABLE)} alone, and not "
                f"{' or '.join(FIXED)}"
            )
    try:
        tree = json.loads(json.dumps(resolved(config), allow_nan=False))
        for name, value in changes.items():
            set_value(tree, name.split("."), json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: options of the decision are not plain values: {error}") from None
    changed = from_json(tree, where)
    load_template(changed.template.name, changed.template.layout, changed.strategy.name)
    check_plugs(changed)
    return changed


def evaluation_of(context: Context, model: dict[str, Any]) -> Manifest | None:
    """The committed evaluation of a model; None if the run has no held-out prompts."""
    return read_manifest(context.run.root / model["evaluation"]) if model["evaluation"] else None


def chains_of(evaluation: Manifest) -> tuple[list[dict], list[dict]]:
    """Returns (drafts, scores) of the chains of an evaluation."""
    parts = [read_manifest(evaluation.folder / name) for name in ("generations", "scores")]
    drafts, scores = (list(shards.read_rows(part)) for part in parts if part)
    return drafts, scores
