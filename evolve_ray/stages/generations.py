"""prompts -> generations -> scores: one streaming pipeline of two stages, used by iterations, evaluations and probes."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.config import options
from evolve_ray.config.plugs import sources
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import NumericsError, UserError
from evolve_ray.generate.scorer_requests import RemoteScorer
from evolve_ray.generate.spec import GenerateSpec
from evolve_ray.generate.worker import VERSION, engine_pool
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.pools import dispatch
from evolve_ray.pools.retries import heartbeats
from evolve_ray.refine import strategies
from evolve_ray.score import worker as scoring
from evolve_ray.score.combined import local_judge
from evolve_ray.score.judge_engine import JudgeSpec
from evolve_ray.score.verifiers import verifier_key
from evolve_ray.stages import second
from evolve_ray.store import shards
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage

EVALUATION_SCOPE = "evaluation"  # not the iteration number: every model answers the same prompts with the same seeds


@dataclass(frozen=True)
class GenerationJob:
    """Which policy answers which prompts, and how. `scope` seeds the sampling; `label` is the name of the job on the terminal.

    `reward_models` give the scores that are committed. `request_models` give the scores that a strategy asks for while it
    generates; None means the same models.
    """

    iteration: int | None  # None if the job belongs to no iteration
    label: str
    policy: Policy
    prompts: Manifest
    strategy: options.Strategy
    sampling: options.Sampling
    scope: int | str
    reward_models: dict[str, Policy]
    request_models: dict[str, Policy] | None = None

    def scored_by(self, reward_models: dict[str, Policy]) -> "GenerationJob":
        """The same job with other reward models for the committed scores; the strategy still asks the present ones."""
        return dataclasses.replace(self, reward_models=reward_models, request_models=self.reward_models)


def generate_and_score(context: Context, job: GenerationJob, folder: Path) -> tuple[Manifest, Manifest]:
    """Returns the committed drafts and scores; both come from one streaming Ray Data pipeline, shard by shard."""
    drafts, scores = run_pipeline(context, job, folder, scored=True)
    assert scores is not None
    return drafts, scores


def generate(context: Context, job: GenerationJob, folder: Path) -> Manifest:
    """Returns the committed drafts, without scores."""
    return run_pipeline(context, job, folder, scored=False)[0]


def run_pipeline(context: Context, job: GenerationJob, folder: Path, *, scored: bool) -> tuple[Manifest, Manifest | None]:
    """Returns (drafts, scores); scores are None without `scored`. Computes only the stages that are not committed yet."""
    config, prompts = context.config, job.prompts
    judge = judge_of(context, job.policy)
    job = dataclasses.replace(job, reward_models=job.reward_models | judge)
    request_models = job.reward_models if job.request_models is None else job.request_models | judge
    asks_scorer, verifier = strategies.asks_scorer(job.strategy), asked_verifier(config, job)
    generation_key = {
        "version": VERSION,
        "scope": job.scope,
        "seed": config.seed,
        "model": [job.policy.hash, config.model.dtype, config.model.context_tokens],
        "template": context.template.hash,
        "options": [resolved(part, runtime=False) for part in (job.strategy, job.sampling, config.engine)],
        "judge": scores_key(config, request_models) if asks_scorer else None,
        "verifier": verifier_key(verifier),
        **sources(job.strategy.name, config.engine.name),
    }
    if strategies.asks_models(job.strategy) and config.models:
        generation_key["models"] = second.models_key(context)
    drafts_stage = context.stage(folder / "generations", "generations", generation_key, {"prompts": prompts.identity})
    # The key of the drafts, not their identity: scoring starts before all drafts are generated.
    drafts_key = {"generations": drafts_stage.key}
    scores_stage = context.stage(folder / "scores", "scores", scores_key(config, job.reward_models), drafts_key)
    drafts, scores = drafts_stage.committed(), scores_stage.committed() if scored else None
    if drafts and (scores or not scored):
        return drafts, scores
    num_prompts, size = prompts.stats["num_rows"], config.engine.shard_prompts
    num_shards = -(-num_prompts // size)
    drafts_folder = drafts.folder if drafts else drafts_stage.resume()
    score_spec = scoring.ScoreSpec(
        prompts=str(prompts.path("prompts.parquet")), drafts=str(drafts_folder), work=str(scores_stage.work),
        key=scores_stage.key, shard_prompts=size, scorer=scorer_of(config, job), verifier=config.verifier,
        reward_models=folders(models_of(job.reward_models, judge)), day=context.template.rendering.day,
        judge=judge_spec(context, judge),
    )  # fmt: skip
    with context.timed(job.label, job.iteration):
        context.start_ray()
        steps = []
        if not drafts:
            spec = generate_spec(context, job, drafts_stage)
            if asks_scorer:
                actors = tuple(context.pools.open(scoring.scorer_pool(config.scorer, config.engine)))
                request_spec = dataclasses.replace(score_spec, reward_models=folders(models_of(request_models, judge)))
                spec = dataclasses.replace(spec, remote_scorer=RemoteScorer(actors, request_spec))
            if strategies.asks_models(job.strategy):
                spec = dataclasses.replace(spec, models=second.remote_models(context, spec))
            steps.append(dispatch.Step(drafts_stage, engine_pool(config.engine), spec))
        if scored:
            scores_stage.resume()
            steps.append(dispatch.Step(scores_stage, scoring.scorer_pool(config.scorer, config.engine), score_spec))
        run_steps(context, job.label, job.iteration, steps, num_shards)
        if not drafts:
            drafts = shards.finish(drafts_stage, num_shards, num_prompts, prompts_loss(config))
        if scored:
            scores = shards.finish(scores_stage, num_shards, drafts.stats["num_answers"], scores_loss(config))
    return drafts, scores


def scores_key(config: options.Config, reward_models: dict[str, Policy]) -> dict[str, Any]:
    """The part of a stage key that decides which scores a draft gets."""
    return {
        "version": scoring.VERSION,
        "scorer": resolved(config.scorer, runtime=False),
        "reward_models": {name: model.hash for name, model in reward_models.items()},
        "verifier": verifier_key(config.verifier),
        **sources(config.scorer.name, *config.scorer.members),
    }


def judge_of(context: Context, policy: Policy) -> dict[str, Policy]:
    """`{name in the recipe: model}` of a judge with an engine of its own; {} without one. `policy` is that of the job."""
    name = local_judge(context.config.scorer)
    if not name:
        return {}
    return {name: {"policy": policy, "initial": context.initial or context.policy}.get(name) or context.judge or policy}


def models_of(models: dict[str, Policy], judge: dict[str, Policy]) -> dict[str, Policy]:
    """The reward models alone, without the judge."""
    return {name: model for name, model in models.items() if name not in judge}


def judge_spec(context: Context, judge: dict[str, Policy]) -> JudgeSpec | None:
    """The engine of a judge; the policies are rendered as the recipe says, another model by its own template."""
    config, rendering = context.config, context.template.rendering
    for name, model in judge.items():
        return JudgeSpec(
            name, str(model.folder), config.model.dtype, config.model.context_tokens, config.engine.max_num_seqs,
            config.scorer.args.get("engine") or config.engine.args,
            rendering if name in ("policy", "initial") else rendering.for_reward_model,
        )  # fmt: skip
    return None


def scorer_of(config: options.Config, job: GenerationJob) -> options.Scorer:
    """The scorer of a job: the verifier in place of `strategy`, if the job's strategy gives no scores."""
    by_strategy = config.scorer.name == "strategy" and not strategies.gives_scores(job.strategy)
    return dataclasses.replace(config.scorer, name="verifier") if by_strategy else config.scorer


