"""From facts to findings: what is well, what is not, and what to type. Nothing is asked here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tunesmith.config import Config, EngineKind
from tunesmith.doctor.facts import Disk, Facts
from tunesmith.doctor.findings import Finding, fail, ok, warn
from tunesmith.doctor.legal import TAKEN, row_for, serves
from tunesmith.hardware import FAKE_MACHINE, find_card
from tunesmith.plan.shapes import multiplies_int8

PLACES = {"outputs": "outputs=", "cache": "export TUNESMITH_CACHE=", "hub": "export HF_HOME="}
WHEELS = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl"
LEAST_DRIVER = {13: "580", 12: "525"}
"""The oldest driver that runs a CUDA of that major version."""
USED_GIB = 1.0
"""Memory on a card that somebody uses: more than a desktop or a monitor needs."""
DISK_GIB = 5.0
"""What a small run writes: adapters of a few checkpoints, a converted small model."""
SHARED_GIB, LITTLE_SHARED_GIB = 1.0, 0.125
"""NCCL's documentation asks for a GiB of shared memory in a container; Docker gives 64 MiB, which a few channels fill."""
FEW_WATTS = 150
"""Cards with no more (T4, L4, A10) reach their power limit before their boost clock."""
BESIDE_NETWORK = ("lo", "docker", "veth", "virbr", "br-", "cni", "flannel", "ifb", "tun", "tap")


def judge(facts: Facts, config: Config | None = None) -> list[Finding]:
    """All findings about this machine; the config, if any, says which of the libraries must work."""
    found = [finding for rule in RULES for finding in rule(facts)]
    if not facts.emulated:
        found += [*_attention(facts), *_quantised(facts, config), *_deepspeed(facts, config)]
    return found


def _packages(facts: Facts) -> Iterator[Finding]:
    wrong = [package for package in facts.packages if not package.fits]
    for package in wrong:
        have = f"{package.installed} is installed" if package.installed else "is not installed"
        yield fail("packages", f"{package.name} {have}, {package.wanted} is needed", f"pip install '{package.wanted}'")
    told = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "wandb")
    named = {package.name: package.installed for package in facts.packages if package.fits}
    if named and not wrong:
        versions = ", ".join(f"{name} {named[name]}" for name in told if name in named)
        yield ok("packages", f"all {len(named)} fit: python {facts.python}, {versions}")


def _driver(facts: Facts) -> Iterator[Finding]:
    found, hidden = facts.driver.found, facts.variables.get("CUDA_VISIBLE_DEVICES")
    if facts.emulated:
        yield warn("driver", f"{FAKE_MACHINE} stands in for {facts.machine}: nothing was asked of it", f"unset {FAKE_MACHINE}")
    elif facts.driver.why:
        yield fail("driver", f"the NVIDIA driver: {facts.driver.why}", "see what nvidia-smi says; if it hangs too, restart the machine")
    elif facts.devices:
        version = ".".join(map(str, found["cuda"]))
        names = [device.name for device in facts.devices]
        cards = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        yield ok("driver", f"{found['driver']} (CUDA {version}): {cards}, capability {_dotted(facts.devices[0].capability)}")
        if len(set(names)) > 1:
            only = ",".join(str(device.index) for device in facts.devices if device.name == names[0])
            yield warn("driver", "the cards differ, and every step waits for the slowest", f"export CUDA_VISIBLE_DEVICES={only}")
    elif found.get("cards"):
        yield warn("driver", f"CUDA_VISIBLE_DEVICES={hidden!r} hides all {len(found['cards'])} cards", "unset CUDA_VISIBLE_DEVICES")
    elif found.get("on_bus"):
        fix = "install the NVIDIA driver; a container must be started with --gpus all"
        yield fail("driver", f"{found['on_bus']} NVIDIA card on the PCI bus, and no driver: {found.get('error', 'it shows none')}", fix)
    else:
        yield ok("driver", "no NVIDIA card here: this machine trains on its CPU")


