"""What a set of conversations is like, in numbers: counted in one pass, at constant memory, in several processes if need be."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import blake2b
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tunesmith.data.conversations import Conversation
    from tunesmith.data.templates import Rendered

FRAME = "frame"
"""The name of tokens that a template puts around the turns."""
FINE = 64
"""Bins for each doubling of the length: a length is known to about one percent."""
FIRSTS = [math.ceil(2 ** (step / FINE)) for step in range(24 * FINE + 1)]
"""The first length of each bin, the same for every set, so that counts can be added; a bin that ends before it begins is empty."""
SHARES = 20
"""Bins of the share of targets, of equal width."""
ASKED = 500
"""Conversations whose language is looked for, at most: each share is then right to about two percent points."""
TEXT = 300
"""Characters of each that are looked at."""
TOO_SHORT = 20
"""Bytes below which a text could be in any language; bytes, as a Chinese character says as much as half a word."""
SURE = 0.3
"""Least probability of a guess that is told: of smart-home sentences of 20 to 40 bytes, 1 to 2 % are then guessed wrong in English,
German and French, 5 % in Chinese, 11 % in Dutch; of longer ones hardly any."""


@dataclass(frozen=True)
class Finding:
    """Mistakes of one kind in one part, and what was done with them."""

    kind: str
    part: str
    policy: str
    count: int
    firsts: tuple[str, ...]
    """The first of them, each with its place."""


@dataclass(frozen=True)
class Bar:
    """A bin of a histogram, for people."""

    first: int
    last: int
    """Included."""
    count: int


@dataclass
class Statistics:
    """Counts over conversations; those of several sets can be merged."""

    conversations: int = 0
    turns: int = 0
    """As in the file, after calls and their answers were taken apart."""
    tokens: int = 0
    """All that was rendered."""
    targets: int = 0
    """Those that are learned; never the first of a conversation."""
    roles: dict[str, list[int]] = field(default_factory=dict)
    """[tokens, targets among them] by role, `frame` for what belongs to no turn; their sums are those above."""
    shortest: int = 0
    """Tokens of the shortest conversation."""
    longest: int = 0
    """Tokens of the longest."""
    lengths: list[int] = field(default_factory=lambda: [0] * len(FIRSTS))
    """Conversations by their tokens, in the bins of FIRSTS."""
    shares: list[int] = field(default_factory=lambda: [0] * SHARES)
    """Conversations by the share of targets in their tokens."""
    sample: list[tuple[int, str]] = field(default_factory=list)
    """(hash, text) of the conversations with the smallest hashes, negated, as a heap: the same ones in whatever order they came."""

    def add(self, conversation: Conversation, rendered: Rendered) -> None:
        """Count one conversation."""
        tokens, learned = len(rendered.ids), rendered.targets[1:]  # nothing predicts the first token
        targets = int(np.count_nonzero(learned))
        by_turn = np.bincount(rendered.turns + 1, minlength=len(rendered.said) + 1).tolist()
        learned_by_turn = np.bincount(rendered.turns[1:][learned] + 1, minlength=len(rendered.said) + 1).tolist()
        for role, count, aims in zip([FRAME, *(turn.role for turn in rendered.said)], by_turn, learned_by_turn, strict=True):
            if count:
                self._count(role, count, aims)
        self.shortest = min(self.shortest, tokens) if self.conversations else tokens
        self.longest = max(self.longest, tokens)
        self.conversations += 1
        self.turns += len(conversation.turns)
        self.tokens += tokens
        self.targets += targets
        self.lengths[_bin(tokens)] += 1
        self.shares[min(SHARES - 1, SHARES * targets // max(1, tokens))] += 1
        digest = blake2b(conversation.place.encode("utf-8", "replace") + rendered.ids.tobytes(), digest_size=7).digest()
        hashed = -int.from_bytes(digest, "big")
        if len(self.sample) < ASKED:
            heapq.heappush(self.sample, (hashed, _text(conversation)))
        elif hashed > self.sample[0][0]:
            heapq.heapreplace(self.sample, (hashed, _text(conversation)))

    def merge(self, other: Statistics) -> None:
        """Count what another one has counted."""
        known = [one.shortest for one in (self, other) if one.conversations]
        self.shortest, self.longest = min(known, default=0), max(self.longest, other.longest)
        self.conversations += other.conversations
        self.turns += other.turns
        self.tokens += other.tokens
        self.targets += other.targets
        for role, (tokens, targets) in other.roles.items():
            self._count(role, tokens, targets)
        self.lengths = [a + b for a, b in zip(self.lengths, other.lengths, strict=True)]
        self.shares = [a + b for a, b in zip(self.shares, other.shares, strict=True)]
        self.sample = heapq.nlargest(ASKED, [*self.sample, *other.sample])
        heapq.heapify(self.sample)

    def stored(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Statistics:
        """From what `stored` gave."""
        return cls(**{**stored, "sample": [(hashed, text) for hashed, text in stored["sample"]]})

    def at_most(self, share: float) -> int:
        """A length in tokens that at least this share of the conversations keeps to; about one percent above the least such one."""
        wanted = share * self.conversations
        reached = next((bin for bin, count in enumerate(accumulate(self.lengths)) if count >= wanted), 0)
        return self._last(reached)

    def length_bars(self, most: int = 24) -> list[Bar]:
        """The lengths in at most so many bins of equal ratio, from the shortest to the longest."""
        if not self.conversations:
            return []
        first, last = _bin(self.shortest), _bin(self.longest)
        step = -(-(last + 1 - first) // most)
        starts = range(first, last + 1, step)
        bars = [
            Bar(max(self.shortest, FIRSTS[start]), self._last(start + step - 1), sum(self.lengths[start : start + step]))
            for start in starts
        ]
        return [bar for bar in bars if bar.first <= bar.last]

    def _last(self, bin: int) -> int:
        """The last length of a bin, or the longest that there is."""
        return min(self.longest, FIRSTS[bin + 1] - 1) if bin + 1 < len(FIRSTS) else self.longest

    def languages(self) -> dict[str, int]:
        """Conversations of the sample by language (ISO 639 code), the most frequent first."""
        return dict(Counter(_language(text) for _, text in self.sample).most_common())

    def lines(self) -> list[str]:
        """The same for a terminal, label and value aligned."""
        if not self.conversations:
            return ["no conversations"]
        most = f"half have at most {self.at_most(0.5):,}, 95 % at most {self.at_most(0.95):,}"
        told = [
            ("conversations", f"{self.conversations:,} with {self.turns:,} turns"),
            ("tokens", f"{self.tokens:,}, of which {self.targets:,} targets ({percent(self.targets, self.tokens)})"),
            ("length", f"{self.shortest:,} to {self.longest:,} tokens; {most}"),
        ]
        width = len(f"{self.tokens:,}")
        for role, (tokens, targets) in self.roles.items():
            of_them = f"{percent(targets, tokens)} of them targets" if targets else "none of them targets"
            told.append((f"  {role}", f"{tokens:{width},} tokens, {of_them}"))
        found = self.languages()
        spoken = ", ".join(f"{name} {percent(count, len(self.sample))}" for name, count in list(found.items())[:6])
        rest = f" and {len(found) - 6} more" if len(found) > 6 else ""
        told.append(("languages", f"{spoken}{rest} (guessed for {len(self.sample):,})"))
        column = max(len(label) for label, _ in told) + 2
        return [f"{label:{column}}{value}" for label, value in told]

    def _count(self, role: str, tokens: int, targets: int) -> None:
        counts = self.roles.setdefault(role, [0, 0])
        counts[0] += tokens
        counts[1] += targets


def _bin(tokens: int) -> int:
    return bisect_right(FIRSTS, max(1, tokens)) - 1


def _text(conversation: Conversation) -> str:
    """The beginning of what user and assistant say."""
    said = (turn.content[:TEXT] for turn in conversation.turns if turn.role in ("user", "assistant", "text"))
    return " ".join(part for part in said if part)[:TEXT]


def _language(text: str) -> str:
    if len(text.encode("utf-8", "replace")) < TOO_SHORT:
        return "too short to tell"
    code: str = _identifier().classify(text)[0]
    return {"zxx": "no language", "und": "not sure"}.get(code, code)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # half a second: only when a page or a line wants it

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=SURE)


def percent(part: int, whole: int) -> str:
    """A share for people: 0 % and 100 % only where that is so."""
    share = 100 * part / max(1, whole)
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.3g} %"
