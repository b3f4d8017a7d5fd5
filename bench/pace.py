"""The step time that a plan predicts beside the measured one, on this CPU, over the grid of bench/memory.py.

    python -m bench.pace               a line each, then the median, the worst and how many are within 20 %
    python -m bench.pace --passes 3    the whole grid so many times: the median of each one's errors, beside how far its own times lie apart
    python -m bench.pace --fit         and the constants of plan/pace.py, by least squares over half of the configurations

Beside that grid stand the steps of bench/roofline.py, whose models have the sizes that people train. The peak of a matmul and the machine's
overheads are measured anew next to each configuration, by the threads that torch takes: a machine that others use too is a third faster or
slower from one minute to the next. The best of some steps counts. Timings are no test: none of this is in the suite.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

from bench.memory import Case, batch_of, engine_of, flops, grid, module_of
from bench.roofline import ROWS
from tunesmith.config import Compute
from tunesmith.hardware import prepare_environment, this_machine
from tunesmith.model import keep_tiles
from tunesmith.peaks import Overheads, measure_peak, overheads, take_faster_matmul
from tunesmith.plan import trained_weights
from tunesmith.plan.pace import CPU, Speed, speed_of, step_seconds

REPEATS, MOST_S = 10, 12.0
WITHIN = 0.2


@dataclass(frozen=True)
class Pace:
    """What a CPU sustains at a moment."""

    peaks: dict[Compute, float]
    overheads: Overheads


@dataclass(frozen=True)
class Measured:
    """Seconds of a configuration's step, and what the CPU sustained just before."""

    case: Case
    seconds: float
    pace: Pace

    @property
    def peak(self) -> float:
        return self.pace.peaks[self.case.compute]


def pace_now(number: int, threads: int) -> Pace:
    """Measured anew for each number."""
    name = f"measurement {number}"
    found = overheads(replace(this_machine(), cpu_name=name), threads)
    assert found  # always, unless it is only looked up
    return Pace({compute: measure_peak(compute.value, "cpu", threads, name)[0] for compute in (Compute.fp32, Compute.bf16)}, found)


def measured(case: Case, folder: Path) -> float:
    """Seconds of the best of some steps of the real engine."""
    module = module_of(case, folder)
    keep_tiles(module.model)
    engine = engine_of(case, module)
    batches = [batch_of(case, seed) for seed in range(case.accumulation)]
    targets, best = sum(batch.target_count for batch in batches), float("inf")
    gc.collect()
    gc.freeze()  # what earlier configurations left is not looked through again: a program trains one model
    spent = 0.0
    for _ in range(REPEATS):
        start = perf_counter()
        engine.step(batches, targets, 1e-4, lambda _: nullcontext())
        best = min(best, took := perf_counter() - start)
        spent += took
        if spent > MOST_S:
            break
    return best


def seconds(case: Case, peak: float, speed: Speed) -> float:
    """Of a step as the plan adds it up, at what a CPU sustains."""
    tokens = case.rows * case.length
    parts = step_seconds(
        case.shape, case.config(), None, 1, work=flops(case), peak_flops=peak, tokens=tokens, tiles=this_machine().amx,
        accumulation=case.accumulation,
        trained=trained_weights(case.shape, case.config().method), targets=case.rows * case.targets, speed=speed,
    )  # fmt: skip
    return sum(parts.values())


NOTHING = Speed(**{field.name: inf if field.name.endswith(("share", "per_s")) else 0.0 for field in fields(Speed)})
"""A CPU to which everything is free."""
FITTED: tuple[tuple[str, Compute | None], ...] = (
    ("matmul_share", Compute.fp32), ("matmul_share", Compute.bf16), ("context_share", Compute.fp32),
    ("attention_share", Compute.fp32), ("attention_share", Compute.bf16), ("product_s", Compute.fp32),
    ("product_s", Compute.bf16), ("row_s", Compute.fp32), ("row_s", Compute.bf16), ("bytes_per_s", None), ("operator_s", None),
    ("function_s", None), ("layer_s", None), ("random_s", None), ("unpacked_s", None),
)  # fmt: skip
"""What is found by least squares, for one type or for all; the share over shared keys in halves is set."""
ROUNDS, FAR = 30, 0.1
"""Errors far beyond that count as less than their square: a minute in which the machine was busy shall not decide."""


