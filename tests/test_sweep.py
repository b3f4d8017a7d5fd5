"""Sweeps: trials as Hydra makes them, checked all at once, run under real launchers, and typed again; what `wandb sweep` is given."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launcher.job import newest_step
from launcher.sweep import Outcome, classified, plan_trials, table, trials
from tests.conftest import ROOT, environment
from tunesmith.compose import choices, compose
from tunesmith.config import Refusal
from tunesmith.hardware import Machine
from tunesmith.metrics import read_metrics
from tunesmith.run import RunFolder
from tunesmith.world import World

QUIET = ["engine=accelerate", "eval.before=false", "eval.after=false"]
SMALL = Machine(kind="cpu", cores=2, ram_gib=16.0)
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


def states(outputs: Path) -> dict[Path, str]:
    """State of each run by its folder."""
    return {path.parent: json.loads(path.read_text())["state"] for path in outputs.glob("*/*/status.json")}


# --- words, checks -------------------------------------------------------------------------------------------------


def test_trials_are_those_of_hydra() -> None:
    assert trials(["+exp=lora_cpu", "optim.lr=1e-3"]) == [["+exp=lora_cpu", "optim.lr=1e-3"]], "as they are"
    assert trials(["+exp=lora_cpu", "optim.lr=1e-4,2e-4", "method.r=range(8,25,8)"]) == [
        ["+exp=lora_cpu", f"optim.lr={lr}", f"method.r={r}"] for lr in (0.0001, 0.0002) for r in (8, 16, 24)
    ]
    assert trials(["+exp=lora_cpu", "method.kind=choice(lora,full)"])[1][1] == "method.kind=full"
    assert trials(["name=a", "method=glob(*,exclude=lora*)"]) == [
        ["name=a", f"method={method}"] for method in choices("method") if not method.startswith("lora")
    ]
    assert len(trials(["+exp=lora_cpu", "method.targets=[q_proj],[q_proj,v_proj]"])) == 2, "a comma in a list is none between values"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optim.lr=interval(1e-5,1e-3)"], r"override optim\.lr=interval.*no end of values — type the values"),
        (["optim.lr=1e-4,2e-4,"], r"override optim\.lr=1e-4,2e-4,: "),
        (["method=glob(zzz*)"], r"a sweep over nothing"),
    ],
)
def test_words_that_are_no_sweep(words: list[str], says: str) -> None:
    with pytest.raises(Refusal, match=says):
        trials(["+exp=lora_cpu", *words])


def test_all_that_is_wrong_is_said_before_the_first_trial(overrides: list[str], tmp_path: Path) -> None:
    def problems(*words: str) -> list[str]:
        with pytest.raises(Refusal) as refusal:
            plan_trials(trials([*overrides, *words]), SMALL, 1)
        return str(refusal.value).splitlines()

    found = problems("optim.lr=1e-3,0.001,-2,1e-2", "method.r=4,0")
    assert found[0].startswith("trials 2, 4, 6, 8 of 8: method.r=0: must be at least 1")
    assert "trial 3 of 8: the same run as trial 1" in found[1]
    assert found[2].startswith("trials 5, 6 of 8: optim.lr=-2.0: must be above 0")
    assert len(found) == 3
    (found_line,) = problems("data.train=absent.json", "train.seed=1,2")
    assert found_line.startswith("all 2 trials: ") and "absent.json: no such file" in found_line
    (found_line,) = problems("optim.lrr=1")
    assert found_line.startswith("override optim.lrr=1: optim.lrr: no such key"), "one run has no number"
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("code", "before", "after", "first", "state"),
    [
        (0, {}, {"state": "completed"}, "", "completed"),
        (2, {}, {}, "", "refused"),
        (2, {"state": "failed", "error": "old"}, {"state": "failed", "error": "old"}, "", "refused"),
        (1, {"state": "failed", "error": "old"}, {"state": "failed", "error": "old"}, "", "failed"),
        (75, {}, {}, "", "stopped"),
        (1, {}, {"state": "stopped", "step": 3}, "", "stopped"),
        (1, {}, {"state": "nan", "error": "FloatingPointError: step 2: loss nan"}, "", "nan"),
        (1, {}, {"state": "running"}, "FloatingPointError: step 2: loss nan", "nan"),
        (1, {}, {"state": "oom", "error": "Refusal: rank 0 ran out of memory in step 1 (forward)"}, "", "oom"),
        (1, {}, {"state": "failed", "error": "KeyError: 'x'"}, "", "failed"),
        (137, {}, {"state": "running"}, "", "killed"),
        (2, {"state": "stopped"}, {"state": "running"}, "", "refused"),
    ],
)
def test_how_a_trial_ended(code: int, before: dict[str, Any], after: dict[str, Any], first: str, state: str) -> None:
    assert classified(code, before, after, first)[0] == state
    asked = classified(code, before, after, first, asked=True)[0]
    assert asked == ("stopped" if before == after and code != 2 else state)


def test_the_best_trial_is_the_lowest_loss_of_a_completed_run(overrides: list[str]) -> None:
    planned = plan_trials(trials([*overrides, "train.seed=0,1,2"]), SMALL, 1)
    ended = [Outcome("completed", "", 0.5), Outcome("stopped", "at step 4", 0.1), Outcome("completed", "", 0.4)]
    text = table(planned, ended)
    assert "best     trial 3 with dev/loss 0.4000: train.seed=2" in text
    assert "trial 2: stopped, dev/loss 0.1000, at step 4" in text
    assert [line[0] for line in text.splitlines()[1:4]] == [" ", " ", "*"]
    assert "set data.dev" in table(planned, [Outcome("completed")] * 3)


def test_an_agents_trial_is_one_run() -> None:
    words = [sys.executable, "-m", "launcher", "+exp=lora_cpu", "optim.lr=1e-4,2e-4"]
    opened = environment({"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"})
    refused = subprocess.run(words, cwd=ROOT, env=opened, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240)
    assert refused.returncode == 2
    assert refused.stdout.startswith("tunesmith: 2 trials for the one run that W&B's agent has opened"), refused.stdout


# --- real ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_a_failed_trial_keeps_none_from_running_and_a_stopped_sweep_leaves_no_rank(overrides: list[str], tmp_path: Path) -> None:
    """Two ranks a trial, typed outside of the repository, with a relative path. The first trial diverges at once."""
    kept = [word for word in overrides if not word.startswith(("train.steps=", "outputs="))]
    words = [*kept, *QUIET, "outputs=outputs", "--ranks", "2", "--via", "torchrun", "optim.warmup_steps=0"]
    with launched([*words, "train.steps=3", "optim.lr=1e30,1e-2"], tmp_path) as process:
        output = process.communicate(timeout=240)[0]
    assert process.returncode == 1, output
    assert "trial 1 of 2: nan, FloatingPointError: step 2: loss nan" in output
    assert "trial 2 of 2: completed, dev/loss" in output
    assert "best     trial 2 with dev/loss" in output
    assert sorted(states(tmp_path / "outputs").values()) == ["completed", "nan"]
    records = {path: path.read_bytes() for path in tmp_path.glob("outputs/*/*/adapter/*.safetensors")}
    (failed,) = (path for path, state in states(tmp_path / "outputs").items() if state == "nan")
    shutil.rmtree(failed)

    saved = 0
    for number in (signal.SIGINT, signal.SIGKILL):  # Ctrl-C goes to the whole foreground group; the other leaves no word to anybody
        with launched([*words, "train.steps=3,100000,100001", "optim.lr=1e-2"], tmp_path) as process:
            until(lambda at=saved: trial_at_work(tmp_path / "outputs").get("recorded", 0) > at, process)
            os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
            output = process.communicate(timeout=60)[0]
        assert "trial 1 of 3: completed" in output and "was complete" in output, output
        assert process.returncode == (75 if number == signal.SIGINT else -signal.SIGKILL), output
        until(lambda: not processes_of(tmp_path))
        stopped = trial_at_work(tmp_path / "outputs")
        assert stopped["state"] == "stopped" and stopped["step"] > saved, stopped
        saved = stopped["step"]
        assert newest_step(RunFolder(stopped["path"], World())) == saved, "it was not saved"
    assert records == {path: path.read_bytes() for path in records}


def launched(words: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """The launcher, in a process group of its own, as if typed in a folder."""
    full, env = [sys.executable, "-m", "launcher", *words], environment({"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"})
    return subprocess.Popen(full, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def trial_at_work(outputs: Path) -> dict[str, Any]:
    """Status of the one run that is not complete, with its folder and the updates in its record."""
    going = [path for path, state in states(outputs).items() if state != "completed"]
    if not going:
        return {}
    (path,) = going
    rows = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    return {**json.loads((path / "status.json").read_text()), "path": path, "recorded": rows[-1]["step"] if rows else 0}


def processes_of(folder: Path) -> list[str]:
    """Processes whose command names this folder."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [row for row in found if f"{folder}/" in row]


