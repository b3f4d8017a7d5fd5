"""Run folders as others see them: what state a run is in, what it was asked to do, and what came of it. Only files are read."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from tunesmith.config import Config, Refusal, leaves
from tunesmith.metrics.sinks import read_metrics
from tunesmith.metrics.totals import is_number, totals, values
from tunesmith.metrics.uncertainty import Interval, wilson
from tunesmith.records import read_json

DEPTH = 4
"""Folders below the one named in which runs are looked for: outputs/NAME/ID, and room for a folder of sweeps."""
TAIL = 64 * 1024
"""Bytes at the end of metrics.jsonl that a glance reads: some seventy lines."""
RECENT = 20
"""Lines that a glance takes the middle speed of."""
SILENT_S = 900.0
"""A run on another machine whose files have not changed for so long is called silent; a large checkpoint takes minutes."""
DEFAULTS = dict(leaves(Config()))
ENDED = ("completed", "failed", "stopped", "oom", "nan", "gone")


@dataclass(frozen=True)
class Glance:
    """A run in a line."""

    run: str
    """NAME/ID."""
    path: str
    state: str
    """The word of status.json, but gone where it says running and the process is not there, silent where that cannot be seen from
    here and nothing has been written for a quarter of an hour, and unknown where there is no word."""
    note: str
    """Why, where something is said about that."""
    step: int
    steps: int
    """0: not known yet."""
    loss: float | None
    dev_loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    where: str
    """node x ranks, and the scheduler's job."""
    since: float | None
    """When that state was entered, Unix seconds."""

    @property
    def is_over(self) -> bool:
        return self.state in ENDED


def is_run(folder: Path) -> bool:
    return (folder / "status.json").is_file() or (folder / "config.yaml").is_file()


def name_of(run: Path) -> str:
    """NAME/ID, from the folders alone."""
    path = run.resolve()
    return f"{path.parent.name}/{path.name}"


