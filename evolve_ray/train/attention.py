"""Attention over trees on a CPU: a block of queries uses only the keys that at least one of its queries sees.

SDPA with a dense mask multiplies every query with every key, and then masks most of the products. FlexAttention skips them on a
GPU, but it has no backward pass on a CPU.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_of_seen_keys"
BLOCK_TOKENS = 128  # queries of a block: a larger block sees more keys, a smaller one needs more calls


def seen_keys_attention(
    module: torch.nn.Module,
    query_RHWD: torch.Tensor,
    key_RGWD: torch.Tensor,
    value_RGWD: torch.Tensor,
    mask_R1WW: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Returns `(out_RWHD, None)`, the result of `sdpa_attention_forward` of transformers for a boolean mask.

    Without a mask, and for rows of one block, it calls that function.
    """
    width = query_RHWD.shape[2]
    if mask_R1WW is None or width <= BLOCK_TOKENS:
        return sdpa_attention_forward(module, query_RHWD, key_RGWD, value_RGWD, mask_R1WW, **options)
    rows = []
    for row in range(len(query_RHWD)):
        this_row = slice(row, row + 1)
        blocks = []
        for start in range(0, width, BLOCK_TOKENS):
            mask_11TW = mask_R1WW[this_row, :, start : start + BLOCK_TOKENS]
            seen_K = mask_11TW.any(dim=2).flatten().nonzero()[:, 0]
            query_1HTD = query_RHWD[this_row, :, start : start + BLOCK_TOKENS]
            key_1GKD, value_1GKD = (part[this_row].index_select(2, seen_K) for part in (key_RGWD, value_RGWD))
            mask_11TK = mask_11TW.index_select(3, seen_K)
            blocks.append(sdpa_attention_forward(module, query_1HTD, key_1GKD, value_1GKD, mask_11TK, **options)[0])
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows), None


AttentionInterface.register(NAME, seen_keys_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
