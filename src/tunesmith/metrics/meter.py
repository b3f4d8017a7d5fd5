"""The meter: throughput, FLOPs, memory, and the time of a step by phase."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

PHASES = ("data", "forward", "backward", "optimizer", "communication", "other")


@dataclass(frozen=True)
class Rate:
    """What one step computed over all ranks, for turning its seconds into rates."""

    conversations: int
    computed_tokens: int
    """Tokens that went through the model, padding included."""
    padding_tokens: int
    target_tokens: int
    useful_flops: float
    """FLOPs that the update needs (docs/metrics.md)."""
    executed_flops: float
    """FLOPs really computed: padding, masked attention and recomputation included."""


class Meter:
    """Times the phases of a step with the device's own clock; on a card nothing waits until the step's end."""

    def __init__(self, device: torch.device, world_size: int, peak_flops: float | None):
        self.device = device
        self.world_size = world_size
        self.peak_flops = peak_flops
        self._spans: list[tuple[str, Any, Any]] = []
        self._start_s = perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside as part of a phase."""
        start = self._mark()
        yield
        self._spans.append((name, start, self._mark()))

    def begin(self) -> None:
        """Start the clock of a step; what lies between two steps (saving, evaluating) belongs to none."""
        self._spans.clear()
        self._start_s = perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def end(self, rate: Rate, communication_s: float) -> dict[str, float]:
        """Close the step: seconds by phase, tokens/s, TFLOPS, MFU, HFU and memory, by their metric names."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        step_s = perf_counter() - self._start_s
        spent = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self._spans:
            spent[name] += end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1000
        # Collectives run inside backward (gradient buckets) and optimizer (norm, updated weights): taken out of where they lie.
        spent["communication"] = communication_s
        from_backward = min(communication_s, spent["backward"])
        spent["backward"] -= from_backward
        spent["optimizer"] = max(0.0, spent["optimizer"] - (communication_s - from_backward))
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
            "data/target_tokens": rate.target_tokens,
            "memory/peak_gib": self._peak_gib(),
        }
        if self.peak_flops:
            per_device = step_s * self.world_size * self.peak_flops
            metrics |= {"speed/mfu": rate.useful_flops / per_device, "speed/hfu": rate.executed_flops / per_device}
        return metrics

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _peak_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


class CardSensors:
    """Utilisation, power and energy of this rank's NVIDIA card through NVML; silent where there is none."""

    def __init__(self, device: torch.device):
        self._handle: Any = None
        if device.type != "cuda":
            return
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid  # CUDA's index is not NVML's under CUDA_VISIBLE_DEVICES
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self._first_mj = self._energy_mj()

    def read(self) -> dict[str, float]:
        """card/utilisation (a fraction), card/power_w, card/energy_kj since the run began (absent before Volta)."""
        if self._handle is None:
            return {}
        found = {
            "card/utilisation": self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100,
            "card/power_w": self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,
        }
        if (now := self._energy_mj()) is not None and self._first_mj is not None:
            found["card/energy_kj"] = (now - self._first_mj) / 1e6
        return found

    def _energy_mj(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:
            return None
