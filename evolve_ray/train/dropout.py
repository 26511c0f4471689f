"""Switches everything off that makes a training forward random, and proves it.

The loss compares the policy with a reference, pair by pair: with dropout both would be other policies in every forward, the first
loss would not be ln 2, and no run could be repeated. The model stays in training mode, because evaluation mode would also switch
off gradient checkpointing.
"""

from collections.abc import Callable
from typing import Any

import torch

from evolve_ray.errors import UserError
from evolve_ray.models.gate import is_random


def switch_off(model: torch.nn.Module, config: Any) -> None:
    """Sets every dropout and noise of the modules, and of the configuration that modules read in a forward, to 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        zero(module)
    zero_config(config)


def zero_config(config: Any) -> None:
    zero(config)
    for part in list(vars(config).values()):
        if hasattr(part, "to_dict") and part is not config:
            zero_config(part)


def zero(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if is_random(name, value):
            setattr(holder, name, 0.0)


def load_without_dropout(model: torch.nn.Module, forward: Callable[[], torch.Tensor], field: str) -> None:
    """Puts a model into training mode without dropout; `forward()` computes a few values with it.

    Raises UserError unless the values in training mode are those that the model has in evaluation mode as it was released, and
    do not change with the random state. Devices without exact sums may differ by what two equal calls differ.
    """
    with torch.no_grad(), torch.random.fork_rng():
        model.eval()
        released, again = forward(), forward()
        switch_off(model, model.config)
        model.train()
        torch.manual_seed(1)
        first = forward()
        torch.manual_seed(2)
        second = forward()
    noise = 10 * (released - again).abs().max().item()
    change = max((released - first).abs().max().item(), (first - second).abs().max().item())
    if not change <= noise:
        raise UserError(
            f"{field}: {type(model).__name__} computes other values in training mode than in evaluation mode (by {change:.3g}) "
            "even without dropout, so it cannot be trained against a reference; use a model of another family"
        )
