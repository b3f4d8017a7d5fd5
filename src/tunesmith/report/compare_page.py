"""Runs side by side as a page that needs no network: parallel coordinates, Pareto plot, curves, and what results go along with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tunesmith.compare import Comparison, Run
from tunesmith.compare.table import text
from tunesmith.config import Refusal
from tunesmith.metrics.totals import is_number, progress
from tunesmith.report import packed_plotly
from tunesmith.report.pages import number, write_page

BRAND = "tunesmith · comparison"
POINTS = 6000
"""Most points drawn in the curves of all runs together; longer runs are thinned evenly."""
CURVES = {
    "train/loss": "training loss",
    "dev/loss": "held-out loss",
    "speed/computed_tokens_per_s": "tokens/s",
    "speed/mfu": "MFU",
    "memory/peak_gib": "peak memory, GiB",
    "train/grad_norm": "gradient norm",
}
OVER = {"step": "steps", "run/tokens": "tokens", "run/hours": "hours of training", "run/cost": "cost"}


def write_compare_page(path: Path, found: Comparison) -> None:
    """Write the page, whole or not at all; raises Refusal where that cannot be."""
    values = {
        "brand": BRAND,
        "title": " · ".join(dict.fromkeys(run.name.split("/")[0] for run in found.runs))[:80],
        "rows": [_row(found, place) for place in range(len(found.runs))],
        "keys": found.keys,
        "measures": found.measures,
        "settings": len(set(found.colours)),
        "complete": sum(run.is_complete for run in found.runs),
        "notes": found.notes,
        "data": page_data(found),
        "plotly": packed_plotly(),
    }
    try:
        write_page(path, "compare_page.html.j2", values)
    except OSError as error:
        raise Refusal(f"{path}: cannot be written ({error.strerror}) — name another file") from None


def _row(found: Comparison, place: int) -> dict[str, Any]:
    """A run in the table, in words."""
    run = found.runs[place]
    results = []
    for one in found.measures:
        value = run.results.get(one.key)
        told = "–" if value is None else f"{100 * value:.1f} %" if one.key == "run/mfu" else number(float(value))
        low, high = run.intervals.get(one.key, (None, None))
        results.append({"value": value, "text": told, "interval": f"{low:.2f} – {high:.2f}" if low is not None else ""})
    settings = [{"value": run.config.get(key), "text": text(run.config.get(key))} for key in found.keys]
    return {
        "name": run.name,
        "state": run.state,
        "note": run.note,
        "colour": found.colours[place],
        "settings": settings,
        "results": results,
    }


def page_data(found: Comparison) -> dict[str, Any]:
    """What the page's program draws, as plain values; a number that is none is null."""
    keys = [one.key for one in found.measures]
    good = [key for key in keys if key.startswith(("dev/", "test/"))] or keys
    most = max(50, POINTS // len(found.runs))
    columns = {key: [run.config.get(key) for run in found.runs] for key in found.keys}
    return {
        "runs": [
            {
                "name": run.name,
                "state": run.state,
                "complete": run.is_complete,
                "colour": found.colours[place],
                "said": found.said(place),
                "settings": {key: text(run.config.get(key)) for key in found.keys},
                "numbers": {key: value if is_number(value := run.config.get(key)) else None for key in found.keys},
                "results": {key: run.results.get(key) for key in keys},
                "intervals": run.intervals,
                **curves(run, most),
            }
            for place, run in enumerate(found.runs)
        ],
        "keys": [{"key": key, "numeric": all(is_number(value) for value in column)} for key, column in columns.items()],
        "measures": [{"key": one.key, "label": one.label, "unit": one.unit, "low": one.lower_is_better} for one in found.measures],
        "good": good,
        "quality": found.quality if found.quality in keys else next(iter(good), ""),
        "against": found.against if found.against in keys else next(iter(keys), ""),
        "verdicts": {key: [vars(one) for one in found.verdicts(key)] for key in keys},
        "evidence": {key: found.evidence(key) for key in keys},
        "influences": {key: [vars(one) for one in found.influences(key)] for key in keys},
        "curves": CURVES,
        "over": OVER,
    }


def curves(run: Run, most: int) -> dict[str, Any]:
    """x: what had been spent at each point drawn, y: what was measured there; lines with a held-out loss are all kept."""
    every = math.ceil(len(run.rows) / most) or 1
    spent = list(progress(run.rows, run.ranks, run.price_per_h))
    kept = [place for place, row in enumerate(run.rows) if place % every == 0 or "dev/loss" in row or place == len(run.rows) - 1]

    def drawn(rows: list[dict[str, Any]], key: str) -> list[float | None]:
        found = [rows[place].get(key) for place in kept]
        return [float(f"{value:.5g}") if is_number(value) else None for value in found]

    over = {key: drawn(spent, key) for key in OVER} | {"step": [run.rows[place]["step"] for place in kept]}
    measured = {key: drawn(run.rows, key) for key in CURVES}
    return {
        "x": {key: column for key, column in over.items() if any(value is not None for value in column)},
        "y": {key: column for key, column in measured.items() if any(value is not None for value in column)},
    }
