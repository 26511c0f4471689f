"""Sums of log-probabilities against a loop in float64, on a random model of two layers."""

import math

import pytest
import torch

from evolve_ray.config.options import Training
from evolve_ray.refine.template import Template
from evolve_ray.store.rows import REFERENCE
from evolve_ray.train import objectives
from evolve_ray.train.logprobs import pair_sequences, sequence_logps
from evolve_ray.train.tree import Sequence

CPU = torch.device("cpu")
NAMES = tuple(name for name in REFERENCE.names if name != "pair_id")
PAIR = {"prompt": "sort:bca", "chosen": "abc", "rejected": "cabb", "chosen_finished": True, "rejected_finished": False}
SEQUENCES = [
    Sequence((1, 20, 30), (40, 41, 3)),
    Sequence((1, 21), (50,)),
    Sequence((1, 20, 30, 31, 32, 33, 34), (40, 41, 42, 43, 44, 45)),
    Sequence((1, 22, 23, 24), ()),
]


def template(layout):
    return Template(layout=layout, first="{prompt}", refine="fix", one_message="fix {prompt} {draft}")


def logps(model, sequences, pad_id=0):
    with torch.no_grad():
        return sequence_logps(model, sequences, pad_id, CPU)


def by_hand(model, sequence):
    """log p of each response token, one forward per sequence, softmax in float64."""
    ids = [*sequence.context, *sequence.response]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    total = 0.0
    for place in range(len(sequence.context), len(ids)):
        total += torch.log_softmax(logits[place - 1], dim=0)[ids[place]].item()
    return total


def test_sums_equal_a_loop_in_float64(model):
    found = logps(model, SEQUENCES)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([by_hand(model, sequence) for sequence in SEQUENCES], abs=1e-5)
    assert min(found[:3].abs()) > 0.5  # sums that are far from the zero of an empty one


def test_empty_response_sums_to_zero(model):
    assert logps(model, SEQUENCES)[3] == 0.0
    assert logps(model, SEQUENCES[3:]).tolist() == [0.0]


def test_padding_and_company_in_the_batch_change_nothing(model):
    alone = [logps(model, [sequence]).item() for sequence in SEQUENCES]
    assert logps(model, SEQUENCES).tolist() == pytest.approx(alone, abs=1e-5)
    assert logps(model, SEQUENCES[::-1]).tolist() == pytest.approx(alone[::-1], abs=1e-5)
    assert logps(model, SEQUENCES, pad_id=3).tolist() == pytest.approx(alone, abs=1e-5)


def test_only_response_tokens_count(model):
    whole = Sequence((1,), (20, 30, 40, 41))
    first, rest = Sequence((1,), (20, 30)), Sequence((1, 20, 30), (40, 41))
    total, one, two = logps(model, [whole, first, rest]).tolist()
    assert total == pytest.approx(one + two, abs=1e-5)
    assert abs(one) > 0.5


def test_gradient_reaches_the_model(model):
    sequence_logps(model, SEQUENCES[:2], 0, CPU).sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize("layout", ["conversation", "one_message"])
def test_sequences_of_a_pair_are_the_responses_after_their_contexts(chat, layout):
    sequences = pair_sequences(chat, template(layout), PAIR, NAMES)
    between = {"conversation": "{x}<|end|><|assistant|>{y}<|end|><|user|>fix", "one_message": "fix {x} {y}"}[layout]
    for name, sequence in sequences.items():
        response, _, draft = name.partition("_after_")
        user = between.format(x=PAIR["prompt"], y=PAIR[draft]) if draft else PAIR["prompt"]
        assert chat.tokenizer.decode(sequence.context) == f"<|user|>{user}<|end|><|assistant|>"
        assert chat.tokenizer.decode(sequence.response) == {"chosen": "abc<|end|>", "rejected": "cabb"}[response]
    assert tuple(sequences) == NAMES


def test_only_the_sequences_that_are_needed_are_built(chat):
    assert list(pair_sequences(chat, template("conversation"), PAIR, ("chosen",))) == ["chosen"]


def test_template_braces_and_markup_in_a_pair_stay_text(chat):
    pair = PAIR | {"prompt": "{draft}<|end|><|assistant|>", "rejected": "{prompt}"}
    plain = pair_sequences(chat, template("one_message"), PAIR, NAMES)
    odd = pair_sequences(chat, template("one_message"), pair, NAMES)
    for name in NAMES:
        of = [[token for token in s.context if token in chat.tokenizer.added_tokens_decoder] for s in (odd[name], plain[name])]
        assert of[0] == of[1]
    text = chat.tokenizer.decode(odd["chosen_after_rejected"].context)
    assert text == "<|user|>fix {draft}<|end|><|assistant|> {prompt}<|end|><|assistant|>"


@pytest.mark.parametrize("layout", ["conversation", "one_message"])
def test_step_zero_has_the_losses_of_a_policy_that_is_its_reference(model, chat, layout):
    built = pair_sequences(chat, template(layout), PAIR, NAMES)
    values = {name: value[None] for name, value in zip(NAMES, logps(model, list(built.values())), strict=True)}
    training = Training(objective="evolve", alpha=0.5)
    loss, metrics = objectives.evolve(values, values, training)
    assert metrics["loss_dpo"].item() == pytest.approx(math.log(2), abs=1e-7)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * 0.5, abs=1e-7)
    assert {metrics[name].item() for name in ("margin", "margin_improve", "margin_keep", "reward_chosen")} == {0.0}
    assert len({round(value.item(), 3) for value in values.values()}) == len(NAMES)
