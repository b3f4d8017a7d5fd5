"""Searches: Optuna proposes trials one after another (TPE), and those that fall behind are stopped on the way (successive halving).

A trial is a run like any other, as in a sweep. What was tried, and what came of it, is in a journal in the search's folder, so the same
command goes on where it was: what has ended is not run again, and what was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import sys
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import optuna
from filelock import FileLock, Timeout
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from launcher.space import Space, space_of
from launcher.sweep import POLL_S, Outcome, Stop, Trial, in_words, plan_trials, pruned_at, run_trial
from launcher.watch import free_port
from tunesmith.compare.runs import is_locked
from tunesmith.config import Config, Refusal
from tunesmith.hardware import Machine
from tunesmith.metrics import read_metrics
from tunesmith.records import read_json, write_text
from tunesmith.run import COMPLETED, FAILED, STOPPED

Command = Callable[[Sequence[str], int], list[str]]
WHOLE = 1000
"""What the pruner counts a whole run as: by shares of it, as runs of one search may differ in steps."""
BEST_OF = 3
"""One of so many trials goes on at each rung, and the next rung is so many times as far."""
FIRST_RUNG = WHOLE // BEST_OF**2
TAIL = 64 * 1024
"""Bytes at the end of metrics.jsonl that are new since the last look, with room to spare."""
AT_RANDOM_AFTER, MOST_PROPOSALS = 10, 1000
"""TPE may propose what was tried already so often in a row, then any point is taken that was not."""
STARTUP = 10
"""Trials at random before TPE learns from them, at most; a third of a short search."""
NOT_OF_HELD_OUT = ("train", "batching", "streaming", "workers", "cache", "prepare_train")
"""What of the data does not change which held-out tokens are predicted after which."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a search beside its words."""

    trials: int
    parallel: int = 1
    seed: int = 0
    prune: bool = True


# --- before the first trial ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A search that can go as asked."""

    space: Space
    asked: Asked
    machine: Machine
    """What each trial has of this machine."""
    ranks: int
    corners: list[Trial]

    @property
    def largest(self) -> Trial:
        """The corner that needs the most memory."""
        return max(self.corners, key=lambda trial: trial.plan.memory_gib)

    @property
    def folder(self) -> Path:
        """Follows from the space, the seed and what every trial has; the number of trials may grow."""
        first = self.corners[0]
        what = [first.plan.run_id, self.asked.seed, *(f"{key}: {among!r}" for key, among in self.space.ranges.items())]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
        return Path(first.config.outputs) / first.config.name / f"search-{digest}"

    def trial(self, words: Sequence[str], changed: Sequence[str]) -> Trial:
        """A trial, planned; raises Refusal if it cannot go."""
        return replace(plan_trials([words], self.machine, self.ranks)[0], changed=list(changed))

    def describe(self) -> str:
        """What will be searched, how, and where."""
        asked, plan = self.asked, self.largest.plan
        pruned = f"one of {BEST_OF} goes on at a ninth and at a third of the way" if asked.prune else "nothing is pruned"
        beside = f", {asked.parallel} at a time" if asked.parallel > 1 else ""
        limit = f" of {plan.memory_limit_gib:.1f}" if plan.memory_limit_gib else ""
        hours = max(trial.plan.hours for trial in self.corners)
        time = f", {hours:.3g} h a trial at most" if hours else ""
        (first, *more) = self.space.describe().splitlines()
        return "\n".join(
            [
                f"search   {asked.trials} trials by TPE (seed {asked.seed}), {pruned}{beside}",
                f"space    {first}",
                *(f"         {line}" for line in more),
                f"corners  {len(self.corners)} planned: {plan.memory_gib:.2f}{limit} GiB a rank at most{time}",
                f"folder   {self.folder}",
            ]
        )