def asked_verifier(config: options.Config, job: GenerationJob) -> options.Verifier | None:
    """The verifier that the strategy of a job may ask; None for a strategy that asks none."""
    return config.verifier if strategies.asks_verifier(job.strategy) else None


def prompts_loss(config: options.Config) -> shards.RejectionLimit:
    """How many prompts the generation may reject."""
    return shards.RejectionLimit(config.engine.max_rejected_fraction, "engine.max_rejected_fraction", UserError)


def scores_loss(config: options.Config) -> shards.RejectionLimit:
    """How many drafts the scoring may reject."""
    return shards.RejectionLimit(config.scorer.max_rejected_fraction, "scorer.max_rejected_fraction", NumericsError)


def folders(models: dict[str, Policy]) -> dict[str, str]:
    return {name: str(model.folder) for name, model in models.items()}


def run_steps(context: Context, label: str, iteration: int | None, steps: list[dispatch.Step], num_shards: int) -> None:
    """Runs a pipeline; writes an event and prints a line for each finished shard."""
    done = 0

    def on_shard(shard: int, result: dict) -> None:
        nonlocal done
        done += 1
        context.run.event("shard", stage=label, iteration=iteration, shard=shard, num_shards=num_shards, steps=result["steps"])
        context.say(f"    {done} of {num_shards} shards")

    advice = "the shard dispatcher hangs or found no place on a node; see the Ray dashboard, then submit the same command again"
    progress = lambda: [heartbeats(step.stage.work) for step in steps]  # noqa: E731
    with context.deadline(label, dispatch.dispatcher_stall_s(steps), progress, advice):
        dispatch.run(context.pools, steps, num_shards, on_shard)


def generate_spec(context: Context, job: GenerationJob, stage: Stage) -> GenerateSpec:
    """The spec of the engines for a job; its shards are written to the working folder of `stage`."""
    config = context.config
    return GenerateSpec(
        prompts=str(job.prompts.path("prompts.parquet")), work=str(stage.work), key=stage.key,
        shard_prompts=config.engine.shard_prompts, model=str(job.policy.folder), model_hash=job.policy.hash,
        dtype=config.model.dtype, context_tokens=config.model.context_tokens, template=context.template,
        strategy=job.strategy, sampling=job.sampling, engine=config.engine, seed=config.seed, scope=job.scope,
        verifier=asked_verifier(config, job),
    )  # fmt: skip
