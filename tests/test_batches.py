"""Which conversation goes where: epochs, steps, ranks and micro-batches by property, and what is laid out token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tunesmith.config import Batching
from tunesmith.data.batches import Batches, data_line, deal, held_out_batches, outlook
from tunesmith.data.examples import Example, Examples, ListedExamples
from tunesmith.data.layout import LEAST_SHARED, MicroBatch, arrange, lay_out, pack, predicting_positions

# A busy machine is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

YES, NO = True, False
BATCHINGS = st.sampled_from(Batching)
RANKS = st.integers(1, 4)
SIZES = st.integers(1, 9)
TOKENS = st.one_of(st.just(0), st.integers(1, 200))
COSTS = st.sampled_from([0.0, 0.003, 1.0])


def example_of(targets: list[bool], first: int = 100, place: str = "") -> Example:
    """A conversation whose tokens are counted up from `first`, so that each can be recognised."""
    return Example(np.arange(first, first + len(targets), dtype=np.int32), np.array(targets, bool), place)


@st.composite
def examples_of(draw: st.DrawFn, most: int = 30) -> Examples:
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
    return ListedExamples(made)


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
    return Batches(
        draw(examples_of()), draw(SIZES), draw(SIZES), draw(st.integers(0, 2**32)), draw(BATCHINGS),
        tokens_per_step=draw(TOKENS), row=draw(st.integers(0, 60)), attention_cost=draw(COSTS),
    )  # fmt: skip


def steps_of(batches: Batches, epochs: int = 1) -> range:
    return range(epochs * batches.steps_per_epoch)


# --- epochs and steps ----------------------------------------------------------------------------------------------


@patient
@given(batches_of(), st.integers(1, 3))
def test_every_epoch_is_a_permutation(batches: Batches, epochs: int) -> None:
    """Each conversation once an epoch, whatever the sizes; of steps in conversations only an epoch's last may be short."""
    for epoch in range(epochs):
        steps = [batches.conversations(epoch * batches.steps_per_epoch + place) for place in range(batches.steps_per_epoch)]
        assert sorted(chain(*steps)) == list(range(len(batches.examples)))
        assert all(steps), "no step is empty"
        if not batches.tokens_per_step:
            assert all(len(step) == batches.conversations_per_step for step in steps[:-1])
            assert len(steps[-1]) <= batches.conversations_per_step


@patient
@given(st.lists(st.one_of(st.integers(1, 3), st.integers(1, 300)), min_size=1, max_size=60), st.integers(1, 400), st.integers(0, 9))
@example([300, *[1] * 20], 50, 0)
@example([10] * 3, 15, 0)
def test_steps_in_tokens_are_cut_where_they_are_nearest(lengths: list[int], wanted: int, seed: int) -> None:
    """Against the definition: cut k of K lies where the tokens before it are nearest to k/K of all, or as near as no empty step allows."""
    batches = Batches([example_of([NO] * n + [YES]) for n in lengths], 5, 2, seed, Batching.ragged, tokens_per_step=wanted)
    total, steps = sum(lengths), batches.steps_per_epoch
    assert steps == min(len(lengths), max(1, round(total / wanted)))
    for epoch in range(2):
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist()
        before = np.cumsum([0, *(lengths[i] for i in order)]).tolist()
        counts = [len(batches.conversations(epoch * steps + place)) for place in range(steps)]
        cuts = np.cumsum(counts)[:-1].tolist()
        nearest = [min(range(len(before)), key=lambda cut: (abs(before[cut] * steps - k * total), -cut)) for k in range(1, steps)]
        assert min(counts) >= 1
        if all(a < b for a, b in pairwise([0, *nearest, len(lengths)])):
            assert cuts == nearest
            # Two cuts, each at most half a conversation from where it should be.
            assert all(abs(b - a - total / steps) <= max(lengths) for a, b in pairwise(before[cut] for cut in [0, *cuts, len(lengths)]))
        assert [sorted(batches.conversations(epoch * steps + k)) for k in range(steps)] == [
            sorted(order[a:b]) for a, b in pairwise([0, *cuts, len(lengths)])
        ], "the permutation is the one that steps in conversations have"


