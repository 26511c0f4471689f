"""Over all rows of an iteration: the top share by the difference of scores, ties by id."""

import pytest

from evolve_ray.config.options import Selection
from evolve_ray.errors import UserError
from evolve_ray.select.pairs import make_turn
from evolve_ray.select.whole import summary, top_share


def row(pair_id, chosen, rejected, **more):
    return {"pair_id": pair_id, "chosen_score": chosen, "rejected_score": rejected, "kind": "answer"} | more


ROWS = [row("a", 1.0, 0.5), row("b", 0.5, 0.25), row("c", 1.0, 0.0), row("d", 0.75, 0.5), row("e", 0.2, 0.2)]


@pytest.mark.parametrize(("share", "kept"), [(0.2, "c"), (0.4, "ca"), (0.41, "cab"), (0.8, "cabd"), (1.0, "cabde")])
def test_top_share_is_rounded_up_and_ties_go_by_id(share, kept):
    for rows in (ROWS, ROWS[::-1]):
        assert top_share(rows, Selection(top_share=share)) == set(kept)


def test_a_row_without_two_scores_is_refused():
    with pytest.raises(UserError, match=r"selection\.top_share: pair x of kind 'critique' has no two scores to compare"):
        top_share([*ROWS, row("x", None, None, kind="critique")], Selection(top_share=0.5))


def test_what_such_a_function_sees_of_a_row():
    draft = {"draft_id": "d", "round": 2, "text": "four", "finish_reason": "stop", "kind": "critique", "score": 0.5,
             "messages": [{"role": "user", "content": "q"}]}  # fmt: skip
    seen = summary(make_turn({"prompt_id": "p", "prompt": "q"}, draft, {"weight": 2.0}))
    del seen["pair_id"]
    assert seen == {
        "prompt_id": "p", "chosen_round": 2, "rejected_round": 2, "chosen_score": 0.5, "rejected_score": 0.5, "kind": "critique",
        "numbers": {"weight": 2.0}, "chosen_length": 4, "rejected_length": 4,
    }  # fmt: skip
