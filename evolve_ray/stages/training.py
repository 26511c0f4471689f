"""pairs -> reference -> checkpoint: one worker group of Ray Train computes both."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from evolve_ray.config import options
from evolve_ray.config.plugs import is_own, sources
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.plan.plan import WITH_NUMBERS, find_objective, uses_reference
from evolve_ray.pools.actors import TRAINERS
from evolve_ray.stages.second import template_of
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage
from evolve_ray.train import group
from evolve_ray.train.spec import VERSION, TrainSpec


def train(
    context: Context, iteration: int, policy: Policy, pairs: Manifest, training: options.Training, name: str, second: str = ""
) -> Policy:  # fmt: skip
    """Returns the model after training on committed pairs; `policy` is the newest one, `name` the checkpoint's folder name.

    `second` is the name of a further model, if it is that which is trained.
    """
    first = context.first_models[second] if second else context.initial
    template = template_of(context) if second else context.template
    policy = first if training.start == "initial" and first else policy
    start = first if training.reference == "initial" and first else policy
    reference, checkpoint = stages(context, iteration, policy, start, pairs, training, name, second)
    manifest = checkpoint.committed()
    if manifest is None:
        config = context.config
        selection = config.models[second].selection if second else config.selection
        check_numbers(pairs, training, selection.name if selection else "")
        spec = TrainSpec(
            pairs=str(pairs.path("pairs.parquet")), model=str(policy.folder), reference_model=str(start.folder),
            reference_hash=start.hash, dtype=config.model.dtype, template=template, training=training,
            trainer=config.trainer, seed=config.seed, iteration=iteration, run=context.run, reference=reference,
            checkpoint=checkpoint, output=max(config.scorer.output, 0), initial_model=str((first or policy).folder),
            start_hash=policy.hash if training.start == "initial" else "",
        )  # fmt: skip
        with context.timed(name, iteration):
            context.start_ray()
            if config.engine.release_for_training:
                context.pools.close_all(but=TRAINERS)
            manifest = run_group(context, spec, context.run.iteration(iteration), name)
            if config.engine.release_for_training or not context.pools.fits():
                context.pools.close(TRAINERS)
    context.trackers.log_training(manifest, iteration)
    return Policy.from_manifest(manifest)


def stages(
    context: Context, iteration: int, policy: Policy, start: Policy, pairs: Manifest, training: options.Training, name: str,
    second: str = "",
) -> tuple[Stage | None, Stage]:  # fmt: skip
    """Returns the stages of the reference (None if the objective has none) and of the checkpoint, each with its stage key."""
    config, folder = context.config, context.run.iteration(iteration)
    shared = {
        "version": VERSION,
        "dtype": config.model.dtype,
        "template": (template_of(context) if second else context.template).hash,
        "trainer": resolved(config.trainer, runtime=False),
        "seed": config.seed,
        "iteration": iteration,
    }
    # What 0.1.0 computed otherwise: only trainings with such models get another key.
    shared |= {"sums": "float32"} if config.model.dtype == "bfloat16" else {}
    shared |= {"dropout": "off"} if context.dropout else {}
    if training.objective == "reward" and config.scorer.output >= 0:
        shared["output"] = config.scorer.output
    inputs = {"pairs": pairs.identity}
    reference = None
    if uses_reference(training):
        # Which sequences the reference holds, and in which batches they are computed.
        order: dict[str, Any] = {name: getattr(training, name) for name in ("batch_pairs", "micro_pairs", "objective", "alpha")}
        order["nll"] = bool(training.nll)
        if is_own(training.objective) or training.objective in WITH_NUMBERS or training.objective == "turns_dpo":
            objective = find_objective(training)
            if is_own(training.objective):
                order["needs"] = objective.sequences
            elif training.objective == "turns_dpo":
                order["args"] = training.objective_args
            elif not training.refine_weight:
                order["refine_weight"] = 0
            if objective.tokens:
                order["tokens"] = True
            if objective.initial:
                first = context.first_models[second] if second else context.initial
                order["initial"] = (first or policy).hash
        place = folder / (f"{second}_reference" if second else "reference")
        reference = context.stage(place, "reference", shared | {"order": order, "model": start.hash}, inputs)
    key = {"model": policy.hash, "training": resolved(training, runtime=False), "reference": reference.key if reference else None}
    key |= sources(training.objective)
    return reference, context.stage(folder / name, "checkpoint", shared | key, inputs)


def check_numbers(pairs: Manifest, training: options.Training, selection: str) -> None:
    """Raises UserError if pairs lack a number or a turn that the objective needs."""
    if not is_own(training.objective) and training.objective not in WITH_NUMBERS:
        return
    objective = find_objective(training)
    needed = objective.numbers
    schema = pq.read_schema(pairs.path("pairs.parquet"))
    present = [field.name for field in schema.field("numbers").type] if "numbers" in schema.names else []
    for name in needed:
        if name not in present:
            raise UserError(
                f"training.objective: {training.objective!r} needs the number {name!r} of each pair, but {pairs.folder.name} has "
                f"{', '.join(present) or 'none'}; selection {selection!r} must give it with make_pair(..., numbers={{...}})"
            )
    if not objective.turns:
        return
    columns = ["pair_id", *(["turns"] if "turns" in schema.names else [])]
    with pq.ParquetFile(pairs.path("pairs.parquet")) as file:
        for row in (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist()):
            names = [turn["name"] for turn in row.get("turns") or ()]
            for name in objective.turns:
                if name not in names:
                    raise UserError(
                        f"training.objective: {training.objective!r} needs the turn {name!r}, but pair {row['pair_id']} has "
                        f"{', '.join(names) or 'none'}; selection {selection!r} must give it with make_turn(..., turns={{...}})"
                    )


def run_group(context: Context, spec: TrainSpec, folder: Path, name: str) -> Manifest:
    """Runs the worker group under its deadline; each step goes to the terminal and to the trackers at once."""
    key, iteration = spec.checkpoint.key, spec.iteration

    def on_event(event: dict[str, Any]) -> str:
        context.trackers.log_steps(key, iteration, name, event["steps"])
        return f"    step {event['step'] + 1} of {event['num_steps']}, loss {event['loss']:.4f}"

    def progress() -> Any:
        return sorted((spec.checkpoint.work / "steps").glob("*")), sorted(folder.iterdir())

    advice = (
        "see the logs of its workers in the Ray dashboard, raise trainer.stall_s to allow more time, or submit the same command "
        "again: it continues from the last stored step"
    )
    context.trackers.replay_steps(key, iteration, name)
    with context.print_events("training", on_event), context.deadline(name, spec.trainer.stall_s, progress, advice):
        return group.fit(spec, context.run.ray_train, context.pools)
