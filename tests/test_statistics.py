"""Statistics count what was rendered, add up in any order and any number of processes, and say so in a few lines."""

from __future__ import annotations

import json
import pickle
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tunesmith.data.conversations import Conversation, Turn
from tunesmith.data.statistics import ASKED, FIRSTS, Statistics


def rendered(*turns: tuple[str, int, bool], frame: int = 0) -> Any:
    """Turns as (role, tokens, learned), tokens of the frame before them."""
    lengths, learned = [frame, *(n for _, n, _ in turns)], [False, *(yes for *_, yes in turns)]
    return SimpleNamespace(
        ids=np.arange(sum(lengths), dtype=np.int32),
        targets=np.repeat(learned, lengths),
        turns=np.repeat(np.arange(-1, len(turns), dtype=np.int16), lengths),
        said=tuple(Turn(role) for role, *_ in turns),
        unstopped=None,
    )


def conversation(number: int, text: str = "") -> Conversation:
    return Conversation((Turn("user", text or f"conversation number {number}"), Turn("assistant", "")), place=f"file.jsonl:{number}")


def counted(numbers: range) -> Statistics:
    statistics = Statistics()
    for number in numbers:
        rng = random.Random(number)
        turns = [("user", rng.randrange(1, 300), False), ("assistant", rng.randrange(1, 40), True)]
        statistics.add(conversation(number), rendered(*turns, frame=2))
    return statistics


def test_what_is_counted() -> None:
    statistics = Statistics()
    statistics.add(conversation(1), rendered(("system", 5, False), ("user", 3, False), ("assistant", 4, True), frame=2))
    statistics.add(conversation(2), rendered(("user", 3, True), ("assistant", 3, True)))
    assert (statistics.conversations, statistics.turns) == (2, 4), "turns are the file's: the first system turn was put in"
    assert (statistics.tokens, statistics.targets) == (20, 9), "nothing predicts the first token of the second conversation"
    assert statistics.roles == {"frame": [2, 0], "system": [5, 0], "user": [6, 2], "assistant": [7, 7]}
    assert (statistics.shortest, statistics.longest) == (6, 14)
    assert statistics.shares[5] == 1 and statistics.shares[16] == 1, "4 of 14, 5 of 6"


def test_roles_add_up() -> None:
    statistics = counted(range(50))
    assert sum(tokens for tokens, _ in statistics.roles.values()) == statistics.tokens
    assert sum(targets for _, targets in statistics.roles.values()) == statistics.targets
    assert sum(statistics.lengths) == sum(statistics.shares) == statistics.conversations == 50


@pytest.mark.parametrize("cuts", [[0, 2000], [0, 700, 1500, 2000], [0, 1, 2, 1999, 2000]])
def test_parts_add_up_to_the_whole_in_any_order(cuts: list[int]) -> None:
    whole, parts = counted(range(2000)), [counted(range(a, b)) for a, b in pairwise(cuts)]
    for order in (parts, parts[::-1]):
        total = Statistics()
        for part in order:
            total.merge(pickle.loads(pickle.dumps(part)))
        assert sorted(total.sample) == sorted(whole.sample)
        assert {**vars(total), "sample": 0} == {**vars(whole), "sample": 0}
    assert len(whole.sample) == ASKED


def test_what_is_stored_is_read_back() -> None:
    statistics = counted(range(30))
    read = Statistics.read(json.loads(json.dumps(statistics.stored())))
    assert read == statistics
    read.merge(counted(range(30, 60)))
    assert sorted(read.sample) == sorted(counted(range(60)).sample)


def test_the_sample_is_spread_over_the_file() -> None:
    numbers = [int(text.split()[-1]) for _, text in counted(range(5000)).sample]
    assert np.abs(np.histogram(numbers, 5, (0, 5000))[0] - 100).max() < 40


def test_lengths() -> None:
    lengths = [1, 10, 10, 12, 17, 64, 100, 4096]
    statistics = Statistics()
    for number, length in enumerate(lengths):
        statistics.add(conversation(number), rendered(("user", length, False)))
    for share in (0.1, 0.5, 0.8, 0.95, 1.0):
        least = sorted(lengths)[int(np.ceil(share * len(lengths))) - 1]
        assert least <= statistics.at_most(share) <= 1.011 * least
    for most in (200, 24, 5, 1):
        bars = statistics.length_bars(most)
        assert len(bars) <= most
        assert sum(bar.count for bar in bars) == len(lengths)
        assert bars[0].first == 1 and bars[-1].last >= 4096
        assert all(a.last + 1 == b.first for a, b in pairwise(bars))
    assert sorted(FIRSTS) == FIRSTS and FIRSTS[0] == 1 and FIRSTS[-1] == 2**24


def test_lengths_beyond_every_bin() -> None:
    statistics = Statistics(conversations=1, longest=2**25, shortest=2**25)
    statistics.lengths[-1] = 1
    assert statistics.at_most(0.5) == statistics.length_bars()[-1].last == 2**25


def test_languages() -> None:
    texts = {
        "en": "Could you please turn on the light in the kitchen before I come home tonight?",
        "de": "Könntest du bitte das Licht in der Küche einschalten, bevor ich heute Abend nach Hause komme?",
        "zh": "请在我今晚回家之前打开厨房的灯，谢谢你的帮助。",
        "too short to tell": "ok",
    }
    statistics = Statistics()
    for number, text in enumerate([*texts.values(), texts["de"]]):
        statistics.add(conversation(number, text), rendered(("user", 9, False)))
    assert statistics.languages() == {"de": 2, "en": 1, "zh": 1, "too short to tell": 1}
    assert next(iter(statistics.languages())) == "de", "the most frequent first"


def test_a_broken_text_has_some_language() -> None:
    statistics = Statistics()
    statistics.add(conversation(0, "\ud800 half a character in a text that is long enough"), rendered(("user", 9, False)))
    assert sum(statistics.languages().values()) == 1


def test_lines_are_aligned() -> None:
    statistics = Statistics()
    statistics.add(conversation(1, "ok"), rendered(("user", 1500, False), ("assistant", 500, True), frame=1))
    assert statistics.lines() == [
        "conversations  1 with 2 turns",
        "tokens         2,001, of which 500 targets (25 %)",
        "length         2,001 to 2,001 tokens; half have at most 2,001, 95 % at most 2,001",
        "  frame            1 tokens, none of them targets",
        "  user         1,500 tokens, none of them targets",
        "  assistant      500 tokens, 100 % of them targets",
        "languages      too short to tell 100 % (guessed for 1)",
    ]
    assert Statistics().lines() == ["no conversations"]