def fit(steps: list[Measured]) -> None:
    """Print what plan/pace.py declares for a CPU, but for what is set there: relative errors of half of the steps least."""

    def part(step: Measured, name: str, compute: Compute | None) -> float:
        """Of the step's seconds, what comes with one constant, at 1."""
        if compute not in (None, step.case.compute):
            return 0.0
        cpu = step.pace.overheads
        unit = {"bytes_per_s": cpu.bytes_per_s, "operator_s": cpu.operator_s, "function_s": cpu.function_s, "random_s": cpu.random_s}
        unit |= {"product_s": cpu.operator_s, "row_s": cpu.operator_s, "layer_s": cpu.operator_s, "unpacked_s": cpu.random_s}
        return seconds(step.case, step.peak, replace(NOTHING, **{name: unit.get(name, 1.0)})) / step.seconds

    def known_part(step: Measured) -> float:
        compute = step.case.compute
        context = inf if compute is Compute.fp32 else CPU[this_machine().amx][compute].context
        return seconds(step.case, step.peak, replace(NOTHING, context_share=context)) / step.seconds

    parts, known = np.array([[part(step, *name) for name in FITTED] for step in steps]), np.array([known_part(step) for step in steps])
    # Of the grid's neighbours one is recomputed and one is not, and of two pairs one is in fp32.
    half = np.random.default_rng(0).permutation(len(steps) // 2)[np.arange(len(steps)) // 2] % 2 == 0
    free, weights = np.full(len(FITTED), True), np.ones(half.sum())
    for _ in range(ROUNDS):
        found = np.zeros(len(FITTED))
        found[free], *_ = np.linalg.lstsq(parts[half][:, free] * weights[:, None], (1 - known[half]) * weights, rcond=None)
        free &= found >= 0  # what would be below nothing is nothing
        found = np.maximum(found, 0)
        weights = (1 + np.square((parts[half] @ found + known[half] - 1) / FAR)) ** -0.25
    for (name, compute), value in zip(FITTED, found, strict=True):
        value = 1 / value if value and name.endswith(("share", "per_s")) else value
        print(f"{name}{f' in {compute.value}' if compute else ''}: {value:.3g}")
    errors = np.abs(parts[~half] @ found + known[~half] - 1)
    within = (errors <= WITHIN).sum()
    print(f"the other half: median {np.median(errors):.1%}, worst {errors.max():.1%}, {within} of {len(errors)} within {WITHIN:.0%}")


def one_pass(number: int, threads: int, folder: Path) -> list[tuple[Measured, float]]:
    """Every configuration, measured and predicted."""
    found = []
    for case in [*(case for case in grid() if not case.halves), *ROWS]:
        pace = pace_now(number * 1000 + len(found), threads)
        step = Measured(case, measured(case, folder), pace)
        guess = seconds(case, step.peak, speed_of(None, case.compute, pace.overheads, this_machine().amx))
        found.append((step, guess))
        print(f"| {case} | {1000 * guess:.1f} | {1000 * step.seconds:.1f} | {guess / step.seconds - 1:+.0%} |", flush=True)
    return found


def summary(errors: list[float]) -> str:
    sizes = sorted(map(abs, errors))
    within = sum(size <= WITHIN for size in sizes)
    return f"{len(sizes)} configurations: median error {median(sizes):.1%}, worst {sizes[-1]:.1%}, {within} within {WITHIN:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--passes", type=int, default=1)
    asked = parser.parse_args()
    prepare_environment(on_cpu=True)
    threads = torch.get_num_threads()
    take_faster_matmul("fp32", threads)
    print(f"{threads} threads, {this_machine().cpu_name}\n\n| configuration | predicted ms | measured ms | error |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNESMITH_CACHE"] = folder  # what is measured here is no run's
        passes = [one_pass(number, threads, Path(folder)) for number in range(asked.passes)]
    steps = [step for found in passes for step, _ in found]
    for compute in (Compute.fp32, Compute.bf16):
        peaks = sorted(step.pace.peaks[compute] / 1e9 for step in steps)
        print(f"{compute.value} peak {peaks[0]:.0f} to {peaks[-1]:.0f} GFLOPS")
    for found in passes:
        print(summary([guess / step.seconds - 1 for step, guess in found]))
    if asked.passes > 1:
        errors, apart = [], []
        for each in zip(*passes, strict=True):
            errors.append(median(guess / step.seconds - 1 for step, guess in each))
            # What the machine does otherwise from pass to pass, the peak of each taken out.
            work = [step.seconds * step.peak for step, _ in each]
            apart.append(max(work) / min(work) - 1)
            if abs(errors[-1]) > WITHIN:
                print(f"{each[0][0].case}: {errors[-1]:+.0%}, its own times up to {apart[-1]:.0%} apart")
        print("medians of all passes:", summary(errors))
        print(f"a configuration's own times: {median(apart):.0%} apart (median), {sum(x > WITHIN for x in apart)} more than {WITHIN:.0%}")
    if asked.fit:
        fit(steps)


if __name__ == "__main__":
    main()
