"""Checks whether a recipe fits on a cluster, and finds a change that makes it fit.

A suggestion is never a guess: one option at a time is changed, and the memory is computed again.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from evolve_ray.config.options import Config, texts_in_view
from evolve_ray.plan.shapes import Shape
from evolve_ray.plan.sizing import Cluster, describe, engine_gpus, engine_memory, memories, of_model


def fit_errors(
    config: Config, shape: Shape, scorers: list[Shape], cluster: Cluster, second: dict[str, Shape] | None = None
) -> list[str]:  # fmt: skip
    """Returns an error for each phase that cannot be placed or does not fit; suggested changes of memory are checked.

    `second` are the shapes of further models by name.
    """
    errors = placement_errors(config, shape, cluster)
    for name, other in (second or {}).items():
        own = of_model(config, name)
        errors += engine_errors(f"models.{name}", own, other, cluster)
        memory = engine_memory(own, other, cluster)
        if own.engine.gpus_per_actor and not memory.fits:
            errors.append(
                f"models.{name}: needs {memory.total_gib:.1f} GiB on each GPU, but the limit is {memory.limit_gib:.1f}; raise "
                f"models.{name}.args.tensor_parallel_size and models.{name}.gpus_per_actor, or lower models.{name}.context_tokens"
            )
    for memory in memories(config, shape, scorers, cluster):
        if not memory.fits:
            largest = max(memory.parts, key=lambda part: part[1])
            errors.append(
                f"{memory.phase}: needs {memory.total_gib:.1f} GiB on each GPU, but the limit is {memory.limit_gib:.1f} "
                f"(largest part: {largest[0]} {largest[1]:.1f}); {suggest_change(config, shape, scorers, cluster, memory.phase)}"
            )
    return errors


def placement_errors(config: Config, shape: Shape, cluster: Cluster) -> list[str]:
    engine, scorer, trainer = config.engine, config.scorer, config.trainer
    errors = engine_errors("engine", config, shape, cluster)
    if engine.gpus_per_actor <= cluster.gpus_per_node and not can_place(config, cluster, engine.actors):
        most_engines = next((n for n in range(engine.actors - 1, 0, -1) if can_place(config, cluster, n)), 0)
        advice = f"lower engine.actors to {most_engines}" if most_engines else "lower scorer.actors or add nodes"
        errors.append(
            f"engine.actors: {engine.actors} engines of {engine.gpus_per_actor:g} GPUs and {scorer.actors} scorers of "
            f"{scorer.gpus_per_actor:g} do not fit on {describe(cluster)}; {advice}"
        )
    pools: list[Any] = [engine, scorer, *(model.engine(engine) for model in config.models.values())]
    kept_gpus = 0.0 if engine.release_for_training else sum(pool.actors * pool.gpus_per_actor for pool in pools)
    if trainer.use_gpu and trainer.workers + kept_gpus > cluster.num_gpus:
        free = int(cluster.num_gpus - kept_gpus)
        reason = ": engines and scorers keep theirs (engine.release_for_training=false)" if kept_gpus else ""
        errors.append(
            f"trainer.workers: is {trainer.workers}, but only {free} GPUs are free for them{reason}; "
            f"set trainer.workers={max(free, 1)} or add nodes"
        )
    return errors


def engine_errors(table: str, config: Config, shape: Shape, cluster: Cluster) -> list[str]:
    """What is wrong with the GPUs of one engine, which the recipe sets in `table`: "engine" or "models.NAME"."""
    errors, gpus = [], config.engine.gpus_per_actor
    parallel, needed = config.engine.args.get("tensor_parallel_size", 1), engine_gpus(config)
    if gpus and gpus != needed:
        errors.append(
            f"{table}.gpus_per_actor: is {gpus:g}, but {table}.args splits an engine over {needed} GPUs; set it to {needed}, or "
            f"{table}.args.tensor_parallel_size to {gpus:g}"
        )
    if shape.heads % parallel:
        errors.append(f"{table}.args.tensor_parallel_size: is {parallel}, which does not divide the model's {shape.heads} heads")
    if gpus > cluster.gpus_per_node:
        errors.append(
            f"{table}.gpus_per_actor: is {gpus:g}, but a node has {cluster.gpus_per_node} GPUs and an engine runs on one node; "
            f"lower {table}.args.tensor_parallel_size to at most {cluster.gpus_per_node}"
        )
    return errors


def can_place(config: Config, cluster: Cluster, engines: int) -> bool:
    """Returns whether every actor fits on a node, if the larger actors are placed first."""
    free = [float(cluster.gpus_per_node)] * cluster.nodes
    scorers = config.scorer.actors if config.scorer.name != "verifier" else 0
    second = [model.engine(config.engine) for model in config.models.values()]
    sizes = [config.engine.gpus_per_actor] * engines + [config.scorer.gpus_per_actor] * scorers
    for size in sorted([*sizes, *(part.gpus_per_actor for part in second for _ in range(part.actors))], reverse=True):
        node = next((number for number, free_gpus in enumerate(free) if free_gpus >= size - 1e-9), None)
        if node is None:
            return False
        free[node] -= size
    return True


def suggest_change(config: Config, shape: Shape, scorers: list[Shape], cluster: Cluster, phase: str) -> str:
    """Returns the first single change of the recipe or the cluster that makes the phase fit."""
    tried = []
    for name, changed, changed_cluster in changes(config, cluster, phase, shape):
        memory = next((m for m in memories(changed, shape, scorers, changed_cluster) if m.phase == phase), None)
        if (
            memory
            and memory.fits
            and set(placement_errors(changed, shape, changed_cluster)) <= set(placement_errors(config, shape, cluster))
        ):
            return f"with {name} it needs {memory.total_gib:.1f}"
        tried.append(name)
    return f"none of these changes alone is enough: {', '.join(tried)}; use a smaller model or larger GPUs"


def changes(config: Config, cluster: Cluster, phase: str, shape: Shape) -> Iterator[tuple[str, Config, Cluster]]:
    """Yields (name of the change, changed recipe, changed cluster), the cheapest change first."""

    def set_to(section: str, **values: Any) -> tuple[str, Config, Cluster]:
        part = dataclasses.replace(getattr(config, section), **values)
        return (
            " and ".join(f"{section}.{k}={v}" for k, v in values.items()),
            dataclasses.replace(config, **{section: part}),
            cluster,
        )

    if phase == "training":
        if config.trainer.gradient_checkpointing is False:
            yield set_to("trainer", gradient_checkpointing=True)
        if config.trainer.forward == "separate":
            yield set_to("trainer", forward="tree")
        if config.training.micro_pairs > 1:
            yield set_to("training", micro_pairs=1)
        for workers in range(config.trainer.workers + 1, cluster.num_gpus + 1):
            yield set_to("trainer", workers=workers)
        yield from shorter(config, cluster)
        for nodes in (2, 4, 8):
            if nodes > cluster.nodes:
                larger = dataclasses.replace(cluster, nodes=nodes)
                name, changed, _ = set_to("trainer", workers=larger.num_gpus)
                yield f"{nodes} nodes and {name}", changed, larger
    elif phase == "engine":
        for parallel in (2, 4, 8):
            if engine_gpus(config) < parallel <= cluster.gpus_per_node and not shape.heads % parallel:
                args = {**config.engine.args, "tensor_parallel_size": parallel}
                most_actors = max(1, int(cluster.num_gpus - config.scorer.actors * config.scorer.gpus_per_actor) // parallel)
                actors = min(config.engine.actors, most_actors)
                _, changed, _ = set_to("engine", args=args, gpus_per_actor=float(parallel), actors=actors)
                name = f"engine.args.tensor_parallel_size={parallel}, engine.gpus_per_actor={parallel} and engine.actors={actors}"
                yield name, changed, cluster
        args = {**config.engine.args, "gpu_memory_utilization": 0.92}
        yield "engine.args.gpu_memory_utilization=0.92", set_to("engine", args=args)[1], cluster
        yield from shorter(config, cluster)
    else:
        if config.scorer.dtype == "float32":
            yield set_to("scorer", dtype="bfloat16")
        for size in lower(config.scorer.batch_size):
            yield set_to("scorer", batch_size=size)
        if config.scorer.gpus_per_actor < 1:
            yield set_to("scorer", gpus_per_actor=1.0)


def shorter(config: Config, cluster: Cluster) -> Iterator[tuple[str, Config, Cluster]]:
    """Yields shorter contexts; shorter responses too, if the old ones would not fit into the context."""
    for tokens in lower(config.model.context_tokens):
        name, sampling = f"model.context_tokens={tokens}", config.sampling
        if texts_in_view(config.strategy) * sampling.max_tokens >= tokens:
            sampling = dataclasses.replace(sampling, max_tokens=tokens // (2 * texts_in_view(config.strategy)))
            name += f" and sampling.max_tokens={sampling.max_tokens}"
        model = dataclasses.replace(config.model, context_tokens=tokens)
        yield name, dataclasses.replace(config, model=model, sampling=sampling), cluster


def lower(value: int) -> list[int]:
    """Returns a half, a quarter and an eighth of a number, rounded down, without zeros."""
    return [value >> shift for shift in (1, 2, 3) if value >> shift]
