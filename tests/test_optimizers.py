"""Optimizers: what they keep is what the plan counts, a LoRA learns under each, and each is resumed to the bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import launch
from tests.test_plan import A10S, HERE, config_of
from tests.test_resume import QUIET, trained, with_fault
from tunesmith.compose import compose
from tunesmith.config import Compute, Config, EngineKind, OptimizerKind
from tunesmith.model import build_model, make_optimizer, page_again
from tunesmith.plan import memory_gib, problems, shape_of
from tunesmith.plan.memory import GIB
from tunesmith.plan.optimizers import state_bytes, trained_tensors
from tunesmith.plan.shapes import KNOWN

UNPAGED = [kind for kind in OptimizerKind if kind is not OptimizerKind.paged_adamw_8bit]
METHODS = {
    "LoRA": ["method.r=32"],
    "DoRA from layer 1, and the head": ["method.dora=true", "method.first_layer=1", "method.modules_to_save=[lm_head]"],
    "prefix": ["method=prefix"],
    "prompt": ["method=prompt"],
    "full": ["method=full"],
}


def updated(overrides: list[str], words: list[str]) -> tuple[Config, Any, torch.optim.Optimizer]:
    """A config, its model and its optimizer after one update with gradients of chance."""
    config = compose([*overrides, "engine=accelerate", *words])
    module = build_model(config, Path(config.model.path), torch.device("cpu"))
    optimizer = make_optimizer(module, config)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.randn_like(weight)
    optimizer.step()
    return config, module, optimizer


@pytest.mark.parametrize("kind", UNPAGED)
@pytest.mark.parametrize("words", METHODS.values(), ids=METHODS)
def test_the_plan_counts_what_is_kept(words: list[str], kind: OptimizerKind, overrides: list[str]) -> None:
    config, module, optimizer = updated(overrides, [*words, f"optim.name={kind.value}"])
    shape = shape_of(config.model.path)
    shapes = sorted((tuple(weight.shape) for weight in module.parameters() if weight.requires_grad), key=str)
    counted = [(rows, columns) if rows else (columns,) for count, rows, columns in trained_tensors(shape, config.method) for _ in range(count)]
    assert sorted(counted, key=str) == shapes
    kept = [
        state.numel() * state.itemsize
        for states in optimizer.state.values()
        for name, state in states.items()
        if isinstance(state, torch.Tensor) and state.ndim and not name.startswith("qmap")  # the two tables are shared by all
    ]
    assert state_bytes(shape, config) == sum(kept)


def test_bytes_a_weight() -> None:
    """Full training, 1 rank without DeepSpeed: 8, 2.03, a thousandth, 4 or 0 bytes of state a weight."""
    shape = KNOWN["qwen2.5-1.5b"]

    def bytes_of(**values: Any) -> float:
        from tunesmith.config import MethodKind

        config = config_of(engine__kind=EngineKind.accelerate, method__kind=MethodKind.full, **values)
        return memory_gib(shape, config, 1, 512)["optimizer"] * GIB / shape.total_weights

    assert bytes_of() == 8
    assert bytes_of(optim__name=OptimizerKind.adamw_8bit) == pytest.approx(2 * (1 + 4 / 256), rel=1e-3)
    assert bytes_of(optim__name=OptimizerKind.adafactor) < 0.01
    assert bytes_of(optim__name=OptimizerKind.sgd) == 4
    assert bytes_of(optim__name=OptimizerKind.sgd, optim__momentum=0.0) == 0


@pytest.mark.parametrize(
    ("values", "fact", "instead"),
    [
        ({"name": "paged_adamw_8bit", "engine": "accelerate"}, "this run has no card", "optim.name=adamw_8bit"),
        ({"name": "adafactor"}, "ZeRO 2 lays all weights out in one flat piece", "engine=accelerate"),
        ({"name": "adafactor", "zero": 0, "compute": "bf16"}, "DeepSpeed's bf16 mode", "engine=accelerate"),
        ({"name": "adamw_8bit", "offload": True}, "keeps none of the optimizer there", "engine.offload=false"),
        ({"name": "sgd", "beta2": 0.95}, "optim.beta2=0.95: sgd has none", "optim.beta2=0.999, or optim.name=adamw"),
        ({"momentum": 0.5}, "optim.momentum=0.5: adamw has none", "optim.momentum=0.9, or optim.name=sgd"),
    ],
)
def test_refusals(values: dict[str, Any], fact: str, instead: str) -> None:
    config = config_of()
    for key, value in values.items():
        section = config.optim if hasattr(config.optim, key) else config.precision if key == "compute" else config.engine
        kinds = {"name": OptimizerKind, "compute": Compute, "engine": EngineKind}
        setattr(section, "kind" if key == "engine" else key, kinds[key](value) if key in kinds else value)
    (line,) = problems(config, HERE, 2)
    assert fact in line
    assert instead in line


def test_paging_is_refused_under_deepspeed_on_a_card() -> None:
    config = config_of(optim__name=OptimizerKind.paged_adamw_8bit, hardware__card="a10")
    assert [line for line in problems(config, A10S, 4) if "outside of pages" in line]
    config.engine.kind = EngineKind.accelerate
    assert not problems(config, A10S, 4)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_paged_state_goes_back_into_pages(overrides: list[str]) -> None:
    """On a CPU there are no pages: that the numbers are the same, in buffers that bitsandbytes gave, is all that can be seen."""
    _, _, optimizer = updated(overrides, ["method=full", "optim.name=paged_adamw_8bit"])
    before = {weight: {name: state[name].clone() for name in ("state1", "state2")} for weight, state in optimizer.state.items()}
    handed = []
    real = optimizer.get_state_buffer  # type: ignore[attr-defined]
    optimizer.get_state_buffer = lambda *args, **more: handed.append(real(*args, **more)) or handed[-1]  # type: ignore[attr-defined]
    page_again(optimizer)
    for weight, states in before.items():
        for name, state in states.items():
            now = optimizer.state[weight][name]
            assert any(now is buffer for buffer in handed)
            assert now.dtype == state.dtype
            assert torch.equal(now, state)


# tests/test_matrix.py has every optimizer under every engine, too small for states of 8 bits and without a real stop.
CASES = {
    "adamw_8bit, ZeRO-2": ("plain", 2, ["engine.zero=2", "optim.name=adamw_8bit"]),
    "adafactor": ("python", 1, ["engine=accelerate", "optim.name=adafactor"]),
    "sgd, ZeRO-3, offload": ("plain", 2, ["engine.zero=3", "engine.offload=true", "optim.name=sgd", "optim.lr=0.3"]),
    "sgd without momentum": ("python", 1, ["engine=accelerate", "optim.name=sgd", "optim.momentum=0.0", "optim.lr=1"]),
}


@pytest.mark.launch
@pytest.mark.parametrize(("launcher", "ranks", "words"), CASES.values(), ids=CASES)
def test_learns_and_is_resumed_to_the_bit(launcher: str, ranks: int, words: list[str], overrides: list[str], tmp_path: Path) -> None:
    """Rank 64, so that A's matrices of 64 x 64 have the 4096 weights from which bitsandbytes keeps 8 bits."""
    words = [*overrides, *QUIET, "method.r=64", "method.alpha=64", "train.micro_batch=2", *words]
    whole = launch(launcher, [*words, f"outputs={tmp_path / 'whole'}"], ranks)
    whole.outputs = tmp_path / "whole"
    assert whole.code == 0, whole.output
    assert whole.losses[-1] < whole.losses[0] - 0.2, whole.losses
    stopped, _ = with_fault(words, launcher, ranks, f"0:3:{int(signal.SIGTERM)}", tmp_path)
    assert "after step 4 of 7, saved" in stopped.output, stopped.output
    resumed = launch(launcher, words, ranks)
    assert resumed.code == 0, resumed.output
    assert resumed.losses == whole.losses
    assert trained(resumed) == trained(whole)
