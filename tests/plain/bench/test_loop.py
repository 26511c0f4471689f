"""What the benchmark of a whole iteration makes of its turns, without running one side."""

import argparse

import pytest

from evolve_ray.bench import loop, script
from evolve_ray.errors import UserError
from evolve_ray.store import rows as tables

PAIRS = [{"prompt": "x", "chosen": "aa", "rejected": "b"}, {"prompt": "y", "chosen": "c", "rejected": "dd"}]


def turn(work_s=10.0, wall_s=40.0, pairs=PAIRS, losses=(0.6931, 0.65)):
    return loop.Turn(work_s, wall_s, 2 * work_s, {"engines": work_s}, pairs, list(losses))


def test_ratios_are_taken_turn_by_turn_with_and_without_start():
    turns = {"ours": [turn(10, 40), turn(20, 50)], "script": [turn(15, 30), turn(22, 60)]}
    without, with_start = loop.compared("loop_vs_script", turns)
    assert (without.name, without.values) == ("loop_vs_script", [1.5, 1.1])
    assert (with_start.name, with_start.values) == ("loop_vs_script_with_start", [0.75, 1.2])
    assert (without.counts["pairs"], without.counts["updates"], without.counts["CPU ratios"]) == (2, 2, [1.5, 1.1])


def test_the_order_of_pairs_does_not_matter_but_their_texts_do():
    loop.check_same(turn(), turn(pairs=PAIRS[::-1]))
    with pytest.raises(UserError, match="the pairs differ"):
        loop.check_same(turn(), turn(pairs=[PAIRS[0], {**PAIRS[1], "chosen": "cc"}]))


@pytest.mark.parametrize("losses", [(0.6931, 0.6502), (0.6931,), (0.6931, float("nan"))])
def test_losses_that_differ_are_not_compared(losses):
    loop.check_same(turn(), turn(losses=(0.6931, 0.65005)))
    with pytest.raises(UserError, match="the losses of 2 and"):
        loop.check_same(turn(), turn(losses=losses))


def parsed(*words):
    parser = argparse.ArgumentParser()
    loop.options(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("words", [("--prompts", "40"), ("--script-micro", "5")])
def test_sizes_with_an_incomplete_update_are_refused_before_a_model_is_made(words):
    with pytest.raises(UserError, match=f"{words[0]}: is {words[1]}"):
        loop.rows(parsed(*words))


def test_the_script_gets_the_prompts_seeds_and_lengths_of_a_run(tmp_path):
    args = parsed("--new", "16", "--rounds", "2")
    tables.write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": text} for text in ("aa", "bb", "cc")))
    prompts = loop.script_prompts(tmp_path, args)
    assert sorted(prompt["prompt"] for prompt in prompts) == ["aa", "bb", "cc"]
    for prompt in prompts:
        prompt_id = tables.content_id("prompt", prompt["prompt"], None)
        assert prompt["seeds"] == [tables.derive_seed(0, 1, prompt_id, 0, number) for number in (1, 2)]
        assert prompt["lengths"] == [loop.length(seed, 16) for seed in prompt["seeds"]]


def test_lengths_are_from_an_eighth_to_all():
    assert {loop.length(seed, 16) for seed in range(500)} == set(range(2, 17))


def test_the_script_pairs_the_best_draft_with_the_worst():
    prompts = [{"prompt": "x"}, {"prompt": "y"}]
    drafts, scores = [["a", "b", "c"], ["d", "d", "d"]], [[0.2, -1.0, 0.7], [0.0, 0.1, 0.2]]
    assert script.best_and_worst(prompts, drafts, scores) == [{"prompt": "x", "chosen": "c", "rejected": "b"}]


def test_the_script_imports_nothing_of_this_package():
    text = loop.Path(script.__file__).read_text()
    assert "evolve_ray" not in text
