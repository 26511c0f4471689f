"""The tiny task: splits that cannot overlap, a verifier that knows the truth, the same rows every time."""

import hashlib
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from evolve_ray.toy.task import (
    LETTERS,
    SPLITS,
    SortVerifier,
    corrupt,
    gold_reward,
    judgement,
    make_judgements,
    make_prompts,
    make_triples,
    solve,
)

words = st.text(LETTERS, min_size=1, max_size=15)


def letters_of(split, count=400, seed=0):
    return {row["prompt"].partition(":")[2] for row in make_prompts(split, count, seed)}


def test_no_letters_of_training_are_held_out_whatever_the_seeds():
    trained = letters_of("train", 2000) | {row["prompt"].partition(":")[2] for row in make_triples(500, 1)}
    assert not trained & (letters_of("heldout", seed=5) | letters_of("long", seed=6) | letters_of("desc", seed=7))


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_of_a_split_have_its_verb_its_length_and_their_right_answer(split):
    verb, shortest, longest, _ = SPLITS[split]
    for row in make_prompts(split, 100, 0):
        asked, _, letters = row["prompt"].partition(":")
        assert asked == verb
        assert shortest <= len(letters) <= longest
        assert row["answer"] == "".join(sorted(letters, reverse=verb == "desc"))


def test_prompts_are_distinct_and_a_longer_list_begins_with_the_shorter():
    short, long = make_prompts("train", 50, 3), make_prompts("train", 200, 3)
    assert long[:50] == short
    assert len({row["prompt"] for row in long}) == 200


def test_prompts_are_pinned():
    assert [row["prompt"] for row in make_prompts("heldout", 2, 0)] == ["sort:ajiehgihagde", "sort:ijbghbeei"]


def test_other_seed_gives_other_prompts():
    assert make_prompts("train", 20, 0) != make_prompts("train", 20, 1)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="not one of train, heldout, long, desc"):
        make_prompts("test", 1, 0)


def test_triples_are_better_over_worse_or_ties():
    triples = make_triples(400, 0)
    gaps = [gold_reward(row["chosen"], row["answer"]) - gold_reward(row["rejected"], row["answer"]) for row in triples]
    ties = [row["chosen"] == row["rejected"] for row in triples]
    assert all(gap > 0 or tie for gap, tie in zip(gaps, ties, strict=True))
    assert 0.15 < sum(ties) / len(ties) < 0.35
    assert 0.55 < sum(row["chosen"] == row["answer"] for row in triples) / len(triples) < 0.75


def test_triples_are_pinned():
    text = "\n".join(json.dumps(row) for row in make_triples(200, 3))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "50d4a8ca33821fa7"


def test_share_of_the_triples_sorts_downwards_and_has_its_own_right_answers():
    triples, ascending = make_triples(400, 0, desc_fraction=0.3), make_triples(400, 0)
    for row in triples:
        assert row["answer"] == solve(*row["prompt"].split(":"))
        assert gold_reward(row["chosen"], row["answer"]) >= gold_reward(row["rejected"], row["answer"])
    assert 0.2 < sum(row["prompt"].startswith("desc:") for row in triples) / len(triples) < 0.4
    letters = [[row["prompt"].partition(":")[2] for row in rows] for rows in (triples, ascending)]
    assert letters[0] == letters[1]
    assert all(row["prompt"].startswith("sort:") for row in ascending)
    assert not {row["prompt"] for row in triples} & {row["prompt"] for row in make_prompts("desc", 400, 0)}


@pytest.mark.parametrize(
    ("tie_clean_fraction", "low", "high"), [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (None, 0.5, 0.8), (0.3, 0.15, 0.45)]
)
def test_ties_are_right_as_often_as_they_are_told_to_be(tie_clean_fraction, low, high):
    triples = make_triples(400, 1, tie_clean_fraction=tie_clean_fraction)
    ties = [row for row in triples if row["chosen"] == row["rejected"]]
    others = [row for row in triples if row["chosen"] != row["rejected"]]
    assert 60 < len(ties) < 140
    assert low <= sum(row["chosen"] == row["answer"] for row in ties) / len(ties) <= high
    assert 0.5 < sum(row["chosen"] == row["answer"] for row in others) / len(others) < 0.8


@given(words, st.integers(0, 10**6))
def test_corrupted_answer_is_never_the_answer(answer, seed):
    wrong = corrupt(answer, random.Random(seed))
    assert wrong != answer
    assert 1 <= Levenshtein.distance(wrong, answer) <= 3


@given(words, words)
def test_reward_is_one_exactly_when_right(response, answer):
    assert 0.0 <= gold_reward(response, answer) <= 1.0
    assert (gold_reward(response, answer) == 1.0) == (response == answer)
    assert gold_reward(f" {answer}\n", answer) == 1.0


def test_reward_is_one_minus_edits_over_the_longer_length():
    assert gold_reward("abcd", "abce") == 0.75
    assert gold_reward("", "abcd") == 0.0
    assert gold_reward("abcdef", "abcd") == pytest.approx(1 - 2 / 6)


def test_verifier_gives_one_reward_for_each_response():
    assert SortVerifier()(["sort:ba", "sort:ba"], ["ab", "ab"], ["ab", "ba"]) == [1.0, 0.0]


def test_verifier_refuses_a_prompt_without_answer():
    with pytest.raises(ValueError, match="'sort:ba' has no gold answer"):
        SortVerifier()(["sort:ba"], [None], ["ab"])


def test_verifier_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="2 prompts, 2 answers, 1 responses"):
        SortVerifier()(["a", "b"], ["a", "b"], ["a"])


def test_solve_sorts_both_ways():
    assert (solve("sort", "cab"), solve("desc", "cab")) == ("abc", "cba")


def test_half_of_the_judgements_teach_to_rate_and_none_is_about_a_held_out_string():
    rows = make_judgements(400, 0)
    judged = [row for row in rows if row["prompt"].startswith("judge ")]
    assert (len(rows), len(judged)) == (400, 200)
    for row in judged:
        _, question, response = row["prompt"].split(" ")
        verb, _, letters = question.partition(":")
        assert row["chosen"] == judgement(response, solve(verb, letters))[0]
        assert (row["rejected"][:-1], row["rejected"] != row["chosen"]) == (row["chosen"][:-1], True)
    held_out = {row["prompt"].partition(":")[2] for row in make_prompts("heldout", 500, 0)}
    assert not held_out & {row["prompt"].partition(":")[2].split(" ")[0] for row in judged}
    assert make_judgements(400, 0) == rows


def test_a_judgement_marks_each_letter_and_its_rating_has_one_digit():
    assert judgement("abd", "abc") == ("a+b+d- Rating: 8", 8)
    assert judgement("ab", "abc") == ("a+b+.- Rating: 8", 8)
    assert [judgement(text, "abc")[1] for text in ("abc", "xyz", "", "x" * 9)] == [9, 6, 6, 1]
