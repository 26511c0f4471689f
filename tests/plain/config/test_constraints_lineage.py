"""What a training starts from and which rows are mixed in: the recipes that are refused, by a sentence each."""

import pytest

from evolve_ray.config.load import load
from evolve_ray.errors import UserError
from evolve_ray.inputs.plugs import check_plugs
from evolve_ray.stages.measures import with_options
from evolve_ray.train.objectives import DIRECT, Objective

GRADIENT = ["training.objective=policy_gradient", "selection.name=advantages", "strategy.name=parallel", "strategy.samples=4"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.replay=0.6", "training.given=0.4", "activation.path=t"], r"training\.replay.*together they must be below 1"),
        (["training.replay=1.0"], r"training\.replay.*together they must be below 1"),
        (["training.given=0.2"], r"training\.given.*takes rows of the \[activation\] triples"),
        (["activation.path=t", "activation.training.replay=0.2"], r"activation\.training\.replay.*set it in \[training\]"),
        (["activation.path=t", "activation.training.start=initial"], r"activation\.training\.start.*set it in \[training\]"),
        ([*GRADIENT, "training.replay=0.2"], r"training\.replay.*answers of earlier iterations come from other policies"),
        ([*GRADIENT, "training.start=initial"], r"training\.start.*starts from the policy that wrote the answers"),
        ([*GRADIENT, "training.given=0.2", "activation.path=t"], r"training\.given.*no advantages and no turns"),
        (["training.start=first"], r"training\.start"),
        (["prompts.again=always"], r"prompts\.again"),
    ],
)
def test_recipe_is_refused(recipe, overrides, said):
    with pytest.raises(UserError, match=said):
        load(recipe(), overrides)


@pytest.mark.parametrize("name", ["training.replay", "training.given"])
def test_a_decision_cannot_change_which_stages_an_iteration_has(recipe, name):
    with pytest.raises(UserError, match=rf"iteration 1: changes '{name}'"):
        with_options(load(recipe()), {name: 0.2}, "iteration 1")


WEIGHTED = Objective(lambda policy, reference, training, numbers: (policy["chosen"], {}), DIRECT, False, numbers=("weight",))


def test_triples_are_refused_for_an_objective_of_ones_own_that_needs_numbers(recipe):
    config = load(recipe(), ["training.given=0.2", "activation.path=t", f"training.objective={__name__}:WEIGHTED"])
    with pytest.raises(UserError, match=r"training\.given: triples have no numbers and no turns, but objective .* needs weight"):
        check_plugs(config)


def test_shares_below_one_are_taken(recipe):
    config = load(recipe(), ["training.replay=0.6", "training.given=0.3", "training.start=initial", "activation.path=t"])
    assert (config.training.replay, config.training.given, config.training.start) == (0.6, 0.3, "initial")
    load(recipe(), GRADIENT)
