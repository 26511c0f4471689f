"""`--plan`: what would run, what is committed already, whether it fits, and what it would take, without starting anything."""

import json
import shutil
from pathlib import Path
from typing import Any

from evolve_ray.config.options import Config
from evolve_ray.data.read import count_rows
from evolve_ray.errors import ResourceError
from evolve_ray.plan import estimate
from evolve_ray.plan.sizing import Cluster
from evolve_ray.refine.strategies import drafts_per_prompt, responses_per_prompt
from evolve_ray.refine.template import load_template
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.run import Run

STAGES = (
    "prompts",
    "generations",
    "labels",
    "reward_pairs",
    "reward_model",
    "scores",
    "pairs",
    "reference",
    "checkpoint",
    "probe",
    "evaluation",
    "drift",
    "decision",
)
FIRST_STAGES = (
    "held_out",
    "activation_pairs",
    "offline_pairs",
    "base_evaluation",
    "activation",
    "reference",
    "checkpoint",
    "evaluation",
)
STEP_BYTES = 3  # a stored step of training in model sizes: the weights and two moments
CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English text; only for the estimate of disk


def plan(config: Config, run: Run, cluster: Cluster | None = None) -> tuple[str, ResourceError | None]:
    """The plan as text, and what to raise after it where the recipe does not fit on the cluster.

    Token counts are upper bounds: every answer as long as `sampling.max_tokens`.
    """
    load_template(config.template.name, config.template.layout, config.strategy.name)
    drafts = drafts_per_prompt(config.strategy)
    prompts, longest = config.prompts.per_iteration, config.sampling.max_tokens
    held_out, responses, answers = texts(config)
    generated, evaluated = responses * longest, answers * longest
    weights = model_bytes(config)
    lines = [f"run {config.name} in {run.root}", ""]
    lines += [f"model      {config.model.path} ({config.model.dtype}, context {config.model.context_tokens} tokens)"]
    lines += [f"prompts    {config.prompts.path}: {describe(training_rows(config))}; {prompts} fresh ones an iteration"]
    lines += [f"held out   {name}: {describe(rows)}" for name, rows in splits(config).items()]
    lines += [f"strategy   {config.strategy.name}, {drafts} drafts a prompt; scorer {config.scorer.name}"]
    lines += [f"engines    {config.engine.actors} x {config.engine.gpus_per_actor:g} GPU"]
    lines += [f"trainer    {config.trainer.workers} workers, ZeRO-3; objective {config.training.objective}", ""]
    lines += ["an iteration, at most:"]
    lines += [
        f"  prompts {prompts:,}   drafts {prompts * drafts:,}   generated tokens {generated:,}   pairs {pair_bound(config):,}"
    ]
    lines += [f"  evaluation: {held_out:,} prompts, {answers:,} drafts, {evaluated:,} generated tokens"]
    disk = (generated + evaluated) * CHARACTERS_PER_TOKEN
    size = f"checkpoint {weights / 2**20:,.1f} MiB, " if weights else "a checkpoint the size of the model, "
    lines += [f"  disk: {size}tables {disk / 2**20:,.1f} MiB", ""]
    sized, faults = estimate.report(config, held_out, cluster)
    lines += [*sized, ""] if sized else []
    lines += [*(f"does not fit: {fault}" for fault in faults), ""] if faults else []
    for iteration in range(config.iterations + 1):
        lines += [f"iteration {iteration}: " + ", ".join(status(config, run, iteration))]
    more = f" (and {len(faults) - 1} more, above)" if len(faults) > 1 else ""
    return "\n".join(lines), ResourceError(f"the recipe does not fit: {faults[0]}{more}") if faults else None


def texts(config: Config) -> tuple[int, int, int]:
    """(held-out prompts, responses that an iteration generates, answers of its evaluation); what only loading tells counts 0."""
    held_out = sum(rows or 0 for rows in splits(config).values())
    responses = config.prompts.per_iteration * responses_per_prompt(config.strategy)
    return held_out, responses, held_out * (config.evaluation.rounds + config.evaluation.parallel)


def check_space(config: Config, run: Run) -> None:
    """Refuses to start what would not fit on the disk: the tables and checkpoints to come, and one stored step of training."""
    _, responses, answers = texts(config)
    tables = (responses + answers) * config.sampling.max_tokens * CHARACTERS_PER_TOKEN
    weights = model_bytes(config) or 0
    to_do = sum(not (run.iteration(number) / "checkpoint").exists() for number in range(1, config.iterations + 1))
    needed = to_do * (tables + weights) + (STEP_BYTES * weights if to_do else 0)
    free = shutil.disk_usage(run.root).free
    if free < needed:
        raise ResourceError(
            f"{run.root}: {to_do} iterations need about {needed / 2**30:,.1f} GiB (see --plan), but {free / 2**30:,.1f} GiB are "
            "free; free space, choose another --run, or lower iterations or prompts.per_iteration"
        )


def status(config: Config, run: Run, iteration: int) -> list[str]:
    """Each stage of an iteration with what stands in the run directory."""
    names = stages(config, iteration)
    return [f"{name} ({'committed' if read_manifest(run.iteration(iteration) / name) else 'to do'})" for name in names]


def stages(config: Config, iteration: int) -> list[str]:
    """The stages of an iteration in the order of the data."""
    given: dict[str, Any] = dict.fromkeys(("labels", "reward_pairs", "reward_model"), config.refresh)
    given |= {"reference": config.training.objective not in ("sft", "reward"), "probe": config.probe.prompts}
    names = [name for name in STAGES if given.get(name, True)]
    if iteration == 0:
        given = {"activation_pairs": config.activation, "offline_pairs": config.offline}
        given |= {"reference": config.offline and config.offline.training.objective not in ("sft", "reward")}
        given |= {"activation": config.activation and config.offline, "checkpoint": config.activation or config.offline}
        given |= {"evaluation": given["checkpoint"]}
        names = [name for name in FIRST_STAGES if given.get(name, True)]
    if not config.evaluation.splits:
        names = [name for name in names if "evaluation" not in name and name != "held_out"]
    return names


def describe(rows: int | None) -> str:
    return "not counted before it is loaded" if rows is None else f"{rows:,} rows"


def training_rows(config: Config) -> int | None:
    if config.prompts.path.startswith("toy:") and config.toy:
        return config.toy.num_train
    return count_rows(config.prompts.path)


def splits(config: Config) -> dict[str, int | None]:
    """Rows of each evaluation split that would be used, None where only loading tells."""
    counts: dict[str, int | None] = {}
    for name, path in config.evaluation.splits.items():
        if path.startswith("toy:") and config.toy:
            rows: int | None = config.toy.num_heldout if path == "toy:heldout" else config.toy.num_out_of_domain
        else:
            rows = count_rows(path)
        limit = config.evaluation.limit
        counts[name] = min(rows or limit, limit) if limit else rows
    return counts


def pair_bound(config: Config) -> int:
    """Selection gives at most so many pairs."""
    return config.prompts.per_iteration * config.selection.max_pairs


def model_bytes(config: Config) -> int | None:
    """Bytes of the weights, from the headers of local safetensors files; None where the model is not here yet."""
    files = list(Path(config.model.path).glob("*.safetensors"))
    total = 0
    for file in files:
        with open(file, "rb") as raw:
            header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
        total += max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    return total or None
