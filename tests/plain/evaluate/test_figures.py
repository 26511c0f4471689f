"""Figures by round on a table small enough to count by hand."""

import pytest

from evolve_ray.evaluate.figures import add_best_of, against_previous, distinct, summarise

# prompt -> for each round (score, correct, text); None is a draft without a score.
CHAINS = {
    "p1": [(0.2, 0.0, "ab"), (1.0, 1.0, "abc"), (1.0, 1.0, "abc")],
    "p2": [(1.0, 1.0, "xy"), (0.5, 0.0, "x"), (1.0, 1.0, "xy")],
    "p3": [(0.4, 0.0, "m"), (0.4, 0.0, "n"), (0.1, 0.0, "o")],
    "p4": [(0.9, 0.9, "q"), (1.0, 1.0, "r"), (0.9, 0.9, "q")],
    "p5": [(1.0, 1.0, "s"), None, (1.0, 1.0, "s")],
}


def tables(chains, split="held", verified=True):
    prompts = [{"prompt_id": f"{split}-{name}", "split": split} for name in chains]
    drafts, scores = [], []
    for name, rounds in chains.items():
        for number, figures in enumerate(rounds, start=1):
            draft_id = f"{split}-{name}-{number}"
            text = figures[2] if figures else "?"
            row = {"draft_id": draft_id, "prompt_id": f"{split}-{name}", "split": split, "round": number, "text": text}
            drafts.append({**row, "num_tokens": len(text), "finish_reason": "length" if text == "n" else "stop"})
            if figures:
                correct = figures[1] if verified else None
                scores.append({"draft_id": draft_id, "prompt_id": row["prompt_id"], "score": figures[0], "correct": correct})
    return prompts, drafts, scores


@pytest.fixture(scope="module")
def held():
    return summarise(*tables(CHAINS))["held"]


def test_prompts_with_a_missing_round_are_left_out_and_seen_in_the_counts(held):
    assert held["num_prompts"] == 5
    assert [held["rounds"][number]["n"] for number in ("1", "2", "3")] == [4, 4, 4]


def test_means_of_each_round(held):
    rewards = [held["rounds"][number]["reward"]["mean"] for number in ("1", "2", "3")]
    assert rewards == pytest.approx([2.5 / 4, 2.9 / 4, 3.0 / 4])
    exact = [held["rounds"][number]["exact_match"]["mean"] for number in ("1", "2", "3")]
    assert exact == [0.25, 0.5, 0.5]


def test_every_round_has_its_gain_over_the_first(held):
    assert [held["rounds"][number]["gain"]["exact_match"]["mean"] for number in ("2", "3")] == [0.25, 0.25]
    assert held["rounds"]["2"]["gain"]["reward"]["mean"] == pytest.approx(0.1)
    assert held["rounds"]["3"]["gain"] == held["gain"]
    assert "gain" not in held["rounds"]["1"]


def test_changes_against_the_first_round(held):
    assert held["rounds"]["2"]["against_first"] == {
        "improved": 2, "degraded": 1, "unchanged": 1, "same_text": 0, "wrong_to_right": 2, "right_to_wrong": 1,
        "kept_right": 0, "kept_wrong": 1,
    }  # fmt: skip
    assert held["rounds"]["3"]["against_first"] == {
        "improved": 1, "degraded": 1, "unchanged": 2, "same_text": 2, "wrong_to_right": 1, "right_to_wrong": 0,
        "kept_right": 1, "kept_wrong": 2,
    }  # fmt: skip


def test_changes_against_the_previous_round(held):
    assert held["rounds"]["3"]["against_previous"] == {
        "improved": 1, "degraded": 2, "unchanged": 1, "same_text": 1, "wrong_to_right": 1, "right_to_wrong": 1,
        "kept_right": 1, "kept_wrong": 1,
    }  # fmt: skip


def test_first_round_has_nothing_to_compare_with(held):
    assert not {"against_first", "against_previous"} & set(held["rounds"]["1"])


