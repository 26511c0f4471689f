"""LoRA (arXiv 2106.09685): low-rank adapters of all linear layers but the head are trained in place of the weights.

An adapter starts at zero, so a training starts at the very model that the reference is; at its end the adapters are merged
into the weights, and the checkpoint is a plain Hugging Face folder again, which engines load and the next training starts from.
"""

from collections.abc import Iterator
from typing import Any

import torch

from evolve_ray.config.options import Trainer

INSIDE, FACTORS = ".base_layer.", ".lora_"  # peft's names for the weight inside an adapted layer, and for the factors


def adapt(model: Any, trainer: Trainer, seed: int) -> None:
    """Puts adapters of rank `trainer.lora_rank` into the model and freezes everything else; the same on every rank."""
    import peft

    torch.manual_seed(seed)
    # No dropout: the loss of the first step must be that of the reference.
    given = peft.LoraConfig(r=trainer.lora_rank, lora_alpha=trainer.lora_alpha, lora_dropout=0.0, target_modules="all-linear")
    peft.inject_adapter_in_model(given, model)


def merged(model: Any) -> Iterator[tuple[str, list[torch.nn.Parameter], float]]:
    """For each weight of the plain model: its name there, the parameters [W] or [W, A, B], and the scale.

    The weight is W + scale B A; gather the parameters before they are read, see `merge`.
    """
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if FACTORS in name:
            continue
        if INSIDE not in name or not name.endswith(".weight"):
            yield name.replace(INSIDE, "."), [parameter], 0.0
            continue
        layer = layers[name.rpartition(INSIDE)[0]]
        (adapter,) = layer.lora_A
        factors = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
        yield name.replace(INSIDE, "."), [parameter, *factors], layer.scaling[adapter]


def merge(parts: list[torch.nn.Parameter], scale: float) -> torch.Tensor:
    """A copy of the weight on the CPU, with its adapter in it; added in float32 and rounded once."""
    weight = parts[0].detach()
    if len(parts) == 3:
        down, up = (part.detach().float() for part in parts[1:])
        weight = (weight.float() + scale * (up @ down)).to(weight.dtype)
    return weight.to("cpu", copy=True)
