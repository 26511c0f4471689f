"""The tiny model as the trainer reads it: plain weights, and the chat that makes its tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from evolve_ray.models.chat import Chat


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def chat(tiny_model):
    return Chat(tiny_model)
