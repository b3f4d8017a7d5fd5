"""Where numbers go: metrics.jsonl is the record; the console and W&B are readers that may be slow, absent or broken."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tunesmith.config import Config, TrackerKind, TrackerMode
from tunesmith.run import RunFolder, as_mapping


class Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self, summary: Mapping[str, Any]) -> None: ...


class Sinks:
    """All sinks of rank 0; on other ranks an empty list, so that nobody asks which rank this is."""

    def __init__(self, sinks: Sequence[Sink]):
        self.sinks = sinks
        self._summary: dict[str, Any] = {}

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self.sinks:
            sink.close(self._summary)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, metrics)

    def summarise(self, numbers: Mapping[str, Any]) -> None:
        """Numbers of the whole run, for trackers that show one line a run."""
        self._summary |= {name: value for name, value in numbers.items() if isinstance(value, int | float)}


class JsonLines:
    """One JSON object a line and step; a resumed run goes on in the same file (readers take the last line of a step)."""

    def __init__(self, path: Path):
        torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if torn:  # killed within a line: end it, so that it does not spoil the next one
            self._file.write("\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")

    def close(self, summary: Mapping[str, Any]) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl by step, later lines over earlier ones of the same step; torn lines are passed over."""
    by_step: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                by_step.setdefault(int(record["step"]), {}).update(record)
            except (ValueError, KeyError, TypeError):
                continue
    return [by_step[step] for step in sorted(by_step)]


class Console:
    """A progress bar with ETA, loss, tokens/s, TFLOPS and MFU; plain lines now and then where there is no terminal."""

    def __init__(self, steps: int, done: int):
        self.steps = steps
        self._rich = RichConsole(file=sys.stderr)
        self._last_line_s = 0.0
        self._progress: Progress | None = None
        if self._rich.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._rich,
            )
            self._task = self._progress.add_task("step", total=steps, completed=done, numbers="")
            self._progress.start()
        self._first: tuple[int, float] = (done, time.monotonic())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = []
        for name, label, form in (
            ("train/loss", "loss", "{:.3f}"),
            ("dev/loss", "held-out loss", "{:.3f}"),
            ("speed/computed_tokens_per_s", "tokens/s", "{:,.0f}"),
            ("speed/tflops_per_device", "TFLOPS", "{:.3g}"),
            ("speed/mfu", "MFU", "{:.0%}"),
        ):
            if name in metrics:
                parts.append(f"{label} {form.format(metrics[name])}")
        numbers = " · ".join(parts)
        if self._progress:
            self._progress.update(self._task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        if step == self.steps or "dev/loss" in metrics or now - self._last_line_s > 10:
            self._last_line_s = now
            done, since = step - self._first[0], now - self._first[1]
            left_s = since / done * (self.steps - step) if done > 0 else 0
            print(f"step {step}/{self.steps} · {numbers} · left {left_s / 60:.1f} min", file=sys.stderr, flush=True)

    def close(self, summary: Mapping[str, Any]) -> None:
        if self._progress:
            self._progress.stop()


class WandbSink:
    """W&B behind a queue and a thread of its own: refused, silent or slow, it never stops or delays a step.

    The run id is kept with the run, so that a resumed run continues the same W&B run. If W&B has not answered after
    tracker.init_timeout_s, the run is logged offline, to be sent later with `wandb sync`.
    """

    CLOSE_S = 20.0
    """How long closing may take before the process leaves anyway; what is not sent lies in the run folder."""

    def __init__(self, config: Config, run: Path, resolved: Mapping[str, Any]):
        self.config = config
        self._run_folder = run
        self._resolved = resolved
        self._queue: queue.Queue[tuple[int, dict[str, float]] | Mapping[str, Any]] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._queue.put((step, dict(metrics)))

    def close(self, summary: Mapping[str, Any]) -> None:
        self._queue.put(dict(summary))
        self._thread.join(self.CLOSE_S)
        if self._thread.is_alive():
            print(f"tracker=wandb: W&B does not answer; nothing is lost: wandb sync {self._run_folder / 'wandb'}/*run-*", file=sys.stderr)

    def _work(self) -> None:
        try:
            run = self._start()
            while True:
                item = self._queue.get()
                if not isinstance(item, tuple):
                    run.summary.update(item)
                    run.finish()
                    return
                run.log(item[1], step=item[0])
        except Exception as error:  # W&B's trouble must never be the run's: say it once, the JSONL record goes on
            print(f"tracker=wandb: {type(error).__name__}: {error} — training goes on, metrics.jsonl has everything", file=sys.stderr)

    def _start(self) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        tracker = self.config.tracker
        arguments = {
            "id": self._run_id(),
            "resume": "allow",
            "project": tracker.project,
            "entity": tracker.entity or None,
            "group": tracker.group or None,
            "tags": tracker.tags or None,
            "job_type": tracker.job_type,
            "name": f"{self.config.name}-{self._run_folder.name}",
            "dir": str(self._run_folder),
            "config": dict(self._resolved),
        }
        settings = wandb.Settings(init_timeout=tracker.init_timeout_s, console="off", x_disable_stats=True)
        try:
            return wandb.init(mode=tracker.mode.value, settings=settings, **arguments)
        except (wandb.errors.Error, OSError) as error:
            if tracker.mode is not TrackerMode.online:
                raise
            print(f"tracker.mode=online: {error} — logging offline: wandb sync {self._run_folder / 'wandb'}/offline-run-*", file=sys.stderr)
            return wandb.init(mode="offline", settings=settings, **arguments)

    def _run_id(self) -> str:
        path = self._run_folder / "wandb_id.txt"
        if not path.exists():
            import secrets

            temporary = path.with_suffix(".tmp")
            temporary.write_text(secrets.token_hex(4))
            os.replace(temporary, path)
        return path.read_text().strip()


def open_sinks(config: Config, folder: RunFolder, steps: int, done: int) -> Sinks:
    """The sinks that a config asks for; none but on rank 0."""
    if not folder.world.is_main:
        return Sinks([])
    sinks: list[Sink] = [JsonLines(folder.path / "metrics.jsonl"), Console(steps, done)]
    if config.tracker.kind is TrackerKind.wandb:
        sinks.append(WandbSink(config, folder.path, as_mapping(config)))
    return Sinks(sinks)
