"""What a run did, in plain words, from its resolved configuration."""

import re
from typing import Any

from evolve_ray.config.resolve import flatten
from evolve_ray.report.markup import details, escape, table

# A line is left out if the configuration lacks an option that it names.
SENTENCES = {
    "model": "{model.path} ({model.dtype}, contexts of at most {model.context_tokens} tokens)",
    "activation": "learns to refine from the preference triples of {activation.path}, before the first iteration",
    "offline": "trains on the preference triples of {offline.path}, objective {offline.training.objective}, before the first "
    "iteration",
    "prompts": "{iterations} iterations with {prompts.per_iteration} fresh prompts each, from {prompts.path}",
    "drafts": "{strategy.name}; temperature {sampling.temperature}, top-p {sampling.top_p}, at most {sampling.max_tokens} tokens "
    "per response",
    "instruction": "template {template.name}, layout {template.layout}",
    "scorer": "{scorer.name} {scorer.model}",
    "verifier": "{verifier.name}",
    "reward model": "trained again in each iteration, on drafts for {refresh.prompts} of its prompts in the verifier's order",
    "pairs": "{selection.name} ({selection.pairing}, scores more than {selection.margin} apart)",
    "training": "objective {training.objective}, alpha {training.alpha}, beta {training.beta}, epochs {training.epochs}, "
    "learning rate {training.learning_rate}, {training.batch_pairs} pairs per update",
    "evaluation": "{evaluation.rounds} rounds at temperature {evaluation.temperature}, always with the same prompts and seeds",
    "end": "{controller.name}",
    "seed": "{seed}",
}

# What the plugs of this package do; any other plug is shown by its name.
WORDS = {
    "strategy.name": {
        "chain": "chains of {strategy.rounds} drafts, each draft refines the one before",
        "parallel": "{strategy.samples} independent samples",
        "chains": "{strategy.samples} independent chains of {strategy.rounds} drafts",
        "few_shot": "chains of {strategy.rounds} drafts, each draft is written with several earlier ones in view",
        "critique": "chains of {strategy.rounds} drafts, each draft follows a critique of the one before",
        "feedback": "chains of {strategy.rounds} drafts, each draft follows what the verifier says of the one before",
        "best_of": "chains of {strategy.rounds} rounds, each round refines the best of {strategy.samples} samples",
        "self_judge": "{strategy.samples} independent samples, each rated by the model itself",
    },
    "scorer.name": {
        "reward_model": "reward model",
        "verifier": "the verifier",
        "judge": "a language model as judge",
        "vote": "the votes of a prompt's drafts",
        "strategy": "the scores that the strategy gives",
    },
    "selection.name": {
        "reward_model": "by score: the better draft is chosen, the worse one is rejected",
        "rule": "by rule: the last draft is chosen, the first one is rejected",
        "random": "two random drafts of a prompt",
        "advantages": "every answer alone, with its advantage over the other answers of its round",
        "turn_advantages": "every response alone, after its ask, with its advantage over the others of its round and kind",
        "reflections": "critiques of wrong drafts: those whose revision is right are chosen over those whose revision is wrong",
        "trajectories": "whole lines of turns: the one whose last answer scores better is chosen",
        "accepted": "every draft that is good enough, alone",
        "tiers": "the shortest of the best drafts is chosen, the longest of the worst is rejected",
    },
    "controller.name": {
        "fixed": "after all iterations of the recipe",
        "plateau": "after all iterations of the recipe, or earlier if there is no significant improvement on held-out prompts",
        "guard": "after all iterations of the recipe, or earlier if the policy gets worse or exploits the scorer",
    },
    "selection.pairing": {"extremes": "best and worst draft", "neighbours": "neighbouring rounds"},
}


def sentences(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(term, sentence) for each part of the run that the configuration describes."""
    values = {name: value for name, value in flatten(config).items() if value is not None}

    def fill(template: str) -> str:
        def value_of(match: re.Match) -> str:
            words = WORDS.get(match[1], {}).get(values[match[1]])
            return fill(words) if words else str(values[match[1]])

        return re.sub(r"\{([\w.]+)\}", value_of, template).strip(" ,")

    filled = []
    for term, template in SENTENCES.items():
        try:
            filled.append((term, fill(template)))
        except KeyError:
            continue  # the run has no such part
    return [*filled, *lineage(values)]


def lineage(values: dict[str, Any]) -> list[tuple[str, str]]:
    """What trainings start from, which rows are mixed in, whether prompts come again, and other models, where there are any."""
    found = []
    if values.get("prompts.again") == "when_used_up":
        found.append(("prompts again", "in a new order when all are used up"))
    if values.get("training.start") == "initial":
        found.append(("start", "every training starts from the policy that iteration 1 started from"))
    shares = (("replay", "the pairs of earlier iterations"), ("given", "the triples of [activation]"))
    others = {name.split(".")[1]: path for name, path in values.items() if re.fullmatch(r"models\.\w+\.path", name)}
    for name, path in others.items():
        objective = values.get(f"models.{name}.training.objective")
        trained = f"trained with {objective}" if objective else "not trained"
        found.append((f"model {name}", f"{path}, asked by the strategy, {trained}"))
    return found + [
        (name, f"{values[f'training.{name}']:.0%} of a training's rows come from {source}")
        for name, source in shares
        if values.get(f"training.{name}")
    ]


def render(config: dict[str, Any]) -> str:
    """A definition list, and below it the whole configuration, folded."""
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in sentences(config))
    options = [[name, value] for name, value in flatten(config).items()]
    every_option = details("All options", table(["option", "value"], options)) if options else ""
    return (f"<dl>{items}</dl>" if items else "") + every_option
