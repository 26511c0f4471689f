"""The field `refine`: what it may say, what is refused and by which words, what stands where it says nothing."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_ray.config import options
from evolve_ray.refine.template import load_template
from evolve_ray.serve.errors import RequestError
from evolve_ray.serve.request import Rules
from tests.plain.serve.examples import rules


def read(body, *, stream=False, **more):
    return rules(**more).read(body, stream=stream)


def test_without_the_field_the_recipe_decides():
    found = read(None)
    assert (found.strategy.name, found.strategy.rounds, found.select) == ("chain", 4, "last")
    assert (found.unchanged, found.verified, found.show_all, found.is_direct) == (False, False, False, False)
    assert found.budget_tokens == options.Serve().max_tokens
    assert found.deadline_s is None


def test_every_field_reaches_its_place():
    body = {
        "rounds": 3, "strategy": {"name": "few_shot", "shots": 2, "show": "best"}, "select": "best", "show": "all",
        "stop": {"unchanged": True, "verified": True, "budget_tokens": 50, "deadline_s": 1.5}, "answer": "4",
    }  # fmt: skip
    found = read(body)
    strategy = found.strategy
    assert (strategy.name, strategy.rounds, strategy.shots, strategy.show) == ("few_shot", 3, 2, "best")
    assert (found.select, found.show_all, found.answer) == ("best", True, "4")
    assert (found.unchanged, found.verified, found.budget_tokens, found.deadline_s) == (True, True, 50, 1.5)


def test_short_forms_are_the_long_ones():
    short = read({"strategy": "parallel", "samples": 3, "stop": "unchanged"})
    assert short == read({"strategy": {"name": "parallel", "samples": 3}, "stop": {"unchanged": True}})
    assert read({"stop": ["verified", "unchanged"]}).verified


@pytest.mark.parametrize(
    ("body", "is_direct"),
    [
        ({"rounds": 1}, True),
        ({"rounds": 1, "strategy": "critique"}, True),
        ({"strategy": "parallel", "samples": 1}, True),
        ({"rounds": 1, "show": "all"}, False),
        ({"rounds": 1, "stop": {"budget_tokens": 9}}, False),
        ({"rounds": 1, "stop": {"deadline_s": 9}}, False),
        ({"rounds": 2}, False),
        ({"rounds": 1, "strategy": "best_of", "samples": 2}, False),
    ],
)
def test_one_round_without_more_is_the_engines_own_answer(body, is_direct):
    assert read(body).is_direct is is_direct


def test_drafts_are_shown_in_a_stream_unless_the_request_says_otherwise():
    assert read(None, stream=True).show_all
    assert not read({"show": "final"}, stream=True).show_all


def test_of_several_samples_none_is_the_last_one():
    assert read({"strategy": "parallel"}).select == "best"
    assert read({"strategy": "parallel"}, scorer=False).select == "vote"
    assert read({"strategy": "parallel", "samples": 5}).width == 5
    assert read({"strategy": "chain", "samples": 5}).width == 1


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"rounds": 0}, "refine.rounds: is 0, but must be at least 1 and at most 16", "refine.rounds"),
        ({"rounds": 17}, "refine.rounds: is 17, but must be at least 1 and at most 16", "refine.rounds"),
        ({"rounds": "3"}, "refine.rounds: must be a valid integer", "refine.rounds"),
        ({"rounds": True}, "refine.rounds: must be a valid integer", "refine.rounds"),
        ({"rounds": 2.0}, "refine.rounds: must be a valid integer", "refine.rounds"),
        ({"round": 3}, "refine.round: is not a field; did you mean 'rounds'?", "refine.round"),
        ({"x": 3}, "refine.x: is not a field; the fields here are rounds, strategy, select, stop, show, answer", "refine.x"),
        ({"strategy": "chian"}, "refine.strategy: 'chian' is not a strategy of this endpoint; did you mean 'chain'?",
         "refine.strategy"),
        ({"strategy": "evil.module:Strategy"}, "is not a strategy of this endpoint", "refine.strategy"),
        ({"strategy": {"sample": 3}}, "refine.strategy.sample: is not a field; did you mean 'samples'?",
         "refine.strategy.sample"),
        ({"strategy": {"samples": 17}}, "refine.strategy.samples: is 17", "refine.strategy.samples"),
        ({"shots": 0}, "refine.strategy.shots: is 0", "refine.strategy.shots"),
        ({"strategy": 3}, "refine.strategy: must be", "refine.strategy"),
        ({"select": "first"}, "refine.select: must be 'last', 'best' or 'vote'", "refine.select"),
        ({"show": "some"}, "refine.show: must be 'final' or 'all'", "refine.show"),
        ({"stop": {"unchangd": True}}, "refine.stop.unchangd: is not a field; did you mean 'unchanged'?", "refine.stop.unchangd"),
        ({"stop": ["unchangd"]}, "refine.stop: must be", "refine.stop"),
        ({"stop": {"budget_tokens": 0}}, "refine.stop.budget_tokens: is 0", "refine.stop.budget_tokens"),
        ({"stop": {"deadline_s": 0.0}}, "refine.stop.deadline_s: is 0, but must be above 0 and at most 600",
         "refine.stop.deadline_s"),
        ({"stop": {"deadline_s": 601.0}}, "refine.stop.deadline_s: is 601", "refine.stop.deadline_s"),
        ([], "refine: is a list, but must be an object", "refine"),
        ("chain", "refine: is a string, but must be an object", "refine"),
        (4, "refine: is a number, but must be an object", "refine"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_the_way_out(body, message, param):
    with pytest.raises(RequestError) as caught:
        read(body)
    assert message in caught.value.message
    assert caught.value.param == param
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"select": "best"}, "refine.select: 'best' needs a scorer, and this endpoint has none"),
        ({"stop": {"verified": True}}, "refine.stop.verified: this endpoint has no verifier"),
        ({"strategy": "best_of"}, "refine.strategy: 'best_of' asks a scorer, and this endpoint has none"),
        ({"strategy": {"name": "few_shot", "show": "best"}}, "refine.strategy: 'few_shot' asks a scorer"),
    ],
)
def test_what_needs_a_scorer_is_refused_where_there_is_none(body, message):
    with pytest.raises(RequestError, match=message):
        read(body, scorer=False, verifier=False)


def test_a_strategy_whose_words_the_template_lacks_is_refused():
    plain = dataclasses.replace(load_template("tiny", "conversation", "critique"), critique="")
    found = Rules(options.Strategy(), plain, options.Serve(), False, False)
    with pytest.raises(RequestError, match="needs critique, which the template of this model does not have"):
        found.read({"strategy": "critique"}, stream=False)
    assert not found.can_use("critique")
    assert found.can_use("chain")


def test_stops_of_the_recipe_hold_for_every_strategy_and_a_request_may_turn_them_off():
    recipe = Rules(options.Strategy(stop_unchanged=True, stop_right=True), load_template("tiny", "conversation", "critique"),
                   options.Serve(), True, True)  # fmt: skip
    found = recipe.read({"strategy": "critique"}, stream=False)
    assert found.unchanged
    assert found.verified
    assert not found.strategy.stop_unchanged, "or the strategy would skip rounds by a rule of its own"
    assert not recipe.read({"stop": {"unchanged": False}}, stream=False).unchanged


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("rounds", "strategy", "select", "stop", "show", "answer", "samples", "shots", "name", "unchanged", "budget_tokens")


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), json_values, max_size=4) | json_values)
def test_no_value_at_all_leads_to_anything_but_a_refinement_or_a_refusal(body):
    refused, found = None, None
    try:
        found = read(body)
    except RequestError as error:
        refused = error
    if found:
        assert 1 <= found.strategy.rounds <= 16
        assert 1 <= found.width <= 16
    else:
        assert refused
        assert refused.status == 400
        assert refused.param
        assert refused.param.startswith("refine")
