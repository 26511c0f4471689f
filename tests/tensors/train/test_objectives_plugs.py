"""Objectives of one's own: checked before anything runs, given named numbers, and refused in one sentence if they are wrong."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from evolve_ray.config.option import option
from evolve_ray.config.options import Training
from evolve_ray.errors import UserError, is_full_memory
from evolve_ray.train import objectives
from evolve_ray.train.objectives import DIRECT, Objective, find, total
from evolve_ray.train.steps import Steps

POLICY = {"chosen": torch.tensor([-1.0, -2.0]), "rejected": torch.tensor([-3.0, -1.0])}
REFERENCE = {"chosen": torch.tensor([-1.3, -2.0]), "rejected": torch.tensor([-2.9, -1.0])}
LENGTHS = {"chosen": torch.tensor([2, 4]), "rejected": torch.tensor([3, 1])}


def square(policy, reference, training, numbers):
    """SPPO (arXiv 2405.00675): squared regression of both log-ratios on win rate - 1/2, with eta = 1 / beta."""
    loss = torch.zeros_like(policy["chosen"])
    for side in DIRECT:
        target = (numbers[f"{side}_win_rate"] - 0.5) / training.beta
        loss = loss + (objectives.ratio(policy, reference, side) - target) ** 2 / 2
    return loss, {"loss_sppo": loss}


def voted(policy, reference, training, numbers, lengths):
    """ScPO (arXiv 2411.04109): a vote's weight times DPO plus the likelihood of a chosen token."""
    margin, _ = objectives.implicit_rewards(policy, reference, training)
    nll = -policy["chosen"] / lengths["chosen"]
    loss = numbers["weight"] * (-torch.nn.functional.logsigmoid(margin) + nll)
    return loss, {"loss_scpo": loss}


@dataclass(frozen=True)
class Gamma:
    gamma: float = option("target margin", 0.5, low=0.0)


def simpo(policy, reference, training, args: Gamma):
    """SimPO (arXiv 2405.14734) with a target margin."""
    loss = -torch.nn.functional.logsigmoid(training.beta * (policy["chosen"] - policy["rejected"]) - args.gamma)
    return loss, {"loss_simpo": loss}


def plain(policy, reference, training):
    return policy["chosen"], {}


def two(policy, reference):
    return policy["chosen"], {}


SQUARE = Objective(square, DIRECT, reference=True, numbers=("chosen_win_rate", "rejected_win_rate"))
VOTED = Objective(voted, DIRECT, reference=True, numbers=("weight",))
SIMPO = Objective(simpo, ("rejected", "chosen"), reference=False)
CRITIQUE = Objective(plain, ("critique",), reference=False)
NEARLY = Objective(plain, ("chosen_after_reject",), reference=False)
NONE = Objective(plain, (), reference=False)
TWO = Objective(two, DIRECT, reference=False)


def named(name, **more):
    return Training(objective=f"{__name__}:{name}", **more)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (named("CRITIQUE"), r"needs 'critique', which is not a sequence of a pair; it can need chosen, rejected, "),
        (
            named("NEARLY"),
            r"needs 'chosen_after_reject', .*; did you mean 'chosen_after_rejected'\?",
        ),
        (named("NONE"), r"needs 'nothing', which is not a sequence of a pair"),
        (
            named("TWO"),
            r"must take \(policy, reference, training\), but takes \(policy, reference\): ",
        ),
        (named("plain"), r"is of type function, but must be an evolve_ray\.train\.objectives\.Objective"),
    ],
)
def test_a_wrong_objective_is_refused_before_anything_runs(training, message):
    with pytest.raises(UserError, match=r"^offline\.training\.objective: '.*' " + message):
        find(training, "offline.training")


