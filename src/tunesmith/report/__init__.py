"""One run's page: everything a run folder knows, in one HTML file that needs no network and no server.

Reads only files, so a report can be made for a run that is going on, was stopped, or comes from another machine.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from plotly.offline import get_plotlyjs

from tunesmith.again import Restarts
from tunesmith.compare.runs import flatten
from tunesmith.metrics import read_metrics, totals
from tunesmith.metrics.totals import WARM_UP, is_number, values
from tunesmith.report.pages import number, write_page
from tunesmith.world import World

Row = dict[str, Any]

POINTS = 2000
"""Most points drawn in one line; a longer run is thinned evenly."""

PHASES = {
    "time/data_s": "data",
    "time/forward_s": "forward",
    "time/backward_s": "backward",
    "time/optimizer_s": "optimizer",
    "time/communication_s": "communication",
    "time/other_s": "other",
}

DEFINITIONS = {
    "step": "One optimizer update, over all ranks and accumulation.",
    "computed token": "A position that went through the model, whether or not it has a loss; padding included.",
    "target token": "A position with a loss, which is what the model learns from.",
    "computed tokens/s, target tokens/s": "Tokens of a step, over all devices, divided by its whole time on the clock.",
    "TFLOPS per device": "10¹² floating-point operations per second that training needs: frozen weights need no weight "
    "gradient, and recomputed activations do not count.",
    "MFU": "Model FLOPs utilisation: needed FLOPs per second over the device's peak; left out when that is not known.",
    "HFU": "Hardware FLOPs utilisation: the same, but with what activation checkpointing computes a second time.",
    "peak memory": "Most memory reserved on one device (the process's own on a CPU) at any step, in GiB (2³⁰ bytes).",
    "padding share": "Padding tokens divided by computed tokens, over the whole run; 0 when batches are ragged.",
    "loss": "Mean cross-entropy over target tokens, in nats; a dev loss is taken on held-out conversations.",
    "perplexity": "exp(loss): as unsure as a choice among that many equally likely tokens. Lower is better.",
    "n-gram perplexity": "That of a 3-gram model of the training targets on the same held-out targets: a model that does not beat it "
    "has not learned more than phrases.",
    "intent accuracy": "Share of test conversations whose answer calls the wanted function.",
    "slot F1": "Harmonic mean of precision and recall over the (name, value) arguments of the calls.",
    "exact match": "Share of test conversations whose function and arguments are all as wanted.",
}


def write_report(run: Path) -> Path:
    """Write RUN/report.html, whole or not at all, and return its path; a file the run lacks leaves out its part."""
    page = run / "report.html"
    write_page(page, "report.html.j2", describe_run(run))
    return page


def describe_run(run: Path) -> dict[str, Any]:
    """Everything the template shows, as plain values; raises ValueError when a JSON file of the run is not JSON."""
    rows, status, evaluation = read_metrics(run / "metrics.jsonl"), read_json(run / "status.json"), evaluations(run)
    settled, charts, plan = rows[WARM_UP:] or rows, draw_charts(rows), read_json(run / "plan.json")
    memory = plan.pop("memory", None) or {}
    return {
        "name": run.resolve().parent.name,
        "id": run.resolve().name,
        "state": status.get("state", "unknown"),
        "verdict": [*judge(rows, status, evaluation), *Restarts(run, World()).lines()],
        "warm_up": WARM_UP if len(rows) > WARM_UP else 0,
        "steps": len(rows),
        "points": POINTS,
        "tiles": list(tiles(rows, settled)),
        "charts": charts,
        "plotly": packed_plotly() if charts else "",
        "step_s": middle(settled, "time/step_s"),
        "phases": phases(settled),
        "evaluation": evaluation,
        "describe": plan.pop("describe", ""),
        "memory": memory if "total" in memory else memory and {**memory, "total": sum(memory.values())},
        "peak_gib": max(values(rows, "memory/peak_gib"), default=None),
        "predictions": list(predictions(rows, settled)),
        "plan": flatten(plan),
        "command": read_text(run / "command.txt").strip(),
        "chat": f"tunesmith chat {shlex.quote(str(run))}",
        "config": read_text(run / "config.yaml").strip(),
        "environment": flatten(read_json(run / "environment.json")),
        "definitions": DEFINITIONS,
    }


@cache
def packed_plotly() -> str:
    """plotly.js as base64 of gzip, which the page unpacks: 2.0 MB instead of 4.8 MB in every run folder."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def judge(rows: Sequence[Row], status: Row, evaluation: Row) -> list[str]:
    """The run in one line, as parts: steps done, minutes of training, loss first to last, slot F1 before to after."""
    done = max(rows[-1]["step"] if rows else 0, status.get("step") or 0)
    parts = [number(done) + (f" of {number(status['steps'])}" if status.get("steps") else "") + " steps"]
    if hours := totals(rows).get("run/hours"):
        parts[0] += f" in {number(hours * 60)} minutes"
    if status.get("ended") and done < (status.get("steps") or 0):
        parts.append(f"ended at {status['ended']}")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    if losses:  # the last value as it is: nan here is the most important thing on the page
        parts.append(f"training loss {number(losses[0])} → {number(losses[-1])}")
    slots = [m for m in evaluation["measures"] if m["name"] == "test/slot_f1" and m["change"] is not None]
    return parts + [f"slot F1 {number(m['before'])} → {number(m['after'])}" for m in slots]


