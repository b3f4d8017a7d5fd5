"""What engines owe beside equal losses: whole weights in the result, answers by all ranks, an optimizer in CPU memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, environment, free_port, launch
from tunesmith.checkpoint import not_written

QUIET = ["eval.before=false", "eval.after=false"]


def test_what_was_written_is_held_against_the_weights(tmp_path: Path) -> None:
    """By content, whatever the names; a weight that is missing, other, of another shape or type, or empty is named."""
    torch.manual_seed(0)
    state = {"a.default.weight": torch.randn(4, 3), "b": torch.randn(3), "c": torch.randn(2, 2).bfloat16(), "d": torch.tensor(2.0)}
    stored = {"a.weight": state["a.default.weight"], "x.b": state["b"], "c": state["c"], "d": state["d"]}
    file = tmp_path / "adapter_model.safetensors"
    save_file(stored, file)
    assert not_written(state, tmp_path) == ""

    for name, other in {
        "missing": {key: weight for key, weight in stored.items() if key != "x.b"},
        "one number": stored | {"x.b": stored["x.b"] + torch.tensor([0.0, 0.0, 1e-6])},
        "shape": stored | {"x.b": stored["x.b"][:2].clone()},
        "type": stored | {"x.b": stored["x.b"].double()},
    }.items():
        save_file(other, file)
        assert not_written(state, tmp_path) == "1 of 4 trained weights are not what the file has (first: b)", name
    save_file(stored, file)
    assert "1 of 4 trained weights are empty (first: b)" in not_written(state | {"b": torch.empty(0)}, tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    assert "adapter_model.safetensors cannot be read" in not_written(state, tmp_path)
    file.unlink()
    assert "4 of 4 trained weights" in not_written(state, tmp_path)


@pytest.mark.launch
def test_a_result_that_is_not_what_was_trained_fails_the_run(overrides: list[str]) -> None:
    """One weight goes wrong between memory and disk: no adapter is left, and the same command makes a good one."""
    code = (
        "import sys; sys.argv = ['train.py', *sys.argv[1:]]\n"
        "from safetensors.torch import load_file, save_file\n"
        "from tunesmith import checkpoint\n"
        "real = checkpoint.save_model\n"
        "def save_model(model, folder, state=None):\n"
        "    real(model, folder, state)\n"
        "    path = folder / 'adapter_model.safetensors'\n"
        "    weights = load_file(path)\n"
        "    weights[min(weights)][0, 0] += 1\n"
        "    save_file(weights, path)\n"
        "checkpoint.save_model = save_model\n"
        "import runpy; runpy.run_path('train.py', run_name='__main__')\n"
    )
    words = [*overrides, "engine=accelerate", *QUIET]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 1, done.stderr
    assert "adapter: 1 of 28 trained weights are not what the file has (first: " in done.stderr
    assert "the same command writes it anew" in done.stderr
    again = launch("python", words)
    assert again.code == 0, again.output
    assert sorted(path.name for path in again.run.iterdir() if "adapter" in path.name) == ["adapter"]


@pytest.mark.launch
def test_zero_3_answers_and_leaves_whole_weights(overrides: list[str]) -> None:
    """Weights in pieces, 3 questions for 2 ranks, each a call of its own: the second rank answers one again."""
    words = [*overrides, "eval.conversations=3", "eval.batch=1", "eval.max_new_tokens=12", "train.micro_batch=2"]
    whole = launch("python", [*words, "engine=accelerate", "name=whole"])
    assert whole.code == 0, whole.output
    whole_run = whole.run
    done = launch("deepspeed", [*words, "engine.zero=3", "name=pieces"], ranks=2)
    assert done.code == 0, done.output
    (run,) = (done.outputs / "pieces").iterdir()
    for name in ("before", "after"):
        expected, found = (json.loads((path / "evaluation.json").read_text())[name] for path in (whole_run, run))
        assert len(found["answers"]) == 3
        assert found["answers"] == expected["answers"], name
        assert found["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-4)
    theirs, ours = (load_file(path / "adapter/adapter_model.safetensors") for path in (whole_run, run))
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        assert torch.allclose(ours[key], weight, rtol=1e-3, atol=1e-4), key


def test_offload_needs_no_compiled_optimizer(overrides: list[str]) -> None:
    """DeepSpeed's CPU Adam is a C++ extension, a minute of compiling: the plan asks for torch's own instead."""
    from tunesmith.compose import compose
    from tunesmith.hardware import this_machine
    from tunesmith.plan import make_plan

    plan = make_plan(compose([*overrides, "engine.offload=true"]), this_machine(), 2)
    assert plan.deepspeed["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert plan.deepspeed["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.launch
def test_ddp_sends_the_trainable_gradients_once_a_step(overrides: list[str], tmp_path: Path) -> None:
    """Two ranks with two micro-batches each: bytes are those of the adapters' gradients, not times accumulation, nor the base's."""
    code = (
        "import sys; sys.argv = ['train.py', *sys.argv[1:]]\n"
        "import json, os, pathlib, runpy, torch, torch.distributed as dist\n"
        "from tunesmith.engine.accelerate import AccelerateEngine as Engine\n"
        "real, step, sent, steps = dist.all_reduce, Engine.step, [0], []\n"
        "def all_reduce(tensor, *more, **words):\n"
        "    sent[0] += tensor.numel() * tensor.element_size() * (tensor.dtype is torch.float32)\n"  # losses and flags are of other types
        "    return real(tensor, *more, **words)\n"
        "def counted(self, batches, *more):\n"
        "    before = sent[0]\n"
        "    outcome = step(self, batches, *more)\n"
        "    trained = sum(w.numel() for w in self.loss_module.parameters() if w.requires_grad)\n"
        "    steps.append([len(batches), sent[0] - before, 4 * trained])\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'rank' + os.environ['RANK']).write_text(json.dumps(steps))\n"
        "    return outcome\n"
        "dist.all_reduce, Engine.step = all_reduce, counted\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    words = [*overrides, *QUIET, "engine=accelerate", "train.micro_batch=2", "train.steps=3"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words], cwd=ROOT, env=environment({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    for rank in range(2):
        steps = json.loads((tmp_path / f"rank{rank}").read_text())
        assert [count for count, _, _ in steps] == [2, 2, 2]
        assert all(sent == trained > 0 for _, sent, trained in steps), steps
