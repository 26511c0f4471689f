"""Log-probabilities token by token, for an objective that asks for them (`Objective(tokens=True)`)."""

from dataclasses import dataclass, field

import torch

from evolve_ray.errors import IntegrityError

Logps = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tokens:
    """What the loss of such an objective gets as `tokens`, for B pairs: `{sequence: B x T}`, T its longest response among them.

    `policy`, `reference` and `engine` are log-probabilities of the response tokens, in nats, float32, and 0 after the last one;
    `mask` is true where a token is. `engine` is what the engine computed when it sampled `chosen`, {} unless every pair says
    it; `initial` is the initial policy's, {} unless the objective asks for it. `mean_lengths` are the tokens of `chosen` and
    `rejected`, on average over the whole batch of the update: the sum over a row's tokens, divided by it, becomes the mean over
    all tokens of the batch.
    """

    policy: Logps
    reference: Logps
    mask: Logps
    mean_lengths: dict[str, float]
    engine: Logps = field(default_factory=dict)
    initial: Logps = field(default_factory=dict)


def response_of(name: str) -> str:
    """`chosen` or `rejected`: the response of the sequence `name`."""
    return name.partition("_after_")[0]


def padded(parts: list[torch.Tensor]) -> torch.Tensor:
    """B x T of B lists of numbers, with 0 after the last one of each."""
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) if parts else torch.zeros(0, 0)


def mask_of(lengths: list[int], device: torch.device) -> torch.Tensor:
    """B x T, true for the first `lengths[b]` places of row b; T is the largest length."""
    return torch.arange(max(lengths, default=0), device=device) < torch.tensor(lengths, device=device)[:, None]


def engine_logps(pairs: list[dict], lengths: list[int]) -> torch.Tensor:
    """B x T of the engine's log-probabilities of `chosen`, of its last `lengths[b]` tokens: those that are trained.

    Raises IntegrityError if they are fewer than its tokens.
    """
    parts = []
    for pair, length in zip(pairs, lengths, strict=True):
        if len(pair["chosen_logps"]) < length:
            raise IntegrityError(
                f"pair {pair['pair_id']}: the engine gave {len(pair['chosen_logps'])} log-probabilities for {length} tokens; the "
                "template or the tokenizer has changed since; generate the drafts again"
            )
        parts.append(torch.tensor(pair["chosen_logps"][len(pair["chosen_logps"]) - length :], dtype=torch.float32))
    return padded(parts)
