"""What an iteration takes at most: tokens, hours, disk; and the table that `--plan` prints of a cluster.

Hours are a roofline: every answer as long as `sampling.max_tokens`, the arithmetic of two well-known GPUs, and the efficiencies
below, which are assumed, not measured. They leave out the start of engines and the reading of files.
"""

from dataclasses import dataclass

from evolve_ray.config.options import Config, Training
from evolve_ray.plan.fitting import faults
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
    sequences,
)
from evolve_ray.refine.strategies import responses_per_prompt

PROMPT_TOKENS = 512  # of a prompt with its system text, where only loading tells
COMPUTE, BANDWIDTH, TRAINING = 0.4, 0.6, 0.35  # of the peak: prefill and scoring, decoding, forward and backward together


@dataclass(frozen=True)
class Gpu:
    """A GPU's peaks: dense bfloat16 operations and bytes of memory a second."""

    name: str
    flops: float
    bandwidth: float


GPUS = (Gpu("H100", 989e12, 3.35e12), Gpu("A100", 312e12, 2.0e12))


def report(config: Config, held_out: int, cluster: Cluster | None) -> tuple[list[str], list[str]]:
    """(lines of the plan, what does not fit)."""
    uses = config.trainer.use_gpu or config.engine.gpus_per_actor or config.scorer.gpus_per_actor
    if not uses:
        return (["memory     not sized: the recipe uses no GPU"] if cluster else []), []
    if cluster is None:
        ask = "--nodes, --gpus-per-node and --gpu-memory-gib, or RAY_ADDRESS of a cluster with GPUs"
        return [f"memory     not sized: give {ask}"], []
    shape = read_shape(config.model.path, "model.path")
    scorers = [read_shape(name, "scorer.model", classifier=True) for name in scorer_models(config)]
    unknown = [found for found in (shape, *scorers) if isinstance(found, str)]
    if isinstance(shape, str) or unknown:
        return [f"memory     not sized: {why}" for why in unknown], []
    known = [found for found in scorers if isinstance(found, Shape)]
    lines = [f"cluster    {describe(cluster)}; the model has {shape.parameters / 1e9:.2f}B parameters"]
    lines += places(config, cluster)
    lines += ["", f"  {'GiB of one GPU':<16} {'takes':>6} {'may':>6}   of it"]
    for memory in memories(config, shape, known, cluster):
        of_it = ", ".join(f"{what} {size:.1f}" for what, size in memory.parts)
        lines += [f"  {memory.phase:<16} {memory.total_gib:>6.1f} {memory.limit_gib:>6.1f}   {of_it}"]
    if config.engine.gpus_per_actor:
        tokens = cache_tokens(config, shape, engine_memory(config, shape, cluster))
        contexts = tokens / config.model.context_tokens
        lines += [f"  an engine's cache holds {tokens:,} tokens: {contexts:.1f} whole contexts"]
    found = faults(config, shape, known, cluster)
    if not found:
        lines += ["", *hours(config, shape, known, held_out, cluster), *disk(config, shape)]
    return lines, found


def scorer_models(config: Config) -> list[str]:
    members = [member.removeprefix("reward_model=") for member in config.scorer.members if member.startswith("reward_model=")]
    return [config.scorer.model] if config.scorer.name == "reward_model" else members


def places(config: Config, cluster: Cluster) -> list[str]:
    engine, scorer, trainer = config.engine, config.scorer, config.trainer
    used = engine.actors * engine.gpus_per_actor + scorer.actors * scorer.gpus_per_actor * (scorer.name != "verifier")
    turns = "in turns with" if engine.release_for_training else "beside"
    return [
        f"places     {engine.actors} engines of {engine_gpus(config)} GPUs and {scorer.actors} scorers of "
        f"{scorer.gpus_per_actor:g}: {used:g} of {cluster.num_gpus} GPUs; {turns} {trainer.workers} ZeRO-3 workers"
    ]


