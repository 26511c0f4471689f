"""Objectives: pure functions of log-probabilities -> (loss per pair, metrics per pair).

`policy` and `reference` map a name of `rows.REFERENCE` to a tensor `logps_B`: the sum of log-probabilities over the response
tokens of each pair (nats, float32). Notation of the paper (arXiv 2502.05605): y_w chosen, y_l rejected, z the refinement
instruction, r(y|c) = log pi(y|c) - log pi_ref(y|c).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evolve_ray import config as options

Logps = dict[str, torch.Tensor]
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]

DIRECT = ("chosen", "rejected")
AFTER_REJECTED = ("chosen_after_rejected", "rejected_after_rejected")
AFTER_CHOSEN = ("chosen_after_chosen", "rejected_after_chosen")


def sft(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """Activation (paper, section 3.1): -log pi(y_w|x) - log pi(y_w|x, y_l, z); a tie (y_l = y_w) teaches to keep."""
    direct, refine = -policy["chosen"], -policy["chosen_after_rejected"]
    return direct + refine, {"loss_direct": direct, "loss_refine": refine}


def dpo(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """-log sigmoid(beta [r(y_w|x) - r(y_l|x)]) (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""
    rewards = {name: training.beta * (policy[name] - reference[name]) for name in DIRECT}
    margin = rewards["chosen"] - rewards["rejected"]
    loss = -F.logsigmoid(margin)
    return loss, {
        "loss_dpo": loss,
        "margin": margin,
        "accuracy": (margin > 0).float(),
        "reward_chosen": rewards["chosen"],
        "reward_rejected": rewards["rejected"],
        "chosen_shift": policy["chosen"] - reference["chosen"],
    }


def refine(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """(beta [r(y_w|x,y_l,z) - r(y_l|x,y_l,z)] - 1/2)^2 + (beta [r(y_w|x,y_w,z) - r(y_l|x,y_w,z)] - 1/2)^2.

    The squared form of SRPO (arXiv 2406.01660) with a hard preference; the second term keeps a good draft from being
    spoilt: given y_w, repeating it must beat falling back to y_l.
    """
    margins = []
    for better, worse in (AFTER_REJECTED, AFTER_CHOSEN):
        margins.append(training.beta * ((policy[better] - reference[better]) - (policy[worse] - reference[worse])))
    improve, keep = ((margin - 0.5) ** 2 for margin in margins)
    return improve + keep, {
        "loss_improve": improve,
        "loss_keep": keep,
        "margin_improve": margins[0],
        "margin_keep": margins[1],
    }


def evolve(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """(1 - alpha) L_dpo + alpha L_refine (paper, section 3.2)."""
    metrics: dict[str, torch.Tensor] = {}
    loss = torch.zeros_like(next(iter(policy.values())))
    if training.alpha < 1:
        part, more = dpo(policy, reference, training)
        loss, metrics = loss + (1 - training.alpha) * part, metrics | more
    if training.alpha > 0:
        part, more = refine(policy, reference, training)
        loss, metrics = loss + training.alpha * part, metrics | more
    return loss, metrics


@dataclass(frozen=True)
class Objective:
    """A loss and the sequences it needs; `reference` says whether it looks at the reference policy."""

    loss: Callable[[Logps, Logps, options.Training], Result]
    needs: tuple[str, ...]
    reference: bool


def find(training: options.Training) -> Objective:
    """The objective of a training phase, with no sequence that its alpha would multiply by zero."""
    if training.objective == "sft":
        return Objective(sft, ("chosen", "chosen_after_rejected"), reference=False)
    if training.objective == "dpo":
        return Objective(dpo, DIRECT, reference=True)
    if training.objective == "evolve":
        direct = DIRECT if training.alpha < 1 else ("chosen",) if training.nll else ()
        return Objective(evolve, direct + (AFTER_REJECTED + AFTER_CHOSEN if training.alpha > 0 else ()), reference=True)
    from evolve_ray.refine import find_plug

    return find_plug({}, training.objective, "training.objective")


def total(objective: Objective, policy: Logps, reference: Logps, lengths: torch.Tensor, training: options.Training) -> Result:
    """The objective, plus `training.nll` times the mean negative log-probability of a chosen token after `x`.

    `lengths_B` counts the response tokens of y_w.
    """
    loss, metrics = objective.loss(policy, reference, training)
    if training.nll:
        nll = -policy["chosen"] / lengths
        loss, metrics = loss + training.nll * nll, metrics | {"loss_nll": nll}
    return loss, metrics