def test_steps_in_tokens_of_unlike_lengths() -> None:
    """A conversation longer than a step has a step to itself, if its neighbours leave it that; no step is empty."""
    even = Batches([example_of([NO] * 10 + [YES])] * 40, 1, 2, 0, Batching.ragged, tokens_per_step=100)
    assert [len(even.conversations(step)) for step in range(even.steps_per_epoch)] == [10] * 4
    one_long = [example_of([NO] * n + [YES]) for n in [1000, *[1] * 9]]
    batches = Batches(one_long, 1, 2, 0, Batching.ragged, tokens_per_step=100)
    assert batches.steps_per_epoch == 10
    assert sorted(chain(*(batches.conversations(step) for step in range(10)))) == list(range(10))
    assert Batches(one_long, 1, 2, 0, Batching.ragged, tokens_per_step=10**6).steps_per_epoch == 1
    huge = ListedExamples(one_long)
    huge.computed = huge.computed * 10**8  # 10^11 tokens: cut in whole numbers of 64 bits
    steps = Batches(huge, 1, 2, 0, Batching.ragged, tokens_per_step=10**10)
    assert [steps.conversations(step) for step in range(10)] == [batches.conversations(step) for step in range(10)]


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


@patient
@given(batches_of(), RANKS, st.data())
def test_a_step_needs_no_other_before_it(batches: Batches, world_size: int, data: st.DataObject) -> None:
    """Resumed anywhere, asked in any order, again or not, for other ranks between: a step is the same."""
    steps = list(steps_of(batches, 2))[:8]

    def made(batches: Batches, step: int) -> object:
        ids = [[batch.ids.tolist() for batch in batches.micro_batches(step, rank, world_size)] for rank in range(world_size)]
        return batches.conversations(step), batches.split(step, world_size), batches.work(step, world_size), ids

    uninterrupted = {step: made(batches, step) for step in steps}
    for step in data.draw(st.permutations(steps)):
        batches.work(step, data.draw(RANKS))
        assert made(batches, step) == uninterrupted[step]


# --- ranks and micro-batches ---------------------------------------------------------------------------------------


