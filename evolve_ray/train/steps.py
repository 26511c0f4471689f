"""Optimiser updates: forwards, loss and gradient. If a number is not finite, training stops before any weight is changed."""

from dataclasses import dataclass
from typing import Any

from evolve_ray.config.options import Training
from evolve_ray.errors import NumericsError
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.forwards import Separate
from evolve_ray.train.objectives import Objective, total
from evolve_ray.train.schedule import learning_rate


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
        parts = self.reader.parts(batch)
        for number, part in enumerate(parts):
            pair_rows = [row for row, _ in part.pairs]
            weights = torch.tensor([weight for _, weight in part.pairs], device=device)
            engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            policy, lengths = self.reader.values(engine, part)
            part_reference = {name: values[pair_rows].to(device) for name, values in reference.items()}
            numbers = self.numbers(pair_rows)
            loss_B, metrics = total(self.objective, policy, part_reference, lengths, self.training, numbers)
            self.stop_if_not_finite(loss_B, step, pair_rows)
            # DeepSpeed divides by its number of micro-batches and averages over ranks; `weights` cancel both.
            engine.backward((loss_B * weights).sum())
            engine.step()
            not_padding = weights > 0
            for name, values in {"loss": loss_B, **metrics}.items():
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
        norm = engine.get_global_grad_norm()
        return {"step": step, "num_pairs": len(batch), "learning_rate": rate, "gradient_norm": float(norm or 0.0), **means}

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
