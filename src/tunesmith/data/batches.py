"""Which conversations go into which step, micro-batch and rank: a pure function of (data, seed, step, world)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import numpy as np

from tunesmith.config import Batching
from tunesmith.data.examples import Example, Examples, ListedExamples
from tunesmith.data.layout import MicroBatch, Node, arrange, fill, lay_out, pack, predicting_positions
from tunesmith.data.prefixes import Beginnings
from tunesmith.plan import steps_per_epoch

__all__ = [
    "Batches", "Example", "MicroBatch", "Outlook", "StepWork", "data_line", "held_out_batches", "lay_out", "outlook",
]  # fmt: skip

ENOUGH = 4096
"""Conversations that an outlook looks at: a second or so, which steps for hundreds of ranks would exceed."""


@dataclass(frozen=True)
class StepWork:
    """What is computed of one step, on one rank or on all together: any rank can say it of each without asking."""

    conversations: int
    conversation_tokens: int
    """Tokens of all conversations, each for itself, up to its last target."""
    lengths: tuple[int, ...]
    """Tokens of each segment that is computed, without padding; 0 for one that is nothing else."""
    contexts: tuple[int, ...]
    """Tokens of the segments that each one continues."""
    padded_lengths: tuple[int, ...]
    """What each segment fills, padding included."""
    targets: int
    """Target tokens."""
    logits: int
    """Positions whose logits are computed: fewer than targets where conversations share some."""
    micro_batches: int
    """Forwards, stand-ins left out."""


class Batches:
    """The training data in order: every epoch is a permutation of all conversations, the same for any number of ranks.

    An epoch has equally many steps each time: of conversations_per_step conversations (the last one perhaps of fewer), or,
    with tokens_per_step, of about as many tokens. row: tokens of a row of `packed`. attention_cost: what a conversation of
    n tokens costs is n + attention_cost * n^2, and micro-batches are made to cost the same. beginnings: of these conversations, with
    method.cache_frozen.
    """

    def __init__(
        self,
        examples: Examples | Sequence[Example],
        conversations_per_step: int,
        micro_batch: int,
        seed: int,
        batching: Batching,
        *,
        tokens_per_step: int = 0,
        row: int = 0,
        attention_cost: float = 0.0,
        beginnings: Beginnings | None = None,
    ):
        self.examples = _indexed(examples)
        self.conversations_per_step = conversations_per_step
        self.tokens_per_step = tokens_per_step
        self.micro_batch = micro_batch
        self.seed = seed
        self.batching = batching
        self.row = max(row, int(self.examples.computed.max()))
        self.attention_cost = attention_cost
        self.beginnings = beginnings
        self.steps_per_epoch = steps_per_epoch(
            len(self.examples), int(self.examples.computed.sum()), conversations_per_step, tokens_per_step
        )
        self._epoch = -1
        self._order = self._cuts = np.empty(0, np.int64)
        self._step = -1
        self._dealt: dict[int, list[list[list[int]]]] = {}
        self._arranged: dict[tuple[int, ...], tuple[list[Example], list[Node]]] = {}

    def conversations(self, step: int) -> list[int]:
        """Indices of the conversations of a step (0-based), the longest first."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
            self._cuts = self._cut(self.examples.computed[self._order])
            self._epoch = epoch
        chosen = self._order[self._cuts[place] : self._cuts[place + 1]]
        by_length: list[int] = chosen[np.lexsort((chosen, -self.examples.computed[chosen]))].tolist()
        return by_length

    def _cut(self, lengths: np.ndarray) -> np.ndarray:
        """Where an epoch of conversations of these lengths is cut into steps: int64 [steps + 1], from 0 to their number."""
        count, steps = len(lengths), self.steps_per_epoch
        numbers = np.arange(1, steps)
        cuts = numbers * self.conversations_per_step
        if self.tokens_per_step:
            # Cut k is where the tokens before it, t, are nearest to k / steps of all T: steps * t against k * T, in whole
            # numbers, so that no machine rounds otherwise (10^12 tokens in 10^6 steps are a tenth of what int64 holds).
            before = steps * np.concatenate([[0], np.cumsum(lengths)])
            wanted = numbers * (before[-1] // steps)
            behind = np.searchsorted(before, wanted)
            cuts = behind - (2 * wanted < before[behind - 1] + before[behind])
            # A conversation longer than a step draws several cuts to one place: each is moved on, so that no step is empty.
            cuts = numbers + np.clip(np.maximum.accumulate(cuts - numbers), 0, count - steps)
        return np.concatenate([[0], cuts, [count]])

    def split(self, step: int, world_size: int) -> list[list[list[int]]]:
        """[rank][accumulation] -> conversations. All ranks get equally many micro-batches, some of them perhaps empty."""
        self._turn_to(step)
        if world_size not in self._dealt:
            self._dealt[world_size] = self._split(step, world_size)
        return self._dealt[world_size]

    def _split(self, step: int, world_size: int) -> list[list[list[int]]]:
        chosen = self.conversations(step)
        lengths = self.examples.computed[chosen].tolist()
        # What stays together (a row, else one conversation), and the segments it makes in memory.
        units, cells = [[number] for number in range(len(chosen))], [[length] for length in lengths]
        if self.batching is Batching.packed:
            units = pack(lengths, self.row)
            cells = [[lengths[number] for number in unit] for unit in units]
            cells = [[*row, self.row - sum(row)] for row in cells]
        elif self.batching is Batching.padded:
            cells = [lengths[:1]] * len(chosen)  # in a rectangle all cost as much as the longest
        count = -(-len(units) // (self.micro_batch * world_size)) * world_size
        if self.batching is Batching.length_grouped:
            dealt = [part.tolist() for part in np.array_split(np.arange(len(units)), count)]
        else:
            costs = [sum(n + self.attention_cost * n * n for n in cell) for cell in cells]
            dealt = deal(costs, count, self.micro_batch)
        parts = [sorted(number for unit in part for number in units[unit]) for part in dealt]
        return [[[chosen[number] for number in part] for part in parts[rank::world_size]] for rank in range(world_size)]

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """What this rank computes in this step; a stand-in of weight 0 where it has nothing, as all ranks must take part."""
        shortest = self.conversations(step)[-1]
        split = self.split(step, world_size)
        before = [number for parts in split[:rank] for part in parts for number in part]  # what lower ranks write, with method.cache_frozen
        batches = []
        for part in split[rank]:
            if not part:
                batches.append(lay_out([self.examples[shortest]], Batching.ragged, weight=0.0))
                continue
            examples, nodes = self._arrange(step, part)
            batch = fill(examples, nodes)
            batches.append(replace(batch, kept=self.beginnings.kept(part, nodes, before)) if self.beginnings is not None else batch)
            before += part
        return batches

    def note(self, step: int) -> None:
        """All ranks have taken this step: its states are in the cache of frozen layers."""
        if self.beginnings is not None:
            self.beginnings.note(self.conversations(step))

    def targets(self, step: int) -> int:
        """Target tokens of the whole step: what the loss is divided by."""
        return int(self.examples.target_counts[self.conversations(step)].sum())

    def work(self, step: int, world_size: int, rank: int | None = None, *, known: bool | None = None) -> StepWork:
        """Lengths and counts of what a rank computes in a step (None: of what all do, which takes that much longer to find).

        known: of the micro-batches alone whose states the cache of frozen layers has, or of the others (None: of both).
        """
        split = self.split(step, world_size)
        dealt = [part for parts in (split if rank is None else split[rank : rank + 1]) for part in parts if part]
        if known is not None:
            dealt = [part for part in dealt if known == (self.beginnings is not None and self.beginnings.are_written(part))]
        chosen = [number for part in dealt for number in part]
        parts = [self._arrange(step, part) for part in dealt]
        nodes = [node for _, part in parts for node in part]
        return StepWork(
            conversations=len(chosen),
            conversation_tokens=int(self.examples.computed[chosen].sum()),
            lengths=tuple(node.real for node in nodes),
            contexts=tuple(node.start for node in nodes),
            padded_lengths=tuple(node.filled for node in nodes),
            targets=int(self.examples.target_counts[chosen].sum()),
            logits=sum(predicting_positions(examples, part) for examples, part in parts),
            micro_batches=len(parts),
        )

    def _arrange(self, step: int, part: list[int]) -> tuple[list[Example], list[Node]]:
        """A micro-batch's conversations and how they lie: kept for a step, since what it computes and what it weighs both ask."""
        self._turn_to(step)
        key = tuple(part)
        if key not in self._arranged:
            examples = [self.examples[i] for i in part]
            self._arranged[key] = examples, arrange(examples, self.batching, row=self.row)
        return self._arranged[key]

    def _turn_to(self, step: int) -> None:
        """Forget what was kept of another step."""
        if step != self._step:
            self._step, self._dealt, self._arranged = step, {}, {}


def deal(costs: Sequence[float], count: int, most: int) -> list[list[int]]:
    """Numbers of what goes into each of `count` parts of about the same cost, `most` in each: the dearest part first.

    Longest processing time first: each goes to the part that costs least so far and has room. Without the limit no part
    costs more than 4/3 of what the best deal's dearest does (Graham 1969).
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    open_parts = [(0.0, part) for part in range(count)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        cost, part = heappop(open_parts)
        parts[part].append(number)
        if len(parts[part]) < most:
            heappush(open_parts, (cost + costs[number], part))
    # Neighbours are computed at the same time on different ranks, and what does not fit into memory fails at once.
    return sorted(parts, key=lambda part: -sum(costs[number] for number in part))


def held_out_batches(examples: Examples | Sequence[Example], micro_batch: int, rank: int, world_size: int) -> list[MicroBatch]:
    """Held-out conversations in a fixed order, equally many micro-batches on every rank (stand-ins of weight 0 at the end)."""
    examples = _indexed(examples)
    order = np.argsort(-examples.computed, kind="stable").tolist()
    parts = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
    rounds = -(-len(parts) // world_size)
    batches = []
    for turn in range(rounds):
        index = turn * world_size + rank
        part = parts[index] if index < len(parts) else parts[-1]
        batches.append(lay_out([examples[i] for i in part], Batching.ragged, weight=1.0 if index < len(parts) else 0.0))
    return batches


@dataclass(frozen=True)
class Outlook:
    """What the first steps will compute over all ranks, in tokens."""

    steps: int
    conversation_tokens: int
    """Of all conversations, each for itself."""
    computed_tokens: int
    """Those that go through the model, padding included."""
    target_tokens: int
    padding_tokens: int

    @property
    def shared_tokens(self) -> int:
        """Tokens that common beginnings save."""
        return self.conversation_tokens + self.padding_tokens - self.computed_tokens


def outlook(batches: Batches, world_size: int, steps: int = 8) -> Outlook:
    """Count the first `steps` steps of an epoch (or all that it has, or fewer large ones), without making a micro-batch."""
    per_step = len(batches.examples) / batches.steps_per_epoch
    steps = max(1, min(steps, batches.steps_per_epoch, int(ENOUGH / per_step)))
    works = [batches.work(step, world_size) for step in range(steps)]
    computed = sum(sum(work.padded_lengths) for work in works)
    return Outlook(
        steps,
        sum(work.conversation_tokens for work in works),
        computed,
        sum(work.targets for work in works),
        computed - sum(sum(work.lengths) for work in works),
    )


def data_line(examples: Examples, found: Outlook) -> str:
    """The plan's line about the training data: how much it is, and what of its first steps is shared or padding."""
    tokens = int(examples.computed.sum())
    said = f"{len(examples):,} conversations, {tokens:,} tokens, {_percent(examples.target_counts.sum(), tokens)} of them targets"
    if found.padding_tokens:
        said += f"; {_percent(found.padding_tokens, found.computed_tokens)} of what is computed is padding"
    else:
        said += f"; common beginnings save {_percent(found.shared_tokens, found.conversation_tokens)}"
    return f"data     {said} (first {found.steps} steps)"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def _indexed(examples: Examples | Sequence[Example]) -> Examples:
    return examples if isinstance(examples, Examples) else ListedExamples(examples)
