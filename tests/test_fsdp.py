"""FSDP2 on two real ranks: pieces they are, the losses are DDP's, answers and result are whole, and it is resumed to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, Finished, environment, free_port, launch
from tests.test_plan import A10S, GIB, HERE, config_of
from tests.test_resume import QUIET, with_fault
from tunesmith.config import Base, Compute, EngineKind, MethodKind, OptimizerKind
from tunesmith.plan import describe, make_plan, memory_gib, problems
from tunesmith.plan.shapes import KNOWN

FSDP = {"engine__kind": EngineKind.accelerate, "engine__fsdp": True}


@pytest.mark.parametrize(
    ("ranks", "values", "fact", "instead"),
    [
        (1, {}, "engine.fsdp=true: nothing to shard on 1 rank", "engine.fsdp=false"),
        (2, {"engine__kind": EngineKind.deepspeed}, "DeepSpeed splits weights by ZeRO 3", "engine=fsdp"),
        (2, {"method__base": Base.nf4}, "tears a nf4 base from the scales", "method.base=as_is"),
        (2, {"method__base": Base.int8}, "tears a int8 base from the scales", "method.base=as_is"),
        (2, {"optim__name": OptimizerKind.adafactor}, "optim.name=adafactor: needs the rows and columns", "optim.name=adamw"),
        (2, {"optim__name": OptimizerKind.adamw_8bit}, "optim.name=adamw_8bit: has kernels for whole tensors only", "engine.fsdp=false"),
    ],
)
def test_refusals(ranks: int, values: dict[str, Any], fact: str, instead: str) -> None:
    (line,) = problems(config_of(**{**FSDP, **values}), HERE, ranks)
    assert fact in line
    assert instead in line


def test_fp16_is_refused_and_bf16_is_not() -> None:
    (line,) = problems(config_of(**FSDP, hardware__card="a10", precision__compute=Compute.fp16), A10S, 4)
    assert "precision=bf16" in line
    assert not problems(config_of(**FSDP, hardware__card="a10", precision__compute=Compute.bf16), A10S, 4)


def test_the_plan_counts_pieces() -> None:
    """Full training of 1.5 B on 4 cards: a quarter of weights, gradients and optimizer, and what is gathered beside."""
    shape, ranks = KNOWN["qwen2.5-1.5b"], 4
    config = config_of(**FSDP, method__kind=MethodKind.full)
    parts = memory_gib(shape, config, ranks, 512)
    # The embedding's gradient is whole for a moment, before each rank keeps its piece.
    whole = {"weights": 0, "gradients": 4 * shape.embedding_weights, "optimizer": 0}
    for name, size in (("weights", 4), ("gradients", 4), ("optimizer", 8)):
        assert parts[name] == pytest.approx((shape.total_weights * size / ranks + whole[name]) / GIB)
    assert parts["buckets"] >= (2 * shape.weights_per_layer + shape.embedding_weights) * 4 / GIB
    assert "FSDP2" in describe(make_plan(config_of(**FSDP), HERE, 2))


# tests/test_matrix.py compares every method's loss; these are what it does not have.
WAYS = {
    "LoRA, accumulation, every layer recomputed": ["train.micro_batch=1", "engine.checkpointing=true", "method.dropout=0.0"],
    "full": ["method=full", "optim.lr=1e-3", "optim.weight_decay=0.1"],
    "adapters of rank 1, more ranks than rows": ["method.r=1"],
}


def result(done: Finished) -> dict[str, torch.Tensor]:
    (path,) = (path for name in ("adapter", "model") for path in (done.run / name).glob("*.safetensors"))
    weights: dict[str, torch.Tensor] = load_file(path)
    return weights


@pytest.mark.launch
@pytest.mark.parametrize("words", WAYS.values(), ids=WAYS)
def test_same_losses_and_weights_as_ddp(words: list[str], overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *QUIET, "method.dropout=0.0", *words]
    whole = launch("plain", [*words, "engine=accelerate", f"outputs={tmp_path / 'whole'}"], 2)
    whole.outputs = tmp_path / "whole"
    assert whole.code == 0, whole.output
    pieces = launch("plain", [*words, "engine=fsdp"], 2)
    assert pieces.code == 0, pieces.output
    assert pieces.losses[-1] < pieces.losses[0] - 0.02
    assert pieces.losses == pytest.approx(whole.losses, abs=1e-5)
    theirs, ours = result(whole), result(pieces)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert float((ours[name] - weight).norm() / weight.norm()) < 0.01, name  # Adam divides small gradients by small ones


@pytest.mark.launch
def test_a_rank_holds_half(overrides: list[str], tmp_path: Path) -> None:
    """In the real program, at a step: every weight, gradient and moment is a DTensor, and the ranks' pieces are the whole once."""
    code = """
import json, os, runpy, sys
import torch
from torch.distributed.tensor import DTensor
from tunesmith.engine import fsdp
real = fsdp.FsdpEngine._clip
def clip(self):
    norm = real(self)
    named = dict(self.loss_module.named_parameters())
    grads = [weight.grad for weight in named.values() if weight.requires_grad]
    moments = [value for state in self.optimizer.state.values() for value in state.values() if value.ndim]
    facts = {
        "all": all(isinstance(x, DTensor) for x in (*named.values(), *grads, *moments)), "grads": len(grads), "moments": len(moments),
        "here": sum(w.to_local().numel() for w in named.values()), "whole": sum(w.numel() for w in named.values()),
    }
    with open(os.environ["FACTS"] + os.environ["RANK"], "w") as file:
        json.dump(facts, file)
    return norm
fsdp.FsdpEngine._clip = clip
runpy.run_path("train.py", run_name="__main__")
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "FACTS": str(tmp_path / "facts-")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *overrides, *QUIET, "engine=fsdp", "method.dropout=0.0"], text=True, cwd=ROOT,
            env=environment({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    facts = [json.loads((tmp_path / f"facts-{rank}").read_text()) for rank in range(2)]
    for fact in facts:
        assert fact["all"]
        assert fact["moments"] == 2 * fact["grads"] == 2 * 28
        assert 0.4 < fact["here"] / fact["whole"] < 0.6
    assert sum(fact["here"] for fact in facts) == facts[0]["whole"]


@pytest.mark.launch
def test_resumed_to_the_bit_and_not_by_other_ranks(overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *QUIET, "engine=fsdp", "train.micro_batch=2"]
    whole = launch("plain", [*words, f"outputs={tmp_path / 'whole'}"], 2)
    whole.outputs = tmp_path / "whole"
    assert whole.code == 0, whole.output
    stopped, _ = with_fault(words, "plain", 2, f"1:3:{int(signal.SIGUSR1)}", tmp_path)
    assert "after step 4 of 7, saved" in stopped.output, stopped.output
    assert sorted(path.name for path in next((stopped.run / "checkpoints").iterdir()).glob("state-*")) == ["state-0.pt", "state-1.pt"]
    refused = launch("plain", words, 4)
    assert refused.code == 2, refused.output
    assert "written by 2 ranks of FsdpEngine, this is 4 of FsdpEngine" in refused.output
    resumed = launch("plain", words, 2)
    assert resumed.code == 0, resumed.output
    assert resumed.losses == whole.losses
    ours, theirs = result(resumed), result(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.mark.launch
@pytest.mark.parametrize("method", ["full"])
def test_answers_and_early_end(method: str, overrides: list[str]) -> None:
    """3 questions for 2 ranks, each a call of its own: the second rank answers one again, for as many tokens as the first."""
    words = [
        *overrides, f"method={method}", "data.max_tokens=256", "eval.conversations=3", "eval.batch=1", "eval.max_new_tokens=12",
        "train.micro_batch=2", "train.eval_every=1", "train.patience=5",
    ]  # fmt: skip
    if method == "full":
        words.append("optim.lr=1e-3")
    whole = launch("python", [*words, "engine=accelerate", "name=whole"])
    assert whole.code == 0, whole.output
    whole_run = whole.run
    done = launch("torchrun", [*words, "engine=fsdp", "name=pieces"], ranks=2)
    assert done.code == 0, done.output
    (run,) = (done.outputs / "pieces").iterdir()
    for name in ("before", "after"):
        expected, found = (json.loads((path / "evaluation.json").read_text())[name] for path in (whole_run, run))
        assert found["answers"] == expected["answers"], name
        assert found["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-4)
    ended = [json.loads((path / "status.json").read_text())["ended"] for path in (whole_run, run)]
    assert ended[0].partition(" with dev/loss")[0] == ended[1].partition(" with dev/loss")[0]


def test_a_model_that_does_not_fit_is_told_of_it() -> None:
    """1.5 B weights, gradients and moments are 23 GiB a card in full, and 6 in four pieces."""
    words: dict[str, Any] = {"method__kind": MethodKind.full, "engine__kind": EngineKind.accelerate, "hardware__card": "a10", "model__known_as": "qwen2.5-1.5b"}
    (line,) = problems(config_of(**words), A10S, 4, KNOWN["qwen2.5-1.5b"])
    assert "engine=fsdp (" in line
    assert not problems(config_of(**words, engine__fsdp=True), A10S, 4, KNOWN["qwen2.5-1.5b"])
