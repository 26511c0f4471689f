"""The final answer of a strategy: by hand, with its tokens and its difference to the chain."""

import pytest

from evolve_ray.evaluate.figures import summarise
from evolve_ray.evaluate.final_answers import PICKS, add_final_answers

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


def test_a_prompt_whose_final_answer_has_no_score_is_left_out():
    chain = [row("p1", 0, 1, "3")]
    summary = summarise(PROMPTS, chain, scores(chain, "7"))
    add_final_answers(summary, PROMPTS, (chain, scores(chain, "7")), (chain, []), name="s", pick="last", same=equal)
    assert "strategy" not in summary["held"]
