"""A training on rows of turns with real ZeRO-3: trees and separate rows do the same, and the reference has every turn."""

import pytest

from evolve_ray.select.pairs import make_turn
from tests.tensors.one_rank import LETTERS, process_group, train

__all__ = ["process_group"]
pytestmark = pytest.mark.long


def row(number):
    """Two trajectories of a critique and an answer; in every second row the worse one ends after its critique."""
    letters = LETTERS[number]
    asked = [
        {"role": "user", "content": f"sort:{letters}"},
        {"role": "assistant", "content": letters},
        {"role": "user", "content": "check"},
    ]

    def turn(side, text, messages, kind="answer"):
        return {
            "draft_id": f"{number}{side}",
            "round": 2,
            "text": text,
            "finish_reason": "stop",
            "kind": kind,
            "messages": messages,
        }

    better, worse = (turn(side, f"{text} first", asked, "critique") for side, text in (("w", letters[1]), ("l", letters[0])))
    after = [
        [*asked, {"role": "assistant", "content": one["text"]}, {"role": "user", "content": "fix"}] for one in (better, worse)
    ]
    second = {
        "chosen_2": turn("w2", "".join(sorted(letters)), after[0]),
        "rejected_2": turn("l2", letters, after[1]) if number % 2 else None,
    }
    return make_turn({"prompt_id": f"p{number}", "prompt": f"sort:{letters}"}, better, rejected=worse, turns=second)


def test_trees_and_separate_rows_are_the_same_training(process_group, tiny_model, tmp_path, monkeypatch):
    table, training = [row(number) for number in range(4)], {"objective": "turns_dpo", "epochs": 2, "batch_pairs": 2}
    runs = {
        forward: train(tiny_model, tmp_path / forward, monkeypatch, pairs=table, training=training, trainer={"forward": forward})
        for forward in ("tree", "separate")
    }
    for one, other in zip(*(run["log"] for run in runs.values()), strict=True):
        assert one["loss_turns"] == pytest.approx(other["loss_turns"], abs=1e-5)
    assert runs["tree"]["log"][0]["loss_turns"] == pytest.approx(0.693147, abs=1e-5)
    assert runs["tree"]["log"][-1]["loss_turns"] < 0.69
    for one, other in zip(*(run["reference"] for run in runs.values()), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert (one["rejected_2"] == 0.0) == (one["pair_id"] in [table[0]["pair_id"], table[2]["pair_id"]])
        assert one["chosen_after_chosen"] is None
