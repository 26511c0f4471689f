"""GPU memory by phase, from a recipe, a model's shape and a cluster: plain arithmetic, nothing is loaded.

Every figure is an upper bound for the longest contexts that the recipe allows.
"""

from dataclasses import dataclass

from evolve_ray.config.options import Config, Training, trainings
from evolve_ray.plan.shapes import Shape
from evolve_ray.train.tree import CHUNK_TOKENS

GIB = 2.0**30
BYTES = {"float32": 4, "bfloat16": 2}
STATES = {"float32": 20, "bfloat16": 18}  # bytes a parameter: weight, gradient, AdamW's two moments, float32 copies

# The defaults of DeepSpeed's zero_optimization, elements.
MAX_LIVE, REDUCE_BUCKET, SUB_GROUP = 10**9, 5 * 10**8, 10**9
RESERVED_GIB = 2.0  # CUDA context, NCCL's buffers, cuBLAS's workspace
FRAGMENTS = 0.05  # of the GPU: what PyTorch's allocator cannot give back to anybody
ENGINE_WORKSPACE_GIB = 2.0  # CUDA graphs and activations of vLLM's largest batch


@dataclass(frozen=True)
class Cluster:
    """What `--plan` is told of a cluster, or reads from a live one. Memory as the GPU's tools show it, in GiB."""

    nodes: int
    gpus_per_node: int
    gpu_memory_gib: float

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Memory:
    """What one GPU holds in one phase: (what, GiB), and how much of the GPU the phase may use."""

    phase: str
    parts: tuple[tuple[str, float], ...]
    limit_gib: float

    @property
    def total_gib(self) -> float:
        return sum(size for _, size in self.parts)

    @property
    def fits(self) -> bool:
        return self.total_gib <= self.limit_gib


def sequences(training: Training) -> tuple[str, ...]:
    """The sequences that the objective reads of a pair (the names of `objective.Objective.needs`)."""
    direct = ("chosen", "rejected")
    after = tuple(f"{name}_after_{draft}" for draft in reversed(direct) for name in direct)
    found = {
        "sft": ("chosen", "chosen_after_rejected") if training.refine_weight else ("chosen",),
        "srpo": after,
        "evolve": direct * (training.alpha < 1) + after * (training.alpha > 0),
    }.get(training.objective, direct)
    return ("chosen", *found) if training.nll and "chosen" not in found else found


def forward_tokens(config: Config, training: Training) -> int:
    """Tokens of the largest forward of a training. Rows are padded to the longest one, at most `model.context_tokens`.

    As a tree, a pair's shared parts stand once: beyond one context there is a response for each further node.
    """
    names = sequences(training)
    if not reads_trees(config, training):
        return training.micro_pairs * len(names) * config.model.context_tokens
    nodes = {name.partition("_after_")[0] for name in names if "_after_" not in name}
    nodes |= {name.partition("_after_")[2] for name in names if "_after_" in name}
    beyond = max(0, len(nodes) + sum("_after_" in name for name in names) - 2)
    pair = config.model.context_tokens + beyond * config.sampling.max_tokens
    return max(pair, config.trainer.max_tokens)


def reads_trees(config: Config, training: Training) -> bool:
    return config.trainer.forward == "tree" and training.objective != "reward"


def training_memory(config: Config, training: Training, shape: Shape, cluster: Cluster) -> Memory:
    """A ZeRO-3 worker's GPU.

    States: DeepSpeed's own `estimate_zero3_model_states_mem_needs` (18 bytes a parameter over all workers, and the largest
    layer's weight and gradient). Activations: the tensors that the backward pass of a layer needs, after arXiv 2205.05198 with
    a gated feed-forward part and attention that keeps no matrix; with checkpointing a layer's input each and one layer whole.
    """
    width, tokens, vocabulary = BYTES[config.model.dtype], forward_tokens(config, training), shape.vocabulary
    share = shape.parameters / config.trainer.workers
    zero = config.trainer.deepspeed.get("zero_optimization") or {}
    trained, frozen = share, 0.0
    if config.trainer.lora_rank and training.objective != "reward":
        trained, frozen = shape.adapters(config.trainer.lora_rank) / config.trainer.workers, share
    states = STATES[config.model.dtype] * trained + width * frozen
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        states = 2 * width * trained + width * frozen
    live = min(zero.get("stage3_max_live_parameters", MAX_LIVE), shape.parameters)
    buckets = min(zero.get("reduce_bucket_size", REDUCE_BUCKET), shape.parameters)
    gathered = 2 * width * shape.largest + width * (live + buckets)
    layer = width * (4 * shape.hidden + 2 * shape.attention + 2 * shape.cache + 4 * shape.intermediate) + 8 * shape.hidden
    if config.trainer.gradient_checkpointing:
        activations = tokens * (shape.layers * width * shape.hidden + 2 * layer)  # the layer at work, and its gradients
    else:
        activations = tokens * (shape.layers + 1) * layer
    if reads_trees(config, training):
        logits = CHUNK_TOKENS * vocabulary * (width + 8) + 3 * tokens**2  # and the mask of what sees what
    elif training.objective == "reward":
        logits = 0
    else:
        responses = training.micro_pairs * len(sequences(training)) * config.sampling.max_tokens
        logits = vocabulary * (2 * width * tokens + (width + 8) * responses)
    step = 8 * min(zero.get("sub_group_size", SUB_GROUP), trained)  # float32 gradients and temporaries, when all else is gone
    parts = (
        ("states", states / GIB),
        ("gathered layers, buckets", gathered / GIB),
        (f"activations of {tokens:,} tokens", max(activations, step - logits) / GIB),
        ("logits", logits / GIB),
        ("reserve", RESERVED_GIB + FRAGMENTS * cluster.gpu_memory_gib),
    )
    return Memory("training", parts, cluster.gpu_memory_gib)


