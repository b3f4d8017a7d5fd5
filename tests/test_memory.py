"""The replay of a step (plan/replay.py) against the allocator's own ledger, on real models small enough to run in seconds.

`python -m bench.memory` is the whole grid; here is every fourth configuration of it, each family, method and precision among them, and every second one of the rarer settings.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.memory import MORE, PREFIX, PROMPT, Case, grid, measured, predicted
from bench.published import Row, rows, table
from tests.conftest import ROOT, environment, free_port
from tunesmith.config import Base, Compute
from tunesmith.plan.memory import setting_of
from tunesmith.plan.replay import Setting, Step
from tunesmith.plan.shapes import KNOWN, ModelShape
from tunesmith.plan.tape import Block, Heap

CASES = [case for number, case in enumerate(grid()) if number % 6 == (number // 24) % 6 or (case.more and number % 3 == 0)]


SCRATCH_DIFFERS = 0.29e6
"""Bytes that oneDNN's scratch inside a matmul in bf16 is more or less than plan/replay.py declares for all CPUs: with the loss in pieces
7 % of the smallest peak here, 4.4 MB."""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, float]:
    folder = tmp_path_factory.mktemp("models")
    return {case: sum(predicted(case).values()) / measured(case, folder) - 1 for case in CASES}


def test_the_cases_are_a_fair_part_of_the_grid() -> None:
    assert len(grid()) == len(set(grid())) >= 60
    for kind in ("family", "rank", "compute", "checkpointing", "accumulation", "halves"):
        assert {getattr(case, kind) for case in CASES} == {getattr(case, kind) for case in grid()}, kind
    for more in MORE:
        assert sum(set(case.more) <= set(more) and bool(case.more) for case in CASES) >= 2, more


@pytest.mark.filterwarnings("ignore")  # Accelerate, PEFT and the profiler have each something to say
def test_the_peak_is_the_allocators(errors: dict[Case, float]) -> None:
    sizes = {str(case): abs(error) for case, error in errors.items()}
    assert median(sizes.values()) <= 0.005
    beyond = {str(case): abs(error) - (case.compute is Compute.bf16) * SCRATCH_DIFFERS / sum(predicted(case).values()) for case, error in errors.items()}
    assert max(beyond.values()) <= 0.04, max(beyond, key=lambda name: beyond[name])


def replayed(shape: ModelShape, setting: Setting, tokens: int = 256, targets: int = 16) -> Heap:
    heap = Heap()
    Step(heap, shape, setting, tokens, targets)
    return heap


def test_everything_is_freed_in_the_end() -> None:
    case = next(case for case in CASES if case.rank and case.checkpointing)
    heap = replayed(case.shape, setting_of(case.shape, case.config(), cpu=True))
    assert abs(heap.total) < 1
    assert all(abs(size) < 1 for size in heap.live.values())
    assert sum(heap.at_peak.values()) == pytest.approx(heap.peak)


def test_a_block_lives_as_long_as_it_is_held() -> None:
    heap = Heap()
    first = Block(heap, 10, "weights")
    second = Block(heap, 5, "logits")
    assert (heap.total, heap.peak, heap.at_peak["logits"]) == (15, 15, 5)
    del first
    third = Block(heap, 7, "logits")
    assert (heap.total, heap.peak) == (12, 15)
    del second, third
    assert heap.total == 0


@pytest.mark.parametrize("base", [Base.as_is, Base.nf4, Base.int8])
def test_a_large_model_takes_milliseconds(base: Base) -> None:
    case = Case("llama", 16, Compute.bf16, True, 64, 1, 0.5)
    config = case.config()
    config.method.base = base
    deep = replace(KNOWN["llama-3.1-8b"], layers=126)
    start = time.perf_counter()
    heap = replayed(deep, setting_of(deep, config))
    assert time.perf_counter() - start < 2
    assert heap.peak > 126 * 256 * 4096 * 2, "at least the input of each layer"


def test_a_dequantised_weight_is_there_for_its_matmul_only() -> None:
    shape, case = KNOWN["qwen2.5-7b"], Case("llama", 16, Compute.bf16, False, 64, 1, 0.5, halves=True)
    config: Any = case.config()
    config.method.base = Base.nf4
    largest = 3584 * 18944 * 2
    few = replayed(shape, setting_of(shape, config), tokens=8, targets=1)
    assert few.at_peak["buffers"] == largest, "with few tokens it is the peak"
    many = replayed(shape, setting_of(shape, config), tokens=4096, targets=2048)
    assert many.at_peak["buffers"] == 0, "with many the logits are, and by then it is gone"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_int8_layers_keep_no_inputs(accumulation: int, tmp_path: Path) -> None:
    """bitsandbytes' own nodes hold them where no checkpoint sees them, for as long as the loss lives: recomputing would save nothing."""
    case = Case("llama", 4, Compute.fp32, True, 256, 2, 0.02, accumulation, more=(("method.base", Base.int8),))
    assert sum(predicted(case).values()) == pytest.approx(measured(case, tmp_path), rel=0.02)
    setting = setting_of(case.shape, case.config(), cpu=True)
    in_int8, in_nf4 = (replayed(case.shape, replace(setting, quantised=base), 512, 10) for base in ("int8", "nf4"))
    inputs = 512 * (128 + 128 + 128 + 352) * 4  # of q, k and v; o; gate and up; down
    assert in_int8.peak - in_nf4.peak < inputs, "less than one layer's"


