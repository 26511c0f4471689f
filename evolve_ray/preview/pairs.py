"""Which tokens of a pair are context, which are trained, and where the end token stands."""

import statistics
from typing import Any

from evolve_ray.config.options import Config, trainings
from evolve_ray.preview.tokens import decode, shown
from evolve_ray.refine.template import Template

MEASURED = 2000  # triples whose lengths are measured
PLACEHOLDERS = {"chosen": "[the better response]", "rejected": "[the worse response]"}


def show_pairs(
    config: Config, template: Template, chat: Any, triples: dict[str, list[dict]], prompt: dict | None
) -> list[dict[str, Any]]:
    """One pair for each training of the recipe with the sequences that its objective reads.

    The pair is the first triple of the training's own table, else of any table, else `prompt` with placeholders as answers.
    """
    from evolve_ray.train import objectives
    from evolve_ray.train.logprobs import pair_sequences

    shown_pairs = []
    any_triple = next((pairs[0] for pairs in triples.values() if pairs), None)
    for name, training in trainings(config):
        table = name.partition(".")[0]
        own = triples.get(table) or []
        pair = own[0] if own else any_triple or (placeholder_pair(prompt) if prompt else None)
        objective = objectives.find(training, name)
        if pair is None or objective.scores:
            continue
        sequences = pair_sequences(chat, template, pair, objective.needs)  # a triple has no further turns
        shown_pairs.append(
            {
                "training": name,
                "objective": training.objective,
                "from": table if own else "a triple" if any_triple else "placeholders",
                "sequences": [show_sequence(chat, name, sequence) for name, sequence in sequences.items()],
            }
        )
    return shown_pairs


def placeholder_pair(prompt: dict) -> dict:
    return {"prompt": prompt["prompt"], **PLACEHOLDERS, "chosen_finished": True, "rejected_finished": True}


def show_sequence(chat: Any, name: str, sequence: Any) -> dict[str, Any]:
    """A context and the response that is trained after it."""
    response = list(sequence.response)
    ends = bool(response) and response[-1] in chat.stop_ids
    return {
        "name": name,
        "context": shown(chat, list(sequence.context)),
        "trained": shown(chat, response),
        "end_token": decode(chat, response[-1:]) if ends else None,
    }


def triple_lengths(config: Config, template: Template, chat: Any, triples: list[dict]) -> dict[str, Any]:
    """Tokens of the answers and of the longest sequence of each of the first triples, against the context."""
    measured = triples[:MEASURED]
    answers, longest = [], []
    for pair in measured:
        chosen, rejected = (chat.response_ids(pair[name], finished=True) for name in ("chosen", "rejected"))
        context = len(chat.context_ids(template.refinement(pair["prompt"], "")))
        answers += [len(chosen), len(rejected)]
        longest.append(context + max(len(chosen), len(rejected)) + len(rejected))
    return {
        "num_triples": len(triples),
        "num_measured": len(measured),
        "answer_median": int(statistics.median(answers)),
        "answer_max": max(answers),
        "sequence_median": int(statistics.median(longest)),
        "sequence_max": max(longest),
        "num_beyond_context": sum(length > config.model.context_tokens for length in longest),
    }
