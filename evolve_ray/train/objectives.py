"""Objectives: pure functions from log-probabilities to (loss per pair, metrics per pair).

`policy` and `reference` map a name of `rows.REFERENCE` to a tensor `logps_B`: the sum of log-probabilities over the response
tokens of each pair (nats, float32), or their mean over those tokens with `training.length_normalised`. Notation of the paper
(arXiv 2502.05605): y_w is the chosen and y_l the rejected response, z the refinement instruction, and
r(y|c) = log pi(y|c) - log pi_ref(y|c). e is `training.label_smoothing`, the probability that a preference is the wrong way
round. All results have the shape B.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from evolve_ray.config import options
from evolve_ray.config.plugs import blame, check_call, find_plug, with_args
from evolve_ray.errors import UserError
from evolve_ray.store import rows
from evolve_ray.train.policy_gradient import check_args, needs_tokens, policy_gradient
from evolve_ray.train.tokens import Tokens, response_of
from evolve_ray.train.turn_objectives import dpo_turns, sft_turns, turns_dpo, turns_sft

Logps = dict[str, torch.Tensor]
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]
DIRECT = ("chosen", "rejected")
AFTER_REJECTED = ("chosen_after_rejected", "rejected_after_rejected")
SEQUENCES = tuple(rows.REFERENCE.names[1:])
LOSS_EXTRAS = ("numbers", "lengths", "tokens", "initial")  # what a loss gets by name if its signature has it
AFTER_CHOSEN = ("chosen_after_chosen", "rejected_after_chosen")


def sft(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """-log pi(y_w|x) - refine_weight log pi(y_w|x, y_l, z), in nats: activation (paper, section 3.1).

    A pair with y_l = y_w teaches the model to keep a good draft. With weight 0 the refinement sequence is not used.
    """
    direct = -policy["chosen"]
    if not training.refine_weight:
        return direct, {"loss_direct": direct}
    refine = -policy["chosen_after_rejected"]
    return direct + training.refine_weight * refine, {"loss_direct": direct, "loss_refine": refine}


def dpo(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """-log sigmoid(m) with the margin m = beta [r(y_w|x) - r(y_l|x)] (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    With label smoothing it is -(1 - e) log sigmoid(m) - e log sigmoid(-m): conservative DPO (Mitchell 2023, "A note on DPO with
    noisy preferences"). Its minimum is at sigmoid(m) = 1 - e.
    """
    margin, metrics = implicit_rewards(policy, reference, training)
    loss = logistic(margin, training.label_smoothing)
    return loss, {"loss_dpo": loss, **metrics}


def ipo(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """(h - 1/(2 beta))^2 with h = r(y_w|x) - r(y_l|x), in nats squared (Azar et al. 2023, arXiv 2310.12036, equation 17).

    With label smoothing the target is (1/2 - e) / beta: the expectation if a pair is flipped with probability e, up to a
    constant. TRL divides each r by its number of tokens, as `length_normalised` does; the equation does not.
    """
    _, metrics = implicit_rewards(policy, reference, training)
    h = ratio(policy, reference, "chosen") - ratio(policy, reference, "rejected")
    loss = (h - (0.5 - training.label_smoothing) / training.beta) ** 2
    return loss, {"loss_ipo": loss, **metrics}


def refine(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """L_refine: one term to improve a bad draft and one to keep a good draft. On its own it is the objective `srpo`.

    Margins: m_improve = beta [r(y_w|x,y_l,z) - r(y_l|x,y_l,z)] and m_keep = beta [r(y_w|x,y_w,z) - r(y_l|x,y_w,z)]. In both of
    them y_w is preferred. The second one protects a good draft: after the draft y_w, repeating it must be better than y_l.
    Without label smoothing the forms are

    * squared: (m_improve - 1/2)^2 + (m_keep - 1/2)^2 (SRPO, arXiv 2406.01660, with a hard preference; paper, section 3.2);
    * logistic: -log sigmoid(m_improve) - log sigmoid(m_keep), the loss of `dpo` after a draft.

    SRPO regresses the margin of y over a draft y' on p(y > y') - 1/2, which is the margin of the optimal policy of its game.
    With label smoothing p(y_w > y_l) = 1 - e, so the target after y_l is 1/2 - e. After y_w it is e - 1/2 for y_l over y_w,
    which is again 1/2 - e for y_w over y_l.
    """
    metrics: dict[str, torch.Tensor] = {}
    for goal, (better, worse) in {"improve": AFTER_REJECTED, "keep": AFTER_CHOSEN}.items():
        margin = training.beta * (ratio(policy, reference, better) - ratio(policy, reference, worse))
        if training.refine_form == "squared":
            loss = (margin - (0.5 - training.label_smoothing)) ** 2
        else:
            loss = logistic(margin, training.label_smoothing)
        metrics |= {f"loss_{goal}": loss, f"margin_{goal}": margin, f"accuracy_{goal}": (margin > 0).float()}
    return metrics["loss_improve"] + metrics["loss_keep"], metrics


def evolve(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """(1 - alpha) L_dpo + alpha L_refine (paper, section 3.2); a term of weight 0 is not computed.

    So alpha = 0 equals `dpo`, the paper's main baseline, and alpha = 1 equals `srpo`, bit for bit.
    """
    metrics: dict[str, torch.Tensor] = {}
    loss = torch.zeros_like(next(iter(policy.values())))
    for weight, term in ((1 - training.alpha, dpo), (training.alpha, refine)):
        if weight:
            term_loss, term_metrics = term(policy, reference, training)
            loss, metrics = loss + weight * term_loss, metrics | term_metrics
    return loss, metrics


def reward(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """-log sigmoid(s(x, y_w) - s(x, y_l)) of a reward model's scores (Bradley-Terry; Ouyang et al. 2022, arXiv 2203.02155,
    equation 1), with label smoothing as in `dpo`.

    Here `policy["chosen"]` and `policy["rejected"]` are scores in the unit of the reward model, not log-probabilities.
    """
    margin = policy["chosen"] - policy["rejected"]
    loss = logistic(margin, training.label_smoothing)
    return loss, {"loss_reward": loss, "margin": margin, "accuracy": (margin > 0).float()}


def ratio(policy: Logps, reference: Logps, name: str) -> torch.Tensor:
    """r(y|c) = log pi(y|c) - log pi_ref(y|c) of the sequence `name`, in nats."""
    return policy[name] - reference[name]


def logistic(margin_B: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross entropy, in nats, of sigmoid(margin) for a preference that is right with probability 1 - label_smoothing."""
    return -(1 - label_smoothing) * F.logsigmoid(margin_B) - label_smoothing * F.logsigmoid(-margin_B)