def _torch(facts: Facts) -> Iterator[Finding]:
    found = facts.torch.found
    if facts.emulated:
        return
    if facts.torch.why or not found:
        yield fail("torch", f"torch: {facts.torch.why or 'was not asked'}", "pip install --force-reinstall torch, and ask again")
        return
    build, version = found["cuda"], found["version"]
    if not facts.devices:
        yield ok("torch", f"{version}, {f'built with CUDA {build}' if build else 'built without CUDA'}, on the CPU")
        return
    driver_cuda = tuple(facts.driver.found.get("cuda", (0, 0)))
    capability = facts.capability or (0, 0)
    wheel = f"{WHEELS}/{'cu130' if driver_cuda >= (13, 0) and capability >= (7, 5) else 'cu126'}"
    unfit = [device for device in facts.devices if device.capability and not _built_for(found["built_for"], device.capability)]
    major = int(build.partition(".")[0] or 0)
    if not build:
        yield fail("torch", f"{version} is built without CUDA, and here is {facts.devices[0].name}", wheel)
    elif driver_cuda[0] < major:
        need = f"or install driver {LEAST_DRIVER[major]} or newer" if major in LEAST_DRIVER else "or install a newer driver"
        fact = f"{version} is built with CUDA {build}, the driver knows CUDA {_dotted(driver_cuda)} at most"
        yield fail("torch", fact, f"{wheel}, {need}")
    elif unfit:
        fact = f"{version} is built for {', '.join(found['built_for'])}; {unfit[0].name} is {_dotted(unfit[0].capability)}"
        yield fail("torch", fact, wheel)
    elif "error" in found:
        fix = "see what nvidia-smi says; restart the machine or container"
        yield fail("torch", f"{version} cannot use the card: {found['error']}", fix)
    elif found["devices"] != len(facts.devices):
        fact = f"torch sees {found['devices']} cards, the driver {len(facts.devices)}"
        yield fail("torch", fact, "unset CUDA_VISIBLE_DEVICES, or name whole cards in it")
    elif found["broken"]:
        fact = "; ".join(f"{device}: {why}" for device, why in found["broken"].items())
        yield fail("torch", f"{version}: a matmul fails on {fact}", wheel)
    else:
        yield ok("torch", f"{version}, built with CUDA {build} for {', '.join(found['built_for'])}; matmuls come out right on every card")
    if found.get("claims_bf16") and capability < (8, 0):
        fact = f"bf16: torch says it is supported; capability {_dotted(capability)} has no units for it, and it is emulated"
        yield warn("precision", fact, "precision=fp16")


def _memory(facts: Facts) -> Iterator[Finding]:
    free = []
    for device in facts.devices:
        if device.free_gib is None or device.total_gib is None:
            continue
        free.append(f"{device.free_gib:.1f} of {device.total_gib:.1f}")
        if (used := device.total_gib - device.free_gib) > USED_GIB:
            by = f" by process {', '.join(map(str, device.processes))}" if device.processes else ""
            fact = f"card {device.index}: {used:.1f} of {device.total_gib:.1f} GiB are in use{by}"
            others = ",".join(str(other.index) for other in facts.devices if other.index != device.index)
            stop = f"kill {' '.join(map(str, device.processes))}" if device.processes else "end what uses it (nvidia-smi shows it)"
            yield warn("memory", fact, f"{stop}; or export CUDA_VISIBLE_DEVICES={others}" if others else stop)
    if free:
        yield ok("memory", f"GiB free on each card: {', '.join(free)}")
    ram, all_gib = facts.available_ram_gib, facts.machine.ram_gib
    if ram is not None:
        ram = min(ram, all_gib or ram)
        if ram < 0.25 * all_gib:
            yield warn("memory", f"RAM: {ram:.1f} of {all_gib:.1f} GiB free", "end what uses it (ps aux --sort=-rss | head)")
        else:
            yield ok("memory", f"RAM: {ram:.1f} of {all_gib:.1f} GiB free")


def _clocks(facts: Facts) -> Iterator[Finding]:
    for device in facts.devices:
        name, problems = f"card {device.index}", []
        if device.watts is not None and device.default_watts is not None and device.watts < device.default_watts:
            fact = f"{name}: limited to {device.watts:.0f} of {device.default_watts:.0f} W, and clocks fall with it"
            problems.append(warn("power", fact, f"sudo nvidia-smi -i {device.index} -pl {device.default_watts:.0f}"))
        if device.clock_mhz and device.default_clock_mhz and device.clock_mhz < device.default_clock_mhz:
            fact = f"{name}: its application clock is set to {device.clock_mhz} MHz, {device.default_clock_mhz} is its default"
            problems.append(warn("clock", fact, f"sudo nvidia-smi -i {device.index} -rac"))
        if device.slowdowns:
            fact = f"{name}: slowed down at this moment by {', '.join(device.slowdowns)}"
            fix = f"look after cooling and power supply (nvidia-smi -i {device.index} -q -d TEMPERATURE,POWER)"
            problems.append(warn("clock", fact, fix))
        if device.memory_errors:
            fact = f"{name}: {device.memory_errors} uncorrected memory errors since the driver was loaded"
            problems.append(fail("memory", fact, f"sudo nvidia-smi -i {device.index} -r; if they come back, take another card"))
        if device.split:
            fact = f"{name}: split by MIG, and this program takes whole cards"
            problems.append(fail("driver", fact, f"sudo nvidia-smi -i {device.index} -mig 0"))
        yield from problems
        if not problems and device.watts is not None and device is facts.devices[0]:
            clock = f", at most {device.max_clock_mhz} MHz" if device.max_clock_mhz else ""
            short = "" if device.watts > FEW_WATTS else "; the boost clock, hence the datasheet's peak, does not last at so few watts"
            yield ok("power", f"{device.watts:.0f} W{clock}, not slowed down{short}")
    unknown = next((device.name for device in facts.devices if not find_card(device.name)), "")
    if unknown:
        yield warn("peak", f"no row for {unknown!r} in the card table, so MFU is not reported", "hardware.peak=measure")


