"""What is measured once a machine and kept: the peak that MFU divides by, and what a CPU takes for all that is no matmul."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from operator import truediv
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tunesmith import matmul
from tunesmith.hardware import Machine, cache_folder, cpu_name, find_card, lines_of

if TYPE_CHECKING:
    import torch

LEAD = " | times torch's own"
"""In a name of the cache, behind a library's peak: how much faster than torch's own it was, the median of some turns."""


def peak_flops(
    setting: str, machine: Machine, dtype: str, threads: int = 0, *, cpu: bool | None = None, measure: bool = True
) -> tuple[float | None, str]:
    """The FLOPS of one rank's device that MFU divides by, and a line saying where it comes from.

    setting is hardware.peak; threads: CPU threads of a rank; cpu: whether the run is on the CPU though there may be
    cards (None: as the machine is). With measure=False nothing is run: a cached measurement is taken, else the answer
    is None. None too for an unknown card. Raises ValueError when setting is not table, measure or a positive number.
    """
    on_cpu = machine.kind == "cpu" if cpu is None else cpu
    if setting not in ("table", "measure"):
        return given_peak(setting), f"given: hardware.peak={setting}"
    name = machine.cpu_name if on_cpu else machine.device_names[0]
    if setting == "table" and not on_cpu:
        card = find_card(name)
        if card is None:
            return (
                None,
                f"unknown: no row for {name!r} — add one to CARDS in hardware.py, or type hardware.peak=measure",
            )
        peak = card.peak_of(dtype)
        if peak is None:
            return None, f"unknown: the {card.key} has no {dtype} units"
        return peak, f"table: {card.source} ({card.key}, {dtype}, dense)"
    device = "cpu" if on_cpu else "cuda"
    if not measure and not _kept(_peak_keys(name, dtype, threads, on_cpu=on_cpu)) <= _cached_peaks().keys():
        return None, f"measured when the run starts: a {dtype} matmul on {name or 'this CPU'}"
    measured, by = measure_peak(dtype, device, threads, name)
    return measured, f"measured: {dtype} matmul{by} on {name or 'this CPU'}"


def given_peak(setting: str) -> float:
    """hardware.peak as FLOPS; raises ValueError when it is not a positive number."""
    try:
        value = float(setting)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(
            f"hardware.peak={setting}: not table, measure or a positive number of FLOPS — type hardware.peak=125e12"
        )
    return value


def measure_peak(dtype: str, device: str, threads: int = 0, name: str = "") -> tuple[float, str]:
    """FLOPS of the best of five square matmuls, kept in the user's cache folder for the next run, and by which library if not torch's own.

    dtype: fp32, fp16, bf16, or tf32 for fp32 matrices with precision.matmul=high; device: cpu or cuda; threads: CPU threads used, 0 for
    torch's own choice. A measurement belongs to a device name, type, thread count and torch version. 2048 on a CPU is 17 GFLOP, a few
    tenths of a second; 8192 on a card 1.1 TFLOP. On a CPU fp32 is measured by each library that may be taken, and the one that
    `take_faster_matmul` takes counts.
    """
    import torch

    on_cpu = device == "cpu"
    name = name or (cpu_name() if on_cpu else torch.cuda.get_device_name(device))
    keys = _peak_keys(name, dtype, threads, on_cpu=on_cpu)
    known, before = _cached_peaks(), torch.get_num_threads()
    # What was there when it was measured may be gone, as a compiler, and what was not may have come.
    here = [by for by in keys if not by or matmul.library(by).is_here()]
    if not all(known.get(keys[by]) for by in here) or not _kept(keys) <= known.keys():
        kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
        size, seconds = 2048 if on_cpu else 8192, {by: list[float]() for by in keys}
        torch.set_num_threads(threads or before)
        high, as_it_was = dtype == "tf32" and not on_cpu, torch.get_float32_matmul_precision()
        if high:
            torch.set_float32_matmul_precision("high")
        try:
            left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
            # By turns, so that what else the machine does slows both. The first round warms up.
            with matmul.torchs_own():
                works = {by: _work(by, left, right) for by in here}
                for attempt, by in product(range(6), here):
                    start_s = time.perf_counter()
                    works[by]()
                    if not on_cpu:
                        torch.cuda.synchronize()
                    seconds[by] += [time.perf_counter() - start_s] * (attempt > 0)
        finally:
            torch.set_num_threads(before)
            if high:
                torch.set_float32_matmul_precision(as_it_was)
        for by, key in keys.items():  # 0 where that library is not here
            known[key] = 2 * size**3 / min(seconds[by], default=float("inf"))
            known[key + LEAD] = median(map(truediv, seconds[""], seconds[by])) if seconds[by] else 0.0
        for key in _kept(keys):
            _remember(key, known[key])
    lead, by = max(((known[keys[by] + LEAD], by) for by in here if by), default=(0.0, ""))
    chosen = by if lead > matmul.FASTER else ""
    return known[keys[chosen]], chosen


def _work(by: str, left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A product by a library, or by torch itself; with a right operand that stays, as a frozen weight does."""
    if not by:
        return lambda: left @ right
    library = matmul.library(by)
    return library.again(left, right) if library.again else lambda: library.product(left, right, None)


