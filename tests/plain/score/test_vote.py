"""The votes of a prompt's drafts as their scores."""

import pytest

from evolve_ray.config.options import Scorer, Verifier
from evolve_ray.errors import UserError
from evolve_ray.score.combined import build_scorer

NUMERIC = Verifier(name="numeric")


def vote(texts, prompts=None, verifier=NUMERIC, **args):
    scorer = build_scorer(Scorer(name="vote", args=args), {}, None, grading=verifier)
    return scorer(prompts or ["p"] * len(texts), [None] * len(texts), texts)


def test_the_score_is_the_share_of_the_prompts_drafts_with_the_same_answer():
    assert vote(["so 7", "7.0", "it is 7", "3"]) == [0.75, 0.75, 0.75, 0.25]
    assert vote(["a", "a ", "b"], verifier=None) == [2 / 3, 2 / 3, 1 / 3]


def test_prompts_vote_apart_in_any_order():
    assert vote(["7", "1", "7", "2"], ["p", "q", "p", "q"]) == [1.0, 0.5, 1.0, 0.5]
    chat = ({"role": "user", "content": "p"},)
    assert vote(["7", "7"], [chat, chat]) == [1.0, 1.0]


def test_the_majority_gets_1_and_of_a_tie_one_answer_whatever_the_order():
    assert vote(["7", "7", "9", "3"], reward="majority") == [1.0, 1.0, 0.0, 0.0]
    assert vote(["9", "7", "9", "7"], reward="majority") == [0.0, 1.0, 0.0, 1.0]
    assert vote(["7", "9", "7", "9"], reward="majority") == [1.0, 0.0, 1.0, 0.0]


def test_a_wrong_reward_is_refused_with_the_names():
    with pytest.raises(UserError, match=r"scorer.args.reward: .*share, majority"):
        vote(["7"], reward="most")


def test_the_scores_of_a_strategy_cannot_be_asked_for():
    with pytest.raises(UserError, match=r"scorer\.name: is 'strategy', so there is no scorer"):
        build_scorer(Scorer(name="strategy"), {}, None)(["p"], [None], ["r"])
