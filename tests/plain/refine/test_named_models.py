"""The names of further models in a strategy's source."""

import functools

from evolve_ray.refine import asks
from evolve_ray.refine.asks import Ask
from evolve_ray.refine.named_models import named_models, unknown_model


def criticised(prompt, template, options, args=None):
    draft = yield Ask(template.direct(prompt), 0, 1)
    yield asks.Ask(
        template.direct(draft.text), 0, 2, kind="critique",
        model="critic",
    )  # fmt: skip
    name = "hidden"
    yield Ask((), 0, 3, model=name)


def test_names_in_the_source_of_a_strategy_are_found_with_their_lines():
    ((name, place),) = named_models(functools.partial(criticised, args={}))
    line = criticised.__code__.co_firstlineno + 4
    assert (name, place) == ("critic", f"test_named_models.py:{line}")
    assert named_models(print) == []


def test_an_unknown_name_is_told_the_nearest_one():
    assert unknown_model("", ()) == unknown_model("critic", {"critic": 1}) == ""
    assert unknown_model("critc", ["critic"]) == "asks the model 'critc'; did you mean 'critic'?"
    assert unknown_model("x", ["critic"]) == "asks the model 'x'; [models] has critic"
    assert unknown_model("critic", ()) == "asks the model 'critic'; [models] has none"