def runs_below(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run folders at or below a folder, by name; what lies within a run is not looked at."""
    if is_run(folder):
        yield folder
    elif depth:
        for child in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            yield from runs_below(child, depth - 1)


def find_runs(words: Iterable[str]) -> list[Path]:
    """The runs that words name, each once: run folders, folders of runs, patterns of both; raises Refusal for a word that names none."""
    found: dict[Path, Path] = {}
    for word in words:
        folders = [Path(word)] if Path(word).exists() else [path for path in map(Path, sorted(glob(word))) if path.is_dir()]
        if not folders:
            raise Refusal(f"{word}: no such folder — name runs (outputs/NAME/ID), folders of runs (outputs/NAME), or patterns of them")
        runs = [run for folder in folders if folder.is_dir() for run in runs_below(folder)]
        if not runs:
            raise Refusal(f"{word}: no run in it (no config.yaml, no status.json) — name runs (outputs/NAME/ID) or folders of runs")
        for run in runs:
            found.setdefault(run.resolve(), run)  # a search names its runs by links too
    return list(found.values())


def is_locked(run: Path) -> bool:
    """Whether a process of this machine, or of one that shares its locks, is at work on the run; nothing is left changed."""
    try:
        with (run / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file is closed
    except BlockingIOError:
        return True
    except OSError:  # no lock file; a file system without locks
        return False
    return False


def last_sign_s(run: Path) -> float:
    """When anything in the run folder changed last, Unix seconds."""
    return max((path.stat().st_mtime for path in run.iterdir() if path.name != "lock"), default=0.0)


def state_of(run: Path, status: Mapping[str, Any], environment: Mapping[str, Any]) -> tuple[str, str]:
    """The run's state in a word, and why, where something is said about that."""
    state = str(status.get("state") or "unknown")
    note = next((" ".join(str(status[key]).split()) for key in ("error", "reason", "ended") if status.get(key)), "")
    if state != "running":
        return state, "" if note.startswith("all ") else note
    if is_locked(run):
        return "running", ""
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if environment.get("node") == here:
        return "gone", "its process is not there any more; the same command goes on"
    quiet_s = time.time() - last_sign_s(run)
    return (
        ("silent", f"nothing written for {quiet_s / 60:.0f} min, its process cannot be seen from here")
        if quiet_s > SILENT_S
        else ("running", "")
    )


def where_of(environment: Mapping[str, Any]) -> str:
    ranks, job = environment.get("world_size") or 1, environment.get("job")
    return " ".join([str(environment.get("node") or ""), *([f"x {ranks}"] if ranks != 1 else []), *([f"job {job}"] if job else [])]).strip()


def glance(run: Path) -> Glance:
    """A run in a line; reads only the end of its record, so that it can be asked again and again."""
    status, environment = read_json(run / "status.json") or {}, read_json(run / "environment.json") or {}
    rows = read_metrics(run / "metrics.jsonl", TAIL)
    state, note = state_of(run, status, environment)
    last = rows[-1] if rows else {}
    place = {**environment, **{key: status[key] for key in ("node", "job") if status.get(key)}}
    speeds, shares = (values(rows[-RECENT:], f"speed/{name}") for name in ("computed_tokens_per_s", "mfu"))
    since = status.get("updated")
    return Glance(
        run=name_of(run), path=str(run), state=state, note=note,
        step=max(int(last.get("step") or 0), _whole(status.get("step"))), steps=_whole(status.get("steps")),
        loss=last.get("train/loss"), dev_loss=next((row["dev/loss"] for row in reversed(rows) if "dev/loss" in row), None),
        tokens_per_s=median(speeds) if speeds else None, mfu=median(shares) if shares else None,
        where=where_of(place), since=float(since) if is_number(since) else None,
    )  # fmt: skip


def _whole(value: Any) -> int:
    return int(value) if is_number(value) else 0


class Run:
    """Everything that a run folder knows, read when it is asked for; raises Refusal for a config that is none."""

    def __init__(self, path: Path):
        self.path = path
        self.name = name_of(path)
        stored = read_settings(path)
        self.assumed = [key for key in DEFAULTS if key not in stored]
        """Settings that the run's version did not know, and that count as they are by default."""
        self.config: dict[str, Any] = {**{key: DEFAULTS[key] for key in self.assumed}, **stored}
        self.status = read_json(path / "status.json") or {}
        self.plan = read_json(path / "plan.json") or {}
        self.environment = read_json(path / "environment.json") or {}
        self.state, self.note = state_of(path, self.status, self.environment)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.path / "metrics.jsonl")

    @property
    def ranks(self) -> int:
        return _whole(self.environment.get("world_size") or self.plan.get("world_size")) or 1

    @property
    def price_per_h(self) -> float:
        price = self.config.get("hardware.price_per_h")
        return float(price) if is_number(price) else 0.0

    @property
    def is_complete(self) -> bool:
        return self.state == "completed"

    @cached_property
    def after(self) -> dict[str, Any]:
        """The evaluation of what training made."""
        found = (read_json(self.path / "evaluation.json") or {}).get("after")
        return found if isinstance(found, dict) else {}

    @cached_property
    def results(self) -> dict[str, float]:
        """What came of it, by metric name: held-out losses and task metrics, then speed, memory, time, energy and cost."""
        quality = {
            name: value
            for name, value in self.after.items()
            if name.startswith(("dev/", "test/")) and not name.endswith("perplexity") and is_number(value)
        }
        held_out = [row["dev/loss"] for row in self.rows if is_number(row.get("dev/loss"))]
        if held_out and "dev/loss" not in quality:
            quality = {"dev/loss": held_out[-1], **quality}
        return {**quality, **totals(self.rows, self.ranks, self.price_per_h)}

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % intervals of task metrics, over the questions asked."""
        known = self.after.get("intervals")
        found = {
            name: (float(pair[0]), float(pair[1]))
            for name, pair in (known.items() if isinstance(known, dict) else ())
            if isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_number, pair))
        }
        exact, asked = self.results.get("test/exact_match"), _whole(self.after.get("conversations"))
        if exact is not None and asked and "test/exact_match" not in found and 0 <= exact <= 1:  # of a version that did not write them
            found["test/exact_match"] = wilson(exact, asked)
        return found


def read_settings(run: Path) -> dict[str, Any]:
    """The settings of config.yaml by dotted name; raises Refusal if it is not there or is none."""
    path = run / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Refusal(f"{path}: cannot be read ({' '.join(str(error).split())[:100]}) — leave this run out") from None
    if not isinstance(tree, dict):
        raise Refusal(f"{path}: not a run's settings — leave this run out")
    return flatten(tree)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level, with dotted names: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
