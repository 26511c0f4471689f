"""The text of `--plan`: the stages, what is committed already, what the run needs, and whether it fits. Nothing is started."""

import json
import shutil
from pathlib import Path
from typing import Any

from evolve_ray.config.options import Config, Training
from evolve_ray.config.plugs import is_own
from evolve_ray.data.read import count_rows
from evolve_ray.errors import ResourceError, UserError
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
    "mixed",
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
NO_REFERENCE = ("sft", "turns_sft", "reward")  # shipped objectives without a reference policy
WITH_NUMBERS = ("policy_gradient", "turns_dpo", "turns_sft")  # shipped objectives that need numbers or turns of their pairs
STEP_BYTES = 3  # bytes of a stored step, in sizes of the model: the weights and two moments of AdamW
CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English text, used only to estimate disk


def plan(config: Config, run: Run, cluster: Cluster | None = None) -> tuple[str, ResourceError | None]:
    """Returns the plan as text, and the error to raise after printing it if the recipe does not fit on the cluster.

    Token counts are upper bounds: every response has `sampling.max_tokens` tokens.
    """
    load_template(config.template.name, config.template.layout, config.strategy.name)
    drafts = drafts_per_prompt(config.strategy)
    prompts, max_tokens = config.prompts.per_iteration, config.sampling.max_tokens
    held_out, responses, evaluation_drafts = count_texts(config)
    generated_tokens, evaluation_tokens = responses * max_tokens, evaluation_drafts * max_tokens
    weights = model_bytes(config)
    lines = [f"run {config.name} in {run.root}", ""]
    lines += [f"model      {config.model.path} ({config.model.dtype}, context {config.model.context_tokens} tokens)"]
    lines += [f"prompts    {config.prompts.path}: {describe_rows(training_rows(config))}; {prompts} {prompt_words(config)}"]
    lines += [f"held out   {name}: {describe_rows(rows)}" for name, rows in rows_by_split(config).items()]
    lines += [f"strategy   {config.strategy.name}, {drafts} drafts per prompt; scorer {config.scorer.name}"]
    lines += [f"engines    {config.engine.actors} x {config.engine.gpus_per_actor:g} GPU"]
    for name, model in config.models.items():
        trained = f"; objective {model.training.objective}" if model.training else ""
        gpus = model.engine(config.engine).gpus_per_actor
        lines.append(f"{name:<10} {model.path}, {model.actors} x {gpus:g} GPU{trained}")
    lines += [
        f"trainer    {config.trainer.workers} workers, ZeRO-3; objective {config.training.objective}"
        f"{start_words(config.training)}",
        "",
    ]
    lines += ["an iteration, at most:"]
    num_drafts, num_pairs = prompts * drafts, pair_bound(config)
    lines += [f"  prompts {prompts:,}   drafts {num_drafts:,}   generated tokens {generated_tokens:,}   pairs {num_pairs:,}"]
    lines += [f"  evaluation: {held_out:,} prompts, {evaluation_drafts:,} drafts, {evaluation_tokens:,} generated tokens"]
    characters = (generated_tokens + evaluation_tokens) * CHARACTERS_PER_TOKEN
    size = f"checkpoint {weights / 2**20:,.1f} MiB, " if weights else "a checkpoint the size of the model, "
    lines += [f"  disk: {size}tables {characters / 2**20:,.1f} MiB", ""]
    estimate_lines, errors = estimate.report(config, held_out, cluster)
    lines += [*estimate_lines, ""] if estimate_lines else []
    lines += [*(f"does not fit: {error}" for error in errors), ""] if errors else []
    for iteration in range(config.iterations + 1):
        lines += [f"iteration {iteration}: " + ", ".join(stage_states(config, run, iteration))]
    more = f" (and {len(errors) - 1} more, above)" if len(errors) > 1 else ""
    return "\n".join(lines), ResourceError(f"the recipe does not fit: {errors[0]}{more}") if errors else None


def count_texts(config: Config) -> tuple[int, int, int]:
    """Returns (held-out prompts, responses that an iteration generates, responses of its evaluation).

    A dataset whose size is known only after loading counts as 0.
    """
    held_out = sum(rows or 0 for rows in rows_by_split(config).values())
    responses = config.prompts.per_iteration * responses_per_prompt(config.strategy)
    return held_out, responses, held_out * estimate.evaluation_responses(config)


