"""Strategies are driven by hand with a list; templates keep texts as they are and refuse what is not documented."""

from dataclasses import replace
from pathlib import Path

import pytest

from evolve_ray.config.options import Strategy
from evolve_ray.config.plugs import find_plug, with_args
from evolve_ray.errors import UserError
from evolve_ray.refine.asks import Ask, Draft, Judge, Score, Skip, Verdict, Verify
from evolve_ray.refine.strategies import (
    STRATEGIES,
    asks_scorer,
    asks_verifier,
    drafts_per_prompt,
    gives_scores,
    responses_per_prompt,
)
from evolve_ray.refine.template import FIELDS, NEEDED, Template, fill, load_template

TEMPLATE = Template(layout="conversation", first="Q: {prompt}", refine="better!", one_message="Q: {prompt}\nD: {draft}")
PARTS = {"first": "{prompt}", "refine": "again", "one_message": "{prompt} {draft}"}
TRICKY = ["{draft}", "{prompt}", "{0} {} {{prompt}}", "\\1 \\g<0>", '{"json": "{draft}"}', "%s $prompt"]


FULL = Template(
    "conversation", "Q: {prompt}", "better!", "Q: {prompt}\nD: {draft}", several="Q: {prompt}\nDs: {drafts}", critique="faults?",
    revise="mend!", critique_one_message="Q: {prompt}\nD: {draft}\nfaults?",
    revise_one_message="Q: {prompt}\nD: {draft}\nF: {critique}",
)  # fmt: skip


SCORES = []  # (draft id, value) that a strategy gave


def drive(name, options, answers, template=TEMPLATE, score=len):
    """The asks of a strategy, answered from a list in order (scores by `score` of the text), and what it returns."""
    start = with_args("strategy.args", name, STRATEGIES[name], options.args)
    strategy, asked, texts = start("x", template, options), [], iter(answers)
    reply = None
    try:
        while True:
            ask = strategy.send(reply)
            if isinstance(ask, Judge):
                assert asks_scorer(options)
                reply = [score(draft.text) for draft in ask.drafts]
                continue
            if isinstance(ask, Score):
                assert gives_scores(options)
                SCORES.append((ask.draft.draft_id, ask.value))
                reply = None
                continue
            if isinstance(ask, Verify):
                assert asks_verifier(options)
                reply = Verdict(0.0, "wrong")
                continue
            batch = ask if isinstance(ask, list) else [ask]
            drafts = [
                Draft(f"d{len(asked) + n}", next(texts), a.sample, a.round, a.parent_id, "stop") for n, a in enumerate(batch)
            ]
            asked += batch
            reply = drafts if isinstance(ask, list) else drafts[0]
    except StopIteration as end:
        assert next(texts, None) is None, "fewer asks than answers"
        return asked, end.value


def test_chain_refines_its_last_draft_round_by_round():
    asked, drafts = drive("chain", Strategy(rounds=3), ["y1", "y2", "y3"])
    assert [draft.text for draft in drafts] == ["y1", "y2", "y3"]
    assert [(ask.round, ask.sample, ask.parent_id) for ask in asked] == [(1, 0, None), (2, 0, "d0"), (3, 0, "d1")]
    assert [ask.messages for ask in asked] == [
        TEMPLATE.direct("x"),
        TEMPLATE.refinement("x", "y1"),
        TEMPLATE.refinement("x", "y2"),
    ]


def test_chain_of_one_round_asks_once():
    asked, drafts = drive("chain", Strategy(rounds=1), ["y1"])
    assert (len(asked), [draft.text for draft in drafts]) == (1, ["y1"])


def test_parallel_asks_for_all_samples_at_once_from_the_prompt_alone():
    asked, drafts = drive("parallel", Strategy(name="parallel", samples=3), ["a", "b", "c"])
    assert asked == [Ask(TEMPLATE.direct("x"), sample=n, round=1) for n in range(3)]
    assert [draft.text for draft in drafts] == ["a", "b", "c"]


