"""Runs for the terminal: a table of what is going on, runs side by side, and the difference of two."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tunesmith.compare import Comparison, Difference, Glance, measure
from tunesmith.compare.table import text as setting
from tunesmith.config import Refusal
from tunesmith.records import write_text
from tunesmith.report.pages import number

COLOURS = {"running": "cyan", "completed": "green", "failed": "red", "oom": "red", "nan": "red", "gone": "red", "silent": "yellow"}
COLOURS |= {"stopped": "yellow", "preempted": "yellow", "requeued": "yellow", "pending": "dim"}
WATCH_S = 2.0


def console(stream: IO[str] | None, *tables: Any) -> Console:
    """A console on a stream (none: stdout); where that is no terminal, as wide as the tables need, so that a file has whole words."""
    found = Console(file=stream, highlight=False)
    if not found.is_terminal:
        wide = Console(file=stream, highlight=False, width=10_000)
        found.width = max([80, *(Measurement.get(wide, wide.options, table).maximum for table in tables)])
    return found


def show_runs(look: Callable[[], list[Glance]], watch: bool, stream: IO[str] | None = None) -> None:
    """The table of runs; with `watch` made anew every two seconds, until all of them are over or Ctrl-C."""
    found = look()
    if not watch:
        table = runs_table(found)
        console(stream, table).print(table)
        return
    try:
        with Live(runs_table(found), console=console(stream, runs_table(found)), auto_refresh=False) as live:
            while not all(one.is_over for one in found):
                time.sleep(WATCH_S)
                found = look()
                live.update(runs_table(found), refresh=True)
    except KeyboardInterrupt:
        pass


def runs_table(runs: Sequence[Glance]) -> Table:
    """A row a run, as they were found."""
    table = _table("run", "state", "step>", "loss>", "held-out>", "tokens/s>", "MFU>", "where", "since")
    for one in runs:
        state = _state(one.state, one.note, 60)
        steps = f"{one.step:,}" + (f" of {one.steps:,}" if one.steps else "")
        table.add_row(
            Text(one.run), state, steps, _number(one.loss), _number(one.dev_loss), _number(one.tokens_per_s), _percent(one.mfu),
            Text(one.where), ago(one.since),
        )  # fmt: skip
    return table


def show_comparison(found: Comparison, stream: IO[str] | None = None) -> None:
    """What differs, what came of it, which runs are Pareto-best, and which differences are more than noise."""
    good, dear = measure(found.quality), measure(found.against)
    settings = _table("#>", "run", "state", *found.keys)
    for place, run in enumerate(found.runs):
        cells = [Text(_short(setting(run.config.get(key)), 40)) for key in found.keys]
        settings.add_row(str(place + 1), Text(run.name), _state(run.state, "" if run.is_complete else run.note, 30), *cells)
    results = _table("#>", *(f"{one.label}{f', {one.unit}' if one.unit else ''}>" for one in found.measures), "Pareto")
    for place, run in enumerate(found.runs):
        told = [_result(run.results.get(one.key), run.intervals.get(one.key), one.key) for one in found.measures]
        results.add_row(str(place + 1), *told, "★" if place in found.best else "")
    verdicts = _table("runs", f"mean {good.label}>", "against the best>", "verdict", "evidence (95 %)")
    for one in found.verdicts(good.key):
        gap = "" if one.verdict == "best" else f"{one.gap:+.3g}"
        verdicts.add_row(", ".join(str(place + 1) for place in one.runs), number(float(one.mean)), gap, one.verdict, one.evidence)
    out = console(stream, settings, results, verdicts)
    out.print(Group(Text("what differs", "bold"), settings, Text(), Text("what came of it", "bold"), results), overflow="fold")
    better = ["lower" if one.lower_is_better else "higher" for one in (good, dear)]
    out.print(
        f"★ Pareto-best: {good.label} ({better[0]} is better) against {dear.label} ({better[1]} is better); --quality and --against choose"
    )
    if verdicts.row_count > 1:
        out.print(Group(Text(), Text(f"noise of {good.label}", "bold"), verdicts))
    out.print(Text(f"{good.label}: {found.evidence(good.key)}"))
    for note in found.notes:
        out.print(Text(f"note: {note}"))


def show_difference(names: Sequence[str], found: Sequence[Difference], stream: IO[str] | None = None) -> None:
    """Settings, data, versions, plan and results of two runs; only results also where they are equal."""
    table = _table("", "", *(f"{name}" for name in names), "")
    part = ""
    for one in found:
        values = [
            Text(_short(number(value) if one.part == "results" and isinstance(value, float) else setting(value), 60))
            for value in (one.first, one.second)
        ]
        table.add_row(Text(one.part if one.part != part else "", "bold"), one.name, *values, Text(one.remark, "dim"))
        part = one.part
    out = console(stream, table)
    for name in ("settings", "data", "versions"):
        if all(one.part != name for one in found):
            out.print(f"{name}: the same")
    out.print(table)


def write_csv(path: Path, found: Comparison) -> None:
    """A row a run; raises Refusal where a file lies that is not one of these."""
    rows = found.table()
    check_ours(path, "run,path,state,")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: setting(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows)
    try:
        write_text(path, text.getvalue())
    except OSError as error:
        raise Refusal(f"{path}: cannot be written ({error.strerror}) — name another file") from None


def check_ours(path: Path, mark: str) -> None:
    """Raise Refusal where something lies that this program has not written: nobody's file is written over."""
    if not path.parent.is_dir():
        raise Refusal(f"{path}: there is no folder {path.parent} — make it, or name another")
    if path.is_dir():
        raise Refusal(f"{path}: a folder — name a file")
    if path.exists() and mark.encode() not in _beginning(path):
        raise Refusal(f"{path}: exists, and is no comparison that could be written anew — name another file")


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


def ago(since: float | None) -> str:
    """A moment for people: the time, and how long ago that is."""
    if since is None:
        return ""
    seconds = max(0.0, time.time() - since)
    unit, size = next((pair for pair in (("d", 86400), ("h", 3600), ("min", 60)) if seconds >= pair[1]), ("s", 1))
    return f"{time.strftime('%m-%d %H:%M', time.localtime(since))} ({seconds / size:.0f} {unit})"


def _table(*headers: str) -> Table:
    """Columns by name; those whose name ends with > are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in headers:
        table.add_column(Text(name.removesuffix(">")), justify="right" if name.endswith(">") else "left", overflow="fold")
    return table


def _result(value: float | None, interval: tuple[float, float] | None, key: str) -> str:
    if value is None:
        return "–"
    told = _percent(value) if key == "run/mfu" else number(float(value))
    return told + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _number(value: float | None) -> str:
    return "–" if value is None else str(value) if not math.isfinite(value) else number(float(value))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _state(state: str, note: str, most: int) -> Text:
    text = Text(state, COLOURS.get(state, ""))
    return text.append(f" {_short(note, most)}", "dim") if note else text


def _short(told: str, most: int) -> str:
    told = " ".join(told.split())
    return told if len(told) <= most else told[: most - 1] + "…"
