"""One optimiser update: forwards, loss, gradient, and a stop before any weight is touched where a number is not finite."""

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
    """The updates of a training: `batches` are row numbers of `pairs`, in the order of the steps."""

    pairs: list[dict]
    batches: list[list[int]]
    training: Training
    objective: Objective
    reader: Separate
    collectives: Collectives

    def update(self, engine: Any, step: int, reference: dict[str, Any]) -> dict[str, float]:
        """One update; returns its metrics, the same on every rank."""
        import torch

        batch, device = self.batches[step], self.collectives.device
        rate = learning_rate(step, len(self.batches), self.training)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, float] = {}
        parts = self.reader.parts(batch)
        for number, part in enumerate(parts):
            indices = [row for row, _ in part.pairs]
            weights = torch.tensor([weight for _, weight in part.pairs], device=device)
            engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            policy, lengths = self.reader.values(engine, part)
            frozen = {name: values[indices].to(device) for name, values in reference.items()}
            loss_B, metrics = total(self.objective, policy, frozen, lengths, self.training)
            self.stop_if_not_finite(loss_B, step, indices)
            # DeepSpeed divides by the micro-batches of its configuration and averages over ranks; `weights` undo both.
            engine.backward((loss_B * weights).sum())
            engine.step()
            real = weights > 0
            for name, values in {"loss": loss_B, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + values.detach()[real].double().sum().item()
        if getattr(engine.optimizer, "overflow", False):
            ids = [self.pairs[row]["pair_id"] for row in batch]
            raise NumericsError(
                f"training step {step}: the gradient is not finite, so no weight was changed; pairs {ids[:8]}; "
                "lower learning_rate or look at these pairs, then submit again"
            )
        totals = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64)
        self.collectives.all_reduce(totals)
        means = {name: value / len(batch) for name, value in zip(sorted(sums), totals.tolist(), strict=True)}
        norm = engine.get_global_grad_norm()
        return {"step": step, "num_pairs": len(batch), "learning_rate": rate, "gradient_norm": float(norm or 0.0), **means}

    def stop_if_not_finite(self, loss_B: Any, step: int, indices: list[int]) -> None:
        """All ranks stop together, before the backward pass, if any rank's loss is not finite.

        They all raise the same sentence, with the rank and its pairs: one of theirs reaches the driver, whichever it is.
        """
        bad = {row for row, finite in zip(indices, loss_B.isfinite().tolist(), strict=True) if not finite}
        if not any(self.collectives.all_max([int(bool(bad))])):
            return
        batch, world = self.batches[step], self.collectives.world
        ranks_here = [int(bool(bad) and rank == self.collectives.rank) for rank in range(world)]
        hits = self.collectives.all_max(ranks_here + [int(row in bad) for row in batch])
        ranks = ", ".join(str(rank) for rank in range(world) if hits[rank])
        ids = [self.pairs[row]["pair_id"] for row, hit in zip(batch, hits[world:], strict=True) if hit]
        raise NumericsError(
            f"training step {step}: the loss is not finite on rank {ranks}, pairs {ids}; no weight was changed; "
            "look at these pairs and their reference log-probabilities, then submit again"
        )
