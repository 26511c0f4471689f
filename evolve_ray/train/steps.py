"""Optimiser updates: forwards, loss and gradient. If a number is not finite, training stops before any weight is changed."""

import functools
import math
from dataclasses import dataclass
from typing import Any

from evolve_ray.config.options import Training
from evolve_ray.errors import NumericsError
from evolve_ray.store import rows
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.forwards import Part, Separate
from evolve_ray.train.objectives import Objective, total
from evolve_ray.train.schedule import learning_rate
from evolve_ray.train.tokens import Tokens, engine_logps, mask_of, padded, response_of


@dataclass
class Steps:
    """The updates of a training. `batches` are row numbers of `pairs`, one batch for each step, in order."""

    pairs: list[dict]
    batches: list[list[int]]
    training: Training
    objective: Objective
    reader: Separate
    collectives: Collectives

    def update(self, engine: Any, step: int, reference: dict[str, Any]) -> dict[str, float]:
        """Makes one update and returns its metrics, which are the same on every rank.

        Raises NumericsError on all ranks if the loss or the gradient is not finite.
        """
        import torch

        batch, device = self.batches[step], self.collectives.device
        rate = learning_rate(step, len(self.batches), self.training)
        for param_group in engine.optimizer.param_groups:
            param_group["lr"] = rate
        sums: dict[str, float] = {}
        largest: dict[str, float] = {}
        mean_lengths = self.mean_lengths(batch) if self.objective.tokens else {}
        parts = self.reader.parts(batch)
        for number, part in enumerate(parts):
            pair_rows = [row for row, _ in part.pairs]
            weights = torch.tensor([weight for _, weight in part.pairs], device=device)
            engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            by_pair = {name: values[pair_rows].to(device) for name, values in reference.items() if not isinstance(values, list)}
            part_reference = {name: by_pair[name] for name in self.objective.sequences if name in by_pair}
            initial = {name: by_pair[rows.initial_column(name)] for name in self.objective.sequences if self.objective.initial}
            if self.objective.tokens:
                policy, lengths, tokens = self.token_values(engine, part, reference, mean_lengths)
            else:
                (policy, lengths), tokens = self.reader.values(engine, part), None
            numbers = self.numbers(pair_rows)
            loss_B, metrics = total(self.objective, policy, part_reference, lengths, self.training, numbers, tokens, initial)
            self.stop_if_not_finite(loss_B, step, pair_rows)
            # DeepSpeed divides by its number of micro-batches and averages over ranks; `weights` cancel both.
            engine.backward((loss_B * weights).sum())
            engine.step()
            not_padding = weights > 0
            for name, values in {"loss": loss_B, **metrics}.items():
                if name.startswith("largest_"):
                    largest[name] = max([largest.get(name, -math.inf), *values[not_padding].tolist()])
                    continue
                sums[name] = sums.get(name, 0.0) + values.detach()[not_padding].double().sum().item()
        if getattr(engine.optimizer, "overflow", False):
            ids = [self.pairs[row]["pair_id"] for row in batch]
            raise NumericsError(
                f"training step {step}: the gradient is not finite, pairs {ids[:8]}; no weight was changed; "
                "lower learning_rate or check these pairs, then submit again"
            )
        totals = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64)
        self.collectives.all_reduce(totals)
        means = {name: value / len(batch) for name, value in zip(sorted(sums), totals.tolist(), strict=True)}
        if largest:
            names = sorted(largest)
            means |= zip(names, self.collectives.all_max([largest[name] for name in names]), strict=True)
        norm = engine.get_global_grad_norm()
        return {"step": step, "num_pairs": len(batch), "learning_rate": rate, "gradient_norm": float(norm or 0.0), **means}

    def token_values(
        self, engine: Any, part: Part, reference: dict[str, Any], mean_lengths: dict[str, float]
    ) -> tuple[dict[str, Any], dict[str, Any], Tokens]:
        """Sums and lengths of the pairs of a part, as the reader's `values`, and what they are made of token by token."""
        import torch

        device, pair_rows = self.collectives.device, [row for row, _ in part.pairs]
        policy, lengths = self.reader.token_values(engine, part)
        part_reference, initial = (
            {
                name: padded([reference[column(name)][row] for row in pair_rows]).to(device)
                for name in policy
                if column(name) in reference
            }
            for column in (rows.token_column, lambda name: rows.token_column(rows.initial_column(name)))
        )
        counts = {response_of(name): torch.tensor(own, device=device) for name, own in lengths.items()}
        engine_values = {}
        if "chosen" in counts and self.has_engine_logps:
            engine_values["chosen"] = engine_logps([self.pairs[row] for row in pair_rows], counts["chosen"].tolist()).to(device)
        masks = {name: mask_of(own, device) for name, own in lengths.items()}
        tokens = Tokens(policy, part_reference, masks, mean_lengths, engine_values, initial)
        sums = {name: values.sum(1) for name, values in policy.items()}
        return sums, {name: own.clamp(min=1) for name, own in counts.items()}, tokens

    @functools.cached_property
    def has_engine_logps(self) -> bool:
        """Whether every pair has the engine's log-probabilities of `chosen`."""
        return all(pair.get("chosen_logps") is not None for pair in self.pairs)

    def mean_lengths(self, batch: list[int]) -> dict[str, float]:
        """The tokens of `chosen` and `rejected`, on average over a batch; the same on every rank."""
        import torch

        share = [self.reader.num_tokens(row) for row in batch[self.collectives.rank :: self.collectives.world]]
        names = sorted({response_of(name) for name in self.objective.sequences})
        totals = torch.tensor([float(sum(lengths[name] for lengths in share)) for name in names], dtype=torch.float64)
        self.collectives.all_reduce(totals)
        return {name: max(total, 1.0) / len(batch) for name, total in zip(names, totals.tolist(), strict=True)}

    def numbers(self, pair_rows: list[int]) -> dict[str, Any]:
        """`{name: B}` of the numbers that the objective needs, float32."""
        import torch

        columns = {name: [self.pairs[row]["numbers"][name] for row in pair_rows] for name in self.objective.numbers}
        return {name: torch.tensor(values, device=self.collectives.device) for name, values in columns.items()}

    def stop_if_not_finite(self, loss_B: Any, step: int, pair_rows: list[int]) -> None:
        """Raises NumericsError on all ranks, before the backward pass, if the loss of any rank is not finite.

        All ranks raise the same message, with the bad ranks and pairs, because the driver receives the error of only one of them.
        """
        bad = {row for row, finite in zip(pair_rows, loss_B.isfinite().tolist(), strict=True) if not finite}
        if not any(self.collectives.all_max([int(bool(bad))])):
            return
        batch, world = self.batches[step], self.collectives.world
        own_flags = [int(bool(bad) and rank == self.collectives.rank) for rank in range(world)]
        own_flags += [int(row in bad) for row in batch]
        flags = self.collectives.all_max(own_flags)  # of each rank, then of each row of the batch
        ranks = ", ".join(str(rank) for rank in range(world) if flags[rank])
        ids = [self.pairs[row]["pair_id"] for row, flag in zip(batch, flags[world:], strict=True) if flag]
        raise NumericsError(
            f"training step {step}: the loss is not finite on rank {ranks}, pairs {ids}; no weight was changed; "
            "check these pairs and their reference log-probabilities, then submit again"
        )