def implicit_rewards(policy: Logps, reference: Logps, training: options.Training) -> Result:
    """The margin beta [r(y_w|x) - r(y_l|x)], and the metrics of all objectives on responses to the prompt alone."""
    chosen, rejected = (training.beta * ratio(policy, reference, name) for name in DIRECT)
    margin = chosen - rejected
    return margin, {
        "margin": margin,
        "accuracy": (margin > 0).float(),
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }


@dataclass(frozen=True)
class Objective:
    """A loss and the sequences that it needs, in the order of `rows.REFERENCE`.

    `reference`: whether it uses the reference policy. `scores`: whether it takes scores of a reward model instead of
    log-probabilities. `numbers`: the named numbers of each pair that it needs. `turns`: the names of further turns of each row
    that it needs beside `needs`, or a function of `args` that returns them. The selection gives numbers and turns. `tokens`:
    whether it needs log-probabilities token by token. `initial`: whether it also needs those of the initial policy.

    The loss is called with `(policy, reference, training)`, and by name with what else its signature has: `numbers`, `{name: B}`
    (float32); `lengths`, the response tokens of `chosen`, `rejected` and the turns; `tokens`, a `train.tokens.Tokens`; `initial`,
    as `reference`, of the policy that iteration 1 started from; `args`, the table `objective_args`.
    """

    loss: Callable[..., Result]
    needs: tuple[str, ...]
    reference: bool
    scores: bool = False
    numbers: tuple[str, ...] = ()
    turns: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    tokens: bool = False
    initial: bool = False

    @property
    def sequences(self) -> tuple[str, ...]:
        """The names of all sequences that it reads."""
        assert isinstance(self.turns, tuple)
        return (*self.needs, *self.turns)