def test_chains_ask_for_a_whole_round_of_all_chains_at_once():
    asked, drafts = drive("chains", Strategy(name="chains", samples=2, rounds=2), ["a", "b", "a2", "b2"])
    assert asked[:2] == [Ask(TEMPLATE.direct("x"), sample=n, round=1) for n in range(2)]
    refined = [(draft, Ask(TEMPLATE.refinement("x", draft.text), n, 2, draft.draft_id)) for n, draft in enumerate(drafts[:2])]
    assert asked[2:] == [ask for _, ask in refined]
    assert [(draft.text, draft.sample, draft.round) for draft in drafts] == [("a", 0, 1), ("b", 1, 1), ("a2", 0, 2), ("b2", 1, 2)]
    assert drafts_per_prompt(Strategy(name="chains", samples=2, rounds=2)) == 4


def contents(ask):
    return [message["content"] for message in ask.messages]


def test_few_shot_shows_the_last_drafts_in_order():
    asked, drafts = drive("few_shot", Strategy(name="few_shot", rounds=4, shots=2), ["y1", "y2", "y3", "y4"])
    assert [contents(ask) for ask in asked] == [
        ["Q: x"],
        ["Q: x", "y1", "better!"],
        ["Q: x", "y1", "better!", "y2", "better!"],
        ["Q: x", "y2", "better!", "y3", "better!"],
    ]
    assert [ask.parent_id for ask in asked] == [None, "d0", "d1", "d2"]
    assert len(drafts) == 4


def test_few_shot_shows_the_best_drafts_the_best_of_them_last():
    answers = ["aaa", "a", "aaaa", "aa"]
    asked, _ = drive("few_shot", Strategy(name="few_shot", rounds=4, shots=2, show="best"), answers)
    assert contents(asked[2]) == ["Q: x", "a", "better!", "aaa", "better!"]
    assert contents(asked[3]) == ["Q: x", "aaa", "better!", "aaaa", "better!"]
    assert [ask.parent_id for ask in asked] == [None, "d0", "d0", "d2"]


def test_few_shot_in_one_message_numbers_the_drafts():
    template = Template(**{name: getattr(FULL, name) for name in FIELDS}, layout="one_message")
    asked, _ = drive("few_shot", Strategy(name="few_shot", rounds=3), ["y1", "y2", "y3"], template)
    assert contents(asked[1]) == ["Q: x\nD: y1"]
    assert contents(asked[2]) == ["Q: x\nDs: (1) y1\n\n(2) y2"]


def test_critique_comes_between_a_draft_and_the_next():
    asked, drafts = drive("critique", Strategy(name="critique", rounds=2), ["y1", "c1", "y2"], FULL)
    assert [(ask.kind, ask.round, ask.parent_id) for ask in asked] == [
        ("answer", 1, None),
        ("critique", 2, "d0"),
        ("answer", 2, "d0"),
    ]
    assert contents(asked[1]) == ["Q: x", "y1", "faults?"]
    assert contents(asked[2]) == ["Q: x", "y1", "faults?", "c1", "mend!"]
    assert [draft.text for draft in drafts] == ["y1", "c1", "y2"]


def test_feedback_shows_the_verifiers_words_until_the_draft_is_right():
    strategy = STRATEGIES["feedback"]("x", FULL, Strategy(name="feedback", rounds=4))
    first = next(strategy)
    assert first == Ask(FULL.direct("x"), 0, 1)
    drafts = [Draft(f"d{number}", f"y{number}", 0, number, None, "stop") for number in (1, 2)]
    assert strategy.send(drafts[0]) == Verify(drafts[0])
    ask = strategy.send(Verdict(0.0, "line 2 fails"))
    assert [message["content"] for message in ask.messages] == ["Q: x", "y1", "line 2 fails\n\nbetter!"]
    assert (ask.round, ask.parent_id) == (2, "d1")
    assert strategy.send(drafts[1]) == Verify(drafts[1])
    assert strategy.send(Verdict(1.0)) == Skip(drafts[1], (3, 4), "right")
    one = replace(FULL, layout="one_message").after_feedback("x", "y", "no")
    assert one == ({"role": "user", "content": "Q: x\nD: y\nF: no"},)