def test_an_objective_gets_its_options_checked():
    objective = find(named("SIMPO", beta=2.0, objective_args={"gamma": 1.0}))
    assert objective.needs == DIRECT
    loss, _ = total(objective, POLICY, {}, LENGTHS, named("SIMPO", beta=2.0))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-3)), math.log1p(math.exp(3))])
    with pytest.raises(UserError, match=r"training\.objective_args\.gama: unknown option; did you mean 'gamma'\?"):
        find(named("SIMPO", objective_args={"gama": 1.0}))


def test_sppo_regresses_on_the_win_rates_of_the_pairs():
    """By hand: eta 2, win rates .9 and .2, log-ratios .3 and -.1: ((.3 - .8)^2 + (-.1 + .6)^2) / 2 = .25."""
    numbers = {"chosen_win_rate": torch.tensor([0.9, 0.5]), "rejected_win_rate": torch.tensor([0.2, 0.5])}
    training = named("SQUARE", beta=0.5)
    loss, _ = total(find(training), POLICY, REFERENCE, LENGTHS, training, numbers)
    assert loss.tolist() == pytest.approx([0.25, 0.0], abs=1e-6)


def test_a_loss_may_have_the_weights_and_the_lengths_of_its_pairs():
    """By hand: weight .5, m = 1, log pi = -2 over 4 tokens: .5 (log(1 + e^-1) + .5) = .4066."""
    policy = {"chosen": torch.tensor([-2.0]), "rejected": torch.tensor([-4.0])}
    reference = {"chosen": torch.tensor([-2.0]), "rejected": torch.tensor([-2.0])}
    training = named("VOTED", beta=0.5)
    loss, _ = total(find(training), policy, reference, {"chosen": torch.tensor([4])}, training, {"weight": torch.tensor([0.5])})
    assert loss.tolist() == pytest.approx([0.4066], abs=1e-4)


def test_the_numbers_of_a_batch_are_those_of_its_rows():
    pairs = [{"numbers": {"weight": value, "other": 0.0}} for value in (0.25, 0.5, 1.0)]
    steps = Steps(pairs, [], named("VOTED"), VOTED, SimpleNamespace(), SimpleNamespace(device=torch.device("cpu")))
    assert steps.numbers([2, 0, 0])["weight"].tolist() == [1.0, 0.25, 0.25]
    assert steps.numbers([2])["weight"].dtype == torch.float32
    assert set(steps.numbers([1])) == {"weight"}


def raising(policy, reference, training):
    return policy["chosen"] @ torch.zeros(7), {}


def scalar(policy, reference, training):
    return policy["chosen"].mean(), {}


def no_metrics(policy, reference, training):
    return policy["chosen"]


def short_metric(policy, reference, training):
    return policy["chosen"], {"one": policy["chosen"][:1]}


def number_metric(policy, reference, training):
    return policy["chosen"], {"one": 1.0}


def out_of_memory(policy, reference, training):
    raise torch.OutOfMemoryError("CUDA out of memory")


BROKEN = {name: Objective(loss, DIRECT, reference=False) for name, loss in list(globals().items()) if callable(loss)}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            raising,
            r"raised RuntimeError: .*, at \S*test_objectives_plugs\.py:\d+; fix the plug",
        ),
        (
            scalar,
            r"returned a loss of shape \(\) for 2 pairs; it must return \(loss, metrics\) with one value",
        ),
        (no_metrics, r"returned Tensor; it must return"),
        (short_metric, r"returned the metric 'one' of shape \(1,\) for 2 pairs"),
        (number_metric, r"returned the metric 'one' of type float"),
    ],
)
def test_a_wrong_loss_is_one_sentence_and_no_lost_rank(loss, message):
    with pytest.raises(UserError, match=r"^training\.objective: '.*' " + message):
        total(BROKEN[loss.__name__], POLICY, {}, LENGTHS, named(loss.__name__))


def test_a_loss_that_runs_out_of_memory_is_no_fault_of_the_plug():
    with pytest.raises(torch.OutOfMemoryError) as raised:
        total(BROKEN["out_of_memory"], POLICY, {}, LENGTHS, named("out_of_memory"))
    assert is_full_memory(raised.value)
