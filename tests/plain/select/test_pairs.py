"""Properties of pair selection that hold for whatever drafts a prompt has, and the reason for every draft that is not used."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_ray.config.options import Selection
from evolve_ray.select.pairs import repetition
from evolve_ray.select.selections import SELECTIONS
from evolve_ray.store.rows import PAIR

PROMPT = {"prompt_id": "p", "prompt": "x", "file": "f", "line": 7}
# Every selection, and both ways in which `reward_model` pairs drafts.
KINDS = ["extremes", "neighbours", "rule", "random"]


def draft(name, text, score=None, finish="stop", *, round=1, sample=0, parent=None):
    return {
        "draft_id": name, "parent_id": parent, "sample": sample, "round": round, "text": text, "finish_reason": finish,
        "score": score,
    }  # fmt: skip


def chain(*drafts):
    """Drafts (name, text, score, finish) of one chain: each refines the one before."""
    parents = [None, *(given[0] for given in drafts)]
    return [
        draft(*given, round=number, parent=parent)
        for number, (given, parent) in enumerate(zip(drafts, parents, strict=False), start=1)
    ]


@st.composite
def candidates(draw):
    """Few texts and few scores, so that ties and copies are common; a forest of parents; ids in an order of their own."""
    ids = draw(st.permutations("abcdefg"))[: draw(st.integers(0, 7))]
    texts, finishes = st.sampled_from(["t1", "t2", "t3", ""]), st.sampled_from(["stop", "stop", "length"])
    scores = st.sampled_from([None, 0.0, 0.25, 0.5, 1.0])
    made = []
    for place, name in enumerate(ids):
        parent = draw(st.sampled_from([None, *made[-3:]])) if place else None
        made.append(
            draft(
                name, draw(texts), draw(scores), draw(finishes), sample=draw(st.integers(0, 1)),
                round=parent["round"] + 1 if parent else 1, parent=parent["draft_id"] if parent else None,
            )
        )  # fmt: skip
    return made


settings = st.builds(
    dict,
    margin=st.sampled_from([0.0, 0.25, 0.5]),
    max_pairs=st.integers(1, 4),
    allow_cut=st.booleans(),
    max_similarity=st.sampled_from([0.4, 1.0]),
    max_length_ratio=st.sampled_from([1.0, 3.0]),
)


def select(kind, drafts, **options):
    name, pairing = ("reward_model", kind) if kind in ("extremes", "neighbours") else (kind, "extremes")
    return SELECTIONS[name](PROMPT, drafts, Selection(name=name, pairing=pairing, **options))


def reasons(kind, drafts, **options):
    return {row["id"]: row["reason"] for row in select(kind, drafts, **options)[1]}


def ids_of(pairs):
    return [(pair["chosen_id"], pair["rejected_id"]) for pair in pairs]


def test_every_selection_of_the_recipe_is_tested():
    with_rows_of_their_own = {"advantages", "turn_advantages", "reflections", "trajectories", "accepted", "tiers"}
    assert set(SELECTIONS) == {"reward_model", *with_rows_of_their_own, *KINDS[2:]}


@pytest.mark.parametrize("kind", KINDS)
@given(candidates(), settings, st.randoms(use_true_random=False))
def test_order_of_the_drafts_changes_nothing(kind, drafts, options, random):
    assert select(kind, drafts, **options) == select(kind, random.sample(drafts, len(drafts)), **options)


@pytest.mark.parametrize("kind", KINDS)
@given(candidates(), settings)
def test_every_draft_is_used_or_rejected_with_a_reason_exactly_once(kind, drafts, options):
    pairs, rejected = select(kind, drafts, **options)
    used = {name for ids in ids_of(pairs) for name in ids}
    assert sorted([*used, *(row["id"] for row in rejected)]) == sorted(d["draft_id"] for d in drafts)
    assert all(row["reason"] and (row["file"], row["line"], row["stage"]) == ("f", 7, "pairs") for row in rejected)


@pytest.mark.parametrize("kind", KINDS)
@given(candidates(), settings)
def test_pairs_are_few_enough_and_each_has_its_own_two_texts(kind, drafts, options):
    pairs, _ = select(kind, drafts, **options)
    assert len(pairs) <= options["max_pairs"]
    texts = [frozenset((pair["chosen"], pair["rejected"])) for pair in pairs]
    assert all(len(two) == 2 for two in texts)
    assert len(set(texts)) == len(texts) == len({pair["pair_id"] for pair in pairs})


@pytest.mark.parametrize("kind", KINDS)
@given(candidates(), settings)
def test_cut_draft_is_chosen_only_where_that_is_allowed_and_stays_marked(kind, drafts, options):
    cut = {d["draft_id"] for d in drafts if d["finish_reason"] == "length"}
    for pair in select(kind, drafts, **options)[0]:
        assert options["allow_cut"] or pair["chosen_id"] not in cut
        assert pair["chosen_finished"] == (pair["chosen_id"] not in cut)
        assert pair["rejected_finished"] == (pair["rejected_id"] not in cut)


@pytest.mark.parametrize("kind", ["extremes", "neighbours"])
@given(candidates(), settings)
def test_scores_of_a_pair_are_more_than_the_margin_apart(kind, drafts, options):
    scores = {d["draft_id"]: d["score"] for d in drafts}
    for pair in select(kind, drafts, **options)[0]:
        assert scores[pair["chosen_id"]] - scores[pair["rejected_id"]] > options["margin"]
        assert (pair["chosen_score"], pair["rejected_score"]) == (scores[pair["chosen_id"]], scores[pair["rejected_id"]])


@pytest.mark.parametrize("kind", ["extremes", "rule", "random"])
@given(candidates(), settings)
def test_no_draft_is_in_two_of_these_pairs(kind, drafts, options):
    used = [name for ids in ids_of(select(kind, drafts, **options)[0]) for name in ids]
    assert len(used) == len(set(used))


@pytest.mark.parametrize("kind", ["rule", "random"])
@given(candidates(), settings)
def test_these_read_no_score(kind, drafts, options):
    without = [{name: value for name, value in d.items() if name != "score"} for d in drafts]
    pairs, rejected = select(kind, without, **options)
    assert (ids_of(pairs), rejected) == (ids_of(select(kind, drafts, **options)[0]), select(kind, drafts, **options)[1])
    assert all(pair["chosen_score"] is None and pair["rejected_score"] is None for pair in pairs)


@given(candidates(), settings)
def test_pair_is_best_complete_over_worst_other_text_by_more_than_the_margin(drafts, options):
    pairs, _ = select("extremes", drafts, **{**options, "allow_cut": False, "max_pairs": 1})
    scored = [d for d in drafts if d["score"] is not None]
    fits = [
        (best, worst)
        for best, worst in itertools.product(scored, scored)
        if best["finish_reason"] == "stop"
        and best["text"] != worst["text"]
        and best["score"] - worst["score"] > options["margin"]
    ]
    assert len(pairs) == bool(fits)
    for pair in pairs:
        assert pair["chosen_score"] == max(best["score"] for best, _ in fits)
        assert pair["chosen_id"] == min(best["draft_id"] for best, _ in fits if best["score"] == pair["chosen_score"])
        worst = [worst for best, worst in fits if best["draft_id"] == pair["chosen_id"]]
        assert pair["rejected_score"] == min(d["score"] for d in worst)
        assert pair["rejected_id"] == max(d["draft_id"] for d in worst if d["score"] == pair["rejected_score"])


@given(candidates(), settings)
def test_neighbours_that_differ_most_are_kept(drafts, options):
    by_id = {d["draft_id"]: d for d in drafts}
    fits = {}
    for child in drafts:
        parent = by_id.get(child["parent_id"])
        if parent is None or None in (child["score"], parent["score"]):
            continue
        better, worse = (child, parent) if child["score"] > parent["score"] else (parent, child)
        allowed = options["allow_cut"] or better["finish_reason"] == "stop"
        if allowed and better["text"] != worse["text"] and better["score"] - worse["score"] > options["margin"]:
            fits[better["draft_id"], worse["draft_id"]] = better["score"] - worse["score"]
    kept = ids_of(select("neighbours", drafts, **{**options, "max_pairs": 4})[0])
    assert set(kept) <= set(fits)
    gaps = [fits[ids] for ids in kept]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[:1] == sorted(fits.values(), reverse=True)[:1]
    assert ids_of(select("neighbours", drafts, **{**options, "max_pairs": 1})[0]) == kept[:1]


def test_ties_go_by_id_at_both_ends():
    tied = [draft("b", "t1", 1.0), draft("a", "t2", 1.0), draft("d", "t3", 0.0), draft("c", "t4", 0.0)]
    assert ids_of(select("extremes", tied)[0]) == [("a", "d")]


def test_further_pairs_are_the_next_best_over_the_next_worst():
    drafts = [draft(name, name, score) for name, score in zip("abcdefg", [0.9, 0.2, 0.5, 0.0, 0.7, 0.4, 0.1], strict=True)]
    assert ids_of(select("extremes", drafts, max_pairs=9)[0]) == [("a", "d"), ("e", "g"), ("c", "b")]
    assert ids_of(select("extremes", drafts, max_pairs=9, margin=0.4)[0]) == [("a", "d"), ("e", "g")]
    assert reasons("extremes", drafts, max_pairs=2) == dict.fromkeys("bcf", "neither best nor worst")


def test_further_pair_of_the_same_two_texts_takes_the_next_text():
    drafts = [draft("a", "good", 1.0), draft("b", "good", 1.0), draft("c", "fair", 0.5), draft("d", "bad", 0.0)]
    drafts += [draft("e", "bad", 0.0)]
    assert ids_of(select("extremes", drafts, max_pairs=3)[0]) == [("a", "e"), ("b", "c")]
    assert reasons("extremes", drafts, max_pairs=3) == {"d": "would repeat the two texts of another pair"}


@pytest.mark.parametrize("kind", ["extremes", "neighbours"])
def test_difference_equal_to_the_margin_is_not_enough(kind):
    drafts = chain(("a", "t1", 0.75), ("b", "t2", 0.5))
    assert select(kind, drafts, margin=0.25)[0] == []
    assert len(select(kind, drafts, margin=0.2499)[0]) == 1


MARGIN = "scores are not more than the margin apart (selection.margin is 0.0)"
SAME = "has the same text as the draft that it would be paired with"
CUT = "cut by length: cannot be chosen"


@pytest.mark.parametrize(
    ("drafts", "reason"),
    [
        ([draft("a", "t", 1.0), draft("b", "t", 0.0)], SAME),
        ([draft("a", "t", 0.5), draft("b", "u", 0.5)], MARGIN),
        ([draft("a", "t", 1.0, "length"), draft("b", "u", 0.0, "length")], CUT),
        ([draft("a", "t"), draft("b", "u")], "has no finite score"),
    ],
)
def test_prompt_without_a_pair_of_extremes_says_why(drafts, reason):
    assert select("extremes", drafts)[0] == []
    assert reasons("extremes", drafts) == {"a": reason, "b": reason}


def test_lonely_draft_says_so():
    assert reasons("extremes", [draft("a", "t", 1.0)]) == {"a": "no draft with another text is left to pair it with"}
    assert reasons("random", [draft("a", "t")]) == {"a": "no draft with another text is left to pair it with"}
    assert reasons("neighbours", [draft("a", "t", 1.0)]) == {"a": "has no neighbouring round with a score"}
    assert reasons("rule", [draft("a", "t")]) == {"a": "is in the only round of its sample"}


@pytest.mark.parametrize("kind", KINDS)
def test_cut_draft_may_be_the_dispreferred_one(kind):
    (pair,), rejected = select(kind, chain(("b", "cut", 0.0, "length"), ("a", "good", 1.0)))
    assert (pair["rejected"], pair["chosen_finished"], pair["rejected_finished"], rejected) == ("cut", True, False, [])


@pytest.mark.parametrize("kind", KINDS)
def test_cut_draft_is_chosen_where_that_is_allowed(kind):
    drafts = chain(("b", "worse", 0.0, "length"), ("a", "better", 1.0, "length"))
    assert select(kind, drafts)[0] == []
    assert len(select(kind, drafts, allow_cut=True, max_length_ratio=9.0)[0]) == 1


def test_neighbours_may_share_a_draft_and_go_either_way():
    drafts = chain(("a", "t1", 0.5), ("b", "t2", 1.0), ("c", "t3", 0.25), ("d", "t4", 0.25))
    pairs, rejected = select("neighbours", drafts, max_pairs=9)
    assert ids_of(pairs) == [("b", "c"), ("b", "a")]
    assert [(row["id"], row["reason"]) for row in rejected] == [("d", MARGIN)]
    (pair,), _ = select("neighbours", drafts, max_pairs=1)
    assert (pair["chosen_id"], pair["chosen_round"], pair["rejected_id"], pair["rejected_round"]) == ("b", 2, "c", 3)
    few = "not among the selection.max_pairs neighbouring rounds that differ most"
    assert reasons("neighbours", drafts, max_pairs=1) == {"a": few, "d": few}


def test_ties_of_neighbours_go_by_id():
    drafts = [draft("r", "t0", 0.0), *(draft(name, name, 1.0, round=2, parent="r") for name in "cab")]
    assert ids_of(select("neighbours", drafts, max_pairs=2)[0]) == [("a", "r"), ("b", "r")]


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        (chain(("a", "t", 1.0), ("b", "t", 0.0)), {"a": SAME, "b": SAME}),
        ([draft("a", "t", 1.0), draft("b", "u", 0.0, sample=1)], dict.fromkeys("ab", "has no neighbouring round with a score")),
        (chain(("a", "t", 1.0), ("b", "u")), {"a": "has no neighbouring round with a score", "b": "has no finite score"}),
        (
            chain(("a", "t", 1.0, "length"), ("b", "u", 0.0)),
            dict.fromkeys("ab", "the better of its neighbouring rounds was cut by length"),
        ),
    ],
)
def test_prompt_without_a_pair_of_neighbours_says_why(drafts, expected):
    assert select("neighbours", drafts)[0] == []
    assert reasons("neighbours", drafts) == expected


WORDS = "one two three four five six seven"


def test_rule_takes_the_last_round_over_the_first_whatever_the_scores():
    drafts = chain(("c", "first", 1.0), ("b", "middle", 0.5), ("a", "last", 0.0))
    (pair,), rejected = select("rule", drafts)
    assert (pair["chosen_id"], pair["rejected_id"], pair["chosen_score"], pair["rejected_score"]) == ("a", "c", 0.0, 1.0)
    assert [(row["id"], row["reason"]) for row in rejected] == [("b", "neither first nor last round")]


def test_rule_pairs_each_sample_and_keeps_the_first_of_them():
    drafts = [draft(f"{s}{r}", f"text {s}{r}", sample=s, round=r) for s in (2, 0, 1) for r in (1, 2)]
    options = {"max_similarity": 1.0}
    assert ids_of(select("rule", drafts, max_pairs=9, **options)[0]) == [("02", "01"), ("12", "11"), ("22", "21")]
    assert ids_of(select("rule", drafts, max_pairs=2, **options)[0]) == [("02", "01"), ("12", "11")]
    assert reasons("rule", drafts, max_pairs=2, **options) == dict.fromkeys(["21", "22"], "beyond selection.max_pairs samples")


def test_ties_of_the_rule_go_by_id():
    drafts = [draft(name, name * 3, round=number) for name, number in zip("dbca", (1, 1, 2, 2), strict=True)]
    assert ids_of(select("rule", drafts)[0]) == [("a", "b")]


@pytest.mark.parametrize(
    ("first", "last", "finish", "reason"),
    [
        ("a draft", "another one", "length", "the last round was cut by length"),
        ("a draft", "a draft", "stop", SAME),
        ("", "", "stop", SAME),
        (WORDS * 3, WORDS * 3 + ".", "stop", "last and first round are nearly identical: selection.max_similarity is 0.98"),
        ("short", "not at all short", "stop", "last and first round differ in length: selection.max_length_ratio is 2.0"),
        ("not at all short", "short", "stop", "last and first round differ in length: selection.max_length_ratio is 2.0"),
        ("", "something", "stop", "last and first round differ in length: selection.max_length_ratio is 2.0"),
        ("something", "", "stop", "last and first round differ in length: selection.max_length_ratio is 2.0"),
        (WORDS, "a b c d " * 4, "stop", "the last round repeats itself: selection.max_repetition is 0.3"),
    ],
)
def test_each_guard_of_the_rule_gives_its_reason(first, last, finish, reason):
    drafts = chain(("a", first), ("b", last, None, finish))
    assert select("rule", drafts)[0] == []
    assert reasons("rule", drafts) == {"a": reason, "b": reason}


def test_guards_of_the_rule_stop_at_their_limits():
    def passes(first, last, **options):
        return len(select("rule", chain(("a", first), ("b", last)), **options)[0])

    assert passes("abcde", "abcdefghij", max_length_ratio=2.0) == 1
    assert passes("abcde", "abcdefghijk", max_length_ratio=2.0) == 0
    assert passes("abcdefghij", "abcdefghix", max_similarity=0.91) == 1
    assert passes("abcdefghij", "abcdefghix", max_similarity=0.9) == 0
    assert passes("some other words", "a b c d a b c d", max_repetition=0.2) == 1
    assert passes("some other words", "a b c d a b c d a", max_repetition=0.2) == 0
    assert passes("a b c d a b c d a", "some other words", max_repetition=0.2) == 1  # what is rejected may repeat itself


def test_repetition_is_the_share_of_repeated_4_grams_of_a_text_with_enough_words():
    assert repetition("a b c d a b c d") == 0.2
    assert repetition("a a a a a a a") == 0.0
    assert repetition("a a a a a a a a") == 0.8
    assert repetition("") == 0.0


def test_random_pairs_are_uniform_over_ordered_pairs_of_different_texts():
    drafts = [draft("a", "t1"), draft("b", "t2"), draft("c", "t3", None, "length"), draft("d", "t1")]
    counts = Counter()
    for number in range(3000):
        pairs, _ = SELECTIONS["random"]({**PROMPT, "prompt_id": str(number)}, drafts, Selection(name="random"))
        counts.update(ids_of(pairs))
    valid = {("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("b", "d"), ("d", "b"), ("d", "c")}
    assert set(counts) == valid
    assert all(abs(count - 3000 / 7) < 5 * (3000 / 7) ** 0.5 for count in counts.values())


def test_random_pairs_depend_on_the_prompt_and_the_ids_alone():
    drafts = [draft(name, name, 0.1 * place) for place, name in enumerate("abcdef")]
    first = ids_of(select("random", drafts, max_pairs=3)[0])
    assert len(first) == 3
    assert first == ids_of(select("random", [{**d, "score": -d["score"], "round": 9} for d in drafts], max_pairs=3)[0])
    other = SELECTIONS["random"]({**PROMPT, "prompt_id": "q"}, drafts, Selection(name="random", max_pairs=3))[0]
    assert first != ids_of(other)
    assert set(reasons("random", drafts, max_pairs=1).values()) == {"was not drawn"}


def test_pair_has_the_columns_of_its_table_and_an_id_from_content_alone():
    drafts = chain(("a", "t1", 1.0), ("b", "t2", 0.0))
    (pair,), _ = select("extremes", drafts)
    (renamed,), _ = select("extremes", [{**d, "draft_id": d["draft_id"] * 2} for d in drafts])
    assert set(pair) == set(PAIR.names)
    assert pair["pair_id"] == renamed["pair_id"]
