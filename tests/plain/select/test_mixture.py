"""Shares become counts, counts are spread over iterations, and which rows are drawn does not depend on their order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_ray.select.mixture import draw, evenly, wanted


@pytest.mark.parametrize(
    ("num_own", "replay", "given", "counts"),
    [
        (5, 0.3, 0.2, (3, 2)),  # half of 10
        (10, 0.5, 0.0, (10, 0)),
        (10, 0.0, 0.5, (0, 10)),
        (7, 0.3, 0.0, (3, 0)),  # 0.3 of 10
        (8, 0.3, 0.0, (3, 0)),  # 0.3 of 11.43 is 3.43
        (9, 0.1, 0.0, (1, 0)),  # exactly 0.1 of 10, which floats make 0.9999
        (21, 0.7, 0.0, (49, 0)),  # exactly 0.7 of 70
        (1, 0.3, 0.3, (0, 0)),
        (0, 0.5, 0.2, (0, 0)),
    ],
)
def test_counts_are_shares_of_the_whole_rounded_down(num_own, replay, given, counts):
    assert wanted(num_own, replay, given) == counts


@pytest.mark.parametrize(
    ("number", "sizes", "counts"),
    [
        (6, {1: 10, 2: 10, 3: 10}, {1: 2, 2: 2, 3: 2}),
        (7, {1: 10, 2: 10, 3: 10}, {1: 3, 2: 2, 3: 2}),
        (8, {1: 1, 2: 10, 3: 10}, {1: 1, 2: 4, 3: 3}),
        (9, {1: 2, 2: 3}, {1: 2, 2: 3}),
        (3, {}, {}),
        (0, {1: 5}, {1: 0}),
    ],
)
def test_iterations_give_equally_many_rows_as_far_as_they_have_them(number, sizes, counts):
    assert evenly(number, sizes) == counts


@given(st.integers(0, 60), st.dictionaries(st.integers(1, 9), st.integers(0, 20)))
def test_what_there_is_is_taken_and_no_table_gives_two_more_than_another_that_has_more(number, sizes):
    counts = evenly(number, sizes)
    assert sum(counts.values()) == min(number, sum(sizes.values()))
    assert all(0 <= counts[name] <= sizes[name] for name in sizes)
    most = max(counts.values(), default=0)
    assert all(counts[name] == sizes[name] or counts[name] >= most - 1 for name in sizes)


def test_drawn_rows_are_in_order_and_depend_on_seed_and_ids_alone():
    ids = [f"pair {number}" for number in range(50)]
    places = draw(ids, 20, "replay", 0, 2)
    assert places == sorted(set(places))
    assert len(places) == 20
    assert {ids[place] for place in places} == {ids[::-1][place] for place in draw(ids[::-1], 20, "replay", 0, 2)}
    assert places != draw(ids, 20, "replay", 1, 2)
    assert places != draw(ids, 20, "replay", 0, 3)
    assert draw(ids, 99, "replay", 0, 2) == list(range(50))