def _peak_keys(name: str, dtype: str, threads: int, *, on_cpu: bool) -> dict[str, str]:
    """By what a matmul of a type can be done (nothing: torch's own), and the name under which that is kept."""
    libraries = [""]
    if on_cpu and dtype in ("fp32", "tf32"):
        libraries += [one.name for one in matmul.LIBRARIES if dtype == "tf32" or one.is_exact]
        dtype = "fp32"
    # Halves are measured with a weight in tiles; what earlier versions kept was without.
    return {by: _peak_key(name, dtype + by + " in tiles" * (by == matmul.HALVES.name), threads) for by in libraries}


def _kept(keys: Mapping[str, str]) -> set[str]:
    """All names under which there are numbers: of each library its peak, and of another than torch's own its lead."""
    return {*keys.values(), *(key + LEAD for by, key in keys.items() if by)}


def take_faster_matmul(dtype: str, threads: int) -> None:
    """Let this process multiply fp32 matrices on the CPU by the library that was measured to be fastest here; dtype: fp32 or tf32."""
    if by := measure_peak(dtype, "cpu", threads)[1]:
        matmul.take(matmul.library(by))


def measure_cpu(setting: str, machine: Machine, dtype: str, threads: int) -> None:
    """Measure, once a machine, what a plan's times on a CPU rest on: of its ranks one measures, and the others wait and read.

    setting is hardware.peak. Where nothing can be kept, nothing is measured here.
    """
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(str(_cache_file()) + ".lock"):
            peak_flops(setting, machine, dtype, threads, cpu=True)
            overheads(machine, threads)
    except OSError:  # a cache that cannot be written to: the plan then says that the peak is not known, and rank 0 measures it for itself
        pass


@dataclass(frozen=True)
class Overheads:
    """What this CPU takes for all that is no matmul."""

    bytes_per_s: float
    """Read and written by an elementwise operator, operands of 4 MB."""
    operator_s: float
    """An operator on eight numbers, in autograd, forward or backward."""
    function_s: float
    """The same as an autograd function that is written in Python."""
    random_s: float
    """One number of a dropout mask."""


def overheads(machine: Machine, threads: int, *, measure: bool = True) -> Overheads | None:
    """Measured once a machine and kept, a fifth of a second; with measure=False None where it has not been yet."""
    keys = [_peak_key(machine.cpu_name, field.name, threads) for field in fields(Overheads)]
    known = _cached_peaks()
    if all(key in known for key in keys):
        return Overheads(*(known[key] for key in keys))
    if not measure:
        return None
    import torch

    one, other, small = torch.randn(1 << 20), torch.randn(1 << 20), torch.ones(8, requires_grad=True)
    mask = torch.empty(1 << 18)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * 1.5

        @staticmethod
        def backward(ctx: Any, *of_outputs: torch.Tensor) -> torch.Tensor:
            (_,) = ctx.saved_tensors
            return of_outputs[0] * 1.5

    def chain(link: Callable[[torch.Tensor], torch.Tensor]) -> None:
        x = small
        for _ in range(50):
            x = link(x)
        x.sum().backward()  # type: ignore[no-untyped-call]  # torch's

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        works = (lambda: one + other, lambda: chain(lambda x: x * 1.5), lambda: chain(Scaled.apply), lambda: mask.bernoulli_(0.9))
        added, chained, called, drawn = map(_best_s, works)
    finally:
        torch.set_num_threads(before)
    found = Overheads(12 * len(one) / added, chained / 100, called / 100, drawn / len(mask))
    for key, value in zip(keys, astuple(found), strict=True):
        _remember(key, value)
    return found


def _best_s(work: Callable[[], object], repeats: int = 7, least_s: float = 0.004) -> float:
    """Seconds of one call, the best of some means over at least least_s each, which others' work disturbs least."""
    work()
    best = float("inf")
    for _ in range(repeats):
        calls, start_s, spent_s = 0, time.perf_counter(), 0.0
        while spent_s < least_s:
            work()
            calls, spent_s = calls + 1, time.perf_counter() - start_s
        best = min(best, spent_s / calls)
    return best


def _peak_key(name: str, what: str, threads: int) -> str:
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = "none"
    return f"{name} | {_this_cpu()} | {what} | {threads} threads | torch {torch_version}"


def _this_cpu() -> str:
    """Tells CPUs apart that have one name: virtual machines say "AMD EPYC" for several generations, and a home may be shared."""
    told = [line for line in lines_of("/proc/cpuinfo") if line.partition("\t")[0] in ("cpu family", "model", "stepping", "flags")]
    return hashlib.sha256("\n".join([platform.node(), *sorted(set(told))]).encode()).hexdigest()[:8]


def _cache_file() -> Path:
    return cache_folder() / "peaks.json"


def _cached_peaks() -> dict[str, float]:
    try:
        content = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return (
        {str(k): float(v) for k, v in content.items() if isinstance(v, int | float)}
        if isinstance(content, dict)
        else {}
    )


def _remember(key: str, peak: float) -> None:
    """Write through a temporary file, so that a reader or a kill never sees half; an unwritable cache is no error."""
    file = _cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as draft:
            json.dump({**_cached_peaks(), key: peak}, draft, indent=1)
        os.replace(draft.name, file)
    except OSError:
        pass
