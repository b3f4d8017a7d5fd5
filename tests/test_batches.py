"""Which conversation goes where: epochs, steps, ranks and micro-batches by property, and what is laid out token by token."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.config import Batching
from tunesmith.data.batches import Batches, Example, MicroBatch, held_out_batches, lay_out

# A busy machine is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

BATCHINGS = st.sampled_from(Batching)
RANKS = st.integers(1, 4)
SIZES = st.integers(1, 9)


def example_of(targets: list[bool], first: int = 100, place: str = "") -> Example:
    """A conversation whose tokens are counted up from `first`, so that each can be recognised."""
    return Example(np.arange(first, first + len(targets), dtype=np.int32), np.array(targets, bool), place)


@st.composite
def examples_of(draw: st.DrawFn, most: int = 30) -> list[Example]:
    """Conversations that `load` lets through: at least one target that is not the first token. No two share a token."""
    count = draw(st.integers(1, most))
    made = []
    for number in range(count):
        targets = draw(st.lists(st.booleans(), min_size=1, max_size=7))
        place = draw(st.integers(0, len(targets) - 1))
        made.append(example_of([draw(st.booleans()), *targets[:place], True, *targets[place:]], 1000 * (number + 1), f"f#{number}"))
    return made


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
    found = set()
    for micro_batch, world_size in splits:
        batches = Batches(examples, per_step, micro_batch, seed, batching)
        taken = tuple(tuple(sorted(chain(*chain(*batches.split(step, world_size))))) for step in steps_of(batches, 2))
        labels = tuple(
            tuple(sorted(label for rank in range(world_size) for batch in batches.micro_batches(step, rank, world_size)
                         if batch.weight for label in batch.labels.tolist()))
            for step in steps_of(batches)
        )  # fmt: skip
        found.add((taken, labels))
    assert len(found) == 1


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
                assert len(batch.lengths) == max(1, len(part))
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
        assert work.targets == sum(batch.target_count for batch in made) == sum(len(batch.labels) for batch in made)
        assert sum(work.lengths) == sum(batch.real_tokens for batch in made)
        assert Counter(work.padded_lengths) == Counter(chain(*(batch.lengths for batch in made)))
        assert sum(work.padded_lengths) == sum(len(batch.ids) for batch in made)
        assert len(work.lengths) == len(batches.conversations(step))
        assert all(padded >= length for padded, length in zip(work.padded_lengths, work.lengths, strict=True))
        if batches.batching is Batching.ragged:
            assert work.padded_lengths == work.lengths


# --- one micro-batch, token by token -------------------------------------------------------------------------------

YES, NO = True, False
SHORT = example_of([NO, NO, YES], 10)  # 10 11 [12]
LONG = example_of([NO, YES, YES, NO, YES, NO, NO], 20)  # 20 [21] [22] 23 [24] 25 26
FIRST = example_of([YES, YES, NO], 30)  # its first token cannot be predicted


def test_ragged_lays_conversations_end_to_end() -> None:
    """Tokens after the one that predicts the last target are not computed: 12 and 24 to 26 are labels at most."""
    batch = lay_out([SHORT, LONG, FIRST], Batching.ragged)
    assert batch.ids.tolist() == [10, 11, 20, 21, 22, 23, 30]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 3, 0]
    assert batch.lengths == (2, 4, 1)
    assert batch.predicting.tolist() == [1, 2, 3, 5, 6]
    assert batch.labels.tolist() == [12, 21, 22, 24, 31]
    assert (batch.real_tokens, batch.target_count, batch.weight) == (7, 5, 1.0)
    assert {batch.ids.dtype, batch.positions.dtype, batch.predicting.dtype, batch.labels.dtype} == {torch.int64}


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


def predictions(batch: MicroBatch) -> list[tuple[list[int], int]]:
    """(what the model has read, what it is to say) of each target, in order, from a laid-out batch alone."""
    ends = np.cumsum(batch.lengths)
    found = []
    for place, label in zip(batch.predicting.tolist(), batch.labels.tolist(), strict=True):
        start = int(ends[np.searchsorted(ends, place, side="right")] - batch.lengths[int(np.searchsorted(ends, place, side="right"))])
        assert batch.positions[place] == place - start
        found.append((batch.ids[start : place + 1].tolist(), label))
    return found


@patient
@given(examples_of(5), BATCHINGS)
def test_every_target_is_predicted_from_all_before_it_and_nothing_else(examples: list[Example], batching: Batching) -> None:
    """Against the definition, example by example: position t is a target, tokens 0 to t-1 of its own conversation are read."""
    wanted = [
        (example.ids[:t].tolist(), int(example.ids[t])) for example in examples for t in range(1, len(example.ids)) if example.targets[t]
    ]
    batch = lay_out(examples, batching)
    assert predictions(batch) == wanted
    assert len(batch.ids) == len(batch.positions) == sum(batch.lengths)
    if batching is Batching.ragged:
        last = np.cumsum(batch.lengths) - 1
        assert set(last.tolist()) <= set(batch.predicting.tolist()), "each conversation ends with a token that predicts: no tail"
        assert batch.real_tokens == len(batch.ids)


# --- held-out data -------------------------------------------------------------------------------------------------


@patient
@given(examples_of(), SIZES, RANKS)
def test_held_out_batches_cover_all_once(examples: list[Example], micro_batch: int, world_size: int) -> None:
    ranks = [held_out_batches(examples, micro_batch, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "equally many forwards on every rank"
    counted = [batch for batches in ranks for batch in batches if batch.weight]
    wanted = Counter(int(example.ids[t]) for example in examples for t in range(1, len(example.ids)) if example.targets[t])
    assert Counter(label for batch in counted for label in batch.labels.tolist()) == wanted
    assert sum(batch.target_count for batches in ranks for batch in batches) == sum(example.target_count for example in examples)
    assert all(len(batch.lengths) <= micro_batch for batch in counted)
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