def test_gain_is_last_round_minus_first_paired_by_prompt(held):
    assert held["gain"]["reward"]["mean"] == pytest.approx((0.8 + 0.0 - 0.3 + 0.0) / 4)
    assert held["gain"]["exact_match"]["mean"] == 0.25


def test_lengths_and_cut_answers_are_counted(held):
    assert [held["rounds"][number]["mean_response_tokens"] for number in ("1", "2", "3")] == [6 / 4, 6 / 4, 7 / 4]
    assert [held["rounds"][number]["num_cut"] for number in ("1", "2", "3")] == [0, 1, 0]


def test_none_of_few_prompts_right_is_not_certain():
    summary = summarise(*tables({f"p{n}": [(0.0, 0.0, "a"), (0.0, 0.0, "b")] for n in range(60)}))["held"]
    assert summary["rounds"]["1"]["exact_match"] == {"mean": 0.0, "low": 0.0, "high": pytest.approx(0.0602, abs=1e-4)}
    assert summary["gain"]["exact_match"]["low"] < -0.05 < 0.05 < summary["gain"]["exact_match"]["high"]


def test_splits_are_counted_apart():
    one, two = tables(CHAINS), tables({"p1": CHAINS["p1"]}, split="long")
    summary = summarise(*(left + right for left, right in zip(one, two, strict=True)))
    assert list(summary) == ["held", "long"]
    assert (summary["held"]["num_prompts"], summary["long"]["num_prompts"]) == (5, 1)
    assert (summary["long"]["rounds"]["1"]["n"], summary["long"]["rounds"]["1"]["reward"]["mean"]) == (1, 0.2)


def test_without_a_verifier_nothing_is_said_about_right_and_wrong():
    held = summarise(*tables(CHAINS, verified=False))["held"]
    assert "exact_match" not in held["rounds"]["2"]
    assert "exact_match" not in held["gain"]
    assert set(held["rounds"]["2"]["against_first"]) == {"improved", "degraded", "unchanged", "same_text"}


def test_order_of_the_drafts_changes_nothing(held):
    prompts, drafts, scores = tables(CHAINS)
    assert summarise(prompts, drafts[::-1], scores[::-1])["held"] == held


def test_split_without_any_whole_chain_has_no_figures():
    summary = summarise(*tables({"p5": CHAINS["p5"]}))
    assert summary["held"] == {"num_prompts": 1, "rounds": {}}


def test_last_round_that_lost_every_score_is_not_passed_over():
    chains = {name: [*rounds[:2], None] for name, rounds in CHAINS.items() if name != "p5"}
    assert summarise(*tables(chains))["held"]["rounds"] == {}


def test_distinct_ngrams_of_words_and_of_characters():
    assert distinct(["a b a b a", "a b a b a"], 2) == 2 / 8
    assert distinct(["abab", "ba"], 2) == 2 / 4
    assert distinct(["", "a"], 2) == 0.0


def sampled(prompt, values, split="heldout"):
    """Parallel samples and their scores of one prompt; `values` are the verifier's."""
    drafts = [
        {"draft_id": f"{prompt}s{n}", "prompt_id": prompt, "split": split, "sample": n, "round": 1, "text": f"t{n}",
         "finish_reason": "stop", "num_tokens": 10}
        for n, _ in enumerate(values)
    ]  # fmt: skip
    scores = [
        {"draft_id": f"{prompt}s{n}", "prompt_id": prompt, "score": value, "correct": value} for n, value in enumerate(values)
    ]
    return drafts, scores


def chained(prompt, values, split="heldout"):
    drafts, scores = sampled(prompt, values, split)
    for n, row in enumerate(drafts):
        row |= {"draft_id": f"{prompt}c{n}", "sample": 0, "round": n + 1, "num_tokens": 7}
    for n, row in enumerate(scores):
        row |= {"draft_id": f"{prompt}c{n}"}
    return drafts, scores


def both(make, table):
    parts = [make(prompt, values) for prompt, values in table.items()]
    return [row for drafts, _ in parts for row in drafts], [row for _, scores in parts for row in scores]