def engine_memory(config: Config, shape: Shape, cluster: Cluster) -> Memory:
    """A GPU of an engine: vLLM takes `gpu_memory_utilization` of it, and what weights and workspace leave is the cache.

    The cache must hold one whole context, or vLLM does not start.
    """
    args, width = config.engine.args, BYTES[config.model.dtype]
    weights = width * shape.parameters / engine_gpus(config)
    workspace = ENGINE_WORKSPACE_GIB * GIB + 8 * config.engine.max_num_seqs * shape.vocabulary
    cache = cache_bytes(config, shape) * config.model.context_tokens
    parts = (("weights", weights / GIB), ("workspace", workspace / GIB), ("cache of one context", cache / GIB))
    return Memory("engine", parts, args.get("gpu_memory_utilization", 0.92) * cluster.gpu_memory_gib)


def cache_bytes(config: Config, shape: Shape) -> float:
    """Bytes that a token takes in the cache of one GPU: keys and values of every layer, split over the engine's GPUs."""
    width = 1 if str(config.engine.args.get("kv_cache_dtype", "auto")).startswith("fp8") else BYTES[config.model.dtype]
    split = min(config.engine.args.get("tensor_parallel_size", 1), shape.kv_heads)
    stages = config.engine.args.get("pipeline_parallel_size", 1)
    return 2 * width * shape.layers * shape.cache / split / stages


def cache_tokens(config: Config, shape: Shape, memory: Memory) -> int:
    """Tokens that an engine's cache holds."""
    kept = sum(size for what, size in memory.parts if what != "cache of one context")
    return max(0, int((memory.limit_gib - kept) * GIB / cache_bytes(config, shape)))


def scorer_memory(config: Config, shapes: list[Shape], cluster: Cluster) -> Memory:
    """A scoring actor's GPU, or its share of one: all reward models and one layer's tensors of a batch."""
    width, tokens = BYTES[config.scorer.dtype], config.scorer.batch_size * config.scorer.max_tokens
    weights = sum(width * shape.parameters for shape in shapes)
    layer = max(width * (4 * shape.hidden + shape.attention + 2 * shape.cache + 3 * shape.intermediate) for shape in shapes)
    parts = (
        ("weights", weights / GIB),
        (f"activations of {tokens:,} tokens", tokens * layer / GIB),
        ("reserve", RESERVED_GIB + FRAGMENTS * cluster.gpu_memory_gib),
    )
    share = min(1.0, config.scorer.gpus_per_actor)
    return Memory("scorer", parts, share * cluster.gpu_memory_gib)


def engine_gpus(config: Config) -> int:
    """GPUs over which one engine is split."""
    return config.engine.args.get("tensor_parallel_size", 1) * config.engine.args.get("pipeline_parallel_size", 1)


def memories(config: Config, shape: Shape, scorers: list[Shape], cluster: Cluster) -> list[Memory]:
    """Every phase that uses a GPU; of several trainings the one that takes most."""
    found = []
    if config.engine.gpus_per_actor:
        found.append(engine_memory(config, shape, cluster))
    if scorers and config.scorer.gpus_per_actor:
        found.append(scorer_memory(config, scorers, cluster))
    if config.trainer.use_gpu:
        shape_of = {"refresh.training": scorers[0] if scorers else shape}
        all_of = [training_memory(config, part, shape_of.get(name, shape), cluster) for name, part in trainings(config)]
        found.append(max(all_of, key=lambda memory: memory.total_gib))
    return found


def describe(cluster: Cluster) -> str:
    return f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.gpus_per_node} GPUs with {cluster.gpu_memory_gib:g} GiB"


def cluster_of_ray() -> Cluster | None:
    """The GPU nodes of the Ray cluster that RAY_ADDRESS names; None where it has none. The smallest node counts for all."""
    import ray

    @ray.remote(num_cpus=0)
    def memory_mib() -> int:
        import subprocess

        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        return min(int(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    if not nodes:
        return None
    asked = [
        memory_mib.options(resources={next(k for k in n["Resources"] if k.startswith("node:") and "head" not in k): 0.001})
        for n in nodes
    ]
    smallest = min(ray.get([task.remote() for task in asked])) / 1024
    return Cluster(len(nodes), min(int(node["Resources"]["GPU"]) for node in nodes), round(smallest, 1))
