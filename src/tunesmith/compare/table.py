"""The comparison itself: a row a run, the axes it is judged by, the Pareto-best, and which settings the results go along with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from math import factorial
from statistics import fmean
from typing import Any

from tunesmith.compare.noise import Setting, evidence_line, is_left_out, judge_settings, settings_of, signature
from tunesmith.compare.runs import Run
from tunesmith.config import Refusal
from tunesmith.metrics.totals import is_number

EXHAUSTIVE = 7
"""Up to so many runs all orders are tried for a p-value, beyond that DRAWS random ones."""
DRAWS = 2000


@dataclass(frozen=True)
class Measure:
    """A result: what it is called, its unit, and whether less of it is better."""

    key: str
    label: str
    unit: str
    lower_is_better: bool


EFFORT = (
    Measure("run/tokens_per_s", "tokens/s", "", False),
    Measure("run/mfu", "MFU", "", False),
    Measure("run/planned_peak_gib", "memory, predicted", "GiB", True),
    Measure("run/peak_gib", "memory, measured", "GiB", True),
    Measure("run/hours", "training", "h", True),
    Measure("run/tokens", "tokens trained on", "", True),
    Measure("run/energy_kj", "energy, rank 0's card", "kJ", True),
    Measure("run/cost", "cost", "", True),
)
_KNOWN = {one.key: one for one in EFFORT}


def measure(key: str) -> Measure:
    """A result by its metric name: losses are better low, shares and scores high."""
    return _KNOWN.get(key) or Measure(
        key, {"dev/loss": "held-out loss"}.get(key, key), "nats" if key.endswith("loss") else "", key.endswith("loss")
    )


@dataclass(frozen=True)
class Influence:
    """How far the ranks of a measure go along with one setting's values, over complete runs."""

    key: str
    share: float
    """Of the variance of ranks: the squared rank correlation for numbers, the squared correlation ratio for words."""
    p: float
    """Share of all orders of the runs in which it would be as large by chance."""
    runs: int
    values: int
    with_keys: list[str]
    """Settings that changed in the very same runs: which of them it was cannot be told."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    runs: list[Run]
    quality: str
    """The measure that runs are judged by."""
    against: str
    """The measure of what a run takes, which quality is held against."""
    notes: list[str]
    """What must be known to read the numbers."""

    @cached_property
    def keys(self) -> list[str]:
        """Settings that are not the same in all runs, but for what only names a run and says where it is kept."""
        every = dict.fromkeys(key for run in self.runs for key in run.config)
        return [key for key in every if key not in ("name", "outputs") and len({repr(run.config.get(key, "")) for run in self.runs}) > 1]

    @cached_property
    def measures(self) -> list[Measure]:
        """Results that any run has: quality first, then what it took."""
        every = dict.fromkeys(key for run in self.runs for key in run.results)
        return [measure(key) for key in every if key.startswith(("dev/", "test/"))] + [one for one in EFFORT if one.key in every]

    @cached_property
    def groups(self) -> list[list[int]]:
        """Places of the runs that differ in the seed alone, complete ones only."""
        complete = [place for place, run in enumerate(self.runs) if run.is_complete]
        return [[complete[place] for place in group] for group in settings_of([self.runs[place] for place in complete])]

    @cached_property
    def colours(self) -> list[int]:
        """A number for each run, the same for runs that differ in the seed alone, complete or not."""
        numbers: dict[tuple[object, ...], int] = {}
        return [numbers.setdefault(signature(run), len(numbers)) for run in self.runs]

    def found(self, key: str) -> list[float | None]:
        """A measure by run; only complete runs are judged."""
        return [run.results.get(key) if run.is_complete else None for run in self.runs]

    @cached_property
    def best(self) -> list[int]:
        """Places of the Pareto-best: no other complete run is as good in both axes and better in one."""
        return pareto(self.found(self.quality), self.found(self.against), measure(self.quality), measure(self.against))

    def verdicts(self, key: str) -> list[Setting]:
        """The settings by a measure, best first, each held against the best."""
        intervals = [run.intervals.get(key) for run in self.runs]
        return judge_settings(self.groups, self.found(key), intervals, measure(key).lower_is_better)

    def evidence(self, key: str) -> str:
        return evidence_line(self.groups, self.found(key))

    def influences(self, key: str) -> list[Influence]:
        """The settings that differ, those that a measure goes along with most first; none with fewer than three complete runs."""
        found = self.found(key)
        places = [place for place, value in enumerate(found) if value is not None]
        if len(places) < 3:
            return []
        results = ranks([value for value in found if value is not None])
        columns = {key: [self.runs[place].config.get(key) for place in places] for key in self.keys}
        columns = {
            key: column for key, column in columns.items() if not key.startswith("tracker.") and len({repr(value) for value in column}) > 1
        }
        told = [_influence(key, column, results, columns) for key, column in columns.items()]
        return sorted(told, key=lambda one: (-one.share, one.key))

    def table(self) -> list[dict[str, Any]]:
        """A row a run, for programs: settings that differ, results by metric name, the bounds of intervals, and what was found."""
        rows = []
        for place, run in enumerate(self.runs):
            row: dict[str, Any] = {"run": run.name, "path": str(run.path), "state": run.state, "setting": self.colours[place]}
            row |= {key: run.config.get(key) for key in self.keys}
            for one in self.measures:
                row[one.key] = run.results.get(one.key)
                if any(one.key in other.intervals for other in self.runs):
                    low, high = run.intervals.get(one.key, (None, None))
                    row |= {f"{one.key} low": low, f"{one.key} high": high}
            rows.append(row | {"pareto": place in self.best, "quality": self.quality, "against": self.against})
        return rows

    def said(self, place: int) -> str:
        """What sets a run's setting apart, in words as one types them, the seed left out."""
        run = self.runs[place]
        parts = [f"{key.removeprefix('method.')}={text(run.config.get(key))}" for key in self.keys if key != "train.seed"]
        return " ".join(parts) or run.name


