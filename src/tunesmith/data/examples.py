"""Rendered conversations as arrays: what batches are made of, wherever the tokens lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


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
        found = np.flatnonzero(self.targets[1:])
        return int(found[-1]) + 1 if len(found) else 0


class Examples(ABC):
    """The conversations of a part, in order; their lengths are known without reading a token."""

    computed: np.ndarray
    """Tokens of each that go through the model, int64 [conversations]."""
    target_counts: np.ndarray
    """Target tokens of each, int64 [conversations]."""

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    def __len__(self) -> int:
        return len(self.computed)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class ListedExamples(Examples):
    """Examples that are all in memory."""

    def __init__(self, examples: Sequence[Example]):
        self._examples = list(examples)
        self.computed = np.array([example.computed for example in self._examples], np.int64)
        self.target_counts = np.array([example.target_count for example in self._examples], np.int64)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]
