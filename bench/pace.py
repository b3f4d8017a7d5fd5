"""The step time that a plan predicts beside the measured one, on this CPU, over the grid of bench/memory.py.

    python -m bench.pace            a line each, then the median, the worst and how many are within 20 %
    python -m bench.pace --fit      and the constants of plan/pace.py, by least squares over every second configuration

Both use the peak of a matmul that is measured first, by the threads that torch takes. The best of eight steps counts, since others may
use the machine; on a busy one nothing here means much. Timings are no test: none of this is in the suite.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from bench.memory import Case, batch_of, grid, model_in
from tunesmith.config import Compute
from tunesmith.hardware import Overheads, measure_peak, overheads, prepare_environment, take_faster_matmul, this_machine
from tunesmith.plan import step_flops, trained_weights
from tunesmith.plan.flops import Flops
from tunesmith.plan.memory import setting_of
from tunesmith.plan.pace import CPU_MATMUL, READS, speed_of, step_seconds
from tunesmith.plan.replay import replayed

REPEATS = 8


def engine_of(case: Case, folder: Path) -> Any:
    """The real engine around a model of the case's shape, made in `folder` if it is not there."""
    from accelerate.state import AcceleratorState

    from tunesmith.engine.accelerate import AccelerateEngine
    from tunesmith.model import build_model
    from tunesmith.world import World

    threads = torch.get_num_threads()
    module = build_model(case.config(), model_in(folder, case.shape), torch.device("cpu"))
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first precision of a process
    engine = AccelerateEngine(case.config(), World(), module, torch.device("cpu"))
    torch.set_num_threads(threads)  # Accelerate takes one for a rank
    return engine


def measured(case: Case, folder: Path) -> float:
    """Seconds of the best of some steps of the real engine."""
    engine = engine_of(case, folder)
    batches = [batch_of(case, seed) for seed in range(case.accumulation)]
    targets, best = sum(batch.target_count for batch in batches), float("inf")
    gc.collect()
    gc.freeze()  # what earlier configurations left is not looked through again: a program trains one model
    for _ in range(REPEATS):
        start = perf_counter()
        engine.step(batches, targets, 1e-4, lambda _: nullcontext())
        best = min(best, perf_counter() - start)
    return best


def flops(case: Case) -> Flops:
    lengths = [case.length] * case.rows * case.accumulation
    targets = case.rows * case.targets * case.accumulation
    return step_flops(case.shape, case.config().method, lengths, targets, checkpointing=case.checkpointing)


def predicted(case: Case, peak: float, cpu: Overheads | None) -> float:
    tokens, work = case.rows * case.length, flops(case)
    seconds = step_seconds(
        case.shape, case.config(), None, 1, flops=work.executed, attention=work.attention, peak_flops=peak, tokens=tokens,
        accumulation=case.accumulation,
        trained=trained_weights(case.shape, case.config().method), targets=case.rows * case.targets, overheads=cpu,
    )  # fmt: skip
    return sum(seconds.values())


def fit(cases: list[Case], times: list[float], peaks: dict[Compute, float], cpu: Overheads | None) -> None:
    """Print what plan/pace.py declares for a CPU, fp32's share taken from there: relative errors of every second case least."""
    rows, known = [], []
    for case in cases:
        work = replayed(case.shape, setting_of(case.shape, case.config(), cpu=True), case.rows * case.length, case.rows * case.targets)
        done, fp32 = flops(case), case.compute is Compute.fp32
        linear, over_scores = ((size / peaks[case.compute]) for size in (done.executed - done.attention, done.attention))
        known.append(fp32 * linear / CPU_MATMUL[Compute.fp32])
        apart = (over_scores, case.accumulation * work.products)
        rows.append([not fp32 and linear, *(fp32 and x for x in apart), *(not fp32 and x for x in apart),
                     *(case.accumulation * x for x in ((1 + READS) * work.written, work.operators, work.random))])  # fmt: skip
    spent = np.array(times)
    scaled, rest = np.array(rows, float) / spent[:, None], 1 - np.array(known) / spent
    found, *_ = np.linalg.lstsq(scaled[::2], rest[::2], rcond=None)
    print(f"matmul share {1 / found[0]:.2f} in bf16; attention {1 / found[1]:.2f} and {1 / found[3]:.2f}; a matmul besides "
          f"{found[2] * 1e6:.1f} and {found[4] * 1e6:.1f} us; {1 / found[5] / 1e9:.0f} GB/s; "
          f"{found[6] * 1e6:.1f} us an operator; {found[7] * 1e9:.1f} ns a random number; "
          f"now {speed_of(None, Compute.fp32, cpu)}")  # fmt: skip
    errors = np.abs(scaled[1::2] @ found - rest[1::2])
    print(f"the other half: median {np.median(errors):.1%}, worst {errors.max():.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    asked = parser.parse_args()
    prepare_environment(on_cpu=True)
    threads = torch.get_num_threads()
    peaks = {compute: measure_peak(compute.value, "cpu", threads)[0] for compute in (Compute.fp32, Compute.bf16)}
    cpu = overheads(this_machine(), threads)
    take_faster_matmul(threads)
    print(f"{threads} threads, {cpu}, " + ", ".join(f"{compute.value} {peak / 1e9:.0f} GFLOPS" for compute, peak in peaks.items()))
    cases = [case for case in grid() if not case.halves]
    errors, times = [], []
    print("| configuration | predicted ms | measured ms | error |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            times.append(measured(case, Path(folder)))
            guess = predicted(case, peaks[case.compute], cpu)
            errors.append(guess / times[-1] - 1)
            print(f"| {case} | {1000 * guess:.1f} | {1000 * times[-1]:.1f} | {errors[-1]:+.0%} |", flush=True)
    sizes = sorted(map(abs, errors))
    within = sum(size <= 0.2 for size in sizes)
    print(f"\n{len(cases)} configurations: median error {median(sizes):.1%}, worst {sizes[-1]:.1%}, {within} within 20 %")
    if asked.fit:
        fit(cases, times, peaks, cpu)


if __name__ == "__main__":
    main()
