"""The shortest of the best tier over the longest of the worst."""

import itertools

import pytest

from evolve_ray.config.options import Selection
from evolve_ray.select.check import check_selected
from evolve_ray.select.tiers import TierArgs, tiers
from tests.plain.select.test_accepted import PROMPT, draft


def select(drafts, rho=0.1, **options):
    results = [tiers(PROMPT, list(o), Selection(**options), TierArgs(rho=rho)) for o in itertools.permutations(drafts)]
    assert all(result == results[0] for result in results)
    check_selected("tiers", PROMPT, drafts, results[0])
    pairs, unused = results[0]
    return [(pair["chosen_id"], pair["rejected_id"]) for pair in pairs], {row["id"]: row["reason"] for row in unused}


@pytest.mark.parametrize(
    ("rho", "pair"),
    [(0.1, ("d2", "d4")), (0.0, ("d1", "d4")), (0.3, ("d3", "d4"))],  # bounds 4.7, 5.0 and 4.1
)
def test_the_shortest_of_the_best_tier_is_chosen(rho, pair):
    drafts = [draft(1, "aaaa", 5.0), draft(2, "aaa", 4.8), draft(3, "aa", 4.2), draft(4, "a", 2.0)]
    pairs, unused = select(drafts, rho)
    assert pairs == [pair]
    assert set(unused.values()) == {"neither the shortest of the best tier nor the longest of the worst"}


def test_the_longest_of_the_worst_tier_is_rejected():
    assert select([draft(1, "a", 5.0), draft(2, "aa", 2.0), draft(3, "aaa", 2.2)])[0] == [("d1", "d3")]


def test_a_cut_draft_is_never_chosen_and_equal_scores_make_no_pair():
    drafts = [draft(1, "a", 5.0, "length"), draft(2, "aa", 4.0), draft(3, "b", 1.0)]
    assert select(drafts)[0] == [("d2", "d3")]
    pairs, unused = select([draft(1, "a", 2.0), draft(2, "bb", 2.0), draft(3, "c", None)])
    assert pairs == []
    assert unused["d3"] == "has no finite score"
    assert unused["d1"] == "scores are not more than the margin apart (selection.margin is 0.0)"
