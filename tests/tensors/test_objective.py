"""Objectives against numbers worked out with plain math, and their gradients against finite differences."""

import math

import pytest
import torch

from evolve_ray import objective
from evolve_ray.config import Training
from evolve_ray.errors import UserError
from evolve_ray.rows import REFERENCE

NAMES = [name for name in REFERENCE.names if name != "pair_id"]
POLICY = [-4.0, -7.5, -3.0, -6.0, -1.0, -8.0]
REF = [-5.0, -7.0, -3.5, -5.5, -1.25, -6.5]
BETA = 0.3


def logps(values):
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in zip(NAMES, values, strict=True)}


def loss_of(kind, policy=POLICY, reference=REF, **more):
    training = Training(**{"objective": kind, "beta": BETA} | more)
    loss, metrics = objective.find(training).loss(logps(policy), logps(reference), training)
    return loss.item(), {name: value.item() for name, value in metrics.items()}


def r(name):
    """log pi - log pi_ref of the example."""
    return POLICY[NAMES.index(name)] - REF[NAMES.index(name)]


DPO = math.log(1 + math.exp(-BETA * (r("chosen") - r("rejected"))))
IMPROVE = (BETA * (r("chosen_after_rejected") - r("rejected_after_rejected")) - 0.5) ** 2
KEEP = (BETA * (r("chosen_after_chosen") - r("rejected_after_chosen")) - 0.5) ** 2


def test_names_are_the_columns_of_the_reference_table():
    assert [*objective.DIRECT, *objective.AFTER_REJECTED, *objective.AFTER_CHOSEN] == NAMES


def test_dpo_of_the_worked_example():
    loss, metrics = loss_of("dpo")
    assert loss == pytest.approx(DPO, abs=1e-12)
    assert metrics["margin"] == pytest.approx(BETA * 1.5, abs=1e-12)  # (-4 + 5) - (-7.5 + 7) = 1.5
    assert metrics["accuracy"] == 1.0


def test_refinement_of_the_worked_example():
    loss, metrics = loss_of("evolve", alpha=1.0)
    assert loss == pytest.approx(IMPROVE + KEEP, abs=1e-12)
    assert metrics["loss_improve"] == pytest.approx((BETA * 1.0 - 0.5) ** 2, abs=1e-12)  # 0.5 - (-0.5) = 1
    assert metrics["loss_keep"] == pytest.approx((BETA * 1.75 - 0.5) ** 2, abs=1e-12)  # 0.25 - (-1.5) = 1.75


def test_evolve_of_the_worked_example():
    assert loss_of("evolve", alpha=0.3)[0] == pytest.approx(0.7 * DPO + 0.3 * (IMPROVE + KEEP), abs=1e-12)


def test_activation_of_the_worked_example():
    loss, metrics = loss_of("sft")
    assert loss == 4.0 + 3.0
    assert (metrics["loss_direct"], metrics["loss_refine"]) == (4.0, 3.0)


@pytest.mark.parametrize(
    ("kind", "alpha", "expected"),
    [("dpo", 0.5, math.log(2)), ("evolve", 0.0, math.log(2)), ("evolve", 1.0, 0.5), ("evolve", 0.5, math.log(2) / 2 + 0.25)],
)
def test_loss_where_policy_is_reference(kind, alpha, expected):
    loss, metrics = loss_of(kind, REF, REF, alpha=alpha)
    assert loss == pytest.approx(expected, abs=1e-12)
    assert all(value == 0.0 for name, value in metrics.items() if name.startswith(("margin", "reward")))


def test_evolve_at_both_ends_is_exactly_its_parts():
    training = Training(objective="evolve", beta=BETA)
    assert loss_of("evolve", alpha=0.0) == loss_of("dpo")
    part, metrics = objective.refine(logps(POLICY), logps(REF), training)
    assert loss_of("evolve", alpha=1.0) == (part.item(), {name: value.item() for name, value in metrics.items()})


@pytest.mark.parametrize(("kind", "alpha"), [("sft", 0.5), ("dpo", 0.5), ("evolve", 0.3), ("evolve", 1.0)])
def test_gradients_are_those_of_finite_differences(kind, alpha):
    training = Training(objective=kind, beta=BETA, alpha=alpha)
    found = objective.find(training)

    def loss(*values):
        return found.loss(dict(zip(found.needs, values, strict=True)), logps(REF), training)[0]

    inputs = [logps(POLICY)[name].requires_grad_() for name in found.needs]
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-8)


