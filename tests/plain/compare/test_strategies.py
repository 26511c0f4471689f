"""Strategies of the command line are read and checked like those of a recipe."""

import dataclasses

import pytest

from evolve_ray.compare.figures import add_strategies
from evolve_ray.compare.strategies import is_chain, read_strategies
from evolve_ray.config.load import load
from evolve_ray.config.options import Strategy
from evolve_ray.errors import UserError
from evolve_ray.evaluate.figures import summarise
from evolve_ray.report.strategies import render, strategy_rows
from tests.plain.evaluate.test_final_answers import PROMPTS, equal, row, scores


@pytest.fixture(scope="module")
def config():
    return load("jobs/recipes/tiny.toml", [])


def test_options_beside_the_name_replace_those_of_the_recipe(config):
    chain, vote, own, judged = read_strategies(
        ["chain", "parallel,samples=6,pick=vote", "critique,rounds=2", "self_judge,args.votes=2"], "best", config
    )
    assert (chain.strategy, chain.pick, is_chain(chain.strategy, 4)) == (config.strategy, "best", True)
    assert (vote.label, vote.strategy.samples, vote.pick) == ("parallel,samples=6", 6, "vote")
    assert (own.strategy, own.pick) == (Strategy(name="critique", rounds=2), "best")
    assert judged.strategy.args == {"votes": 2}
    assert not is_chain(own.strategy, 2)


def test_a_pick_alone_measures_the_recipes_strategy(config):
    assert [part.label for part in read_strategies([], "vote", config)] == ["chain"]
    assert read_strategies([], None, config) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parallel,samplse=3", r"--strategy parallel,samplse=3: strategy.samplse: unknown option; did you mean 'samples'\?"),
        ("parallel,samples=0", r"strategy.samples: is 0, but must be at least 1"),
        ("paralel", r"strategy.name: is 'paralel', but must be one of .*; did you mean 'parallel'\?"),
        ("parallel,samples", r"'samples' must have the form OPTION=VALUE"),
        ("parallel,pick=most", r"pick 'most' is unknown; choose from last, best, vote, returned"),
        ("none:Such", r"--strategy: 'none:Such' cannot be loaded"),
        ("chain,args.x=1", r"strategy.args: holds x, but 'chain' takes no `args`"),
    ],
)
def test_a_wrong_strategy_is_refused(config, text, message):
    with pytest.raises(UserError, match=message):
        read_strategies([text], None, config)


def test_one_given_twice_and_one_without_its_verifier_are_refused(config):
    with pytest.raises(UserError, match=r"--strategy chain: is given twice"):
        read_strategies(["chain", "chain"], None, config)
    with pytest.raises(UserError, match=r"--strategy feedback: asks the verifier, and the recipe has none"):
        read_strategies(["feedback"], None, dataclasses.replace(config, verifier=None))


def test_the_strategies_are_lines_of_one_table(config):
    chain = [row("p1", 0, 1, "3"), row("p1", 0, 2, "7"), row("p2", 0, 1, "7"), row("p2", 0, 2, "7")]
    votes = [row(p, n, 1, text) for p in ("p1", "p2") for n, text in enumerate("773")]
    measured = read_strategies(["parallel,samples=3,pick=vote", "chain"], None, config)
    parts = {"strategy parallel,samples=3": (votes, scores(votes, "7")), "strategy chain": (chain, scores(chain, "7"))}
    splits = summarise(PROMPTS, *parts["strategy chain"])
    add_strategies(splits, PROMPTS, parts["strategy chain"], parts, measured, equal)
    models = [{"name": "m", "splits": splits}]
    header, lines = strategy_rows(models)
    assert len(header) == len(lines[0])
    assert [(line[2], line[3], line[5].split()[0], line[6], line[9]) for line in lines if line[4] == "exact match %"] == [
        ("parallel,samples=3", "vote", "100.0", "6.0", "4.0"),
        ("chain", "last", "100.0", "4.0", "4.0"),
    ]
    assert "parallel,samples=3" in render({"models": models})
    assert render({"models": [{"name": "m", "splits": {"held": {"rounds": {}}}}]}) == ""