def compare(runs: Sequence[Run], quality: str = "", against: str = "") -> Comparison:
    """Put runs side by side; raises Refusal where there are not two, or where no run has the measure that is asked for.

    quality and against: the axes, by metric name. Empty: the held-out loss, else the first measure of quality that all complete runs
    have; and cost if all have a price, else hours of training.
    """
    if len(runs) < 2:
        raise Refusal(f"{len(runs)} run: nothing to compare it with — name two or more, or a folder of them (outputs/NAME)")
    judged = [run for run in runs if run.is_complete] or list(runs)
    every = dict.fromkeys(key for run in runs for key in run.results)
    for option, key in (("--quality", quality), ("--against", against)):
        if key and key not in every:
            raise Refusal(f"{option} {key}: no run has it — one of {', '.join(every) or 'none: these runs have no results yet'}")
    good = [key for key in every if key.startswith(("dev/", "test/"))]
    shared = [key for key in good if all(key in run.results for run in judged)] or good
    quality = quality or ("dev/loss" if "dev/loss" in shared else next(iter(shared), "dev/loss"))
    priced = all("run/cost" in run.results for run in judged)
    against = against or ("run/cost" if priced else "run/hours")
    return Comparison(list(runs), quality, against, _notes(runs, quality))


def _notes(runs: Sequence[Run], quality: str) -> list[str]:
    """What must be known to read the numbers."""
    notes = []
    if unfinished := [run for run in runs if not run.is_complete]:
        told = ", ".join(f"{run.name} ({run.state})" for run in unfinished[:4]) + (", ..." if len(unfinished) > 4 else "")
        notes.append(f"{len(unfinished)} of {len(runs)} runs are not complete and are shown, but not judged: {told}")
    complete = [run for run in runs if run.is_complete]
    if len({run.status.get("data") for run in complete}) > 1:
        notes.append(
            "the runs have different data: losses and scores compare only if the held-out files are the same"
        )
    if quality.endswith("loss") and len({str(run.config.get("model.path")) for run in complete}) > 1:
        notes.append("the runs have different models: a loss is per token, so it compares only between models of one tokenizer")
    if len({str(run.config.get("data.template")) for run in complete}) > 1:
        notes.append("the runs have different templates: what counts as a target token differs, and losses with it")
    versions = {name for run in complete for name in _of(run, "versions")}
    differing = sorted(name for name in versions if len({_of(run, "versions").get(name) for run in complete}) > 1)
    if differing:
        notes.append(f"versions differ: {', '.join(differing)} (tunesmith diff has them)")
    if len({(run.plan.get("card"), run.environment.get("node"), run.ranks) for run in complete}) > 1:
        notes.append("not all runs had the same machine: speeds, times and memory are of the machine too")
    if any(run.price_per_h for run in runs) and not all(run.price_per_h for run in complete):
        notes.append("some runs have no hardware.price_per_h: no cost for them")
    if assumed := sorted({key for run in runs for key in run.assumed if not is_left_out(key)}):
        notes.append(
            f"{len(assumed)} settings are unknown to the version of some runs and count as today's default: {', '.join(assumed[:3])}, ..."
        )
    return notes


