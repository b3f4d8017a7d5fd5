"""Which conversation goes where: epochs, steps, ranks and micro-batches by property, and what is laid out token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.config import Batching
from tunesmith.data.batches import Batches, held_out_batches
from tunesmith.data.layout import LEAST_SHARED, Example, MicroBatch, lay_out, sizes

# A busy machine is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

YES, NO = True, False
BATCHINGS = st.sampled_from(Batching)
RANKS = st.integers(1, 4)
SIZES = st.integers(1, 9)


def example_of(targets: list[bool], first: int = 100, place: str = "") -> Example:
    """A conversation whose tokens are counted up from `first`, so that each can be recognised."""
    return Example(np.arange(first, first + len(targets), dtype=np.int32), np.array(targets, bool), place)


@st.composite
def examples_of(draw: st.DrawFn, most: int = 30) -> list[Example]:
    """Conversations that `load` lets through: at least one target that is not the first token.

    Many begin alike (a tools prompt, a dialogue that grows), some are equal; all end with tokens of their own.
    """
    prompts = [list(range(first, first + LEAST_SHARED + 4)) for first in (0, 50)]
    made: list[Example] = []
    for number in range(draw(st.integers(1, most))):
        kind = draw(st.integers(0, 5))
        own = list(range(1000 * (number + 1), 1000 * (number + 1) + draw(st.integers(2, 7))))
        if kind <= 1:
            ids = prompts[kind] + own
        elif kind == 2 and made:
            ids = made[draw(st.integers(0, len(made) - 1))].ids.tolist() + own * draw(st.integers(0, 1))
        else:
            ids = own
        targets = np.array(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), bool)
        targets[draw(st.integers(1, len(ids) - 1))] = True
        made.append(Example(np.array(ids, np.int32), targets, f"f#{number}"))
    return made


def labels_of(batches: Iterable[MicroBatch]) -> Counter[int]:
    """How often each token is a target in these batches, stand-ins left out."""
    found: Counter[int] = Counter()
    for batch in batches:
        if batch.weight:
            for label, count in zip(batch.labels.tolist(), batch.counts.tolist(), strict=True):
                found[label] += int(count)
    return found


@st.composite
def batches_of(draw: st.DrawFn) -> Batches:
    return Batches(draw(examples_of()), draw(SIZES), draw(SIZES), draw(st.integers(0, 2**32)), draw(BATCHINGS))


def steps_of(batches: Batches, epochs: int = 1) -> range:
    return range(epochs * batches.steps_per_epoch)


# --- epochs and steps ----------------------------------------------------------------------------------------------


@patient
@given(batches_of(), st.integers(1, 3))
def test_every_epoch_is_a_permutation(batches: Batches, epochs: int) -> None:
    """Each conversation once an epoch, whatever the sizes; only the last step of an epoch may be short."""
    for epoch in range(epochs):
        steps = [batches.conversations(epoch * batches.steps_per_epoch + place) for place in range(batches.steps_per_epoch)]
        assert sorted(chain(*steps)) == list(range(len(batches.examples)))
        assert all(len(step) == batches.conversations_per_step for step in steps[:-1])
        assert 1 <= len(steps[-1]) <= batches.conversations_per_step


def test_a_short_last_step() -> None:
    batches = Batches([example_of([False, True])] * 10, 4, 2, 0, Batching.ragged)
    assert batches.steps_per_epoch == 3
    assert [len(batches.conversations(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    exact = Batches([example_of([False, True])] * 8, 4, 2, 0, Batching.ragged)
    assert [len(exact.conversations(step)) for step in range(exact.steps_per_epoch)] == [4, 4]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    """A resumed run asks for step 7 first; it gets what an uninterrupted one got."""
    examples = [example_of([False, True])] * 50

    def order(seed: int, steps: range) -> list[list[int]]:
        batches = Batches(examples, 5, 2, seed, Batching.ragged)
        return [batches.conversations(step) for step in steps]

    assert order(0, range(20))[7:] == order(0, range(7, 20))
    assert order(0, range(20))[::-1] == order(0, range(19, -1, -1)), "back and forth over epochs too"
    assert order(0, range(10)) != order(0, range(10, 20)), "each epoch has an order of its own"
    assert order(0, range(10)) != order(1, range(10))
    assert sorted(chain(*order(0, range(10)))) == sorted(chain(*order(1, range(10))))


# --- ranks and micro-batches ---------------------------------------------------------------------------------------


@patient
@given(batches_of(), RANKS)
def test_a_split_covers_the_step_once(batches: Batches, world_size: int) -> None:
    """Every conversation on one rank, no micro-batch above its size, equally many on each rank, none more than needed."""
    for step in steps_of(batches):
        ranks = batches.split(step, world_size)
        assert len(ranks) == world_size
        assert Counter(chain(*chain(*ranks))) == Counter(batches.conversations(step))
        accumulation = {len(parts) for parts in ranks}
        assert accumulation == {-(-len(batches.conversations(step)) // (batches.micro_batch * world_size))}
        assert max(map(len, chain(*ranks))) <= batches.micro_batch
        sizes = [len(part) for part in chain(*ranks)]
        assert max(sizes) - min(sizes) <= 1, "shared out evenly"


@patient
@given(examples_of(), SIZES, st.integers(0, 99), BATCHINGS, st.lists(st.tuples(SIZES, RANKS), min_size=2, max_size=4))
def test_a_step_is_the_same_for_any_split(
    examples: list[Example], per_step: int, seed: int, batching: Batching, splits: list[tuple[int, int]]
) -> None:
    """What a step trains on does not change with ranks, micro-batches or engine; so the result is comparable, and resumable elsewhere."""
    found = []
    for micro_batch, world_size in splits:
        batches = Batches(examples, per_step, micro_batch, seed, batching)
        taken = [sorted(chain(*chain(*batches.split(step, world_size)))) for step in steps_of(batches, 2)]
        trained = [
            labels_of(chain(*(batches.micro_batches(step, rank, world_size) for rank in range(world_size)))) for step in steps_of(batches)
        ]
        found.append((taken, trained))
    assert all(other == found[0] for other in found)


def test_micro_batches_weigh_about_the_same() -> None:
    """Dealt out longest first: with lengths 1..16 on two ranks neither computes more than a conversation's length above the other."""
    examples = [example_of([False] * length + [True]) for length in range(1, 17)]
    batches = Batches(examples, 16, 4, 0, Batching.ragged)
    loads = [sum(examples[i].computed for part in parts for i in part) for parts in batches.split(0, 2)]
    assert abs(loads[0] - loads[1]) <= 16
    parts = [sum(examples[i].computed for i in part) for part in chain(*batches.split(0, 2))]
    assert max(parts) - min(parts) <= 16


