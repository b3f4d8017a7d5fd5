"""Where in a template's text lies what was said, and what always lies around it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from tunesmith.data.tokens import Content, Encoder, Part

PLACES = 0x10F000
"""First of the private-use characters that stand for the texts of a shape, one for each message."""
PLACED = re.compile("([\U0010f000-\U0010ffff])")


def place(number: int) -> str:
    """What stands for the text of a message."""
    return chr(PLACES + number)


class Cut(NamedTuple):
    """A stretch of a template's text that is all of one turn, and all learned or all not."""

    text: str
    after: str
    """What stands before it, from the last special token on; empty where that does not matter."""
    turn: int
    learned: bool


@dataclass
class Spans:
    """Where in a template's text lies what was said."""

    text: str
    marks: list[tuple[int, int]]
    """(begin, end) of all special tokens."""
    starts: list[int | None]
    """Of each message, and the end of the last; None: the template does not tell."""
    learned: list[tuple[int, int]] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    """The special tokens that end what is learned."""
    unstopped: int | None = None

    def stop(self, begin: int, end: int) -> tuple[int, int] | None:
        """The token that ends a message: its last special one, if at most white space follows, or the one that opens the next."""
        place = bisect_right(self.marks, end, key=lambda mark: mark[1]) - 1
        if place >= 0 and self.marks[place][0] >= begin and not self.text[self.marks[place][1] : end].strip():
            return self.marks[place]
        return self.marks[place + 1] if place + 1 < len(self.marks) and self.marks[place + 1][0] == end else None

    def cuts(self, firsts: Sequence[int]) -> list[Cut]:
        """The whole text in stretches; firsts: the first turn of each message, and the number of turns."""
        text, begins, ends = self.text, {begin for begin, _ in self.marks}, [end for _, end in self.marks]
        starts = [(start, first) for start, first in zip(self.starts, firsts, strict=True) if start is not None]
        learned = dict(self.learned)
        # Beside a special token a cut changes no token; elsewhere, whose turn a token is counted to is not worth one.
        harmless = {start for start, _ in starts} & (begins | set(ends))
        places = sorted({0, len(text), *harmless, *learned, *learned.values()})
        cuts: list[Cut] = []
        learned_until = 0
        for begin, end in pairwise(places):
            learned_until = learned.get(begin, learned_until)
            started = bisect_right(starts, begin, key=lambda known: known[0])
            before = bisect_right(ends, begin)
            after = text[self.marks[before - 1][0] : begin] if before and begin not in begins else ""
            cuts.append(Cut(text[begin:end], after, starts[started - 1][1] if started else -1, begin < learned_until))
        return cuts


class Shape:
    """How a template writes a sequence of roles, whatever is said: cut around a character for each text."""

    def __init__(self, spans: Spans, cuts: list[Cut], encoder: Encoder):
        self.unstopped = spans.unstopped
        self._marks = len(spans.marks)
        self._text = _pieces(spans.text)
        self._cuts = [(_pieces(cut.text), _pieces(cut.after), cut.turn, cut.learned) for cut in cuts]
        self._parts: list[Part | tuple[Any, list[str | int], list[str | int], int, bool]] = []
        for cut in cuts:
            for content in encoder.apart(cut.text, cut.after):
                self._add(content, cut, encoder)

    def _add(self, content: Content, cut: Cut, encoder: Encoder) -> None:
        """Keep the tokens of what is always the same, and the pieces of the rest."""
        text, after = ("", "") if isinstance(content, np.ndarray) else (content, "") if isinstance(content, str) else content
        if PLACED.search(text + after):
            self._parts.append((type(content), _pieces(text), _pieces(after), cut.turn, cut.learned))
            return
        ids, part = encoder.tokens([content])[0], self._parts[-1] if self._parts else None
        if isinstance(part, Part) and part[1:] == (cut.turn, cut.learned):
            ids = np.concatenate([part.content, ids])
            self._parts.pop()
        self._parts.append(Part(ids, cut.turn, cut.learned))

    def filled(self, texts: Sequence[str], special: re.Pattern[str]) -> str | None:
        """The whole text with what was said; None if that makes another number of special tokens."""
        text = _filled(self._text, texts)
        return text if len(special.findall(text)) == self._marks else None

    def cuts(self, texts: Sequence[str]) -> list[Cut]:
        """Its stretches with what was said."""
        return [Cut(_filled(text, texts), _filled(after, texts), turn, learned) for text, after, turn, learned in self._cuts]

    def parts(self, texts: Sequence[str]) -> list[Part]:
        """The same for the encoder, where no text is a special token's."""
        parts = []
        for part in self._parts:
            if not isinstance(part, Part):
                kind, pieces, before, turn, learned = part
                text = _filled(pieces, texts)
                part = Part(text if kind is str else kind(text, _filled(before, texts)), turn, learned)
            parts.append(part)
        return parts


def _pieces(text: str) -> list[str | int]:
    """Text and, at every second place, the number of a message's text."""
    return [ord(piece) - PLACES if number % 2 else piece for number, piece in enumerate(PLACED.split(text))]


def _filled(pieces: list[str | int], texts: Sequence[str]) -> str:
    return "".join([texts[piece] if isinstance(piece, int) else piece for piece in pieces])