def tiles(rows: Sequence[Row], settled: Sequence[Row]) -> Iterator[Row]:
    """The key numbers: label, value with its unit, and a smaller line about it."""

    def tile(label: str, value: float | None, unit: str, note: str) -> Row:
        return {"label": label, "value": value, "unit": unit, "note": note}

    conversations = f"{number(middle(settled, 'speed/conversations_per_s'))} conversations/s"
    yield tile("Computed", middle(settled, "speed/computed_tokens_per_s"), "tokens/s", conversations)
    yield tile("Target", middle(settled, "speed/target_tokens_per_s"), "tokens/s", "positions with a loss")
    yield tile("Compute", middle(settled, "speed/tflops_per_device"), "TFLOPS", "per device")
    mfu, hfu = middle(settled, "speed/mfu"), middle(settled, "speed/hfu")
    note = f"HFU {number(100 * hfu)} %" if hfu is not None else ""
    yield tile("MFU", 100 * mfu, "%", note) if mfu is not None else tile("MFU", None, "", "peak not known")
    yield tile("Peak memory", max(values(rows, "memory/peak_gib"), default=None), "GiB", "on one device")
    padding, computed = sum(values(rows, "data/padding_tokens")), sum(values(rows, "data/computed_tokens"))
    yield tile("Padding", 100 * padding / computed if computed else None, "%", "of computed tokens")


def predictions(rows: Sequence[Row], settled: Sequence[Row]) -> Iterator[Row]:
    """What the plan said in the last line beside what was measured: the middle step and speed, the highest memory."""
    measured = (
        ("plan/step_s", "a step, s", middle(settled, "time/step_s")),
        ("plan/tokens_per_s", "tokens/s", middle(settled, "speed/computed_tokens_per_s")),
        ("plan/peak_gib", "peak memory, GiB", max(values(rows, "memory/peak_gib"), default=None)),
    )
    for key, name, value in measured:
        for predicted in values(rows[-1:], key):
            yield {"name": name, "predicted": predicted, "measured": value}


def phases(rows: Sequence[Row]) -> list[Row]:
    """Seconds a step and share of each phase, over the given rows, in the order they happen."""
    means = {name: fmean(values(rows, key)) for key, name in PHASES.items() if values(rows, key)}
    total = sum(means.values()) or math.inf
    return [{"name": name, "seconds": mean, "share": 100 * mean / total} for name, mean in means.items()]


def draw_charts(rows: Sequence[Row]) -> list[Row]:
    """Plotly traces of loss and speed over steps; colours are names the page fills in, as they change in the dark."""

    def line(key: str, name: str, **style: Any) -> Row:
        points = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
        points = points[:: math.ceil(len(points) / POINTS) or 1]
        x, y = [step for step, _ in points], [float(f"{value:.5g}") for _, value in points]
        return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, **style}

    first, second = {"color": "$first", "width": 1.8}, {"color": "$second", "width": 1.8, "dash": "dot"}
    train = line("train/loss", "train", line=first)
    dev = line("dev/loss", "dev", line=second, marker={"size": 9, "symbol": "diamond"}) | {"mode": "lines+markers"}
    computed = line("speed/computed_tokens_per_s", "computed", line=first)
    target = line("speed/target_tokens_per_s", "target", line=second)
    charts = [("loss", "loss, nats a target token", [train, dev]), ("speed", "tokens/s", [computed, target])]
    drawn = [{"id": name, "title": title, "traces": [t for t in traces if t["x"]]} for name, title, traces in charts]
    return [chart for chart in drawn if chart["traces"]]


def evaluations(run: Path) -> Row:
    """Before and after side by side, with the change and whether it is for the better, and the sample answers."""
    found = read_json(run / "evaluation.json")
    before, after = found.get("before") or {}, found.get("after") or {}
    measures = []
    for name in [key for key in dict.fromkeys([*before, *after]) if "/" in key]:
        old, new = before.get(name), after.get(name)
        change = new - old if is_number(old) and is_number(new) else None
        better = "" if not change else "better" if (change < 0) == name.endswith(("loss", "perplexity")) else "worse"
        measure = {"name": name, "before": old, "after": new, "change": change, "better": better, "word": better}
        measures.append(measure | beaten(name, new, after) if name.endswith("/ngram_perplexity") else measure)
    samples = [
        {**sample, "ok": {k: (sample.get(k) or "").strip() == sample["reference"].strip() for k in ("before", "after")}}
        for sample in found.get("samples") or []
    ]
    return {"measures": measures, "samples": samples, "of": after or before}


def beaten(name: str, baseline: Any, after: Row) -> Row:
    """What stands in the place of a change: whether the trained model beats a number that does not depend on it."""
    reached = after.get(name.replace("ngram_", ""))
    if not (is_number(baseline) and is_number(reached)):
        return {"change": None}
    better, word = ("better", "beaten") if reached < baseline else ("worse", "not beaten")
    return {"change": None, "better": better, "word": word}


def middle(rows: Sequence[Row], key: str) -> float | None:
    return median(found) if (found := values(rows, key)) else None


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def read_json(path: Path) -> Row:
    """Read an object, {} where there is no file; raises ValueError that names the file when it is not JSON."""
    try:
        return dict(json.loads(read_text(path) or "{}"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a JSON object ({error})") from error