@patient
@given(batches_of(), RANKS)
def test_stand_ins_have_no_weight_and_fill_only_what_is_empty(batches: Batches, world_size: int) -> None:
    """All ranks take part in every forward; who has nothing left computes something that does not count."""
    for step in steps_of(batches):
        shares = batches.split(step, world_size)
        for rank in range(world_size):
            made = batches.micro_batches(step, rank, world_size)
            assert [batch.weight for batch in made] == [1.0 if part else 0.0 for part in shares[rank]]
            for batch, part in zip(made, shares[rank], strict=True):
                assert batch.target_count == sum(batches.examples[i].target_count for i in part)
                assert len(batch.labels) > 0, "a stand-in has a gradient path"


def test_a_short_step_needs_stand_ins() -> None:
    batches = Batches([example_of([False, True, True])] * 9, 8, 2, 0, Batching.ragged)
    assert [[batch.weight for batch in batches.micro_batches(1, rank, 4)] for rank in range(4)] == [[1.0], [0.0], [0.0], [0.0]]
    assert [batch.target_count for rank in range(4) for batch in batches.micro_batches(1, rank, 4)] == [2, 0, 0, 0]
    assert batches.work(1, 4).targets == 2


@patient
@given(batches_of(), RANKS)
def test_work_is_what_all_ranks_compute(batches: Batches, world_size: int) -> None:
    """The loss is divided by these targets and the meter counts these tokens, so they must be the sums over all ranks."""
    for step in steps_of(batches):
        work = batches.work(step, world_size)
        made = [batch for rank in range(world_size) for batch in batches.micro_batches(step, rank, world_size) if batch.weight]
        assert work.targets == sum(batch.target_count for batch in made) == sum(labels_of(made).values())
        assert sum(work.lengths) == sum(batch.real_tokens for batch in made)
        segments = Counter((segment.length, segment.context_length) for batch in made for segment in batch.segments)
        assert Counter(zip(work.padded_lengths, work.contexts, strict=True)) == segments
        assert sum(work.padded_lengths) == sum(len(batch.ids) for batch in made)
        assert work.conversations == len(batches.conversations(step))
        assert work.conversation_tokens == sum(batches.examples[i].computed for i in batches.conversations(step)) >= sum(work.lengths)
        assert all(padded >= length for padded, length in zip(work.padded_lengths, work.lengths, strict=True))
        if batches.batching is Batching.ragged:
            assert work.padded_lengths == work.lengths
        else:
            assert work.conversation_tokens == sum(work.lengths), "the rectangle shares nothing"


