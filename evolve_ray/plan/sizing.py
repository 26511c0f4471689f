"""Computes GPU memory by phase from a recipe, a model's shape and a cluster. Nothing is loaded.

Every figure is an upper bound for the longest contexts that the recipe allows.
"""

import dataclasses
from dataclasses import dataclass

from evolve_ray.config.options import Config, Training, trainings
from evolve_ray.plan.shapes import Shape
from evolve_ray.train.tree import CHUNK_TOKENS

GIB = 2.0**30
BYTES = {"float32": 4, "bfloat16": 2}
STATES = {"float32": 20, "bfloat16": 18}  # bytes per parameter: weight, gradient, AdamW's two moments, float32 copies

# Defaults of DeepSpeed's zero_optimization, in elements.
MAX_LIVE, REDUCE_BUCKET, SUB_GROUP = 10**9, 5 * 10**8, 10**9
RESERVED_GIB = 2.0  # CUDA context, NCCL buffers, cuBLAS workspace
FRAGMENTS = 0.05  # share of the GPU that PyTorch's allocator loses to fragmentation
ENGINE_WORKSPACE_GIB = 2.0  # CUDA graphs, and the activations of vLLM's largest batch


@dataclass(frozen=True)
class Cluster:
    """A cluster, from the options of `--plan` or from a live Ray. Memory in GiB, as nvidia-smi shows it."""

    nodes: int
    gpus_per_node: int
    gpu_memory_gib: float

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU in one phase: parts as (name, GiB), and the limit for the phase."""

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
    """Returns the sequences of a pair that the objective reads, by the names in `needs` of `evolve_ray/train/objectives.py`."""
    direct = ("chosen", "rejected")
    refinements = tuple(f"{name}_after_{draft}" for draft in reversed(direct) for name in direct)
    names = {
        "sft": ("chosen", "chosen_after_rejected") if training.refine_weight else ("chosen",),
        "srpo": refinements,
        # Each further turn is about as long as a refinement after its draft.
        "turns_dpo": direct + refinements[:2] * (training.objective_args.get("turns", 2) - 1),
        "turns_sft": ("chosen", *refinements[:1] * len(training.objective_args.get("weights", {}))),
        "evolve": direct * (training.alpha < 1) + refinements * (training.alpha > 0),
    }.get(training.objective, direct)
    return ("chosen", *names) if training.nll and "chosen" not in names else names


def forward_tokens(config: Config, training: Training) -> int:
    """Returns the tokens of the largest forward of a training. Rows are padded to at most `model.context_tokens`.

    A tree holds the shared parts of a pair once: it has one context, plus one response for each further node.
    """
    names = sequences(training)
    if not reads_trees(config, training):
        return training.micro_pairs * len(names) * config.model.context_tokens
    nodes = {name.partition("_after_")[0] for name in names if "_after_" not in name}
    nodes |= {name.partition("_after_")[2] for name in names if "_after_" in name}
    further_nodes = max(0, len(nodes) + sum("_after_" in name for name in names) - 2)
    tree_tokens = config.model.context_tokens + further_nodes * config.sampling.max_tokens
    return max(tree_tokens, config.trainer.max_tokens)


def reads_trees(config: Config, training: Training) -> bool:
    return config.trainer.forward == "tree" and training.objective != "reward"


def training_memory(config: Config, training: Training, shape: Shape, cluster: Cluster) -> Memory:
    """Returns the memory of a ZeRO-3 worker's GPU.

    States: as in DeepSpeed's `estimate_zero3_model_states_mem_needs` (18 bytes for each parameter, split over all workers, plus
    weight and gradient of the largest layer). Activations: the tensors that the backward pass of a layer needs, after arXiv
    2205.05198, for a gated feed-forward part and attention that stores no matrix. With gradient checkpointing: the input of
    every layer, and all activations of one layer.
    """
    bytes_each, tokens, vocabulary = BYTES[config.model.dtype], forward_tokens(config, training), shape.vocabulary
    parameters_each = shape.parameters / config.trainer.workers
    zero_options = config.trainer.deepspeed.get("zero_optimization") or {}
    num_trained, num_frozen = parameters_each, 0.0
    if config.trainer.lora_rank and training.objective != "reward":
        num_trained, num_frozen = shape.adapters(config.trainer.lora_rank) / config.trainer.workers, parameters_each
    states = STATES[config.model.dtype] * num_trained + bytes_each * num_frozen
    if (zero_options.get("offload_optimizer") or {}).get("device", "none") != "none":
        states = 2 * bytes_each * num_trained + bytes_each * num_frozen
    num_live = min(zero_options.get("stage3_max_live_parameters", MAX_LIVE), shape.parameters)
    num_bucket = min(zero_options.get("reduce_bucket_size", REDUCE_BUCKET), shape.parameters)
    gathered = 2 * bytes_each * shape.largest + bytes_each * (num_live + num_bucket)
    layer = bytes_each * (4 * shape.hidden + 2 * shape.attention + 2 * shape.cache + 4 * shape.intermediate) + 8 * shape.hidden
    if config.trainer.gradient_checkpointing:
        # Inputs of all layers; the layer that is recomputed, and its gradients.
        activations = tokens * (shape.layers * bytes_each * shape.hidden + 2 * layer)
    else:
        activations = tokens * (shape.layers + 1) * layer
    if reads_trees(config, training):
        logits = CHUNK_TOKENS * vocabulary * (bytes_each + 8) + 3 * tokens**2  # and the attention mask of the tree
    elif training.objective == "reward":
        logits = 0
    else:
        responses = training.micro_pairs * len(sequences(training)) * config.sampling.max_tokens
        logits = vocabulary * (2 * bytes_each * tokens + (bytes_each + 8) * responses)
    # float32 gradients and temporaries of the optimiser step, when activations and logits are freed.
    step = 8 * min(zero_options.get("sub_group_size", SUB_GROUP), num_trained)
    parts = (
        ("states", states / GIB),
        ("gathered layers, buckets", gathered / GIB),
        (f"activations of {tokens:,} tokens", max(activations, step - logits) / GIB),
        ("logits", logits / GIB),
        ("reserve", RESERVED_GIB + FRAGMENTS * cluster.gpu_memory_gib),
    )
    return Memory("training", parts, cluster.gpu_memory_gib)


def of_model(config: Config, name: str) -> Config:
    """The recipe as the engines of `[models.NAME]` read it: with that model and its engines in place of the policy's."""
    own = config.models[name]
    model = dataclasses.replace(config.model, path=own.path, context_tokens=own.context_tokens or config.model.context_tokens)
    return dataclasses.replace(config, model=model, engine=own.engine(config.engine))


