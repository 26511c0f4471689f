"""Objectives on linked turns: a row's sides and its further turns, by the names that the selection gave them."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evolve_ray.config import options
from evolve_ray.config.option import option
from evolve_ray.errors import UserError

Logps = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DpoTurnsArgs:
    """Options of `turns_dpo`, `[training.objective_args]`."""

    turns: int = option("turns of each of the two trajectories", 2, low=1)


@dataclass(frozen=True)
class SftTurnsArgs:
    """Options of `turns_sft`, `[training.objective_args]`."""

    weights: dict = option("weight of each further turn by its name; a turn of weight 0 is not used", {})


def dpo_turns(args: DpoTurnsArgs) -> tuple[str, ...]:
    """The further turns that `turns_dpo` needs: `chosen_2`, `rejected_2`, ..."""
    return tuple(f"{side}_{number}" for number in range(2, args.turns + 1) for side in ("chosen", "rejected"))


def sft_turns(args: SftTurnsArgs) -> tuple[str, ...]:
    """The further turns that `turns_sft` needs. Raises UserError for a weight that is no number of at least 0."""
    for name, weight in args.weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"training.objective_args.weights.{name}: is {weight!r}, but must be a number of at least 0")
    return tuple(name for name, weight in args.weights.items() if weight)


def turns_dpo(
    policy: Logps, reference: Logps, training: options.Training, args: DpoTurnsArgs
) -> tuple[torch.Tensor, Logps]:  # fmt: skip
    """-log sigmoid(m) with m = beta [sum of r over the turns of the better trajectory - that of the worse one]: M-DPO.

    Each turn's r(y|c) = log pi(y|c) - log pi_ref(y|c) is after its own messages, and a turn that did not happen counts 0 (Xiong
    et al. 2024, arXiv 2409.02392, for the turns of the model alone; used in 2502.19613).
    """
    sums = {
        side: training.beta * sum((policy[name] - reference[name] for name in names), start=torch.zeros_like(policy["chosen"]))
        for side in ("chosen", "rejected")
        if (names := [side, *(name for name in dpo_turns(args) if name.startswith(f"{side}_"))])
    }
    margin = sums["chosen"] - sums["rejected"]
    loss = -F.logsigmoid(margin)
    metrics = {"margin": margin, "accuracy": (margin > 0).float()}
    return loss, {"loss_turns": loss, "reward_chosen": sums["chosen"], "reward_rejected": sums["rejected"], **metrics}


def turns_sft(
    policy: Logps, reference: Logps, training: options.Training, args: SftTurnsArgs
) -> tuple[torch.Tensor, Logps]:  # fmt: skip
    """-log pi(chosen) - sum of w log pi(turn) over the further turns, in nats: several skills of one row (SELF, 2310.00533)."""
    metrics = {"loss_chosen": -policy["chosen"]} | {f"loss_{name}": -policy[name] for name in sft_turns(args)}
    loss = metrics["loss_chosen"] + sum(args.weights[name] * metrics[f"loss_{name}"] for name in sft_turns(args))
    return loss, metrics
