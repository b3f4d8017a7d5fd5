"""train.py as a user meets it: refusals before anything heavy, a full fine-tune, two runs in one process, chat."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, launch
from tunesmith.compose import compose
from tunesmith.config import Refusal
from tunesmith.hardware import this_machine
from tunesmith.plan import make_plan
from tunesmith.run import RunFolder
from tunesmith.world import World

QUIET = ["eval.before=false", "eval.after=false"]


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return f"data.folder={folder}"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing file", r"data\.train=.*nothing\.json: no such file — the folder has dev\.json, test\.json, train\.json"),
        ("empty list", r"data\.train=.*train\.json: the file holds no conversation"),
        ("no target", r"data\.train: 1 of 1 conversations have no target token \(first: .*train\.json#0\)"),
        ("unwritable", r"outputs=.*a-file: cannot write there"),
        ("wrong model", r"model\.path=/no/such/model"),
        ("too long", r"data\.max_tokens=8: 26 of 26 conversations in data\.train are longer, the longest has \d+ tokens"),
    ],
)
def test_refused_before_the_model_loads(case: str, says: str, overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, "engine=accelerate", *QUIET]
    if case == "missing file":
        words.append("data.train=nothing.json")
    elif case == "empty list":
        words += [write(tmp_path, "train.json", "[]"), "data.dev=''", "data.test=''"]
    elif case == "no target":
        only_user = [{"conversations": [{"role": "user", "content": "hello"}]}]
        words += [write(tmp_path, "train.json", json.dumps(only_user)), "data.dev=''", "data.test=''"]
    elif case == "unwritable":
        (tmp_path / "a-file").write_text("in the way")
        words.append(f"outputs={tmp_path / 'a-file'}")
    elif case == "wrong model":
        words.append("model.path=/no/such/model")
    else:
        words.append("data.max_tokens=8")
    done = launch("python", words)
    assert done.code == 2, done.output
    assert "Traceback" not in done.output
    import re

    assert re.search(says, done.output), done.output
    assert not list((tmp_path / "outputs").glob("*/*/checkpoints")), "something was started"


def test_full_disk_is_refused(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(overrides)
    plan = make_plan(config, this_machine(), 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 1000, 1000))
    with pytest.raises(Refusal, match=r"outputs=.*0\.0 GiB free, the checkpoints need about"):
        RunFolder.of(config, plan.run_id, World()).open(config, plan, "12345678")


def test_two_processes_on_one_run(overrides: list[str]) -> None:
    config = compose(overrides)
    plan = make_plan(config, this_machine(), 1)
    first = RunFolder.of(config, plan.run_id, World())
    first.open(config, plan, "12345678")
    with pytest.raises(Refusal, match="another process is at work on this very run"):
        RunFolder.of(config, plan.run_id, World()).open(config, plan, "12345678")


@pytest.mark.launch
def test_full_fine_tune_and_chat(overrides: list[str]) -> None:
    """method=full leaves a Hugging Face folder that plain transformers loads, and that chat answers with."""
    done = launch("python", [*overrides, "method=full", "optim.lr=1e-3", *QUIET])
    assert done.code == 0, done.output
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(done.run / "model")
    assert model.config.hidden_size == 64
    said = subprocess.run(
        ["tunesmith", "chat", str(done.run), "--once", "turn on the light", "--max-new-tokens", "4"],
        capture_output=True, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip(), "no answer"


@pytest.mark.launch
@pytest.mark.parametrize("engine", ["accelerate", "deepspeed"])
def test_two_runs_of_one_command(engine: str, overrides: list[str], tmp_path: Path) -> None:
    """Hydra's -m: both runs as if each were alone."""
    done = launch("python", ["-m", *overrides, f"engine={engine}", *QUIET, "optim.lr=1e-2,5e-3"])
    assert done.code == 0, done.output
    runs = list((tmp_path / "outputs/tiny").iterdir())
    assert len(runs) == 2
    states = [json.loads((run / "status.json").read_text())["state"] for run in runs]
    assert states == ["completed", "completed"]
    alone = launch("python", [*overrides, f"engine={engine}", *QUIET, "optim.lr=5e-3", f"outputs={tmp_path / 'alone'}"])
    from tunesmith.metrics import read_metrics

    alone.outputs = tmp_path / "alone"
    twin = tmp_path / "outputs/tiny" / alone.run.name
    # Not to the bit: a second run was once seen to round differently in the seventh digit.
    assert [row["train/loss"] for row in read_metrics(twin / "metrics.jsonl")] == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.launch
def test_a_failed_run_of_several_is_told_in_a_line(overrides: list[str], tmp_path: Path) -> None:
    """Hydra's -m: the other run goes on, and the end is no traceback of Hydra's."""
    wild = ["train.steps=3", "optim.warmup_steps=0", "optim.lr=1e30,1e-2"]
    done = launch("python", ["-m", *overrides, "engine=accelerate", *QUIET, *wild])
    assert done.code == 1, done.output
    (line,) = (line for line in done.output.splitlines() if line.startswith("tunesmith: name=tiny"))
    assert "optim.lr=1e" in line and ": nan, FloatingPointError: step 2: loss nan" in line
    assert "TrialFailed" not in done.output, done.output
    states = {json.loads(path.read_text())["state"] for path in (tmp_path / "outputs/tiny").glob("*/status.json")}
    assert states == {"completed", "nan"}


@pytest.mark.launch
def test_wandb_offline_run_of_the_real_program(overrides: list[str]) -> None:
    done = launch("python", [*overrides, "engine=accelerate", *QUIET, "tracker=wandb", "tracker.group=sweep7"])
    assert done.code == 0, done.output
    assert list(done.run.glob("wandb/offline-run-*/*.wandb")), done.output
    assert (done.run / "wandb.json").read_text().strip()


def test_chat_without_a_model_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "tunesmith.cli", "chat", str(tmp_path)], capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert "not a run folder" in done.stderr


@pytest.mark.launch
def test_one_process_is_no_world_of_one(overrides: list[str]) -> None:
    """Accelerate takes a process with a LOCAL_RANK for a world: it would wrap the model in DDP and set torch's threads anew."""
    code = (
        "import sys, torch; sys.argv = ['train.py', *sys.argv[1:]]\n"
        "from tunesmith import loop\n"
        "real = loop.train\n"
        "def train(parts, done):\n"
        "    print('seen', type(parts.engine.module).__name__, torch.get_num_threads())\n"
        "    return real(parts, done)\n"
        "loop.train = train\n"
        "import runpy; runpy.run_path('train.py', run_name='__main__')\n"
    )
    words = [*overrides, "engine=accelerate", *QUIET, "hardware.threads=1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    assert "seen TargetLoss 1" in done.stdout
