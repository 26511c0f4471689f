"""Upper bounds for the hours and the disk of an iteration, and the table that `--plan` prints for a cluster.

Hours are a roofline estimate: every response has `sampling.max_tokens` tokens, GPUs have the peaks of two well-known models, and
the efficiencies below are assumed, not measured. The start of engines and the reading of files are not included.
"""

import dataclasses
from dataclasses import dataclass

from evolve_ray.config.options import Config, Training
from evolve_ray.plan.fitting import fit_errors
from evolve_ray.plan.shapes import Shape, read_shape
from evolve_ray.plan.sizing import (
    BYTES,
    GIB,
    Cluster,
    cache_bytes,
    cache_tokens,
    describe,
    engine_gpus,
    engine_memory,
    memories,
    of_model,
    sequences,
)
from evolve_ray.refine.strategies import responses_per_prompt

PROMPT_TOKENS = 512  # assumed length of a prompt with its system text: the real one is known only after loading
COMPUTE, BANDWIDTH, TRAINING = 0.4, 0.6, 0.35  # assumed shares of the peak: prefill and scoring; decoding; forward and backward


@dataclass(frozen=True)
class Gpu:
    """Peak speeds of a GPU: dense bfloat16 operations and bytes of memory bandwidth, each per second."""

    name: str
    flops: float
    bandwidth: float


GPUS = (Gpu("H100", 989e12, 3.35e12), Gpu("A100", 312e12, 2.0e12))


def report(config: Config, held_out: int, cluster: Cluster | None) -> tuple[list[str], list[str]]:
    """Returns (lines of the plan, errors for what does not fit)."""
    uses_gpus = config.trainer.use_gpu or config.engine.gpus_per_actor or config.scorer.gpus_per_actor
    if not uses_gpus:
        return (["memory     not estimated: the recipe uses no GPU"] if cluster else []), []
    if cluster is None:
        options = "--nodes, --gpus-per-node and --gpu-memory-gib, or RAY_ADDRESS of a cluster with GPUs"
        return [f"memory     not estimated: give {options}"], []
    shape = read_shape(config.model.path, "model.path")
    scorers_or_reasons = [read_shape(name, "scorer.model", classifier=True) for name in scorer_models(config)]
    second = {name: read_shape(model.path, f"models.{name}.path") for name, model in config.models.items()}
    everything = (shape, *scorers_or_reasons, *second.values())
    reasons = [shape_or_reason for shape_or_reason in everything if isinstance(shape_or_reason, str)]
    if isinstance(shape, str) or reasons:
        return [f"memory     not estimated: {reason}" for reason in reasons], []
    scorer_shapes = [shape_or_reason for shape_or_reason in scorers_or_reasons if isinstance(shape_or_reason, Shape)]
    lines = [f"cluster    {describe(cluster)}; the model has {shape.parameters / 1e9:.2f}B parameters"]
    lines += placement(config, cluster)
    lines += ["", f"  {'GiB of one GPU':<16} {'needs':>6} {'limit':>6}   parts"]
    others = {name: other for name, other in second.items() if isinstance(other, Shape)}
    read_by = {name: of_model(config, name) for name in others}
    of_models = [
        dataclasses.replace(engine_memory(read_by[name], other, cluster), phase=f"models.{name}")
        for name, other in others.items()
        if read_by[name].engine.gpus_per_actor
    ]
    for memory in [*memories(config, shape, scorer_shapes, cluster), *of_models]:
        parts = ", ".join(f"{part} {size:.1f}" for part, size in memory.parts)
        lines += [f"  {memory.phase:<16} {memory.total_gib:>6.1f} {memory.limit_gib:>6.1f}   {parts}"]
    if config.engine.gpus_per_actor:
        tokens = cache_tokens(config, shape, engine_memory(config, shape, cluster))
        contexts = tokens / config.model.context_tokens
        lines += [f"  KV cache of an engine: {tokens:,} tokens, or {contexts:.1f} full contexts"]
    errors = fit_errors(config, shape, scorer_shapes, cluster, others)
    if not errors:
        lines += ["", *hours(config, shape, scorer_shapes, held_out, cluster), *disk(config, shape)]
    return lines, errors


def scorer_models(config: Config) -> list[str]:
    members = [member.removeprefix("reward_model=") for member in config.scorer.members if member.startswith("reward_model=")]
    return [config.scorer.model] if config.scorer.name == "reward_model" else members


def placement(config: Config, cluster: Cluster) -> list[str]:
    engine, scorer, trainer = config.engine, config.scorer, config.trainer
    used = engine.actors * engine.gpus_per_actor + scorer.actors * scorer.gpus_per_actor * (scorer.name != "verifier")
    relation = "taking turns with" if engine.release_for_training else "at the same time as"
    return [
        f"placement  {engine.actors} engines with {engine_gpus(config)} GPUs each, {scorer.actors} scorers with "
        f"{scorer.gpus_per_actor:g} each: {used:g} of {cluster.num_gpus} GPUs, {relation} {trainer.workers} ZeRO-3 workers"
    ]