def test_common_beginnings_count_once_in_the_work_and_once_each_in_the_targets() -> None:
    """Four conversations of 20 common tokens and 5 of their own, of which one is never computed: it only is the last target."""
    examples = [
        Example(np.array([*range(20), *range(100 * n, 100 * n + 5)], np.int32), np.array([NO] * 10 + [YES] * 15), "") for n in range(1, 5)
    ]
    work = Batches(examples, 4, 4, 0, Batching.ragged).work(0, 1)
    assert sorted(zip(work.lengths, work.contexts, strict=True)) == [(4, 20)] * 4 + [(20, 0)]
    assert (work.conversations, work.conversation_tokens, work.targets) == (4, 4 * 24, 4 * 15)
    padded = Batches(examples, 4, 4, 0, Batching.padded).work(0, 1)
    assert (padded.lengths, padded.contexts, padded.targets) == ((24,) * 4, (0,) * 4, 60)


# --- one micro-batch, token by token -------------------------------------------------------------------------------

SHORT = example_of([NO, NO, YES], 10)  # 10 11 [12]
LONG = example_of([NO, YES, YES, NO, YES, NO, NO], 20)  # 20 [21] [22] 23 [24] 25 26
FIRST = example_of([YES, YES, NO], 30)  # its first token cannot be predicted


def test_ragged_lays_conversations_end_to_end() -> None:
    """The longest first. Tokens after the one that predicts the last target are not computed: 12 and 24 to 26 are labels at most."""
    batch = lay_out([SHORT, LONG, FIRST], Batching.ragged)
    assert batch.ids.tolist() == [20, 21, 22, 23, 10, 11, 30]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0]
    assert batch.lengths == (4, 2, 1)
    assert batch.predicting.tolist() == [0, 1, 3, 5, 6]
    assert batch.labels.tolist() == [21, 22, 24, 12, 31]
    assert batch.counts.tolist() == [1] * 5
    assert (batch.real_tokens, batch.target_count, batch.weight) == (7, 5, 1.0)
    assert {batch.ids.dtype, batch.positions.dtype, batch.predicting.dtype, batch.labels.dtype} == {torch.int64}


def test_a_common_beginning_is_laid_once() -> None:
    """0 1 2 3 is common; one goes on with 4 5, two with 6, of which 6 is a target in one of them and 7 in both."""
    begin = [0, 1, 2, 3]
    examples = [
        Example(np.array([*begin, 4, 5]), np.array([NO, NO, YES, NO, NO, YES]), "a"),
        Example(np.array([*begin, 6, 7]), np.array([NO, NO, YES, NO, YES, YES]), "b"),
        Example(np.array([*begin, 6, 7]), np.array([NO, NO, NO, NO, NO, YES]), "c"),
    ]
    batch = lay_out(examples, Batching.ragged, least_shared=1)
    assert batch.ids.tolist() == [0, 1, 2, 3, 4, 6]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 4]
    assert [(segment.start, segment.stop, segment.context) for segment in batch.segments] == [
        (0, 4, ()),
        (4, 5, ((0, 4),)),
        (5, 6, ((0, 4),)),
    ]
    found = zip(places(batch), batch.labels.tolist(), batch.counts.tolist(), strict=True)
    assert sorted(found) == [(1, 2, 2.0), (3, 6, 1.0), (4, 5, 1.0), (5, 7, 2.0)]
    assert (batch.real_tokens, batch.target_count) == (6, 6)
    assert lay_out(examples, Batching.ragged).lengths == (5, 5, 5), f"fewer than {LEAST_SHARED} common tokens are not worth a segment"


def test_padded_fills_up_to_the_longest() -> None:
    """The same targets at other places; padding is counted apart."""
    batch = lay_out([SHORT, LONG, FIRST], Batching.padded)
    assert batch.ids.tolist() == [10, 11, 0, 0, 20, 21, 22, 23, 30, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3] * 3
    assert batch.lengths == (4, 4, 4)
    assert batch.predicting.tolist() == [1, 4, 5, 7, 8]
    assert batch.labels.tolist() == [12, 21, 22, 24, 31]
    assert (batch.real_tokens, batch.target_count) == (7, 5)


def test_a_stand_in_counts_no_target() -> None:
    batch = lay_out([SHORT], Batching.ragged, weight=0.0)
    assert (len(batch.labels), batch.target_count) == (1, 0)


def test_counts_of_an_example() -> None:
    assert [(example.target_count, example.computed) for example in (SHORT, LONG, FIRST)] == [(1, 2), (3, 4), (1, 1)]


