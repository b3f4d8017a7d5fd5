"""The cards as data, what this machine is, and what a process sets up before it computes. No torch."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.config import Refusal

GIB = 2**30
FAKE_MACHINE = "TUNESMITH_FAKE_MACHINE"
"""Environment variable: a JSON object of Machine's fields that stands in for this machine, to plan for another one."""


@dataclass(frozen=True)
class Card:
    """One model of GPU, from its datasheet; every peak is dense, never the doubled figure of 2:4 sparsity."""

    key: str
    """What is typed: hardware.card=KEY."""
    names: tuple[str, ...]
    """Device names as the driver prints them. Matched whole: "A10" is a part of "A10G" and of "A100"."""
    peak: Mapping[str, float]
    """FLOPS by type, with fp32 accumulation; a type that the card lacks is absent. fp32 is without tensor cores."""
    memory_gib: float
    """What torch can allocate, rounded down from reports (ECC and the driver take their share)."""
    bandwidth_gb_per_s: float
    """Memory bandwidth, 1e9 bytes/s."""
    link: str
    """Fastest way to another card."""
    link_gb_per_s: float
    """Speed of the link in one direction, 1e9 bytes/s."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    watts: int
    """Power limit; boost clocks, hence the peaks, are not sustained on a card that reaches it."""
    source: str

    def peak_of(self, dtype: str) -> float | None:
        """Of a type; of fp32 for tf32 where the card has none; None for a type that it lacks."""
        return self.peak.get(dtype, self.peak["fp32"] if dtype == "tf32" else None)

    @property
    def host_gb_per_s(self) -> float:
        """Speed to main memory in one direction, 1e9 bytes/s: its PCI Express, which is the link where there is no NVLink."""
        return self.link_gb_per_s if self.link.startswith("PCIe") else _PCIE_BY_MAJOR[self.capability[0]][1]


def _peaks(fp32: float, fp16: float, *, tf32: float = 0, bf16: float = 0, int8: float = 0) -> Mapping[str, float]:
    given = {"fp32": fp32, "tf32": tf32, "fp16": fp16, "bf16": bf16, "int8": int8}
    return {dtype: tera * 1e12 for dtype, tera in given.items() if tera}


_PCIE3, _PCIE4, _PCIE5 = ("PCIe 3.0 x16", 15.75), ("PCIe 4.0 x16", 31.5), ("PCIe 5.0 x16", 63.0)
_PCIE_BY_MAJOR = {7: _PCIE3, 8: _PCIE4, 9: _PCIE5}  # Volta and Turing, Ampere and Ada, Hopper

# The arithmetic behind a tensor peak: SMs x FLOP a clock and SM x boost clock. T4: 40 x 1024 x 1.59 GHz = 65e12.
# A10: 72 x 1024 x 1.695 GHz = 125e12 (dense; 250 is the sparse figure). A10G has half of that a clock and SM:
# 80 x 512 x 1.71 GHz = 70e12. GeForce halves it too once sums are kept in fp32, and training keeps them so.
CARDS: dict[str, Card] = {
    card.key: card
    for card in (
        Card("t4", ("Tesla T4", "NVIDIA T4"), _peaks(8.1, 65, int8=130), 14.56, 320, *_PCIE3, (7, 5), 70,
             "NVIDIA T4 datasheet; no bf16, no tf32"),
        Card("v100", ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"), _peaks(15.7, 125), 15.75, 900,
             "NVLink 2", 150, (7, 0), 300, "NVIDIA V100 datasheet, SXM2 column, 16 GB; no bf16, no tf32"),
        Card("a10", ("NVIDIA A10",), _peaks(31.2, 125, tf32=62.5, bf16=125, int8=250), 22.0, 600, *_PCIE4, (8, 6), 150,
             "NVIDIA A10 datasheet, without sparsity"),
        Card("a10g", ("NVIDIA A10G",), _peaks(35, 70, tf32=35, bf16=70, int8=140), 22.0, 600, *_PCIE4, (8, 6), 300,
             "NVIDIA A10G brief (AWS g5), without sparsity: half an A10's tensor rate a clock"),
        Card("a30", ("NVIDIA A30",), _peaks(10.3, 165, tf32=82, bf16=165, int8=330), 23.5, 933, *_PCIE4, (8, 0), 165,
             "NVIDIA A30 datasheet, without sparsity"),
        Card("a40", ("NVIDIA A40", "A40"), _peaks(37.4, 149.7, tf32=74.8, bf16=149.7, int8=299.3), 44.35, 696, *_PCIE4,
             (8, 6), 300, "NVIDIA A40 datasheet, without sparsity"),
        Card("a6000", ("NVIDIA RTX A6000", "RTX A6000"), _peaks(38.7, 154.8, tf32=77.4, bf16=154.8, int8=309.7), 47.4,
             768, *_PCIE4, (8, 6), 300, "NVIDIA GA102 whitepaper, appendix C, without sparsity"),
        Card("rtx3090", ("NVIDIA GeForce RTX 3090", "GeForce RTX 3090"),
             _peaks(35.6, 71.2, tf32=35.6, bf16=71.2, int8=284.7), 23.6, 936, *_PCIE4, (8, 6), 350,
             "NVIDIA GA102 whitepaper, appendix A, fp32 accumulation, without sparsity"),
        Card("rtx4090", ("NVIDIA GeForce RTX 4090",), _peaks(82.6, 165.2, tf32=82.6, bf16=165.2, int8=660.6), 23.5,
             1008, *_PCIE4, (8, 9), 450, "NVIDIA Ada whitepaper, appendix A, fp32 accumulation, without sparsity"),
        Card("l4", ("NVIDIA L4",), _peaks(30.3, 121, tf32=60, bf16=121, int8=242), 21.9, 300, *_PCIE4, (8, 9), 72,
             "NVIDIA L4 datasheet: half of its figures with sparsity"),
        Card("l40s", ("NVIDIA L40S",), _peaks(91.6, 362, tf32=183, bf16=362, int8=733), 44.4, 864, *_PCIE4, (8, 9), 350,
             "NVIDIA L40S datasheet, without sparsity"),
        Card("a100_40", ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
             _peaks(19.5, 312, tf32=156, bf16=312, int8=624), 39.4, 1555, "NVLink 3 (the PCIe card: PCIe 4.0 x16)", 300,
             (8, 0), 400, "NVIDIA A100 datasheet, without sparsity"),
        Card("a100_80", ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
             _peaks(19.5, 312, tf32=156, bf16=312, int8=624), 79.1, 1935, "NVLink 3 (the PCIe card: PCIe 4.0 x16)", 300,
             (8, 0), 400, "NVIDIA A100 datasheet, without sparsity; bandwidth of the PCIe card (SXM: 2039)"),
        Card("h100_sxm", ("NVIDIA H100 80GB HBM3",), _peaks(67, 989.4, tf32=494.7, bf16=989.4, int8=1979), 79.1, 3350,
             "NVLink 4", 450, (9, 0), 700, "NVIDIA H100 datasheet, SXM5: half of its figures with sparsity"),
        Card("h100_pcie", ("NVIDIA H100 PCIe",), _peaks(51, 756, tf32=378, bf16=756, int8=1513), 79.1, 2000, *_PCIE5,
             (9, 0), 350, "NVIDIA H100 datasheet, PCIe: half of its figures with sparsity"),
        Card("h200", ("NVIDIA H200",), _peaks(67, 989.4, tf32=494.7, bf16=989.4, int8=1979), 139.7, 4800,
             "NVLink 4", 450, (9, 0), 700, "NVIDIA H200 datasheet: half of its figures with sparsity"),
    )
}  # fmt: skip


def find_card(device_name: str) -> Card | None:
    """The row whose name is exactly this device's, or None: a wrong peak is worse than none."""
    return next((card for card in CARDS.values() if device_name.strip() in card.names), None)


