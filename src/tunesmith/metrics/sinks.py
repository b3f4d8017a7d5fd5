"""Where numbers go: metrics.jsonl is the record; the console and W&B are readers that may be slow, absent or broken."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tunesmith.config import Config, TrackerKind, TrackerMode, changed
from tunesmith.metrics.totals import totals
from tunesmith.plan import run_id
from tunesmith.records import read_json, write_json
from tunesmith.run import RunFolder, Stopped, as_mapping


class Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self, summary: Mapping[str, Any], completed: bool) -> None: ...


class Sinks:
    """All sinks of rank 0; on other ranks an empty list, so that nobody asks which rank this is."""

    def __init__(self, sinks: Sequence[Sink]):
        self.sinks = sinks
        self._summary: dict[str, Any] = {}
        self._told: set[str] = set()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is not None:
            self._summary["run/ended"] = str(error) if isinstance(error, Stopped) else f"{kind.__name__}: {error}"
        for sink in self.sinks:
            self._attempt(sink, partial(sink.close, self._summary, kind is None))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self.sinks:
            self._attempt(sink, partial(sink.log, step, metrics))

    def summarise(self, numbers: Mapping[str, Any]) -> None:
        """Metrics of the whole run, for trackers that show one line a run."""
        self._summary |= {name: value for name, value in numbers.items() if "/" in name}

    def _attempt(self, sink: Sink, work: Callable[[], None]) -> None:
        """A full disk or a terminal that is gone must not end a training: say it once a sink, and try again next time."""
        name = type(sink).__name__
        try:
            work()
        except OSError as error:
            if name not in self._told:
                self._told.add(name)
                with suppress(OSError):
                    print(f"tunesmith: {name}: {error} — training goes on", file=sys.stderr, flush=True)


class JsonLines:
    """One JSON object a line and step; a resumed run goes on in the same file (readers take the last line of a step).

    Lines that a full disk does not take stay in memory and are written, in order, once it has room again.
    """

    def __init__(self, path: Path):
        self._file = path.open("a+b")
        if self._file.tell() and self._last_byte() != b"\n":  # killed within a line: end it, so that it does not spoil the next one
            self._file.write(b"\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}).encode() + b"\n")
        self._file.flush()

    def close(self, summary: Mapping[str, Any], completed: bool) -> None:
        self._file.close()

    def _last_byte(self) -> bytes:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1)


def read_metrics(path: Path, last_bytes: int = 0) -> list[dict[str, Any]]:
    """Read metrics.jsonl in step order; the last line of a step counts, torn lines are left out, no file is no rows.

    last_bytes: only what stands in the last so many bytes; 0: all.
    """
    rows: dict[int, dict[str, Any]] = {}
    if path.exists():
        with path.open("rb") as file:
            if last_bytes:
                file.seek(max(0, path.stat().st_size - last_bytes))
            text = file.read().decode("utf-8", "replace")
        for line in text.splitlines():
            try:  # a line is one flat object: after a torn write the last "{" is where the resumed run went on
                row = json.loads(line[max(line.rfind("{"), 0) :])
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


class Console:
    """A progress bar with ETA, loss, tokens/s, TFLOPS and MFU; plain lines now and then where there is no terminal."""

    NUMBERS = (
        ("train/loss", "loss", "{:.3f}"),
        ("dev/loss", "held-out loss", "{:.3f}"),
        ("speed/computed_tokens_per_s", "tokens/s", "{:,.0f}"),
        ("speed/tflops_per_device", "TFLOPS", "{:.3g}"),
        ("speed/mfu", "MFU", "{:.0%}"),
    )
    LINE_EVERY_S = 10.0

    def __init__(self, steps: int, done: int):
        self.steps = steps
        self._done_before, self._start_s = done, time.monotonic()
        self._line_s = -self.LINE_EVERY_S
        self._progress: Progress | None = None
        rich = RichConsole(file=sys.stderr)
        if rich.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[numbers]}"))
            self._progress = Progress(*columns, console=rich)
            self._task = self._progress.add_task("step", total=steps, completed=done, numbers="")
            self._progress.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = [f"{label} {form.format(metrics[name])}" for name, label, form in self.NUMBERS if name in metrics]
        numbers = " · ".join([*parts, f"left {self._left(step)}"])
        now = time.monotonic()
        if self._progress:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif step == self.steps or "dev/loss" in metrics or now - self._line_s >= self.LINE_EVERY_S:
            self._line_s = now
            print(f"step {step}/{self.steps} · {numbers}", file=sys.stderr, flush=True)

    def close(self, summary: Mapping[str, Any], completed: bool) -> None:
        if self._progress:
            self._progress.stop()

    def _left(self, step: int) -> str:
        """Time to go at this start's mean pace; rich's own column forgets steps of half a minute before it has two."""
        done = step - self._done_before
        left_s = (time.monotonic() - self._start_s) / max(done, 1) * (self.steps - step)
        return f"{left_s:.0f} s" if left_s < 100 else f"{left_s / 60:.0f} min" if left_s < 6000 else f"{left_s / 3600:.1f} h"


class WandbSink:
    """W&B in a process of its own that reads metrics.jsonl (to_wandb.py): refused, silent or slow, it never delays a step.

    When W&B does not answer within tracker.init_timeout_s, breaks down later, or has not taken everything when the run
    ends, another process reads the same lines into an offline run, to be sent with `wandb sync`. wandb.json in the run
    folder keeps the W&B run's id, so that a resumed run continues it, and how far the record has been read. The agent of a W&B
    sweep has opened a run already: that is the one then, and gets the record from its beginning.
    """

    CLOSE_S = 20.0
    """How long W&B may take to send the rest when the run ends, before that is left to an offline run."""
    OFFLINE_S = 20.0
    """How long the offline run may take: it only writes to disk, and is done in two."""

    def __init__(self, config: Config, run: Path, resolved: Mapping[str, Any]):
        tracker, state = config.tracker, run / "wandb.json"
        known = read_json(state)
        if known is None:
            known = {"id": secrets.token_hex(4), "read": 0}
        if (opened := opened_by_agent()) and opened != known["id"]:
            known = {"id": opened, "read": 0}
        write_json(state, known)
        self._order: dict[str, Any] = {
            "metrics": str(run / "metrics.jsonl"),
            "state": str(state),
            "read": known["read"],
            "close_s": self.CLOSE_S,
            "settings": {
                "init_timeout": tracker.init_timeout_s,
                "program": sys.argv[0],
                "program_relpath": Path(sys.argv[0]).name,
                "console": "off",
                "x_disable_stats": True,  # docs/metrics.md: card/* and memory/* are measured here
            },
            "init": {
                "id": known["id"],
                "resume": "allow",
                "project": tracker.project,
                "entity": tracker.entity or None,
                "group": tracker.group or config.name,
                "tags": tracker.tags or None,
                "job_type": tracker.job_type,
                "name": f"{config.name}-{run.name}",
                "dir": str(run.absolute()),
                "config": dict(resolved),
            },
        }
        self._sync = f"wandb sync {run / 'wandb'}/offline-run-*"
        self._start(tracker.mode)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to do but to see whether W&B is still there: its process reads the line from metrics.jsonl."""
        if self._outcome(0) is not None:
            self._go_offline()

    def close(self, summary: Mapping[str, Any], completed: bool) -> None:
        while not self._ended({"summary": dict(summary), "completed": completed}):
            if not self._go_offline():
                print("tracker=wandb: W&B did not finish; metrics.jsonl has everything", file=sys.stderr)
                return

    def _ended(self, last: Mapping[str, Any]) -> bool:
        """Whether W&B's process, told to end, has handed over everything in time."""
        self._tell(last)
        outcome = self._outcome(self.CLOSE_S if self._mode is TrackerMode.online else self.OFFLINE_S)
        if outcome is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # the process that it has left is in its group
            if self._mode is TrackerMode.online:
                print(f"tracker.mode=online: not finished after {self.CLOSE_S:g} s — for the rest: {self._sync}", file=sys.stderr)
        self._forget()
        return outcome == b"0"

    def _outcome(self, within_s: float) -> bytes | None:
        """What W&B's process has said last: b"0" when all is handed over, nothing if it ended without; None if it is at work."""
        self._process.poll()
        waiting = select.poll()  # select.select takes only the first 1,024 files of a process
        waiting.register(self._said, select.POLLIN)
        return self._said.read(1) if waiting.poll(within_s * 1000) else None

    def _go_offline(self) -> bool:
        """Read the record again into an offline run; False if that is what has failed."""
        if self._mode is TrackerMode.offline:
            return False
        self._forget()
        self._start(TrackerMode.offline)
        return True

    def _start(self, mode: TrackerMode) -> None:
        self._mode = mode
        otherwise = f"logging offline, later: {self._sync}" if mode is TrackerMode.online else "metrics.jsonl has everything"
        # W&B's own telemetry goes out even when logging offline. WANDB_SERVICE would share another program's W&B process.
        environment = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", **os.environ}
        environment.pop("WANDB_SERVICE", None)
        # By its path, as what lies in the working folder is not to be imported; in a session of its own, out of Ctrl-C's reach.
        program = Path(__file__).with_name("to_wandb.py")
        said, saying = os.pipe()
        self._said = os.fdopen(said, "rb", buffering=0)
        command = [sys.executable, str(program), str(saying)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True, pass_fds=[saying])
        finally:
            os.close(saying)
        self._tell({**self._order, "init": {**self._order["init"], "mode": mode.value}, "otherwise": otherwise})

    def _tell(self, line: Mapping[str, Any]) -> None:
        assert self._process.stdin
        with suppress(OSError, ValueError):  # it has ended: seen by whoever asks for its exit code
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()

    def _forget(self) -> None:
        """Close the pipes to a process that has ended."""
        with suppress(OSError):
            self._process.communicate()
        self._said.close()


