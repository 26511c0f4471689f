"""The messages that are built again from stored drafts are those that the strategy asked with."""

import pytest

from evolve_ray.config.options import Strategy
from evolve_ray.refine.asked import REBUILT, asked, stores_messages
from evolve_ray.refine.strategies import ALL_STRATEGIES, responses_per_prompt
from tests.plain.refine.test_strategies import FULL, drive

CASES = {
    "chain": {}, "parallel": {"samples": 3}, "few_shot": {"shots": 2, "rounds": 5}, "critique": {}, "best_of": {"samples": 3},
    "chains": {"samples": 3},
    "several critiques": {"name": "critique", "critiques": 3},
}  # fmt: skip


@pytest.mark.parametrize("layout", ["conversation", "one_message"])
@pytest.mark.parametrize("name", CASES)
def test_built_again_as_they_were_asked(name, layout):
    options = Strategy(**{"name": name, "rounds": 3} | CASES[name])
    template = type(FULL)(**{**vars(FULL), "layout": layout})
    texts = [f"text {number} {'x' * (7 * number % 5)}" for number in range(responses_per_prompt(options))]
    asks, _ = drive(options.name, options, texts, template)
    drafts = [
        {"draft_id": f"d{n}", **{key: getattr(ask, key) for key in ("parent_id", "sample", "round", "kind")}, "text": text}
        for n, (ask, text) in enumerate(zip(asks, texts, strict=True))
    ]  # fmt: skip
    assert not stores_messages(options)
    assert [asked(template, options, "x", draft, drafts[::-1]) for draft in drafts] == [ask.messages for ask in asks]


def test_every_other_strategy_stores_its_messages():
    assert {name for name in ALL_STRATEGIES if not stores_messages(Strategy(name=name))} == set(REBUILT)
    assert stores_messages(Strategy(name="few_shot", show="best"))
    assert stores_messages(Strategy(name="my.module:Tree"))


def test_stored_messages_are_returned_as_they_are():
    shown = [{"role": "user", "content": "own words"}]
    draft = {"draft_id": "d", "parent_id": None, "messages": shown}
    assert asked(FULL, Strategy(name="my.module:Tree"), "x", draft, [draft]) == tuple(shown)
    assert asked(FULL, Strategy(name="my.module:Tree"), "x", draft | {"messages": None}, []) is None


def test_several_critiques_have_a_revision_each():
    asks, _ = drive("critique", Strategy(name="critique", rounds=3, critiques=2), list("yabcdefgh"), FULL)
    assert [(ask.kind, ask.sample, ask.round, ask.parent_id) for ask in asks] == [
        ("answer", 0, 1, None),
        ("critique", 0, 2, "d0"), ("critique", 1, 2, "d0"), ("answer", 0, 2, "d0"), ("answer", 1, 2, "d0"),
        ("critique", 0, 3, "d3"), ("critique", 1, 3, "d4"), ("answer", 0, 3, "d3"), ("answer", 1, 3, "d4"),
    ]  # fmt: skip
    assert asks[4].messages == FULL.revision("x", "y", "b")
