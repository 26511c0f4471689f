"""From prompts to scored drafts: one streaming pipeline of two stages, which iterations, evaluations and probes share."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from evolve_ray import generate, score
from evolve_ray.config import options
from evolve_ray.config.resolve import resolved
from evolve_ray.drive import GenerateSpec, RemoteJudge
from evolve_ray.errors import NumericsError, UserError
from evolve_ray.inputs import Context, Policy
from evolve_ray.pools import dispatch
from evolve_ray.pools.retries import signs
from evolve_ray.refine import strategies
from evolve_ray.store import shards
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage

EVALUATION_SCOPE = "evaluation"  # in place of an iteration: every model answers the same prompts with the same seeds


@dataclass(frozen=True)
class Asked:
    """What is generated: which policy answers which prompts how. `scope` seeds the sampling, `label` names it to people.

    Scores are those of `reward_models`; a strategy that asks in between is answered by `judges`, the same where it is None.
    """

    iteration: int | None  # None outside of a run's iterations
    label: str
    policy: Policy
    prompts: Manifest
    strategy: options.Strategy
    sampling: options.Sampling
    scope: int | str
    reward_models: dict[str, Policy]
    judges: dict[str, Policy] | None = None


def generate_and_score(context: Context, asked: Asked, folder: Path, *, scored: bool = True) -> tuple[Manifest, Manifest | None]:
    """Drafts and their scores, shard by shard, in one streaming Ray Data pipeline; drafts alone unless `scored`."""
    config, prompts = context.config, asked.prompts
    judges = asked.reward_models if asked.judges is None else asked.judges

    def key_of(reward_models: dict[str, Policy]) -> dict:
        return {
            "version": score.VERSION,
            "scorer": resolved(config.scorer, runtime=False),
            "reward_models": {name: model.hash for name, model in reward_models.items()},
            "verifier": resolved(config.verifier),
        }

    generation_key = {
        "version": generate.VERSION,
        "scope": asked.scope,
        "seed": config.seed,
        "model": [asked.policy.hash, config.model.dtype, config.model.context_tokens],
        "template": context.template.hash,
        "options": [resolved(part, runtime=False) for part in (asked.strategy, asked.sampling, config.engine)],
        "judge": key_of(judges) if strategies.asks_scorer(asked.strategy) else None,
        "verifier": resolved(config.verifier) if asked.strategy.stop_right else None,
    }
    drafts_stage = context.stage(folder / "generations", "generations", generation_key, {"prompts": prompts.identity})
    scores_stage = context.stage(folder / "scores", "scores", key_of(asked.reward_models), {"generations": drafts_stage.key})
    drafts, scores = drafts_stage.committed(), scores_stage.committed() if scored else None
    if drafts and (scores or not scored):
        return drafts, scores
    num_prompts, size = prompts.stats["num_rows"], config.engine.shard_prompts
    num_shards = -(-num_prompts // size)
    drafts_folder = drafts.folder if drafts else drafts_stage.resume()
    score_spec = score.ScoreSpec(
        prompts=str(prompts.path("prompts.parquet")), drafts=str(drafts_folder), work=str(scores_stage.work),
        key=scores_stage.key, shard_prompts=size, scorer=config.scorer, verifier=config.verifier,
        reward_models=folders(asked.reward_models),
    )  # fmt: skip
    with context.timed(asked.label, asked.iteration):
        context.start_ray()
        steps = []
        if not drafts:
            spec = generate_spec(context, asked, drafts_stage)
            if strategies.asks_scorer(asked.strategy):
                scorers = tuple(context.pools.open(score.pool(config.scorer)))
                judge_spec = dataclasses.replace(score_spec, reward_models=folders(judges))
                spec = dataclasses.replace(spec, judge=RemoteJudge(scorers, judge_spec))
            steps.append(dispatch.Step(drafts_stage, generate.pool(config.engine), spec))
        if scored:
            scores_stage.resume()
            steps.append(dispatch.Step(scores_stage, score.pool(config.scorer), score_spec))
        run_steps(context, asked.label, asked.iteration, steps, num_shards)
        if not drafts:
            drafts = shards.finish(drafts_stage, num_shards, num_prompts, prompts_loss(config))
        if scored:
            scores = shards.finish(scores_stage, num_shards, drafts.stats["num_answers"], scores_loss(config))
    return drafts, scores


def prompts_loss(config: options.Config) -> shards.Loss:
    return shards.Loss(config.engine.max_rejected_fraction, "engine.max_rejected_fraction", UserError)


def scores_loss(config: options.Config) -> shards.Loss:
    return shards.Loss(config.scorer.max_rejected_fraction, "scorer.max_rejected_fraction", NumericsError)


def folders(reward_models: dict[str, Policy]) -> dict[str, str]:
    return {name: str(model.folder) for name, model in reward_models.items()}


def run_steps(context: Context, label: str, iteration: int | None, steps: list[dispatch.Step], num_shards: int) -> None:
    """Runs a pipeline and tells of every shard that comes out of it."""
    done = 0

    def on_shard(shard: int, begun: str, stats: dict) -> None:
        nonlocal done
        done += 1
        context.run.event("shard", stage=label, iteration=iteration, shard=shard, num_shards=num_shards, begun=begun)
        context.say(f"    {done} of {num_shards} shards")

    advice = (
        "what hands out its shards hangs or has no place on a node; see the Ray dashboard, then submit the same command again"
    )
    with context.deadline(label, dispatch.silence(steps), lambda: [signs(step.stage.work) for step in steps], advice):
        dispatch.run(context.pools, steps, num_shards, on_shard)


def generate_spec(context: Context, asked: Asked, stage: Stage) -> GenerateSpec:
    """What the engines need to answer `asked` into the working folder of `stage`."""
    config = context.config
    return GenerateSpec(
        prompts=str(asked.prompts.path("prompts.parquet")), work=str(stage.work), key=stage.key,
        shard_prompts=config.engine.shard_prompts, model=str(asked.policy.folder), model_hash=asked.policy.hash,
        dtype=config.model.dtype, context_tokens=config.model.context_tokens, template=context.template,
        strategy=asked.strategy, sampling=asked.sampling, engine=config.engine, seed=config.seed, scope=asked.scope,
        verifier=config.verifier if asked.strategy.stop_right else None,
    )  # fmt: skip
