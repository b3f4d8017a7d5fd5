"""The meter: throughput, FLOPs, memory, and the time of a step by phase."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the report reads metrics too, and needs no torch
    import torch

PHASES = ("data", "forward", "backward", "optimizer", "communication", "other")


@dataclass(frozen=True)
class Rate:
    """What one step computed over all ranks, for turning its seconds into rates."""

    conversations: int
    computed_tokens: int
    """Tokens that went through the model, padding included."""
    padding_tokens: int
    shared_tokens: int
    """Tokens that were not computed again, since other conversations of the micro-batch begin with them too."""
    target_tokens: int
    useful_flops: float
    """FLOPs that the update needs (docs/metrics.md)."""
    executed_flops: float
    """FLOPs really computed: padding, masked attention and recomputation included."""


class Meter:
    """Times the phases of a step with the device's own clock; on a card nothing waits until the step's end."""

    _cuda: Any = None
    """torch.cuda where the device is a card."""

    def __init__(self, device: torch.device, world_size: int, peak_flops: float | None):
        self.device = device
        self.world_size = world_size
        self.peak_flops = peak_flops
        self._spans: list[tuple[str, Any, Any]] = []
        self.at = ""
        """The phase that began last."""
        self._start_s = perf_counter()
        if device.type == "cuda":
            import torch

            self._cuda = torch.cuda

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside as part of a phase."""
        start, self.at = self._mark(), name
        yield
        self._spans.append((name, start, self._mark()))

    def begin(self) -> None:
        """Start the clock of a step; what lies between two steps (saving, evaluating) belongs to none."""
        self._spans.clear()
        self._start_s = perf_counter()
        if self._cuda:
            self._cuda.reset_peak_memory_stats(self.device)

    def end(self, rate: Rate, communication_s: float) -> dict[str, float]:
        """Close the step: seconds by phase, tokens/s, TFLOPS, MFU, HFU and memory, by their metric names."""
        if self._cuda:
            self._cuda.synchronize(self.device)
        step_s = perf_counter() - self._start_s
        spent = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self._spans:
            spent[name] += start.elapsed_time(end) / 1000 if self._cuda else end - start
        # Collectives run inside backward (gradients), optimizer (norm, updated weights) and, with ZeRO 3, forward (weights):
        # taken out of where they lie, in this order, so that the phases add up to the step.
        for name in ("backward", "optimizer", "forward"):
            taken = min(communication_s - spent["communication"], spent[name])
            spent[name] -= taken
            spent["communication"] += taken
        spent["other"] = max(0.0, step_s - sum(spent.values()))
        metrics = {"time/step_s": step_s, **{f"time/{name}_s": seconds for name, seconds in spent.items()}}
        metrics |= {
            "speed/conversations_per_s": rate.conversations / step_s,
            "speed/computed_tokens_per_s": rate.computed_tokens / step_s,
            "speed/target_tokens_per_s": rate.target_tokens / step_s,
            "speed/tflops_per_device": rate.useful_flops / step_s / self.world_size / 1e12,
            "data/conversations": rate.conversations,
            "data/computed_tokens": rate.computed_tokens,
            "data/padding_tokens": rate.padding_tokens,
            "data/shared_tokens": rate.shared_tokens,
            "data/target_tokens": rate.target_tokens,
            "memory/peak_gib": self._peak_gib(),
        }
        if self.peak_flops:
            per_device = step_s * self.world_size * self.peak_flops
            metrics |= {"speed/mfu": rate.useful_flops / per_device, "speed/hfu": rate.executed_flops / per_device}
        return metrics

    def _mark(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def _peak_gib(self) -> float:
        if self._cuda:
            return float(self._cuda.max_memory_reserved(self.device) / 2**30)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


class CardSensors:
    """Utilisation, power and energy of this rank's NVIDIA card through NVML; silent about what it does not tell."""

    _handle: Any = None
    _first_mj: int | None = None

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            return
        import pynvml
        import torch

        self._nvml = pynvml
        uuid = torch.cuda.get_device_properties(device).uuid  # CUDA's index is not NVML's under CUDA_VISIBLE_DEVICES
        with suppress(pynvml.NVMLError):  # a container that hides the driver's library, a slice of a card
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._first_mj = self._ask(pynvml.nvmlDeviceGetTotalEnergyConsumption)

    def read(self) -> dict[str, float]:
        """card/utilisation (a fraction), card/power_w and card/energy_kj since the run began, as far as the card has them."""
        if self._handle is None:
            return {}
        busy = self._ask(self._nvml.nvmlDeviceGetUtilizationRates)
        power_mw = self._ask(self._nvml.nvmlDeviceGetPowerUsage)
        energy_mj = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)  # since Volta
        found = {
            "card/utilisation": None if busy is None else busy.gpu / 100,
            "card/power_w": None if power_mw is None else power_mw / 1000,
            "card/energy_kj": None if None in (energy_mj, self._first_mj) else (energy_mj - self._first_mj) / 1e6,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _ask(self, query: Callable[[Any], Any]) -> Any:
        """The card's answer; None if it has none to give."""
        with suppress(self._nvml.NVMLError):
            return query(self._handle)
