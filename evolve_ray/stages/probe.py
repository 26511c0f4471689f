"""checkpoint -> probe: do the engines use the weights of the checkpoint, and how far did the policy move?"""

import dataclasses
from typing import Any

from evolve_ray.config import options
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


def probe(context: Context, iteration: int, policy: Policy, previous: Policy) -> dict[str, Any] | None:
    """The figures of `weight_probe.compare`; None if the probe is off.

    Raises IntegrityError if the log-probabilities of engine and checkpoint differ.
    """
    config = context.config
    if not config.probe.prompts:
        return None
    prompts = context.prompts[iteration]
    models = {"policy": policy, "iteration": previous, "initial": context.initial or previous}
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
    """Every engine answers a few prompts; plain forwards of `models` compute the log-probabilities of the same answers."""
    config, prompts = context.config, context.prompts[iteration]
    context.start_ray()
    plain = dataclasses.replace(config.sampling, temperature=1.0, top_p=1.0)  # samples of the policy itself
    job = GenerationJob(iteration, "probe", models["policy"], prompts, config.strategy, plain, "probe", {})
    engines = context.pools.open(engine_pool(config.engine))
    probe_prompts = shards.read_slice(prompts.path("prompts.parquet"), 0, config.probe.prompts)
    # Before the engines are asked, so that it starts while they answer.
    probers, spec = weight_probe.open_prober(context.pools, config.probe, config.model.dtype)
    samples = call_all(engines, generate_spec(context, job, stage), "probe", probe_prompts)
    call_all(probers, spec, "ready")
    context.run.event("prober_ready", stage="probe", iteration=iteration)
    figures = weight_probe.compare(probers, spec, folders(models), samples)
    if not figures["mean_difference"] <= config.probe.tolerance:
        raise IntegrityError(f"probe of iteration {iteration}: {advice(figures['mean_difference'], config)}")
    rows.write_jsonl(stage.start() / "probe.jsonl", [figures])
    return stage.commit(num_in=len(probe_prompts), num_rows=len(probe_prompts))


def advice(difference: float, config: options.Config) -> str:
    """Why engine and checkpoint may differ by `difference` nats a token, and what to do."""
    found = (
        f"the engines' log-probabilities differ from the checkpoint's by {difference:.2g} nats a token (probe.tolerance is "
        f"{config.probe.tolerance:g}); "
    )
    if config.model.dtype != "float32" and difference <= options.Probe().tolerance:
        return f"{found}so much may be rounding in {config.model.dtype}; set probe.tolerance={options.Probe().tolerance:g}"
    return (
        f"{found}they may still use the weights or the prefix cache of an older model; submit the same command again: it starts "
        "new engines"
    )