def check(words: Sequence[str], asked: Asked, machine: Machine, ranks: int) -> Checked:
    """Plan the corners of the space, without torch; raises Refusal naming what is wrong with any of them."""
    space = space_of(words)
    if space.size <= asked.trials:
        raise Refusal(f"--search {asked.trials}: these words are {space.size:.0f} runs in all — leave --search out, and each is run")
    corners, wrong = [], dict[str, list[str]]()
    several = space.corners()
    for point in several:
        try:
            (trial,) = plan_trials([space.at(point)], machine, ranks)
            corners.append(replace(trial, changed=space.changed(point)))
        except Refusal as refusal:
            for line in str(refusal).splitlines():
                wrong.setdefault(line, []).append(" ".join(space.changed(point)))
    if wrong:
        raise Refusal("\n".join(f"{_where(places, len(several))}{line}" for line, places in wrong.items()))
    if problems := [*_same_runs(space, corners), *_held_out_problems(corners, asked.prune)]:
        raise Refusal("\n".join(problems))
    return Checked(space, asked, machine, ranks, corners)


def _where(places: Sequence[str], of: int) -> str:
    if len(places) == of:
        return ""
    more = f" and at {len(places) - 1} more corner{'s' * (len(places) > 2)}" if len(places) > 1 else ""
    return f"at {places[0]}{more}: "


def _same_runs(space: Space, corners: Sequence[Trial]) -> list[str]:
    """Settings that change nothing of the result, so that all their values would be one run."""
    first, *others = corners
    runs: dict[str, set[Path]] = {}
    for trial in others:
        differing = [word.split("=")[0] for word, other in zip(trial.changed, first.changed, strict=True) if word != other]
        if len(differing) == 1:
            runs.setdefault(differing[0], set()).add(trial.run.path)
    return [
        f"{key}: its values change nothing of the result — leave it out of the search"
        for key in space.ranges
        if runs.get(key) == {first.run.path}
    ]


