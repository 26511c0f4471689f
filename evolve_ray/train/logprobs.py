"""Log-probabilities of responses: the functions behind reference, policy and probes.

`sequence_logps` is the plain form: one padded row a sequence, all logits. `TreeModel` and `tree_logps` give the same numbers
from trees (`tree.py`), in which what sequences share is computed once and no more logits exist than one chunk of them.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import Template
from evolve_ray.train.tree import CHUNK_TOKENS, Forward, Sequence


def pair_sequences(chat: Chat, template: Template, pair: dict, needs: tuple[str, ...]) -> dict[str, Sequence]:
    """The sequences of one pair by name: `chosen` after x, `chosen_after_rejected` after (x, y_l, z), and so on."""
    responses = {name: tuple(chat.response_ids(pair[name], finished=pair[f"{name}_finished"])) for name in ("chosen", "rejected")}
    contexts: dict[str, tuple[int, ...]] = {}
    sequences = {}
    for name in needs:
        response, _, draft = name.partition("_after_")
        if draft not in contexts:
            messages = template.refinement(pair["prompt"], pair[draft]) if draft else template.direct(pair["prompt"])
            contexts[draft] = tuple(chat.context_ids(messages))
        sequences[name] = Sequence(contexts[draft], responses[response])
    return sequences


def sequence_logps(model: Any, sequences: list[Sequence], pad_id: int, device: torch.device) -> torch.Tensor:
    """`logps_S`: for each sequence the sum of log p(token | all before it) over its response tokens, in nats, float32.

    One forward over right-padded `ids_ST`; context and padding carry no weight. An empty response sums to 0.
    """
    width = max(len(s.context) + len(s.response) for s in sequences)
    ids_ST = torch.full((len(sequences), width), pad_id)
    mask_ST = torch.zeros((len(sequences), width), dtype=torch.long)
    response_ST = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        end = len(sequence.context) + len(sequence.response)
        ids_ST[row, :end] = torch.tensor(sequence.context + sequence.response)
        mask_ST[row, :end] = 1
        response_ST[row, len(sequence.context) : end] = True
    ids_ST, mask_ST, response_ST = ids_ST.to(device), mask_ST.to(device), response_ST.to(device)
    logits_STV = model(input_ids=ids_ST, attention_mask=mask_ST, use_cache=False).logits[:, :-1]
    # Only where a response token is predicted: context and padding need no softmax over the vocabulary.
    where_ST = response_ST[:, 1:]
    logps_N = chosen_logps(logits_STV[where_ST], ids_ST[:, 1:][where_ST])
    rows_N = where_ST.nonzero()[:, 0]
    return torch.zeros(len(sequences), device=device).index_add(0, rows_N, logps_N)


def chosen_logps(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """log p of the target tokens, float32."""
    logits_NV = logits_NV.float()
    return logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(dim=1)


class TreeModel(torch.nn.Module):
    """A causal language model whose forward takes trees and gives the log-probabilities of chosen tokens.

    It is one module, so that DeepSpeed sees one forward: the shards of ZeRO-3 are gathered by the hooks of the model's own
    modules, also when a chunk is computed again in the backward pass.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.flex = model.config._attn_implementation == "flex_attention"

    def forward(
        self,
        ids_RW: torch.Tensor,
        positions_RW: torch.Tensor,
        ends_RW: torch.Tensor | None,
        where_N: torch.Tensor,
        targets_N: torch.Tensor,
        num_chunks: int,
    ) -> torch.Tensor:
        """`logps_N` of the targets, in nats, float32. Every rank must pass the same `num_chunks`.

        With 0 chunks the logits come from the model's own forward, all of them at once. Without `ends_RW` each row is one
        sequence, which the model reads as it always does.
        """
        read: dict[str, Any] = {"input_ids": ids_RW, "use_cache": False}
        if ends_RW is not None:
            mask = block_mask(ends_RW) if self.flex else dense_mask(ends_RW)
            read |= {"attention_mask": mask, "position_ids": positions_RW}
        if not num_chunks:
            return chosen_logps(self.model(**read).logits.flatten(0, 1)[where_N], targets_N)
        hidden_NH = self.model.base_model(**read)[0].flatten(0, 1)[where_N]
        chunks = list(zip(hidden_NH.tensor_split(num_chunks), targets_N.tensor_split(num_chunks), strict=True))
        if num_chunks == 1 or not torch.is_grad_enabled():
            return torch.cat([self.chunk(*chunk) for chunk in chunks])
        again = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(self.chunk, *chunk, **again) for chunk in chunks])

    def chunk(self, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """The head on a few hidden states; its logits are not kept."""
        return chosen_logps(self.model.get_output_embeddings()(hidden_NH), targets_N)


def dense_mask(ends_RW: torch.Tensor) -> torch.Tensor:
    """`mask_R1WW`: true where the key is an ancestor of the query or the query itself."""
    node_W = torch.arange(ends_RW.shape[1], device=ends_RW.device)
    return ((node_W <= node_W[:, None]) & (node_W[:, None] < ends_RW[:, None, :]))[:, None]


def block_mask(ends_RW: torch.Tensor) -> Any:
    """The same for FlexAttention, which skips blocks of pairs that do not see each other."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < ends_RW[row, key])

    rows, width = ends_RW.shape
    compiled = ends_RW.device.type == "cuda"  # without it the whole mask is made first
    return create_block_mask(sees, rows, None, width, width, device=str(ends_RW.device), _compile=compiled)


def num_chunks(forward: Forward) -> int:
    """Calls of the head that a forward needs, at least 1."""
    return max(1, -(-len(forward.targets_N) // CHUNK_TOKENS))


def tree_logps(model: Any, forward: Forward, device: torch.device, chunks: int) -> torch.Tensor:
    """`logps_S` of a forward's sequences, as `sequence_logps` defines them; `model` is a `TreeModel` or an engine around one.

    `chunks` is what the ranks have agreed upon; those without a target get one that counts nowhere.
    """
    missing = max(0, chunks - len(forward.targets_N))
    where_N, targets_N, owners_N = (torch.from_numpy(part) for part in (forward.where_N, forward.targets_N, forward.owners_N))
    where_N, targets_N = (torch.nn.functional.pad(part, (0, missing)) for part in (where_N, targets_N))
    owners_N = torch.nn.functional.pad(owners_N, (0, missing), value=forward.num_sequences)
    nodes = [torch.from_numpy(part).to(device) for part in (forward.ids_RW, forward.positions_RW, forward.ends_RW)]
    logps_N = model(*nodes, where_N.to(device), targets_N.to(device), chunks)
    sums_S = torch.zeros(forward.num_sequences + 1, device=device).index_add(0, owners_N.to(device), logps_N)
    return sums_S[:-1]
