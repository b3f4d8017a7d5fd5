"""python -m tunesmith.doctor.meeting: do all ranks of a launcher find each other, and how fast do they exchange data?

Every rank runs it. They first sign a list, so that whoever does not come can be named; then gloo, then NCCL where there are
cards. A collective that hangs is cut off from outside, and what was reached before is told.
"""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunesmith.doctor.asking import Answer, answer_to, ask_process, first_line
from tunesmith.doctor.findings import Finding, fail, ok, warn
from tunesmith.world import World, rendezvous, this_world

LIMIT_S = 20.0
"""How long the others may take to come, and then each backend to connect."""
IMPORT_S = 60.0
MIB = 2**20
SLOW_GB_PER_S = 0.1
"""Less than a gigabit link carries."""

Tell = Callable[[Mapping[str, Any]], None]


def meet(order: Mapping[str, Any], tell: Tell) -> None:
    """The child's side: one rank of the meeting."""
    world, limit = this_world(), timedelta(seconds=order["wait_s"])
    address, port = rendezvous(world)
    tell({"at": f"{address}:{port}"})
    start_s = time.monotonic()
    import torch
    import torch.distributed as dist

    # On a machine with a slower disk the import may take twice as long: nobody is missed who is only late for that.
    wait_s = order["wait_s"] + time.monotonic() - start_s
    # torchrun's agent keeps a store at this address already; other launchers leave that to rank 0.
    is_host = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not is_host:
            _knock(address, port, wait_s)
        plain = dist.TCPStore(address, port, world.size, is_host, limit, wait_for_workers=False)
        store = dist.PrefixStore("tunesmith-doctor", plain)
        store.set(f"came/{world.rank}", world.node)
    except Exception as error:
        tell({"store": first_line(error)})
        return
    came = _wait(store, world, wait_s)
    tell({"came": {str(rank): came[rank] for rank in sorted(came)}, "waited_s": wait_s})
    if len(came) < world.size:
        if is_host:
            time.sleep(2)  # the others look for the list where this rank keeps it
        return
    card = torch.cuda.is_available() and world.local_rank < torch.cuda.device_count()
    try:
        dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=world.rank, world_size=world.size, timeout=limit)
        tell({"gloo": _speed(dist, torch, torch.device("cpu"))})
        mine = {
            "python": platform.python_version(), "tunesmith": version("tunesmith"), "torch": torch.__version__,
            "NCCL": ".".join(map(str, _nccl_version(torch))) if card else "",
        }  # fmt: skip
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, (mine, card))
        tell({"versions": [versions for versions, _ in everyone], "cards": [has for _, has in everyone]})
        if order["outputs"]:
            tell({"shared": _is_shared(dist, world, Path(order["outputs"]))})
    except Exception as error:
        tell({"gloo_error": first_line(error)})
        return
    if not all(has for _, has in everyone):
        return
    tell({"nccl_began": True})
    try:
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl", timeout=limit)
        tell({"nccl": _speed(dist, torch, device, group)})
    except Exception as error:
        tell({"nccl_error": first_line(error)})


def _nccl_version(torch: Any) -> tuple[int, ...]:
    return tuple(torch.cuda.nccl.version())


def _knock(address: str, port: int, wait_s: float) -> None:
    """Wait for a door to open; raises OSError with the last reason. torch's store would try for three times as long."""
    end_s = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, end_s - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() >= end_s:
                raise
        time.sleep(0.2)


def _wait(store: Any, world: World, wait_s: float) -> dict[int, str]:
    """The hosts of the ranks that came, until all did or the time is over."""
    came: dict[int, str] = {}
    end_s = time.monotonic() + wait_s
    with suppress(Exception):  # the rank that keeps the list may leave first
        while len(came) < world.size and time.monotonic() < end_s:
            for rank in range(world.size):
                if rank not in came and store.check([f"came/{rank}"]):
                    came[rank] = store.get(f"came/{rank}").decode()
            time.sleep(0.05)
    return came


