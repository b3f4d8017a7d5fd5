"""An n-gram model of the training targets: what a trained model has to beat, and which conversations look least like the rest.

Counting and interpolation are nltk.lm's. Its Witten-Bell smoothing ends in the counts of single tokens, where an unseen
token has probability 0; here these are mixed with a uniform distribution over the vocabulary in the same manner.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from nltk.lm import NgramCounter
from nltk.lm.models import InterpolatedLanguageModel
from nltk.lm.smoothing import WittenBell

from tunesmith.data.examples import Example, Examples

if TYPE_CHECKING:
    from tunesmith.data.templates import Tokenizer

COUNTED = 200_000
"""Target tokens that are counted at most, about: that takes a second, and up to 150 MB."""
SCORED = 1_000_000
"""Target tokens that are scored at most, about: that takes six seconds."""


@dataclass(frozen=True)
class Unlikely:
    """A conversation whose targets a model of the others finds improbable."""

    row: int
    """Its index in the examples."""
    place: str
    """Where it was read: file:line or file#index."""
    nats: float
    """Mean −ln p of its target tokens."""
    ids: np.ndarray
    """Its target tokens, int32 [targets]."""


class NgramModel:
    """Interpolated Witten-Bell over token ids; probabilities of all ids below `vocabulary_size` sum to 1 after any context."""

    def __init__(self, examples: Iterable[Example], vocabulary_size: int, order: int = 3):
        self.order = order
        counts = NgramCounter(_ngrams(example, order) for example in examples)
        self._model = InterpolatedLanguageModel(_WittenBell, order, counter=counts, params={"size": vocabulary_size})

    def probability(self, token: int, context: tuple[int, ...]) -> float:
        """p(token | the tokens before it), of which the last order − 1 count."""
        context = context[max(0, len(context) + 1 - self.order) :]
        # What was never seen says nothing, and nltk would make an empty entry for it.
        while context and context not in self._model.counts[len(context) + 1]:
            context = context[1:]
        return float(self._model.unmasked_score(token, context))

    def nats(self, example: Example) -> np.ndarray:
        """−ln p of each target token, float64 [targets]."""
        ids = example.ids.tolist()
        places = _places(example)
        found = (-math.log(self.probability(ids[at], tuple(ids[max(0, at + 1 - self.order) : at]))) for at in places)
        return np.fromiter(found, np.float64, len(places))

    def perplexity(self, examples: Examples, most_tokens: int = SCORED) -> float:
        """exp(mean nats per target token), over an even sample of conversations where there are more targets than that."""
        total, count = 0.0, 0
        for row in sample(examples.target_counts, np.arange(len(examples)), most_tokens):
            nats = self.nats(examples[row])
            total, count = total + float(nats.sum()), count + len(nats)
        return math.exp(total / count)


def fit(examples: Examples, vocabulary_size: int, order: int = 3, most_tokens: int = COUNTED) -> NgramModel:
    """A model of the targets, from an even sample of conversations with at most about `most_tokens` of them."""
    rows = sample(examples.target_counts, np.arange(len(examples)), most_tokens)
    return NgramModel((examples[row] for row in rows), vocabulary_size, order)


def rank_unlikely(examples: Examples, count: int, order: int = 3, counted: int = COUNTED, scored: int = SCORED) -> list[Unlikely]:
    """The `count` conversations with most nats per target token, each judged by a model of rows of the other parity.

    So none is judged by a model that has seen it. Where there are more target tokens than `scored`, an even sample is judged.
    """
    halves = [np.arange(first, len(examples), 2) for first in (0, 1)]
    seen = [sample(examples.target_counts, half, counted // 2) for half in halves]
    judged = [sample(examples.target_counts, half, scored // 2) for half in halves]
    size = max((int(examples[row].ids.max(initial=0)) for half in (*seen, *judged) for row in half), default=0) + 1
    least: list[Unlikely] = []
    for mine, others in zip(seen, reversed(judged), strict=True):
        model = NgramModel((examples[row] for row in mine), size, order)
        least = heapq.nlargest(count, [*least, *heapq.nlargest(count, _judge(model, examples, others), key=_order)], key=_order)
    return least


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """How many ids a tokenizer may give, special tokens and gaps included."""
    return max(tokenizer.get_vocab().values()) + 1


def sample(target_counts: np.ndarray, rows: np.ndarray, most_tokens: int) -> list[int]:
    """All rows, or evenly spread ones that have about `most_tokens` targets together, in order, the same at every call.

    One row by chance from each of equal stretches: every n-th would see only one kind where kinds alternate.
    """
    total = int(target_counts[rows].sum())
    if total <= most_tokens:
        return [int(row) for row in rows]
    wanted = max(1, len(rows) * most_tokens // total)
    at = (np.arange(wanted) + np.random.default_rng(0).random(wanted)) * (len(rows) / wanted)
    return [int(row) for row in rows[np.unique(at.astype(np.int64))]]


def _judge(model: NgramModel, examples: Examples, rows: Iterable[int]) -> Iterator[Unlikely]:
    for row in rows:
        example = examples[row]
        if len(places := _places(example)):
            yield Unlikely(row, example.place, float(model.nats(example).mean()), example.ids[places])


def _order(found: Unlikely) -> tuple[float, int]:
    return found.nats, -found.row


def _places(example: Example) -> np.ndarray:
    """Positions of the targets; the first token is none, as nothing predicts it."""
    return np.flatnonzero(example.targets[1:]) + 1


def _ngrams(example: Example, order: int) -> Iterator[tuple[int, ...]]:
    """What ends in a target, of length 1 to `order`; tokens that are not learned may stand in front."""
    ids = example.ids.tolist()
    for at in _places(example):
        for first in range(at, max(-1, at - order), -1):
            yield tuple(ids[first : at + 1])


class _WittenBell(WittenBell):  # type: ignore[misc]  # nltk ships no types
    """nltk's, with the floor, and with sums over a context's followers taken once: the counts no longer change."""

    def __init__(self, vocabulary: object, counter: NgramCounter, size: int):
        super().__init__(vocabulary, counter)
        self.size = size
        self.followers = cache(self._followers)

    def _followers(self, context: tuple[int, ...]) -> tuple[int, int]:
        """How many tokens followed the context, and how many different ones."""
        counts = self.counts[context] if context else self.counts.unigrams
        return counts.N(), counts.B()

    def alpha_gamma(self, word: int, context: tuple[int, ...]) -> tuple[float, float]:
        tokens, kinds = self.followers(context)
        return self.counts[context][word] / (tokens + kinds), kinds / (tokens + kinds)

    def unigram_score(self, word: int) -> float:
        tokens, kinds = self.followers(())
        kinds = kinds or 1  # nothing counted: uniform
        return float((self.counts.unigrams[word] + kinds / self.size) / (tokens + kinds))
