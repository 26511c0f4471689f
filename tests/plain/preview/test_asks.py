"""The asks of a strategy without an engine: also where it asks the verifier, takes options, or breaks."""

from dataclasses import replace

import pytest

from evolve_ray.config.load import load
from evolve_ray.errors import UserError
from evolve_ray.preview.asks import run_strategy
from evolve_ray.refine.asks import Ask
from evolve_ray.refine.template import load_template


def asks_of(recipe, name, **args):
    config = load(recipe(), ["prompts.answer_column=a", "verifier.name=exact", "strategy.rounds=2"])
    config = replace(config, strategy=replace(config.strategy, name=name, args=args))
    return run_strategy(config, load_template("default", "conversation", "feedback"), {"prompt_id": "p", "prompt": "q"})


def several(prompt, template, options, args):
    yield [Ask(template.direct(prompt), number, 1) for number in range(args["times"])]


def broken(prompt, template, options):
    yield Ask(template.direct(prompt), 0, 1)
    raise KeyError("plan")


def test_the_verifiers_words_are_a_placeholder(recipe):
    asks = asks_of(recipe, "feedback")
    assert [ask.round for ask in asks] == [1, 2]
    assert "[what the verifier says]" in asks[1].messages[-1]["content"]


def test_a_strategy_gets_its_options(recipe):
    assert len(asks_of(recipe, f"{__name__}:several", times=3)) == 3


def test_a_strategy_that_breaks_is_one_sentence(recipe):
    with pytest.raises(
        UserError, match=r"strategy\.name: '.*:broken' raised KeyError: 'plan', at \S*test_asks\.py:\d+; fix the plug"
    ):
        asks_of(recipe, f"{__name__}:broken")