def engine_memory(config: Config, shape: Shape, cluster: Cluster) -> Memory:
    """Returns the memory of an engine's GPU.

    vLLM uses the share `gpu_memory_utilization` of it; weights and workspace come first, the KV cache gets the rest. The cache
    must hold one full context, or vLLM does not start.
    """
    args, bytes_each = config.engine.args, BYTES[config.model.dtype]
    weights = bytes_each * shape.parameters / engine_gpus(config)
    workspace = ENGINE_WORKSPACE_GIB * GIB + 8 * config.engine.max_num_seqs * shape.vocabulary
    cache = cache_bytes(config, shape) * config.model.context_tokens
    parts = (("weights", weights / GIB), ("workspace", workspace / GIB), ("cache of one context", cache / GIB))
    return Memory("engine", parts, args.get("gpu_memory_utilization", 0.92) * cluster.gpu_memory_gib)


def cache_bytes(config: Config, shape: Shape) -> float:
    """Returns bytes of one token in the KV cache of one GPU: keys and values of every layer, split over the engine's GPUs."""
    bytes_each = 1 if str(config.engine.args.get("kv_cache_dtype", "auto")).startswith("fp8") else BYTES[config.model.dtype]
    num_splits = min(config.engine.args.get("tensor_parallel_size", 1), shape.kv_heads)
    stages = config.engine.args.get("pipeline_parallel_size", 1)
    return 2 * bytes_each * shape.layers * shape.cache / num_splits / stages


def cache_tokens(config: Config, shape: Shape, memory: Memory) -> int:
    """Returns the number of tokens that an engine's KV cache can hold."""
    used_gib = sum(size for part, size in memory.parts if part != "cache of one context")
    return max(0, int((memory.limit_gib - used_gib) * GIB / cache_bytes(config, shape)))


def scorer_memory(config: Config, shapes: list[Shape], cluster: Cluster) -> Memory:
    """Returns the memory of a scorer's GPU, or its share of one: all reward models, and one layer's tensors of a batch."""
    bytes_each, tokens = BYTES[config.scorer.dtype], config.scorer.batch_size * config.scorer.max_tokens
    weights = sum(bytes_each * shape.parameters for shape in shapes)
    layer = max(bytes_each * (4 * shape.hidden + shape.attention + 2 * shape.cache + 3 * shape.intermediate) for shape in shapes)
    parts = (
        ("weights", weights / GIB),
        (f"activations of {tokens:,} tokens", tokens * layer / GIB),
        ("reserve", RESERVED_GIB + FRAGMENTS * cluster.gpu_memory_gib),
    )
    share = min(1.0, config.scorer.gpus_per_actor)
    return Memory("scorer", parts, share * cluster.gpu_memory_gib)


def engine_gpus(config: Config) -> int:
    """Returns the number of GPUs over which one engine is split."""
    return config.engine.args.get("tensor_parallel_size", 1) * config.engine.args.get("pipeline_parallel_size", 1)


def memories(config: Config, shape: Shape, scorers: list[Shape], cluster: Cluster) -> list[Memory]:
    """Returns the memory of every phase that uses a GPU; of several trainings, the largest one."""
    phases = []
    if config.engine.gpus_per_actor:
        phases.append(engine_memory(config, shape, cluster))
    if scorers and config.scorer.gpus_per_actor:
        phases.append(scorer_memory(config, scorers, cluster))
    if config.trainer.use_gpu:
        shape_of = {"refresh.training": scorers[0] if scorers else shape}
        training_phases = [
            training_memory(config, training, shape_of.get(name, shape), cluster) for name, training in trainings(config)
        ]
        phases.append(max(training_phases, key=lambda memory: memory.total_gib))
    return phases


def describe(cluster: Cluster) -> str:
    return f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.gpus_per_node} GPUs with {cluster.gpu_memory_gib:g} GiB"


def node_resource(node: dict) -> str:
    """Returns the resource that places a Ray task on this node."""
    return next(name for name in node["Resources"] if name.startswith("node:") and "head" not in name)


def cluster_of_ray() -> Cluster | None:
    """Returns the GPU nodes of the Ray cluster at RAY_ADDRESS, all with the size of the smallest; None if it has no GPU."""
    import ray

    @ray.remote(num_cpus=0)
    def memory_mib() -> int:
        import subprocess

        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        return min(int(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    if not nodes:
        return None
    tasks = [memory_mib.options(resources={node_resource(node): 0.001}) for node in nodes]
    smallest = min(ray.get([task.remote() for task in tasks])) / 1024
    return Cluster(len(nodes), min(int(node["Resources"]["GPU"]) for node in nodes), round(smallest, 1))