def test_critique_in_one_message_holds_draft_and_critique():
    template = Template(**{name: getattr(FULL, name) for name in FIELDS}, layout="one_message")
    asked, _ = drive("critique", Strategy(name="critique", rounds=2), ["y1", "c1", "y2"], template)
    assert contents(asked[1]) == ["Q: x\nD: y1\nfaults?"]
    assert contents(asked[2]) == ["Q: x\nD: y1\nF: c1"]


def test_best_of_refines_the_best_of_each_round():
    options = Strategy(name="best_of", rounds=2, samples=3)
    asked, drafts = drive("best_of", options, ["aa", "aaaa", "a", "b", "c", "d"])
    assert [contents(ask) for ask in asked] == [["Q: x"]] * 3 + [["Q: x", "aaaa", "better!"]] * 3
    assert [(ask.sample, ask.round, ask.parent_id) for ask in asked[3:]] == [(n, 2, "d1") for n in range(3)]
    assert len(drafts) == 6


def test_best_of_takes_the_earliest_of_equal_drafts():
    options = Strategy(name="best_of", rounds=2, samples=3)
    asked, _ = drive("best_of", options, ["bb", "aa", "cc", "b", "c", "d"])
    assert asked[3].parent_id == "d0"


@pytest.mark.parametrize("name", STRATEGIES)
def test_estimate_of_drafts_is_what_the_strategy_makes(name):
    options = Strategy(name=name, rounds=3, samples=5)
    asked, drafts = drive(name, options, ["y"] * responses_per_prompt(options), FULL)
    assert len(asked) == len(drafts) == responses_per_prompt(options)
    assert sum(ask.kind == "answer" for ask in asked) == drafts_per_prompt(options)


def test_a_model_rates_its_own_drafts_and_the_mean_of_the_readable_ratings_is_the_score():
    SCORES.clear()
    replies = ["good. Rating: 8", "Rating: 5", "Rating: 11", "no", "maybe", "rating: 12"]
    options = Strategy(name="self_judge", samples=2, args={"votes": 3, "temperature": 0.5})
    asked, drafts = drive("self_judge", options, ["a", "b", *replies], load_template("tiny_judge", "conversation", "self_judge"))
    assert SCORES == [("d0", 6.5)], "a draft without a readable rating has no score"
    assert [(ask.kind, ask.parent_id, ask.temperature) for ask in asked[2:6]] == [("verdict", "d0", 0.5)] * 3 + [
        ("verdict", "d1", 0.5)
    ]
    assert asked[2].messages == ({"role": "user", "content": "judge x a"},)
    assert [draft.text for draft in drafts] == ["a", "b", *replies]


