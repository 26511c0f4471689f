"""Log-probabilities of responses, the same functions for the reference and for the policy.

`sequence_logps` is the plain way: one padded row for each sequence, and all logits at once. `TreeModel` and `tree_logps` compute
the same numbers from trees (`tree.py`): shared tokens are computed once, and only one chunk of logits exists at a time.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import Template
from evolve_ray.store.turns import Messages, assistant, user
from evolve_ray.train.tree import CHUNK_TOKENS, Forward, Sequence


def pair_sequences(chat: Chat, template: Template, pair: dict, needs: tuple[str, ...]) -> dict[str, Sequence]:
    """The sequences of one pair by their names in `needs`: `chosen` after x, `chosen_after_rejected` after (x, y_l, z), ...

    In a row with a `context` these messages stand in place of x. A name of the row's `turns` is that turn after its own messages.
    """
    responses = {name: response_ids(chat, pair, name) for name in ("chosen", "rejected")}
    answers_only = template.rendering.thinking.train == "answer"
    thinking = {name: (pair.get(f"{name}_num_thinking_tokens") or 0) * answers_only for name in responses}
    turns = {turn["name"]: turn for turn in pair.get("turns") or ()}
    contexts: dict[str, tuple[int, ...]] = {}
    sequences = {}
    for name in needs:
        response, _, draft = name.partition("_after_")
        place = name if name in turns and turns[name]["context"] else draft
        if place not in contexts:
            messages = turns[name]["context"] if place in turns else messages_before(template, pair, draft)
            contexts[place] = tuple(chat.context_ids(messages))
        if name in turns:
            ids, start = turn_ids(chat, turns[name]), (turns[name]["num_thinking_tokens"] or 0) * answers_only
        else:
            ids, start = responses[response], thinking[response]
        sequences[name] = Sequence(contexts[place] + ids[:start], ids[start:])
    return sequences


def messages_before(template: Template, pair: dict, draft: str) -> Messages:
    """What stands before a response of a pair: its context or prompt; after `draft` ("chosen", "rejected") also that and z."""
    if pair.get("context") is None:
        return template.refinement(pair["prompt"], pair[draft]) if draft else template.direct(pair["prompt"])
    return (*pair["context"], *((assistant(pair[draft]), user(template.refine)) if draft else ()))


def turn_ids(chat: Chat, turn: dict) -> tuple[int, ...]:
    """The tokens of a further turn; none of a turn that did not happen."""
    if turn["token_ids"] is not None:
        return tuple(turn["token_ids"])
    return tuple(chat.response_ids(turn["text"], finished=turn["finished"]))


def response_ids(chat: Chat, pair: dict, name: str) -> tuple[int, ...]:
    """The tokens of the response `chosen` or `rejected`: those that the engine wrote, else those of its text."""
    ids = pair.get(f"{name}_token_ids")
    return tuple(chat.response_ids(pair[name], finished=pair[f"{name}_finished"]) if ids is None else ids)


def sequence_logps(model: Any, sequences: list[Sequence], pad_id: int, device: torch.device) -> torch.Tensor:
    """Returns `logps_S`: for each sequence the sum of log p(token | all tokens before) over its response tokens, nats, float32.

    Context and padding do not count; the sum of an empty response is 0.
    """
    logps_N, owners_N = sequence_token_logps(model, sequences, pad_id, device)
    return torch.zeros(len(sequences), device=device).index_add(0, owners_N, logps_N)


def sequence_token_logps(
    model: Any, sequences: list[Sequence], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns `logps_N` of all response tokens, sequence by sequence, and the number of each one's sequence.

    It is one forward over right-padded `ids_ST`.
    """
    width = max(len(sequence.context) + len(sequence.response) for sequence in sequences)
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
    # Only positions that predict a response token: the others need no softmax over the vocabulary.
    where_ST = response_ST[:, 1:]
    logps_N = chosen_logps(logits_STV[where_ST], ids_ST[:, 1:][where_ST])
    return logps_N, where_ST.nonzero()[:, 0]