def evaluation_responses(config: Config) -> int:
    """The responses to a held-out prompt, at most."""
    measured = responses_per_prompt(config.strategy) if config.evaluation.pick else 0
    return config.evaluation.rounds + config.evaluation.parallel + measured


def hours(config: Config, shape: Shape, scorers: list[Shape], held_out: int, cluster: Cluster) -> list[str]:
    """Returns one line for each type of GPU: upper bounds for the hours of an iteration, by stage."""
    lines = [f"  hours at most    {'all':>6} {'drafts':>7} {'scores':>7} {'train':>7} {'eval':>7}"]
    evaluation_drafts = held_out * evaluation_responses(config)
    drafts = config.prompts.per_iteration * responses_per_prompt(config.strategy)
    for gpu in GPUS:
        parts = [
            generation_s(config, shape, drafts, cluster, gpu),
            scoring_s(config, scorers, drafts, gpu),
            training_s(config, config.training, shape, gpu) if config.trainer.use_gpu else 0.0,
            generation_s(config, shape, evaluation_drafts, cluster, gpu) + scoring_s(config, scorers, evaluation_drafts, gpu),
        ]
        lines += [f"  {gpu.name:<16} {sum(parts) / 3600:>6.2f} " + " ".join(f"{part / 3600:>7.2f}" for part in parts)]
    return lines


def generation_s(config: Config, shape: Shape, drafts: int, cluster: Cluster, gpu: Gpu) -> float:
    """Returns seconds of generation.

    A step of an engine reads the weights and the KV cache of all its sequences once, and writes a token for each sequence. An
    engine works on one shard at a time, so the prompts of a shard limit the number of sequences.
    """
    if not config.engine.gpus_per_actor or not drafts:
        return 0.0
    context = min(config.model.context_tokens, PROMPT_TOKENS + 1.5 * config.sampling.max_tokens)
    cache_contexts = cache_tokens(config, shape, engine_memory(config, shape, cluster)) / context
    samples = config.strategy.samples if config.strategy.name in ("parallel", "best_of") else 1
    shard_sequences = config.engine.shard_prompts * samples
    num_sequences = max(1.0, min(config.engine.max_num_seqs, cache_contexts, shard_sequences, drafts / config.engine.actors))
    num_gpus = engine_gpus(config)
    bytes_read = BYTES[config.model.dtype] * shape.parameters / num_gpus + num_sequences * context * cache_bytes(config, shape)
    step = max(bytes_read / (BANDWIDTH * gpu.bandwidth), 2 * shape.parameters * num_sequences / (num_gpus * COMPUTE * gpu.flops))
    prefill = 2 * shape.parameters * context / (num_gpus * COMPUTE * gpu.flops)
    return drafts / config.engine.actors * (config.sampling.max_tokens * step / num_sequences + prefill)


def scoring_s(config: Config, scorers: list[Shape], drafts: int, gpu: Gpu) -> float:
    if not config.scorer.gpus_per_actor:
        return 0.0
    tokens = drafts * min(config.scorer.max_tokens, PROMPT_TOKENS + config.sampling.max_tokens)
    speed = config.scorer.actors * min(1.0, config.scorer.gpus_per_actor) * COMPUTE * gpu.flops
    return sum(2 * shape.parameters * tokens / speed for shape in scorers)


def training_s(config: Config, training: Training, shape: Shape, gpu: Gpu) -> float:
    """Returns seconds of training: 6 operations for each parameter and token, plus 2 for recomputed activations.

    The reference adds 2 operations for each parameter and token.
    """
    lengths = [PROMPT_TOKENS + config.sampling.max_tokens * (2 if "_after_" in name else 1) for name in sequences(training)]
    tokens: float = (
        config.prompts.per_iteration * config.selection.max_pairs * sum(min(n, config.model.context_tokens) for n in lengths)
    )
    tokens /= 1 - training.replay - training.given
    operations = training.epochs * (8 if config.trainer.gradient_checkpointing else 6) + 2 * (training.objective != "sft")
    return operations * shape.parameters * tokens / (config.trainer.workers * TRAINING * gpu.flops)


def disk(config: Config, shape: Shape) -> list[str]:
    """Returns the line about disk. A stored step holds the ZeRO-3 state; it is deleted when the next one is committed."""
    bytes_each = BYTES[config.model.dtype]
    weights, step = bytes_each * shape.parameters / GIB, (bytes_each + 12) * shape.parameters / GIB
    return [
        f"  disk             checkpoint {weights:,.0f} GiB per iteration; during training up to {2 * step:,.0f} GiB more, for "
        "two stored steps"
    ]
