"""What the benchmark of generation makes of its turns, without an engine."""

import argparse

import pytest

from evolve_ray.bench import generate
from evolve_ray.errors import UserError

TEXTS = {("a", 1): "xxxx", ("a", 2): "xx", ("b", 1): "x", ("b", 2): "xxxxx"}


def turn(seconds, steps, texts=TEXTS, **counts):
    return generate.Turn(
        seconds, 2 * seconds, steps, {"num_tokens": 12, "num_prompt_tokens": 40, "num_cached_tokens": 9} | counts, texts
    )


def test_ratios_are_taken_turn_by_turn():
    found = {
        "chains": [turn(2.0, 10), turn(4.0, 10)],
        "barriers": [turn(3.0, 14), turn(4.0, 13)],
        "flat": [turn(2.0, 9), turn(3.0, 10)],
    }
    made = {row.name: row for row in generate.ratio_rows(found, seats=2)}
    assert {name: row.values for name, row in made.items()} == {
        "chain_steps_vs_barrier": [1.4, 1.3], "chain_vs_barrier": [1.5, 1.0], "chain_steps_vs_flat": [0.9, 1.0],
        "chain_vs_flat": [1.0, 0.75],
    }  # fmt: skip
    counts = made["chain_steps_vs_barrier"].counts
    assert (counts["no schedule has fewer steps than"], counts["texts that differ"]) == ([6, 6], 0)
    assert counts["so the limits are"] == [2.333, 2.167]
    assert "of these cached 9 (22%)" in counts["chains"]


def test_sides_that_did_other_work_are_not_compared():
    found = {"chains": [turn(2.0, 10)], "barriers": [turn(3.0, 14, num_tokens=13)], "flat": [turn(2.0, 9)]}
    with pytest.raises(UserError, match="barriers and chains did different work"):
        generate.ratio_rows(found, seats=2)


def test_texts_that_differ_are_counted():
    found = {"chains": [turn(2.0, 10)], "barriers": [turn(3.0, 14, TEXTS | {("b", 2): "yyyyy"})], "flat": [turn(2.0, 9)]}
    assert [row.counts.get("texts that differ") for row in generate.ratio_rows(found, seats=2)] == [1, None, 0, None]


@pytest.mark.parametrize(
    ("lengths", "seats", "least"), [([[4, 4], [1, 1]], 2, 8), ([[4, 4], [1, 1]], 1, 10), ([[3], [3], [3]], 2, 5)]
)
def test_least_steps_are_bound_by_seats_and_by_the_longest_chain(lengths, seats, least):
    assert generate.least_steps(lengths, seats) == least


def test_lengths_come_from_the_seeds_stay_in_their_bounds_and_are_the_drafts_as_often_as_said():
    found = [generate.lengths([seed, seed + 10**6], 8, 20, 0.6) for seed in range(1000)]
    assert found == [generate.lengths([seed, seed + 10**6], 8, 20, 0.6) for seed in range(1000)]
    assert {length for chain in found for length in chain} == set(range(8, 21))
    same = sum(first == second for first, second in found) / 1000
    assert same == pytest.approx(0.6 + 0.4 / 13, abs=0.05)


@pytest.mark.parametrize("new", [[0, 5], [9, 8], [8, 900]])
def test_lengths_that_do_not_fit_are_refused_before_an_engine_starts(new):
    parser = argparse.ArgumentParser()
    generate.options(parser)
    given = parser.parse_args(["--new", *map(str, new)])
    with pytest.raises(UserError, match=f"--new: is {new[0]} {new[1]}"):
        generate.rows(given)
