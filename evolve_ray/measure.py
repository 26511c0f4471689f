"""The stages that only look at what an iteration committed: drift and diversity, and the decision whether the run goes on."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from evolve_ray.config.plugs import find_plug
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError
from evolve_ray.evaluate import controller, drift
from evolve_ray.evaluate.figures import against_previous
from evolve_ray.inputs import Context
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import Manifest, read_manifest


def measure_drift(
    context: Context, iteration: int, inputs: dict[str, Manifest], probe: dict[str, Any] | None, models: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of `drift.figures`, lengths against those of iteration 1 in `models`, and the divergences of the probe.

    `inputs` are the iteration's `generations`, `scores` and `pairs`.
    """
    made_from = {name: manifest.identity for name, manifest in inputs.items()}
    folder = context.run.iteration(iteration) / "drift"
    stage = context.stage(folder, "drift", {"version": drift.VERSION}, made_from)
    manifest = stage.committed()
    if manifest is None:
        with context.timed("drift", iteration):
            columns = ["chosen_id", "rejected_id", "chosen_round"]
            with pq.ParquetFile(inputs["pairs"].path("pairs.parquet")) as file:
                pairs = (pair for batch in file.iter_batches(columns=columns) for pair in batch.to_pylist())
                found = drift.figures(by_shard(inputs["generations"], inputs["scores"]), pairs)
            rows.write_jsonl(stage.start() / "drift.jsonl", [found])
            manifest = stage.commit(num_in=found["num_drafts"], num_rows=1)
    found = rows.read_jsonl(manifest.path("drift.jsonl"))[0]
    first = next((model["drift"] for model in models if model["iteration"] == 1), found)
    return drift.against_first(found, first) | {name: probe and probe[name] for name in ("kl_iteration", "kl_initial")}


def by_shard(drafts: Manifest, scores: Manifest) -> Iterator[tuple[list[dict], list[dict]]]:
    """(drafts, scores), one shard in memory at a time."""
    for shard in range(drafts.stats["num_shards"]):
        name = f"{shards.shard_name(shard)}/rows.parquet"
        yield rows.read_table(drafts.path(name)), rows.read_table(scores.path(name))


def decide(context: Context, iteration: int, models: list[dict[str, Any]]) -> dict[str, Any]:
    """What the controller says of the last of `models`, for the report: `against_previous`, `decision` and `rolled_back`."""
    config, now, before = context.config, models[-1], models[-2]
    options = config.controller
    options = dataclasses.replace(options, split=options.split or next(iter(config.evaluation.splits), ""))
    evaluations = {name: evaluation(context, model) for name, model in (("evaluation", now), ("previous", before))}
    key = {
        "version": controller.VERSION,
        "controller": resolved(options),
        "seed": config.seed,
        "models": [{name: value for name, value in model.items() if name != "path"} for model in models],
    }
    made_from = {name: found.identity for name, found in evaluations.items() if found}
    stage = context.stage(context.run.iteration(iteration) / "decision", "decision", key, made_from)
    manifest = stage.committed()
    if manifest is None:
        with context.run.timed("decision", iteration):
            tables = [chains(found) for found in (evaluations["previous"], evaluations["evaluation"]) if found]
            moved = against_previous(list(config.evaluation.splits), *tables, seed=config.seed) if tables else {}
            control = find_plug(controller.CONTROLLERS, options.name, "controller.name")
            decision = control([*models[:-1], {**now, "against_previous": moved}], options)
            if not isinstance(decision, controller.Decision) or decision.action not in controller.ACTIONS:
                known = ", ".join(controller.ACTIONS)
                raise UserError(f"controller.name: {options.name!r} gave {decision!r}, but must give a Decision: {known}")
            found = {"controller": options.name, "split": options.split, **dataclasses.asdict(decision)}
            text = json.dumps({**found, "against_previous": moved}, indent=1, ensure_ascii=False, allow_nan=False)
            (stage.start() / "decision.json").write_text(text, encoding="utf-8")
            manifest = stage.commit(num_in=len(models), num_rows=1)
            context.run.event("decision", iteration=iteration, **found)
    decision = json.loads(manifest.path("decision.json").read_bytes())
    context.say(f"  iteration {iteration}: {decision['action'].replace('_', ' ')}: {decision['reason']}")
    return {
        "against_previous": decision.pop("against_previous"),
        "decision": decision,
        "rolled_back": decision["action"] == "roll_back",
    }


def evaluation(context: Context, model: dict[str, Any]) -> Manifest | None:
    """The committed evaluation of a model; None in a run without held-out prompts."""
    return read_manifest(context.run.root / model["evaluation"]) if model["evaluation"] else None


def chains(found: Manifest) -> tuple[list[dict], list[dict]]:
    """(drafts, scores) of an evaluation's chains."""
    parts = [read_manifest(found.folder / name) for name in ("generations", "scores")]
    drafts, scores = (list(shards.read_rows(part)) for part in parts if part)
    return drafts, scores
