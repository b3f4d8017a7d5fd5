"""A run in one line: what its metrics.jsonl comes to. The report, `tunesmith compare` and W&B's summary show these numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, TypeGuard

Row = Mapping[str, Any]

WARM_UP = 2
"""First steps left out of speeds and times: they pay for allocation, compilation and cold files."""


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def values(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if is_number(row.get(key))]


def steps_each(rows: Sequence[Row]) -> list[int]:
    """How many steps each line stands for: those since the line before (train.log_every); gaps between restarts do not count."""
    return [step - before for before, step in pairwise([0, *(row["step"] for row in rows)])]


def progress(rows: Sequence[Row], ranks: int = 1, price_per_h: float = 0.0) -> Iterator[dict[str, float]]:
    """For each line what had been spent by then: steps, computed tokens, hours of training, and their price where one is given."""
    tokens = seconds = 0.0
    for row, count in zip(rows, steps_each(rows), strict=True):
        tokens += count * (row.get("data/computed_tokens") or 0)
        seconds += count * (row.get("time/step_s") or 0.0)
        spent = {"step": row["step"], "run/tokens": tokens, "run/hours": seconds / 3600}
        yield spent | ({"run/cost": seconds / 3600 * ranks * price_per_h} if price_per_h else {})


def totals(rows: Sequence[Row], ranks: int = 1, price_per_h: float = 0.0) -> dict[str, float]:
    """The run's numbers by their names (docs/metrics.md); what is not known is absent. Speeds are medians without the warm-up."""
    if not rows:
        return {}
    settled = rows[WARM_UP:] or rows
    *_, spent = progress(rows, ranks, price_per_h)
    del spent["step"]
    for name, key in (
        ("run/tokens_per_s", "speed/computed_tokens_per_s"),
        ("run/target_tokens_per_s", "speed/target_tokens_per_s"),
        ("run/tflops_per_device", "speed/tflops_per_device"),
        ("run/mfu", "speed/mfu"),
        ("run/hfu", "speed/hfu"),
    ):
        if found := values(settled, key):
            spent[name] = median(found)
    if peaks := values(rows, "memory/peak_gib"):
        spent["run/peak_gib"] = max(peaks)
    if planned := values(rows[-1:], "plan/peak_gib"):
        spent["run/planned_peak_gib"] = planned[0]
    if readings := values(rows, "card/energy_kj"):  # each start of a run counts from 0
        starts = [before for before, after in pairwise(readings) if after < before]
        spent["run/energy_kj"] = sum(starts) + readings[-1]
    return {name: value for name, value in spent.items() if value or name in ("run/mfu", "run/hfu")}
