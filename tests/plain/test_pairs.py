"""Properties of pair selection that hold for whatever drafts a prompt has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_ray.config import Selection
from evolve_ray.pairs import reward_model
from evolve_ray.rows import PAIR

PROMPT = {"prompt_id": "p", "prompt": "x", "file": "f", "line": 7}


def draft(name, text, score, finish="stop"):
    return {"draft_id": name, "text": text, "round": 1, "finish_reason": finish, "score": score}


@st.composite
def candidates(draw):
    """Few texts and few scores, so that ties and copies are common; ids in an order of their own."""
    ids = draw(st.permutations("abcdefg"))[: draw(st.integers(0, 7))]
    texts, finishes = st.sampled_from(["t1", "t2", "t3"]), st.sampled_from(["stop", "stop", "length"])
    scores = st.sampled_from([None, 0.0, 0.25, 0.5, 1.0])
    return [draft(name, draw(texts), draw(scores), draw(finishes)) for name in ids]


margins = st.sampled_from([0.0, 0.25, 0.5])


def select(drafts, margin=0.0):
    return reward_model(PROMPT, drafts, Selection(margin=margin))


def by_id(rejected):
    return sorted(rejected, key=lambda row: row["id"])


@given(candidates(), margins, st.randoms(use_true_random=False))
def test_order_of_the_drafts_changes_nothing(drafts, margin, random):
    pairs, rejected = select(drafts, margin)
    shuffled_pairs, shuffled_rejected = select(random.sample(drafts, len(drafts)), margin)
    assert pairs == shuffled_pairs
    assert by_id(rejected) == by_id(shuffled_rejected)


def test_order_of_the_drafts_does_not_change_the_order_of_the_rejected():
    drafts = [draft("b", "t", None), draft("a", "u", None)]
    assert select(drafts)[1] == select(drafts[::-1])[1]


@given(candidates(), margins)
def test_every_draft_is_used_or_rejected_with_a_reason_exactly_once(drafts, margin):
    pairs, rejected = select(drafts, margin)
    used = [pair[member] for pair in pairs for member in ("chosen_id", "rejected_id")]
    assert sorted(used + [row["id"] for row in rejected]) == sorted(d["draft_id"] for d in drafts)
    assert all(row["reason"] and (row["file"], row["line"], row["stage"]) == ("f", 7, "pairs") for row in rejected)


@given(candidates(), margins)
def test_pair_is_best_complete_over_worst_other_text_by_more_than_the_margin(drafts, margin):
    pairs, _ = select(drafts, margin)
    scored = [d for d in drafts if d["score"] is not None]
    complete = [d for d in scored if d["finish_reason"] == "stop"]
    best = max((d["score"] for d in complete), default=None)
    first = min((d for d in complete if d["score"] == best), key=lambda d: d["draft_id"], default=None)
    worst = min((d["score"] for d in scored if first and d["text"] != first["text"]), default=None)
    if first is None or worst is None or not best - worst > margin:
        assert pairs == []
        return
    (pair,) = pairs
    assert (pair["chosen_id"], pair["chosen"], pair["chosen_score"]) == (first["draft_id"], first["text"], best)
    assert pair["rejected_score"] == worst
    assert pair["chosen"] != pair["rejected"]


@given(candidates(), margins)
def test_cut_draft_is_never_chosen(drafts, margin):
    cut = {d["draft_id"] for d in drafts if d["finish_reason"] == "length"}
    assert not cut & {pair["chosen_id"] for pair in select(drafts, margin)[0]}


def test_cut_draft_may_be_the_dispreferred_one_and_stays_marked_as_cut():
    (pair,), rejected = select([draft("a", "good", 1.0), draft("b", "cut", 0.0, "length")])
    assert (pair["rejected"], pair["chosen_finished"], pair["rejected_finished"], rejected) == ("cut", True, False, [])


def test_ties_go_by_id_at_both_ends():
    tied = [draft("b", "t1", 1.0), draft("a", "t2", 1.0), draft("d", "t3", 0.0), draft("c", "t4", 0.0)]
    (pair,), _ = select(tied)
    assert (pair["chosen_id"], pair["rejected_id"]) == ("a", "d")


def test_difference_equal_to_the_margin_is_not_enough():
    drafts = [draft("a", "t1", 0.75), draft("b", "t2", 0.5)]
    assert select(drafts, 0.25)[0] == []
    assert len(select(drafts, 0.2499)[0]) == 1


@pytest.mark.parametrize(
    ("drafts", "reason"),
    [
        ([draft("a", "t", 1.0), draft("b", "t", 0.0)], "all drafts are identical"),
        ([draft("a", "t", 0.5), draft("b", "u", 0.5)], "not more than the margin apart"),
        ([draft("a", "t", 1.0, "length"), draft("b", "u", 0.0, "length")], "cut by length"),
        ([draft("a", "t", None), draft("b", "u", None)], "has no finite score"),
    ],
)
def test_prompt_without_a_pair_says_why(drafts, reason):
    pairs, rejected = select(drafts)
    assert pairs == []
    assert [reason in row["reason"] for row in rejected] == [True, True]


def test_pair_has_the_columns_of_its_table_and_an_id_from_content_alone():
    drafts = [draft("a", "t1", 1.0), draft("b", "t2", 0.0)]
    (pair,), _ = select(drafts)
    (renamed,), _ = select([{**d, "draft_id": d["draft_id"] * 2} for d in drafts])
    assert set(pair) == set(PAIR.names)
    assert pair["pair_id"] == renamed["pair_id"]