def until(what: Callable[[], bool], process: subprocess.Popen[str] | None = None, timeout_s: float = 60) -> None:
    """Wait for something to be so."""
    end = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > end or (process and process.poll() is not None):
            pytest.fail(process.communicate()[0] if process and process.poll() is not None else "it did not come")
        time.sleep(0.1)


@pytest.mark.launch
def test_submitit_runs_trials_of_hydra_s_own_m(overrides: list[str], tmp_path: Path) -> None:
    """Side by side in jobs of submitit's: one diverges, which is a line; the other is preempted, saves, and goes on in the queue's next start."""
    outputs = tmp_path / "outputs"
    words = [*overrides, *QUIET, "train.steps=150", "optim.warmup_steps=0", "optim.lr=1e30,1e-2"]
    full = [sys.executable, "train.py", "-m", "hydra/launcher=submitit_local", *words]
    sweep = subprocess.Popen(full, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not (trains := [path for path in outputs.glob("*/*/metrics.jsonl") if len(read_metrics(path)) > 2]):
        assert sweep.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    trial = psutil.Process(json.loads(trains[0].with_name("status.json").read_text())["pid"])
    for process in (trial, trial.parent()):  # Slurm signals every process of a job's steps
        process.send_signal(signal.SIGUSR2)
    said, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 1, said
    assert "Traceback" not in said
    (told,) = (line for line in said.splitlines() if line.startswith("tunesmith: "))
    assert "optim.lr=1e" in told and ": nan, FloatingPointError: step 2: loss nan" in told
    assert sorted(states(outputs).values()) == ["completed", "nan"], said
    assert [row["step"] for row in read_metrics(trains[0])] == list(range(1, 151))
    logs = "".join(path.read_text() for path in outputs.glob(".submitit/*/*_log.*"))
    assert f"stopped by signal {int(signal.SIGUSR2)} after step" in logs and "Requeued job" in logs


# --- W&B's sweeps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SWEEPS, ids=[path.stem for path in SWEEPS])
def test_sweeps_of_wandb_start_the_launcher_with_settings_that_exist(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text("utf-8"))
    command, end = sweep["command"], "${args_no_hyphens}"
    assert command[:4] == ["${env}", "python", "-m", "launcher"] and command[-1] == end, "several ranks a trial"
    assert sweep["metric"] == {"name": "dev/loss", "goal": "minimize"}
    words = command[4:-1]
    for key, space in sweep["parameters"].items():
        words.append(f"{key}={space['values'][0] if 'values' in space else space['min']}")
    config = compose(words)
    assert config.tracker.kind.name == "wandb" and config.tracker.mode.name == "online"
