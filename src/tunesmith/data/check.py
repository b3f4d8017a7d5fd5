"""What was found wrong with conversations, by kind and by what was done with it; and which of them are known already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tunesmith.config import Data

SHOWN = 20
"""Mistakes of a part that are told in full."""
GRAM = 13
"""Tokens of a run that counts as overlap: the length that GPT-3's authors searched for (arXiv 2005.14165, appendix C)."""
OVERLAPPING = 0.5
"""Share of its runs from which on a conversation counts as overlapping."""


@dataclass
class Tally:
    """Mistakes of one kind that met the same fate."""

    count: int = 0
    firsts: list[str] = field(default_factory=list)
    """The first ones, in full."""
    turns: int = 0
    """Turns that were cut off."""
    longest: int = 0
    """Tokens of the longest conversation among those that are too long."""
    longest_place: str = ""


class Findings:
    """Counts of what was found, with the first places: mergeable, so that processes can count apart."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str], Tally] = {}

    def add(self, kind: str, action: str, text: str, *, turns: int = 0, tokens: int = 0, place: str = "", count: int = 1) -> None:
        """Count mistakes; action: fail, skip, keep or cut."""
        tally = self.tallies.setdefault((kind, action), Tally())
        self._put(tally, Tally(count, [text], turns, tokens, place))

    def merge(self, other: Findings) -> None:
        """Count what another one has counted, as if it came after."""
        for key, tally in other.tallies.items():
            self._put(self.tallies.setdefault(key, Tally()), tally)

    @staticmethod
    def _put(tally: Tally, more: Tally) -> None:
        tally.count += more.count
        tally.firsts += more.firsts[: SHOWN - len(tally.firsts)]
        tally.turns += more.turns
        if more.longest > tally.longest:
            tally.longest, tally.longest_place = more.longest, more.longest_place

    def stored(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [{"kind": kind, "action": action, **asdict(tally)} for (kind, action), tally in self.tallies.items()]

    @classmethod
    def read(cls, stored: Iterable[dict[str, Any]]) -> Findings:
        """From what `stored` gave."""
        findings = cls()
        for row in stored:
            rest = {key: value for key, value in row.items() if key not in ("kind", "action")}
            findings.tallies[row["kind"], row["action"]] = Tally(**rest)
        return findings

    def problems(self, part: str, total: int, data: Data) -> list[str]:
        """What forbids a start: the first mistakes in full, how many more there are, and how to go on without them."""
        lines: list[str] = []
        failed = {kind: tally for (kind, action), tally in self.tallies.items() if action == "fail"}
        if long := failed.pop("overlong", None):
            lines.append(
                f"data.max_tokens={data.max_tokens}: {long.count} of {total} conversations in data.{part} are longer, the longest has "
                f"{long.longest} tokens ({long.longest_place}) — data.max_tokens={long.longest} takes all of them, "
                "data.overlong=cut or drop loses some"
            )
        if empty := failed.pop("no_target", None):
            lines.append(
                f"data.{part}: {empty.count} of {total} conversations have no target token (first: {empty.firsts[0]}) — "
                "each needs an assistant or tool turn, or a turn with `loss: true`; data.check.no_target=skip leaves them out"
            )
        shown = [text for tally in failed.values() for text in tally.firsts][:SHOWN]
        count = sum(tally.count for tally in failed.values())
        if count > len(shown):
            shown.append(f"and {count - len(shown)} more")
        if count:
            kinds = ", ".join(f"{tally.count} {kind}" for kind, tally in failed.items())
            shown.append(f"data.{part}: {kinds} — data.check.KIND=skip leaves such conversations out and counts them")
        return [*lines, *shown]

    def notes(self, part: str, total: int, data: Data) -> list[str]:
        """What was left out, cut or kept all the same: a line for each kind."""
        return list(self._notes(part, total, data))

    def _notes(self, part: str, total: int, data: Data) -> Iterator[str]:
        for (kind, action), tally in self.tallies.items():
            of = f"data.{part}, of {total} conversations {tally.count}"
            if kind == "overlong" and action == "cut":
                yield f"data.overlong=cut: {of} lost {tally.turns} turns at their front (data.max_tokens={data.max_tokens})"
            elif kind == "overlong" and action == "skip":
                yield f"data.overlong={data.overlong.name}: {of} are left out, longer than data.max_tokens={data.max_tokens}"
            elif action in ("skip", "keep"):
                done = "are left out" if action == "skip" else "are kept as they are"
                yield f"data.check.{kind}={action}: {of} {done} (first: {tally.firsts[0]})"


def grams(ids: np.ndarray, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all stretches of 13 tokens that lie in one run, uint64, and where each begins.

    runs: a number for each token that is the same within a run (one turn of one conversation); negative: not counted.
    """
    count = len(ids) - GRAM + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    starts = np.flatnonzero((runs[:count] == runs[GRAM - 1 :]) & (runs[:count] >= 0))
    hashed = np.zeros(len(starts), np.uint64)
    tokens = ids.astype(np.uint64)
    for place in range(GRAM):  # a polynomial over the tokens, modulo 2^64
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + tokens[starts + place] + np.uint64(1)
    return hashed ^ (hashed >> np.uint64(29)), starts


@dataclass(frozen=True)
class Known:
    """The stretches of 13 tokens of the held-out parts."""

    hashes: np.ndarray
    """Sorted, each once, uint64."""

    @classmethod
    def of(cls, several: Sequence[np.ndarray]) -> Known:
        """All of several sets."""
        return cls(np.unique(np.concatenate([np.empty(0, np.uint64), *several])))


    def found(self, hashed: np.ndarray) -> np.ndarray:
        """Which of these are held out, bool."""
        if not len(self.hashes):
            return np.zeros(len(hashed), bool)
        places = np.minimum(np.searchsorted(self.hashes, hashed), len(self.hashes) - 1)
        is_known: np.ndarray = self.hashes[places] == hashed
        return is_known
