"""What vLLM needs after a model's weights were loaded again in place."""

from typing import Any


def repack_tied_head(model: Any) -> None:
    """Packs the output layer again after a reload on a CPU, where vLLM computes logits from a packed copy of that layer.

    If the layer is tied to the embedding, a checkpoint has no weight for it, and a reload keeps the packed copy of the old model.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and getattr(layer, "weight", None) is not None and layer.weight.numel():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
