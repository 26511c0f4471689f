"""Rows of turns through the real command: a model that learns from its critiques, and one that learns from whole trajectories."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from evolve_ray.audit import verify
from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import load_template
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import read_manifest
from evolve_ray.train.logprobs import sequence_logps
from evolve_ray.train.tree import Sequence
from tests.real.conftest import SMALL, fork, start

pytestmark = pytest.mark.long
TEMPLATE = load_template("tiny", "conversation")


@pytest.fixture(scope="module")
def reflected(place):
    """One iteration of tiny_reflect; a model that has learned little is right where half of the letters are."""
    command = start(place / "reflect", *SMALL, "selection.args.right=0.5", "--iterations", "1", recipe="tiny_reflect")
    assert command.wait() == 0
    return command


def retrained(command, recipe):
    """A run with the same drafts and another recipe's selection and objective."""
    run = fork(command, recipe, keep=("prompts", "generations", "scores"))
    (run / "config.json").unlink()
    again = start(run, *SMALL, "--iterations", "1", recipe=recipe)
    assert again.wait() == 0
    return again


@pytest.fixture(scope="module")
def trajectories(reflected):
    return retrained(reflected, "tiny_turns")


@pytest.fixture(scope="module")
def gradient(reflected):
    return retrained(reflected, "tiny_critique_gradient")


def tables(command):
    here = command.run / "iteration-01"
    drafts = {row["draft_id"]: row for row in shards.read_rows(read_manifest(here / "generations"))}
    scores = {row["draft_id"]: row["correct"] for row in shards.read_rows(read_manifest(here / "scores"))}
    return drafts, scores, *(rows.read_table(here / name / f"{name}.parquet") for name in ("pairs", "reference"))


def test_pairs_are_critiques_of_one_draft_after_the_ask_for_them(reflected):
    drafts, scores, pairs, _ = tables(reflected)
    revision = {
        (d["parent_id"], d["sample"]): scores[d["draft_id"]] for d in drafts.values() if d["round"] == 2 and d["kind"] == "answer"
    }
    assert pairs
    for pair in pairs:
        chosen, rejected = drafts[pair["chosen_id"]], drafts[pair["rejected_id"]]
        assert {chosen["kind"], rejected["kind"], pair["kind"]} == {"critique"}
        assert pair["context"] == list(TEMPLATE.critical(pair["prompt"], drafts[chosen["parent_id"]]["text"]))
        first, good, bad = scores[chosen["parent_id"]], *(revision[d["parent_id"], d["sample"]] for d in (chosen, rejected))
        assert good >= 0.5 > max(first, bad)


@pytest.mark.parametrize("name", ["reflected", "trajectories"])
def test_reference_is_that_of_a_plain_forward_of_the_contexts(name, request):
    command = request.getfixturevalue(name)
    _, _, pairs, reference = tables(command)
    policy = command.run / "iteration-00" / "checkpoint"
    chat = Chat(policy, rendering=TEMPLATE.rendering)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    for pair, stored in list(zip(pairs, reference, strict=True))[:8]:
        turns = {
            side: (pair["context"], pair[side], pair[f"{side}_finished"], pair.get(f"{side}_token_ids"))
            for side in ("chosen", "rejected")
        }
        turns |= {
            turn["name"]: (turn["context"], turn["text"], turn["finished"], turn.get("token_ids"))
            for turn in pair.get("turns", ())
        }
        for turn, (messages, text, finished, token_ids) in turns.items():
            response = chat.response_ids(text, finished=finished) if token_ids is None else token_ids
            sequence = Sequence(tuple(chat.context_ids(messages)), tuple(response))
            with torch.no_grad():
                alone = sequence_logps(model, [sequence], chat.pad_id, torch.device("cpu")).item()
            assert stored[turn] == pytest.approx(alone, abs=1e-3)
        assert (set(turns) == {"chosen", "rejected", "chosen_2", "rejected_2"}) == (name == "trajectories")


@pytest.mark.parametrize(("name", "loss"), [("reflected", "loss_dpo"), ("trajectories", "loss_turns")])
def test_run_is_sound_and_starts_with_a_policy_that_is_its_reference(name, loss, request):
    command = request.getfixturevalue(name)
    assert verify.main([str(command.run)]) == 0
    log = rows.read_jsonl(command.run / "iteration-01" / "checkpoint" / "training_log.jsonl")
    assert log[0][loss] == pytest.approx(0.6931, abs=1e-3)
    assert log[-1][loss] < log[0][loss]
    figures = rows.read_jsonl(command.run / "iteration-01" / "drift" / "drift.jsonl")[0]
    assert figures["winning_rounds"] == {}, "a critique wins no round"


def test_every_response_is_a_row_after_its_ask_with_an_advantage(gradient):
    drafts, _, pairs, reference = tables(gradient)
    assert {pair.get("kind") for pair in pairs} == {None, "critique"}
    assert {drafts[pair["chosen_id"]]["round"] for pair in pairs} == {2}, "a first answer is alone in its group"
    assert all(stored["rejected"] is None and stored["chosen"] < 0 for stored in reference)
    assert verify.main([str(gradient.run)]) == 0
    log = rows.read_jsonl(gradient.run / "iteration-01" / "checkpoint" / "training_log.jsonl")
    assert log[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
