"""LoRA (arXiv 2106.09685): trains low-rank adapters of all linear layers except the head, instead of the weights.

An adapter starts at zero, so the policy starts as exactly the model that the reference is. At the end of a training the adapters
are merged into the weights: the checkpoint is a plain Hugging Face folder, for engines and for the next training.
"""

from collections.abc import Iterator
from typing import Any

import torch

from evolve_ray.config.options import Trainer

BASE, FACTORS = ".base_layer.", ".lora_"  # parts of peft's parameter names: the original weight, and the factors A and B


def add_adapters(model: Any, trainer: Trainer, seed: int) -> None:
    """Adds adapters of rank `trainer.lora_rank` to the model and freezes all other weights; the same on every rank."""
    import peft

    torch.manual_seed(seed)
    # No dropout: the loss of the first step must be that of the reference.
    lora = peft.LoraConfig(r=trainer.lora_rank, lora_alpha=trainer.lora_alpha, lora_dropout=0.0, target_modules="all-linear")
    peft.inject_adapter_in_model(lora, model)


def weight_parts(model: Any) -> Iterator[tuple[str, list[torch.nn.Parameter], float]]:
    """Yields (name, parameters, scale) for each weight of the plain model; the parameters are [W] or [W, A, B].

    The weight is W + scale B A. Under ZeRO-3 the parameters must be gathered before `merge` reads them.
    """
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if FACTORS in name:
            continue
        if BASE not in name or not name.endswith(".weight"):
            yield name.replace(BASE, "."), [parameter], 0.0
            continue
        layer = layers[name.rpartition(BASE)[0]]
        (adapter,) = layer.lora_A
        factors = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
        yield name.replace(BASE, "."), [parameter, *factors], layer.scaling[adapter]


def merge(parts: list[torch.nn.Parameter], scale: float) -> torch.Tensor:
    """A copy of the weight on the CPU with its adapter merged; the sum is computed in float32 and rounded once."""
    weight = parts[0].detach()
    if len(parts) == 3:
        down, up = (part.detach().float() for part in parts[1:])
        weight = (weight.float() + scale * (up @ down)).to(weight.dtype)
    return weight.to("cpu", copy=True)
