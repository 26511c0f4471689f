"""generations -> labels -> reward pairs -> reward model: trains the reward model again, on the policy's own drafts."""

import dataclasses

from evolve_ray.config import options
from evolve_ray.config.resolve import resolved
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.models.same_tokens import SameTokens
from evolve_ray.pools.dispatch import Step
from evolve_ray.score import worker as scoring
from evolve_ray.score.verifiers import verifier_key
from evolve_ray.select import pairs as selections
from evolve_ray.stages.generations import run_steps, scores_loss
from evolve_ray.stages.pairs import check_not_empty, write_pairs
from evolve_ray.stages.training import train
from evolve_ray.store import shards
from evolve_ray.store.manifest import Manifest


def refresh(
    context: Context, iteration: int, reward_models: dict[str, Policy], prompts: Manifest, drafts: Manifest
) -> dict[str, Policy]:
    """Returns the recipe's one reward model after further training on pairs of drafts that the verifier ranked."""
    config = context.config
    assert config.refresh is not None
    labels = label(context, iteration, prompts, drafts)
    settings = options.Selection(max_pairs=config.refresh.max_pairs)
    key = {"refresh": config.refresh.prompts, "selection": resolved(settings)}
    inputs = {"prompts": prompts.identity, "generations": drafts.identity, "scores": labels.identity}
    stage = context.stage(context.run.iteration(iteration) / "reward_pairs", "pairs", key, inputs)
    size, limit = config.engine.shard_prompts, config.refresh.prompts
    (name,) = reward_models
    same = SameTokens(reward_models[name].folder, context.template.rendering.for_reward_model)
    pairs = stage.committed() or write_pairs(stage, selections.reward_model, settings, prompts, drafts, labels, size, same, limit)
    check_not_empty(stage, pairs)
    return {name: train(context, iteration, reward_models[name], pairs, config.refresh.training, "reward_model")}


def label(context: Context, iteration: int, prompts: Manifest, drafts: Manifest) -> Manifest:
    """Returns the committed verifier values of the drafts of the first `refresh.prompts` prompts, in whole shards."""
    config = context.config
    assert config.refresh is not None
    size = config.engine.shard_prompts
    num_shards = -(-min(config.refresh.prompts, prompts.stats["num_rows"]) // size)
    verifier = dataclasses.replace(config.scorer, name="verifier", model="")
    key = {"version": scoring.VERSION, "verifier": verifier_key(config.verifier), "num_shards": num_shards}
    stage = context.stage(context.run.iteration(iteration) / "labels", "scores", key, {"generations": drafts.identity})
    manifest = stage.committed()
    if manifest is None:
        with context.timed("labels", iteration):
            context.start_ray()
            spec = scoring.ScoreSpec(
                prompts=str(prompts.path("prompts.parquet")), drafts=str(drafts.folder), work=str(stage.resume()), key=stage.key,
                shard_prompts=size, scorer=verifier, reward_models={}, verifier=config.verifier,
            )  # fmt: skip
            run_steps(context, "labels", iteration, [Step(stage, scoring.scorer_pool(config.scorer), spec)], num_shards)
            num_answers = shards.total(drafts, num_shards, "num_answers")
            manifest = shards.finish(stage, num_shards, num_answers, scores_loss(config))
    return manifest
