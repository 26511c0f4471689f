"""The story of a run: prompts -> drafts -> scores -> pairs -> reference -> checkpoint -> evaluation, again and again.

Every arrow is one stage: committed for these inputs -> returned as it is; otherwise computed, and committed as a whole.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evolve_ray import config as options
from evolve_ray import generate, pairs, report, rows, score, shards, train
from evolve_ray.config import Config, resolved
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.evaluate import summarise
from evolve_ray.inputs import Context, Policy
from evolve_ray.refine import find_plug
from evolve_ray.store import Manifest, Stage

EVALUATION_SCOPE = "evaluation"  # in place of an iteration: every model answers the same prompts with the same seeds


def iterate(context: Context) -> dict[str, Any]:
    """Runs activation and all iterations; returns the report."""
    config, policy = context.config, context.policy
    models = [evaluate(context, 0, policy, "base", folder="base_evaluation")]
    if config.activation or config.offline:
        policy = activate(context, policy)
        models.append(evaluate(context, 0, policy, "activation"))
    context.collect_rejected(0)
    for iteration in range(1, config.iterations + 1):
        prompts = context.prompts[iteration]
        folder = context.run.iteration(iteration)
        drafts, scores = generate_and_score(
            context, iteration, "generations", policy, prompts, folder, config.strategy, config.sampling, scope=iteration
        )
        chosen = select(context, iteration, prompts, drafts, scores)
        policy = fit(context, iteration, policy, chosen, config.training, "checkpoint")
        models.append(evaluate(context, iteration, policy, f"iteration {iteration}"))
        context.collect_rejected(iteration)
        report.write(context.run, resolved(config), models)
    return report.write(context.run, resolved(config), models)


def activate(context: Context, policy: Policy) -> Policy:
    """Iteration 0: SFT on given triples, then preference training on given pairs, where the recipe has them."""
    config = context.config
    if config.activation:
        name = "activation" if config.offline else "checkpoint"
        policy = fit(context, 0, policy, context.given["activation"], config.activation.training, name)
    if config.offline:
        policy = fit(context, 0, policy, context.given["offline"], config.offline.training, "checkpoint")
    return policy


def generate_and_score(
    context: Context, iteration: int, label: str, policy: Policy, prompts: Manifest, folder: Path,
    strategy: options.Strategy, sampling: options.Sampling, scope: int | str,
) -> tuple[Manifest, Manifest]:  # fmt: skip
    """Drafts and their scores, shard by shard, in one streaming Ray Data pipeline; `scope` seeds the sampling."""
    config = context.config
    generation_key = {
        "version": generate.VERSION,
        "scope": scope,
        "seed": config.seed,
        "model": [policy.hash, config.model.dtype, config.model.context_tokens],
        "template": context.template.hash,
        "options": [resolved(part, runtime=False) for part in (strategy, sampling, config.engine)],
    }
    drafts_stage = context.stage(folder / "generations", "generations", generation_key, {"prompts": prompts.identity})
    score_key = {
        "version": score.VERSION,
        "scorer": resolved(config.scorer, runtime=False),
        "reward_model": context.reward_model_hash,
        "verifier": resolved(config.verifier),
    }
    scores_stage = context.stage(folder / "scores", "scores", score_key, {"generations": drafts_stage.key})
    drafts, scores = drafts_stage.committed(), scores_stage.committed()
    if drafts and scores:
        return drafts, scores
    num_prompts = prompts.stats["num_rows"]
    size = config.engine.shard_prompts
    num_shards = -(-num_prompts // size)
    table = str(prompts.path("prompts.parquet"))
    drafts_folder = drafts.folder if drafts else drafts_stage.resume()
    steps = []
    if not drafts:
        spec = generate.GenerateSpec(
            prompts=table, work=str(drafts_folder), key=drafts_stage.key, shard_prompts=size,
            model=str(policy.folder), model_hash=policy.hash, dtype=config.model.dtype,
            context_tokens=config.model.context_tokens, template=context.template, strategy=strategy, sampling=sampling,
            engine=config.engine, seed=config.seed, scope=scope,
        )  # fmt: skip
        steps.append(shards.Step(drafts_stage, generate.pool(config.engine), spec))
    score_spec = score.ScoreSpec(
        prompts=table, drafts=str(drafts_folder), work=str(scores_stage.resume()), key=scores_stage.key, shard_prompts=size,
        scorer=config.scorer, reward_model=str(context.reward_model or ""), verifier=config.verifier,
    )  # fmt: skip
    steps.append(shards.Step(scores_stage, score.pool(config.scorer), score_spec))
    with context.timed(label, iteration):
        done = 0

        def on_shard(shard: int, stats: dict) -> None:
            nonlocal done
            done += 1
            context.run.event("shard", stage=label, iteration=iteration, shard=shard)
            context.say(f"    {done} of {num_shards} shards")

        context.start_ray()
        shards.run(context.pools, steps, num_shards, on_shard)
        if not drafts:
            drafts = shards.finish(drafts_stage, num_shards, num_prompts)
        scores = shards.finish(scores_stage, num_shards, drafts.stats["num_rows"])
    return drafts, scores


def select(context: Context, iteration: int, prompts: Manifest, drafts: Manifest, scores: Manifest) -> Manifest:
    """Preference pairs of one iteration; one shard in memory at a time."""
    config = context.config
    key = {"selection": resolved(config.selection, runtime=False)}
    inputs_of = {"prompts": prompts.identity, "generations": drafts.identity, "scores": scores.identity}
    stage = context.stage(context.run.iteration(iteration) / "pairs", "pairs", key, inputs_of)
    manifest = stage.committed()
    if manifest is None:
        with context.timed("pairs", iteration):
            selection = find_plug(pairs.SELECTIONS, config.selection.name, "selection.name")
            manifest = write_pairs(stage, selection, config, prompts, drafts, scores)
    if not manifest.stats["num_rows"]:
        raise UserError(
            f"{stage.final}: no pairs came out of {manifest.stats['num_in']} drafts (reasons are in its rejected.jsonl), "
            "and nothing is trained on nothing; lower selection.margin, raise sampling.temperature or give other prompts"
        )
    return manifest


def write_pairs(stage: Stage, selection: Any, config: Config, prompts: Manifest, drafts: Manifest, scores: Manifest) -> Manifest:
    work = stage.start()
    size = config.engine.shard_prompts
    rejected: list[dict] = []
    counts = {"num_in": 0, "num_rows": 0, "num_used": 0}
    with pq.ParquetWriter(work / "pairs.parquet", rows.PAIR, compression="zstd") as writer:
        for shard in range(drafts.stats["num_shards"]):
            name = f"{shards.shard_name(shard)}/rows.parquet"
            score_of = {row["draft_id"]: row["score"] for row in rows.read_table(scores.path(name))}
            by_prompt: dict[str, list[dict]] = {}
            for draft in rows.read_table(drafts.path(name)):
                by_prompt.setdefault(draft["prompt_id"], []).append({**draft, "score": score_of.pop(draft["draft_id"], None)})
            if score_of:
                raise IntegrityError(
                    f"{scores.folder}: scores {len(score_of)} drafts that {drafts.folder} does not hold; delete both"
                )
            made: list[dict] = []
            for prompt in shards.read_slice(prompts.path("prompts.parquet"), shard, size):
                candidates = by_prompt.get(prompt["prompt_id"], [])
                found, unused = selection(prompt, candidates, config.selection)
                used = {pair[member] for pair in found for member in ("chosen_id", "rejected_id")}
                if len(used) + len(unused) != len(candidates):
                    raise IntegrityError(
                        f"selection {config.selection.name}: prompt {prompt['prompt_id']} has {len(candidates)} drafts, "
                        f"but {len(used)} used and {len(unused)} rejected; every draft must be accounted for"
                    )
                counts["num_in"] += len(candidates)
                counts["num_used"] += len(used)
                made += found
                rejected += unused
            counts["num_rows"] += len(made)
            writer.write_table(pa.Table.from_pylist(made, schema=rows.PAIR))
    return stage.commit(rejected, **counts)


def fit(context: Context, iteration: int, policy: Policy, given: Manifest, training: options.Training, name: str) -> Policy:
    """Reference log-probabilities and training, in one Ray Train worker group; the reference is the model it starts from."""
    config = context.config
    folder = context.run.iteration(iteration)
    shared = {
        "version": train.VERSION,
        "model": [policy.hash, config.model.dtype],
        "template": context.template.hash,
        "trainer": resolved(config.trainer, runtime=False),
        "seed": config.seed,
        "iteration": iteration,
    }
    from_pairs = {"pairs": given.identity}
    # What decides which sequences the reference holds and in which batches they are computed.
    order = {name: getattr(training, name) for name in ("batch_pairs", "micro_pairs", "objective", "alpha")}
    order["nll"] = bool(training.nll)
    reference = None
    if training.objective != "sft":
        reference = context.stage(folder / "reference", "reference", shared | {"order": order}, from_pairs)
    key = shared | {"training": resolved(training, runtime=False), "reference": reference.key if reference else None}
    stage = context.stage(folder / name, "checkpoint", key, from_pairs)
    manifest = stage.committed()
    if manifest is None:
        with context.timed(name, iteration):
            context.start_ray()
            if config.engine.release_for_training:
                context.pools.close("engines")
                context.pools.close("scorers")
            spec = train.TrainSpec(
                pairs=str(given.path("pairs.parquet")), model=str(policy.folder), dtype=config.model.dtype,
                template=context.template, training=training, trainer=config.trainer, seed=config.seed, iteration=iteration,
                run=context.run, reference=reference, checkpoint=stage,
            )  # fmt: skip
            with context.followed("training", lambda e: f"    step {e['step'] + 1} of {e['num_steps']}, loss {e['loss']:.4f}"):
                manifest = train.fit(spec, folder / f".ray-train-{name}")
    return Policy.from_manifest(manifest)


def evaluate(context: Context, iteration: int, policy: Policy, name: str, folder: str = "evaluation") -> dict[str, Any]:
    """Chains of refinement on the held-out prompts of every split, scored and summarised by round."""
    config = context.config
    model = {"name": name, "iteration": iteration, "model": policy.hash, "path": str(policy.folder), "splits": {}}
    if context.held_out is None:
        return model
    strategy = dataclasses.replace(config.strategy, name="chain", rounds=config.evaluation.rounds)
    sampling = dataclasses.replace(config.sampling, temperature=config.evaluation.temperature)
    key = {
        "version": 1,
        "seed": config.seed,
        "model": [policy.hash, config.model.dtype, config.model.context_tokens],
        "template": context.template.hash,
        "options": [resolved(part, runtime=False) for part in (strategy, sampling, config.engine, config.scorer)],
        "verifier": resolved(config.verifier),
        "reward_model": context.reward_model_hash,
    }
    stage = context.stage(context.run.iteration(iteration) / folder, "evaluation", key, {"prompts": context.held_out.identity})
    manifest = stage.committed()
    if manifest is None:
        stage.work.mkdir(parents=True, exist_ok=True)
        drafts, scores = generate_and_score(
            context, iteration, folder, policy, context.held_out, stage.work, strategy, sampling, scope=EVALUATION_SCOPE
        )
        held_out = rows.read_table(context.held_out.path("prompts.parquet"))
        summary = summarise(held_out, shards.read_rows(drafts), shards.read_rows(scores), seed=config.seed)
        rows.write_jsonl(stage.work / "summary.jsonl", [summary])
        rejected = [row for part in (drafts, scores) for row in rows.read_jsonl(part.path("rejected.jsonl"))]
        manifest = stage.commit(rejected, **{**drafts.stats, "num_in": context.held_out.stats["num_rows"]})
    return {**model, "splits": rows.read_jsonl(manifest.path("summary.jsonl"))[0]}