def find(training: options.Training, table: str = "training") -> Objective:
    """The objective of a training phase, without the sequences that would have weight 0; `table` is its place in the recipe.

    Raises UserError for a plug that is not an `Objective`, needs what does not exist, or has a loss that cannot be called, and
    for an option that the objective would ignore.
    """
    with_dpo, with_refine = training.alpha < 1, training.alpha > 0
    shipped = {
        "sft": Objective(sft, ("chosen", "chosen_after_rejected") if training.refine_weight else ("chosen",), reference=False),
        "dpo": Objective(dpo, DIRECT, reference=True),
        "ipo": Objective(ipo, DIRECT, reference=True),
        "srpo": Objective(refine, AFTER_REJECTED + AFTER_CHOSEN, reference=True),
        "evolve": Objective(evolve, DIRECT * with_dpo + (AFTER_REJECTED + AFTER_CHOSEN) * with_refine, reference=True),
        "reward": Objective(reward, DIRECT, reference=False, scores=True),
        "policy_gradient": Objective(
            policy_gradient, ("chosen", "chosen_after_rejected") if training.refine_weight else ("chosen",), reference=True,
            numbers=("advantage", "refined"), tokens=needs_tokens(training.objective_args),
            initial=training.objective_args.get("kl_to") == "initial",
        ),
        "turns_dpo": Objective(turns_dpo, DIRECT, reference=True, turns=dpo_turns),
        "turns_sft": Objective(turns_sft, ("chosen",), reference=False, turns=sft_turns),
    }  # fmt: skip
    objective = find_plug(shipped, training.objective, f"{table}.objective")
    if ":" in training.objective:
        objective = checked(objective, training, table)
    loss = with_args(f"{table}.objective_args", training.objective, objective.loss, training.objective_args)
    turns = objective.turns(getattr(loss, "keywords", {}).get("args")) if callable(objective.turns) else objective.turns
    objective = dataclasses.replace(objective, loss=loss, turns=turns)
    if training.objective == "policy_gradient":
        check_args(loss, training, table)
    ignored = {
        "nll": objective.scores and training.nll,
        "length_normalised": objective.scores and training.length_normalised,
        "label_smoothing": objective.loss is sft and training.label_smoothing,
    }
    for name, value in ignored.items():
        if value:
            raise UserError(f"{table}.{name}: is {value}, but objective {training.objective!r} does not use it; remove it")
    if training.nll and "chosen" not in objective.needs:
        objective = dataclasses.replace(objective, needs=("chosen", *objective.needs))
    return objective


