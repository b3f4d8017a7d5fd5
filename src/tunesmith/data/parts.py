"""Train, dev and test put together from prepared files: weights, duplicates, and what of train is in the others."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.config import Data, Policy, Refusal
from tunesmith.data.check import OVERLAPPING, SHOWN, Findings, Known
from tunesmith.data.examples import Example, Examples
from tunesmith.data.files import sources
from tunesmith.data.prepare import Prepared, Work, prepared
from tunesmith.data.statistics import Finding, Statistics
from tunesmith.data.templates import Renderer
from tunesmith.data.workers import Workers

PARTS = ("dev", "test", "train")
"""In the order in which they are read: train is compared with the others."""


class StoredExamples(Examples):
    """Conversations in prepared files; only lengths are held in memory."""

    def __init__(self, files: Sequence[Prepared], rows: np.ndarray):
        """rows: numbers over all files, one after the other; a row may occur several times."""
        self.files = files
        self.rows = rows
        self.computed = _column(files, "computed")[rows]
        self.target_counts = _column(files, "target_count")[rows]
        self._firsts = np.cumsum([0, *map(len, files)])

    def __getitem__(self, index: int) -> Example:
        file, row = self.find(index)
        return file.example(row)

    def find(self, index: int) -> tuple[Prepared, int]:
        """The file of a conversation, and its row there."""
        return _find(self.files, self._firsts, int(self.rows[index]))


@dataclass(frozen=True)
class Part:
    """What one of data.train, data.dev and data.test holds."""

    name: str
    examples: StoredExamples
    findings: Findings
    statistics: Statistics
    read: int
    """Conversations that were found, those left out included."""
    hashes: np.ndarray
    """Of the tokens of every conversation that can be used, uint64."""

    def problems(self, data: Data) -> list[str]:
        """What forbids a start, a line each."""
        spec = getattr(data, self.name)
        if found := self.findings.problems(self.name, self.read, data):
            return found
        if not self.read:
            return [f"data.{self.name}={Path(data.folder) / spec}: the file holds no conversation"]
        if not len(self.examples):
            long = sum(tally.count for (kind, _), tally in self.findings.tallies.items() if kind == "overlong")
            why = f"data.max_tokens={data.max_tokens}: no conversation of data.{self.name} is short enough — a larger data.max_tokens"
            return [why if long else f"data.{self.name}={spec}: none of its {self.read} conversations is left — see data.check"]
        return []

    def notes(self, data: Data) -> list[str]:
        """What was left out, cut or kept all the same, a line each."""
        return self.findings.notes(self.name, self.read, data)

    def table(self) -> list[Finding]:
        """The findings as rows, for people."""
        return [
            Finding(kind, self.name, action, tally.count, tuple(tally.firsts))
            for (kind, action), tally in sorted(self.findings.tallies.items())
        ]

    @property
    def digest(self) -> str:
        """Of the tokens and targets of all conversations, in order."""
        total = hashlib.sha256(self.examples.rows.astype(np.int64).tobytes())
        for file in self.examples.files:
            total.update(file.digest.encode())
        return total.hexdigest()


def read_parts(data: Data, renderer: Renderer) -> dict[str, Part]:
    """Prepare and put together every part that is named; raises Refusal listing what is not there or can't be read at all."""
    parts: dict[str, Part] = {}
    refusals: list[str] = []
    with Workers(data.workers) as workers:
        for name in (name for name in PARTS if getattr(data, name)):
            held_out = [part for part in parts.values() if name == "train"]
            known = Known.of([file.grams for part in held_out for file in part.examples.files])
            try:
                parts[name] = _part(name, Work(renderer, data, name, known, data.streaming), workers, held_out)
            except Refusal as refusal:
                refusals.append(str(refusal))
    if refusals:
        raise Refusal("\n".join(refusals))
    return parts


def _part(name: str, work: Work, workers: Workers, held_out: Sequence[Part]) -> Part:
    data = work.data
    files: list[Prepared] = []
    weights: list[tuple[int, float]] = []  # (rows, weight) of each source
    try:
        for source in sources(getattr(data, name), Path(data.folder)):
            found = [prepared(origin, work, workers) for origin in source.paths or (source.name,)]
            weights.append((sum(map(len, found)), source.weight))
            files += found
    except Refusal as refusal:
        # A place begins with its file; what was typed stands before it.
        raise Refusal(str(refusal) if str(refusal).startswith("data.") else f"data.{name}={refusal}") from None
    findings, statistics = Findings(), Statistics()
    for file in files:
        findings.merge(file.findings)
        statistics.merge(file.statistics)
    hashes = _column(files, "hash").astype(np.uint64)
    keep = _compared(hashes, _column(files, "overlap"), files, held_out, findings, data)
    rows, first = [], 0
    for count, weight in weights:
        rows.append(weighted(first + np.flatnonzero(keep[first : first + count]), weight))
        first += count
    examples = StoredExamples(files, np.concatenate([np.empty(0, np.int64), *rows]))
    return Part(name, examples, findings, statistics, sum(file.read for file in files), hashes)


def _compared(
    hashes: np.ndarray, overlaps: np.ndarray, files: Sequence[Prepared], held_out: Sequence[Part], findings: Findings, data: Data
) -> np.ndarray:
    """Which conversations stay, bool; duplicates and what train shares with the held-out parts are added to the findings."""
    keep = np.ones(len(hashes), bool)
    firsts = np.cumsum([0, *map(len, files)])

    def place(row: int) -> str:
        file, inside = _find(files, firsts, row)
        return file.place(inside)

    def judge(kind: str, policy: Policy, rows: np.ndarray, words: Callable[[int], str]) -> None:
        rows = rows[keep[rows]]
        for number, row in enumerate(rows[:SHOWN].tolist()):
            rest = max(0, len(rows) - SHOWN) if number == 0 else 0
            findings.add(kind, policy.name, f"{place(row)}: {words(row)}", count=1 + rest)
        if policy is not Policy.keep:
            keep[rows] = False

    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
    judge("duplicate", data.check.duplicate, again, lambda row: f"equals {place(int(first[inverse[row]]))}, token by token — take one out")
    leaked_to = np.full(len(hashes), -1)
    for number, part in reversed(list(enumerate(held_out))):  # the first one that has it is told
        leaked_to[np.isin(hashes, part.hashes)] = number
    leaked = leaked_to >= 0

    def leak(row: int) -> str:
        return f"is in data.{held_out[leaked_to[row]].name} too, which makes its numbers too good — take it out"

    judge("leak", data.check.leak, np.flatnonzero(leaked), leak)
    others = " or ".join(f"data.{part.name}" for part in held_out)
    similar = np.flatnonzero((overlaps >= OVERLAPPING) & ~leaked)
    judge("overlap", data.check.overlap, similar, lambda row: f"{overlaps[row]:.0%} of its runs of 13 tokens are in {others} — read both")
    return keep


def weighted(rows: np.ndarray, weight: float) -> np.ndarray:
    """Whole copies, and for the fraction a subset that is the same at every start, in file order."""
    whole = int(weight)
    part = round((weight - whole) * len(rows))
    chosen = sorted(random.Random(0).sample(range(len(rows)), part))
    return np.concatenate([*[rows] * whole, rows[chosen]]) if weight != 1 else rows


def _find(files: Sequence[Prepared], firsts: np.ndarray, row: int) -> tuple[Prepared, int]:
    number = int(np.searchsorted(firsts, row, "right")) - 1
    return files[number], row - int(firsts[number])


def _column(files: Sequence[Prepared], name: str) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(file.column(name) for file in files)])