def _held_out_problems(corners: Sequence[Trial], prune: bool) -> list[str]:
    """Why the trials could not be judged by their held-out losses."""
    found: dict[str, None] = {}
    for trial in corners:
        train, steps = trial.config.train, trial.plan.steps
        if not trial.config.data.dev:
            found["data.dev: empty, and a search goes by the held-out loss — type data.dev= a file of held-out conversations"] = None
        elif prune and (train.eval_every == 0 or 0 < steps <= train.eval_every):
            of, every = (f" of {steps} steps", max(1, steps // BEST_OF**2)) if steps else ("", 50)
            advice = f"type train.eval_every={every}, or --no-prune"
            found[f"train.eval_every={train.eval_every}{of}: no held-out loss on the way to prune by — {advice}"] = None
    if len({_judged_by(trial.config) for trial in corners}) > 1:
        found[
            "the trials differ in model, template or held-out conversations: their losses do not compare — search over other settings"
        ] = None
    return list(found)


def _judged_by(config: Config) -> str:
    held_out = {key: value for key, value in asdict(config.data).items() if key not in NOT_OF_HELD_OUT}
    return f"{config.model.path} {held_out}"


def share_of(machine: Machine, parallel: int) -> Machine:
    """What one of several trials that run side by side has of a machine; raises Refusal if there are fewer cards."""
    cards = len(machine.device_names)
    if 0 < cards < parallel:
        raise Refusal(
            f"--parallel {parallel}: this machine has {cards} card{'s' * (cards > 1)}, a trial needs one — type --parallel {cards}"
        )
    each = cards // parallel
    return replace(
        machine, cores=max(1, machine.cores // parallel), ram_gib=machine.ram_gib / parallel,
        device_names=machine.device_names[:each], memory_gib=machine.memory_gib[:each],
    )  # fmt: skip


# --- what was tried ------------------------------------------------------------------------------------------------

ENDED = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
"""How an end is told to Optuna; every other one is a failure, from which it learns nothing. `stopped` is no end."""


class Study:
    """What was tried in a search and what came of it, in a journal that the next start of the same command reads."""

    def __init__(self, folder: Path, space: Space, asked: Asked):
        """Open the journal, or begin one. What an earlier start left at work is begun first; so is what failed, but for a loss that was
        not finite, which is an answer."""
        self.space, self.asked = space, asked
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = folder / "journal.log"
        _mend(journal)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        pruner = SuccessiveHalvingPruner(min_resource=FIRST_RUNG, reduction_factor=BEST_OF)
        self._optuna = optuna.create_study(storage=storage, pruner=pruner, study_name=folder.name, load_if_exists=True)
        self.tried: dict[tuple[str, ...], Outcome | None] = {}
        """What became of each trial by its words, in the order in which they were first proposed; None: not yet known."""
        latest: dict[tuple[str, ...], FrozenTrial] = {}
        for trial in self._optuna.get_trials(deepcopy=False):
            if len(trial.params) == len(space.ranges) and not trial.user_attrs.get("tried before"):
                latest[tuple(space.changed(trial.params))] = trial
        self._left = []
        for changed, trial in latest.items():
            self.tried[changed] = told(trial)
            if trial.state is TrialState.RUNNING:
                self._left.append(optuna.Trial(self._optuna, trial._trial_id))
            elif trial.state is TrialState.FAIL and trial.user_attrs.get("state") != "nan":
                self.tried[changed] = None
                self._optuna.enqueue_trial(trial.params)
                self._left.append(self._ask())

    def propose(self) -> optuna.Trial | None:
        """The next trial, or None when there are as many as asked for."""
        if self._left:
            return self._left.pop(0)
        if len(self.tried) >= self.asked.trials:
            return None
        for proposals in range(MOST_PROPOSALS):
            trial = self._ask(at_random=proposals >= AT_RANDOM_AFTER)
            changed = tuple(self.space.changed(trial.params))
            if changed not in self.tried:
                self.tried[changed] = None
                return trial
            trial.set_user_attr("tried before", True)
            self._optuna.tell(trial, state=TrialState.FAIL)
        return None

    def _ask(self, at_random: bool = False) -> optuna.Trial:
        # A seed for each proposal, so that a search that was interrupted goes on as one that was not.
        seed = zlib.crc32(f"{self.asked.seed} {len(self._optuna.get_trials(deepcopy=False))}".encode())
        startup = min(STARTUP, math.ceil(self.asked.trials / 3))
        self._optuna.sampler = RandomSampler(seed) if at_random else TPESampler(seed=seed, n_startup_trials=startup)
        return self._optuna.ask(dict(self.space.ranges))

    def tell(self, trial: optuna.Trial, outcome: Outcome) -> None:
        """Take down how a trial ended; one that was stopped has not ended."""
        self.tried[tuple(self.space.changed(trial.params))] = outcome
        if outcome.state in ("stopped", "not started"):
            return
        for name, value in asdict(outcome).items():
            trial.set_user_attr(name, value)
        state = ENDED.get(outcome.state, TrialState.FAIL)
        self._optuna.tell(trial, outcome.loss if state is TrialState.COMPLETE else None, state=state)

    def number(self, trial: optuna.Trial) -> int:
        """Counted from 1, in the order in which trials were first proposed."""
        return list(self.tried).index(tuple(self.space.changed(trial.params))) + 1


def told(trial: FrozenTrial) -> Outcome | None:
    """What the journal knows of a trial's end."""
    known = trial.user_attrs
    return Outcome(known["state"], known.get("why", ""), known.get("loss")) if trial.state.is_finished() and "state" in known else None


def _mend(journal: Path) -> None:
    """Take away what a kill has left: half a line, which would make all that follows unreadable, and the lock of each write."""
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    if journal.exists() and (text := journal.read_bytes()) and not text.endswith(b"\n"):
        os.truncate(journal, text.rfind(b"\n") + 1)


class Curve:
    """The held-out losses of a run as they come, and what they say of its chances."""

    def __init__(self, run: Path, trial: optuna.Trial, prune: bool):
        self._run, self._trial, self._prune = run, trial, prune
        self._size = 0
        known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        self._told = set(known)
        self._why = ""
        if (
            prune and known and (last := max(known)) < WHOLE and trial.should_prune()
        ):  # it had fallen behind before this command was stopped
            self._why = f"{last / WHOLE:.0%} of the way: dev/loss {known[last]:.4f} is not in the best third"

    def look(self) -> str:
        """Tell Optuna what is new; why the run is not worth going on with, empty if it is."""
        path = self._run / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size == self._size or self._why:
            return self._why
        rows, self._size = read_metrics(path, TAIL if self._size else 0), size
        steps = (read_json(self._run / "status.json") or {}).get("steps") or 0
        for row in rows:
            if "dev/loss" in row and steps:
                self._see(row["step"], steps, row["dev/loss"])
        return self._why

    def _see(self, step: int, steps: int, loss: float) -> None:
        share = WHOLE * step // steps
        if self._why or share in self._told:  # once it is judged, what comes later must not count at the rung where it was
            return
        self._told.add(share)
        self._trial.report(loss, share)
        if self._prune and step < steps and self._trial.should_prune():
            self._why = f"step {step} of {steps}: dev/loss {loss:.4f} is not in the best third"


# --- all of them ---------------------------------------------------------------------------------------------------


def run_search(search: Checked, command: Command) -> int:
    """Run trials until there are as many as asked for, print the table, and give the exit code: 75 if it was stopped, 1 if a trial
    failed, else 0; a pruned trial and one whose loss was not finite are answers, as long as one is completed."""
    folder, asked = search.folder, search.asked
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(str(folder / "lock"), timeout=0))
        except Timeout:
            raise Refusal(
                f"{folder}: another process is at work on this very search — wait for it, or type --seed {asked.seed + 1}"
            ) from None
        study = Study(folder, search.space, asked)
        write_text(folder / "command.txt", shlex.join(["python", "-m", "launcher", *sys.argv[1:]]) + "\n")
        stop = Stop()
        one_at_a_time = threading.Lock()
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(asked.parallel):
            slots.put(slot)

        def work() -> None:
            slot = slots.get()
            while not stop.times:
                with one_at_a_time:
                    trial = study.propose()
                if trial is None:
                    return
                outcome = _run(search, study, trial, command, stop, slot)
                with one_at_a_time:
                    study.tell(trial, outcome)
                print(f"trial {study.number(trial)} of {asked.trials}: {in_words(outcome)}", flush=True)

        with ThreadPoolExecutor(asked.parallel) as pool:
            working = [pool.submit(work) for _ in range(asked.parallel)]
            while wait(working, POLL_S).not_done:  # a signal that another thread takes is seen here, and nowhere if this one slept on
                pass
            for one in working:
                one.result()
        print(f"\n{table(search, study.tried)}", flush=True)
        return exit_code(list(study.tried.values()), asked.trials, stop)


def _run(search: Checked, study: Study, proposed: optuna.Trial, command: Command, stop: Stop, slot: int) -> Outcome:
    """One trial, from its words to its end."""
    changed, number, beside = search.space.changed(proposed.params), study.number(proposed), search.asked.parallel > 1
    head = f"trial {number} of {search.asked.trials}: {' '.join(changed)}"
    try:
        trial = search.trial(search.space.at(proposed.params), changed)
    except Refusal as refusal:
        print(f"\n{head}", flush=True)
        return Outcome("refused", "; ".join(str(refusal).splitlines()))
    run, curve = trial.run, Curve(trial.run.path, proposed, search.asked.prune)
    over = run.status().get("state") == "completed" or is_locked(run.path)
    if not over and (why := curve.look()):
        print(f"\n{head}", flush=True)
        _link(search.folder / str(number), run.path)
        return pruned_at(trial, why)
    full = command(trial.words, free_port(29500 + 20 * slot))
    extra = cards_of(slot, len(search.machine.device_names)) if beside else {}
    with ExitStack() as held:
        output = held.enter_context((search.folder / f"{number}.log").open("a")) if beside else None
        print(f"\n{head}\n{shlex.join(full)}{f' >> {output.name}' if output else ''}", flush=True)
        outcome = run_trial(trial, full, stop, hopeless=curve.look, extra=extra, output=output)
    curve.look()
    _link(search.folder / str(number), run.path)
    if outcome.state == "completed" and (outcome.loss is None or not math.isfinite(outcome.loss)):
        return Outcome("nan", f"held-out loss {outcome.loss}")
    return outcome


def cards_of(slot: int, each: int) -> dict[str, str]:
    """The variable that shows trials side by side a part of the machine's cards each; nothing where there are none."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    numbers = range(slot * each, (slot + 1) * each)
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[number] if visible else str(number) for number in numbers)} if each else {}


def _link(link: Path, run: Path) -> None:
    """Name a run by its trial's number in the search's folder, so that all of them can be named by that."""
    if run.is_dir() and not link.is_symlink():
        link.symlink_to(os.path.relpath(run, link.parent))


def exit_code(outcomes: Sequence[Outcome | None], of: int, stop: Stop) -> int:
    """What a search of so many trials leaves with."""
    states = {outcome.state if outcome else "not started" for outcome in outcomes}
    if stop.times and (len(outcomes) < of or states & {"not started", "stopped"}):
        print("tunesmith: the search was stopped — the same command goes on")
        return STOPPED
    return COMPLETED if "completed" in states and states <= {"completed", "pruned", "nan"} else FAILED


def table(search: Checked, tried: Mapping[tuple[str, ...], Outcome | None]) -> str:
    """What became of each trial, the best first, and what to type with the best."""
    numbered = [(number, changed, one or Outcome("not started")) for number, (changed, one) in enumerate(tried.items(), start=1)]
    place = {"completed": 0, "pruned": 1}
    numbered.sort(key=lambda row: (place.get(row[2].state, 2), math.inf if row[2].loss is None else row[2].loss, row[0]))
    width = max(5, *(len(" ".join(changed)) for _, changed, _ in numbered)) if numbered else 5
    lines = [f"{'trial':>5}  {'':{width}}  {'dev/loss':>9}  {'state':13}  run"]
    for number, changed, one in numbered:
        shown, link = "" if one.loss is None else f"{one.loss:.4f}", search.folder / str(number)
        run = os.path.normpath(link.parent / link.readlink()) if link.is_symlink() else ""
        lines.append(f"{number:>5}  {' '.join(changed):{width}}  {shown:>9}  {one.state:13}  {run}".rstrip())
    lines += [f"trial {number}: {in_words(one)}" for number, _, one in numbered if one.state not in ("completed", "not started", "pruned")]
    if len(tried) < search.asked.trials and all(tried.values()):
        lines.append(f"only {len(tried)} of {search.asked.trials}: no more was found that was not tried")
    if numbered and numbered[0][2].state == "completed":
        number, changed, one = numbered[0]
        values = dict(word.split("=", 1) for word in changed)
        words = [f"{word}={values[word]}" if word in values else word for word in search.space.words]
        seeds = [word for word in words if not word.startswith("train.seed=")] + ["train.seed=1,2,3"]
        ranks = ["--ranks", str(search.ranks)] if search.ranks > 1 else []
        lines += [
            f"best     trial {number} with dev/loss {one.loss:.4f}: {' '.join(changed)}",
            f"type     {shlex.join(['python', '-m', 'launcher', *seeds, *ranks])}   # how much of it is chance",
            f"compare  tunesmith compare {search.folder} --html search.html   # curves, and which settings mattered",
        ]
    return "\n".join(lines)