def chosen_logps(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """log p of the target tokens, in nats, float32."""
    logits_NV = logits_NV.float()
    return logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(dim=1)


class TreeModel(torch.nn.Module):
    """A causal language model whose forward takes trees and returns the log-probabilities of target tokens.

    It is one module, so that DeepSpeed sees one forward. The hooks of the model's own modules gather the shards of ZeRO-3, also
    when the backward pass computes a chunk again.
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
        """Returns `logps_N` of the targets, in nats, float32. Every rank must pass the same `num_chunks`.

        With 0 chunks all logits come from the model's own forward at once. Without `ends_RW` each row is one ordinary sequence.
        """
        inputs: dict[str, Any] = {"input_ids": ids_RW, "use_cache": False}
        if ends_RW is not None:
            mask = block_mask(ends_RW) if self.flex else dense_mask(ends_RW)
            inputs |= {"attention_mask": mask, "position_ids": positions_RW}
        if not num_chunks:
            return chosen_logps(self.model(**inputs).logits.flatten(0, 1)[where_N], targets_N)
        hidden_NH = self.model.base_model(**inputs)[0].flatten(0, 1)[where_N]
        chunks = list(zip(hidden_NH.tensor_split(num_chunks), targets_N.tensor_split(num_chunks), strict=True))
        if num_chunks == 1 or not torch.is_grad_enabled():
            return torch.cat([self.chunk(*chunk) for chunk in chunks])
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(self.chunk, *chunk, **options) for chunk in chunks])

    def chunk(self, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """The log-probabilities from a few hidden states; the logits are freed at once."""
        return chosen_logps(self.model.get_output_embeddings()(hidden_NH), targets_N)


def dense_mask(ends_RW: torch.Tensor) -> torch.Tensor:
    """Returns `mask_R1WW`: true if the key is an ancestor of the query, or the query itself."""
    node_W = torch.arange(ends_RW.shape[1], device=ends_RW.device)
    return ((node_W <= node_W[:, None]) & (node_W[:, None] < ends_RW[:, None, :]))[:, None]


def block_mask(ends_RW: torch.Tensor) -> Any:
    """The same mask for FlexAttention, which skips blocks in which no query sees a key."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < ends_RW[row, key])

    rows, width = ends_RW.shape
    compiled = ends_RW.device.type == "cuda"  # without compilation the whole mask is built first
    return create_block_mask(sees, rows, None, width, width, device=str(ends_RW.device), _compile=compiled)


def num_chunks(forward: Forward) -> int:
    """The number of chunks of logits that a forward needs, at least 1."""
    return max(1, -(-len(forward.targets_N) // CHUNK_TOKENS))


def tree_logps(model: Any, forward: Forward, device: torch.device, chunks: int) -> torch.Tensor:
    """Returns `logps_S` of a forward's sequences, as `sequence_logps` does; `model` is a `TreeModel` or an engine around it."""
    logps_N, owners_N = tree_token_logps(model, forward, device, chunks)
    return torch.zeros(forward.num_sequences + 1, device=device).index_add(0, owners_N, logps_N)[:-1]


def tree_token_logps(
    model: Any, forward: Forward, device: torch.device, chunks: int
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns `logps_N` of all response tokens, sequence by sequence, and the number of each one's sequence.

    `chunks` is the same number on all ranks. If there are fewer targets than chunks, padding targets follow at the end, whose
    sequence is the number after the last.
    """
    missing = max(0, chunks - len(forward.targets_N))
    where_N, targets_N, owners_N = (torch.from_numpy(part) for part in (forward.where_N, forward.targets_N, forward.owners_N))
    where_N, targets_N = (torch.nn.functional.pad(part, (0, missing)) for part in (where_N, targets_N))
    owners_N = torch.nn.functional.pad(owners_N, (0, missing), value=forward.num_sequences)
    tree = [torch.from_numpy(part).to(device) for part in (forward.ids_RW, forward.positions_RW, forward.ends_RW)]
    return model(*tree, where_N.to(device), targets_N.to(device), chunks), owners_N.to(device)
