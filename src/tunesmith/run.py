"""One run: its folder, its status, how it is stopped, and how its failures are told.

The folder's name follows from the config alone, so every rank and every later start finds the same one without asking.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from filelock import FileLock, Timeout

from tunesmith import lifeline
from tunesmith.again import OutOfMemory, Restarts
from tunesmith.config import Config, MethodKind, Refusal, leaves
from tunesmith.plan import KEPT, Plan, describe
from tunesmith.records import read_json, write_json, write_text
from tunesmith.world import World

COMPLETED, FAILED, REFUSED, OUT_OF_MEMORY, NOT_FINITE, STOPPED = 0, 1, 2, 3, 4, 75
"""Exit codes. 75 is EX_TEMPFAIL: stopped by a signal with everything saved; the same command goes on."""
CODES = {
    "completed": COMPLETED, "failed": FAILED, "oom": OUT_OF_MEMORY, "nan": NOT_FINITE,
    "stopped": STOPPED, "preempted": STOPPED, "requeued": STOPPED,
}  # fmt: skip
"""Exit code by the state that a run has ended in. The others are pending (it waits in a queue) and running."""

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "wandb", "tunesmith")


class Stopped(Exception):
    """The run was asked to stop by a signal, after `step` updates, and has saved its state."""

    def __init__(self, text: str, step: int, by: int):
        super().__init__(text)
        self.step = step
        self.by = by


class TrialFailed(Exception):
    """A trial of Hydra's own sweep came to nothing; Hydra raises it when the others are done, also one of a job of submitit's."""

    def __init__(self, text: str):
        super().__init__(text)
        self.said_by = os.getpid()
        """The process that has said so; it stays when this is pickled."""


class RunFolder:
    """outputs/NAME/ID and the small files in it; only rank 0 writes, except errors."""

    LAST_WORD_S = 45.0
    """How long other ranks wait for rank 0 to say how the run ended: twice the 20 s that W&B may take, online and then offline."""

    def __init__(self, path: Path, world: World):
        self.path = path
        self.world = world
        self._lock: FileLock | None = None
        self.restarts = Restarts(path, world)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def frozen(self) -> Path:
        """Where method.cache_frozen keeps states while the run goes on."""
        return self.path / "frozen"

    @property
    def result(self) -> Path:
        """Where the adapter, or the whole model of a full fine-tune, is left."""
        model = self.path / "model"
        return model if model.exists() else self.path / "adapter"

    def result_for(self, config: Config) -> Path:
        return self.path / ("model" if config.method.kind is MethodKind.full else "adapter")

    @classmethod
    def of(cls, config: Config, run_id: str, world: World) -> RunFolder:
        """The folder of a config's run."""
        return cls(Path(config.outputs) / config.name / run_id, world)

    def status(self) -> dict[str, Any]:
        return read_json(self.path / "status.json") or {}

    def kept(self) -> dict[str, Any]:
        """The settings that checkpoints are of, where there are some."""
        has_begun = any(re.fullmatch(r"step-\d+", path.name) for path in self.checkpoints.glob("step-*"))
        return dict((read_json(self.path / "plan.json") or {}).get("kept", {})) if has_begun else {}

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.world.is_main:
            print(text, flush=True)

    def say_if_complete(self) -> bool:
        """Whether this very run is done already; if so, say where it lies and how to start another."""
        if self.status().get("state") != "completed":
            return False
        self.say(f"This run is complete: {self.path}")
        self.say_what_was_made()
        self.say("To start another, change something that changes the result, e.g. train.seed=1 or optim.lr=5e-4, or give a name=...")
        return True

    def say_what_was_made(self) -> None:
        """Name the run folder, the result, the report and the command to chat."""
        self.say(f"run      {self.path}\nresult   {self.result}\nreport   {self.path / 'report.html'}\nchat     tunesmith chat {self.path}")

    def open(self, config: Config, plan: Plan, data_fingerprint: str) -> None:
        """Make the folder, take its lock and write what the run is; raises Refusal if that cannot be.

        From here on all ranks start again when one runs out of memory.
        """
        if self.world.size > 1:
            self.restarts.watch()
        if not self.world.is_main:
            self.restarts.wait_for_main(config.engine.timeout_s)
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(str(self.path / "lock"), timeout=5)
            self._lock.acquire()  # the system frees it when the process dies, however it dies
        except Timeout:
            advice = "wait for it, or change name= or train.seed="
            raise Refusal(f"{self.path}: another process is at work on this very run — {advice}") from None
        except OSError as error:
            advice = "choose another folder with outputs=/path"
            raise Refusal(f"outputs={config.outputs}: cannot write there ({error.strerror}) — {advice}") from None
        (self.path / "first_error.txt").unlink(missing_ok=True)
        known = self.status().get("data")
        if known and known != data_fingerprint and self.checkpoints.is_dir():
            raise Refusal(
                f"{self.path}: the training data is not what this run began with ({known} then, {data_fingerprint} now) — "
                "bring the old files back, or start a run of its own with name=..."
            )
        free, needed = shutil.disk_usage(self.path).free / 2**30, checkpoint_gib(plan, config)
        there = sum(path.stat().st_blocks * 512 for path in self.frozen.glob("*")) / 2**30
        if free < (both := needed + max(0.0, plan.cache_gib - there)) and free >= needed:
            raise Refusal(
                f"method.cache_frozen=true: {free:.1f} GiB free in outputs={config.outputs}, the checkpoints need about {needed:.1f} GiB "
                f"and the states {both - needed:.1f} GiB — free some space, choose another folder with outputs=/path, or type "
                "method.cache_frozen=false"
            )
        if free < needed:
            raise Refusal(
                f"outputs={config.outputs}: {free:.1f} GiB free, the checkpoints need about {needed:.1f} GiB — "
                "free some space, choose another folder with outputs=/path, or keep fewer with train.keep=1"
            )
        write_text(self.path / "config.yaml", yaml.safe_dump(as_mapping(config), sort_keys=False, allow_unicode=True))
        write_text(self.path / "command.txt", command_line(self.world) + "\n")
        write_json(self.path / "plan.json", plan_record(plan))
        write_json(self.path / "environment.json", environment(self.world))
        self.set_status(
            "running", data=data_fingerprint, steps=plan.steps, pid=os.getpid(), node=self.world.node, error=None, rank=None, reason=None
        )
        self.restarts.note_start()

    def evaluation(self, name: str, work: Callable[[], dict[str, Any]], wanted: bool) -> dict[str, Any]:
        """The evaluation `name` ("before", "after") of evaluation.json; if it is not there, made by all ranks, if wanted."""
        path = self.path / "evaluation.json"
        known = read_json(path) or {}
        if name in known:  # a shared file system shows it to every rank alike: it was written before this start
            return dict(known[name])
        if not wanted:
            return {}
        found = work()
        if self.world.is_main:
            write_json(path, {**known, name: found})
        return found

    def set_status(self, state: str, **facts: Any) -> None:
        """Write status.json: a state (a key of CODES, pending or running) and facts beside it; a fact that is None is taken out."""
        if self.world.is_main:
            record = {**self.status(), "state": state, "updated": round(time.time()), **facts}
            write_json(self.path / "status.json", {name: value for name, value in record.items() if value is not None})

    def wait_for_last_word(self) -> None:
        """On other ranks of a run that is stopped: wait until rank 0 has closed its sinks and says how it ended.

        Launchers end all ranks once one has left, some in half a minute, and rank 0 may have W&B to wait for.
        """
        until = time.monotonic() + self.LAST_WORD_S
        while not self.world.is_main and self.status().get("state") == "running" and time.monotonic() < until:
            time.sleep(0.1)

    def complete(self, steps: int, ended: str, samples: Sequence[Mapping[str, str]]) -> None:
        """Mark the run as done after so many updates, say why it ended, and print the table of before and after."""
        if not self.world.is_main:
            return
        path = self.path / "evaluation.json"
        evaluation = {**(read_json(path) or {}), "samples": list(samples)}
        write_json(path, evaluation)
        if len(evaluation) > 1:  # more than the samples, which are empty then
            self.say(before_after(evaluation))
        self.set_status("completed", step=steps, ended=ended)
        self.say(f"ended    {ended}")


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 and submitit's SIGUSR2 raise a flag that the loop looks at once a step; no handler saves anything."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    AGAIN_S = 1.0
    """The same signal again after this long means: now. (Launchers pass one Ctrl-C on as SIGINT and SIGTERM at once.)"""

    def __init__(self) -> None:
        self.asked = 0
        self._armed = False
        self._seen: dict[int, float] = {}
        for number in (*self.SIGNALS, signal.SIGUSR2):
            signal.signal(number, self._handle)
        lifeline.hold()

    def arm(self) -> None:
        """From now on the loop will look; before, a signal leaves at once, as there is nothing to save."""
        self._armed = True

    def disarm(self) -> None:
        self._armed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._armed:
            leave_at_once()
        if number in self._seen and now - self._seen[number] > self.AGAIN_S:
            leave_at_once()
        self._seen.setdefault(number, now)
        self.asked = number