def gradients(kind, policy, **more):
    values = {name: value.requires_grad_() for name, value in logps(policy).items()}
    training = Training(objective=kind, beta=BETA, **more)
    objective.find(training).loss(values, logps(REF), training)[0].sum().backward()
    return {name: value.grad.item() for name, value in values.items() if value.grad is not None}


def test_keeping_a_good_draft_is_rewarded_while_its_margin_is_below_a_half():
    below = gradients("evolve", REF, alpha=1.0)
    assert below["chosen_after_chosen"] < 0 < below["rejected_after_chosen"]
    assert below["chosen_after_rejected"] < 0 < below["rejected_after_rejected"]
    above = gradients("evolve", [*REF[:4], REF[4] + 10, REF[5]], alpha=1.0)
    assert above["rejected_after_chosen"] < 0 < above["chosen_after_chosen"]


def test_dpo_raises_the_chosen_and_lowers_the_rejected_whatever_the_margin():
    for policy in (REF, POLICY, [-50.0, *REF[1:]]):
        found = gradients("dpo", policy)
        assert found["chosen"] < 0 < found["rejected"]
        assert found["chosen"] == -found["rejected"]


def test_huge_margins_stay_finite():
    for kind in ("dpo", "evolve"):
        assert math.isfinite(loss_of(kind, [-1e4, 0.0, -1e4, 0.0, -1e4, 0.0])[0])


def test_pairs_do_not_influence_each_other():
    policy = {name: torch.tensor([value, -3.0], dtype=torch.float64) for name, value in zip(NAMES, POLICY, strict=True)}
    reference = {name: torch.tensor([value, -2.0], dtype=torch.float64) for name, value in zip(NAMES, REF, strict=True)}
    loss, _ = objective.evolve(policy, reference, Training(beta=BETA, alpha=0.3))
    assert loss[0].item() == loss_of("evolve", alpha=0.3)[0]
    assert loss.shape == (2,)


def total(nll, length, **more):
    training = Training(objective="evolve", beta=BETA, nll=nll, **more)
    lengths = torch.tensor([length], dtype=torch.float64)
    loss, metrics = objective.total(objective.find(training), logps(POLICY), logps(REF), lengths, training)
    return loss.item(), metrics


def test_nll_is_the_mean_over_the_tokens_of_the_chosen_answer():
    plain, metrics = total(0.0, 8.0)
    assert "loss_nll" not in metrics
    assert total(0.5, 8.0)[0] == pytest.approx(plain + 0.5 * 4.0 / 8, abs=1e-12)
    assert total(0.5, 4.0)[0] == pytest.approx(plain + 0.5 * 4.0 / 4, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "needs", "reference"),
    [
        ({"objective": "sft"}, ("chosen", "chosen_after_rejected"), False),
        ({"objective": "dpo"}, objective.DIRECT, True),
        ({"objective": "evolve", "alpha": 0.0}, objective.DIRECT, True),
        ({"objective": "evolve", "alpha": 0.5}, tuple(NAMES), True),
        ({"objective": "evolve", "alpha": 1.0}, objective.AFTER_REJECTED + objective.AFTER_CHOSEN, True),
    ],
)
def test_objective_needs_no_sequence_that_it_does_not_use(options, needs, reference):
    found = objective.find(Training(**options))
    assert (found.needs, found.reference) == (needs, reference)


def test_nll_has_the_sequence_that_it_looks_at():
    assert "chosen" in objective.find(Training(objective="evolve", alpha=1.0, nll=0.1)).needs


def test_objective_of_a_users_own_module_is_found():
    assert objective.find(Training(objective=f"{__name__}:OWN")) is OWN


OWN = objective.Objective(objective.dpo, objective.DIRECT, reference=True)


def test_objective_that_cannot_be_loaded_is_refused_by_field():
    with pytest.raises(UserError, match=r"training\.objective: 'none:Such' cannot be loaded"):
        objective.find(Training(objective="none:Such"))
