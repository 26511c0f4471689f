"""The final answer of a strategy: by hand, with its tokens and its difference to the chain."""

import pytest

from evolve_ray.evaluate.figures import summarise
from evolve_ray.evaluate.final_answers import PICKS, add_final_answers, affordable, final_answers

PROMPTS = [{"prompt_id": "p1", "split": "held"}, {"prompt_id": "p2", "split": "held"}]


def equal(first, second):
    return first == second


def row(prompt, sample, round, text, kind="answer", tokens=2):
    return {
        "draft_id": f"{prompt}-{sample}-{round}-{kind}", "prompt_id": prompt, "split": "held", "sample": sample, "round": round,
        "text": text, "kind": kind, "num_tokens": tokens, "finish_reason": "stop",
    }  # fmt: skip


def scores(rows, right):
    return [
        {
            "draft_id": r["draft_id"],
            "prompt_id": r["prompt_id"],
            "score": float(len(r["text"])),
            "correct": float(r["text"] in right),
        }
        for r in rows
        if r["kind"] == "answer"
    ]


ANSWERS = [row("p1", n, 1, text) | {"score": score} for n, (text, score) in enumerate([("7", 1.0), ("3", 5.0), ("7", 2.0)])]


@pytest.mark.parametrize(("pick", "sample"), [("last", 2), ("best", 1), ("vote", 0)])
def test_what_is_picked(pick, sample):
    assert PICKS[pick](ANSWERS, equal)["sample"] == sample
    assert PICKS[pick](ANSWERS[::-1], equal)["sample"] == sample
    assert PICKS[pick]([], equal) is None


def test_ties_go_to_the_earliest():
    tied = [row("p1", n, 1, text) | {"score": 1.0} for n, text in enumerate("7373")]
    assert (PICKS["vote"](tied[::-1], equal)["sample"], PICKS["best"](tied[::-1], equal)["sample"]) == (0, 0)


def test_figures_of_the_final_answer_and_its_difference_to_the_chain():
    """Chain: wrong, right. Votes: 7 7 3 (7 is right) with a critique of 5 tokens; p2 3 3 7, so the vote is wrong."""
    chain = [row("p1", 0, 1, "3"), row("p2", 0, 1, "7")]
    samples = [row("p1", n, 1, text) for n, text in enumerate("773")] + [row("p2", n, 1, text) for n, text in enumerate("337")]
    samples.append(row("p1", 0, 1, "why", kind="critique", tokens=5))
    summary = summarise(PROMPTS, chain, scores(chain, "7"))
    tables = ((chain, scores(chain, "7")), (samples, scores(samples, "7")))
    add_final_answers(summary, PROMPTS, *tables, name="parallel", pick="vote", same=equal)
    figures = summary["held"]["strategy"]
    assert (figures["name"], figures["pick"], figures["n"], figures["mean_tokens"]) == ("parallel", "vote", 2, (6 + 5 + 6) / 2)
    assert figures["exact_match"]["mean"] == 0.5
    assert figures["difference"]["exact_match"]["mean"] == 0.0
    assert summary["held"]["rounds"]["1"]["exact_match"]["mean"] == 0.5, "the chain stays as it is beside it"


def test_at_the_tokens_of_the_chain_a_prompt_gets_the_responses_that_its_chain_pays_for():
    """p1: the chain has 4 tokens, which pay for 2 of 3 votes; p2: 2 tokens for 1."""
    chain = [row("p1", 0, 1, "3"), row("p1", 0, 2, "7"), row("p2", 0, 1, "7", tokens=1), row("p2", 0, 2, "7", tokens=1)]
    samples = [row("p1", n, 1, text) for n, text in enumerate("737")] + [row("p2", n, 1, text) for n, text in enumerate("377")]
    tables = ((chain, scores(chain, "7")), (samples, scores(samples, "7")))
    figures = final_answers(["held"], PROMPTS, *tables, name="parallel", pick="vote", same=equal)["held"]
    assert (figures["mean_tokens"], figures["exact_match"]["mean"]) == (6, 1.0)
    part = figures["at_chain_tokens"]
    assert (part["mean_tokens"], part["exact_match"]["mean"], part["num_capped"]) == (3, 0.5, 0)
    assert part["difference"]["exact_match"]["mean"] == -0.5


def test_critiques_count_before_their_answer_and_verdicts_after_it():
    first, remark, second = row("p1", 0, 1, "3"), row("p1", 0, 2, "why", "critique"), row("p1", 0, 2, "7")
    remark["parent_id"] = second["parent_id"] = first["draft_id"]
    rows = [second, remark, first]
    assert [affordable(rows, budget) for budget in (0, 3, 4, 6)] == [[first], [first], [first, remark], [first, remark, second]]
    verdict, other = row("p1", 0, 1, "Rating: 3", "verdict"), row("p1", 1, 1, "7")
    verdict["parent_id"] = first["draft_id"]
    assert affordable([verdict, other, first], 6) == [first, other, verdict]


def test_what_a_strategy_returned_last_is_picked_and_without_a_mark_the_last_round():
    first, second = row("p1", 0, 1, "7"), row("p1", 0, 2, "3")
    assert PICKS["returned"]([second, first], equal) == second
    assert PICKS["returned"]([second, {**first, "returned_last": True}], equal)["text"] == "7"


def test_a_prompt_whose_final_answer_has_no_score_is_left_out():
    chain = [row("p1", 0, 1, "3")]
    summary = summarise(PROMPTS, chain, scores(chain, "7"))
    add_final_answers(summary, PROMPTS, (chain, scores(chain, "7")), (chain, []), name="s", pick="last", same=equal)
    assert "strategy" not in summary["held"]
