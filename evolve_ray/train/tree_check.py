"""Whether a model can be read in trees: refused by name before training, never found out from its losses.

What a model's configuration says is checked first; then a few tokens are read both ways. Both checks cost a moment.
"""

from typing import Any

import torch

from evolve_ray.errors import UserError
from evolve_ray.train import attention
from evolve_ray.train.logprobs import TreeModel
from evolve_ray.train.tree import Forward, Sequence, lay_out

WAY_OUT = 'set trainer.forward = "separate"'
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # nats a token; a wrong mask is off by far more


def tree_model(model: Any, device: torch.device) -> TreeModel:
    """The model with the attention that trees need: FlexAttention on a GPU, else SDPA on the keys that are seen."""
    flex = device.type == "cuda"
    takes_mask = model._supports_flex_attn if flex else model._supports_sdpa
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    other = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if model._is_stateful or other or not takes_mask:
        raise UserError(
            f"trainer.forward: is 'tree', but {model.config.model_type} has layers that take no mask of a tree"
            f"{' (' + ', '.join(sorted(other)) + ')' if other else ''}; {WAY_OUT}"
        )
    model.set_attn_implementation("flex_attention" if flex else attention.NAME)
    return TreeModel(model)


def reach(config: Any) -> int | None:
    """Tokens that every layer sees back to: up to there a sliding window or a chunk hides nothing. None: all of them."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ("sliding_attention", "chunked_attention")
    names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    found = [getattr(config, name, None) for kind, name in names.items() if kind in kinds]
    return min((limit for limit in found if limit), default=None)


def refuse_beyond_reach(config: Any, forward: Forward) -> None:
    limit, deepest = reach(config), int(forward.positions_RW.max()) + 1
    if limit is not None and deepest > limit:
        raise UserError(
            f"trainer.forward: is 'tree', but {config.model_type} has layers that see {limit} tokens back and a sequence has "
            f"{deepest}; {WAY_OUT}"
        )


def prove(model: Any, tree: TreeModel, device: torch.device) -> bool:
    """Reads a few tokens as a tree and one by one; gives back whether the head alone makes the model's logits.

    Where it does not (soft caps, scales) chunks would be wrong, and the model's own logits must be taken. `model` is the
    engine around `tree`. Raises `UserError` where the tree gives other log-probabilities than the model's own forward.
    """
    vocabulary = tree.model.get_input_embeddings().num_embeddings
    trunk, *branches = [tuple((17 * place + 5 * part + 3) % vocabulary for place in range(9)) for part in range(4)]
    sequences = [Sequence((*trunk, *one), two) for one in branches for two in branches]
    training = tree.training
    tree.eval()  # dropout would make any two forwards differ
    with torch.no_grad():
        joined = per_token(model, lay_out([sequences], [[0]]), device, chunks=0)
        alone = per_token(model, lay_out([[s] for s in sequences], [[n] for n in range(len(sequences))]), device, 0, plain=True)
        difference = (joined - alone).abs().max().item()
        if not difference <= TOLERANCE[next(tree.parameters()).dtype]:
            raise UserError(
                f"trainer.forward: is 'tree', but {tree.model.config.model_type} gives log-probabilities in a tree that differ "
                f"from its own by {difference:.3g} nats a token; {WAY_OUT}"
            )
        line = lay_out([[Sequence(trunk[:1], trunk[1:])]], [[0]])  # every node predicts: both products have the same shape
        alike = torch.equal(*(per_token(model, line, device, chunks) for chunks in (0, 1)))
    tree.train(training)
    return alike


def per_token(model: Any, forward: Forward, device: torch.device, chunks: int, *, plain: bool = False) -> torch.Tensor:
    """`logps_N` of all targets; `plain` rows are read as the model always reads them."""
    ids, positions, ends, where, targets = (
        torch.from_numpy(part).to(device)
        for part in (forward.ids_RW, forward.positions_RW, forward.ends_RW, forward.where_N, forward.targets_N)
    )
    return model(ids, positions, None if plain else ends, where, targets, chunks)
