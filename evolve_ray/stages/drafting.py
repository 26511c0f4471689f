"""prompts -> generations -> scores; if the recipe has a [refresh] table, the reward model is trained again in between."""

from evolve_ray.inputs.context import Context, Policy
from evolve_ray.stages.generations import GenerationJob, generate, generate_and_score
from evolve_ray.stages.refresh import refresh
from evolve_ray.store.manifest import Manifest


def draft_and_score(
    context: Context, iteration: int, policy: Policy, reward_models: dict[str, Policy]
) -> tuple[Manifest, Manifest, dict[str, Policy]]:
    """Returns (drafts, scores, the reward models that gave these scores) for the prompts of an iteration."""
    config, prompts = context.config, context.prompts[iteration]
    folder = context.run.iteration(iteration)
    job = GenerationJob(iteration, "generations", policy, prompts, config.strategy, config.sampling, iteration, reward_models)
    if not config.refresh:
        return *generate_and_score(context, job, folder), reward_models
    drafts = generate(context, job, folder)  # a strategy that asks for scores gets them from the reward models so far
    trained = refresh(context, iteration, reward_models, prompts, drafts)
    drafts, scores = generate_and_score(context, job.scored_by(trained), folder)
    return drafts, scores, trained