def card_table() -> str:
    """All rows as Markdown, as printed in docs/hardware.md."""
    lines = [
        "| hardware.card | device names | fp32 | tf32 | fp16 | bf16 | int8 | GiB | GB/s | link, GB/s one way | sm | W "
        "| source |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for card in CARDS.values():
        peaks = " | ".join(
            f"{card.peak[kind] / 1e12:g}" if kind in card.peak else "—"
            for kind in ("fp32", "tf32", "fp16", "bf16", "int8")
        )
        lines.append(
            f"| `{card.key}` | {', '.join(card.names)} | {peaks} | {card.memory_gib:g} | {card.bandwidth_gb_per_s:g} "
            f"| {card.link}: {card.link_gb_per_s:g} | {card.capability[0]}.{card.capability[1]} | {card.watts} "
            f"| {card.source} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Machine:
    """What a run has to work with on one machine."""

    kind: str = "cpu"
    """cuda or cpu."""
    device_names: tuple[str, ...] = ()
    """The visible cards, as the driver calls them."""
    memory_gib: tuple[float, ...] = ()
    """Memory of each card that a program can allocate."""
    cores: int = 1
    """CPU cores that this process may use."""
    ram_gib: float = 0.0
    """Main memory that this process may use."""
    cpu_name: str = ""
    amx: bool = False
    """Whether the CPU multiplies tiles of bf16 and int8."""

    def __str__(self) -> str:
        cards = f"{len(self.device_names)} x {self.device_names[0]}" if self.device_names else "no GPU"
        return f"{cards}, {self.cores} cores, {self.ram_gib:.1f} GiB of RAM ({self.cpu_name or 'unknown CPU'})"


OVERCOMMIT = "/proc/sys/vm/overcommit_memory"


def prepare_environment(on_cpu: bool) -> None:
    """Set what libraries read when they are imported; call it before torch is."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and later forks do not go together
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for cards that are not to be used, and say so
        _prepare_heap()


def _prepare_heap() -> None:
    """Have glibc keep what is freed for the next tensor: it would give large blocks back, and the system clears each page of new ones.

    And in pages of 2 MB where the system has them: in a virtual machine it takes long to look up addresses of pages of 4 KB. 7 % and 5 % of
    a step on a CPU, for at most a few percent of memory (docs/log.md). Other C libraries and allocators are left alone.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    mmap_max, trim_threshold, huge_page, advice = -4, -1, 2**21, 14  # M_MMAP_MAX, M_TRIM_THRESHOLD; MADV_HUGEPAGE
    libc.mallopt(mmap_max, 0)  # no block has a mapping of its own
    libc.mallopt(trim_threshold, -1)  # and none of what is freed at the end is given back
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if lines_of(OVERCOMMIT) == ["2"]:  # where no more is promised than there is, addresses are taken from others
        return
    # glibc's heap to come: addresses alone, as nothing is written there.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if start := libc.malloc(size):
        aligned = (start + huge_page - 1) // huge_page * huge_page
        libc.madvise(aligned, size - (aligned - start), advice)
        libc.free(start)


def this_machine() -> Machine:
    """Look at the driver, the affinity mask and the cgroup, in milliseconds and without torch.

    CUDA_VISIBLE_DEVICES is honoured (empty hides every card), and so is TUNESMITH_FAKE_MACHINE. Raises Refusal when
    the latter is not a JSON object of Machine's fields.
    """
    if fake := os.environ.get(FAKE_MACHINE):
        return _fake_machine(fake)
    devices = _visible(_nvml_devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    ram = next((int(line.split()[1]) * 1024 for line in lines_of("/proc/meminfo") if line.startswith("MemTotal:")), 0)
    limit = _cgroup_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        kind="cuda" if devices else "cpu",
        device_names=tuple(name for _, name, _ in devices),
        memory_gib=tuple(round(size / GIB, 2) for _, _, size in devices),
        cores=max(1, min(cores, _cgroup_cores() or cores)),
        ram_gib=round((min(ram, limit) if limit else ram) / GIB, 2),
        cpu_name=cpu_name(),
        amx=has_amx(),
    )


def _fake_machine(text: str) -> Machine:
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        machine = Machine(**fields)
        if machine.kind not in ("cuda", "cpu") or len(machine.device_names) != len(machine.memory_gib):
            raise ValueError("kind must be cuda or cpu, and every device name needs its memory_gib")
    except (AttributeError, TypeError, ValueError) as error:
        example = '{"kind": "cuda", "device_names": ["Tesla T4"], "memory_gib": [14.56], "cores": 8, "ram_gib": 51}'
        raise Refusal(f"{FAKE_MACHINE}={text!r}: {error} — for example {example}") from None
    return machine


def _nvml_devices() -> list[tuple[str, str, int]]:
    """(uuid, name, bytes) of each card; empty without a driver. In PCI order, which CUDA keeps among equal cards."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # no package, no driver, no card, no permission: each means that there is nothing to train on
        return []
    try:
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            try:  # version 2 tells apart what the driver keeps, which torch cannot have either
                memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
                size = int(memory.total) - int(memory.reserved)
            except Exception:  # an older driver
                size = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            found.append((str(nvml.nvmlDeviceGetUUID(handle)), str(nvml.nvmlDeviceGetName(handle)), size))
        return found
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()


def _visible(devices: list[tuple[str, str, int]], setting: str | None) -> list[tuple[str, str, int]]:
    """What CUDA would show: all when unset, else the named ones up to the first name that is none of them."""
    if setting is None:
        return devices
    shown: list[tuple[str, str, int]] = []
    for word in (part.strip() for part in setting.split(",")):
        if word.isdigit() and int(word) < len(devices):
            shown.append(devices[int(word)])
        elif word.startswith("GPU-") and (matches := [device for device in devices if device[0].startswith(word)]):
            shown.append(matches[0])
        else:
            break
    return shown


def lines_of(path: str | Path) -> list[str]:
    """Of a file that may not be there."""
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def cpu_name() -> str:
    """As the kernel prints it; nothing where it does not."""
    return next(
        (line.split(":", 1)[1].strip() for line in lines_of("/proc/cpuinfo") if line.startswith("model name")), ""
    )


def cpu_words() -> str:
    """What this CPU can, in the kernel's words; its name where there are none."""
    return next((line for line in lines_of("/proc/cpuinfo") if line.startswith(("flags", "Features"))), platform.processor())


def has_amx() -> bool:
    """Whether this CPU multiplies tiles of bf16 and of int8."""
    return {"amx_tile", "amx_bf16", "amx_int8"} <= set(cpu_words().split())


def _cgroup_files(controller: str, v2: str, v1: str) -> list[list[str]]:
    """Words of the controller's file in this process's cgroup and in all above it: any of them may set the limit."""
    found = []
    for line in lines_of("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, name = ("/sys/fs/cgroup", v2) if not controllers else (f"/sys/fs/cgroup/{controller}", v1)
        for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
            text = " ".join(lines_of(f"{root}{folder}/{name}"))
            found += [text.split()] if text else []
    return found


def _cgroup_memory() -> int:
    """Smallest memory limit in bytes; 0: none."""
    words = _cgroup_files("memory", "memory.max", "memory.limit_in_bytes")
    return min((int(word[0]) for word in words if word[0].isdigit()), default=0)


def _cgroup_cores() -> int:
    """Smallest CPU quota in whole cores, at least one; 0: none."""
    quotas = [(int(words[0]), int(words[1])) for words in _cgroup_files("cpu", "cpu.max", "") if words[0].isdigit()]
    pairs = zip(
        _cgroup_files("cpu", "", "cpu.cfs_quota_us"), _cgroup_files("cpu", "", "cpu.cfs_period_us"), strict=False
    )
    quotas += [(int(quota[0]), int(period[0])) for quota, period in pairs if quota[0].isdigit()]
    return min((max(1, quota // period) for quota, period in quotas if period), default=0)


def cache_folder() -> Path:
    """Where converted models, prepared tokens and measured peaks are kept: $TUNESMITH_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("TUNESMITH_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
