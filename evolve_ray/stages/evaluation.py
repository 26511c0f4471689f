"""checkpoint -> evaluation: chains of refinement on the held-out prompts, scored, with figures for each round."""

import dataclasses
from typing import Any

from evolve_ray.config import options
from evolve_ray.config.plugs import sources
from evolve_ray.config.resolve import resolved
from evolve_ray.evaluate.figures import add_best_of, summarise
from evolve_ray.evaluate.final_answers import add_final_answers
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.refine.strategies import asks_models
from evolve_ray.score.verifiers import same_answer, verifier_key
from evolve_ray.stages.generations import EVALUATION_SCOPE, GenerationJob, generate_and_score, judge_of
from evolve_ray.stages.second import models_key
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage

VERSION = 4
TOTALS = ("num_rows", "num_tokens", "num_prompt_tokens", "num_cached_tokens", "num_cut")


def evaluate(context: Context, iteration: int, policy: Policy, name: str, folder: str = "evaluation") -> dict[str, Any]:
    """The entry of the policy in report.json: its name, its folder, and its figures by evaluation split and round."""
    config = context.config
    model = {"name": name, "iteration": iteration, "model": policy.hash, "path": str(policy.folder), "evaluation": None}
    if context.held_out is None:
        return {**model, "splits": {}}
    chain = options.Strategy(name="chain", rounds=config.evaluation.rounds)
    sampling = dataclasses.replace(config.sampling, temperature=config.evaluation.temperature, logps=False)
    key = {
        "version": VERSION,
        "seed": config.seed,
        "model": [policy.hash, config.model.dtype, config.model.context_tokens],
        "template": context.template.hash,
        "options": [resolved(part, runtime=False) for part in (chain, sampling, config.engine, config.scorer)],
        "parallel": config.evaluation.parallel,
        "verifier": verifier_key(config.verifier),
        "reward_models": {name: model.hash for name, model in (context.reward_models | judge_of(context, policy)).items()},
        **sources(config.engine.name, config.scorer.name, *config.scorer.members),
    }
    if config.evaluation.pick:
        measured = {"pick": config.evaluation.pick, "strategy": resolved(config.strategy, runtime=False)}
        key["measured"] = measured | sources(config.strategy.name)
        if asks_models(config.strategy) and config.models:
            key["models"] = models_key(context)
    stage = context.stage(context.run.iteration(iteration) / folder, "evaluation", key, {"prompts": context.held_out.identity})
    manifest = stage.committed()
    if manifest is None:
        reward_models = context.reward_models
        job = GenerationJob(iteration, folder, policy, context.held_out, chain, sampling, EVALUATION_SCOPE, reward_models)
        manifest = run_evaluation(context, stage, job)
    model["evaluation"] = str(manifest.folder.relative_to(context.run.root))
    return {**model, "splits": rows.read_jsonl(manifest.path("summary.jsonl"))[0]}


def run_evaluation(context: Context, stage: Stage, job: GenerationJob) -> Manifest:
    """Generates and scores chains, and what else the recipe asks for: parallel samples, its own strategy; commits all of it."""
    config = context.config
    stage.work.mkdir(parents=True, exist_ok=True)
    parts = [generate_and_score(context, job, stage.work)]
    if config.evaluation.parallel:
        parallel = options.Strategy(name="parallel", samples=config.evaluation.parallel)
        parts.append(generate_and_score(context, dataclasses.replace(job, strategy=parallel), stage.work / "parallel"))
    if config.evaluation.pick:
        own = dataclasses.replace(job, strategy=config.strategy)
        parts.append(generate_and_score(context, own, stage.work / "strategy"))
    prompts = rows.read_table(job.prompts.path("prompts.parquet"))
    tables = [[list(shards.read_rows(table)) for table in part] for part in parts]
    summary = summarise(prompts, *tables[0])
    if config.evaluation.parallel:
        add_best_of(summary, tables[0], tables[1])
    if config.evaluation.pick:
        names = {"name": config.strategy.name, "pick": config.evaluation.pick}
        add_final_answers(summary, prompts, tables[0], tables[-1], **names, same=same_answer(config.verifier))
    rows.write_jsonl(stage.work / "summary.jsonl", [summary])
    rejected = [row for part in parts for table in part for row in rows.read_jsonl(table.path("rejected.jsonl"))]
    totals = {name: sum(drafts.stats[name] for drafts, _ in parts) for name in TOTALS}
    return stage.commit(rejected, num_in=job.prompts.stats["num_rows"], **totals)
