"""How the conversations of a micro-batch lie in memory: end to end, and what several begin with only once.

Conversations that start with the same tokens (tools, system turn, earlier turns of one dialogue) form a tree of
segments. Each token is computed once, sees the segments it continues and its own, and a target that several
conversations share counts once for each of them: loss and gradients are those of the separate computation. Padded
rectangles and packed rows are there for comparison; they share nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from tunesmith.config import Batching
from tunesmith.data.examples import Example

LEAST_SHARED = 16
"""Fewest common tokens that are split off as a segment of their own: fewer are not worth the extra kernel calls."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens that lie together and see each other causally."""

    start: int
    stop: int
    """Its tokens are [start, stop) of the micro-batch."""
    context: tuple[tuple[int, int], ...] = ()
    """The [start, stop) of the segments that it continues, outermost first: it sees all of them."""

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def context_length(self) -> int:
        return sum(stop - start for start, stop in self.context)


@dataclass(frozen=True)
class Kept:
    """Where the cache of frozen layers has a micro-batch's states, one a token (model/frozen.py)."""

    rows: np.ndarray
    """Their numbers, int64 [tokens]; -1 for padding."""
    new: np.ndarray
    """Indices of the tokens whose states this micro-batch writes, int64 [written]."""
    known: bool
    """All of them are there to be read: the frozen layers need not run."""


@dataclass(frozen=True)
class MicroBatch:
    """Conversations laid end to end, for one forward on one rank. Tokens see only their own conversation."""

    ids: torch.Tensor
    """Token ids, int64 [tokens]."""
    positions: torch.Tensor
    """Position of each token in its conversation, int64 [tokens]."""
    segments: tuple[Segment, ...]
    """Padding included; they follow each other and add up to len(ids)."""
    predicting: torch.Tensor
    """Indices into ids whose next token is a target, each once, int64 [positions]."""
    rows: torch.Tensor | None
    """For each target its place in `predicting`, int64 [targets]; None where every position has one target."""
    labels: torch.Tensor
    """The target tokens, int64 [targets]."""
    counts: torch.Tensor
    """In how many conversations each target stands, float32 [targets]."""
    real_tokens: int
    """Tokens that are not padding."""
    weight: float = 1.0
    """0 for a stand-in on a rank that has no conversation left in a short step, else 1."""
    kept: Kept | None = None
    """None: without method.cache_frozen, of held-out conversations, and for a stand-in."""

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(segment.length for segment in self.segments)

    @property
    def target_count(self) -> int:
        return int(self.counts.sum()) if self.weight else 0


@dataclass(frozen=True)
class Node:
    """A segment before it has a place: tokens [start, stop) of the conversations `members`, equal in all of them."""

    start: int
    stop: int
    members: tuple[int, ...] = ()
    parent: int | None = None
    """The node that it continues."""
    padding: int = 0
    """Tokens behind its own that belong to no conversation."""

    @property
    def real(self) -> int:
        return self.stop - self.start

    @property
    def filled(self) -> int:
        return self.real + self.padding


def lay_out(
    examples: Sequence[Example], batching: Batching, weight: float = 1.0, least_shared: int = LEAST_SHARED, row: int = 0
) -> MicroBatch:
    """A micro-batch of these conversations; row: tokens of a row of `packed`, at least the longest conversation's."""
    return fill(examples, arrange(examples, batching, least_shared, row), weight)


def arrange(examples: Sequence[Example], batching: Batching, least_shared: int = LEAST_SHARED, row: int = 0) -> list[Node]:
    """How these conversations lie, parents before children.

    `ragged`: end to end, common beginnings once. `padded` and `length_grouped`: each filled up to the longest.
    `packed`: in rows of `row` tokens, what is left of a row being a segment of padding.
    """
    if batching is Batching.ragged:
        return _forest([example.ids[: example.computed] for example in examples], least_shared)
    lengths = [example.computed for example in examples]
    longest = max(lengths)
    if batching is not Batching.packed:
        return [Node(0, length, (number,), padding=longest - length) for number, length in enumerate(lengths)]
    row = max(row, longest)
    nodes: list[Node] = []
    for members in pack(lengths, row):
        nodes += [Node(0, lengths[number], (number,)) for number in members]
        if left := row - sum(lengths[number] for number in members):
            nodes.append(Node(0, 0, padding=left))
    return nodes


