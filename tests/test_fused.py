"""Liger's kernels: where they are taken, where they are refused, and what the plan makes of them. No card and no Triton is here."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.memory import Case
from tests.test_model import config_for
from tunesmith.compose import compose
from tunesmith.config import Compute, Config, Liger, MethodKind, Refusal
from tunesmith.doctor.legal import choices
from tunesmith.hardware import Machine
from tunesmith.model import build_model
from tunesmith.plan import problems, shapes
from tunesmith.plan.memory import setting_of
from tunesmith.plan.replay import Step
from tunesmith.plan.shapes import KNOWN, without_liger
from tunesmith.plan.tape import Heap

CPU = torch.device("cpu")


def with_liger(value: Liger, *words: str) -> Config:
    config = compose([*(words or ["+exp=lora_cpu"])])
    config.engine.liger = value
    return config


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "find_spec", lambda _: object())


def test_it_is_typed_as_a_word() -> None:
    for word in ("auto", "on", "off"):
        assert compose(["+exp=lora_cpu", f"engine.liger={word}"]).engine.liger is Liger[word]


def test_on_is_refused_on_a_cpu_in_a_line(tiny_model: Path) -> None:
    config = with_liger(Liger.on)
    (line,) = problems(config, Machine("cpu", ram_gib=16.0), 1)
    assert line == "engine.liger=on: Liger's kernels are for CUDA cards, and this run is on a CPU — type engine.liger=auto"
    asked = config_for(tiny_model)
    asked.engine.liger = Liger.on
    with pytest.raises(Refusal, match=r"engine\.liger=on: .* on a CPU"):
        build_model(asked, tiny_model, CPU)


@pytest.mark.parametrize(
    ("words", "fused", "says"),
    [
        (["+exp=lora_t4"], False, "this card has 7.5"),
        (["+exp=lora_a10"], True, "no kernels for this family"),
        (["+exp=lora_a10"], False, "is not installed"),
    ],
)
def test_on_is_refused_where_it_cannot_be(words: list[str], fused: bool, says: str) -> None:
    card = {"lora_t4": "Tesla T4", "lora_a10": "NVIDIA A10"}[words[0].partition("=")[2]]
    config = with_liger(Liger.on, *words)
    found = problems(config, Machine("cuda", (card,) * 4, (22.0,) * 4, ram_gib=64.0), 1, KNOWN["chatglm3-6b" if fused else "smollm2-135m"])
    (line,) = [line for line in found if line.startswith("engine.liger=on: ")]
    assert says in line and line.endswith("— type engine.liger=auto")


def test_auto_takes_them_where_they_are(installed: None) -> None:
    auto = with_liger(Liger.auto)
    assert without_liger(auto, (8, 6)) == ""
    assert all(without_liger(auto, *where) for where in ((None,), ((7, 5),), ((8, 6), False)))
    assert without_liger(with_liger(Liger.off), (8, 6)) == "engine.liger=off"
    assert "by Liger" in list(choices(with_liger(Liger.auto, "+exp=lora_a10"), (8, 6)))[-1].fact


def test_auto_changes_nothing_on_a_cpu(tiny_model: Path) -> None:
    """Nor is Liger imported there, which would import Triton."""
    module = build_model(config_for(tiny_model, kind=MethodKind.full), tiny_model, CPU)
    parts = [part for part in module.modules() if type(part).__name__ in ("LlamaRMSNorm", "LlamaMLP")]
    assert len(parts) >= 5 and not any("forward" in vars(part) for part in parts)
    assert "liger_kernel" not in sys.modules


def test_the_plan_counts_what_is_kept(installed: None) -> None:
    """Full training: of SwiGLU and of norms a tensor less each; with adapters nothing is rotated into another. Everything is freed."""
    for rank in (0, 16):
        config, shape = Case("qwen3", rank, Compute.bf16, False, 64, 4, 0.1, halves=True).config(), KNOWN["qwen3-0.6b"]
        config.hardware.card = "a10"
        fused = setting_of(shape, config)
        assert fused.liger and not setting_of(shape, config, cpu=True).liger and not setting_of(KNOWN["chatglm3-6b"], config).liger
        heaps = []
        for setting in (fused, replace(fused, liger=False), replace(fused, recomputed=1), replace(fused, liger=False, recomputed=1)):
            heap = Heap()
            Step(heap, shape, setting, 256, 16)
            assert abs(heap.total) < 1
            heaps.append(heap)
        kept, plain, again, plain_again = heaps
        spared = 0 if rank else shape.layers * 256 * 2 * (shape.intermediate + 2 * shape.hidden)
        assert plain.peak - kept.peak >= spared and again.peak <= plain_again.peak
        assert kept.written < plain.written and kept.blocks < plain.blocks and kept.products == plain.products
