"""Sequences with a common prefix as trees, and trees as the rows of a forward.

In a causal model the hidden state of a token depends only on the tokens before it. So sequences that begin with the same tokens
can share them. A trie holds each shared token once, as a node at its depth; a node attends to its ancestors and to itself. The
shared tokens are found by comparing token ids, whatever the chat template and the layout are. The last token of a response is
predicted and never read, so it is not a node, unless another sequence continues after it.

The nodes are in preorder, so the descendants of a node are the nodes after it up to its `end`: node k is an ancestor of node q,
or q itself, if k <= q < end[k]. Trees in the same row do not see each other.
"""

import itertools
from dataclasses import dataclass
from typing import Any

CHUNK_TOKENS = 256  # tokens whose logits exist at the same time
FORWARD_TOKENS = 64  # one more forward costs about as much as this many tokens of padding


@dataclass(frozen=True)
class Sequence:
    """Token ids of a context and of the response that follows it."""

    context: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A trie in preorder: for each node its token, its depth (the position id) and the end of its descendants.

    `where[s]` are the nodes that predict the response tokens of sequence s, in order. A tree can have several roots.
    """

    ids: list[int]
    depths: list[int]
    ends: list[int]
    where: list[list[int]]


def build_tree(sequences: list[Sequence]) -> Tree:
    """The trie of all tokens that are needed to predict the responses. A sequence without a response needs no node.

    Example: the six sequences of a pair in the `conversation` layout, with a prompt of |x| tokens, answers of w and l tokens and
    an instruction of z tokens (chat markup included). The tree is x -> {y_w, y_l}, each -> z -> {y_w, y_l}, without the last
    token of the four leaves: |x| + 2 z + 3 (w + l) - 4 tokens, instead of 6 |x| + 4 z + 5 (w + l) in six separate rows. This
    holds if the answers differ in their first token, and if a draft has the same tokens inside its conversation as alone. Any
    further common token is shared too. For |x| = 128, z = 32 and w = l = 256 these are 1,724 and 3,456 tokens.
    """
    ids: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    where: list[list[int]] = [[] for _ in sequences]
    inputs = [((*s.context, *s.response)[:-1], index) for index, s in enumerate(sequences) if s.response]
    path: list[int] = []
    previous: tuple[int, ...] = ()
    for tokens, index in [*sorted(inputs), ((), -1)]:  # sorted neighbours share the most; the empty last one closes all nodes
        shared = num_shared(previous, tokens)
        for node in path[shared:]:
            ends[node] = len(ids)
        path = path[:shared] + list(range(len(ids), len(ids) + len(tokens) - shared))
        ids += tokens[shared:]
        depths += range(shared, len(tokens))
        ends += [0] * (len(tokens) - shared)
        previous = tokens
        if index >= 0:
            assert sequences[index].context, "a sequence without a context has no token that predicts its first response token"
            where[index] = path[len(sequences[index].context) - 1 :]
    return Tree(ids, depths, ends, where)


def num_shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """The length of the common prefix of two sequences."""
    tokens = enumerate(zip(first, second, strict=False))
    return next((position for position, (a, b) in tokens if a != b), min(len(first), len(second)))


@dataclass(frozen=True)
class Forward:
    """Rows of trees for one forward, as integer arrays.

    `ids_RW`, `positions_RW` and `ends_RW` are the token ids, depths and ends of the nodes; a padding node sees only itself. The
    node with number `where_N`, counted through all rows, predicts `targets_N`, a response token of sequence `owners_N`.
    `groups` are the numbers of the groups (pairs) in the order of their sequences here. `num_sequences` is the number of
    sequences, `num_tokens` the number of nodes without padding.
    """

    ids_RW: Any
    positions_RW: Any
    ends_RW: Any
    where_N: Any
    targets_N: Any
    owners_N: Any
    groups: list[int]
    num_sequences: int
    num_tokens: int


def lay_out(groups: list[list[Sequence]], rows: list[list[int]], *, multiple: int = 1) -> Forward:
    """The forward whose rows hold these groups, by their numbers; its width is rounded up to a `multiple`.

    Without rows it is a forward of padding alone.
    """
    import numpy as np

    trees = [build_tree([sequence for group in row for sequence in groups[group]]) for row in rows]
    longest = max((len(tree.ids) for tree in trees), default=0)
    width = max(1, -(-longest // multiple)) * multiple
    shape = (max(1, len(rows)), width)
    ids_RW, positions_RW = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    ends_RW = np.tile(np.arange(1, width + 1), (shape[0], 1))
    where: list[int] = []
    owners: list[int] = []
    targets: list[int] = []
    flat = [sequence for row in rows for group in row for sequence in groups[group]]
    owner = 0
    for number, tree in enumerate(trees):
        size = len(tree.ids)
        ids_RW[number, :size], positions_RW[number, :size], ends_RW[number, :size] = tree.ids, tree.depths, tree.ends
        for nodes in tree.where:
            where += [number * width + node for node in nodes]
            owners += [owner] * len(nodes)
            targets += flat[owner].response
            owner += 1
    return Forward(
        ids_RW=ids_RW, positions_RW=positions_RW, ends_RW=ends_RW, where_N=np.array(where, dtype=np.int64),
        targets_N=np.array(targets, dtype=np.int64), owners_N=np.array(owners, dtype=np.int64),
        groups=list(itertools.chain.from_iterable(rows)), num_sequences=owner, num_tokens=sum(len(t.ids) for t in trees),
    )  # fmt: skip


def pack(
    groups: list[list[Sequence]], *, keys: list[str], max_tokens: int, max_groups: int, one_row: bool = False
) -> list[Forward]:
    """Packs all groups (the sequences of a pair) into few forwards, by first fit, longest first; a pure function.

    A forward has at most `max_tokens` tokens, padding included, and at most `max_groups` groups; a group with more tokens is
    alone in its forward. Groups with the same key (a prompt) share a row while they fit. A row is as long as its first tree and
    is filled up with shorter trees. Rows of different lengths become several forwards if padding would cost more. With
    `one_row` a forward is one long row, for an attention that skips masked blocks.
    """
    units = join_keys(groups, keys, max_tokens, max_groups)
    inputs = [(*s.context, *s.response)[:-1] for group in groups for s in group if s.response]
    trunk = num_shared(min(inputs), max(inputs)) if inputs else 0  # tokens that all share, as a system prompt: once in a row
    forwards = []
    while units:
        longest = max(1, units[0][0])
        width = max(longest, max_tokens) if one_row else longest
        free = [width - trunk] * max(1, max_tokens // width)
        rows: list[list[int]] = [[] for _ in free]
        count, not_packed = 0, []
        for size, unit in units:
            added = max(0, size - trunk)
            row = next((number for number, room in enumerate(free) if added <= room), None)
            if row is None or (count and count + len(unit) > max_groups):
                not_packed.append((size, unit))
                continue
            free[row] -= added
            rows[row] += unit
            count += len(unit)
        filled = sorted(((width - room, row) for room, row in zip(free, rows, strict=True) if row), key=lambda item: -item[0])
        for first, end in split_rows([used for used, _ in filled]):
            forward_rows = [row for _, row in filled[first:end]]
            forwards.append(lay_out(groups, forward_rows, multiple=128 if one_row else 1))
        units = not_packed
    return forwards


def split_rows(lengths: list[int]) -> list[tuple[int, int]]:
    """Splits rows, longest first, into forwards with the least total cost; returns (first row, end) of each forward.

    A forward is as wide as its first row. Its cost is its tokens, padding included, plus `FORWARD_TOKENS`.
    """
    best = [(0, 0)]  # for the first n rows: the least cost in tokens, and the row at which their last forward begins
    for end in range(1, len(lengths) + 1):
        costs = ((best[first][0] + (end - first) * lengths[first] + FORWARD_TOKENS, first) for first in range(end))
        best.append(min(costs))
    cuts, end = [], len(lengths)
    while end:
        cuts.append((best[end][1], end))
        end = best[end][1]
    return cuts[::-1]


def join_keys(groups: list[list[Sequence]], keys: list[str], max_tokens: int, max_groups: int) -> list[tuple[int, list[int]]]:
    """Joins groups with the same key while they fit; returns (tokens, groups), longest first, equal ones in their order."""
    units: list[tuple[int, list[int]]] = []
    newest: dict[str, int] = {}
    for number, (group, key) in enumerate(zip(groups, keys, strict=True)):
        unit = newest.get(key)
        if unit is not None:
            joined = [*units[unit][1], number]
            size = len(build_tree([sequence for member in joined for sequence in groups[member]]).ids)
            if size <= max_tokens and len(joined) <= max_groups:
                units[unit] = (size, joined)
                continue
        newest[key] = len(units)
        units.append((len(build_tree(group).ids), [number]))
    return sorted(units, key=lambda unit: -unit[0])