def _of(run: Run, key: str) -> Mapping[str, Any]:
    found = run.environment.get(key)
    return found if isinstance(found, dict) else {}


def pareto(quality: Sequence[float | None], effort: Sequence[float | None], good: Measure, dear: Measure) -> list[int]:
    """Places of the points that no other point is better than in one axis and as good as in the other."""
    signs = [1 if one.lower_is_better else -1 for one in (good, dear)]
    points = {
        place: (signs[0] * first, signs[1] * second)
        for place, (first, second) in enumerate(zip(quality, effort, strict=True))
        if first is not None and second is not None
    }
    return [
        place for place, (x, y) in points.items() if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in points.values())
    ]  # fmt: skip


def ranks(found: Sequence[float]) -> list[float]:
    """Ranks from 1, the mean rank for equals."""
    order = sorted(found)
    return [order.index(value) + (order.count(value) + 1) / 2 for value in found]


def text(value: Any) -> str:
    """A setting as one types it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "–"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _influence(key: str, column: Sequence[Any], results: Sequence[float], columns: Mapping[str, Sequence[Any]]) -> Influence:
    numeric = all(is_number(value) for value in column)
    levels: Sequence[Any] = ranks(column) if numeric else [repr(value) for value in column]
    share = _explained(levels, results, numeric)
    count = len(results)
    if count <= EXHAUSTIVE:
        orders, tried = permutations(results), factorial(count)
        as_large = sum(_explained(levels, order, numeric) >= share - 1e-9 for order in orders)
    else:
        draws, shuffled, tried, as_large = random.Random(0), list(results), DRAWS + 1, 1  # the order that was found is one of them
        for _ in range(DRAWS):
            draws.shuffle(shuffled)
            as_large += _explained(levels, shuffled, numeric) >= share - 1e-9
    pattern = partition(column)
    others = [other for other, values in columns.items() if other != key and partition(values) == pattern]
    return Influence(key, share, as_large / tried, count, len(set(pattern)), others)


def _explained(levels: Sequence[Any], results: Sequence[float], numeric: bool) -> float:
    """Share of the results' variance: rho² of ranks, or between the groups of equal words (eta²); 0 where nothing varies."""
    mean = fmean(results)
    total = sum((value - mean) ** 2 for value in results)
    if numeric:
        middle = fmean(levels)
        spread = sum((level - middle) ** 2 for level in levels)
        along = sum((level - middle) * (value - mean) for level, value in zip(levels, results, strict=True))
        return along**2 / (spread * total) if spread * total else 0.0
    groups: dict[Any, list[float]] = {}
    for level, value in zip(levels, results, strict=True):
        groups.setdefault(level, []).append(value)
    return sum(len(group) * (fmean(group) - mean) ** 2 for group in groups.values()) / total if total else 0.0


def partition(column: Sequence[Any]) -> tuple[int, ...]:
    """Which runs have equal values, whatever these are."""
    seen: dict[str, int] = {}
    return tuple(seen.setdefault(repr(value), len(seen)) for value in column)
