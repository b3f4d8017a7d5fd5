"""How much of this CPU's measured matmul peak a whole training step uses, and what eats the rest.

    python -m bench.roofline            a row a model and batch, then what the time went to, as Markdown
    python -m bench.roofline --high     the same with precision.matmul=high, also over the peak of plain fp32

Executed FLOPs (by the plan's closed form, padding of kernels not counted) over the seconds of the median step and over the peak that MFU
divides by. Then the same steps under torch's profiler: its own cost makes them slower, so only the shares count. What no operator of
torch accounts for is Python, autograd's own work and waiting.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from bench.memory import Case, batch_of, engine_of, flops, module_of
from tunesmith.config import Compute
from tunesmith.hardware import prepare_environment
from tunesmith.model import keep_tiles
from tunesmith.peaks import measure_peak, take_faster_matmul
from tunesmith.plan.shapes import ModelShape

SHAPES = {
    "SmolLM2-135M": ModelShape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, 8192, tied=True),
    "hidden 2,048": ModelShape("wide", 4, 2048, 32, 8, 64, 8192, 32000, 8192),
}
"""The second has four layers of Llama-3.2-1B."""
FAMILIES = {
    "matmul": ("aten::mm", "aten::addmm", "aten::_int_mm", "mkldnn::_linear_pointwise"),
    "attention": ("aten::_scaled_dot_product", "aten::bmm", "aten::baddbmm"),
    "loss": ("aten::_log_softmax", "aten::log_softmax", "aten::nll_loss", "aten::logsumexp", "aten::exp", "aten::gather"),
    "optimizer and clipping": ("aten::_fused_adamw_", "aten::_foreach_", "aten::linalg_vector_norm"),
}
"""Beginnings of operators' names; all others are elementwise work and copies."""
STEPS = 7


@dataclass(frozen=True)
class Step(Case):
    """One row: a shape by name, and a batch."""

    @property
    def shape(self) -> ModelShape:
        return SHAPES[self.family]

    def __str__(self) -> str:
        method = f"LoRA {self.rank}" if self.rank else "full"
        return f"{self.family}, {method}, {self.compute.value}, {self.rows} x {self.length} tokens, {self.targets} targets each"


ROWS = (
    Step("SmolLM2-135M", 16, Compute.fp32, False, 48, 8, 0.56),
    Step("SmolLM2-135M", 16, Compute.fp32, False, 400, 4, 0.9),
    Step("SmolLM2-135M", 0, Compute.fp32, False, 400, 4, 0.9),
    Step("hidden 2,048", 16, Compute.fp32, False, 400, 2, 0.5),
)
"""The first is about what an update of the short set of bench/train.py computes, the second a micro-batch of the medium one."""


def family_of(operator: str) -> str:
    """What an operator of torch is part of."""
    return next((family for family, names in FAMILIES.items() if operator.startswith(names)), "elementwise and copies")


def spent(case: Case, folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds of the median step, and the share of each family of operators in profiled ones."""
    module = module_of(case, folder)
    keep_tiles(module.model)
    engine = engine_of(case, module)
    batches = [batch_of(case, seed) for seed in range(case.accumulation)]
    targets, times = sum(batch.target_count for batch in batches), []

    def step() -> float:
        start = perf_counter()
        engine.step(batches, targets, 1e-4, lambda _: nullcontext())
        return perf_counter() - start

    step()
    times = [step() for _ in range(STEPS)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = step() + step()
    shares: dict[str, float] = {}
    for event in profile.key_averages():
        # The profiler's own marks (Optimizer.step and such) and autograd's nodes are no operators: their own time is Python's.
        if event.key.startswith(("aten::", "mkldnn::")):
            family = family_of(event.key)
            shares[family] = shares.get(family, 0.0) + event.self_cpu_time_total / 1e6 / profiled
    shares["Python, autograd, waiting"] = 1 - sum(shares.values())
    return median(times), shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--high", action="store_true")
    dtype = "tf32" if parser.parse_args().high else "fp32"
    prepare_environment(on_cpu=True)
    threads = torch.get_num_threads()
    plain, _ = measure_peak("fp32", "cpu", threads)
    take_faster_matmul(dtype, threads)
    peak, by = measure_peak(dtype, "cpu", threads)
    print(f"{threads} threads, torch {torch.__version__}, fp32 matmul{by} peak {peak / 1e9:.0f} GFLOPS, plain {plain / 1e9:.0f}\n")
    names = [*list(FAMILIES), "elementwise and copies", "Python, autograd, waiting"]
    print(f"| step | s | GFLOP | of the peak | of plain fp32's | {' | '.join(names)} |\n|---|---|---|---|---|{'---|' * len(names)}")
    with tempfile.TemporaryDirectory() as folder:
        for case in ROWS:
            seconds, shares = spent(case, Path(folder))
            told = " | ".join(f"{shares.get(name, 0):.0%}" for name in names)
            done = flops(case).executed
            of_peaks = f"{done / seconds / peak:.2f} | {done / seconds / plain:.2f}"
            print(f"| {case} | {seconds:.3f} | {done / 1e9:.0f} | {of_peaks} | {told} |", flush=True)


if __name__ == "__main__":
    main()