@patient
@given(batches_of(), RANKS)
def test_a_split_covers_the_step_once(batches: Batches, world_size: int) -> None:
    """Every conversation on one rank, no micro-batch above its size, equally many on each rank, none more than needed."""
    for step in steps_of(batches):
        ranks = batches.split(step, world_size)
        assert len(ranks) == world_size
        assert Counter(chain(*chain(*ranks))) == Counter(batches.conversations(step))
        lengths = batches.examples.computed[batches.conversations(step)].tolist()
        packed = batches.batching is Batching.packed
        units = len(pack(lengths, batches.row)) if packed else len(lengths)
        assert {len(parts) for parts in ranks} == {-(-units // (batches.micro_batch * world_size))}
        sizes = [len(pack(batches.examples.computed[part].tolist(), batches.row)) if packed else len(part) for part in chain(*ranks)]
        assert max(sizes) <= batches.micro_batch
        assert sum(sizes) == units
        assert all(size == 0 for size in sizes) or min(sizes) > 0 or max(sizes) == 1, "none idle while another has several"
        if batches.batching in (Batching.padded, Batching.length_grouped):
            assert max(sizes) - min(sizes) <= 1, "shared out evenly"


@patient
@given(examples_of(), SIZES, TOKENS, st.integers(0, 99), st.lists(st.tuples(SIZES, RANKS, BATCHINGS, COSTS), min_size=2, max_size=4))
def test_a_step_is_the_same_for_any_split(
    examples: Examples, per_step: int, tokens: int, seed: int, splits: list[tuple[int, int, Batching, float]]
) -> None:
    """What a step trains on does not change with ranks, micro-batches, layout or engine; so the result is comparable, and resumable elsewhere."""
    found = []
    for micro_batch, world_size, batching, cost in splits:
        batches = Batches(examples, per_step, micro_batch, seed, batching, tokens_per_step=tokens, attention_cost=cost)
        taken = [sorted(chain(*chain(*batches.split(step, world_size)))) for step in steps_of(batches, 2)]
        trained = [
            labels_of(chain(*(batches.micro_batches(step, rank, world_size) for rank in range(world_size)))) for step in steps_of(batches)
        ]
        found.append((taken, trained))
    assert all(other == found[0] for other in found)


def test_micro_batches_cost_about_the_same() -> None:
    """With lengths 1 to 16 on two ranks all four micro-batches of four cost the same, in tokens; or nearly, with attention."""
    examples = [example_of([False] * length + [True]) for length in range(1, 17)]
    parts = list(chain(*Batches(examples, 16, 4, 0, Batching.ragged).split(0, 2)))
    assert [sum(examples[i].computed for i in part) for part in parts] == [34] * 4
    parts = list(chain(*Batches(examples, 16, 16, 0, Batching.ragged, attention_cost=1.0).split(0, 4)))
    costs = [sum(n + n * n for n in (examples[i].computed for i in part)) for part in parts]
    assert sum(costs) == 1632 and max(costs) - min(costs) <= 16
    assert len({len(part) for part in parts}) > 1, "one long conversation weighs as much as several short ones"


def snake(costs: list[int], count: int) -> list[list[int]]:
    """The plain deal: the longest first, there and back again."""
    parts: list[list[int]] = [[] for _ in range(count)]
    for place, number in enumerate(sorted(range(len(costs)), key=lambda number: -costs[number])):
        lap, seat = divmod(place, count)
        parts[seat if lap % 2 == 0 else count - 1 - seat].append(number)
    return parts


def dearest(costs: list[int], parts: list[list[int]]) -> int:
    return max(sum(costs[number] for number in part) for part in parts)


@patient
@given(st.lists(st.one_of(st.integers(1, 9), st.integers(1, 1000)), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 5))
def test_a_deal_is_never_much_dearer_than_there_and_back_again(costs: list[int], count: int, room: int) -> None:
    most = -(-len(costs) // count) + room
    parts = deal(costs, count, most)
    assert sorted(chain(*parts)) == list(range(len(costs)))
    assert max(map(len, parts)) <= most
    assert parts == sorted(parts, key=lambda part: -sum(costs[number] for number in part)), "the dearest first"
    assert dearest(costs, parts) <= dearest(costs, snake(costs, count)) + max(costs)


def test_a_deal_is_cheaper_on_the_whole() -> None:
    """The step takes as long as its dearest part: 4 ranks x 4, lengths as chats have them, with and without a tight limit."""
    draw = np.random.default_rng(0)
    sets = [np.rint(draw.lognormal(5, 1, 16 * 4)).astype(int).tolist() for _ in range(200)]
    plain = [dearest(costs, snake(costs, 16)) for costs in sets]
    assert sum(dearest(costs, deal(costs, 16, 8)) for costs in sets) < 0.85 * sum(plain)
    assert sum(dearest(costs, deal(costs, 16, 4)) for costs in sets) < 0.97 * sum(plain)


def test_rectangles_are_dealt_by_number() -> None:
    """In a rectangle a short conversation costs as much as a long one."""
    lengths = [100, *[1] * 7]
    ragged, padded = (Batches([example_of([NO] * n + [YES]) for n in lengths], 8, 8, 0, kind) for kind in (Batching.ragged, Batching.padded))
    assert [[len(part) for part in parts] for parts in ragged.split(0, 2)] == [[1], [7]]
    assert [[len(part) for part in parts] for parts in padded.split(0, 2)] == [[4], [4]]


def test_length_grouped_pads_little() -> None:
    """The same steps as padded ones, but neighbours in length together, and those at the same time on all ranks."""
    examples = [example_of([False] * length + [True]) for length in range(1, 17)]
    grouped, padded = (Batches(examples, 16, 4, 0, kind) for kind in (Batching.length_grouped, Batching.padded))
    lengths = [[[examples[i].computed for i in part] for part in parts] for parts in grouped.split(0, 2)]
    assert lengths == [[[16, 15, 14, 13], [8, 7, 6, 5]], [[12, 11, 10, 9], [4, 3, 2, 1]]]
    assert [sum(batches.work(0, 2).padded_lengths) for batches in (grouped, padded)] == [4 * (16 + 12 + 8 + 4), 4 * (16 + 15 + 14 + 13)]


@patient
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 60), st.data())
def test_rows_hold_what_fits(lengths: list[int], spare: int, data: st.DataObject) -> None:
    """Every conversation in one row, no row too full, no two rows that fit into one; some rows packed again are the same rows."""
    row = max(lengths) + spare
    rows = pack(lengths, row)
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in members) for members in rows]
    assert max(filled) <= row
    assert len(rows) == 1 or min(a + b for i, a in enumerate(filled) for b in filled[:i]) > row
    some = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    members = sorted(chain(*(rows[number] for number in some)))
    again = pack([lengths[number] for number in members], row)
    assert [[members[place] for place in members_again] for members_again in again] == [rows[number] for number in some]


