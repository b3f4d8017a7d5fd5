"""The same experiment under every launcher, engine, ZeRO stage and split of the global step: real ranks, one result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import launch

pytestmark = pytest.mark.launch

# (name, launcher, ranks, words). The first is what the others are held against.
SAME_RESULT = [
    ("one process", "python", 1, ["engine=accelerate"]),
    ("DeepSpeed ZeRO-2", "deepspeed", 1, []),
    ("ZeRO-0", "python", 1, ["engine.zero=0"]),
    ("accumulation 8 x 1", "python", 1, ["engine=accelerate", "train.micro_batch=1"]),
    ("DeepSpeed, 2 ranks, ZeRO-2", "deepspeed", 2, []),
    ("DeepSpeed, 2 ranks, ZeRO-3, accumulation 3", "deepspeed", 2, ["engine.zero=3", "train.micro_batch=2"]),
    ("torchrun, 2 ranks, ZeRO-1, accumulation", "torchrun", 2, ["engine.zero=1", "train.micro_batch=2"]),
    ("ZeRO-2, optimizer in CPU memory, 2 ranks, accumulation", "deepspeed", 2, ["engine.offload=true", "train.micro_batch=2"]),
    ("ZeRO-3, optimizer in CPU memory, 2 ranks", "deepspeed", 2, ["engine.zero=3", "engine.offload=true"]),
    ("accelerate launch, 2 ranks, DDP", "accelerate", 2, ["engine=accelerate"]),
    ("RANK and WORLD_SIZE alone, 2 ranks, DDP, accumulation", "plain", 2, ["engine=accelerate", "train.micro_batch=1"]),
    ("padded rectangles", "python", 1, ["engine=accelerate", "data.batching=padded"]),
    ("activation checkpointing", "python", 1, ["engine=accelerate", "engine.checkpointing=true"]),
]
QUIET = ["eval.before=false", "eval.after=false"]


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    _, launcher, ranks, words = SAME_RESULT[0]
    done = launch(launcher, [*_words(tiny_model, tiny_data, tmp_path_factory.mktemp("reference")), *words], ranks)
    assert done.code == 0, done.output
    assert done.losses[-1] < done.losses[0] - 0.4, "the tiny run does not learn, so it proves nothing"
    return done.losses


def _words(model: Path, data: Path, folder: Path) -> list[str]:
    return [
        "name=tiny", f"outputs={folder}", "model=local", f"model.path={model}", "data=local", f"data.folder={data}", "data.train=train.json",
        "train.steps=7", "train.conversations_per_step=8", "train.save_every=0", "optim.lr=1e-2", "optim.warmup_steps=2", "method.r=4",
        "hardware.peak=1e11", "hardware.threads=1", *QUIET,
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "launcher", "ranks", "words"), SAME_RESULT[1:], ids=[row[0] for row in SAME_RESULT[1:]])
def test_same_losses(
    name: str, launcher: str, ranks: int, words: list[str], reference: list[float], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    done = launch(launcher, [*_words(tiny_model, tiny_data, tmp_path), *words], ranks)
    assert done.code == 0, done.output
    assert done.world_size == ranks
    assert len(done.losses) == 7
    assert done.losses == pytest.approx(reference, rel=1e-4), name
    for extension in ("deepspeed_shm_comm", "cpu_adam"):
        assert extension not in done.output, "DeepSpeed's CPU extension was built"


def test_same_world_and_engine_is_bitwise(reference: list[float], tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    again = launch("torchrun", [*_words(tiny_model, tiny_data, tmp_path), "engine=accelerate"], ranks=1)
    assert again.losses == reference, "the same run under another launcher differs"


def test_full_run_leaves_everything(overrides: list[str]) -> None:
    """Two DeepSpeed ranks: one folder, one record, evaluation by both, a report, and only rank 0 speaks."""
    done = launch("deepspeed", overrides, ranks=2)
    assert done.code == 0, done.output
    run = done.run
    for name in ("config.yaml", "plan.json", "environment.json", "command.txt", "metrics.jsonl", "report.html", "adapter/adapter_config.json"):
        assert (run / name).is_file(), name
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["after"]["dev/loss"] < evaluation["before"]["dev/loss"]
    assert len(evaluation["after"]["answers"]) == 4
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    assert [row["step"] for row in done.metrics] == list(range(1, 8))
    assert done.output.count("report   ") == 1, "more than one rank printed"


def test_run_again_says_complete(overrides: list[str]) -> None:
    first = launch("python", [*overrides, "engine=accelerate", *QUIET])
    assert first.code == 0, first.output
    stamp = (first.run / "metrics.jsonl").read_bytes()
    again = launch("python", [*overrides, "engine=accelerate", *QUIET])
    assert again.code == 0
    assert "is complete" in again.output
    assert "train.seed=1" in again.output, "it does not say how to start another"
    assert (first.run / "metrics.jsonl").read_bytes() == stamp


