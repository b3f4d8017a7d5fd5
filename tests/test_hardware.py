"""The card table against arithmetic, and the machine against faked drivers, cgroups and variables."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith import hardware, peaks
from tunesmith.hardware import (
    CARDS,
    FAKE_MACHINE,
    Machine,
    card_table,
    find_card,
    this_machine,
)
from tunesmith.peaks import measure_cpu, overheads, peak_flops  # fmt: skip

DOCS = Path(__file__).parents[1] / "docs" / "hardware.md"
T4 = Machine("cuda", ("Tesla T4",), (14.56,), 8, 51.0, "some CPU")

# key: (SMs, dense fp16 FLOP a clock and SM with fp32 sums, clock in GHz at which NVIDIA states tensor peaks)
TENSOR_CORES = {
    "t4": (40, 1024, 1.59), "v100": (80, 1024, 1.53), "a10": (72, 1024, 1.695), "a10g": (80, 512, 1.71),
    "a30": (56, 2048, 1.44), "a40": (84, 1024, 1.74), "a6000": (84, 1024, 1.80), "rtx3090": (82, 512, 1.695),
    "rtx4090": (128, 512, 2.52), "l4": (58, 1024, 2.04), "l40s": (142, 1024, 2.49), "a100_40": (108, 2048, 1.41),
    "a100_80": (108, 2048, 1.41), "h100_sxm": (132, 4096, 1.83), "h100_pcie": (114, 4096, 1.62),
    "h200": (132, 4096, 1.83),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (FAKE_MACHINE, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- cards ---------------------------------------------------------------------------------------------------------


def test_tensor_peaks_are_what_the_units_can_do() -> None:
    """SMs x FLOP a clock x clock: a sparse figure, or a fp16-accumulate one, would be off by a factor of two."""
    assert set(TENSOR_CORES) == set(CARDS)
    for key, (sms, flop, ghz) in TENSOR_CORES.items():
        assert CARDS[key].peak["fp16"] == pytest.approx(sms * flop * ghz * 1e9, rel=0.005), key


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_rows_are_consistent(card: hardware.Card) -> None:
    ampere = card.capability >= (8, 0)
    assert ("bf16" in card.peak) is ampere, "bf16 units came with compute capability 8.0"
    assert ("tf32" in card.peak) is ampere
    assert card.peak.get("bf16", card.peak["fp16"]) == card.peak["fp16"]
    if "int8" in card.peak:  # twice fp16; four times on GeForce, whose fp16 is halved
        factor = 4 if card.key.startswith("rtx") else 2
        assert card.peak["int8"] == pytest.approx(factor * card.peak["fp16"], rel=0.02)
    assert card.source
    assert 8 < card.memory_gib < 141


def test_the_two_cards_that_are_often_mistaken() -> None:
    assert CARDS["a10"].peak["bf16"] == 125e12
    assert CARDS["a10g"].peak["bf16"] == 70e12


def test_names_are_matched_whole() -> None:
    found = {name: card.key for card in CARDS.values() for name in card.names}
    assert sum(len(card.names) for card in CARDS.values()) == len(found), "one name, one card"
    for name, key in found.items():
        assert find_card(name) is CARDS[key]
    assert found["NVIDIA A10"] == "a10"
    assert found["NVIDIA A10G"] == "a10g"
    assert found["NVIDIA A100-SXM4-40GB"] == "a100_40"
    for stranger in ("A10", "NVIDIA A100", "NVIDIA A10M", "NVIDIA T400", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", ""):
        assert find_card(stranger) is None


def test_the_page_shows_the_table() -> None:
    assert card_table() in DOCS.read_text(encoding="utf-8"), (
        "put the output of hardware.card_table() into docs/hardware.md"
    )


# --- this machine --------------------------------------------------------------------------------------------------


def fake_nvml(*cards: tuple[str, int], reserved: int | None = 2**28) -> SimpleNamespace:
    class NVMLError(Exception):
        pass

    def memory(index: int, version: int = 1) -> SimpleNamespace:
        if version == 2 and reserved is None:
            raise NVMLError("this driver is old")
        return SimpleNamespace(total=cards[index][1], **({"reserved": reserved} if version == 2 else {}))

    return SimpleNamespace(
        NVMLError=NVMLError, nvmlMemory_v2=2, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(cards), nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=memory, nvmlDeviceGetName=lambda index: cards[index][0],
        nvmlDeviceGetUUID=lambda index: f"GPU-{'abcdef'[index]}123",
    )  # fmt: skip


def test_without_a_driver_it_is_a_cpu_and_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_nvml_devices", lambda: [])
    elapsed_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        machine = this_machine()
        elapsed_s.append(time.perf_counter() - start_s)
    assert min(elapsed_s) < 0.1
    assert machine.kind == "cpu"
    assert not machine.device_names
    assert not machine.memory_gib
    assert machine.cores >= 1
    assert machine.ram_gib > 0.5
    assert str(machine).startswith("no GPU")


def test_a_failing_driver_means_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=fail))
    assert this_machine().kind == "cpu"


@pytest.mark.parametrize("reserved", [2**28, None], ids=["new driver", "old driver"])
def test_cards_are_seen_with_the_memory_torch_can_have(monkeypatch: pytest.MonkeyPatch, reserved: int | None) -> None:
    monkeypatch.setitem(
        sys.modules, "pynvml", fake_nvml(("Tesla T4", 15 * 2**30), ("NVIDIA A10", 22 * 2**30), reserved=reserved)
    )
    machine = this_machine()
    assert machine.kind == "cuda"
    assert machine.device_names == ("Tesla T4", "NVIDIA A10")
    assert machine.memory_gib == ((14.75, 21.75) if reserved else (15.0, 22.0))


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("", ""),
        ("-1", ""),
        ("0", "a"),
        ("2,0", "ca"),
        ("1,9,0", "b"),
        ("GPU-c1", "c"),
        ("GPU-b,GPU-a123", "ba"),
        ("MIG-x", ""),
    ],
)
def test_cuda_visible_devices_is_honoured(monkeypatch: pytest.MonkeyPatch, setting: str, names: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(("a", 2**30), ("b", 2**30), ("c", 2**30)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    machine = this_machine()
    assert "".join(machine.device_names) == names
    assert machine.kind == ("cuda" if names else "cpu")


@pytest.mark.parametrize(
    ("files", "ram_gib", "cores"),
    [
        (
            {
                "/proc/self/cgroup": ["0::/"],
                "/sys/fs/cgroup/memory.max": ["max"],
                "/sys/fs/cgroup/cpu.max": ["max 100000"],
            },
            16,
            8,
        ),
        # The limit of a job stands above the process's own cgroup.
        (
            {
                "/proc/self/cgroup": ["0::/job_7/step_0"],
                "/sys/fs/cgroup/job_7/memory.max": ["4294967296"],
                "/sys/fs/cgroup/job_7/step_0/memory.max": ["max"],
                "/sys/fs/cgroup/job_7/cpu.max": ["250000 100000"],
            },
            4,
            2,
        ),
        (
            {
                "/proc/self/cgroup": ["5:cpu,cpuacct:/box", "4:memory:/box", "0::/"],
                "/sys/fs/cgroup/memory/box/memory.limit_in_bytes": ["2147483648"],
                "/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": ["50000"],
                "/sys/fs/cgroup/cpu/box/cpu.cfs_period_us": ["100000"],
            },
            2,
            1,
        ),
    ],
    ids=["unlimited", "version 2", "version 1"],
)
def test_cgroup_limits(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, list[str]], ram_gib: float, cores: int
) -> None:
    files = {**files, "/proc/meminfo": ["MemTotal: 16777216 kB"], "/proc/cpuinfo": ["model name\t: Toy"]}
    monkeypatch.setattr(hardware, "lines_of", lambda path: files.get(str(path).replace("//", "/"), []))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    machine = this_machine()
    assert (machine.ram_gib, machine.cores, machine.cpu_name) == (ram_gib, cores, "Toy")


def test_another_machine_can_be_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {
        "kind": "cuda",
        "device_names": ["Tesla T4"],
        "memory_gib": [14.56],
        "cores": 8,
        "ram_gib": 51.0,
        "cpu_name": "some CPU",
    }
    monkeypatch.setenv(FAKE_MACHINE, json.dumps(fields))
    assert this_machine() == T4


@pytest.mark.parametrize("text", ["t4", "[1]", '{"gpus": 1}', '{"kind": "tpu"}', '{"device_names": ["Tesla T4"]}'])
def test_a_bad_stand_in_is_explained(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(FAKE_MACHINE, text)
    with pytest.raises(ValueError, match=rf"^{FAKE_MACHINE}=.*for example") as refusal:
        this_machine()
    example = str(refusal.value).rpartition("for example ")[2]
    monkeypatch.setenv(FAKE_MACHINE, example)
    assert this_machine().device_names == ("Tesla T4",)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="that memory is kept is told to glibc")
@pytest.mark.parametrize(("on_cpu", "pages"), [(False, 16384), (True, 0)])
def test_on_a_cpu_freed_memory_is_taken_again(on_cpu: bool, pages: int) -> None:
    code = f"""if True:
        from resource import RUSAGE_SELF, getrusage
        from tunesmith.hardware import prepare_environment
        prepare_environment(on_cpu={on_cpu})
        for _ in range(2):
            before = getrusage(RUSAGE_SELF).ru_minflt
            b"x" * (1 << 26)
        print(getrusage(RUSAGE_SELF).ru_minflt - before)"""
    faults = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert abs(faults - pages) < 100, "64 MiB are 16,384 pages, each cleared by the system when it is first written to"


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="that memory is kept is told to glibc")
@pytest.mark.skipif(not HUGE_PAGES.is_file(), reason="this system has no large pages")
@pytest.mark.skipif(hardware.lines_of(hardware.OVERCOMMIT) == ["2"], reason="addresses count as memory here, so none are reserved")
def test_on_a_cpu_tensors_lie_where_large_pages_are_asked_for() -> None:
    """Whether the system has any to give at the moment is its own affair."""
    code = r"""if True:
        import re
        from pathlib import Path
        from resource import RUSAGE_SELF, getrusage
        from tunesmith.hardware import prepare_environment
        before = getrusage(RUSAGE_SELF).ru_maxrss
        prepare_environment(on_cpu=True)
        reserved = getrusage(RUSAGE_SELF).ru_maxrss - before
        written = b"x" * (1 << 26)
        for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
            start, end = (int(place, 16) for place in mapping.split(" ")[0].split("-"))
            if start <= id(written) + (1 << 25) < end:  # the first pages may be before the first large one
                print("hg" in re.search("VmFlags:(.*)", mapping)[1].split(), end - id(written) >= 1 << 26, reserved)"""
    advised, whole, reserved = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert (advised, whole) == ("True", "True")
    assert int(reserved) < 8 * 1024, "KiB: addresses for later take no memory"


@pytest.mark.parametrize(("policy", "reserves"), [("0", True), ("1", True), ("2", False)])
def test_no_addresses_are_reserved_where_each_counts_as_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, reserves: bool
) -> None:
    asked: list[int] = []
    libc = SimpleNamespace(mallopt=lambda *_: 1, malloc=lambda size: asked.append(size), free=lambda _: None, madvise=lambda *_: 0)
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(hardware, "OVERCOMMIT", tmp_path / "overcommit_memory")
    hardware.OVERCOMMIT.write_text(f"{policy}\n")
    hardware._prepare_heap()
    assert bool(asked) is reserves


# --- peaks ---------------------------------------------------------------------------------------------------------


def test_peak_from_the_table() -> None:
    peak, note = peak_flops("table", T4, "fp16")
    assert peak == 65e12
    assert note == "table: NVIDIA T4 datasheet; no bf16, no tf32 (t4, fp16, dense)"


def test_unknown_peaks_are_none_and_say_what_to_do() -> None:
    assert peak_flops("table", T4, "bf16") == (None, "unknown: the t4 has no bf16 units")
    peak, note = peak_flops("table", Machine("cuda", ("NVIDIA Z9",), (1.0,)), "bf16")
    assert peak is None
    assert "'NVIDIA Z9'" in note
    assert "CARDS" in note
    assert "hardware.peak=measure" in note


def test_given_peak() -> None:
    assert peak_flops("3e13", T4, "fp16") == (3e13, "given: hardware.peak=3e13")
    for wrong in ("fast", "0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=rf"hardware.peak={wrong}: .* type hardware.peak="):
            peak_flops(wrong, T4, "fp16")


def test_measured_peak_is_kept(tmp_path: Path) -> None:
    cpu = Machine(cpu_name="Toy")
    waiting = (None, "measured when the run starts: a fp32 matmul on Toy")
    assert peak_flops("table", cpu, "fp32", 1, measure=False) == waiting
    peak, note = peak_flops("table", cpu, "fp32", 1)
    assert peak is not None
    assert 1e9 < peak < 1e13, "a core does between 1 GFLOPS and 10 TFLOPS"
    assert note in ("measured: fp32 matmul on Toy", "measured: fp32 matmul by oneDNN on Toy")
    cache = tmp_path / "cache" / "tunesmith"
    assert [path.name for path in cache.iterdir()] == ["peaks.json"], "written through a temporary file that is gone"
    assert peak in json.loads((cache / "peaks.json").read_text()).values()
    assert peak_flops("measure", cpu, "fp32", 1, measure=False)[0] == peak, "the second time nothing is run"
    assert peak_flops("table", cpu, "fp32", 2, measure=False) == waiting, "other threads, other peak"
    assert peak_flops("table", T4, "fp32", 2, measure=False, cpu=True)[1].endswith("some CPU"), "cards, but on the CPU"


def test_what_a_plan_needs_of_a_cpu_is_measured_once() -> None:
    cpu = Machine(cpu_name="Toy")
    assert overheads(cpu, 1, measure=False) is None
    measure_cpu("table", cpu, "fp32", 1)
    first = overheads(cpu, 1, measure=False)
    assert first is not None
    assert 1e9 < first.bytes_per_s < 1e13
    assert 1e-8 < first.operator_s < 1e-3
    assert 1e-11 < first.random_s < 1e-6
    measure_cpu("table", cpu, "fp32", 1)
    assert overheads(cpu, 1) == first, "a second time would not give the same numbers to the last bit"
    assert overheads(cpu, 2, measure=False) is None, "other threads, other numbers"


def test_two_cpus_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Machine(cpu_name="AMD EPYC")
    measure_cpu("table", cpu, "fp32", 1)
    for room in (hardware, peaks):
        monkeypatch.setattr(room, "lines_of", lambda path: ["model name\t: AMD EPYC", "model\t\t: 17"])
    assert peak_flops("table", cpu, "fp32", 1, measure=False)[0] is None, "it has another model number"


@pytest.mark.parametrize("content", ["{torn", "[1]", '{"x": "y"}'])
def test_a_damaged_cache_is_no_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "cache" / "tunesmith" / "peaks.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    peaks._remember("key", 2.0)
    assert json.loads(file.read_text()) == {"key": 2.0}


def test_an_unwritable_cache_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    peaks._remember("key", 2.0)
    assert peaks._cached_peaks() == {}


def test_planning_needs_no_torch_and_no_time() -> None:
    script = """
import sys, time, bisect, json, hashlib, importlib.metadata, math, re, tempfile, typing, pathlib
import tunesmith.config
start = time.perf_counter()
import tunesmith.plan
heavy = {"torch", "transformers", "deepspeed", "pynvml"}
print(time.perf_counter() - start, *(heavy & set(sys.modules)))
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    answers = [run.stdout.split() for run in runs]
    assert all(len(answer) == 1 for answer in answers), "nothing heavy is imported"
    assert min(float(answer[0]) for answer in answers) < 0.5, "torch alone takes more"
