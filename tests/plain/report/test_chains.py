"""The chains that a page shows: of the right kinds, the clearest first, none of them cut without a mark."""

import pytest

from evolve_ray.report.chains import KINDS, MAX_SHOWN, PER_KIND, choose, collect, is_meta_talk, kinds_of, render
from evolve_ray.store.run import Run
from tests.plain.runs import chains, make_run


def chain(*rounds, split="held", name="p"):
    """Rounds are (text, score, correct); a text that ends in "-" was cut."""
    names = ("text", "score", "correct")
    drafts = [{**dict(zip(names, given, strict=True)), "num_tokens": 3} for given in rounds]
    for draft in drafts:
        draft["finish_reason"] = "length" if draft["text"].endswith("-") else "stop"
    return {"prompt_id": f"{split}-{name}", "split": split, "prompt": {"prompt": name, "answer": None}, "rounds": drafts}


@pytest.mark.parametrize(
    ("rounds", "kinds"),
    [
        ([("a", 0.1, 0.0), ("b", 0.2, 1.0)], ["better"]),
        ([("a", 0.9, 0.0), ("b", 0.2, 1.0)], ["better"]),  # made right, whatever the score says
        ([("a", 0.9, 1.0), ("b", 1.0, 0.0)], ["worse"]),
        ([("a", 0.3, 0.0), ("b", 0.9, 1.0), ("a", 0.3, 0.0)], []),  # wrong again, but not unchanged
        ([("a", 0.3, 0.0), ("a", 0.3, 0.0)], ["wrong"]),
        ([("a", 0.3, 1.0), ("a", 0.3, 1.0)], []),
        ([("a", 0.3, None), ("a", 0.3, None)], []),  # nobody knows that it is wrong
        ([("a", 0.1, None), ("b", 0.2, None)], ["better"]),
        ([("a-", 0.3, 1.0), ("b", 0.3, 1.0)], ["cut"]),
        ([("a", 0.3, 1.0), ("Here is the improved version: a", 0.3, 1.0)], ["talk"]),
        ([("Here is the improved version: a", 0.3, 1.0), ("a", 0.3, 1.0)], []),  # no one asked for a refinement yet
        ([("a", 0.3, 1.0), ("I have fixed it-", 0.1, 0.0)], ["worse", "cut", "talk"]),
    ],
)
def test_kinds_of_a_chain(rounds, kinds):
    assert kinds_of(chain(*rounds)) == kinds


@pytest.mark.parametrize(
    "text",
    [
        "Here is the improved response:\n42",
        "Here\N{RIGHT SINGLE QUOTATION MARK}s a revised version of the answer: 42",
        "I've corrected the sum. 42",
        "42\n\nI rewrote the second step.",
        "Revised answer: 42",
        "Upon review, 42 it is.",
        "42\n\nChanges made: none.",
        "My previous answer was wrong, it is 42",
        "I apologize for the mistake; 42",
        "x" * 5000 + "\n\nI have improved the wording.",
    ],
)
def test_talk_about_the_change_is_found(text):
    assert is_meta_talk(text)


@pytest.mark.parametrize(
    "text",
    ["42", "Here is a recipe for bread.", "I have three apples.", "The answer is 42.", "Improved yields need better seeds."],
)
def test_plain_answers_are_no_talk_about_the_change(text):
    assert not is_meta_talk(text)


def test_the_middle_of_a_long_response_is_not_searched():
    assert not is_meta_talk("x" * 5000 + " I improved it. " + "x" * 5000)


def test_the_clearest_stand_first_and_all_are_counted():
    many = [chain((f"a{n}", 0.0, 0.0), (f"b{n}", n / 10, 0.0), name=f"p{n}") for n in range(1, 10)]
    chosen, totals = choose(many)
    assert [found["prompt_id"] for found in chosen] == [f"held-p{n}" for n in (9, 8, 7, 6, 5, 4)]
    assert totals == {"better": 9, "worse": 0, "wrong": 0, "cut": 0, "talk": 0}


def test_an_answer_made_right_stands_before_a_larger_gain_of_score():
    chosen, _ = choose([chain(("a", 0.0, 0.0), ("b", 0.9, 0.0), name="p"), chain(("a", 0.5, 0.0), ("b", 0.6, 1.0), name="q")])
    assert [found["prompt_id"] for found in chosen] == ["held-q", "held-p"]


def test_splits_take_turns():
    many = [chain(("a", 1.0, 1.0), ("b", n / 100, 0.0), split=split, name=f"p{n}") for n in range(9) for split in ("one", "two")]
    chosen, _ = choose(many)
    assert sorted(found["split"] for found in chosen) == ["one"] * 3 + ["two"] * 3


def test_a_chain_of_several_kinds_is_shown_once():
    chosen, totals = choose([chain(("a", 1.0, 1.0), ("I have fixed it-", 0.0, 0.0))])
    assert [found["kinds"] for found in chosen] == [["worse", "cut", "talk"]]
    assert sum(totals.values()) == 3


def test_a_conversation_is_shown_turn_by_turn_and_opens_with_its_last_one():
    shown = chain(("a", 0.1, None), ("b", 0.2, None)) | {"kinds": ["better"]}
    roles = ("system", "user", "assistant", "user")
    shown["prompt"]["prompt"] = tuple({"role": role, "content": f"<{n}>"} for n, role in enumerate(roles))
    page = render([{"model": "m", "num_chains": 1, "totals": dict.fromkeys(KINDS, 1), "chains": [shown]}])
    labels = [f'<p class="label">prompt: {role}</p><pre dir="auto">&lt;{n}&gt;</pre>' for n, role in enumerate(roles)]
    assert "".join(labels) in page
    assert "&lt;3&gt;</summary>" in page


def test_first_and_last_iteration_are_collected(tmp_path):
    level = {"held": chains([[0, 1], [1, 0]] * 20)}
    run = make_run(tmp_path, {"base": level, "iteration 1": level, "iteration 2": level, "iteration 3": level})
    models = [{"name": f"iteration {n}", "iteration": n, "splits": {"held": {"rounds": {"1": {}, "2": {}}}}} for n in (1, 2, 3)]
    found = collect(run, models)
    assert [(part["model"], part["num_chains"]) for part in found] == [("iteration 1", 40), ("iteration 3", 40)]
    assert all(len(part["chains"]) == 2 * PER_KIND for part in found)
    assert len(collect(run, models[:1])) == 1
    assert 2 * len(KINDS) * PER_KIND <= 60


def test_chains_without_a_score_in_every_round_are_not_shown(tmp_path):
    run = make_run(tmp_path, {"iteration 1": {"held": chains([[0, 1]])}})
    model = {"name": "iteration 1", "iteration": 1, "splits": {"held": {"rounds": {"1": {}, "2": {}, "3": {}}}}}
    assert collect(run, [model]) == []


def test_a_run_without_held_out_prompts_has_no_chains(tmp_path):
    assert collect(Run(tmp_path), [{"name": "base", "iteration": 0, "splits": {}}]) == []
    assert render([]) == ""


def test_a_long_text_is_cut_with_a_mark():
    text = "x" * (MAX_SHOWN + 1234)
    chosen, totals = choose([chain(("a", 0.0, 0.0), (text, 1.0, 1.0))])
    shown = render([{"model": "iteration 1", "num_chains": 1, "totals": totals, "chains": chosen}])
    assert f"{'x' * MAX_SHOWN}<span" in shown
    assert "1,234 more characters" in shown
    assert "x" * (MAX_SHOWN + 1) not in shown
