"""Everything that is judged, gathered once: each question with a time limit, none of them raising."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import socket
import struct
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tunesmith.doctor.asking import Answer, ask_process, within
from tunesmith.hardware import FAKE_MACHINE, Machine, _visible, cache_folder, find_card, this_machine
from tunesmith.world import World

PROBE = "tunesmith.doctor.probe"
DRIVER_S, PROBE_S, LOOK_S = 20.0, 120.0, 5.0
"""Limits of a question to the driver, to a library (its import from a cold network disk included), and to the system."""
VARIABLES = ("MASTER_ADDR", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "SLURM_NNODES", "SLURM_JOB_NODELIST")


@dataclass(frozen=True)
class Package:
    """One of this program's dependencies."""

    name: str
    wanted: str
    """As in setup.cfg: torch>=2.9."""
    installed: str
    """Empty: not installed."""
    fits: bool


@dataclass(frozen=True)
class Device:
    """One visible card, as far as the driver tells; None: it does not."""

    index: int
    """The driver's own, as `nvidia-smi -i` takes it."""
    name: str
    capability: tuple[int, int] | None = None
    total_gib: float | None = None
    free_gib: float | None = None
    processes: tuple[int, ...] = ()
    watts: float | None = None
    default_watts: float | None = None
    clock_mhz: int | None = None
    default_clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    slowdowns: tuple[str, ...] = ()
    memory_errors: int = 0
    """Uncorrected, since the driver was loaded."""
    split: bool = False
    """By MIG."""


@dataclass(frozen=True)
class Disk:
    """A folder that a run writes to, or will make."""

    purpose: str
    path: str
    free_gib: float | None
    """None: the file system did not answer."""
    writable: bool = True


@dataclass(frozen=True)
class Interface:
    """A network interface."""

    name: str
    address: str
    """IPv4; empty: none."""
    up: bool


@dataclass(frozen=True)
class Facts:
    """What is known of this machine; emulated machines are other facts."""

    machine: Machine
    world: World = field(default_factory=World)
    emulated: bool = False
    """TUNESMITH_FAKE_MACHINE stands in for it: nothing was asked of its cards."""
    python: str = ""
    packages: tuple[Package, ...] = ()
    devices: tuple[Device, ...] = ()
    driver: Answer = field(default_factory=Answer)
    torch: Answer = field(default_factory=Answer)
    attention: Answer = field(default_factory=Answer)
    quantised: Answer = field(default_factory=Answer)
    deepspeed: Answer = field(default_factory=Answer)
    disks: tuple[Disk, ...] = ()
    shared_memory_gib: float | None = None
    available_ram_gib: float | None = None
    interfaces: tuple[Interface, ...] = ()
    host_addresses: tuple[str, ...] = ()
    """What this host's name resolves to; empty: nothing, or not in time."""
    master_addresses: tuple[str, ...] = ()
    """The same for MASTER_ADDR."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the environment, those that decide about cards and networks."""

    @property
    def capability(self) -> tuple[int, int] | None:
        """Of the first card; None: a CPU, or the driver does not tell."""
        return self.devices[0].capability if self.devices else None


def gather(world: World, outputs: str = "") -> Facts:
    """Ask everything; libraries at the same time, each in a process of its own. outputs: where run folders will be, if nobody else asks."""
    emulated = bool(os.environ.get(FAKE_MACHINE))
    driver = Answer() if emulated else ask_process(PROBE, ["driver"], {}, DRIVER_S)
    # A driver that did not answer the probe would hang this process too.
    machine = this_machine() if emulated else (None if driver.why else within(DRIVER_S, this_machine)) or Machine()
    devices = _emulated_devices(machine) if emulated else _devices(driver)
    order = {"cards": len(devices), "types": [kind for kind in ("fp32", "fp16", "bf16") if kind != "bf16" or _has_bf16(devices)]}
    with ThreadPoolExecutor() as pool:
        asked: dict[str, Future[Answer]] = {}
        if not emulated:
            names = ("torch", "attention", "quantised", "deepspeed")
            asked = {name: pool.submit(ask_process, PROBE, [name], order, PROBE_S) for name in names}
        seen = _system(outputs)
        if emulated:
            seen["available_ram_gib"] = None
        answers: dict[str, Any] = {name: future.result() for name, future in asked.items()}
    return Facts(machine, world, emulated, platform.python_version(), _packages(), devices, driver, **answers, **seen)


