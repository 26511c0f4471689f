"""How a rank reads its share of a batch: what goes into one forward, and the values that come out of it.

Three readers with the same two verbs. `parts` cuts the share into forwards, as many on every rank, which ZeRO-3 needs;
`values` gives `{name: B}` of a part's pairs and the response tokens (at least 1) of their answers. The weights make the
gradient the mean over the global batch after DeepSpeed's own averaging over ranks and micro-batches, whatever the parts are.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from evolve_ray.models.chat import Chat
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.logprobs import num_chunks, pair_sequences, sequence_logps, tree_logps
from evolve_ray.train.schedule import micro_batches, micro_steps
from evolve_ray.train.spec import TrainSpec
from evolve_ray.train.tree import Forward, Sequence, lay_out, pack
from evolve_ray.train.tree_check import check_length

Values = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Part:
    """One forward: its pairs as (row, weight), where rows of weight 0 only fill up, and how a tree reader packed them."""

    pairs: list[tuple[int, float]]
    forward: Forward | None = None
    chunks: int = 0


@dataclass
class Separate:
    """One row of a forward for each sequence, `micro_pairs` pairs a forward."""

    spec: TrainSpec
    chat: Chat
    pairs: list[dict]
    needs: tuple[str, ...]
    collectives: Collectives

    def parts(self, batch: list[int]) -> list[Part]:
        return [Part(micro) for micro in micro_batches(batch, self.collectives.rank, self.spec.training, self.collectives.world)]

    def values(self, model: Any, part: Part) -> Values:
        built = [self.sequences(row) for row, _ in part.pairs]
        flat = sequence_logps(
            model, [sequence for group in built for sequence in group], self.chat.pad_id, self.collectives.device
        )
        return self.named(flat, [[len(sequence.response) for sequence in group] for group in built])

    def sequences(self, row: int) -> list[Sequence]:
        return list(pair_sequences(self.chat, self.spec.template, self.pairs[row], self.needs).values())

    def named(self, flat: torch.Tensor, lengths: list[list[int]]) -> Values:
        """`flat` holds one value for each sequence, pair by pair, as `lengths` does."""
        values_BN = flat.view(-1, len(self.needs))
        lengths_BN = torch.tensor(lengths, device=self.collectives.device).view(-1, len(self.needs)).clamp(min=1)
        counts = {name.partition("_after_")[0]: lengths_BN[:, position] for position, name in enumerate(self.needs)}
        return {name: values_BN[:, position] for position, name in enumerate(self.needs)}, counts


class Scores(Separate):
    """The reward model's scores of the answers, in place of log-probabilities."""

    def values(self, model: Any, part: Part) -> Values:
        from evolve_ray.score.reward_model import classify

        turns = [
            ({"role": "user", "content": self.pairs[row]["prompt"]}, {"role": "assistant", "content": self.pairs[row][name]})
            for row, _ in part.pairs
            for name in self.needs
        ]
        flat = classify(model, [self.chat.context_ids(messages, generate=False) for messages in turns], self.collectives.device)
        return self.named(flat, [[1] * len(self.needs)] * len(part.pairs))[0], {}


@dataclass
class Trees(Separate):
    """Trees of the pairs' sequences, packed up to `trainer.max_tokens` tokens and `micro_pairs` pairs a forward.

    A rank with fewer forwards than another, or fewer chunks in one, fills up with what counts nowhere. `config` is the
    model's; `chunked` is unset for a model whose logits need its own forward.
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
        own = [num_chunks(forward) for forward in forwards]
        chunks = [most for most in self.collectives.all_max(own + [0] * (math.ceil(len(batch) / world) - len(own))) if most]
        forwards += [lay_out([], [])] * (len(chunks) - len(forwards))
        weight = world * micro_steps(self.spec.training, world) / len(batch)
        return [
            Part([(share[group], weight) for group in forward.groups], forward, most if self.chunked else 0)
            for forward, most in zip(forwards, chunks, strict=True)
        ]

    def values(self, model: Any, part: Part) -> Values:
        assert part.forward is not None
        flat = tree_logps(model, part.forward, self.collectives.device, part.chunks)
        lengths = torch.from_numpy(part.forward.owners_N).bincount(minlength=part.forward.num_sequences)
        return self.named(flat, lengths.tolist())
