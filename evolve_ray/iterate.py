"""The story of a run: prompts -> drafts -> scores -> pairs -> reference -> checkpoint -> evaluation, again and again.

Every arrow is one stage: committed for these inputs -> returned as it is; otherwise computed, and committed as a whole. Each
is a file in `stages/`.
"""

from typing import Any

from evolve_ray.inputs.context import Context, Policy
from evolve_ray.stages.drafting import draft_and_score
from evolve_ray.stages.evaluation import evaluate
from evolve_ray.stages.measures import decide, measure_drift
from evolve_ray.stages.pairs import select
from evolve_ray.stages.probe import probe
from evolve_ray.stages.record import Record
from evolve_ray.stages.training import train


def iterate(context: Context) -> dict[str, Any]:
    """Runs activation, then iterations until the controller or their number ends the run; returns the report.

    A roll-back ends the run with the policy before: its iteration stays on disk and in the report, marked `rolled_back`.
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
        pairs = select(context, iteration, drafts, scores)
        before, policy = policy, train(context, iteration, policy, pairs, config.training, "checkpoint")
        probed = probe(context, iteration, policy, before)  # first: an engine that is not the policy evaluates nothing
        model = evaluate(context, iteration, policy, f"iteration {iteration}") | {"probe": probed}
        model["drift"] = measure_drift(context, iteration, drafts, scores, pairs, probed, record.models)
        model |= decide(context, iteration, [*record.models, model])
        context.collect_rejected(iteration)
        record.add(model)
        if model["decision"]["action"] != "continue":
            break
    return record.finish()


def activate(context: Context, policy: Policy) -> Policy:
    """Iteration 0: SFT on given triples, then preference training on given pairs, where the recipe has them."""
    config = context.config
    if config.activation:
        name = "activation" if config.offline else "checkpoint"
        policy = train(context, 0, policy, context.triples["activation"], config.activation.training, name)
    if config.offline:
        policy = train(context, 0, policy, context.triples["offline"], config.offline.training, "checkpoint")
    return policy