def test_a_template_without_a_question_to_a_judge_uses_the_scorers():
    (message,) = load_template("default", "conversation", "self_judge").judgement("x", "{low}", 1.0, 5.0)
    assert "scale from 1 to 5" in message["content"]
    assert "Response:\n{low}\n" in message["content"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_shipped_templates_have_what_every_strategy_needs(name):
    for template in ("default", "tiny"):
        assert load_template(template, "conversation", name)


def test_conversation_puts_the_draft_into_the_models_own_turn():
    assert TEMPLATE.refinement("x", "y") == (
        {"role": "user", "content": "Q: x"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "better!"},
    )


def test_one_message_puts_question_and_draft_into_one_turn():
    template = Template("one_message", TEMPLATE.first, TEMPLATE.refine, TEMPLATE.one_message)
    assert template.refinement("x", "y") == ({"role": "user", "content": "Q: x\nD: y"},)
    assert template.direct("x") == ({"role": "user", "content": "Q: x"},)


@pytest.mark.parametrize("text", TRICKY)
def test_braces_and_backslashes_in_prompts_and_drafts_stay_text(text):
    one = Template("one_message", "{prompt}", "z", "<{prompt}|{draft}>")
    assert one.refinement(text, text)[0]["content"] == f"<{text}|{text}>"
    assert TEMPLATE.refinement(text, text)[1]["content"] == text
    assert TEMPLATE.direct(text)[0]["content"] == f"Q: {text}"


def test_unknown_field_of_a_template_stays_text():
    assert fill("\\frac{a}{b} {prompt}", prompt="x") == "\\frac{a}{b} x"


@pytest.mark.parametrize("layout", ["conversation", "one_message"])
@pytest.mark.parametrize("name", ["default", "tiny"])
def test_shipped_template_shows_prompt_and_draft(name, layout):
    template = load_template(name, layout)
    shown = "\n".join(message["content"] for message in template.refinement("the prompt", "the draft"))
    assert template.layout == layout
    assert "the prompt" in shown
    assert "the draft" in shown


def write(path: Path, **parts: str) -> str:
    path.write_text("".join(f"{name} = '''{text}'''\n" for name, text in parts.items()), encoding="utf-8")
    return str(path)


def test_users_own_template_is_a_file(tmp_path):
    template = load_template(write(tmp_path / "own.toml", **PARTS | {"refine": "\nagain\n"}), "conversation")
    assert template == Template("conversation", "{prompt}", "again", "{prompt} {draft}")


@pytest.mark.parametrize("part", PARTS)
def test_template_without_a_part_is_refused_by_its_name(tmp_path, part):
    path = write(tmp_path / "own.toml", **{name: text for name, text in PARTS.items() if name != part})
    with pytest.raises(UserError, match=rf"own\.toml: {part}: is missing or empty"):
        load_template(path, "conversation")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"refine": "  "}, "refine: is missing or empty"),
        ({"system": "be good"}, "system: is not a part of a template; the parts are first, refine, one_message, several"),
        ({"first": "the prompt"}, r"first: has no field \{prompt\}"),
        ({"one_message": "{prompt}"}, r"one_message: has no field \{draft\}"),
        ({"one_message": "{draft}"}, r"one_message: has no field \{prompt\}"),
    ],
)
def test_faulty_part_of_a_template_is_named(tmp_path, parts, message):
    with pytest.raises(UserError, match=rf"own\.toml: {message}"):
        load_template(write(tmp_path / "own.toml", **PARTS | parts), "conversation")


@pytest.mark.parametrize(("strategy", "part"), [(name, part) for name, parts in NEEDED.items() for part in parts])
def test_template_without_what_the_strategy_needs_is_refused(tmp_path, strategy, part):
    text = "{prompt} {draft} {drafts} {critique}"
    path = write(tmp_path / "own.toml", **{name: text for name in FIELDS if name != part})
    assert load_template(path, "conversation", "chain")
    with pytest.raises(UserError, match=rf"own\.toml: {part}: is missing or empty; strategy '{strategy}' needs"):
        load_template(path, "conversation", strategy)


@pytest.mark.parametrize("data", [b"first = ", b"first = '\xff'"])
def test_template_file_that_is_no_toml_is_refused(tmp_path, data):
    (tmp_path / "own.toml").write_bytes(data)
    with pytest.raises(UserError, match=r"own\.toml: is not a valid TOML file"):
        load_template(str(tmp_path / "own.toml"), "conversation")


def test_unknown_template_lists_the_shipped_ones():
    with pytest.raises(UserError, match=r"template\.name: no template 'fancy'; use one of default, tiny"):
        load_template("fancy", "conversation")


def test_hash_of_a_template_changes_with_every_part_and_the_layout():
    base = {"layout": "conversation", **dict.fromkeys(FIELDS, "text")}
    changed = [base | {name: base[name] + "!"} for name in base]
    assert len({Template(**fields).hash for fields in [base, *changed]}) == len(base) + 1


def test_plug_is_found_by_short_name_and_by_module():
    assert find_plug(STRATEGIES, "chain", "strategy.name") is STRATEGIES["chain"]
    assert find_plug({}, "evolve_ray.refine.strategies:chain", "strategy.name") is STRATEGIES["chain"]


@pytest.mark.parametrize("name", ["no_such_module:Thing", "evolve_ray.refine.asks:Thing", "evolve_ray.nothing:Thing"])
def test_plug_that_cannot_be_loaded_is_refused_by_field(name):
    with pytest.raises(UserError, match=f"strategy.name: '{name}' cannot be loaded"):
        find_plug({}, name, "strategy.name")


def test_plug_with_a_relative_module_is_refused_by_field():
    with pytest.raises(UserError, match=r"strategy\.name"):
        find_plug({}, ".mine:Thing", "strategy.name")
