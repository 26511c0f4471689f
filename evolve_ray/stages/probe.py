"""checkpoint -> probe: do the engines answer with the checkpoint's weights, and how far did the policy move?"""

import dataclasses
from typing import Any

from evolve_ray.config.resolve import resolved
from evolve_ray.errors import IntegrityError
from evolve_ray.generate.worker import engine_pool
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.pools.actors import call_all
from evolve_ray.stages.generations import GenerationJob, folders, generate_spec
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage
from evolve_ray.train import weight_probe


def probe(context: Context, iteration: int, policy: Policy, before: Policy) -> dict[str, Any] | None:
    """The figures of `weight_probe.compare`; None where the probe is off.

    Raises IntegrityError where engine and checkpoint do not agree.
    """
    config = context.config
    if not config.probe.prompts:
        return None
    prompts = context.prompts[iteration]
    models = {"policy": policy, "iteration": before, "initial": context.initial or before}
    key = {
        "version": weight_probe.VERSION,
        "models": {name: model.hash for name, model in models.items()},
        "template": context.template.hash,
        "seed": config.seed,
        "options": [resolved(part, runtime=False) for part in (config.probe, config.model, config.engine, config.sampling)],
    }
    stage = context.stage(context.run.iteration(iteration) / "probe", "probe", key, {"prompts": prompts.identity})
    manifest = stage.committed()
    if manifest is None:
        with context.timed("probe", iteration):
            manifest = run_probe(context, stage, iteration, models)
    figures = rows.read_jsonl(manifest.path("probe.jsonl"))[0]
    context.say(
        f"    engine and checkpoint agree to {figures['mean_difference']:.1g} nats a token; KL to the iteration's start "
        f"{figures['kl_iteration']:.2f}, to the initial policy {figures['kl_initial']:.2f} nats a response"
    )
    return figures


def run_probe(context: Context, stage: Stage, iteration: int, models: dict[str, Policy]) -> Manifest:
    """Every engine answers a few prompts; the same answers are read by plain forwards of `models`."""
    config, prompts = context.config, context.prompts[iteration]
    context.start_ray()
    plain = dataclasses.replace(config.sampling, temperature=1.0, top_p=1.0)  # samples of the policy itself
    job = GenerationJob(iteration, "probe", models["policy"], prompts, config.strategy, plain, "probe", {})
    engines = context.pools.open(engine_pool(config.engine))
    asked = shards.read_slice(prompts.path("prompts.parquet"), 0, config.probe.prompts)
    samples = call_all(engines, generate_spec(context, job, stage), "probe", asked)
    figures = weight_probe.compare(context.pools, config.probe, config.model.dtype, folders(models), samples)
    if not figures["mean_difference"] <= config.probe.tolerance:
        raise IntegrityError(
            f"probe of iteration {iteration}: the engines' log-probabilities differ from the checkpoint's by "
            f"{figures['mean_difference']:.2g} nats a token (probe.tolerance is {config.probe.tolerance:g}): they may still hold "
            "the weights or the cache of an older model; submit the same command again, for new engines"
        )
    rows.write_jsonl(stage.start() / "probe.jsonl", [figures])
    return stage.commit(num_in=len(asked), num_rows=len(asked))
