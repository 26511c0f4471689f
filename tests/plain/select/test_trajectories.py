"""Whole lines of turns over others, from lists of answers: self-rewarding correction (2502.19613), critiques of one draft."""

import random

import pytest

from evolve_ray.config.options import Selection, Strategy
from evolve_ray.refine.asks import Ask, Draft
from evolve_ray.refine.strategies import critique
from evolve_ray.refine.template import load_template
from evolve_ray.select.check import check_selected
from evolve_ray.select.trajectories import TrajectoriesArgs, trajectories

PROMPT = {"prompt_id": "p", "prompt": "sort:cab", "file": "f", "line": 1}
TEMPLATE = load_template("tiny", "conversation")


def self_correct(prompt, template, options):
    """Each sample answers, says whether that is right, and corrects it only if not."""
    drafts = yield [Ask(template.direct(prompt), sample, 1) for sample in range(options.samples)]
    asks = [Ask(template.critical(prompt, d.text), d.sample, 2, d.draft_id, "verdict") for d in drafts]
    verdicts = yield asks
    wrong = [(d, v) for d, v in zip(drafts, verdicts, strict=True) if v.text != "right"]
    yield [Ask(template.revision(prompt, d.text, v.text), d.sample, 3, d.draft_id) for d, v in wrong]


def drive(strategy, texts, scores):
    """(answers, others) of a strategy whose asks are answered from a list, each with its messages; `scores` by text."""
    rows, texts, reply = [], iter(texts), None
    while True:
        try:
            asks = strategy.send(reply)
        except StopIteration:
            break
        reply = []
        for ask in asks if isinstance(asks, list) else [asks]:
            text, name = next(texts), f"d{len(rows)}"
            reply.append(Draft(name, text, ask.sample, ask.round, ask.parent_id, "stop"))
            answer = ask.kind == "answer"
            place = {"parent_id": ask.parent_id, "sample": ask.sample, "round": ask.round, "kind": ask.kind}
            score = scores.get(text, 0.0) if answer else None
            rows.append(
                {"draft_id": name, **place, "text": text, "finish_reason": "stop", "score": score, "messages": list(ask.messages)}
            )
        reply = reply if isinstance(asks, list) else reply[0]
    assert next(texts, None) is None, "fewer asks than answers"
    return [row for row in rows if row["kind"] == "answer"], [row for row in rows if row["kind"] != "answer"]


def run(answers, others, turns=2, **settings):
    result = trajectories(PROMPT, answers, Selection(name="trajectories", **settings), others, TrajectoriesArgs(turns))
    check_selected("trajectories", PROMPT, [*answers, *others], result)
    return result


CORRECTED = ["abc", "acb", "cab", "right", "wrong", "right", "abd"]  # three answers, their verdicts, one correction


def test_chain_whose_verdict_is_right_has_no_further_ask_and_its_turn_did_not_happen():
    answers, others = drive(self_correct(PROMPT["prompt"], TEMPLATE, Strategy(samples=3)), CORRECTED, {"abc": 1.0, "abd": 0.5})
    assert [(row["sample"], row["text"]) for row in answers if row["round"] == 3] == [(1, "abd")]
    (row,), rejected = run(answers, others, turns=3)
    assert (row["chosen"], row["rejected"], row["context"]) == ("abc", "cab", list(TEMPLATE.direct("sort:cab")))
    assert [(turn["name"], turn["text"]) for turn in row["turns"]] == [
        ("chosen_2", "right"), ("rejected_2", "right"), ("chosen_3", ""), ("rejected_3", ""),
    ]  # fmt: skip
    assert row["turns"][0]["context"][1]["content"] == "abc"
    assert len(rejected) == 3
    both, _ = run(answers, others, turns=3, max_pairs=2)
    assert len(both) == 1, "the third trajectory has nobody left"


def test_longer_trajectory_than_the_objective_reads_is_in_no_row():
    answers, others = drive(self_correct(PROMPT["prompt"], TEMPLATE, Strategy(samples=3)), CORRECTED, {"abc": 1.0, "abd": 2.0})
    (row,), _ = run(answers, others, turns=2)
    assert (row["chosen"], row["rejected"]) == ("abc", "cab")
    (row,), _ = run(answers, others, turns=3)
    assert (row["chosen"], row["turns"][2]["text"]) == ("acb", "abd")


def test_critiques_of_one_draft_are_trajectories_after_that_draft():
    strategy = critique(PROMPT["prompt"], TEMPLATE, Strategy(name="critique", rounds=2, critiques=3))
    answers, others = drive(strategy, ["acb", "c1", "c2", "c3", "cab", "abc", "bca"], {"abc": 1.0, "bca": 0.25})
    (row,), rejected = run(answers, others)
    assert (row["chosen"], row["rejected"], row["kind"]) == ("c2", "c1", "critique")
    assert row["context"] == list(TEMPLATE.critical("sort:cab", "acb"))
    assert [(turn["name"], turn["text"]) for turn in row["turns"]] == [("chosen_2", "abc"), ("rejected_2", "cab")]
    assert sorted(row["id"] for row in rejected) == ["d0", "d3", "d6"]


def test_margin_equal_texts_and_cut_turns():
    strategy = lambda: critique(PROMPT["prompt"], TEMPLATE, Strategy(name="critique", rounds=2, critiques=2))  # noqa: E731
    answers, others = drive(strategy(), ["acb", "c1", "c2", "cab", "abc"], {"abc": 1.0})
    assert run(answers, others, margin=1.0)[0] == []
    others[1]["finish_reason"] = "length"
    assert run(answers, others)[0] == []
    assert len(run(answers, others, allow_cut=True)[0]) == 1
    same, remarks = drive(strategy(), ["acb", "c1", "c1", "abc", "abc"], {})
    same[-1]["score"] = 1.0
    assert run(same, remarks)[0] == []


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_drafts_changes_nothing(seed):
    answers, others = drive(self_correct(PROMPT["prompt"], TEMPLATE, Strategy(samples=3)), CORRECTED, {"abc": 1.0, "abd": 0.5})
    rng = random.Random(seed)
    assert run(rng.sample(answers, len(answers)), rng.sample(others, 3), 3) == run(answers, others, 3)


def test_rows_of_the_same_texts_are_one_row():
    strategy = critique(PROMPT["prompt"], TEMPLATE, Strategy(name="critique", rounds=2, critiques=4))
    answers, others = drive(strategy, ["acb", "good", "good", "bad", "bad", "abc", "abc", "cab", "cab"], {"abc": 1.0})
    rows, rejected = run(answers, others, max_pairs=4)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("good", "bad")]
    assert len(rejected) == 5