def leave_at_once() -> None:
    lifeline.say(STOPPED)
    os._exit(STOPPED)


@contextmanager
def failures(world: World) -> Iterator[list[RunFolder]]:
    """Tell what went wrong once, from the rank where it began, and end this process with the documented exit code.

    Append the run folder to the list that it yields as soon as there is one: ranks find out there who failed first.
    """
    folders: list[RunFolder] = []
    try:
        yield folders
    except Stopped as stopped:
        for folder in folders:
            folder.wait_for_last_word()
            preempted = stopped.by in (signal.SIGUSR1, signal.SIGUSR2) and not lifeline.asked()
            folder.set_status("preempted" if preempted else "stopped", step=stopped.step)
        with suppress(OSError):  # whoever read it is gone
            if world.is_main:
                print(f"tunesmith: {stopped}", file=sys.stderr)
        leave(STOPPED)
    except OutOfMemory as short:
        try:
            print(f"tunesmith: rank {world.rank} ran out of memory: all ranks start again with half the micro-batch", file=sys.stderr)
            folders[0].restarts.begin_again(short)
        except Refusal as refusal:
            _tell(refusal, world, folders[0], "oom")
            leave(OUT_OF_MEMORY)
    except Refusal as refusal:
        if not world.is_main:
            time.sleep(3)  # rank 0 finds the same; speak only if it has not ended the job by now
        refuse(refusal)
    except Exception as error:
        state = "nan" if isinstance(error, FloatingPointError) else "failed"
        _tell(error, world, folders[0] if folders else None, state)
        leave(CODES[state])