@pytest.mark.launch
def test_the_peak_of_pieces_is_the_allocators() -> None:
    """FSDP2 on two ranks: models of two to four layers, of which gloo's thread may hold one or not (docs/hardware.md)."""
    ranks = ["torchrun", "--nproc-per-node", "2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*ranks, "-m", "bench.memory", "--every", "4"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("|") and line.endswith("% |")]
    errors = [abs(float(line.rstrip("| %").split()[-1])) for line in rows]
    assert len(errors) == 9
    assert median(errors) < 4, rows
    assert max(errors) < 15, rows


def test_what_is_never_trained_keeps_nothing() -> None:
    """Below the first adapter there is nothing to go back to."""
    case = Case("llama", 16, Compute.fp32, False, 64, 1, 0.5)
    setting = setting_of(case.shape, case.config(), cpu=True)
    upper = replace(setting, first_layer=2)
    assert replayed(case.shape, upper).peak < 0.65 * replayed(case.shape, setting).peak
    assert replayed(case.shape, replace(setting, recomputed=2)).peak > replayed(case.shape, replace(setting, recomputed=1)).peak


@pytest.mark.parametrize("more", [(PREFIX,), (PROMPT,)], ids=["prefix", "prompt"])
def test_a_card_shares_virtual_keys_where_its_kernels_can_be_merged(more: tuple[tuple[str, Any], ...]) -> None:
    """Where they cannot, each conversation has a copy of them, and there is a mask."""
    case = Case("llama", 0, Compute.fp32, False, 64, 4, 0.1, more=more)
    config = case.config()
    config.data.max_tokens = 64
    card = setting_of(case.shape, config)
    assert (card.masked, card.repeats_keys) == (0, True), "fp32's kernel has no grouped keys"
    here, there, copied = (replayed(case.shape, x).peak for x in (setting_of(case.shape, config, cpu=True), card, replace(card, masked=64)))
    copies = 4 * 20 * 128 * 4  # rows x virtual x width x bytes, of keys and as much of values
    assert here < there < copied - 1.5 * case.shape.layers * copies
    assert setting_of(replace(case.shape, head_dim=12), config).masked == 64


def test_dora_with_dropout_keeps_a_quantised_weight_whole() -> None:
    """Its W x is a plain matmul with the dequantised weight, which backward needs: what nf4 saves is gone."""
    case, shape = Case("llama", 16, Compute.bf16, False, 64, 1, 0.5, halves=True), KNOWN["qwen2.5-7b"]
    config = case.config()
    config.method.base, config.method.dora = Base.nf4, True
    without = replayed(shape, setting_of(shape, config), tokens=8, targets=1)
    config.method.dropout = 0.1
    kept = replayed(shape, setting_of(shape, config), tokens=8, targets=1)
    assert kept.peak - without.peak > 0.9 * shape.layers * shape.matmul_weights_per_layer * 2


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.what)
def test_published_peaks_are_met(row: Row) -> None:
    assert row.predicted_gb == pytest.approx(row.gb, rel=0.15)


def test_the_page_prints_what_is_computed() -> None:
    page = (Path(__file__).parents[1] / "docs" / "hardware.md").read_text("utf-8")
    assert table() in page