def _speed(dist: Any, torch: Any, device: Any, group: Any = None) -> dict[str, float]:
    """Median milliseconds of an all-reduce of 8 bytes and of 1 MiB; raises if a sum comes out wrong."""
    took = {}
    ranks = dist.get_world_size()
    for name, numbers in (("small_ms", 2), ("mib_ms", MIB // 4)):
        times = []
        for attempt in range(8):
            values = torch.ones(numbers, device=device)
            start_s = time.perf_counter()
            dist.all_reduce(values, group=group)
            total = float(values[-1])  # waits for a card
            times.append(time.perf_counter() - start_s)
            if total != ranks:
                raise RuntimeError(f"the sum of {ranks} ones came out as {total}")
            if not attempt:
                times.clear()  # the first one connects
        took[name] = sorted(times)[len(times) // 2] * 1000
    return took


def _is_shared(dist: Any, world: World, outputs: Path) -> list[int]:
    """Ranks that do not see a file which rank 0 made where run folders will be."""
    near = next(folder for folder in (outputs.absolute(), *outputs.absolute().parents) if folder.exists())
    box: list[Any] = [None]
    with tempfile.NamedTemporaryFile(dir=near, prefix=".tunesmith-doctor-") if world.is_main else nullcontext() as file:
        box[0] = Path(file.name).name if file else None
        dist.broadcast_object_list(box)
        end_s = time.monotonic() + 5  # a network file system may show it late
        while not (seen := (near / box[0]).exists()) and time.monotonic() < end_s:
            time.sleep(0.2)
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, bool(seen))
    return [rank for rank, sees in enumerate(everyone) if not sees]


def hold_meeting(world: World, outputs: str = "", wait_s: float = LIMIT_S) -> Answer:
    """Take part in the meeting as this rank; every rank has to call it."""
    order = {"wait_s": wait_s, "outputs": outputs}
    return ask_process("tunesmith.doctor.meeting", [], order, IMPORT_S + 3 * wait_s + 10)


def judge_meeting(answer: Answer, world: World) -> Iterator[Finding]:
    """What the meeting showed."""
    found = answer.found
    if "came" not in found:
        place = f"the meeting place {found['at']}" if "at" in found else "the meeting place"
        why = found.get("store") or answer.why or "nothing was told"
        if world.rank == 0:
            fix = "choose another MASTER_PORT, and as MASTER_ADDR a name of this very host"
            yield fail("ranks", f"rank 0 cannot open {place}: {why}", fix)
        else:
            fix = "see whether rank 0 was started, MASTER_ADDR is its host, and the port is not behind a firewall"
            yield fail("ranks", f"rank 0 did not come: rank {world.rank} on {world.node} cannot reach {place}: {why}", fix)
        return
    came = {int(rank): host for rank, host in found["came"].items()}
    if missing := [rank for rank in range(world.size) if rank not in came]:
        names = ", ".join(_named(rank, world) for rank in missing)
        here = ", ".join(f"rank {rank} on {host}" for rank, host in came.items())
        fix = "see whether it was started there, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and what it printed"
        yield fail("ranks", f"{names} did not come within {found['waited_s']:.0f} s; came: {here}", fix)
        return
    hosts = list(dict.fromkeys(came.values()))
    yield ok("ranks", f"all {world.size} ranks came, on {', '.join(hosts)}")
    yield from _backend("gloo", found, answer, hosts, "GLOO_SOCKET_IFNAME")
    if versions := found.get("versions"):
        yield from _same(versions, came)
    if lost := found.get("shared"):
        fact = f"outputs is no shared folder: rank {', '.join(map(str, lost))} cannot see what rank 0 writes there"
        yield fail("ranks", fact, "outputs=/a/folder/on/a/shared/file/system, and start all ranks in the same folder")
    cards = found.get("cards", [])
    if any(cards) and not all(cards):
        without = ", ".join(f"{rank} on {came[rank]}" for rank, has in enumerate(cards) if not has)
        yield fail("ranks", f"rank {without} has no card of its own, others have", "start as many ranks on each machine as it has cards")
    if "nccl_began" in found:
        yield from _backend("nccl", found, answer, hosts, "NCCL_SOCKET_IFNAME")


def _named(rank: int, world: World) -> str:
    if world.size == world.local_size:
        return f"rank {rank}"
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    machine = f"machine {rank // world.local_size + 1} of {-(-world.size // world.local_size)}"
    return f"rank {rank} ({machine}{f' in {nodes}' if nodes else ''})"


def _backend(name: str, found: Mapping[str, Any], answer: Answer, hosts: list[str], variable: str) -> Iterator[Finding]:
    speed = found.get(name)
    if speed is None:
        why = found.get(f"{name}_error") or answer.why or "it ended without a word"
        first = "see the network line" if len(hosts) > 1 else "all ranks are on this machine: see the shared memory line"
        debug = "NCCL_DEBUG=INFO" if name == "nccl" else "TORCH_DISTRIBUTED_DEBUG=DETAIL"
        fact = f"the ranks found each other, but {name} does not connect them: {why}"
        yield fail(name, fact, f"{first}; export {variable}=eth0; {debug} tells more")
        return
    rate = MIB / speed["mib_ms"] / 1e6
    fact = f"all-reduce of 8 bytes {speed['small_ms']:.2f} ms, of 1 MiB {speed['mib_ms']:.2f} ms ({rate:.2f} GB/s)"
    if len(hosts) > 1 and rate < SLOW_GB_PER_S:
        yield warn(name, f"{fact}: slower than a gigabit link", f"export {variable}= the fastest interface between the machines")
    else:
        yield ok(name, fact)


def _same(versions: list[Mapping[str, str]], came: Mapping[int, str]) -> Iterator[Finding]:
    for package in versions[0]:
        different = [rank for rank, of in enumerate(versions) if of[package] != versions[0][package]]
        if different:
            rank = different[0]
            theirs, first = (versions[one][package] or "(none)" for one in (rank, 0))
            fact = f"rank {rank} on {came[rank]} has {package} {theirs}, rank 0 on {came[0]} has {first}"
            yield fail("ranks", fact, "install the same versions on every machine: pip install -c constraints.txt -e .")


if __name__ == "__main__":
    answer_to(meet)
