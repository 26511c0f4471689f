"""The main loop of a run: prompts -> drafts -> scores -> pairs -> reference -> checkpoint -> evaluation, in every iteration.

Each arrow is a stage, with a file of its own in `stages/`. A stage that is already committed for the same inputs is returned as
it is. Otherwise it is computed, and committed as a whole.
"""

from typing import Any

from evolve_ray.inputs.context import Context, Policy
from evolve_ray.stages.drafting import draft_and_score
from evolve_ray.stages.evaluation import evaluate
from evolve_ray.stages.measures import decide, measure_drift, with_options
from evolve_ray.stages.mixed import mix
from evolve_ray.stages.pairs import select
from evolve_ray.stages.probe import probe
from evolve_ray.stages.record import Record
from evolve_ray.stages.second_training import train_models
from evolve_ray.stages.training import train


def iterate(context: Context) -> dict[str, Any]:
    """Runs the activation, then iterations until the controller stops the run or all are done; returns the report.

    A roll-back ends the run with the policy of the iteration before. The iteration that was rolled back stays on disk and in
    the report, marked `rolled_back`. Options that a decision changes hold from the next iteration on.
    """
    config, policy, record = context.config, context.policy, Record(context)
    record.add(evaluate(context, 0, policy, "base", folder="base_evaluation"))
    if config.activation or config.offline:
        policy = activate(context, policy)
        record.add(evaluate(context, 0, policy, "activation"))
    context.collect_rejected(0)
    context.initial, reward_models = policy, context.reward_models
    for iteration in range(1, config.iterations + 1):
        drafts, scores, reward_models = draft_and_score(context, iteration, policy, reward_models)
        # A further model that is the policy itself is none of the others.
        others = {model.hash for model in context.models.values()} - {policy.hash}
        pairs = select(context, iteration, drafts, scores, others)
        mixed = mix(context, iteration, pairs)
        previous, policy = policy, train(context, iteration, policy, mixed, context.config.training, "checkpoint")
        context.models = train_models(context, iteration, drafts, scores)
        # Before the evaluation: engines that hold the wrong weights must not evaluate.
        figures = probe(context, iteration, policy, previous)
        model = evaluate(context, iteration, policy, f"iteration {iteration}") | {"probe": figures}
        model["drift"] = measure_drift(context, iteration, drafts, scores, pairs, figures, record.models, others)
        model |= decide(context, iteration, [*record.models, model])
        context.collect_rejected(iteration)
        record.add(model)
        if model["decision"]["action"] != "continue":
            break
        context.config = with_options(context.config, model["decision"].get("options", {}), f"iteration {iteration}")
    return record.finish()


def activate(context: Context, policy: Policy) -> Policy:
    """Iteration 0: SFT on the recipe's triples, then preference training on its offline pairs; each only if the recipe has it."""
    config = context.config
    if config.activation:
        name = "activation" if config.offline else "checkpoint"
        policy = train(context, 0, policy, context.triples["activation"], config.activation.training, name)
    if config.offline:
        policy = train(context, 0, policy, context.triples["offline"], config.offline.training, "checkpoint")
    return policy
