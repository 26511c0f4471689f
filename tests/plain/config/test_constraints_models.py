"""Further models in a recipe: how they are read, which are refused, and that recipes without one keep their keys."""

import pytest

from evolve_ray.config.load import from_json, load
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError
from evolve_ray.inputs.plugs import check_plugs

OWN = ["strategy.name=tests.plugs:own", "models.critic.path=org/critic"]
TRAINED = [*OWN, "models.critic.selection.name=reflections", "models.critic.training.objective=dpo"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["models.critic.path=c"], r"models\.critic: is asked by no one: strategy 'chain' asks the policy alone"),
        ([*OWN, "models.policy.path=c"], r"models\.policy: is the name of something else in a run; use another name"),
        ([*OWN, "models.reward.path=c"], r"models\.reward: is the name of something else in a run; use another name"),
        ([*OWN, "models.Critic.path=c"], r"models\.Critic: the name must be of small letters, digits and _"),
        ([*OWN, "models.critic.pth=c"], r"models\.critic\.pth: unknown option; did you mean 'path'\?"),
        ([*OWN, "models.other.actors=2"], r"models\.other\.path: is missing and has no default"),
        ([*OWN, "models=2"], r"models: is 2 .*must be tables with names of your own, \[models\.NAME\]"),
        ([*OWN, "models.critic.training.objective=dpo"], r"models\.critic\.selection: is missing: .*set both or none"),
        ([*OWN, "models.critic.selection.name=rule"], r"models\.critic\.training: is missing: .*set both or none"),
        ([*TRAINED, "models.critic.training.objective=policy_gradient"], r"models\.critic\.training\.objective: is 'policy_grad"),
        ([*TRAINED, "models.critic.training.objective=reward"], r"models\.critic\.training\.objective.*trains a reward model"),
        ([*TRAINED, "models.critic.training.replay=0.5"], r"models\.critic\.training\.replay.*set it in \[training\]"),
        ([*TRAINED, "models.critic.selection.args.form=alone"], r"models\.critic\.selection\.args\.form: is 'alone'"),
        ([*OWN, "models.critic.path=toy:base"], r"toy: 'toy:base' is part of the tiny world"),
    ],
)
def test_recipe_is_refused(recipe, overrides, said):
    overrides = [one for one in overrides if not (one == OWN[1] and "models=2" in overrides)]
    with pytest.raises(UserError, match=said):
        load(recipe(), overrides)


def test_engine_of_a_model_is_that_of_the_recipe_with_what_it_sets_itself(recipe):
    engine = ["engine.gpus_per_actor=1.0", "engine.cpus_per_actor=2.0", "engine.args.max_num_batched_tokens=512"]
    config = load(recipe(), [*OWN, *engine, "models.critic.actors=3", "models.critic.gpus_per_actor=4.0"])
    own = config.models["critic"].engine(config.engine)
    assert (own.actors, own.cpus_per_actor, own.gpus_per_actor) == (3, 2.0, 4.0)
    assert own.args == {"max_num_batched_tokens": 512}
    other = load(recipe(), [*OWN, *engine, "models.critic.args.tensor_parallel_size=4"])
    assert other.models["critic"].engine(other.engine).args == {"tensor_parallel_size": 4}


def test_stored_configuration_gives_the_same_models_back_and_none_is_in_no_key(recipe):
    config = load(recipe(), TRAINED)
    assert from_json(resolved(config), "config.json") == config
    assert "models" not in resolved(load(recipe()), runtime=False)
    assert resolved(config, runtime=False)["models"]["critic"]["path"] == "org/critic"


def test_selection_of_a_model_is_checked_with_the_other_plugs(recipe):
    wrong = [one.replace("reflections", "reflection") for one in TRAINED]
    with pytest.raises(UserError, match=r"models\.critic\.selection\.name: .*did you mean 'reflections'\?"):
        load(recipe(), wrong)
    config = load(recipe(), [one.replace("tests.plugs:own", "evolve_ray.refine.strategies:chain") for one in TRAINED])
    check_plugs(config)
    config = load(recipe(), [*TRAINED, "strategy.name=evolve_ray.refine.strategies:chain", "models.critic.selection.args.frm=1"])
    with pytest.raises(UserError, match=r"models\.critic\.selection\.args\.frm: unknown option; did you mean 'form'\?"):
        check_plugs(config)
