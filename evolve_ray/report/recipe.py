"""What a run did, in plain words, from its resolved configuration."""

import re
from typing import Any

from evolve_ray.config.resolve import flatten
from evolve_ray.report.markup import details, escape, table

# A line is left out where the run has none of what it speaks of.
SENTENCES = {
    "model": "starts from {model.path} ({model.dtype}, contexts of {model.context_tokens} tokens)",
    "activation": "first learns to refine on the triples of {activation.path}",
    "offline": "then learns from given pairs: objective {offline.training.objective}, on {offline.path}",
    "prompts": "{prompts.per_iteration} fresh prompts of {prompts.path} in each of {iterations} iterations",
    "drafts": "{strategy.name}; temperature {sampling.temperature}, top-p {sampling.top_p}, at most {sampling.max_tokens} tokens",
    "instruction": "template {template.name}, layout {template.layout}",
    "scorer": "{scorer.name} {scorer.model}",
    "verifier": "{verifier.name}",
    "refreshed": "the reward model learns from the verifier's order on {refresh.prompts} prompts of each iteration",
    "pairs": "{selection.name} ({selection.pairing}, scores more than {selection.margin} apart)",
    "training": "objective {training.objective}, alpha {training.alpha}, beta {training.beta}, {training.epochs} times over "
    "the pairs, learning rate {training.learning_rate}, {training.batch_pairs} pairs a step",
    "evaluation": "{evaluation.rounds} rounds at temperature {evaluation.temperature}, with the same prompts and seeds each time",
    "end": "{controller.name}",
    "seed": "{seed}",
}

# Plug names in words; a plug from elsewhere keeps its own name.
WORDS = {
    "strategy.name": {
        "chain": "chains of {strategy.rounds} drafts, each refining the one before",
        "parallel": "{strategy.samples} independent samples",
        "few_shot": "chains of {strategy.rounds} drafts, each with several earlier ones in view",
        "critique": "chains of {strategy.rounds} drafts, each after a critique of the one before",
        "best_of": "chains of {strategy.rounds} rounds, each going on from the best of {strategy.samples} samples",
    },
    "scorer.name": {"reward_model": "a reward model,", "verifier": "the verifier itself"},
    "selection.name": {
        "reward_model": "better against worse by score",
        "rule": "last draft against first, by rule",
        "random": "two drafts at random",
    },
    "controller.name": {
        "fixed": "after all iterations of the recipe",
        "plateau": "when an iteration brings no significant improvement on held-out prompts",
        "guard": "when the reward is being gamed or the policy falls apart",
    },
    "selection.pairing": {"extremes": "best with worst", "neighbours": "neighbouring rounds"},
}


def sentences(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(term, sentence) of all that the configuration tells."""
    values = {name: value for name, value in flatten(config).items() if value is not None}

    def fill(template: str) -> str:
        def value_of(match: re.Match) -> str:
            word = WORDS.get(match[1], {}).get(values[match[1]])
            return fill(word) if word else str(values[match[1]])

        return re.sub(r"\{([\w.]+)\}", value_of, template).strip(" ,")

    found = []
    for term, template in SENTENCES.items():
        try:
            found.append((term, fill(template)))
        except KeyError:
            continue  # the run has no such part
    return found


def render(config: dict[str, Any]) -> str:
    """A definition list, and the whole configuration folded below it."""
    told = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in sentences(config))
    every = [[name, value] for name, value in flatten(config).items()]
    return (f"<dl>{told}</dl>" if told else "") + (details("Every option", table(["option", "value"], every)) if every else "")
