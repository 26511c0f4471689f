"""Adapters: nothing changes when they are put in, and a merged checkpoint is the plain model that was trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from evolve_ray.config.options import Trainer
from evolve_ray.train import adapters
from evolve_ray.train.logprobs import sequence_logps
from evolve_ray.train.tree import Sequence

TEXTS = [Sequence((1, 5, 9), (7, 8, 2)), Sequence((1, 4), (3,))]


def read(model):
    return sequence_logps(model, TEXTS, 0, torch.device("cpu"))


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def test_a_fresh_adapter_changes_no_bit_and_freezes_the_rest(model):
    before = read(model)
    adapters.add_adapters(model, Trainer(lora_rank=3), seed=1)
    assert torch.equal(read(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(adapters.FACTORS in name for name in trained)
    assert not [name for name in trained if "lm_head" in name]


def test_ranks_start_from_the_same_adapters(tiny_model):
    factors = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        torch.rand(7)  # what else a rank drew before
        adapters.add_adapters(model, Trainer(lora_rank=3), seed=1)
        factors.append([value for name, value in model.named_parameters() if adapters.FACTORS in name])
    assert all(torch.equal(*both) for both in zip(*factors, strict=True))


def test_a_merged_checkpoint_is_the_plain_model_with_what_was_learnt(model, tiny_model):
    adapters.add_adapters(model, Trainer(lora_rank=3, lora_alpha=6), seed=1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    learnt = read(model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = read(plain)
    state = {name: adapters.merge(parts, scale) for name, parts, scale in adapters.weight_parts(model)}
    assert state.keys() == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(state, strict=False)
    assert torch.allclose(read(plain), learnt, rtol=1e-5)
    assert not torch.allclose(before, learnt, rtol=1e-2)


def test_a_model_without_adapters_is_exported_as_it_is(model):
    state = {name: adapters.merge(parts, scale) for name, parts, scale in adapters.weight_parts(model)}
    assert all(torch.equal(state[name], parameter) for name, parameter in model.named_parameters())
