"""Stopped at any step and resumed equals never stopped, to the bit; failures end the job quickly and say where they began."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Finished, launch

pytestmark = pytest.mark.launch

QUIET = ["eval.before=false", "eval.after=false", "method.dropout=0.1"]  # dropout: the generators must come back too


def with_fault(words: list[str], launcher: str, ranks: int, fault: str, folder: Path) -> tuple[Finished, float]:
    """A launch in which one rank does something at one step, and the seconds from then to the end of the job."""
    mark = folder / "fault.txt"
    paths = os.pathsep.join([str(ROOT / "tests/faults"), str(ROOT / "src")])  # this checkout's program, also where another is installed
    extra = {"PYTHONPATH": paths, "TUNESMITH_TEST_FAULT": fault, "TUNESMITH_TEST_FAULT_FILE": str(mark)}
    done = launch(launcher, words, ranks, extra=extra)
    assert mark.is_file(), f"the fault never happened\n{done.output}"
    return done, time.time() - float(mark.read_text().split()[0])


def trained(done: Finished) -> str:
    """Hash of the adapter that a run left."""
    return hashlib.sha256((done.run / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("launcher", "ranks", "engine", "stop_signal", "rank"),
    [
        ("python", 1, ["engine=accelerate", "precision.matmul=high"], signal.SIGTERM, 0),
        ("deepspeed", 1, ["engine=deepspeed"], signal.SIGINT, 0),
        ("torchrun", 2, ["engine=accelerate", "method.first_layer=1", "method.cache_frozen=true"], signal.SIGUSR1, 1),
        ("plain", 2, ["engine=deepspeed", "engine.zero=3"], signal.SIGTERM, 1),
    ],
    ids=["one process", "DeepSpeed", "DDP and cached states", "ZeRO-3"],
)
def test_stop_and_resume_is_bitwise(
    launcher: str, ranks: int, engine: list[str], stop_signal: int, rank: int, overrides: list[str], tmp_path: Path
) -> None:
    """One rank gets the signal; all save at the same step, leave with 75, and the same command ends with the same bits."""
    words = [*overrides, *QUIET, *engine, "train.micro_batch=2"]
    never_stopped = launch(launcher, [*words, f"outputs={tmp_path / 'whole'}"], ranks)
    never_stopped.outputs = tmp_path / "whole"
    assert never_stopped.code == 0, never_stopped.output

    stopped, seconds = with_fault(words, launcher, ranks, f"{rank}:3:{int(stop_signal)}", tmp_path)
    # torchrun answers any failing rank with 1; what the ranks themselves left with is in its report.
    assert stopped.code == 75 or (launcher == "torchrun" and "exitcode" in stopped.output and "75" in stopped.output), stopped.output
    assert f"stopped by signal {int(stop_signal)} after step 4 of 7, saved" in stopped.output
    assert [p.name for p in (stopped.run / "checkpoints").iterdir()] == ["step-000004"]
    assert seconds < 15

    resumed = launch(launcher, words, ranks)
    assert resumed.code == 0, resumed.output
    assert resumed.losses == never_stopped.losses
    assert trained(resumed) == trained(never_stopped)


@pytest.mark.parametrize(("launcher", "engine", "fault"), [("deepspeed", "deepspeed", "raise"), ("torchrun", "accelerate", "raise"), ("deepspeed", "accelerate", "kill")])
def test_failing_rank_ends_the_job(launcher: str, engine: str, fault: str, overrides: list[str], tmp_path: Path) -> None:
    done, seconds = with_fault([*overrides, *QUIET, f"engine={engine}"], launcher, 2, f"1:3:{fault}", tmp_path)
    assert done.code not in (0, 75), done.output
    assert seconds < 10, f"the job lived on for {seconds:.0f} s"
    if fault == "raise":
        assert "rank 1 failed: RuntimeError: a fault made by a test" in done.output
        assert (done.run / "first_error.txt").read_text().startswith("rank 1 ")
        # The other rank's broken connection is a consequence: no second traceback from our program.
        ours = done.output.split("tunesmith: rank 1 failed")[0].count("Traceback (most recent call last)")
        assert ours == 1, done.output


def test_killed_at_once_resumes_from_the_last_checkpoint(overrides: list[str], tmp_path: Path) -> None:
    """SIGKILL between two saves: the steps since the last one are taken again, with the same result, and their states are written again."""
    words = [*overrides, *QUIET, "engine=accelerate", "train.save_every=2", "method.first_layer=1", "method.cache_frozen=true"]
    whole = launch("python", [*words, f"outputs={tmp_path / 'whole'}"])
    whole.outputs = tmp_path / "whole"
    killed, _ = with_fault(words, "python", 1, "0:3:kill", tmp_path)
    assert (killed.run / "frozen").is_dir()
    resumed = launch("python", words)
    assert resumed.code == 0, resumed.output
    assert all((row["data/cached_tokens"] > 0) == (row["step"] > 4) for row in resumed.metrics), "an epoch has 4 steps"
    assert not (resumed.run / "frozen").exists()
    assert resumed.losses == whole.losses
    assert trained(resumed) == trained(whole)


def test_other_number_of_ranks_and_changed_data(overrides: list[str], tiny_data: Path, tmp_path: Path) -> None:
    """What cannot be resumed exactly is refused with what to do; DDP resumes with another number of ranks."""
    data = tmp_path / "data"
    data.mkdir()
    for path in tiny_data.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    words = [*overrides, f"data.folder={data}", *QUIET]
    with_fault([*words, "engine=accelerate"], "python", 1, f"0:3:{int(signal.SIGTERM)}", tmp_path)

    conversations = json.loads((data / "train.json").read_text())
    (data / "train.json").write_text(json.dumps(conversations[1:]))
    refused = launch("python", [*words, "engine=accelerate"])
    assert refused.code == 2
    assert "the training data is not what this run began with" in refused.output

    (data / "train.json").write_text(json.dumps(conversations))
    other = launch("torchrun", [*words, "engine=accelerate"], ranks=2)
    assert other.code == 0, other.output
    assert other.world_size == 2


def test_noise_is_resumed_to_the_bit(overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *QUIET, "method=prompt", "data.max_tokens=256", "optim.neftune_alpha=5", "optim.label_smoothing=0.1", "engine=accelerate"]
    whole = launch("python", [*words, f"outputs={tmp_path / 'whole'}"])
    whole.outputs = tmp_path / "whole"
    assert whole.code == 0, whole.output
    with_fault(words, "python", 1, f"0:3:{int(signal.SIGTERM)}", tmp_path)
    resumed = launch("python", words)
    assert resumed.code == 0, resumed.output
    assert resumed.losses == whole.losses
    assert trained(resumed) == trained(whole)
