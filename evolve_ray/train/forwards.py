"""Readers: they split a rank's share of a batch into forwards, and compute the values of the pairs in each forward.

All three readers have the same two methods. `parts` splits the share into forwards; every rank gets the same number of them, as
ZeRO-3 requires. `values` returns `{name: B}` for the pairs of a part, and the number of response tokens (at least 1) of each
answer; `token_values` of the two that read log-probabilities returns them token by token. DeepSpeed averages over ranks and
micro-batches; the weights of the pairs are such that the gradient is then the mean over the global batch, however the parts are
cut.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from evolve_ray.models.chat import Chat
from evolve_ray.store.turns import assistant, turns
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.logprobs import (
    num_chunks,
    pair_sequences,
    sequence_logps,
    sequence_token_logps,
    tree_logps,
    tree_token_logps,
)
from evolve_ray.train.schedule import micro_batches, micro_steps
from evolve_ray.train.spec import TrainSpec
from evolve_ray.train.tokens import padded, response_of
from evolve_ray.train.tree import Forward, Sequence, lay_out, pack
from evolve_ray.train.tree_check import check_length

Values = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
TokenValues = tuple[dict[str, torch.Tensor], dict[str, list[int]]]


@dataclass(frozen=True)
class Part:
    """One forward. `pairs` are (row number, weight); a row of weight 0 is only padding. The other fields are for trees."""

    pairs: list[tuple[int, float]]
    forward: Forward | None = None
    chunks: int = 0


@dataclass
class Separate:
    """Reads each sequence as one row of a forward, with `micro_pairs` pairs in each forward."""

    spec: TrainSpec
    chat: Chat
    pairs: list[dict]
    needs: tuple[str, ...]
    collectives: Collectives

    def parts(self, batch: list[int]) -> list[Part]:
        return [Part(micro) for micro in micro_batches(batch, self.collectives.rank, self.spec.training, self.collectives.world)]

    def values(self, model: Any, part: Part) -> Values:
        by_pair = [self.sequences(row) for row, _ in part.pairs]
        flat = sequence_logps(
            model, [sequence for sequences in by_pair for sequence in sequences], self.chat.pad_id, self.collectives.device
        )
        return self.by_name(flat, [[len(sequence.response) for sequence in sequences] for sequences in by_pair])

    def token_values(self, model: Any, part: Part) -> TokenValues:
        """`{name: B x T}`, the log-probabilities of the response tokens, padded with 0; and the tokens of each, `{name: [B]}`."""
        sequences = [sequence for row, _ in part.pairs for sequence in self.sequences(row)]
        logps_N, _ = sequence_token_logps(model, sequences, self.chat.pad_id, self.collectives.device)
        return self.by_token(logps_N, [len(sequence.response) for sequence in sequences])

    def by_token(self, logps_N: torch.Tensor, lengths: list[int]) -> TokenValues:
        """Token values by name; `logps_N` holds the tokens of each sequence, pair by pair, and `lengths` how many they are."""
        if not lengths:  # padding alone, but the backward pass needs its graph
            return {name: logps_N[:0].view(0, 0) for name in self.needs}, {name: [] for name in self.needs}
        parts, size = logps_N[: sum(lengths)].split(lengths), len(self.needs)
        by_name = {name: list(parts[position::size]) for position, name in enumerate(self.needs)}
        return {name: padded(own) for name, own in by_name.items()}, {name: list(map(len, own)) for name, own in by_name.items()}

    def num_tokens(self, row: int) -> dict[str, int]:
        """The response tokens of `chosen` and `rejected` of a pair, as far as the objective reads them."""
        lengths = zip(self.needs, self.sequences(row), strict=True)
        return {response_of(name): len(sequence.response) for name, sequence in lengths}

    def sequences(self, row: int) -> list[Sequence]:
        return list(pair_sequences(self.chat, self.spec.template, self.pairs[row], self.needs).values())

    def by_name(self, flat: torch.Tensor, lengths: list[Any]) -> Values:
        """Values and lengths by name. `flat` holds one value for each sequence, pair by pair; `lengths` has the same order."""
        values_BN = flat.view(-1, len(self.needs))
        lengths_BN = torch.tensor(lengths, device=self.collectives.device).view(-1, len(self.needs)).clamp(min=1)
        counts = {response_of(name): lengths_BN[:, position] for position, name in enumerate(self.needs)}
        return {name: values_BN[:, position] for position, name in enumerate(self.needs)}, counts


class Scores(Separate):
    """Reads the reward model's scores of the answers instead of log-probabilities."""

    def values(self, model: Any, part: Part) -> Values:
        from evolve_ray.score.reward_model import classify

        scored = [(self.pairs[row]["prompt"], self.pairs[row][name]) for row, _ in part.pairs for name in self.needs]
        conversations = [(*turns(prompt), assistant(response)) for prompt, response in scored]
        ids = [self.chat.context_ids(messages, generate=False) for messages in conversations]
        flat = classify(model, ids, self.collectives.device, self.spec.output)
        return self.by_name(flat, [[1] * len(self.needs)] * len(part.pairs))[0], {}


@dataclass
class Trees(Separate):
    """Reads trees of the pairs' sequences, with up to `trainer.max_tokens` tokens and `micro_pairs` pairs in each forward.

    A rank with fewer forwards than another, or fewer chunks in a forward, adds padding, which does not count. `config` is the
    configuration of the model. `chunked` is False for a model whose logits must come from its own forward.
    """

    config: Any = None
    chunked: bool = True

    def parts(self, batch: list[int]) -> list[Part]:
        rank, world = self.collectives.rank, self.collectives.world
        share = batch[rank::world]
        forwards = pack(
            [self.sequences(row) for row in share],
            keys=[self.pairs[row]["prompt_id"] for row in share],
            max_tokens=self.spec.trainer.max_tokens,
            max_groups=self.spec.training.micro_pairs,
            one_row=self.collectives.device.type == "cuda",
        )
        for forward in forwards:
            check_length(self.config, forward)
        rank_chunks = [num_chunks(forward) for forward in forwards]
        rank_chunks += [0] * (math.ceil(len(batch) / world) - len(rank_chunks))
        chunk_counts = [count for count in self.collectives.all_max(rank_chunks) if count]
        forwards += [lay_out([], [])] * (len(chunk_counts) - len(forwards))
        weight = world * micro_steps(self.spec.training, world) / len(batch)
        return [
            Part([(share[group], weight) for group in forward.groups], forward, count if self.chunked else 0)
            for forward, count in zip(forwards, chunk_counts, strict=True)
        ]

    def values(self, model: Any, part: Part) -> Values:
        assert part.forward is not None
        flat = tree_logps(model, part.forward, self.collectives.device, part.chunks)
        return self.by_name(flat, lengths_of(part.forward))

    def token_values(self, model: Any, part: Part) -> TokenValues:
        assert part.forward is not None
        logps_N, _ = tree_token_logps(model, part.forward, self.collectives.device, part.chunks)
        return self.by_token(logps_N, lengths_of(part.forward))


def lengths_of(forward: Forward) -> list[int]:
    """The response tokens of each sequence of a forward."""
    return torch.from_numpy(forward.owners_N).bincount(minlength=forward.num_sequences).tolist()