def _tell(error: Exception, world: World, run: RunFolder | None, state: str) -> None:
    if run is not None:
        time.sleep(0.5 * (world.size > 1 and _looks_secondary(error)))
        if run.restarts.is_asked():
            run.restarts.replace_process()
        try:
            with (run.path / "first_error.txt").open("x") as file:
                file.write(f"rank {world.rank} on {world.node}\n{traceback.format_exc()}")
        except FileExistsError:
            time.sleep(0.2)  # ranks often fail in the same moment: what the first one writes may not be in its file yet
            first = (run.path / "first_error.txt").read_text().splitlines() or ["another rank"]
            print(f"tunesmith: rank {world.rank} ends because {first[0]} failed first", file=sys.stderr)
            return
        except OSError:
            pass  # the folder itself is the trouble: print below
        # Whoever was first writes, and so only one.
        RunFolder(run.path, World()).set_status(state, error=f"{type(error).__name__}: {error}", rank=world.rank, node=world.node)
    print(f"{traceback.format_exc()}\ntunesmith: rank {world.rank} failed: {type(error).__name__}: {error}", file=sys.stderr)


def _looks_secondary(error: Exception) -> bool:
    return any(word in str(error).lower() for word in ("peer", "connection", "timed out", "gloo", "nccl"))


def leave(code: int) -> None:
    """End the process now, with everything printed. Not sys.exit: a process group with a dead partner can hold the
    interpreter up for minutes, and gloo's threads were seen to abort its teardown after a good run (code 134)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it is gone
            stream.flush()
    lifeline.say(code)
    os._exit(code)


def refuse(refusal: Refusal) -> None:
    """Print a user's mistake without a traceback and leave with exit code 2."""
    text = str(refusal)
    print("tunesmith: " + (text if "\n" not in text else "this cannot run as asked:\n  " + text.replace("\n", "\n  ")), file=sys.stderr)
    leave(REFUSED)


def before_after(evaluation: Mapping[str, Any]) -> str:
    """The numbers before and after training, and the answers side by side, as plain text."""
    before, after = evaluation.get("before", {}), evaluation.get("after", {})
    lines = [f"{'held-out':24}{'before':>10}{'after':>10}"]
    for name in dict.fromkeys([*before, *after]):
        if "/" in name:
            lines.append(f"{name:24}{_shown(before.get(name)):>10}{_shown(after.get(name)):>10}")
    for row in evaluation.get("samples", []):
        said = [f"    {name:7}{_one_line(row[key])}" for name, key in (("wanted", "reference"), ("before", "before"), ("after", "after"))]
        lines += ["", f"  {row['prompt']}", *said]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."


def checkpoint_gib(plan: Plan, config: Config) -> float:
    """Disk that the kept checkpoints, the one being written and the result need, GiB."""
    each, result = plan.disk
    return each * (config.train.keep + 1 + (config.train.patience > 0)) + result  # the best one may be older than those kept


def as_mapping(config: Config) -> dict[str, Any]:
    """The config as plain nested mappings with enums by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value.name if isinstance(value, Enum) else value

    return plain(dataclasses.asdict(config))  # type: ignore[no-any-return]


def plan_record(plan: Plan) -> dict[str, Any]:
    """The plan's simple values for plan.json."""
    simple = {
        key: value
        for key, value in vars(plan).items()
        if isinstance(value, str | int | float | bool) or key in ("memory", "notes", "deepspeed")
    }
    kept = {path: value for path, value in leaves(plan.config) if path in KEPT}
    return {**simple, "memory": dict(plan.memory), "kept": kept, "describe": describe(plan)}


def command_line(world: World) -> str:
    """The command that was typed, as far as a rank can tell from what its launcher leaves in the environment."""
    env, ranks = os.environ, world.size
    if "CROSS_RANK" in env:
        launcher = ["deepspeed", "--num_accelerators", str(ranks)]
    elif "ACCELERATE_MIXED_PRECISION" in env:
        launcher = ["accelerate", "launch", "--num_processes", str(ranks)]
    elif "TORCHELASTIC_RUN_ID" in env:
        launcher = ["torchrun", f"--nproc-per-node={world.local_size}"]
    else:
        launcher = ["python"]
    return shlex.join([*launcher, *sys.argv])


def environment(world: World) -> dict[str, Any]:
    """Versions, machine and commit, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "node": world.node,
        "job": world.job,
        "world_size": world.size,
        "commit": os.environ.get("TUNESMITH_COMMIT") or git.stdout.strip(),  # a queued job runs from a copy
    }