def best_of(chains, samples, prompts="pq"):
    rows = [{"prompt_id": name, "split": "heldout"} for name in prompts]
    chains, samples = both(chained, chains), both(sampled, samples)
    summary = summarise(rows, *chains)
    add_best_of(summary, chains, samples)
    return summary["heldout"].get("best_of")


def test_best_of_a_chain_against_best_of_as_many_samples():
    found = best_of({"p": [0.5, 1.0], "q": [0.2, 0.3]}, {"p": [0.5, 0.1], "q": [1.0, 0.0]})
    assert (found["num_responses"], found["n"]) == (2, 2)
    assert found["chain"]["exact_match"]["mean"] == found["parallel"]["exact_match"]["mean"] == 0.5
    assert found["chain"]["reward"]["mean"] == pytest.approx((1.0 + 0.3) / 2)
    assert found["difference"]["reward"]["mean"] == pytest.approx((1.0 + 0.3 - 0.5 - 1.0) / 2)
    assert (found["chain"]["mean_tokens"], found["parallel"]["mean_tokens"]) == (14, 20)


def test_no_more_samples_count_than_the_chain_has_rounds():
    found = best_of({"p": [0.5, 0.4]}, {"p": [0.5, 0.1, 1.0]}, prompts="p")
    assert found["num_responses"] == 2
    assert found["parallel"]["exact_match"]["mean"] == 0.0


def test_prompt_that_lacks_a_score_on_either_side_is_left_out_of_both():
    assert best_of({"p": [0.5, 1.0], "q": [0.0, 0.0]}, {"p": [0.5, 1.0], "q": [1.0]})["n"] == 1
    assert best_of({"p": [0.5, 1.0]}, {}, prompts="p") is None


def change(before, now, verified=True):
    _, *old = tables(before, verified=verified)
    _, *new = tables(now, verified=verified)
    return against_previous(["held", "empty"], old, new)


EARLIER = {"p1": [(0.5, 0.0, "a"), (0.6, 1.0, "b")], "p2": [(1.0, 1.0, "c"), (0.2, 0.0, "d")], "p3": [(0.0, 0.0, "e"), None]}
LATER = {"p1": [(0.8, 1.0, "a"), (0.6, 1.0, "b")], "p2": [(1.0, 1.0, "c"), (0.9, 1.0, "d")], "p3": [(1.0, 1.0, "e")] * 2}


def test_two_models_are_compared_prompt_by_prompt():
    found = change(EARLIER, LATER)["held"]
    assert (found["n"], found["measure"]) == (2, "exact_match")
    assert [found[part]["mean"] for part in ("first", "last", "gain")] == [0.5, 0.5, 0.0]
    rewards = [found["reward"][part]["mean"] for part in ("first", "last", "gain")]
    assert rewards == pytest.approx([0.15, 0.35, 0.2])


def test_the_interval_of_a_change_is_that_of_the_paired_differences():
    # Rewards far apart, every one of them 2 better in the next model; exact match changes nowhere, which 50 prompts cannot prove.
    before = {f"p{n}": [(n, 0.0, "a")] for n in range(50)}
    found = change(before, {name: [(rounds[0][0] + 2, 0.0, "a")] for name, rounds in before.items()})["held"]
    assert found["reward"]["last"] == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert found["last"] == {"mean": 0.0, "low": pytest.approx(-0.0713, abs=1e-3), "high": pytest.approx(0.0713, abs=1e-3)}


def test_without_a_verifier_the_change_is_one_of_rewards():
    found = change(EARLIER, LATER, verified=False)["held"]
    assert found["measure"] == "reward"
    assert found["last"] == found["reward"]["last"]


def test_models_without_a_common_whole_chain_are_not_compared():
    assert change({"p3": EARLIER["p3"]}, {"p3": LATER["p3"]}) == {}
    assert change({"p1": EARLIER["p1"]}, {"p2": LATER["p2"]}) == {}
