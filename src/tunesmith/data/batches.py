"""Which conversations go into which step, micro-batch and rank: a pure function of (data, seed, step, world)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tunesmith.config import Batching


@dataclass(frozen=True)
class Example:
    """A rendered conversation."""

    ids: np.ndarray
    """Token ids, int32 [tokens]."""
    targets: np.ndarray
    """True where the token is to be predicted from those before it, bool [tokens]."""
    place: str
    """Where it was read: file:line or file#index."""

    @cached_property
    def target_count(self) -> int:
        return int(self.targets[1:].sum())  # nothing predicts the first token

    @cached_property
    def computed(self) -> int:
        """Tokens that go through the model: those after the one that predicts the last target change no weight."""
        return int(np.flatnonzero(self.targets[1:])[-1]) + 1


@dataclass(frozen=True)
class MicroBatch:
    """Conversations laid end to end, for one forward on one rank. Tokens see only their own conversation."""

    ids: torch.Tensor
    """Token ids, int64 [tokens]."""
    positions: torch.Tensor
    """Position of each token in its conversation, int64 [tokens]."""
    lengths: tuple[int, ...]
    """Tokens of each conversation, padding included; they add up to len(ids)."""
    predicting: torch.Tensor
    """Indices into ids whose next token is a target, int64 [targets]."""
    labels: torch.Tensor
    """The target tokens, int64 [targets]."""
    real_tokens: int
    """Tokens that are not padding."""
    weight: float = 1.0
    """0 for a stand-in on a rank that has no conversation left in a short step, else 1."""

    @property
    def target_count(self) -> int:
        return len(self.labels) if self.weight else 0


@dataclass(frozen=True)
class StepWork:
    """What one step computes over all ranks: known to each rank without asking the others."""

    lengths: tuple[int, ...]
    """Real tokens of each conversation."""
    targets: int
    """Target tokens of the whole step: what the loss is divided by."""
    padded_lengths: tuple[int, ...]
    """What each conversation fills, padding included."""


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
        lengths = {i: self.examples[i].computed for i in chosen}
        filled = dict(lengths)
        if self.batching is Batching.padded:
            for part in (part for parts in self.split(step, world_size) for part in parts if part):
                filled |= dict.fromkeys(part, max(lengths[i] for i in part))
        targets = sum(self.examples[i].target_count for i in chosen)
        return StepWork(tuple(lengths.values()), targets, tuple(filled[i] for i in chosen))


def lay_out(examples: Sequence[Example], batching: Batching, weight: float = 1.0) -> MicroBatch:
    """Lay conversations end to end; `padded` fills each up to the longest, for comparison with frameworks that do."""
    longest = max(example.computed for example in examples)
    lengths = [longest if batching is Batching.padded else example.computed for example in examples]
    ids = np.zeros(sum(lengths), np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    predicting, labels = [], []
    start = 0
    for example, length in zip(examples, lengths, strict=True):
        ids[start : start + example.computed] = example.ids[: example.computed]
        before = np.flatnonzero(example.targets[1:])
        predicting.append(start + before)
        labels.append(example.ids[before + 1].astype(np.int64))
        start += length
    return MicroBatch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        lengths=tuple(lengths),
        predicting=torch.from_numpy(np.concatenate(predicting)),
        labels=torch.from_numpy(np.concatenate(labels)),
        real_tokens=sum(example.computed for example in examples),
        weight=weight,
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
