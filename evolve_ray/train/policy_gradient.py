"""The objective `policy_gradient`: a clipped policy gradient on whole answers, with advantages that the selection computed."""

from dataclasses import dataclass

import torch

from evolve_ray.config import options
from evolve_ray.config.option import option

Logps = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PolicyGradientArgs:
    """Options of `policy_gradient`, `[training.objective_args]`."""

    clip_low: float = option("the ratio counts down to 1 - this", 0.2, above=0.0, high=1.0)
    clip_high: float = option("the ratio counts up to 1 + this", 0.2, above=0.0)
    kl: float = option("weight of the KL divergence to the iteration's start, per answer", 0.0, unit="per nat", low=0.0)


def policy_gradient(
    policy: Logps, reference: Logps, training: options.Training, numbers: Logps, args: PolicyGradientArgs
) -> tuple[torch.Tensor, Logps]:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) + kl k, for an answer y with the advantage A.

    rho = pi(y|c) / pi_ref(y|c) of the whole answer, where pi_ref is the policy that wrote it: the iteration's start. With
    `training.length_normalised` it is the geometric mean over tokens (GSPO, arXiv 2507.18071, equations 5 and 7).
    k = exp(-d) - 1 + d with d = log rho is an estimate of the KL divergence that is never negative (Schulman 2020). The context c
    is the prompt, or the prompt, the draft and the instruction where the answer refines a draft (`refined`).
    """
    refined = numbers["refined"] > 0
    parts = [policy["chosen"] - reference["chosen"]]
    if "chosen_after_rejected" in policy:
        parts.append(policy["chosen_after_rejected"] - reference["chosen_after_rejected"])
    log_ratio = torch.where(refined, parts[-1], parts[0])
    weight = torch.where(refined, torch.full_like(log_ratio, training.refine_weight), torch.ones_like(log_ratio))
    ratio, advantage = log_ratio.exp(), numbers["advantage"]
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    kl = torch.expm1(-log_ratio) + log_ratio
    loss = weight * (args.kl * kl - gain)
    is_clipped = (clipped * advantage < ratio * advantage).float()
    return loss, {"loss_gradient": -weight * gain, "ratio": ratio, "clipped": is_clipped, "kl": kl, "advantage": advantage}