def pack(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Which conversations share a row of `row` tokens: the longest first, each into the first row that has room.

    Some of these rows, packed again by themselves, come out the same: whatever did not fit then does not fit now.
    """
    # The first row with room is found from the root of a tree in which each node has the most room of the two below it: a step
    # for thousands of ranks fills thousands of rows, and to look at each of them would take the square of that.
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    most = [row] * (2 * leaves)  # rows that are not begun have all their room
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length, node = lengths[number], 1
        while node < leaves:
            node *= 2
            node += most[node] < length
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(number)
        most[node] -= length
        while node > 1:
            node //= 2
            left, right = most[2 * node], most[2 * node + 1]
            most[node] = left if left > right else right
    return rows


def fill(examples: Sequence[Example], nodes: Sequence[Node], weight: float = 1.0) -> MicroBatch:
    """The micro-batch of conversations that lie as `arrange` said."""
    ids = np.zeros(sum(node.filled for node in nodes), np.int64)
    positions = np.concatenate([np.arange(node.start, node.start + node.filled) for node in nodes])
    segments: list[Segment] = []
    places = [np.zeros(example.computed, np.int64) for example in examples]  # where each of its tokens lies
    for node in nodes:
        start = segments[-1].stop if segments else 0
        context = () if node.parent is None else (*segments[node.parent].context, _span(segments[node.parent]))
        segments.append(Segment(start, start + node.filled, context))
        for member in node.members:
            ids[start : start + node.real] = examples[member].ids[node.start : node.stop]
            places[member][node.start : node.stop] = start + np.arange(node.real)
    pairs = []
    for example, place in zip(examples, places, strict=True):
        before = np.flatnonzero(example.targets[1:])
        pairs.append(np.stack([place[before], example.ids[before + 1].astype(np.int64)], axis=1))
    # A target in a common beginning is one position with one label, counted as often as it occurs.
    unique, counts = np.unique(np.concatenate(pairs), axis=0, return_counts=True)
    predicting, rows = np.unique(unique[:, 0], return_inverse=True)
    return MicroBatch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        segments=tuple(segments),
        predicting=torch.from_numpy(predicting),
        rows=torch.from_numpy(rows) if len(predicting) < len(rows) else None,
        labels=torch.from_numpy(np.ascontiguousarray(unique[:, 1])),
        counts=torch.from_numpy(counts.astype(np.float32)),
        real_tokens=sum(node.real for node in nodes),
        weight=weight,
    )


def predicting_positions(examples: Sequence[Example], nodes: Sequence[Node]) -> int:
    """How many positions have a target in such a micro-batch, each once: whose logits are computed."""
    count = 0
    for node in nodes:
        flags = [examples[member].targets[node.start + 1 : node.stop + 1] for member in node.members]
        count += int(np.logical_or.reduce(flags).sum()) if flags else 0
    return count


def _span(segment: Segment) -> tuple[int, int]:
    return segment.start, segment.stop


def _forest(conversations: Sequence[np.ndarray], least_shared: int) -> list[Node]:
    """The prefix trees of some conversations, parents before children, siblings side by side with the longest first."""
    # In sorted order whatever shares a beginning stands together, and what a group shares, its first and last share.
    order = sorted(range(len(conversations)), key=lambda i: conversations[i].astype(">i4").tobytes())
    nodes: list[Node] = []
    pending: list[tuple[list[int], int, int | None]] = [(order, 0, None)]
    while pending:
        members, depth, parent = pending.pop(0)
        siblings = []
        for group in _groups(members, depth, conversations, least_shared):
            stop = depth + common([conversations[group[0]], conversations[group[-1]]], depth)
            siblings.append(Node(depth, stop, tuple(group), parent))
        for node in sorted(siblings, key=lambda node: (node.start - node.stop, node.members)):
            nodes.append(node)
            if rest := [i for i in node.members if len(conversations[i]) > node.stop]:
                pending.append((rest, node.stop, len(nodes) - 1))
    return nodes


def _groups(members: list[int], depth: int, conversations: Sequence[np.ndarray], least: int) -> list[list[int]]:
    """Cut sorted conversations where neighbours share fewer than `least` tokens from `depth` on."""
    groups = [[members[0]]]
    for before, now in pairwise(members):
        if common([conversations[before], conversations[now]], depth) >= least:
            groups[-1].append(now)
        else:
            groups.append([now])
    return groups


def common(pair: Sequence[np.ndarray], depth: int) -> int:
    """How many tokens two conversations share from `depth` on."""
    first, second = pair
    length = min(len(first), len(second)) - depth
    different = np.flatnonzero(first[depth : depth + length] != second[depth : depth + length])
    return int(different[0]) if len(different) else length
