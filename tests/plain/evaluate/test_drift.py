"""Drift and diversity on tables small enough to count by hand."""

import pytest

from evolve_ray.evaluate import drift


def draft(name, text, number=1, parent=None, tokens=None, cut=False, kind="answer"):
    return {
        "draft_id": name, "prompt_id": name[:1], "round": number, "kind": kind, "parent_id": parent, "text": text,
        "num_tokens": len(text) if tokens is None else tokens, "finish_reason": "length" if cut else "stop",
    }  # fmt: skip


def score(name, value, correct=None):
    return {"draft_id": name, "prompt_id": name[:1], "score": value, "correct": correct}


def pair(chosen, rejected, number=2):
    return {"chosen_id": chosen, "rejected_id": rejected, "chosen_round": number}


# Two shards: prompt a in the first, b and c in the second.
FIRST = (
    [draft("a1", "ab"), draft("a2", "ab", 2, "a1"), draft("a3", "abcd", 3, "a2"), draft("ax", "?", 3, "a2", kind="critique")],
    [score("a1", 0.1, 0.0), score("a2", 0.1, 0.0), score("a3", 0.9, 1.0)],
)
SECOND = (
    [
        draft("b1", "xy", cut=True), draft("b2", "xyz", 2, "b1"), draft("b3", "zzzz", 3, "b2"),
        draft("c1", "q"), draft("c2", "qq", 2, "c1"), draft("c3", "qq", 3, "c2"),
    ],
    [
        score("b1", 0.5, 1.0), score("b2", 0.7, 0.0), score("b3", 0.5, 0.0),
        score("c1", 0.0, 0.5), score("c3", 1.0, 0.5),
    ],
)  # fmt: skip
PAIRS = [pair("a3", "a1", 3), pair("b2", "b1", 2), pair("c3", "c1", 3)]


@pytest.fixture(scope="module")
def found():
    return drift.figures([FIRST, SECOND], PAIRS)


def test_answers_are_counted_and_critiques_are_not(found):
    assert (found["num_prompts"], found["num_drafts"]) == (3, 9)
    assert {number: figures["n"] for number, figures in found["rounds"].items()} == {"1": 3, "2": 3, "3": 3}


def test_lengths_by_round(found):
    means = [found["rounds"][number]["mean_response_tokens"] for number in ("1", "2", "3")]
    assert means == pytest.approx([5 / 3, 7 / 3, 10 / 3])
    assert found["mean_response_tokens"] == pytest.approx(22 / 9)


def test_cut_answers_are_counted_in_their_round(found):
    assert [found["rounds"][number]["num_cut"] for number in ("1", "2", "3")] == [1, 0, 0]
    assert found["cut_rate"] == pytest.approx(1 / 9)


def test_duplicates_are_drafts_that_share_their_text_with_another_of_their_prompt(found):
    assert found["duplicate_rate"] == pytest.approx(4 / 9)  # a1 a2, c2 c3


def test_refinements_that_change_nothing(found):
    assert found["unchanged_rate"] == pytest.approx(2 / 6)  # a2, c3


def test_winning_rounds_are_those_of_the_chosen_drafts(found):
    assert found["winning_rounds"] == {"2": 1, "3": 2}


def test_distinct_2_is_taken_across_prompts(found):
    # Round 2 holds ab, xyz, qq: bigrams ab, xy, yz, qq; round 3 holds abcd, zzzz, qq: ab, bc, cd, zz three times, qq.
    assert found["rounds"]["2"]["distinct_2"] == 1.0
    assert found["rounds"]["3"]["distinct_2"] == pytest.approx(5 / 7)


def test_no_more_prompts_count_for_diversity_than_every_iteration_has(monkeypatch):
    monkeypatch.setattr(drift, "DIVERSITY_PROMPTS", 1)
    assert drift.figures([FIRST, SECOND], PAIRS)["rounds"]["3"]["distinct_2"] == 1.0  # abcd alone


def test_the_scorer_is_held_against_the_verifier_within_each_prompt(found):
    # a: a3 over a1 and a2, both right. b: b1 is right; below b2, level with b3. c: the verifier sees no difference.
    order = found["truth"]["pair_order"]
    counts = {"num_agree": 2, "num_disagree": 1, "num_scorer_ties": 1, "num_truth_ties": 3}
    assert order == {"share": pytest.approx(2 / 3), **counts}