def checked(objective: Any, training: options.Training, table: str) -> Objective:
    """Somebody's own objective, after the checks that need no data."""
    field, name = f"{table}.objective", training.objective
    if not isinstance(objective, Objective):
        raise UserError(
            f"{field}: {name!r} is of type {type(objective).__name__}, but must be an evolve_ray.train.objectives.Objective"
        )
    needs = objective.needs if isinstance(objective.needs, tuple) else (str(objective.needs),)
    for sequence in needs or ("nothing",):
        if sequence not in SEQUENCES:
            nearest = difflib.get_close_matches(str(sequence), SEQUENCES, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it can need {', '.join(SEQUENCES)}"
            raise UserError(f"{field}: {name!r} needs {sequence!r}, which is not a sequence of a pair; {hint}")
    if not callable(objective.turns) and not (isinstance(objective.turns, tuple) and all(map(str.isidentifier, objective.turns))):
        raise UserError(f"{field}: {name!r} has turns {objective.turns!r}, but must have a tuple of plain names")
    check_call(field, name, objective.loss, ("policy", "reference", "training"), extras=LOSS_EXTRAS)
    if not objective.tokens and "tokens" in inspect.signature(objective.loss).parameters:
        raise UserError(f"{field}: the loss of {name!r} takes `tokens`, so it must be declared with Objective(..., tokens=True)")
    if objective.initial and not objective.reference:
        raise UserError(f"{field}: {name!r} has initial=True and reference=False; the initial policy is read with the reference")
    if objective.tokens and objective.scores:
        raise UserError(f"{field}: {name!r} has scores and tokens, but a score has no tokens; remove one of them")
    # In the order of the table, whatever the order in which the plug names them.
    return dataclasses.replace(objective, needs=tuple(name for name in SEQUENCES if name in needs))


def total(
    objective: Objective, policy: Logps, reference: Logps, lengths: Logps, training: options.Training,
    numbers: Logps | None = None, tokens: Tokens | None = None, initial: Logps | None = None,
) -> Result:  # fmt: skip
    """The objective on a batch, plus `training.nll` times the mean negative log-probability of a chosen token after `x`.

    `policy` and `reference` hold sums over response tokens (or scores). `lengths` maps "chosen" and "rejected" to the numbers
    of these tokens, of shape B and at least 1. With `length_normalised` each sum is divided by the length of its response;
    this is the only place that does so. The metrics `chosen_shift` and `rejected_shift` are always sums: how far the policy has
    moved from the reference, in nats. `numbers` maps the names in `objective.numbers` to numbers of the pairs, of shape B.
    `tokens` and `initial` are for an objective that asks for them.
    """
    policy_input, reference_input, initial_input = policy, reference, initial or {}
    if training.length_normalised:
        policy_input, reference_input, initial_input = (
            {name: logps_B / lengths[response_of(name)] for name, logps_B in logps.items()}
            for logps in (policy, reference, initial_input)
        )
    wanted = inspect.signature(objective.loss).parameters
    known = {"numbers": numbers or {}, "lengths": lengths, "tokens": tokens, "initial": initial_input}
    extras = {name: part for name, part in known.items() if name in wanted}
    size = len(next(iter(policy.values())))
    with blame("training.objective", training.objective):
        loss, metrics = check_result(objective.loss(policy_input, reference_input, training, **extras), size, training.objective)
    if training.nll:
        nll = -policy["chosen"] / lengths["chosen"]
        loss, metrics = loss + training.nll * nll, metrics | {"loss_nll": nll}
    shifts = {f"{name}_shift": ratio(policy, reference, name) for name in DIRECT if name in policy and name in reference}
    return loss, metrics | shifts


def check_result(result: Any, size: int, name: str) -> Result:
    """What a loss returned, if it is one loss and one metric for each of `size` pairs; UserError if not."""
    field, end = f"training.objective: {name!r}", "it must return (loss, metrics) with one value for each pair in both"
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        kinds = ", ".join(type(part).__name__ for part in result) if isinstance(result, tuple) else type(result).__name__
        raise UserError(f"{field} returned {kinds}; {end}")
    for part, values in {"a loss": result[0], **{f"the metric {key!r}": value for key, value in result[1].items()}}.items():
        if not isinstance(values, torch.Tensor):
            raise UserError(f"{field} returned {part} of type {type(values).__name__}; {end}")
        if values.shape != (size,):
            raise UserError(f"{field} returned {part} of shape {tuple(values.shape)} for {size} pairs; {end}")
    return result
