"""Log-probabilities of responses: the one function behind reference, policy and probes."""

from dataclasses import dataclass
from typing import Any

import torch

from evolve_ray.chat import Chat
from evolve_ray.refine import Template


@dataclass(frozen=True)
class Sequence:
    """Token ids of a context and of the response that follows it."""

    context: tuple[int, ...]
    response: tuple[int, ...]


def pair_sequences(chat: Chat, template: Template, pair: dict, needs: tuple[str, ...]) -> dict[str, Sequence]:
    """The sequences of one pair by name: `chosen` after x, `chosen_after_rejected` after (x, y_l, z), and so on."""
    responses = {name: tuple(chat.response_ids(pair[name], finished=pair[f"{name}_finished"])) for name in ("chosen", "rejected")}
    contexts: dict[str, tuple[int, ...]] = {}
    sequences = {}
    for name in needs:
        response, _, draft = name.partition("_after_")
        if draft not in contexts:
            messages = template.refinement(pair["prompt"], pair[draft]) if draft else template.direct(pair["prompt"])
            contexts[draft] = tuple(chat.context_ids(messages))
        sequences[name] = Sequence(contexts[draft], responses[response])
    return sequences


def sequence_logps(model: Any, sequences: list[Sequence], pad_id: int, device: torch.device) -> torch.Tensor:
    """`logps_S`: for each sequence the sum of log p(token | all before it) over its response tokens, in nats, float32.

    One forward over right-padded `ids_ST`; context and padding carry no weight. An empty response sums to 0.
    """
    width = max(len(s.context) + len(s.response) for s in sequences)
    ids_ST = torch.full((len(sequences), width), pad_id)
    mask_ST = torch.zeros((len(sequences), width), dtype=torch.long)
    response_ST = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        end = len(sequence.context) + len(sequence.response)
        ids_ST[row, :end] = torch.tensor(sequence.context + sequence.response)
        mask_ST[row, :end] = 1
        response_ST[row, len(sequence.context) : end] = True
    ids_ST, mask_ST, response_ST = ids_ST.to(device), mask_ST.to(device), response_ST.to(device)
    logits_STV = model(input_ids=ids_ST, attention_mask=mask_ST, use_cache=False).logits[:, :-1]
    # Only where a response token is predicted: context and padding need no softmax over the vocabulary.
    where_ST = response_ST[:, 1:]
    chosen_N = ids_ST[:, 1:][where_ST]
    logits_NV = logits_STV[where_ST].float()
    logps_N = logits_NV.gather(1, chosen_N[:, None])[:, 0] - logits_NV.logsumexp(dim=1)
    rows_N = where_ST.nonzero()[:, 0]
    return torch.zeros(len(sequences), device=device).index_add(0, rows_N, logps_N)