def test_packed_micro_batches_hold_whole_rows() -> None:
    """Lengths 1 to 16 in rows of 20: 136 tokens in 7 rows, which two ranks take in two rounds of at most two, one of them alone."""
    examples = [example_of([False] * length + [True]) for length in range(1, 17)]
    batches = Batches(examples, 16, 2, 0, Batching.packed, row=20)
    made = [batches.micro_batches(0, rank, 2) for rank in range(2)]
    assert sorted(len(batch.ids) for batch in chain(*made)) == [20, 40, 40, 40]
    work = batches.work(0, 2)
    assert (sum(work.lengths), sum(work.padded_lengths), work.conversation_tokens) == (136, 140, 136)


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
        own = [batches.work(step, world_size, rank) for rank in range(world_size)]
        for name, total in asdict(work).items():
            assert total == sum((asdict(one)[name] for one in own), type(total)()), name
        assert work.targets == batches.targets(step)
        assert work.conversations == len(batches.conversations(step))
        assert work.conversation_tokens == sum(batches.examples[i].computed for i in batches.conversations(step)) >= sum(work.lengths)
        assert all(padded >= length for padded, length in zip(work.padded_lengths, work.lengths, strict=True))
        assert work.logits == sum(len(batch.predicting) for batch in made)
        if batches.batching is Batching.ragged:
            assert work.padded_lengths == work.lengths
        else:
            assert work.conversation_tokens == sum(work.lengths), "rectangles and rows share nothing"
            assert work.logits == work.targets
        if batches.batching is Batching.packed:
            assert {len(batch.ids) % batches.row for batch in made} == {0}, "whole rows"


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


@pytest.mark.parametrize("batching", [Batching.padded, Batching.length_grouped])
def test_padded_fills_up_to_the_longest(batching: Batching) -> None:
    """The same targets at other places; padding is counted apart."""
    batch = lay_out([SHORT, LONG, FIRST], batching)
    assert batch.ids.tolist() == [10, 11, 0, 0, 20, 21, 22, 23, 30, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3] * 3
    assert batch.lengths == (4, 4, 4)
    assert batch.predicting.tolist() == [1, 4, 5, 7, 8]
    assert batch.labels.tolist() == [12, 21, 22, 24, 31]
    assert (batch.real_tokens, batch.target_count) == (7, 5)


def test_packed_fills_rows() -> None:
    """Rows of 6: the longest and the next fit into one, the last has a row of its own; padding is a segment by itself."""
    batch = lay_out([SHORT, FIRST, LONG], Batching.packed, row=6)
    assert batch.ids.tolist() == [20, 21, 22, 23, 10, 11, 30, 0, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 0, 1, 2, 3, 4]
    assert batch.lengths == (4, 2, 1, 5)
    assert all(segment.context == () for segment in batch.segments)
    assert batch.predicting.tolist() == [0, 1, 3, 5, 6]
    assert batch.labels.tolist() == [21, 22, 24, 12, 31]
    assert (batch.real_tokens, batch.target_count) == (7, 5)
    assert lay_out([SHORT, FIRST, LONG], Batching.packed).lengths == (4, 2, 1, 1), "without a row, the longest says how long one is"


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
@given(examples_of(8), BATCHINGS, SHARED, st.integers(0, 60))
def test_every_target_is_predicted_from_all_before_it_and_nothing_else(examples: Examples, batching: Batching, least: int, row: int) -> None:
    """Against the definition, example by example: position t is a target, tokens 0 to t-1 of its own conversation are read."""
    wanted = Counter(
        (tuple(example.ids[:t].tolist()), int(example.ids[t]))
        for example in examples
        for t in range(1, len(example.ids))
        if example.targets[t]
    )
    batch = lay_out(list(examples), batching, least_shared=least, row=row)
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
    nodes = arrange(examples, Batching.ragged, least)
    assert [(node.real, node.padding, node.start) for node in nodes] == [(part.length, 0, part.context_length) for part in batch.segments]
    assert predicting_positions(examples, nodes) == len(batch.predicting) == len(set(batch.predicting.tolist())), "a position's logits are computed once"
    assert predictions(batch) == Counter((tuple(text[:-1]), text[-1]) for text in texts)


@patient
@given(examples_of(8))
def test_no_tail_is_computed(examples: Examples) -> None:
    """Each segment ends with a token that predicts or that another one continues."""
    batch = lay_out(list(examples), Batching.ragged)
    continued = {stop for segment in batch.segments for _, stop in segment.context}
    assert {segment.stop for segment in batch.segments} <= continued | {place + 1 for place in batch.predicting.tolist()}
    assert batch.real_tokens == len(batch.ids)


# --- held-out data -------------------------------------------------------------------------------------------------


@patient
@given(examples_of(), SIZES, RANKS)
def test_held_out_batches_cover_all_once(examples: Examples, micro_batch: int, world_size: int) -> None:
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


