"""Sweeps: sweep words become trials, all are checked before the first one starts, and one that fails keeps none from running.

A trial is a run like any other, in the folder that follows from its settings. So a sweep is resumed by typing it again: what is
complete is not run again, and what was stopped goes on.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from launcher.watch import HERE, free_port
from tunesmith.compose import CONF, compose, explain
from tunesmith.config import Config, Refusal
from tunesmith.doctor.inputs import data_findings
from tunesmith.hardware import Machine
from tunesmith.lifeline import VARIABLE, Lifeline
from tunesmith.metrics import read_metrics
from tunesmith.plan import Plan, make_plan
from tunesmith.records import read_json
from tunesmith.run import COMPLETED, FAILED, REFUSED, STOPPED, RunFolder, StopSignal, TrialFailed, leave
from tunesmith.world import World

ROOT = Path(__file__).resolve().parents[1]
POLL_S = 0.2
Command = Callable[[Sequence[str], int], list[str]]
"""From the words of a trial, and a port, to the command that starts all its ranks."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    words: list[str]
    """All words for train.py."""
    changed: list[str]
    """Those that not every trial has."""
    plan: Plan
    config: Config

    @property
    def run(self) -> RunFolder:
        return RunFolder.of(self.config, self.plan.run_id, World())

    @property
    def said(self) -> str:
        """What makes it this trial."""
        return " ".join(self.changed) or " ".join(self.words)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    state: str
    """completed, pruned (of a search), stopped, refused, oom, nan, killed, failed, or not started."""
    why: str = ""
    loss: float | None = None
    """Held-out loss of a completed run's result, or of a pruned one where it was stopped, nats a target token."""


# --- from words to trials ------------------------------------------------------------------------------------------


