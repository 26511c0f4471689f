"""Sequences with common beginnings as trees, and trees as the rows of one forward.

In a causal model the hidden state of a token depends on the tokens before it alone. So sequences that begin with the same
tokens can share them: a trie holds each token once, as a node at its depth, and a node attends to its ancestors and to
itself. What is shared is found in the tokens; no chat template and no layout is assumed. The last token of a response is
predicted and never read, so it is no node unless another sequence goes on from there.

Nodes stand in preorder, so that the descendants of a node are the nodes from it up to its `end`: node k is an ancestor of
node q, or q itself, if k <= q < end[k]. Trees that stand one after the other in a row never see each other.
"""

import itertools
from dataclasses import dataclass
from typing import Any

CHUNK_TOKENS = 256  # where a tree is read, the logits of so many tokens exist at a time
FORWARD_TOKENS = 64  # a forward more costs about what so many tokens of padding cost


@dataclass(frozen=True)
class Sequence:
    """Token ids of a context and of the response that follows it."""

    context: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A trie in preorder: of each node the token, the depth (its position id) and the end of its descendants.

    `where[s]` are the nodes that predict the response tokens of sequence s, in order; several roots make a forest.
    """

    ids: list[int]
    depths: list[int]
    ends: list[int]
    where: list[list[int]]


def grow(sequences: list[Sequence]) -> Tree:
    """The trie of all tokens that predict something. A sequence without a response needs no node.

    Tokens of a pair with prompt x, answers of w and l tokens and an instruction of z tokens (chat markup counted), all six
    sequences, in the `conversation` layout: |x| + 2 z + 3 (w + l) - 4, where six separate forwards read
    6 |x| + 4 z + 5 (w + l). That is x -> {y_w, y_l}, each -> z -> {y_w, y_l} without the last token of the four leaves, if the
    answers differ in their first token and a draft has the same tokens in its conversation as alone; every further token in
    common is shared too. At |x| = 128, z = 32 and w = l = 256 these are 1,724 and 3,456 tokens.
    """
    ids: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    where: list[list[int]] = [[] for _ in sequences]
    read = [((*s.context, *s.response)[:-1], index) for index, s in enumerate(sequences) if s.response]
    path: list[int] = []
    before: tuple[int, ...] = ()
    for tokens, index in [*sorted(read), ((), -1)]:  # sorted neighbours share the most; the empty end closes every node
        shared = num_shared(before, tokens)
        for node in path[shared:]:
            ends[node] = len(ids)
        path = path[:shared] + list(range(len(ids), len(ids) + len(tokens) - shared))
        ids += tokens[shared:]
        depths += range(shared, len(tokens))
        ends += [0] * (len(tokens) - shared)
        before = tokens
        if index >= 0:
            assert sequences[index].context, "a response without a context has no token that predicts its first"
            where[index] = path[len(sequences[index].context) - 1 :]
    return Tree(ids, depths, ends, where)


def num_shared(one: tuple[int, ...], two: tuple[int, ...]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


@dataclass(frozen=True)
class Forward:
    """Rows of trees for one forward, as integer arrays.

    `ids_RW`, `positions_RW` and `ends_RW` are those of the nodes, padding being nodes that see themselves alone. The node at
    `where_N` (counted through all rows) predicts `targets_N`, a response token of sequence `owners_N`. `groups` are the
    given groups in the order of their sequences here, `num_sequences` in all; `num_tokens` are the nodes without padding.
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
    """The forward whose rows hold the given groups; its width is rounded up to a `multiple`. No rows make one of padding."""
    import numpy as np

    trees = [grow([sequence for group in row for sequence in groups[group]]) for row in rows]
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
    """All groups (the sequences of a pair) in as few forwards as first fit, longest first, finds; a pure function.

    A forward has at most `max_tokens` tokens, padding counted, and at most `max_groups` groups; a group of more tokens is
    alone in its forward. Groups of one key (a prompt) share a row while they fit. Rows are as long as their first tree and
    are filled up with shorter ones; rows that differ in length are several forwards where padding would cost more. With
    `one_row` a forward is one long row, for attention that skips what is masked.
    """
    units = join_keys(groups, keys, max_tokens, max_groups)
    read = [(*s.context, *s.response)[:-1] for group in groups for s in group if s.response]
    trunk = num_shared(min(read), max(read)) if read else 0  # a row holds these once, for example a system prompt
    forwards = []
    while units:
        longest = max(1, units[0][0])
        width = max(longest, max_tokens) if one_row else longest
        free = [width - trunk] * max(1, max_tokens // width)
        rows: list[list[int]] = [[] for _ in free]
        count, left = 0, []
        for size, unit in units:
            added = max(0, size - trunk)
            row = next((number for number, room in enumerate(free) if added <= room), None)
            if row is None or (count and count + len(unit) > max_groups):
                left.append((size, unit))
                continue
            free[row] -= added
            rows[row] += unit
            count += len(unit)
        filled = sorted(((width - room, row) for room, row in zip(free, rows, strict=True) if row), key=lambda one: -one[0])
        for first, end in level([used for used, _ in filled]):
            some = [row for _, row in filled[first:end]]
            forwards.append(lay_out(groups, some, multiple=128 if one_row else 1))
        units = left
    return forwards


def level(lengths: list[int]) -> list[tuple[int, int]]:
    """Cuts rows, longest first, into forwards as wide as their first row, so that all cost least: (first, end) of each."""
    best = [(0, 0)]  # of the first n rows: what they cost in tokens, and where their last forward begins
    for end in range(1, len(lengths) + 1):
        costs = ((best[first][0] + (end - first) * lengths[first] + FORWARD_TOKENS, first) for first in range(end))
        best.append(min(costs))
    cuts, end = [], len(lengths)
    while end:
        cuts.append((best[end][1], end))
        end = best[end][1]
    return cuts[::-1]


def join_keys(groups: list[list[Sequence]], keys: list[str], max_tokens: int, max_groups: int) -> list[tuple[int, list[int]]]:
    """Groups of one key together while the limits allow it, as (tokens, groups), longest first, ties in the given order."""
    units: list[tuple[int, list[int]]] = []
    newest: dict[str, int] = {}
    for number, (group, key) in enumerate(zip(groups, keys, strict=True)):
        unit = newest.get(key)
        if unit is not None:
            joined = [*units[unit][1], number]
            size = len(grow([sequence for member in joined for sequence in groups[member]]).ids)
            if size <= max_tokens and len(joined) <= max_groups:
                units[unit] = (size, joined)
                continue
        newest[key] = len(units)
        units.append((len(grow(group).ids), [number]))
    return sorted(units, key=lambda unit: -unit[0])