def check_space(config: Config, run: Run) -> None:
    """Raises a ResourceError if the disk has no room for the tables and checkpoints to come and one stored step."""
    _, responses, evaluation_drafts = count_texts(config)
    tables = (responses + evaluation_drafts) * config.sampling.max_tokens * CHARACTERS_PER_TOKEN
    weights = model_bytes(config) or 0
    to_do = sum(not (run.iteration(number) / "checkpoint").exists() for number in range(1, config.iterations + 1))
    needed = to_do * (tables + weights) + (STEP_BYTES * weights if to_do else 0)
    free = shutil.disk_usage(run.root).free
    if free < needed:
        raise ResourceError(
            f"{run.root}: {to_do} iterations need about {needed / 2**30:,.1f} GiB (see --plan), but {free / 2**30:,.1f} GiB are "
            "free; free space, choose another --run, or lower iterations or prompts.per_iteration"
        )


def stage_states(config: Config, run: Run, iteration: int) -> list[str]:
    """Returns each stage of an iteration, with `committed` or `to do`."""
    names = stages(config, iteration)
    return [f"{name} ({'committed' if read_manifest(run.iteration(iteration) / name) else 'to do'})" for name in names]


def stages(config: Config, iteration: int) -> list[str]:
    """Returns the stages of an iteration in the order of the data."""
    enabled: dict[str, Any] = dict.fromkeys(("labels", "reward_pairs", "reward_model"), config.refresh)
    enabled |= {"reference": uses_reference(config.training), "probe": config.probe.prompts}
    enabled |= {"mixed": config.training.replay or config.training.given}
    names = [name for name in STAGES if enabled.get(name, True)]
    second = [place for name, model in config.models.items() if model.training for place in second_stages(name, model.training)]
    names[names.index("checkpoint") + 1 : names.index("checkpoint") + 1] = second
    if iteration == 0:
        enabled = {"activation_pairs": config.activation, "offline_pairs": config.offline}
        enabled |= {"reference": config.offline and uses_reference(config.offline.training)}
        enabled |= {"activation": config.activation and config.offline, "checkpoint": config.activation or config.offline}
        enabled |= {"evaluation": enabled["checkpoint"]}
        names = [name for name in FIRST_STAGES if enabled.get(name, True)]
    if not config.evaluation.splits:
        names = [name for name in names if "evaluation" not in name and name != "held_out"]
    return names


def second_stages(name: str, training: Training) -> list[str]:
    """The stages in which a further model is trained."""
    return [f"{name}_pairs", *([f"{name}_reference"] if uses_reference(training) else []), f"{name}_checkpoint"]


def uses_reference(training: Training) -> bool:
    """Whether the objective of a training looks at a reference policy.

    False for a plug that cannot be loaded here, as when a run is read on another machine: then its reference is not missed.
    """
    if not is_own(training.objective):
        return training.objective not in NO_REFERENCE
    try:
        return find_objective(training).reference
    except UserError:
        return False


def find_objective(training: Training) -> Any:
    """The `train.objectives.Objective` of a training; only where it is somebody's own, because it loads torch."""
    from evolve_ray.train import objectives

    return objectives.find(training)


def describe_rows(rows: int | None) -> str:
    return "number of rows unknown until it is loaded" if rows is None else f"{rows:,} rows"


def prompt_words(config: Config) -> str:
    again = ", again in a new order when all are used up" if config.prompts.again == "when_used_up" else ""
    return f"new prompts per iteration{again}"


def start_words(training: Training) -> str:
    """What a training starts from and which rows are mixed in, where the recipe says so."""
    words = "; each training starts from the initial policy" if training.start == "initial" else ""
    shares = (("replayed", training.replay), ("given", training.given))
    return words + "".join(f"; {share:.0%} of the rows {name}" for name, share in shares if share)


def training_rows(config: Config) -> int | None:
    if config.prompts.path.startswith("toy:") and config.toy:
        return config.toy.num_train
    return count_rows(config.prompts.path)


def rows_by_split(config: Config) -> dict[str, int | None]:
    """Returns the number of rows to use from each evaluation split; None if it is known only after loading."""
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
    """Returns the largest number of rows that an iteration can train, with those that are mixed in."""
    rows_per_prompt = {
        "advantages": drafts_per_prompt(config.strategy),
        "accepted": drafts_per_prompt(config.strategy),
        "turn_advantages": responses_per_prompt(config.strategy),
        "reflections": responses_per_prompt(config.strategy),
    }.get(config.selection.name, config.selection.max_pairs)
    training = config.training
    return int(config.prompts.per_iteration * rows_per_prompt / (1 - training.replay - training.given))


def model_bytes(config: Config) -> int | None:
    """Returns bytes of the weights, from the headers of local safetensors files; None if the model is not downloaded."""
    files = list(Path(config.model.path).glob("*.safetensors"))
    total = 0
    for file in files:
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    return total or None
