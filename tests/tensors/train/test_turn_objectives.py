"""Objectives on linked turns: hand-worked values, gradients, and names that a row must have."""

import math

import pytest
import torch

from evolve_ray.config.options import Training
from evolve_ray.errors import UserError
from evolve_ray.train.objectives import find, total

LENGTHS = {name: torch.ones(1) for name in ("chosen", "rejected", "chosen_2", "rejected_2", "revision", "answer")}


def logps(**values):
    return {name: torch.tensor([value], dtype=torch.float64, requires_grad=True) for name, value in values.items()}


def zeros(names):
    return {name: torch.zeros(1, dtype=torch.float64) for name in names}


def run(training, policy, reference=None):
    objective = find(training)
    assert set(objective.sequences) == set(policy)
    loss, metrics = total(objective, policy, reference or zeros(policy), LENGTHS, training)
    return loss, {name: value.item() for name, value in metrics.items()}


def test_dpo_over_two_turns_by_hand():
    """Self-rewarding correction (2502.19613): ratios .5 and 1 against -.2 and .1 with eta 1 give -log sigmoid(1.6) = .1839."""
    policy = logps(chosen=-1.0, rejected=-2.0, chosen_2=-3.0, rejected_2=-0.9)
    reference = {"chosen": -1.5, "rejected": -1.8, "chosen_2": -4.0, "rejected_2": -1.0}
    loss, metrics = run(Training(objective="turns_dpo", beta=1.0), policy, logps(**reference))
    assert loss.item() == pytest.approx(0.1839, abs=5e-5)
    assert (metrics["margin"], metrics["reward_chosen"], metrics["accuracy"]) == pytest.approx((1.6, 1.5, 1.0))
    loss.sum().backward()
    slope = 1 / (1 + math.exp(1.6))
    assert [policy[name].grad.item() for name in policy] == pytest.approx([-slope, slope, -slope, slope])


def test_a_turn_that_did_not_happen_counts_nothing_and_one_turn_is_dpo():
    policy = {"chosen": -1.0, "rejected": -2.0}
    alone, _ = run(Training(objective="turns_dpo", objective_args={"turns": 1}), logps(**policy))
    plain, _ = run(Training(objective="dpo"), logps(**policy))
    two, _ = run(Training(objective="turns_dpo"), logps(**policy, chosen_2=0.0, rejected_2=0.0))
    assert alone.item() == plain.item() == two.item()


def test_length_normalised_turns_are_divided_by_their_own_tokens():
    policy = logps(chosen=-1.0, rejected=-2.0, chosen_2=-3.0, rejected_2=-4.0)
    training = Training(objective="turns_dpo", beta=1.0, length_normalised=True)
    lengths = {"chosen": 1, "rejected": 2, "chosen_2": 3, "rejected_2": 4}
    _, metrics = total(find(training), policy, zeros(policy), {n: torch.tensor([v]) for n, v in lengths.items()}, training)
    assert metrics["margin"].item() == 0.0


@pytest.mark.parametrize(("b", "expected"), [(0.0, 3.0), (0.5, 5.0)])
def test_skills_of_self_are_three_sequences_of_one_row(b, expected):
    """SELF (2310.00533): -[log p(f|x,y) + log p(y'|x,y,f) + b log p(y'|x)] with 1, 2 and 4 nats; b = 0 drops the third."""
    training = Training(objective="turns_sft", objective_args={"weights": {"revision": 1.0, "answer": b}})
    policy = logps(chosen=-1.0, revision=-2.0, **({"answer": -4.0} if b else {}))
    loss, metrics = run(training, policy)
    assert loss.item() == expected
    assert ("loss_answer" in metrics) == bool(b)
    assert not find(training).reference


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"weights": {"answer": -1.0}}, r"training\.objective_args\.weights\.answer: is -1\.0, but must be a number"),
        ({"weights": {"answer": "much"}}, r"weights\.answer: is 'much'"),
        ({"weight": {}}, r"did you mean 'weights'\?"),
    ],
)
def test_wrong_weights_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        find(Training(objective="turns_sft", objective_args=args))
