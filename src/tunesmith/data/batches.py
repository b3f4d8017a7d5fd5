"""Which conversations go into which step, micro-batch and rank: a pure function of (data, seed, step, world)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.config import Batching
from tunesmith.data.examples import Example
from tunesmith.data.layout import LEAST_SHARED, NOTHING_SHARED, MicroBatch, lay_out, sizes

__all__ = ["Batches", "Example", "MicroBatch", "StepWork", "held_out_batches", "lay_out"]


@dataclass(frozen=True)
class StepWork:
    """What one step computes over all ranks: known to each rank without asking the others."""

    conversations: int
    conversation_tokens: int
    """Tokens of all conversations, each for itself, up to its last target."""
    lengths: tuple[int, ...]
    """Tokens of each segment that is computed, without padding."""
    contexts: tuple[int, ...]
    """Tokens of the segments that each one continues."""
    padded_lengths: tuple[int, ...]
    """What each segment fills, padding included."""
    targets: int
    """Target tokens of the whole step: what the loss is divided by."""
    logits: int
    """Positions whose logits are computed: fewer than targets where conversations share some."""


class Batches:
    """The training data in order: every epoch is a permutation of all conversations, the same for any number of ranks."""

    def __init__(
        self, examples: Sequence[Example], conversations_per_step: int, micro_batch: int, seed: int, batching: Batching
    ):
        self.examples = examples
        self.conversations_per_step = conversations_per_step
        self.micro_batch = micro_batch
        self.seed = seed
        self.batching = batching
        self._epoch = -1
        self._order: np.ndarray = np.empty(0, int)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.conversations_per_step)

    def conversations(self, step: int) -> list[int]:
        """Indices of the conversations of a step (0-based), the longest first; the last step of an epoch may be short."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
            self._epoch = epoch
        first = place * self.conversations_per_step
        chosen = self._order[first : first + self.conversations_per_step].tolist()
        return sorted(chosen, key=lambda i: (-self.examples[i].computed, i))

    def split(self, step: int, world_size: int) -> list[list[list[int]]]:
        """[rank][accumulation] -> conversations. All ranks get equally many micro-batches, some of them perhaps empty."""
        chosen = self.conversations(step)
        accumulation = -(-len(chosen) // (self.micro_batch * world_size))
        parts: list[list[int]] = [[] for _ in range(accumulation * world_size)]
        for number, conversation in enumerate(chosen):
            # Dealt out longest first, there and back again, so that micro-batches weigh about the same.
            lap, seat = divmod(number, len(parts))
            parts[seat if lap % 2 == 0 else len(parts) - 1 - seat].append(conversation)
        return [parts[rank::world_size] for rank in range(world_size)]

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """What this rank computes in this step; a stand-in of weight 0 where it has nothing, as all ranks must take part."""
        mine = self.split(step, world_size)[rank]
        shortest = min(self.conversations(step), key=lambda i: self.examples[i].computed)
        return [
            lay_out([self.examples[i] for i in part or [shortest]], self.batching, weight=1.0 if part else 0.0)
            for part in mine
        ]

    def work(self, step: int, world_size: int) -> StepWork:
        """Lengths and counts of the step over all ranks."""
        chosen = self.conversations(step)
        lengths, contexts, filled = [], [], []
        logits = 0
        is_padded = self.batching is Batching.padded
        for part in (part for parts in self.split(step, world_size) for part in parts if part):
            found, positions = sizes([self.examples[i] for i in part], NOTHING_SHARED if is_padded else LEAST_SHARED)
            longest = max(length for length, _ in found)
            lengths += [length for length, _ in found]
            contexts += [context for _, context in found]
            filled += [longest if is_padded else length for length, _ in found]
            logits += positions
        return StepWork(
            len(chosen),
            sum(self.examples[i].computed for i in chosen),
            tuple(lengths),
            tuple(contexts),
            tuple(filled),
            sum(self.examples[i].target_count for i in chosen),
            logits,
        )


def held_out_batches(examples: Sequence[Example], micro_batch: int, rank: int, world_size: int) -> list[MicroBatch]:
    """Held-out conversations in a fixed order, equally many micro-batches on every rank (stand-ins of weight 0 at the end)."""
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].computed, i))
    parts = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
    rounds = -(-len(parts) // world_size)
    batches = []
    for turn in range(rounds):
        index = turn * world_size + rank
        part = parts[index] if index < len(parts) else parts[-1]
        batches.append(lay_out([examples[i] for i in part], Batching.ragged, weight=1.0 if index < len(parts) else 0.0))
    return batches
