"""What a training starts from and which rows are mixed in: the recipes that are refused, by a sentence each."""

import pytest

from evolve_ray.config.load import load
from evolve_ray.errors import UserError

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


def test_shares_below_one_are_taken(recipe):
    config = load(recipe(), ["training.replay=0.6", "training.given=0.3", "training.start=initial", "activation.path=t"])
    assert (config.training.replay, config.training.given, config.training.start) == (0.6, 0.3, "initial")
    load(recipe(), GRADIENT)
