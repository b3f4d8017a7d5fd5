"""The n-gram model is a distribution, its numbers are those of a pencil, and it finds what does not belong."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tunesmith.data.examples import Example, ListedExamples
from tunesmith.data.ngram import NgramModel, fit, rank_unlikely, sample, vocabulary_size

A, B, C = 0, 1, 2


def example(ids: list[int], learned: int | None = None, place: str = "here:1") -> Example:
    """The last `learned` tokens are targets; None: all, though nothing predicts the first."""
    targets = np.arange(len(ids)) >= len(ids) - (len(ids) if learned is None else learned)
    return Example(np.array(ids, np.int32), targets, place)


def test_probabilities_are_those_of_a_pencil() -> None:
    # Targets: B after A, A after AB, B after BA. Four tokens exist.
    model = NgramModel([example([A, B, A, B])], vocabulary_size=4, order=3)
    # Single tokens: B twice, A once; 3 tokens of 2 kinds, so the uniform distribution weighs 2 of 5.
    one_b, one_a = (2 + 2 / 4) / 5, (1 + 2 / 4) / 5
    assert model.probability(B, ()) == pytest.approx(one_b)
    assert model.probability(C, ()) == pytest.approx((2 / 4) / 5)
    # After A: B twice, one kind.
    b_after_a = (2 + one_b) / 3
    assert model.probability(B, (A,)) == pytest.approx(b_after_a)
    # After BA: B once, one kind. What lies further back does not count.
    b_after_ba = (1 + b_after_a) / 2
    assert model.probability(B, (C, C, B, A)) == pytest.approx(b_after_ba)
    # After C nothing was ever seen; after CA the A alone says something.
    assert model.probability(A, (A, C)) == pytest.approx(one_a)
    assert model.probability(B, (C, A)) == pytest.approx(b_after_a)
    a_after_ab = (1 + (1 + one_a) / 2) / 2
    wanted = math.exp(-(math.log(b_after_a) + math.log(a_after_ab) + math.log(b_after_ba)) / 3)
    assert model.perplexity(ListedExamples([example([A, B, A, B])])) == pytest.approx(wanted)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one(order: int) -> None:
    rng, size = random.Random(order), 30
    model = NgramModel([example([rng.randrange(12) for _ in range(40)], learned=25) for _ in range(8)], size, order)
    contexts = [(), (29,), (29, 3), *(tuple(rng.randrange(13) for _ in range(rng.randrange(1, 6))) for _ in range(30))]
    for context in contexts:
        found = [model.probability(token, context) for token in range(size)]
        assert min(found) > 0
        assert sum(found) == pytest.approx(1, abs=1e-12)


def test_only_targets_are_counted_and_scored() -> None:
    """The prompt is context: what it says is neither learned nor asked."""
    model = NgramModel([example([A, A, A, B], learned=1)], vocabulary_size=3)
    assert model.probability(A, ()) == model.probability(C, ())
    assert model.probability(B, (A, A)) > 0.8
    assert len(model.nats(example([A, A, A, B], learned=1))) == 1
    assert len(model.nats(example([A, B, C]))) == 2, "nothing predicts the first token"
    assert model.nats(example([A, B, C], learned=0)).shape == (0,)


def test_a_model_of_nothing_is_uniform() -> None:
    assert NgramModel([], vocabulary_size=50).probability(7, (1, 2)) == pytest.approx(1 / 50)


def test_a_large_set_is_sampled_evenly() -> None:
    counts = np.full(10_000, 10)
    rows = sample(counts, np.arange(10_000), 5_000)
    assert rows == sample(counts, np.arange(10_000), 5_000)
    assert 480 <= len(rows) <= 500
    assert rows == sorted(set(rows))
    assert np.abs(np.histogram(rows, 10, (0, 10_000))[0] - 50).max() <= 2
    assert 0.4 < np.mean(np.array(rows) % 2) < 0.6, "every n-th would see one kind only where kinds alternate"
    assert sample(counts, np.arange(1, 10_000, 2), 100_000) == list(range(1, 10_000, 2))


def test_only_sampled_conversations_are_read() -> None:
    class Counted(ListedExamples):
        read = 0

        def __getitem__(self, index: int) -> Example:
            self.read += 1
            return super().__getitem__(index)

    examples = Counted([example([A, B] * 50)] * 1000)  # 99 targets each
    fit(examples, 3, most_tokens=5_000)
    assert 45 <= examples.read <= 50


def test_what_does_not_belong_ranks_first() -> None:
    rng = random.Random(0)
    rooms = ["kitchen", "garage", "cellar", "attic", "study", "hall", "pantry", "porch"]
    texts = [
        f"turn {rng.choice(['on', 'off'])} the {rng.choice(['light', 'fan', 'heater'])} in the {rng.choice(rooms)}, please: done, it is {number % 40}"
        for number in range(300)
    ]
    bad = {
        17: "schalte bitte sofort die Heizung im Wohnzimmer aus und gib Bescheid",
        150: "turn on the light in the café and the crêperie, please".encode("utf-16").decode("latin-1"),
        233: "qzx vkjw pplgh wxzt mmqr bvnz kkjq xwpt",
    }
    for row, text in bad.items():
        texts[row] = text
    examples = ListedExamples([example([*text.encode()], place=f"made:{row}") for row, text in enumerate(texts)])
    found = rank_unlikely(examples, 5)
    assert {one.row for one in found[:3]} == set(bad)
    assert {one.place for one in found[:3]} == {f"made:{row}" for row in bad}
    assert bytes(found[0].ids.tolist()) == texts[found[0].row].encode()[1:], "nothing predicts the first token"
    nats = [one.nats for one in found]
    assert nats == sorted(nats, reverse=True)
    assert nats[2] > 2 * nats[3], "far from the rest"


def test_no_conversation_is_judged_by_a_model_that_has_seen_it() -> None:
    """The same odd text in both halves is known; once, it is not."""
    plain, odd = example([A, B] * 20), example([5, 6, 7, 8] * 10)
    once = rank_unlikely(ListedExamples([plain, odd, plain, plain]), 1)[0]
    assert (once.row, once.nats > 2) == (1, True)
    twice = rank_unlikely(ListedExamples([odd, odd, plain, plain]), 1)[0]
    assert twice.nats < 1


def test_ranking_takes_few_or_empty_conversations() -> None:
    assert rank_unlikely(ListedExamples([]), 3) == []
    nothing = example([A, B, C], learned=0)
    (found,) = rank_unlikely(ListedExamples([nothing, example([A, B, C])]), 3)
    assert found.row == 1
    assert found.nats == pytest.approx(math.log(3)), "judged by a model of nothing"


def test_the_vocabulary_has_room_for_every_id() -> None:
    tokenizer: Any = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "<|special|>": 9})
    assert vocabulary_size(tokenizer) == 10


def test_the_baseline_is_made_once_for_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith import evaluate
    from tunesmith.data import ngram

    made = []
    fitted = ngram.fit
    monkeypatch.setattr(ngram, "fit", lambda *some: made.append(some) or fitted(*some))

    def dataset(*dev: Example) -> Any:
        train, test = ListedExamples([example([A, B, A, B])]), ListedExamples([])
        renderer = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "c": 2, "d": 3}))
        return SimpleNamespace(train=train, dev=ListedExamples(dev), test=test, renderer=renderer)

    first, second = dataset(example([A, B, A, B])), dataset(example([A, C]))
    wanted = fitted(first.train, 4).perplexity(first.dev)
    assert [evaluate.baseline(one) for one in (first, first)] == [{"dev/ngram_perplexity": pytest.approx(wanted)}] * 2
    assert evaluate.baseline(second)["dev/ngram_perplexity"] > wanted, "another one, although its training data are equal"
    assert len(made) == 2
