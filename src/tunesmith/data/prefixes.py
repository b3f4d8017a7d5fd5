"""Every beginning of the training conversations once: under which number the cache of frozen layers keeps a token's state.

While all that lies below a layer is frozen, what enters it at a token depends on that token and those before it alone. So a state
belongs to a beginning (the tokens of a conversation up to there), whatever micro-batch, rank or epoch it is computed in, and
conversations that begin alike share the states of what they share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.data.examples import Examples
from tunesmith.data.layout import Kept, Node, common


@dataclass(frozen=True)
class _Piece:
    """From token `start` of a conversation on, beginnings have the numbers `row`, `row + 1`, ..."""

    start: int
    row: int


class Beginnings:
    """The numbers of all beginnings, the same in every process that has these conversations, and which of them have a state."""

    def __init__(self, examples: Examples):
        """Takes 8 bytes a token while it works, and a piece or a few for each conversation afterwards."""
        texts = [example.ids[: example.computed].astype(">i4") for example in examples]
        self._pieces: list[tuple[_Piece, ...]] = [()] * len(texts)
        self._computed = [len(text) for text in texts]
        named = hashlib.sha256()
        count = 0
        open_pieces: list[_Piece] = []
        before = np.empty(0, ">i4")
        # In sorted order, what a conversation shares with any earlier one it shares with the one before it.
        for number in sorted(range(len(texts)), key=lambda number: texts[number].tobytes()):
            text = texts[number]
            shared = common([before, text], 0)
            while open_pieces and open_pieces[-1].start >= shared:
                open_pieces.pop()
            if shared < len(text):
                open_pieces.append(_Piece(shared, count))
            self._pieces[number] = tuple(open_pieces)
            count += len(text) - shared
            named.update(shared.to_bytes(8, "little") + text[shared:].tobytes())
            before = text
        self.digest = named.hexdigest()
        """Of which tokens have which number."""
        self.written = np.zeros(count, bool)
        """Which beginnings have a state that may be read, the same on all ranks."""

    def __len__(self) -> int:
        return len(self.written)

    def rows(self, conversation: int) -> np.ndarray:
        """The number of each beginning of a conversation, int64 [computed tokens]."""
        pieces = self._pieces[conversation]
        stops = [*(piece.start for piece in pieces[1:]), self._computed[conversation]]
        return np.concatenate([piece.row + np.arange(stop - piece.start) for piece, stop in zip(pieces, stops, strict=True)])

    def are_written(self, conversations: Sequence[int]) -> bool:
        """Whether no state of these conversations is missing."""
        return all(self.written[self.rows(number)].all() for number in conversations)

    def note(self, conversations: Sequence[int]) -> None:
        """These have been written, by whichever rank."""
        for number in conversations:
            self.written[self.rows(number)] = True

    def kept(self, conversations: Sequence[int], nodes: Sequence[Node], before: Sequence[int]) -> Kept:
        """Where the states of a micro-batch are that lies like this; before: the step's conversations that others write."""
        numbers = [self.rows(number) for number in conversations]
        rows = np.full(sum(node.filled for node in nodes), -1)
        start = 0
        for node in nodes:
            if node.members:  # all of them have the same beginnings here
                rows[start : start + node.real] = numbers[node.members[0]][node.start : node.stop]
            start += node.filled
        if self.are_written(conversations):
            return Kept(rows, np.empty(0, np.int64), known=True)
        found, first = np.unique(rows, return_index=True)
        missing = (found >= 0) & ~self.written[found]
        if before:  # each state has one writer, so that none is ever written by two at once
            missing &= ~np.isin(found, np.concatenate([self.rows(number) for number in before]))
        return Kept(rows, np.sort(first[missing]), known=False)