def facts(config: Config, folder: RunFolder) -> dict[str, Any]:
    """What a run is besides its settings, for W&B's config: by `setting`, which leaves out the seed alone, its tables group seeds."""
    plan, environment = (read_json(folder.path / name) or {} for name in ("plan.json", "environment.json"))
    return {
        "id": folder.path.name,
        "setting": run_id(changed(config, {"train.seed": 0})),
        "data": folder.status().get("data"),
        "ranks": folder.world.size,
        "card": plan.get("card"),
        "method": plan.get("method"),
        "trained_weights": plan.get("trained_weights"),
        "commit": environment.get("commit"),
    }


def opened_by_agent() -> str:
    """Id of the W&B run that `wandb agent` has opened for this trial; empty outside of a W&B sweep."""
    return os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""


def hand_over_again(config: Config, folder: RunFolder) -> None:
    """Give a complete run's record to the W&B run that an agent has opened for the same settings; nothing without an agent."""
    known = read_json(folder.path / "wandb.json") or {}
    if not folder.world.is_main or config.tracker.kind is not TrackerKind.wandb or opened_by_agent() in ("", known.get("id")):
        return
    after = (read_json(folder.path / "evaluation.json") or {}).get("after", {})
    sink = WandbSink(config, folder.path, {**as_mapping(config), "run": facts(config, folder)})
    sink.CLOSE_S += config.tracker.init_timeout_s  # no training goes on while W&B begins
    with Sinks([sink]) as sinks:
        spent = totals(read_metrics(folder.path / "metrics.jsonl"), folder.world.size, config.hardware.price_per_h)
        sinks.summarise({**after, **spent, "run/ended": folder.status().get("ended", "")})


def open_sinks(config: Config, folder: RunFolder, steps: int, done: int) -> Sinks:
    """The sinks that a config asks for; none but on rank 0."""
    if not folder.world.is_main:
        return Sinks([])
    sinks: list[Sink] = [JsonLines(folder.path / "metrics.jsonl"), Console(steps, done)]
    if config.tracker.kind is TrackerKind.wandb and config.tracker.mode is not TrackerMode.disabled:
        try:
            sinks.append(WandbSink(config, folder.path, {**as_mapping(config), "run": facts(config, folder)}))
        except OSError as error:  # no process to be had
            print(f"tracker=wandb: {error} — metrics.jsonl has everything", file=sys.stderr)
    return Sinks(sinks)