def disk(purpose: str, path: Path) -> Disk:
    """Free space where a folder is or would be made, and whether something can be written there."""

    def look() -> Disk:
        near = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        try:
            tempfile.TemporaryFile(dir=near).close()
            writable = True
        except OSError:
            writable = False
        return Disk(purpose, str(path), shutil.disk_usage(near).free / 2**30, writable)

    return within(LOOK_S, look) or Disk(purpose, str(path), None)


def _system(outputs: str) -> dict[str, Any]:
    """What the operating system knows, by Facts' names."""
    shared, master = Path("/dev/shm"), os.environ.get("MASTER_ADDR", "")
    folders = {"outputs": Path(outputs)} if outputs else {}
    folders |= {"cache": cache_folder(), "temporary files": Path(tempfile.gettempdir())}
    return {
        "disks": tuple(disk(purpose, path) for purpose, path in folders.items()),
        "shared_memory_gib": within(LOOK_S, lambda: shutil.disk_usage(shared).total / 2**30),
        "available_ram_gib": within(LOOK_S, _available_ram_gib),
        "interfaces": within(LOOK_S, _interfaces) or (),
        "host_addresses": _resolved(socket.gethostname()),
        "master_addresses": _resolved(master) if master else (),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _devices(driver: Answer) -> tuple[Device, ...]:
    cards = driver.found.get("cards", [])
    shown = _visible([(card["uuid"], str(place), 0) for place, card in enumerate(cards)], os.environ.get("CUDA_VISIBLE_DEVICES"))
    found = []
    for _, place, _ in shown:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in cards[int(place)].items()}
        fields: dict[str, Any] = {key: value for key, value in given.items() if key != "uuid"}
        found.append(Device(**fields))
    return tuple(found)


def _emulated_devices(machine: Machine) -> tuple[Device, ...]:
    found = []
    for index, (name, gib) in enumerate(zip(machine.device_names, machine.memory_gib, strict=True)):
        card = find_card(name)
        found.append(Device(index, name, card.capability if card else None, gib))
    return tuple(found)


def _has_bf16(devices: tuple[Device, ...]) -> bool:
    """By capability: torch says yes on older cards too, where it emulates."""
    return not devices or (devices[0].capability or (0, 0)) >= (8, 0)


def _packages() -> tuple[Package, ...]:
    found = []
    for line in requires("tunesmith") or ():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = ""
        fits = bool(installed) and requirement.specifier.contains(installed, prereleases=True)
        found.append(Package(requirement.name, f"{requirement.name}{requirement.specifier}", installed, fits))
    return tuple(found)


def _available_ram_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


def _interfaces() -> tuple[Interface, ...]:
    found = []
    for path in sorted(Path("/sys/class/net").iterdir()):
        try:
            state = (path / "operstate").read_text().strip()
        except OSError:  # bonding_masters is a file
            continue
        found.append(Interface(path.name, _address(path.name), state in ("up", "unknown")))
    return tuple(found)


def _address(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return ""
        return socket.inet_ntoa(answer[20:24])


def _resolved(host: str) -> tuple[str, ...]:
    """Addresses of a name; a resolver without a network can take half a minute to say no."""
    found = within(LOOK_S, lambda: [str(entry[4][0]) for entry in socket.getaddrinfo(host, None)]) or []
    return tuple(dict.fromkeys(found))