def _disks(facts: Facts) -> Iterator[Finding]:
    for disk in facts.disks:
        yield judge_disk(disk, DISK_GIB)


def judge_disk(disk: Disk, needed_gib: float, *, must: bool = False) -> Finding:
    """Whether a folder can be written to and has room; `must`: less than needed ends the run."""
    fix = f"{PLACES.get(disk.purpose, 'export TMPDIR=')}/path/with/room"
    where = f"{disk.purpose} ({disk.path})"
    if disk.free_gib is None:
        return fail("disk", f"{where}: the file system does not answer", f"see whether it is mounted (df {disk.path}); {fix}")
    if not disk.writable:
        return fail("disk", f"{where}: cannot be written to", fix)
    fact = f"{where}: {disk.free_gib:.1f} GiB free{f', {needed_gib:.1f} needed' if must else ''}"
    if disk.free_gib >= needed_gib:
        return ok("disk", fact)
    return fail("disk", fact, f"free some space, or {fix}") if must else warn("disk", fact, f"free some space, or {fix}")


def _shared_memory(facts: Facts) -> Iterator[Finding]:
    size, ranks = facts.shared_memory_gib, max(facts.world.local_size, len(facts.devices))
    fix = "docker run --shm-size=1g ..., or --ipc=host; in Kubernetes an emptyDir with medium: Memory at /dev/shm"
    if size is None:
        yield warn("shared memory", "/dev/shm is not there: ranks of one machine exchange data through it", fix)
    elif size < SHARED_GIB and ranks > 1:
        fact = f"/dev/shm has {size * 1024:.0f} MiB for {ranks} ranks"
        yield fail("shared memory", fact, fix) if size < LITTLE_SHARED_GIB else warn("shared memory", fact, fix)
    else:
        yield ok("shared memory", f"/dev/shm has {size:.1f} GiB")


def _network(facts: Facts) -> Iterator[Finding]:
    variables, world = facts.variables, facts.world
    names = [interface.name for interface in facts.interfaces]
    outward = [one for one in facts.interfaces if one.up and one.address and not one.name.startswith(BESIDE_NETWORK)]
    first = outward[0].name if outward else "eth0"
    several = world.size > world.local_size or variables.get("SLURM_NNODES", "1") not in ("", "1")
    wrong = []
    gloo, nccl = variables.get("GLOO_SOCKET_IFNAME", ""), variables.get("NCCL_SOCKET_IFNAME", "")
    if gloo and (absent := [name for name in gloo.split(",") if name not in names]):
        note = " (unlike NCCL it takes no ^ and no beginnings of names)" if gloo.startswith("^") else ""
        fact = f"GLOO_SOCKET_IFNAME={gloo}: no interface {', '.join(absent)}{note}; here are {', '.join(names)}"
        wrong.append(fail("network", fact, f"export GLOO_SOCKET_IFNAME={first}"))
    if nccl and not [name for name in names if _nccl_takes(nccl, name)]:
        fact = f"NCCL_SOCKET_IFNAME={nccl}: leaves no interface; here are {', '.join(names)}"
        wrong.append(fail("network", fact, f"export NCCL_SOCKET_IFNAME={first}"))
    if (master := variables.get("MASTER_ADDR")) and not facts.master_addresses:
        fix = "export MASTER_ADDR= the first node's name or address, as the others reach it"
        wrong.append(fail("network", f"MASTER_ADDR={master} does not resolve here", fix))
    inward = all(address.startswith(("127.", "::1")) for address in facts.host_addresses)  # also where there is none
    if inward and several and not gloo:
        what = f"resolves to {facts.host_addresses[0]}" if facts.host_addresses else "does not resolve"
        fact = f"this host's name {what}, so gloo would tell the other machines an address that leads nowhere"
        wrong.append(fail("network", fact, f"export GLOO_SOCKET_IFNAME={first} on every machine"))
    if several and not nccl and len(outward) > 1:
        shown = ", ".join(f"{one.name} ({one.address})" for one in outward)
        fact = f"{len(outward)} interfaces lead outward: {shown}; NCCL chooses by itself"
        wrong.append(warn("network", fact, f"export NCCL_SOCKET_IFNAME={first}, the one that the other machines reach"))
    yield from wrong
    if not wrong:
        shown = ", ".join(f"{one.name} ({one.address})" for one in outward) or "none leads outward"
        host = f"its name resolves to {facts.host_addresses[0]}" if facts.host_addresses else "its name does not resolve"
        alone = "" if several else ", enough for one machine"
        yield ok("network", f"interfaces: {shown}; {host}{alone}")