def places(batch: MicroBatch) -> list[int]:
    """The position that predicts each target."""
    found = batch.predicting if batch.rows is None else batch.predicting[batch.rows]
    return found.tolist()


def predictions(batch: MicroBatch) -> Counter[tuple[tuple[int, ...], int]]:
    """(what the model has read, what it is to say) of each target and how often it counts, from a laid-out batch alone."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for place, label, count in zip(places(batch), batch.labels.tolist(), batch.counts.tolist(), strict=True):
        (segment,) = (segment for segment in batch.segments if segment.start <= place < segment.stop)
        read = [token for start, stop in (*segment.context, (segment.start, place + 1)) for token in batch.ids[start:stop].tolist()]
        assert batch.positions[place] == len(read) - 1
        found[tuple(read), label] += int(count)
    return found


SHARED = st.integers(1, 20)
# Few tokens, so that conversations begin alike in every way.
ALIKE = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=8), min_size=1, max_size=12)


@patient
@given(examples_of(8), BATCHINGS, SHARED)
def test_every_target_is_predicted_from_all_before_it_and_nothing_else(examples: list[Example], batching: Batching, least: int) -> None:
    """Against the definition, example by example: position t is a target, tokens 0 to t-1 of its own conversation are read."""
    wanted = Counter(
        (tuple(example.ids[:t].tolist()), int(example.ids[t]))
        for example in examples
        for t in range(1, len(example.ids))
        if example.targets[t]
    )
    batch = lay_out(examples, batching, least_shared=least)
    assert predictions(batch) == wanted
    assert batch.target_count == wanted.total()
    assert len(batch.ids) == len(batch.positions) == sum(batch.lengths)
    assert [segment.start for segment in batch.segments] == [0, *np.cumsum(batch.lengths).tolist()[:-1]]


@patient
@given(ALIKE, SHARED)
def test_nothing_is_computed_twice(texts: list[list[int]], least: int) -> None:
    """Down to single tokens, a beginning that any two share is there once; and the work counts just what is laid out."""
    examples = [Example(np.array(text, np.int32), np.array([NO] * (len(text) - 1) + [YES]), "") for text in texts]
    beginnings = {tuple(text[:end]) for text in texts for end in range(1, len(text))}
    assert len(lay_out(examples, Batching.ragged, least_shared=1).ids) == len(beginnings)
    batch = lay_out(examples, Batching.ragged, least_shared=least)
    assert len(batch.ids) >= len(beginnings)
    found, positions = sizes(examples, least)
    assert found == [(segment.length, segment.context_length) for segment in batch.segments]
    assert positions == len(batch.predicting) == len(set(batch.predicting.tolist())), "a position's logits are computed once"
    assert predictions(batch) == Counter((tuple(text[:-1]), text[-1]) for text in texts)


@patient
@given(examples_of(8))
def test_no_tail_is_computed(examples: list[Example]) -> None:
    """Each segment ends with a token that predicts or that another one continues."""
    batch = lay_out(examples, Batching.ragged)
    continued = {stop for segment in batch.segments for _, stop in segment.context}
    assert {segment.stop for segment in batch.segments} <= continued | {place + 1 for place in batch.predicting.tolist()}
    assert batch.real_tokens == len(batch.ids)


# --- held-out data -------------------------------------------------------------------------------------------------


@patient
@given(examples_of(), SIZES, RANKS)
def test_held_out_batches_cover_all_once(examples: list[Example], micro_batch: int, world_size: int) -> None:
    ranks = [held_out_batches(examples, micro_batch, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "equally many forwards on every rank"
    counted = [batch for batches in ranks for batch in batches if batch.weight]
    wanted = Counter(int(example.ids[t]) for example in examples for t in range(1, len(example.ids)) if example.targets[t])
    assert labels_of(counted) == wanted
    assert sum(batch.target_count for batches in ranks for batch in batches) == sum(example.target_count for example in examples)
    assert len(counted) == -(-len(examples) // micro_batch)
    assert len(ranks[0]) == -(-len(counted) // world_size), "no round more than needed"
    stand_ins = [[batch.weight for batch in batches] for batches in ranks]
    assert all(weights[:-1] == [1.0] * (len(weights) - 1) for weights in stand_ins), "stand-ins come last"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_order_is_fixed(world_size: int) -> None:
    examples = [example_of([False] * length + [True], 100 * length) for length in (2, 5, 3, 4)]
    first, again = (
        [[batch.ids.tolist() for batch in held_out_batches(examples, 1, rank, world_size)] for rank in range(world_size)] for _ in range(2)
    )
    assert first == again
    assert len(first[0][0]) == 5, "the longest first: what does not fit into memory fails at once"
