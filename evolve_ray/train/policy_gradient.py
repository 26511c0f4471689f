"""The objective `policy_gradient`: a clipped policy gradient by answer or token, with advantages that the selection computed."""

from dataclasses import dataclass
from typing import Any

import torch

from evolve_ray.config import options
from evolve_ray.config.option import option
from evolve_ray.errors import UserError
from evolve_ray.train.tokens import Tokens

Logps = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PolicyGradientArgs:
    """Options of `policy_gradient`, `[training.objective_args]`."""

    level: str = option(
        "`answer`: one ratio for an answer; `token`: one for each of its tokens (PPO, GRPO)",
        "answer",
        choices=("answer", "token"),
    )
    clip_low: float = option("the ratio counts down to 1 - this", 0.2, above=0.0, high=1.0)
    clip_high: float = option("the ratio counts up to 1 + this", 0.2, above=0.0)
    length: str = option(
        "for `token`, what the sum over an answer's tokens is divided by: `answer`: their number (GRPO, arXiv 2402.03300); "
        "`constant`: `length_constant` (Dr. GRPO, 2503.20783); `batch`: the mean number in the update's batch, so that each "
        "token counts the same (DAPO, 2503.14476)",
        "answer",
        choices=("answer", "constant", "batch"),
    )
    length_constant: float = option("for `constant`: the divisor", 0.0, unit="tokens", low=0.0)
    kl: float = option("weight of the KL divergence from the policy `kl_to`, by answer or by token", 0.0, unit="per nat", low=0.0)
    kl_to: str = option(
        "the policy that the divergence is from: the `iteration`'s start, or the `initial` one, which iteration 1 starts from",
        "iteration",
        choices=("iteration", "initial"),
    )
    kl_refined: float = option("the same for an answer that refines a draft; -1: as `kl`", -1.0, unit="per nat", low=-1.0)
    mismatch: str = option(
        "`truncate`: the gain is multiplied by min(p_trainer / p_engine, `mismatch_cap`) of the policy that sampled, which needs "
        "sampling.logps (truncated importance sampling, as in arXiv 1802.01561); `none`: it is not",
        "none",
        choices=("none", "truncate"),
    )
    mismatch_cap: float = option("for `truncate`: the largest factor", 2.0, above=0.0)


def needs_tokens(table: dict) -> bool:
    """Whether the options `table` ask for something that is computed token by token."""
    return table.get("level", "answer") != "answer" or table.get("mismatch", "none") != "none"


def check_args(loss: Any, training: options.Training, table: str) -> None:
    """Raises UserError for options of the loss that contradict each other, or that would have no effect."""
    args: PolicyGradientArgs = loss.keywords["args"]
    field, by_token = f"{table}.objective_args", args.level == "token"
    if args.length != "answer" and not by_token:
        raise UserError(f'{field}.length: is {args.length!r}, which only level = "token" uses; set the level, or remove this')
    if (args.length == "constant") != (args.length_constant > 0):
        raise UserError(
            f"{field}.length_constant: is {args.length_constant:g} with length = {args.length!r}; it must be above 0 with "
            '"constant", for example sampling.max_tokens, and is for nothing else'
        )
    if args.kl_to == "initial" and not (args.kl or args.kl_refined > 0):
        raise UserError(f"{field}.kl_to: is 'initial', but the weight of the divergence, kl, is 0; set kl, or remove this")
    if by_token and training.length_normalised:
        raise UserError(f"{table}.length_normalised: has no effect with level 'token', where `length` divides; remove it")


