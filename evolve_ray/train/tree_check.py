"""Checks that a model can take trees, before the training starts, so that wrong losses never happen.

First the model's configuration is checked. Then the model computes a few tokens as a tree and as plain rows, and the results are
compared. Both checks are fast.
"""

from typing import Any

import torch

from evolve_ray.errors import UserError
from evolve_ray.train import attention
from evolve_ray.train.logprobs import TreeModel
from evolve_ray.train.tree import Forward, Sequence, lay_out

ADVICE = 'set trainer.forward = "separate"'
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # nats a token; a wrong mask differs by far more


def tree_model(model: Any, device: torch.device) -> TreeModel:
    """The model with an attention for trees: FlexAttention on a GPU, otherwise SDPA over the visible keys (`attention.py`).

    Raises UserError if a layer of the model cannot take the mask of a tree.
    """
    flex = device.type == "cuda"
    takes_mask = model._supports_flex_attn if flex else model._supports_sdpa
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    unsupported = layer_types - {"full_attention", "sliding_attention", "chunked_attention"}
    if model._is_stateful or unsupported or not takes_mask:
        raise UserError(
            f"trainer.forward: is 'tree', but {model.config.model_type} has layers that cannot take the mask of a tree"
            f"{' (' + ', '.join(sorted(unsupported)) + ')' if unsupported else ''}; {ADVICE}"
        )
    model.set_attn_implementation("flex_attention" if flex else attention.NAME)
    return TreeModel(model)


def attention_limit(config: Any) -> int | None:
    """The longest sequence from which no sliding window and no chunk of attention hides a token; None: no limit."""
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or ("sliding_attention", "chunked_attention")
    options = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    limits = [getattr(config, option, None) for layer_type, option in options.items() if layer_type in layer_types]
    return min((limit for limit in limits if limit), default=None)


def check_length(config: Any, forward: Forward) -> None:
    """Raises UserError if a sequence of the forward is longer than `attention_limit`."""
    limit, longest = attention_limit(config), int(forward.positions_RW.max()) + 1
    if limit is not None and longest > limit:
        raise UserError(
            f"trainer.forward: is 'tree', but {config.model_type} has layers that see only {limit} tokens back, and a sequence "
            f"has {longest} tokens; {ADVICE}"
        )


def check_tree(model: Any, tree: TreeModel, device: torch.device) -> bool:
    """Computes a few tokens as a tree and as separate rows; returns whether the head alone computes the model's logits.

    If it does not (soft caps, scales), chunks of logits would be wrong, and the logits must come from the model's own forward.
    `model` is the engine around `tree`. Raises UserError if the log-probabilities of the tree and of the rows differ.
    """
    vocabulary = tree.model.get_input_embeddings().num_embeddings
    trunk, *branches = [tuple((17 * position + 5 * part + 3) % vocabulary for position in range(9)) for part in range(4)]
    sequences = [Sequence((*trunk, *draft), response) for draft in branches for response in branches]
    with torch.no_grad():
        in_tree = token_logps(model, lay_out([sequences], [[0]]), device, chunks=0)
        rows = lay_out([[sequence] for sequence in sequences], [[row] for row in range(len(sequences))])
        in_rows = token_logps(model, rows, device, 0, plain=True)
        difference = (in_tree - in_rows).abs().max().item()
        if not difference <= TOLERANCE[next(tree.parameters()).dtype]:
            raise UserError(
                f"trainer.forward: is 'tree', but the log-probabilities of {tree.model.config.model_type} in a tree differ from "
                f"those of its own forward by {difference:.3g} nats a token; {ADVICE}"
            )
        line = lay_out([[Sequence(trunk[:1], trunk[1:])]], [[0]])  # every node predicts, so both ways have the same shapes
        same_logits = torch.equal(*(token_logps(model, line, device, chunks) for chunks in (0, 1)))
    return same_logits


def few_logps(model: Any, ids: list[int], device: torch.device) -> torch.Tensor:
    """The log-probabilities of some tokens after the first, read as one plain row."""
    return token_logps(model, lay_out([[Sequence((ids[0],), tuple(ids[1:]))]], [[0]]), device, 0, plain=True)


def token_logps(model: Any, forward: Forward, device: torch.device, chunks: int, *, plain: bool = False) -> torch.Tensor:
    """`logps_N` of all targets, in nats; with `plain` each row is one ordinary sequence."""
    ids, positions, ends, where, targets = (
        torch.from_numpy(part).to(device)
        for part in (forward.ids_RW, forward.positions_RW, forward.ends_RW, forward.where_N, forward.targets_N)
    )
    return model(ids, positions, None if plain else ends, where, targets, chunks)