def parsed(words: Sequence[str]) -> list[Override]:
    """The words as Hydra reads them, globs over config groups among them; raises Refusal explaining every mistake."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides(list(words))
    except HydraException as error:
        raise Refusal(explain(error, words)) from None


def trials(words: Sequence[str]) -> list[list[str]]:
    """The words of each trial, in the order of Hydra's own -m: every combination of choices (a,b), ranges and globs.

    Words without any are one trial, as they are. Raises Refusal for words that Hydra does not understand.
    """
    overrides = parsed(words)
    if endless := [str(one.input_line) for one in overrides if one.is_sweep_override() and not one.is_discrete_sweep()]:
        raise Refusal(f"override {endless[0]}: an interval has no end of values — type the values, a,b,c, or range(1,4), or --search 20")
    if not any(one.is_sweep_override() for one in overrides):
        return [list(words)]
    (found,) = BasicSweeper.split_arguments(overrides, None)
    if not found:
        raise Refusal(f"{shlex.join(words)}: a sweep over nothing — its glob or range is empty")
    return found


def plan_trials(sweep: Sequence[Sequence[str]], machine: Machine, ranks: int) -> list[Trial]:
    """Compose, type, plan and check every trial, without torch; raises Refusal naming all that is wrong with all of them."""
    common = set(sweep[0]).intersection(*sweep)
    planned: list[Trial] = []
    wrong: dict[str, list[int]] = {}
    looked_at: dict[str, list[str]] = {}
    same: dict[Path, int] = {}
    for number, words in enumerate(sweep, start=1):
        try:
            config = compose(words)
            trial = Trial(list(words), [word for word in words if word not in common], make_plan(config, machine, ranks), config)
        except Refusal as refusal:
            for line in str(refusal).splitlines():
                wrong.setdefault(line, []).append(number)
            continue
        key = str(config.data)
        if key not in looked_at:  # files are looked at once, however many trials read them
            looked_at[key] = [f"{found.fact} — {found.fix}" for found in data_findings(config, list(words)) if found.verdict == "fail"]
        for line in looked_at[key]:
            wrong.setdefault(line, []).append(number)
        if (first := same.setdefault(trial.run.path, number)) != number:
            line = f"the same run as trial {first}, as {trial.said} changes nothing of the result — leave it out, or add name="
            wrong.setdefault(line, []).append(number)
        planned.append(trial)
    if wrong and len(sweep) == 1:
        raise Refusal("\n".join(wrong))
    if wrong:
        raise Refusal("\n".join(f"{_numbers(numbers, len(sweep))}: {line}" for line, numbers in wrong.items()))
    return planned


def _numbers(numbers: Sequence[int], of: int) -> str:
    if len(numbers) == of:
        return f"all {of} trials"
    return f"trial{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:8]))}{', ...' * (len(numbers) > 8)} of {of}"


def outline(planned: Sequence[Trial]) -> str:
    """A line for each trial: what makes it so, its run folder, memory and time."""
    lines = []
    width = max(len(trial.said) for trial in planned)
    for number, trial in enumerate(planned, start=1):
        plan = trial.plan
        limit = f" of {plan.memory_limit_gib:.1f}" if plan.memory_limit_gib else ""
        hours = f"  {plan.hours:.3g} h" if plan.hours else ""
        done = "  complete" if trial.run.status().get("state") == "completed" else ""
        memory = f"{plan.memory_gib:.2f}{limit} GiB a rank"
        lines.append(f"trial {number:<3} {trial.said:{width}}  {plan.name}/{plan.run_id}  {memory}{hours}{done}")
    return "\n".join(lines)


# --- one trial -----------------------------------------------------------------------------------------------------


class Stop:
    """SIGTERM, SIGINT and SIGUSR1 to a sweep: the trial at work saves and stops, and none follows."""

    def __init__(self) -> None:
        self.times = 0
        for number in StopSignal.SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.times += 1


def run_trial(
    trial: Trial,
    command: Sequence[str],
    stop: Stop,
    *,
    hopeless: Callable[[], str] = lambda: "",
    extra: Mapping[str, str] | None = None,
    output: IO[str] | None = None,
) -> Outcome:
    """Start a trial's ranks in processes of their own, wait for their end and say what became of it.

    hopeless: asked again and again, says why the trial is not worth going on with (empty: it is); the trial then saves and stops as it
    would for anybody, and its status says why. extra: environment variables; output: where what the ranks say goes (None: here).
    In processes of its own nothing of one trial is left for the next: process group, a library's state, a card's memory; and a trial that
    dies takes none along.
    """
    run = trial.run
    before = run.status()
    if before.get("state") == "completed":
        return Outcome("completed", "was complete", held_out_loss(trial))
    line = Lifeline(HERE, lambda lost: None)  # which ends the other ranks, and with them their launcher
    env = {**os.environ, **(extra or {}), VARIABLE: line.place}
    # A group of its own: Ctrl-C reaches the ranks through the lifeline, once.
    process = subprocess.Popen(command, env=env, stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True)
    told, pruned = 0, ""
    while True:
        try:
            code = process.wait(POLL_S)
            break
        except subprocess.TimeoutExpired:
            pass
        except BaseException:  # how submitit ends a job that is preempted or out of time, from its handler of a signal
            line.save_and_stop()
            process.wait()
            raise
        if stop.times > told:
            if told:  # asked again: now
                line.end()
            else:
                line.save_and_stop()
            told = stop.times
        elif not pruned and not told and (pruned := hopeless()):
            line.save_and_stop()
    line.end()
    state, why = classified(code, before, run.status(), first_error(run.path), asked=bool(told))
    if pruned and state in ("stopped", "killed"):  # with its training done it leaves at once, and a launcher may call that what it likes
        return pruned_at(trial, pruned)
    return Outcome(state, why, held_out_loss(trial) if state == "completed" else None)


def pruned_at(trial: Trial, why: str) -> Outcome:
    """A trial that was stopped because it is not worth going on with; its run says so to whoever looks at it later."""
    trial.run.set_status("stopped", reason=f"pruned: {why}")
    losses = held_out_losses(trial.run.path)
    return Outcome("pruned", why, losses[-1] if losses else None)


def first_error(run: Path) -> str:
    """What the rank that failed first said last; empty if none did. Its launcher may end rank 0 before that has written the status."""
    path = run / "first_error.txt"
    return path.read_text("utf-8").rstrip().rpartition("\n")[2] if path.exists() else ""


def classified(
    code: int, before: Mapping[str, Any], after: Mapping[str, Any], first: str = "", *, asked: bool = False
) -> tuple[str, str]:
    """(state, why) of a trial by its exit code, its status before and after, the first rank's error, and whether it was asked to stop.

    The status comes before the exit code, which launchers change: torchrun's is 1 whatever a rank leaves with.
    """
    state = after.get("state")
    if after == before:  # it never came to its run folder
        if code == REFUSED:
            return "refused", "see above"
        return ("stopped", "before it began") if asked or code == STOPPED else ("failed", f"exit code {code} before it began")
    if state == "completed":
        return "completed", str(after.get("ended", ""))
    if state in ("stopped", "preempted"):
        return "stopped", f"at step {after.get('step')}"
    if state in ("oom", "nan", "failed"):
        return state, str(after.get("error", ""))
    if first:  # of the rank that failed first, whose launcher ended it before it could write the status
        return ("nan" if first.startswith("FloatingPointError") else "failed"), first
    return ("refused", "see above") if code == REFUSED else ("killed", f"exit code {code}, without a last word; its checkpoints are there")


def held_out_loss(trial: Trial) -> float | None:
    """The loss on held-out conversations of what a run left; None where it has none."""
    found = (read_json(trial.run.path / "evaluation.json") or {}).get("after", {})
    if "dev/loss" in found:
        return float(found["dev/loss"])
    losses = held_out_losses(trial.run.path)
    return (min(losses) if trial.config.train.patience else losses[-1]) if losses else None  # with patience the best weights are the result


def held_out_losses(run: Path) -> list[float]:
    """Every held-out loss during training, in order of steps."""
    return [row["dev/loss"] for row in read_metrics(run / "metrics.jsonl") if "dev/loss" in row]


def run_in_child(config: Config, words: Sequence[str], machine: Machine) -> float:
    """A trial of `train.py -m`, with one rank in a process of its own; its held-out loss, nan if it has none, for Hydra's sweepers.

    Raises TrialFailed, and ends the whole sweep with 75 if it was stopped; Refusal if the plan says no.
    """
    trial = Trial(list(words), list(words), make_plan(config, machine, 1), config)
    stop = Stop()
    outcome = run_trial(trial, [sys.executable, str(ROOT / "train.py"), *words], stop)
    if stop.times:
        leave(STOPPED)
    if outcome.state != "completed":
        print(f"tunesmith: {trial.said}: {in_words(outcome)}", file=sys.stderr, flush=True)
        raise TrialFailed(f"{trial.said}: {in_words(outcome)}")
    return math.nan if outcome.loss is None else outcome.loss


# --- all of them ---------------------------------------------------------------------------------------------------


def run_sweep(planned: Sequence[Trial], command: Command) -> int:
    """Run trials one after the other, print the table, and return the exit code: 0 if all are completed, 75 if it was stopped, else 1."""
    stop = Stop()
    outcomes: list[Outcome] = []
    for number, trial in enumerate(planned, start=1):
        if stop.times:
            outcomes.append(Outcome("not started"))
            continue
        full = command(trial.words, free_port(29500))
        print(f"\ntrial {number} of {len(planned)}: {trial.said}\n{shlex.join(full)}", flush=True)
        outcomes.append(run_trial(trial, full, stop))
        print(f"trial {number} of {len(planned)}: {in_words(outcomes[-1])}", flush=True)
    print(f"\n{table(planned, outcomes)}", flush=True)
    return exit_code(outcomes, stop)


def exit_code(outcomes: Sequence[Outcome], stop: Stop) -> int:
    """What a sweep leaves with."""
    states = {outcome.state for outcome in outcomes}
    if stop.times and states & {"stopped", "not started"}:
        print("tunesmith: the sweep was stopped — the same command goes on")
        return STOPPED
    return COMPLETED if states <= {"completed"} else FAILED


def table(planned: Sequence[Trial], outcomes: Sequence[Outcome]) -> str:
    """What became of each trial, and the best by held-out loss."""
    losses = {index: one.loss for index, one in enumerate(outcomes) if one.state == "completed" and one.loss is not None}
    best = min(losses, key=lambda index: losses[index], default=None)
    width = max(5, *(len(trial.said) for trial in planned))
    lines = [f"  {'trial':>5}  {'':{width}}  {'dev/loss':>9}  {'state':13}  run"]
    for index, (trial, one) in enumerate(zip(planned, outcomes, strict=True)):
        shown = "" if one.loss is None else f"{one.loss:.4f}"
        mark = "*" if index == best else " "
        lines.append(f"{mark} {index + 1:>5}  {trial.said:{width}}  {shown:>9}  {one.state:13}  {trial.run.path}")
    lines += [f"trial {index + 1}: {in_words(one)}" for index, one in enumerate(outcomes) if one.state not in ("completed", "not started")]
    if best is not None:
        lines.append(f"best     trial {best + 1} with dev/loss {losses[best]:.4f}: {planned[best].said}")
    elif any(one.state == "completed" for one in outcomes):
        lines.append("best     not known without a held-out loss: set data.dev")
    return "\n".join(lines)


def in_words(outcome: Outcome) -> str:
    """State, loss and reason."""
    loss = f"dev/loss {outcome.loss:.4f}" if outcome.loss is not None else ""
    return ", ".join(part for part in (outcome.state, loss, outcome.why) if part)