def test_labels_of_the_selected_pairs(found):
    assert found["truth"]["labels"] == {"accuracy": pytest.approx(1 / 3), "num_better": 1, "num_equal": 1, "num_worse": 1}


def test_pairs_of_unscored_drafts_have_no_label():
    labels = drift.figures([FIRST, SECOND], [*PAIRS, pair("c2", "c1")])["truth"]["labels"]
    assert sum(labels[f"num_{name}"] for name in ("better", "equal", "worse")) == 3


def test_correlations_over_all_and_within_prompts():
    # Within a prompt a longer answer scores higher; the prompt with longer answers scores lower on the whole.
    drafts = [draft("a1", "", tokens=1), draft("a2", "", tokens=2), draft("b1", "", tokens=11), draft("b2", "", tokens=12)]
    scores = [score("a1", 10.0), score("a2", 11.0), score("b1", 0.0), score("b2", 1.0)]
    found = drift.figures([(drafts, scores)], [])["score_tokens"]
    assert found["within_prompt"] == pytest.approx(1.0)
    assert found["all"] == pytest.approx(-0.9802, abs=1e-4)


def test_correlation_with_what_does_not_vary_is_null():
    drafts = [draft("a1", "xx"), draft("a2", "yy")]
    found = drift.figures([(drafts, [score("a1", 0.0, 1.0), score("a2", 1.0, 1.0)])], [])
    assert found["score_tokens"] == {"all": None, "within_prompt": None}
    assert found["truth"]["score_correct"] == {"all": None, "within_prompt": None}
    assert found["truth"]["pair_order"]["share"] is None


def test_a_perfect_scorer_agrees_with_the_verifier_and_a_reversed_one_never_does():
    values = [0.0, 1.0, 0.3, 1.0]
    for sign, share in ((1, 1.0), (-1, 0.0)):
        drafts = [draft(f"a{n}", f"t{n}") for n, _ in enumerate(values)]
        scores = [score(f"a{n}", sign * value, value) for n, value in enumerate(values)]
        found = drift.figures([(drafts, scores)], [])["truth"]
        assert found["pair_order"]["share"] == share
        assert found["score_correct"]["all"] == pytest.approx(sign)


def test_without_a_verifier_nothing_is_said_about_the_truth():
    assert drift.figures([([draft("a1", "x"), draft("a2", "y")], [score("a1", 0.0), score("a2", 1.0)])], [])["truth"] is None


def test_an_iteration_without_a_single_score_has_figures_of_its_texts():
    found = drift.figures([(FIRST[0], [])], [])
    assert (found["num_drafts"], found["score_tokens"], found["truth"]) == (3, {"all": None, "within_prompt": None}, None)


def test_shards_change_nothing(found):
    together = tuple(one + other for one, other in zip(FIRST, SECOND, strict=True))
    assert drift.figures([together], PAIRS) == found


def test_lengths_are_held_against_iteration_1(found):
    longer = [draft("a1", "abcd"), draft("a2", "ab", 2, "a1")]
    later = drift.against_first(drift.figures([(longer, [])], []), found)
    assert later["rounds"]["1"]["tokens_ratio"] == pytest.approx(4 / (5 / 3))
    assert later["tokens_ratio"] == pytest.approx(3 / (22 / 9))
    assert drift.against_first(found, found)["tokens_ratio"] == 1.0


def test_a_round_that_iteration_1_did_not_have_has_no_ratio(found):
    first = drift.figures([([draft("a1", "x")], [])], [])
    assert drift.against_first(found, first)["rounds"]["3"]["tokens_ratio"] is None


def test_answers_of_another_model_say_nothing_of_the_policys_texts(found):
    theirs = [{**draft(f"{name}t", "much longer", 1), "model": "teacher"} for name in "abc"]
    shards = [(FIRST[0] + theirs[:1], FIRST[1]), (SECOND[0] + theirs[1:], [*SECOND[1], score("bt", 0.9, 1.0)])]
    both = drift.figures(shards, [pair("a3", "a1", 3), pair("bt", "b1", 1), pair("c3", "c1", 3)], ["teacher"])
    names = ("num_prompts", "num_drafts", "mean_response_tokens", "rounds", "cut_rate", "duplicate_rate", "unchanged_rate")
    assert {name: both[name] for name in names} == {name: found[name] for name in names}
    assert both["winning_rounds"] == {"1": 1, "3": 2}