def hours(config: Config, shape: Shape, scorers: list[Shape], held_out: int, cluster: Cluster) -> list[str]:
    """One line a GPU: hours of an iteration by stage, at most."""
    lines = [f"  hours at most    {'all':>6} {'drafts':>7} {'scores':>7} {'train':>7} {'eval':>7}"]
    answers = held_out * (config.evaluation.rounds + config.evaluation.parallel)
    drafts = config.prompts.per_iteration * responses_per_prompt(config.strategy)
    for gpu in GPUS:
        parts = [
            generation_s(config, shape, drafts, cluster, gpu),
            scoring_s(config, scorers, drafts, gpu),
            training_s(config, config.training, shape, gpu) if config.trainer.use_gpu else 0.0,
            generation_s(config, shape, answers, cluster, gpu) + scoring_s(config, scorers, answers, gpu),
        ]
        lines += [f"  {gpu.name:<16} {sum(parts) / 3600:>6.2f} " + " ".join(f"{part / 3600:>7.2f}" for part in parts)]
    return lines


def generation_s(config: Config, shape: Shape, answers: int, cluster: Cluster, gpu: Gpu) -> float:
    """A step of an engine reads its weights and the cache of all its seats once, and writes a token in each seat.

    An engine works on one shard at a time, so a shard's prompts are the seats that are filled.
    """
    if not config.engine.gpus_per_actor or not answers:
        return 0.0
    context = min(config.model.context_tokens, PROMPT_TOKENS + 1.5 * config.sampling.max_tokens)
    room = cache_tokens(config, shape, engine_memory(config, shape, cluster)) / context
    at_once = config.engine.shard_prompts * (config.strategy.samples if config.strategy.name in ("parallel", "best_of") else 1)
    seats = max(1.0, min(config.engine.max_num_seqs, room, at_once, answers / config.engine.actors))
    split = engine_gpus(config)
    read = BYTES[config.model.dtype] * shape.parameters / split + seats * context * cache_bytes(config, shape)
    step = max(read / (BANDWIDTH * gpu.bandwidth), 2 * shape.parameters * seats / (split * COMPUTE * gpu.flops))
    prefill = 2 * shape.parameters * context / (split * COMPUTE * gpu.flops)
    return answers / config.engine.actors * (config.sampling.max_tokens * step / seats + prefill)


def scoring_s(config: Config, scorers: list[Shape], answers: int, gpu: Gpu) -> float:
    if not config.scorer.gpus_per_actor:
        return 0.0
    tokens = answers * min(config.scorer.max_tokens, PROMPT_TOKENS + config.sampling.max_tokens)
    speed = config.scorer.actors * min(1.0, config.scorer.gpus_per_actor) * COMPUTE * gpu.flops
    return sum(2 * shape.parameters * tokens / speed for shape in scorers)


def training_s(config: Config, training: Training, shape: Shape, gpu: Gpu) -> float:
    """Six operations a parameter and token, two more where activations are computed again, two for the reference."""
    lengths = [PROMPT_TOKENS + config.sampling.max_tokens * (2 if "_after_" in name else 1) for name in sequences(training)]
    tokens = config.prompts.per_iteration * config.selection.max_pairs * sum(min(n, config.model.context_tokens) for n in lengths)
    operations = training.epochs * (8 if config.trainer.gradient_checkpointing else 6) + 2 * (training.objective != "sft")
    return operations * shape.parameters * tokens / (config.trainer.workers * TRAINING * gpu.flops)


def disk(config: Config, shape: Shape) -> list[str]:
    """A step's folder holds the ZeRO-3 state; the one before goes when the next is committed."""
    width = BYTES[config.model.dtype]
    weights, step = width * shape.parameters / GIB, (width + 12) * shape.parameters / GIB
    return [
        f"  disk             checkpoint {weights:,.0f} GiB an iteration; while training up to {2 * step:,.0f} GiB more, for two "
        "of the steps that a resumed training starts from"
    ]