# --- what a run will compute ---------------------------------------------------------------------------------------


@patient
@given(batches_of(), RANKS, st.integers(1, 4))
def test_the_outlook_is_what_the_first_steps_compute(batches: Batches, world_size: int, steps: int) -> None:
    found = outlook(batches, world_size, steps)
    assert found.steps == min(steps, batches.steps_per_epoch)
    made = [
        batch for step in range(found.steps) for rank in range(world_size) for batch in batches.micro_batches(step, rank, world_size) if batch.weight
    ]
    real = sum(batch.real_tokens for batch in made)
    assert found.computed_tokens == sum(len(batch.ids) for batch in made) == real + found.padding_tokens
    assert found.target_tokens == sum(batch.target_count for batch in made)
    assert found.shared_tokens == found.conversation_tokens - real >= 0


def test_the_plans_line_about_the_data() -> None:
    """Of 4 x 24 tokens a step computes 20 + 4 x 4: 62 % less; in rows of 32 each 24 leave 8 empty: a quarter is padding."""
    examples = ListedExamples(
        [Example(np.array([*range(20), *range(100 * n, 100 * n + 5)], np.int32), np.array([NO] * 19 + [YES] * 6), "") for n in range(1, 1201)]
    )
    ragged = Batches(examples, 4, 4, 0, Batching.ragged)
    assert data_line(examples, outlook(ragged, 1)) == (
        "data     1,200 conversations, 28,800 tokens, 25 % of them targets; common beginnings save 62 % (first 8 steps)"
    )
    packed = Batches(examples, 4, 4, 0, Batching.packed, row=32)
    assert data_line(examples, outlook(packed, 2, 3)).endswith("targets; 25 % of what is computed is padding (first 3 steps)")


def test_only_the_conversations_of_a_step_are_read() -> None:
    """The others' lengths are known without their tokens, and a step's conversations are read once, however often it is asked for.

    They are not kept after it.
    """

    read: Counter[int] = Counter()

    class Watched(ListedExamples):
        def __getitem__(self, index: int) -> Example:
            read[index] += 1
            return super().__getitem__(index)

    examples = Watched([example_of([NO] * n + [YES]) for n in range(1, 41)])
    batches = Batches(examples, 8, 2, 0, Batching.ragged, tokens_per_step=100)
    for step in (3, 4, 3):
        read.clear()
        batches.work(step, 2)
        batches.micro_batches(step, 1, 2)
        batches.work(step, 2)
        assert read == Counter(batches.conversations(step))


@patient
@given(st.integers(1, 60).flatmap(lambda row: st.tuples(st.lists(st.integers(1, row), max_size=70), st.just(row))))
@example(([5] * 65, 10))
@example(([], 3))
def test_packed_rows_are_those_of_first_fit(drawn: tuple[list[int], int]) -> None:
    """Against the definition: the longest first, equal ones in order, each into the first row that has room."""
    lengths, row = drawn
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fitting = [members for members in rows if sum(lengths[member] for member in members) + lengths[number] <= row]
        if fitting:
            fitting[0].append(number)
        else:
            rows.append([number])
    assert pack(lengths, row) == rows


@pytest.mark.parametrize("batching", [Batching.ragged, Batching.packed])
def test_a_thousand_ranks(batching: Batching) -> None:
    """Each conversation of an epoch on one of 1,024 ranks, equally many micro-batches on each; a rank reads its own tokens alone."""
    read: Counter[int] = Counter()

    class Watched(ListedExamples):
        def __getitem__(self, index: int) -> Example:
            read[index] += 1
            return super().__getitem__(index)

    ranks, lengths = 1024, np.random.default_rng(0).integers(2, 200, 10_000)
    batches = Batches(Watched([example_of([NO] * int(n - 1) + [YES]) for n in lengths]), 4096, 2, 0, batching, row=256)
    dealt: Counter[int] = Counter()
    for step in range(batches.steps_per_epoch):
        split = batches.split(step, ranks)
        assert len(split) == ranks and len({len(parts) for parts in split}) == 1
        for parts in split:
            dealt.update(chain(*parts))
    assert dealt == Counter(range(len(lengths)))
    read.clear()
    batches.micro_batches(1, 700, ranks)
    work = batches.work(1, ranks, 700)
    own, shortest = list(chain(*batches.split(1, ranks)[700])), batches.conversations(1)[-1]
    assert work.conversations == len(own) > 0 and read.keys() <= {*own, shortest}