def policy_gradient(
    policy: Logps, reference: Logps, training: options.Training, numbers: Logps, args: PolicyGradientArgs,
    tokens: Tokens | None = None, initial: Logps | None = None,
) -> tuple[torch.Tensor, Logps]:  # fmt: skip
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) + kl k, for an answer y with the advantage A.

    rho = pi(y|c) / pi_ref(y|c) of the whole answer, where pi_ref is the policy that wrote it: the iteration's start. With
    `training.length_normalised` it is the geometric mean over tokens (GSPO, arXiv 2507.18071, equations 5 and 7). With the level
    `token` there is a rho for each token (GRPO, 2402.03300, equation 3), and `args.length` says how the tokens are averaged.
    k = exp(-d) - 1 + d is an estimate of the KL divergence that is never negative (Schulman 2020), where d is log rho, or with
    `args.kl_to` the same to the initial policy. The context c is the prompt, or the prompt, the draft and the instruction where
    the answer refines a draft (`refined`).
    """
    refined = numbers["refined"] > 0
    if args.level == "token":
        assert tokens is not None
        policy, reference, initial = tokens.policy, tokens.reference, tokens.initial
    log_ratio = in_context(policy, refined) - in_context(reference, refined)
    per_row = (-1, *[1] * (log_ratio.dim() - 1))  # a number of a row beside values of its tokens
    ratio, advantage = log_ratio.exp(), numbers["advantage"].view(per_row)
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    drift = in_context(policy, refined) - in_context(initial or {}, refined) if args.kl_to == "initial" else log_ratio
    kl = torch.expm1(-drift) + drift
    is_clipped = (clipped * advantage < ratio * advantage).float()
    metrics: Logps = {}
    if args.mismatch == "truncate":
        assert tokens is not None
        factor, metrics = mismatch(tokens, refined, args)
        gain = factor * gain
    kl_weight = torch.full_like(numbers["advantage"], args.kl)
    if args.kl_refined >= 0:
        kl_weight = torch.where(refined, torch.full_like(kl_weight, args.kl_refined), kl_weight)
    loss = kl_weight.view(per_row) * kl - gain
    if args.level == "token":
        assert tokens is not None
        mask = tokens.mask["chosen"]
        loss, gain = (divided(values, mask, tokens.mean_lengths["chosen"], args) for values in (loss, gain))
        ratio, is_clipped, kl = (mean_over_tokens(values, mask) for values in (ratio, is_clipped, kl))
    weight = torch.where(refined, torch.full_like(loss, training.refine_weight), torch.ones_like(loss))
    return weight * loss, {
        "loss_gradient": -weight * gain, "ratio": ratio, "clipped": is_clipped, "kl": kl, "advantage": numbers["advantage"],
        **metrics,
    }  # fmt: skip


def in_context(logps: Logps, refined: torch.Tensor) -> torch.Tensor:
    """The values of each answer in its own context: after the prompt, or after the draft that it refines."""
    if "chosen_after_rejected" not in logps:
        return logps["chosen"]
    direct = logps["chosen"]
    return torch.where(refined.view(-1, *[1] * (direct.dim() - 1)), logps["chosen_after_rejected"], direct)


def mean_over_tokens(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens of each row; 0 for a row without tokens."""
    return (values_BT * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)


def divided(values_BT: torch.Tensor, mask_BT: torch.Tensor, mean_length: float, args: PolicyGradientArgs) -> torch.Tensor:
    """The sum over the tokens of each row, divided as `args.length` says."""
    if args.length == "answer":
        return mean_over_tokens(values_BT, mask_BT)
    return (values_BT * mask_BT).sum(1) / (args.length_constant if args.length == "constant" else mean_length)


def mismatch(tokens: Tokens, refined: torch.Tensor, args: PolicyGradientArgs) -> tuple[torch.Tensor, Logps]:
    """min(p_trainer / p_engine, cap) by token or answer, and how far the two are apart, in nats a token.

    Both are of the policy that sampled: the engine's numbers from the sampling, the trainer's from its own forwards before the
    first update.
    """
    if not tokens.engine:
        raise UserError(
            "training.objective_args.mismatch: pairs have no log-probabilities of the engine; set sampling.logps = true, and "
            "train on drafts that the engine wrote, or remove the option"
        )
    mask = tokens.mask["chosen"]
    difference = (in_context(tokens.reference, refined) - tokens.engine["chosen"]) * mask
    apart = difference.abs()
    metrics = {
        "mismatch": mean_over_tokens(apart, mask),
        "largest_mismatch": apart.amax(1) if mask.shape[1] else torch.zeros(len(mask), device=mask.device),
    }
    factor = (difference if args.level == "token" else difference.sum(1)).exp().clamp(max=args.mismatch_cap)
    return factor, metrics | {"mismatch_factor": mean_over_tokens(factor, mask) if args.level == "token" else factor}
