"""Plugs of a recipe are checked by kind before anything runs."""

import pytest

from evolve_ray.config.load import load
from evolve_ray.driver import main
from evolve_ray.errors import UserError
from evolve_ray.inputs.plugs import check_plugs
from evolve_ray.refine.asks import Ask

VERIFIED = ["prompts.answer_column=a"]
HERE = __name__


def two(prompt, template):
    yield


def many(prompt, template, options, more="nothing"):
    yield


class NoCall:
    pass


class TwoColumns:
    def __call__(self, prompts, responses):
        return []


class NeedsFolder:
    def __init__(self, folder):
        pass

    def __call__(self, prompts, answers, responses):
        return []


class WithArgs:
    def __init__(self, args):
        pass

    def __call__(self, prompts, answers, responses):
        return []


NUMBER = 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy.name={}:two"], r"strategy\.name: '.*' must take \(prompt, template, options\), but takes \(prompt, template\)"
                                   r": too many positional arguments; see test_plugs\.py:\d+"),
        (["selection.name={}:two"], r"selection\.name: '.*:two' must take \(prompt, drafts, options\)"),
        (["controller.name={}:NUMBER"], r"controller\.name: '.*:NUMBER' is of type int, but must take \(models, options\)"),
        (["engine.name={}:two", "engine.args.a=1"], None),
        (["engine.name={}:NeedsFolder"], r"engine\.name: '.*' must take \(spec, chat\), but takes \(folder\)"),
        (["scorer.name={}:NoCall"], r"scorer\.name: '.*:NoCall' has no method __call__\(prompts, answers, responses\); add it"),
        (["scorer.name={}:TwoColumns"], r"scorer\.name: '.*' must take in __call__ \(self, prompts, answers, responses\), "),
        (["scorer.name={}:two"], r"scorer\.name: '.*' must take no arguments when it is made, beside `args`: \(\), but takes"),
        (["verifier.name={}:NeedsFolder", *VERIFIED], r"verifier\.name: '.*' must take no arguments when it is made"),
        (["verifier.name={}:WithArgs", "verifier.args.a=1", *VERIFIED], None),
        (["strategy.name={}:many", "strategy.args.a=1"], r"strategy\.args: holds a, but '.*:many' takes no `args`"),
        (["strategy.args.a=1"], r"strategy\.args: holds a, but 'chain' takes no `args`; remove the table"),
        (["scorer.args.a=1"], r"scorer\.args: has no effect with scorer 'reward_model'; remove it"),
        (["verifier.args.a=1", "verifier.name=exact", *VERIFIED], r"verifier\.args: holds a, but 'exact' takes no `args`"),
        (["training.objective_args.a=1"], r"training\.objective_args: holds a, but 'evolve' takes no `args`"),
    ],
)  # fmt: skip
def test_plugs_are_checked_by_kind(recipe, overrides, message):
    config = load(recipe(), [override.format(HERE) for override in overrides])
    if message is None:
        check_plugs(config)
    else:
        with pytest.raises(UserError, match=message):
            check_plugs(config)


def test_the_plan_loads_the_plugs(recipe, capsys):
    assert main([str(recipe()), "--plan", f"strategy.name={HERE}:nobody"]) == 2
    assert capsys.readouterr().err.startswith(f"error: strategy.name: '{HERE}:nobody' cannot be loaded: ")


def test_a_name_that_cannot_be_loaded_leaves_no_configuration_behind(recipe, tmp_path, capsys):
    assert main([str(recipe()), "--run", str(tmp_path / "run"), f"selection.name={HERE}:nobody"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def criticised(prompt, template, options):
    yield Ask(template.direct(prompt), 0, 1, model="critic")


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([], r"asks the model 'critic'; \[models\] has none; see test_plugs\.py:\d+"),
        (["models.critics.path=x"], r"did you mean 'critics'\?; see test_plugs\.py:\d+"),
    ],
)  # fmt: skip
def test_a_model_that_the_strategy_names_must_be_in_the_recipe(recipe, models, said):
    with pytest.raises(UserError, match=said):
        check_plugs(load(recipe(), [f"strategy.name={HERE}:criticised", *models]))


def test_a_model_of_the_recipe_is_no_fault(recipe):
    check_plugs(load(recipe(), [f"strategy.name={HERE}:criticised", "models.critic.path=x"]))