def _attention(facts: Facts) -> Iterator[Finding]:
    found = facts.attention.found
    if facts.attention.why or not found:
        yield fail("attention", f"trying attention kernels: {facts.attention.why or 'was not done'}", "pip install --force-reinstall torch")
        return
    row = row_for(facts.capability) if facts.capability or not facts.devices else None
    where = "card" if found["device"] == "cuda" else "CPU"
    alike: dict[str, list[str]] = {}
    for kind in ("fp32", "fp16", "bf16"):
        tried = found.get(kind, {})
        ran = [kernel for kernel, why in tried.items() if not why]
        expected = [kernel for kernel in TAKEN if row and serves(row, kernel, kind)]
        missing = [f"{kernel} should: {tried[kernel]}" for kernel in expected if kernel in tried and kernel not in ran]
        told = f"{kind} on this {where}: {', '.join(ran) or 'nothing'} ran"
        if missing:
            yield warn("attention", f"{told}; {'; '.join(missing)}", "pip install --upgrade torch")
        elif tried and not set(ran) - {"math"}:
            yield warn("attention", f"{told}: no kernel that spares the n x n scores", "a smaller data.max_tokens, or another card")
        elif tried:
            alike.setdefault(", ".join(ran), []).append(kind)
    for kernels, kinds in alike.items():
        yield ok("attention", f"{' and '.join(kinds)} on this {where}: {kernels} ran, forward and backward")


def _quantised(facts: Facts, config: Config | None) -> Iterator[Finding]:
    found, base = facts.quantised.found, config.method.base.value if config and not multiplies_int8(config) else ""
    fix = "pip install --upgrade bitsandbytes (python -m bitsandbytes tells more); without it method.base=as_is"
    if facts.quantised.why or not found:
        yield (fail if base in ("nf4", "int8") else warn)("bitsandbytes", f"bitsandbytes: {facts.quantised.why or 'was not asked'}", fix)
        return
    row = row_for(facts.capability) if facts.capability or not facts.devices else None
    broken = {name: found[name] for name in ("nf4", "int8") if found.get(name) and not (row and row.cells[name].legal == "no")}
    for name, why in broken.items():
        fact = f"{found['version']}: {name} does not work on this {found['device']}: {why}"
        yield (fail if base == name else warn)("bitsandbytes", fact, fix)
    if working := [name for name in ("nf4", "int8") if found.get(name) == ""]:
        yield ok("bitsandbytes", f"{found['version']}: {' and '.join(working)} train on this {found['device']}")


def _deepspeed(facts: Facts, config: Config | None) -> Iterator[Finding]:
    found = facts.deepspeed.found
    if facts.deepspeed.why or not found:
        fix = "pip install --upgrade deepspeed, or engine=accelerate"
        without = config is not None and config.engine.kind is not EngineKind.deepspeed
        yield (warn if without else fail)("deepspeed", f"importing deepspeed: {facts.deepspeed.why or 'was not done'}", fix)
        return
    wanted = "cuda" if facts.devices else "cpu"
    if found["accelerator"] != wanted:
        fact = f"{found['version']} takes {found['accelerator']} for the accelerator, here is {wanted}"
        yield warn("deepspeed", fact, f"export DS_ACCELERATOR={wanted}")
        return
    built, could = found["built"], [name for name in found["could_build"] if name not in found["built"]]
    ops = f"compiled ops, of which this program needs none: {', '.join(built) or 'none'}; could be compiled: {', '.join(could) or 'none'}"
    yield ok("deepspeed", f"{found['version']} on {found['accelerator']}, {found['backend']}; {ops}")


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _packages, _driver, _torch, _memory, _clocks, _disks, _shared_memory, _network,
)  # fmt: skip


def _built_for(arches: list[str], capability: tuple[int, int]) -> bool:
    """Code for sm_XY runs on every later minor version of X; compute_XY is compiled at first use for any later card."""
    for arch in arches:
        if not (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch)):
            continue
        made = int(found[2]), int(found[3])
        if made <= capability and (found[1] == "compute" or made[0] == capability[0]):
            return True
    return False


def _nccl_takes(setting: str, name: str) -> bool:
    """NCCL's rule: beginnings of names, = for whole names, ^ for all but these."""
    excluded, exact = setting.startswith("^"), "=" in setting[:2]
    listed = setting.lstrip("^=").split(",")
    matches = name in listed if exact else any(name.startswith(one) for one in listed)
    return matches != excluded


def _dotted(pair: tuple[int, ...] | None) -> str:
    return ".".join(map(str, pair)) if pair else "unknown"
