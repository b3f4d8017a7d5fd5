"""The doctor: emulated cards and CPUs are facts, servers are on the loopback, ranks and hanging processes are real ones."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, environment, free_port
from tunesmith import doctor as room
from tunesmith import hardware
from tunesmith.compose import compose
from tunesmith.config import Config
from tunesmith.doctor import asking, doctor, experiment, explain, facts, inputs, legal, matrix_table, meeting, rules
from tunesmith.doctor.asking import Answer, Reply, ask_process, ask_server, within
from tunesmith.doctor.facts import Device, Disk, Facts, Interface, Package
from tunesmith.doctor.findings import Finding, text
from tunesmith.doctor.legal import FEATURES, ROWS, best_type, choices, row_for
from tunesmith.hardware import CARDS, FAKE_MACHINE, Machine
from tunesmith.world import World

PAGE = ROOT / "docs" / "doctor.md"
HALVES = {"flash": "", "efficient": "", "cudnn": "", "math": ""}
FP32 = {"flash": "expected fp16 or bf16", "efficient": "", "cudnn": "expected fp16 or bf16", "math": ""}
BUILT_FOR = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
ETH0 = Interface("eth0", "10.0.0.5", True)
LO = Interface("lo", "127.0.0.1", True)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's user, ranks or proxies; what a test leaves out, leads nowhere."""
    for name in list(os.environ):
        if re.match(r"(WANDB|HF|NCCL|GLOO|SLURM|MASTER|PIP)_|.*_proxy$|NETRC$", name, re.I) or name in ("RANK", "WORLD_SIZE", FAKE_MACHINE):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def healthy(name: str = "", count: int = 1, **changes: Any) -> Facts:
    """A machine with nothing wrong: `count` cards of a name of the card table, or none."""
    card = next((card for card in CARDS.values() if name in card.names), None)
    capability = card.capability if card else None
    new = capability is not None and capability >= (8, 0)
    turing = {**FP32, "cudnn": "only sm80 to sm121", "flash": "only sm80 to sm121"}
    kernels: dict[str, Any] = {"device": "cuda", "fp32": FP32 if new else turing, "fp16": HALVES if new else turing}
    if new:
        kernels["bf16"] = HALVES
    cpu_kernels = {**HALVES, "efficient": "no viable backend", "cudnn": "no viable backend"}
    gib = card.memory_gib if card else 0.0
    watts = float(card.watts) if card else 0.0
    devices = tuple(
        Device(index, name, capability, gib, gib - 0.4, (), watts, watts, 1500, 1500, 1590) for index in range(count if card else 0)
    )
    known = Facts(
        machine=Machine("cuda" if card else "cpu", (name,) * len(devices), (gib,) * len(devices), 16, 64.0, "some CPU"),
        python="3.11.7",
        packages=(Package("torch", "torch>=2.9", "2.13.0", True),),
        devices=devices,
        driver=Answer({"on_bus": len(devices), "driver": "580.65", "cuda": [13, 0], "cards": [{}] * len(devices)} if card else {"on_bus": 0}),
        torch=Answer(
            {"version": "2.13.0+cu130", "cuda": "13.0", "built_for": BUILT_FOR, "gloo": True, "nccl": True, "devices": len(devices), "broken": {}, "claims_bf16": new}
            if card else {"version": "2.13.0+cpu", "cuda": "", "built_for": [], "gloo": True, "nccl": False}
        ),
        attention=Answer(kernels if card else {"device": "cpu", **dict.fromkeys(("fp32", "fp16", "bf16"), cpu_kernels)}),
        quantised=Answer({"version": "0.50.2", "device": "cuda" if card else "cpu", "nf4": "", "int8": ""}),
        deepspeed=Answer({"version": "0.19.8", "accelerator": "cuda" if card else "cpu", "backend": "nccl" if card else "gloo", "built": [], "could_build": ["cpu_adam"]}),
        disks=(Disk("cache", "/cache", 100.0),),
        shared_memory_gib=32.0,
        available_ram_gib=60.0,
        interfaces=(LO, ETH0),
        host_addresses=("10.0.0.5",),
    )  # fmt: skip
    return replace(known, **changes)


def with_device(facts: Facts, **changes: Any) -> Facts:
    """The same machine with another first card."""
    return replace(facts, devices=(replace(facts.devices[0], **changes), *facts.devices[1:]))


def told(answer: Answer, **changes: Any) -> Answer:
    return Answer({**answer.found, **changes}, answer.why)


T4, A10, A10G, CPU = healthy("Tesla T4"), healthy("NVIDIA A10"), healthy("NVIDIA A10G"), healthy()
TWO_A10 = healthy("NVIDIA A10", 2)
V100 = healthy("Tesla V100-SXM2-16GB")
TWO_NODES = World(0, 2, 0, 1, "a")


# --- what is legal on which capability -----------------------------------------------------------------------------


def test_every_card_has_a_row_and_every_row_every_cell() -> None:
    assert {card.capability for card in CARDS.values()} <= {row.capability for row in ROWS}
    assert {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), None} <= {row.capability for row in ROWS}
    for row in ROWS:
        assert set(row.cells) == set(FEATURES), row.name
        assert all(cell.why for cell in row.cells.values())


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_the_table_and_the_cards_say_the_same(card: Any) -> None:
    row = row_for(card.capability)
    assert row is not None
    assert (row.cells["bf16"].legal == "yes") is ("bf16" in card.peak)
    assert (row.cells["flash"].legal == "yes") is (card.capability >= (8, 0))
    assert (row.cells["int8"].legal == "yes") is ("int8" in card.peak)
    assert row.run_on == legal.NOT_YET, "say so only when it was run there"


def test_the_best_type_and_kernel() -> None:
    rows = [row_for(facts.capability) for facts in (T4, A10, A10G, CPU)]
    assert [best_type(row) for row in rows if row] == ["fp16", "bf16", "bf16", "fp32"]
    assert [legal.kernel_for(row, best_type(row)) for row in rows if row] == ["efficient", "flash", "flash", "flash"]
    a10 = row_for((8, 6))
    assert a10 is not None
    assert legal.kernel_for(a10, "fp32") == "efficient", "flash takes halves only on a card"


def test_a_capability_between_two_rows_and_one_beyond_them() -> None:
    assert row_for((8, 7)) is row_for((8, 6))
    assert row_for((12, 0)) is None
    (finding,) = choices(None, (12, 0))
    assert (finding.verdict, finding.fix) == ("warn", "add a row 12.0 to doctor/legal.py")


@pytest.mark.parametrize(
    ("words", "capability", "verdicts", "fix"),
    [
        (["+exp=qlora_t4"], (7, 5), ["ok"] * 4, ""),
        (["+exp=lora_a10"], (8, 6), ["ok"] * 4, ""),
        (["+exp=lora_t4", "precision=bf16"], (7, 5), ["fail", "ok", "ok", "ok"], "precision=fp16"),
        (["+exp=lora_t4", "method=lora_int8"], (7, 0), ["ok", "ok", "fail", "ok"], "method.base=as_is"),
        (["+exp=lora_cpu", "precision=bf16"], None, ["warn", "ok", "ok", "ok"], "precision=fp32"),
        (["+exp=lora_cpu", "precision=fp16"], None, ["fail", "ok", "ok", "ok"], "precision=fp32"),
    ],
)
def test_choices_of_a_config(words: list[str], capability: Any, verdicts: list[str], fix: str) -> None:
    findings = list(choices(compose(words), capability))
    assert [finding.verdict for finding in findings] == verdicts
    assert "".join(finding.fix for finding in findings) == fix


def test_a_run_can_say_at_its_start_what_was_chosen() -> None:
    lines = explain(compose(["+exp=qlora_t4"]), T4.machine)
    assert lines[0] == "choice   precision fp16 on capability 7.5: tensor cores; its narrow range needs loss scaling, which the engine does"
    assert [line.split()[1] for line in lines] == ["precision", "attention", "base", "compile"]
    assert "efficient for fp16" in lines[1] and "nf4" in lines[2]
    assert "flash for bf16" in explain(compose(["+exp=lora_a10"]), A10.machine)[1]
    assert "fp32 on CPU" in explain(compose(["+exp=lora_cpu"]), CPU.machine)[0]
    unknown = Machine("cuda", ("NVIDIA Z9",), (8.0,))
    assert explain(compose(["+exp=lora_cpu", "hardware=any"]), unknown) == ["choice   NVIDIA Z9 has no row in the card table: nothing is known of its units"]


def test_a_cpu_with_amx_is_told_what_it_could_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, wanted in (("fpu avx512f amx_bf16 amx_tile amx_int8", 1), ("fpu avx512f", 0)):
        monkeypatch.setattr(hardware, "cpu_words", lambda words=words: f"flags : {words}")
        told = [line for line in explain(compose(["+exp=lora_cpu"]), CPU.machine) if "precision.matmul=high" in line]
        assert len(told) == wanted
        assert not any("precision.matmul" in line or "matmul highest" in line for line in explain(compose(["+exp=lora_cpu", "precision.matmul=high"]), CPU.machine))
        assert not any("precision.matmul" in line or "matmul highest" in line for line in explain(compose(["+exp=qlora_t4"]), T4.machine))


def test_the_page_shows_the_table() -> None:
    assert matrix_table() in PAGE.read_text("utf-8"), "put the output of tunesmith.doctor.matrix_table() into docs/doctor.md"


# --- judging a machine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", [T4, A10, A10G, TWO_A10, CPU, V100], ids=["t4", "a10", "a10g", "two a10", "cpu", "v100 but for torch"])
def test_a_healthy_machine_has_only_good_lines(facts: Facts) -> None:
    if facts is V100:  # no wheel with CUDA 13 has code for it
        facts = replace(facts, torch=told(facts.torch, built_for=["sm_60", "sm_70", "sm_75"], cuda="12.6"), quantised=told(facts.quantised, int8="no"))
    findings = rules.judge(facts)
    assert [finding for finding in findings if finding.verdict != "ok"] == []
    assert {"packages", "driver", "torch", "memory", "disk", "shared memory", "network", "attention", "bitsandbytes", "deepspeed"} <= {finding.area for finding in findings}
    assert not any(finding.fix for finding in findings)


def a10_torch(**changes: Any) -> Facts:
    return replace(A10, torch=told(A10.torch, **changes))


def a10_tried(kind: str, **changes: str) -> Facts:
    return replace(A10, attention=told(A10.attention, **{kind: {**A10.attention.found[kind], **changes}}))


CASES: dict[str, tuple[Facts, str, str, str, str]] = {
    "a package is too old": (replace(CPU, packages=(Package("peft", "peft>=0.18", "0.17.0", False),)), "packages", "fail", "peft 0.17.0 is installed, peft>=0.18 is needed", "pip install 'peft>=0.18'"),
    "a package is missing": (replace(CPU, packages=(Package("rich", "rich>=13", "", False),)), "packages", "fail", "rich is not installed", "pip install 'rich>=13'"),
    "the driver hangs": (replace(CPU, driver=Answer({"on_bus": 1}, "no answer within 20 s")), "driver", "fail", "the NVIDIA driver: no answer within 20 s", "nvidia-smi"),
    "cards are hidden": (replace(CPU, driver=Answer({"cards": [{}, {}]}), variables={"CUDA_VISIBLE_DEVICES": ""}), "driver", "warn", "CUDA_VISIBLE_DEVICES='' hides all 2 cards", "unset CUDA_VISIBLE_DEVICES"),
    "no driver": (replace(CPU, driver=Answer({"on_bus": 1, "error": "NVML Shared Library Not Found"})), "driver", "fail", "1 NVIDIA card on the PCI bus, and no driver: NVML Shared", "--gpus all"),
    "unlike cards": (replace(TWO_A10, devices=(TWO_A10.devices[0], replace(T4.devices[0], index=1))), "driver", "warn", "the cards differ", "export CUDA_VISIBLE_DEVICES=0"),
    "split by MIG": (with_device(healthy("NVIDIA H200"), split=True), "driver", "fail", "card 0: split by MIG", "sudo nvidia-smi -i 0 -mig 0"),
    "torch breaks": (replace(CPU, torch=Answer({}, "died of SIGILL")), "torch", "fail", "torch: died of SIGILL", "pip install --force-reinstall torch"),
    "torch for CPUs": (a10_torch(cuda="", built_for=[]), "torch", "fail", "is built without CUDA, and here is NVIDIA A10", "--index-url https://download.pytorch.org/whl/cu130"),
    "old driver": (replace(A10, driver=told(A10.driver, cuda=[12, 4])), "torch", "fail", "built with CUDA 13.0, the driver knows CUDA 12.4 at most", "whl/cu126, or install driver 580 or newer"),
    "no code for the card": (V100, "torch", "fail", "is built for sm_75.*V100-SXM2-16GB is 7.0", "whl/cu126"),
    "CUDA does not start": (a10_torch(error="RuntimeError: unknown error"), "torch", "fail", "cannot use the card: RuntimeError: unknown", "restart"),
    "torch sees fewer": (replace(TWO_A10, torch=told(TWO_A10.torch, devices=1)), "torch", "fail", "torch sees 1 cards, the driver 2", "CUDA_VISIBLE_DEVICES"),
    "a matmul fails": (a10_torch(broken={"cuda:0": "fp16: no kernel image"}), "torch", "fail", "a matmul fails on cuda:0: fp16: no kernel image", "pip install"),
    "bf16 by emulation": (replace(T4, torch=told(T4.torch, claims_bf16=True)), "precision", "warn", "torch says it is supported; capability 7.5 has no units", "precision=fp16"),
    "somebody on the card": (with_device(TWO_A10, free_gib=9.5, processes=(4711,)), "memory", "warn", r"card 0: 12.5 of 22.0 GiB are in use by process 4711", "kill 4711; or export CUDA_VISIBLE_DEVICES=1"),
    "little RAM": (replace(CPU, available_ram_gib=3.0), "memory", "warn", "RAM: 3.0 of 64.0 GiB free", "ps aux"),
    "memory errors": (with_device(A10, memory_errors=3), "memory", "fail", "3 uncorrected memory errors", "sudo nvidia-smi -i 0 -r"),
    "power cap": (with_device(T4, watts=50.0), "power", "warn", "card 0: limited to 50 of 70 W", "sudo nvidia-smi -i 0 -pl 70"),
    "clock cap": (with_device(A10, clock_mhz=900), "clock", "warn", "is set to 900 MHz, 1500 is its default", "sudo nvidia-smi -i 0 -rac"),
    "too hot": (with_device(A10, slowdowns=("hardware thermal slowdown",)), "clock", "warn", "slowed down at this moment by hardware thermal", "cooling"),
    "unknown card": (with_device(A10, name="NVIDIA A10M"), "peak", "warn", "no row for 'NVIDIA A10M'", "hardware.peak=measure"),
    "full disk": (replace(CPU, disks=(Disk("cache", "/c", 0.2),)), "disk", "warn", r"cache \(/c\): 0.2 GiB free", "export TUNESMITH_CACHE="),
    "read-only disk": (replace(CPU, disks=(Disk("outputs", "/o", 9.0, writable=False),)), "disk", "fail", "cannot be written to", "outputs="),
    "dead disk": (replace(CPU, disks=(Disk("temporary files", "/t", None),)), "disk", "fail", "the file system does not answer", "export TMPDIR="),
    "docker's shared memory": (replace(TWO_A10, shared_memory_gib=1 / 16), "shared memory", "fail", "/dev/shm has 64 MiB for 2 ranks", "--shm-size=1g"),
    "little shared memory": (replace(TWO_A10, shared_memory_gib=0.5), "shared memory", "warn", "/dev/shm has 512 MiB for 2 ranks", "--shm-size=1g"),
    "no shared memory": (replace(CPU, shared_memory_gib=None), "shared memory", "warn", "/dev/shm is not there", "--shm-size=1g"),
    "gloo takes no exclusions": (replace(CPU, variables={"GLOO_SOCKET_IFNAME": "^lo"}), "network", "fail", r"no interface \^lo \(unlike NCCL it takes no \^", "export GLOO_SOCKET_IFNAME=eth0"),
    "gloo's interface is absent": (replace(CPU, variables={"GLOO_SOCKET_IFNAME": "ens5"}), "network", "fail", "no interface ens5; here are lo, eth0", "export GLOO_SOCKET_IFNAME=eth0"),
    "NCCL is left none": (replace(CPU, variables={"NCCL_SOCKET_IFNAME": "ib,ens"}), "network", "fail", "leaves no interface", "export NCCL_SOCKET_IFNAME=eth0"),
    "the first node is unknown": (replace(CPU, variables={"MASTER_ADDR": "node-1"}), "network", "fail", "MASTER_ADDR=node-1 does not resolve", "export MASTER_ADDR="),
    "a name that leads inward": (replace(CPU, world=TWO_NODES, host_addresses=("127.0.1.1",)), "network", "fail", "resolves to 127.0.1.1, so gloo", "export GLOO_SOCKET_IFNAME=eth0"),
    "a name that leads nowhere": (replace(CPU, variables={"SLURM_NNODES": "2"}, host_addresses=()), "network", "fail", "does not resolve, so gloo", "export GLOO_SOCKET_IFNAME=eth0"),
    "two ways out": (replace(CPU, world=TWO_NODES, interfaces=(ETH0, Interface("ib0", "10.1.0.5", True))), "network", "warn", r"2 interfaces lead outward: eth0 \(10.0.0.5\), ib0", "export NCCL_SOCKET_IFNAME=eth0"),
    "flash should run": (a10_tried("bf16", flash="Torch was not compiled with flash attention."), "attention", "warn", "bf16 on this card: efficient, cudnn, math ran; flash should: Torch was not", "pip install --upgrade torch"),
    "only scores in memory": (replace(A10, devices=(replace(A10.devices[0], capability=(12, 0)),), attention=Answer({"device": "cuda", "fp32": {"efficient": "no", "math": ""}})), "attention", "warn", "no kernel that spares", "data.max_tokens"),
    "attention crashes": (replace(A10, attention=Answer({"device": "cuda"}, "died of SIGSEGV")), "attention", "fail", "died of SIGSEGV", "torch"),
    "nf4 is broken": (replace(T4, quantised=told(T4.quantised, nf4="its product is off by 97%")), "bitsandbytes", "warn", "nf4 does not work on this cuda: its product is off", "pip install --upgrade bitsandbytes"),
    "no bitsandbytes": (replace(CPU, quantised=Answer({}, "ended with code 1: ModuleNotFoundError")), "bitsandbytes", "warn", "ModuleNotFoundError", "pip install --upgrade bitsandbytes"),
    "no deepspeed": (replace(CPU, deepspeed=Answer({}, "ended with code 1: MissingCUDAException")), "deepspeed", "fail", "MissingCUDAException", "engine=accelerate"),
    "deepspeed on the CPU": (replace(A10, deepspeed=told(A10.deepspeed, accelerator="cpu")), "deepspeed", "warn", "takes cpu for the accelerator, here is cuda", "export DS_ACCELERATOR=cuda"),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "area", "verdict", "fact", "fix"), CASES.values(), ids=CASES)
def test_what_is_wrong_is_told_with_its_fix(facts: Facts, area: str, verdict: str, fact: str, fix: str) -> None:
    found = [finding for finding in rules.judge(facts) if finding.verdict != "ok"]
    assert [finding.area for finding in found if finding.area == area], "one thing is wrong"
    finding = next(finding for finding in found if finding.area == area)
    assert finding.verdict == verdict
    assert re.search(fact, finding.fact), finding.fact
    assert fix in finding.fix
    assert all(finding.fix for finding in found)


def test_what_is_no_trouble_is_not_told_as_one() -> None:
    small = replace(A10, shared_memory_gib=1 / 16)
    inward = replace(CPU, host_addresses=("127.0.0.1",))
    minor = replace(A10, driver=told(A10.driver, cuda=[13, 0]), torch=told(A10.torch, cuda="13.2"))
    excluded = replace(CPU, variables={"NCCL_SOCKET_IFNAME": "^lo,docker"}, world=TWO_NODES, interfaces=(ETH0, Interface("docker0", "172.17.0.1", True)))
    int8_on_volta = replace(V100, torch=told(V100.torch, built_for=["sm_70"]), quantised=told(V100.quantised, int8="needs 7.5"))
    for known in (small, inward, minor, excluded, int8_on_volta):
        assert [finding for finding in rules.judge(known) if finding.verdict != "ok"] == []


def test_what_the_experiment_needs_must_work() -> None:
    broken = replace(T4, quantised=told(T4.quantised, nf4="no kernel image"), deepspeed=Answer({}, "gone"))

    def verdicts(words: list[str]) -> dict[str, str]:
        return {finding.area: finding.verdict for finding in rules.judge(broken, compose(words)) if finding.verdict != "ok"}

    assert verdicts(["+exp=qlora_t4"]) == {"bitsandbytes": "fail", "deepspeed": "fail"}
    assert verdicts(["+exp=lora_t4", "engine=accelerate"]) == {"bitsandbytes": "warn", "deepspeed": "warn"}


@pytest.mark.parametrize(
    ("arches", "capability", "runs"),
    [
        (["sm_80"], (8, 6), True), (["sm_86"], (8, 0), False), (["sm_75"], (8, 0), False), (["compute_75"], (8, 9), True),
        (["compute_90"], (8, 9), False), (["sm_90a"], (9, 0), True), (["sm_120"], (12, 0), True), ([], (7, 5), False), (["gfx90a"], (9, 0), False),
    ],
)  # fmt: skip
def test_which_code_runs_on_which_card(arches: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert rules._built_for(arches, capability) is runs


@pytest.mark.parametrize(
    ("setting", "taken"),
    [("eth", "eth0 eth1"), ("=eth1", "eth1"), ("^eth", "lo docker0"), ("^=eth0", "lo docker0 eth1"), ("ib", ""), ("eth0,docker", "docker0 eth0")],
)
def test_interfaces_that_nccl_takes(setting: str, taken: str) -> None:
    assert " ".join(name for name in ("lo", "docker0", "eth0", "eth1") if rules._nccl_takes(setting, name)) == taken


def test_the_report_is_lines_with_fixes_below() -> None:
    shown = text([Finding("disk", "ok", "room"), Finding("power", "warn", "low " * 40, "sudo nvidia-smi -pl 70")], width=80).splitlines()
    assert shown[0] == "ok    disk          room"
    assert shown[1].startswith("warn  power         low low") and shown[2].startswith(" " * 20 + "low")
    assert shown[-2:] == [" " * 20 + "→ sudo nvidia-smi -pl 70", "1 ok, 1 warn, 0 fail"]
    assert max(map(len, shown)) <= 80
    command = "pip install torch --index-url https://download.pytorch.org/whl/" + "x-" * 60
    assert command.split()[-1] in text([Finding("torch", "fail", "old", command)], width=80).split(), "a word to copy stays whole"


# --- asking --------------------------------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path: Path) -> Callable[..., Answer]:
    """Ask a process that runs the given body as its probe."""

    def ask(body: str, limit_s: float = 60) -> Answer:
        (tmp_path / "asked_child.py").write_text(
            "import os, signal, subprocess, sys, time\nfrom tunesmith.doctor.asking import answer_to\n"
            f"def probe(order, tell):\n    {body}\nanswer_to(probe)\n"
        )
        return ask_process("asked_child", [], {"n": 2}, limit_s, {"PYTHONPATH": str(tmp_path)})

    return ask


def test_a_process_answers_in_parts_whatever_libraries_print(child: Callable[..., Answer]) -> None:
    answer = child("print('noise'); os.system('echo more noise'); tell({'a': order['n']}); tell({'b': 3})")
    assert answer == Answer({"a": 2, "b": 3})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("raise ImportError('libcudart.so.13: cannot open')", "ended with code 1: ImportError: libcudart.so.13: cannot open"),
        ("os._exit(3)", "ended with code 3"),
    ],
)
def test_a_process_that_dies_says_why_and_keeps_what_it_told(child: Callable[..., Answer], body: str, why: str) -> None:
    assert child(f"tell({{'a': 1}}); {body}") == Answer({"a": 1}, why)


def test_a_process_that_hangs_is_ended_with_all_it_started(child: Callable[..., Answer]) -> None:
    start_s = time.monotonic()
    body = "other = subprocess.Popen(['sleep', '100']); tell({'pids': [os.getpid(), other.pid]}); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    answer = child(body, 5)
    assert time.monotonic() - start_s < 12
    assert answer.why == "no answer within 5 s"
    for pid in answer.found["pids"]:
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX", "nothing goes on"


def test_a_child_does_not_outlive_a_doctor_who_was_killed(tmp_path: Path) -> None:
    """Without the alarm this child would sleep for a minute."""
    code = "import time\nfrom tunesmith.doctor.asking import answer_to\nanswer_to(lambda order, tell: time.sleep(60))"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    assert process.stdin
    process.stdin.write('{"limit_s": -4}\n')  # the alarm rings five seconds after the limit
    process.stdin.close()
    assert process.wait(20) < 0


def test_a_thread_that_hangs_or_raises_is_none() -> None:
    start_s = time.monotonic()
    assert within(0.2, lambda: time.sleep(3)) is None
    assert time.monotonic() - start_s < 2
    assert within(1, lambda: 1 / 0) is None
    assert within(1, lambda: "found") == "found"


@dataclass
class Server:
    """A loopback server: answers by path, and what it was asked."""

    url: str
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            known.asked.append((self.path, dict(self.headers), body))
            status, answer = known.answers.get(self.path, (404, ""))
            if callable(answer):
                answer(self)
                return
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", answer)
            self.end_headers()
            self.wfile.write(answer.encode() if isinstance(answer, str) else json.dumps(answer).encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        known = Server(f"http://127.0.0.1:{listening.server_port}")
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield known
        listening.shutdown()


def closed_port() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_a_server_is_asked_once_and_redirects_do_not_carry_the_token_away(server: Server) -> None:
    server.answers = {"/here": (200, "yes"), "/moved": (307, f"{server.url}/elsewhere"), "/mine": (403, "no")}
    assert ask_server(f"{server.url}/here") == Reply(200, b"yes")
    assert ask_server(f"{server.url}/moved", token="secret").status == 307
    assert ask_server(f"{server.url}/mine").status == 403
    assert [path for path, _, _ in server.asked] == ["/here", "/moved", "/mine"]
    assert server.asked[1][1]["Authorization"] == "Bearer secret"


def test_servers_that_are_not_there_or_never_end(server: Server) -> None:
    assert ask_server(closed_port()).why == "[Errno 111] Connection refused"
    assert ask_server("no address").why == "unknown url type: 'no address'"

    def drip(handler: Any) -> None:  # each byte would start a socket's timeout anew
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b".")
            handler.wfile.flush()
            time.sleep(0.1)

    server.answers = {"/slow": (200, drip)}
    start_s = time.monotonic()
    assert ask_server(f"{server.url}/slow", limit_s=0.5).why == "no answer within 0.5 s"
    assert time.monotonic() - start_s < 2


# --- gathering -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here() -> Facts:
    """What is really known of this machine, its cards hidden."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        return facts.gather(World(), "outputs")
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def test_this_machine(here: Facts) -> None:
    assert here.machine.kind == "cpu" and not here.devices
    assert all(not answer.why for answer in (here.torch, here.attention, here.quantised, here.deepspeed)), here
    assert here.torch.found["gloo"] is True
    for kind in ("fp32", "fp16", "bf16"):
        assert {kernel for kernel, why in here.attention.found[kind].items() if not why} == {"flash", "math"}
    assert (here.quantised.found["nf4"], here.quantised.found["int8"]) == ("", "")
    assert here.deepspeed.found["accelerator"] == "cpu"
    assert [disk.purpose for disk in here.disks] == ["outputs", "cache", "temporary files"]
    assert "torch" in {package.name for package in here.packages} and not {"datasets", "pytest"} & {package.name for package in here.packages}
    assert ("lo", "127.0.0.1") in {(one.name, one.address) for one in here.interfaces}
    assert (here.available_ram_gib or 0) > 0 and (here.shared_memory_gib or 0) > 0
    assert [finding for finding in rules.judge(here) if finding.area in ("torch", "attention", "bitsandbytes", "deepspeed") and finding.verdict != "ok"] == []


def test_the_table_holds_on_this_cpu(here: Facts) -> None:
    """Each cell that the doctor can try on this device says what was seen."""
    row = row_for(None)
    assert row is not None
    ran = {kernel for kernel, why in here.attention.found["fp32"].items() if not why}
    assert ran == {kernel for kernel in legal.ATTENTION if row.cells[kernel].legal != "no"}
    assert {name for name in ("nf4", "int8") if not here.quantised.found[name]} == {name for name in ("nf4", "int8") if row.cells[name].legal == "yes"}


FAKE_NVML = """
import time
from types import SimpleNamespace as Some
class NVMLError(Exception): pass
NVML_CLOCK_SM, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 1, 0
def nvmlInit(): time.sleep({sleep})
def nvmlSystemGetDriverVersion(): return "550.54.14"
def nvmlSystemGetCudaDriverVersion(): return 12040
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return "GPU-" + "ab"[handle]
def nvmlDeviceGetName(handle): return "Tesla T4"
def nvmlDeviceGetCudaComputeCapability(handle): return 7, 5
def nvmlDeviceGetMemoryInfo(handle): return Some(total=15 * 2**30, free=(14 - handle) * 2**30)
def nvmlDeviceGetComputeRunningProcesses(handle): return [Some(pid=4711)] if handle else []
def nvmlDeviceGetCurrentClocksEventReasons(handle): return 0x04 | 0x20
def nvmlDeviceGetEnforcedPowerLimit(handle): return 60000
def nvmlDeviceGetPowerManagementDefaultLimit(handle): return 70000
def nvmlDeviceGetApplicationsClock(handle, kind): return 585
def nvmlDeviceGetDefaultApplicationsClock(handle, kind): return 585
def nvmlDeviceGetMaxClockInfo(handle, kind): return 1590
def nvmlDeviceGetTotalEccErrors(handle, kind, counter): raise NVMLError("Not Supported")
"""


def test_the_driver_is_asked_for_every_card_and_what_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pynvml.py").write_text(FAKE_NVML.replace("{sleep}", "0"))
    answer = ask_process(facts.PROBE, ["driver"], {}, 30, {"PYTHONPATH": str(tmp_path)})
    assert (answer.why, answer.found["driver"], answer.found["cuda"]) == ("", "550.54.14", [12, 4])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (device,) = facts._devices(answer)
    assert device == Device(1, "Tesla T4", (7, 5), 15.0, 13.0, (4711,), 60.0, 70.0, 585, 585, 1590, ("software thermal slowdown",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-a")
    assert [device.index for device in facts._devices(answer)] == [1, 0]


def test_a_driver_that_hangs_is_a_finding_and_no_hanging_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pynvml.py").write_text(FAKE_NVML.replace("{sleep}", "100"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(facts, "DRIVER_S", 4)
    asked: list[str] = []

    def only_driver(module: str, words: list[str], *rest: Any) -> Answer:
        asked.append(words[0])
        return ask_process(module, words, *rest) if words == ["driver"] else Answer({}, "left out")

    monkeypatch.setattr(facts, "ask_process", only_driver)
    known = facts.gather(World())
    assert known.driver.why == "no answer within 4 s"
    assert known.machine == Machine()
    assert sorted(asked) == ["attention", "deepspeed", "driver", "quantised", "torch"]


def test_another_machine_can_be_planned_for_and_nothing_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: Any) -> Answer:
        raise AssertionError("an emulated card has no driver")

    monkeypatch.setattr(facts, "ask_process", nobody)
    monkeypatch.setenv(FAKE_MACHINE, json.dumps({"kind": "cuda", "device_names": ["Tesla T4"], "memory_gib": [14.56], "cores": 8, "ram_gib": 51}))
    known = facts.gather(World())
    assert known.devices == (Device(0, "Tesla T4", (7, 5), 14.56),)
    assert [finding.verdict for finding in rules.judge(known) if finding.area == "driver"] == ["warn"]
    assert not {"torch", "attention"} & {finding.area for finding in rules.judge(known)}


def test_disks_that_cannot_be_written_to_or_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert facts.disk("outputs", tmp_path / "not" / "yet").writable
    assert not facts.disk("outputs", tmp_path / "file" / "below").writable
    monkeypatch.setattr(facts, "LOOK_S", 0.2)
    monkeypatch.setattr(facts.shutil, "disk_usage", lambda _: time.sleep(2))
    assert facts.disk("outputs", tmp_path).free_gib is None


# --- an experiment -------------------------------------------------------------------------------------------------


def examined(words: list[str], known: Facts = CPU) -> list[Finding]:
    config, mistakes = experiment.composed(words)
    assert config, mistakes
    return experiment.examine(config, known, experiment.ask_inputs(words))


def wrong(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.area, finding.verdict) for finding in findings if finding.verdict != "ok"]


def test_an_experiment_that_can_start(overrides: list[str], tiny_data: Path) -> None:
    findings = examined(overrides)
    assert wrong(findings) == []
    assert {"plan", "choice", "disk", "data", "template"} == {finding.area for finding in findings}
    facts_of_data = [finding.fact for finding in findings if finding.area == "data"]
    assert facts_of_data[0] == f"data.train: 1 file, 0.0 MiB, the first conversation ({tiny_data / 'train.json'}#0) has 6 turns"
    assert len(facts_of_data) == 3
    assert any("needed" in finding.fact for finding in findings if finding.area == "disk")


@pytest.mark.parametrize(
    ("words", "expected", "fact"),
    [
        (["data.train=gone.json"], ("data", "fail"), "gone.json: no such file"),
        (["data.train=broken.jsonl"], ("data", "fail"), "data.train: .*broken.jsonl:1: not JSON"),
        (["data.train=odd.jsonl"], ("data", "fail"), "role 'bot' is unknown"),
        (["data.dev=empty.jsonl"], ("data", "fail"), "data.dev=empty.jsonl: has no record"),
        (["data.template=llama3"], ("template", "fail"), "data.template=llama3: the tokenizer has no token"),
        (["method.r=0"], ("plan", "fail"), "method.r=0: must be at least 1"),
        (["train.micro_batch=64"], ("plan", "fail"), "train.micro_batch=64: a rank has only 8"),
        (["data.max_tokens=4096"], ("plan", "fail"), "knows 2048 positions"),
    ],
)
def test_an_experiment_that_cannot(
    overrides: list[str], tiny_data: Path, tmp_path: Path, words: list[str], expected: tuple[str, str], fact: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for file in tiny_data.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    (own / "broken.jsonl").write_text('{"conversations": [\n')
    (own / "odd.jsonl").write_text(json.dumps({"conversations": [{"role": "bot", "content": "hi"}]}))
    (own / "empty.jsonl").touch()
    findings = examined([*overrides, f"data.folder={own}", *words])
    assert wrong(findings) == [expected]
    finding = next(finding for finding in findings if finding.verdict == "fail")
    assert re.search(fact, finding.fact)
    assert finding.fix


def test_what_is_wrong_with_a_type_is_told_once() -> None:
    machine = replace(T4, emulated=True)
    config, _ = experiment.composed(["+exp=lora_t4", "precision=bf16"])
    assert config
    findings = experiment.examine(config, machine, Answer())
    assert [finding.fix for finding in findings if "bf16" in finding.fact] == ["type precision=fp16"]


def plain(words: list[str], known: Facts, origin: list[str] | None = None) -> list[Finding]:
    """An experiment's findings without a look at its data and model."""
    config, mistakes = experiment.composed(words)
    assert config, mistakes
    return experiment.examine(config, known, Answer({"origin": origin or []}))


@pytest.mark.parametrize(("words", "known"), [("qlora_t4", T4), ("lora_a10", A10), ("lora_a10", TWO_A10), ("lora_cpu", CPU)], ids=str)
def test_emulated_machines_can_take_what_was_made_for_them(words: str, known: Facts) -> None:
    findings = plain([f"+exp={words}"], known)
    assert wrong(findings) == []
    fact = next(finding.fact for finding in findings if finding.area == "plan")
    assert f"on {max(1, len(known.devices))} x {words.rpartition('_')[2]}," in fact, "as many ranks as a launcher would start"


def test_an_a10g_is_no_a10() -> None:
    findings = plain(["+exp=lora_a10"], A10G)
    assert [(finding.fact, finding.fix) for finding in findings if finding.verdict == "fail"] == [
        ("hardware.card=a10: here is NVIDIA A10G", "type hardware.card=a10g")
    ]


def test_room_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    used = with_device(A10, free_gib=3.0)
    memory = [finding for finding in plain(["+exp=lora_a10"], used) if finding.area == "memory"]
    assert re.match(r"card 0: 19\.\d GiB are needed, 3.0 are free", memory[0].fact) and memory[0].verdict == "fail"
    full = replace(CPU, available_ram_gib=1.0)
    assert ("memory", "fail") in wrong(plain(["+exp=lora_cpu"], full))
    monkeypatch.setattr(experiment, "disk", lambda purpose, path: Disk(purpose, str(path), 0.1))
    disks = [finding for finding in plain(["+exp=lora_cpu"], CPU, ["file"]) if finding.area == "disk"]
    assert [finding.verdict for finding in disks] == ["fail", "fail"], "checkpoints, and the converted model"
    assert "outputs=" in disks[0].fix and "TUNESMITH_CACHE=" in disks[1].fix
    without = replace(TWO_A10, torch=told(A10.torch, nccl=False))
    assert ("torch", "fail") in wrong(plain(["+exp=lora_a10"], without))


def test_a_model_that_is_not_here(overrides: list[str]) -> None:
    words = [word for word in overrides if not word.startswith("model.path=")]
    findings = examined([*words, "model.path=nobody/nothing"])
    assert wrong(findings) == [("plan", "warn"), ("template", "warn"), ("hub", "fail")]
    findings = examined([*words, "model.path=/no/such/folder"])
    assert ("model", "fail") in wrong(findings)


def test_a_tokenizer_without_a_template(overrides: list[str], tiny_model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_model.iterdir():
        if not file.name.startswith(("tokenizer", "special")):
            (bare / file.name).write_bytes(file.read_bytes())
    findings = examined([*overrides, f"model.path={bare}"])
    assert wrong(findings) == [("template", "fail")]


def test_the_look_at_data_that_breaks_is_a_finding() -> None:
    config = compose(["+exp=lora_cpu"])
    findings = experiment.examine(config, CPU, Answer({}, "no answer within 120 s"))
    assert wrong(findings) == [("data", "fail")]


def test_packages_that_data_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    (finding,) = inputs.data_findings(compose(["+exp=lora_cpu"]), ["+exp=lora_cpu"])
    assert (finding.verdict, finding.fix) == ("fail", "pip install 'tunesmith[demo]'")
    config = compose(["name=x", "data=local", "model.path=/x", "data.train=hub:a/b"])
    (finding,) = inputs.data_findings(config, [])
    assert (finding.verdict, finding.fix) == ("fail", "pip install 'tunesmith[hub]'")


# --- the world outside ---------------------------------------------------------------------------------------------

KEY = "k" * 40


def login(url: str) -> Finding:
    (finding,) = experiment.tracker(compose(["+exp=lora_cpu", "tracker=wandb", "tracker.mode=online"]))
    assert KEY not in str(finding), "a key is no fact to print"
    return finding


def test_wandb_knows_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"{server.url}/")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.answers = {"/graphql": (200, {"data": {"viewer": {"username": "ada"}}})}
    assert login(server.url) == Finding("tracker", "ok", f"W&B: {server.url} knows the key, as ada")
    _, headers, body = server.asked[0]
    assert headers["Authorization"].startswith("Basic ") and "viewer" in json.loads(body)["query"]


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        ((200, {"data": {"viewer": None}}), "does not take the key"),
        ((401, "no"), "does not take the key"),
        ((500, "oops"), "answers with 500"),
        ((200, "<html>a portal</html>"), "answers with 200, and not as W&B does"),
        ((200, ["odd"]), "answers with 200, and not as W&B does"),
    ],
)
def test_wandb_servers_that_are_no_use(server: Server, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, Any], fact: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.answers = {"/graphql": answer}
    finding = login(server.url)
    assert fact in finding.fact
    assert finding.verdict == "warn" and "tracker.mode=offline" in finding.fix


def test_wandb_out_of_reach_or_without_a_key(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "no API key for http://127.0.0.1:9," in login("").fact
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1:9\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    start_s = time.monotonic()
    assert "cannot be reached: [Errno 111] Connection refused" in login("").fact
    assert time.monotonic() - start_s < asking.REACH_S + 1


def test_which_wandb_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_BASE_URL")
    assert experiment.wandb_server() == "https://api.wandb.ai"
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example/\n")
    assert experiment.wandb_server() == "https://wandb.example"
    (tmp_path / "settings").write_text("no section")
    assert experiment.wandb_server() == "https://api.wandb.ai"


def test_wandb_is_left_alone_unless_it_is_online(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for words, count in (("tracker=none", 0), ("tracker.mode=disabled", 0), ("tracker.mode=offline", 1)):
        kind = [] if words == "tracker=none" else ["tracker=wandb"]
        findings = list(experiment.tracker(compose(["+exp=lora_cpu", *kind, words])))
        assert [finding.verdict for finding in findings] == ["ok"] * count
    assert server.asked == []


@pytest.mark.parametrize(
    ("answer", "verdict", "fact", "fix"),
    [
        ((200, "{}"), "ok", "has it", ""),
        ((307, "https://cdn.example"), "ok", "has it", ""),
        ((401, ""), "fail", "refuses it (401)", "accept its licence at {url}/owner/model"),
        ((404, ""), "fail", "no such thing", "look the name up"),
        ((503, ""), "fail", "answers with 503", "copy its folder here"),
    ],
)
def test_a_model_at_the_hub(
    server: Server, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, Any], verdict: str, fact: str, fix: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.answers = {"/owner/model/resolve/main/config.json": answer}
    (finding,) = experiment.hub(Config(), ["hub", "owner/model"])
    assert (finding.verdict, fact in finding.fact, fix.format(url=server.url) in finding.fix) == (verdict, True, True)
    assert server.asked[0][1]["Authorization"] == "Bearer hf_secret" and "hf_secret" not in str(finding)


def test_data_at_the_hub_and_no_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["name=x", "model.path=/x", "data.train='a.json,hub:owner/set:train*2'"])
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.answers = {"/api/datasets/owner/set": (200, "{}")}
    assert [finding.verdict for finding in experiment.hub(config, [])] == ["ok"]
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    (finding,) = experiment.hub(config, [])
    assert "cannot be reached" in finding.fact and "name them in data.train" in finding.fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (finding,) = experiment.hub(config, [])
    assert "HF_HUB_OFFLINE forbids" in finding.fact
    assert list(experiment.hub(compose(["+exp=lora_cpu"]), [])) == [], "what is here needs no hub"


def test_a_model_in_a_package(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    page = '<html><body><a href="llm_toy-0.1.2-py3-none-any.whl">llm_toy-0.1.2-py3-none-any.whl</a></body></html>'

    def html(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.end_headers()
        handler.wfile.write(page.encode())

    server.answers = {"/simple/llm-toy/": (200, html)}
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    found = [next(experiment.hub(Config(), ["pypi", name, version])) for name, version in (("llm-toy", "0.1.2"), ("llm-toy", "9"), ("other", "1"))]
    assert [finding.verdict for finding in found] == ["ok", "fail", "fail"]
    assert "the package index has 0.1.2" in found[1].fact and "other" in found[2].fact.rpartition(": ")[2]


@pytest.mark.parametrize(
    ("path", "origin"),
    [("pypi:llm-x==0.1.2/a/b.gguf", ["pypi", "llm-x", "0.1.2"]), ("owner/model", ["hub", "owner/model"]), (__file__, ["file"]), ("/x/y/z", [])],
)
def test_where_a_model_comes_from(path: str, origin: list[str]) -> None:
    assert inputs.origin(path) == origin


# --- ranks ---------------------------------------------------------------------------------------------------------

MET: dict[str, Any] = {"at": "a:1", "came": {"0": "a", "1": "b"}, "waited_s": 20.0}
GLOO = {"small_ms": 0.2, "mib_ms": 2.0}
SAME = {"versions": [{"torch": "2.13", "NCCL": "2.28"}] * 2, "cards": [True, True], "shared": []}


@pytest.mark.parametrize(
    ("answer", "expected", "fact", "fix"),
    [
        (Answer({**MET, "gloo": GLOO, **SAME, "cards": [False, False]}), ["ok", "ok"], "", ""),
        (Answer({**MET, "gloo": GLOO, **SAME, "nccl_began": True, "nccl": GLOO}), ["ok", "ok", "ok"], "", ""),
        (Answer({"at": "a:1", "store": "EADDRINUSE"}), ["fail"], "rank 0 cannot open the meeting place a:1: EADDRINUSE", "another MASTER_PORT"),
        (Answer({}, "ended with code 1: MASTER_PORT is not set"), ["fail"], "MASTER_PORT is not set", "MASTER_PORT"),
        (Answer({**MET, "came": {"0": "a"}}), ["fail"], r"rank 1 \(machine 2 of 2\) did not come within 20 s; came: rank 0 on a", "started there"),
        (Answer({**MET, "gloo_error": "Connection refused"}), ["ok", "fail"], "gloo does not connect them: Connection refused", "export GLOO_SOCKET_IFNAME="),
        (Answer({**MET, "gloo": {**GLOO, "mib_ms": 50.0}, **SAME}), ["ok", "warn"], "0.02 GB/s.: slower than a gigabit", "GLOO_SOCKET_IFNAME"),
        (Answer({**MET, "gloo": GLOO, **SAME, "nccl_began": True}, "no answer within 130 s"), ["ok", "ok", "fail"], "nccl does not connect them: no answer", "NCCL_DEBUG=INFO"),
        (Answer({**MET, "gloo": GLOO, **SAME, "versions": [{"torch": "2.13"}, {"torch": "2.9"}]}), ["ok", "ok", "fail"], "rank 1 on b has torch 2.9, rank 0 on a has 2.13", "constraints.txt"),
        (Answer({**MET, "gloo": GLOO, **SAME, "cards": [True, False]}), ["ok", "ok", "fail"], "rank 1 on b has no card of its own", "as many ranks"),
        (Answer({**MET, "gloo": GLOO, **SAME, "shared": [1]}), ["ok", "ok", "fail"], "rank 1 cannot see what rank 0 writes", "outputs="),
    ],
)  # fmt: skip
def test_what_a_meeting_showed(answer: Answer, expected: list[str], fact: str, fix: str) -> None:
    findings = list(meeting.judge_meeting(answer, TWO_NODES))
    assert [finding.verdict for finding in findings] == expected
    assert re.search(fact, findings[-1].fact), findings[-1].fact
    assert fix in findings[-1].fix


def test_the_first_rank_of_each_machine_speaks() -> None:
    came = Answer({"came": {str(rank): "x" for rank in (0, 1, 3)}})
    assert [rank for rank in range(4) if room._speaks(came, World(rank, 4, rank % 2, 2))] == [0, 3]
    assert room._speaks(Answer({"store": "refused"}), World(1, 2, 1, 2)), "nobody knows who else is there"


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, port: int) -> World:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return World(rank, 2, rank, 2, socket.gethostname())


def test_a_rank_that_does_not_come_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    world = as_rank(monkeypatch, 0, free_port())
    start_s = time.monotonic()
    answer = meeting.hold_meeting(world, wait_s=2)
    assert time.monotonic() - start_s < 40, "imports included"
    (finding,) = meeting.judge_meeting(answer, world)
    assert re.match(rf"rank 1 did not come within \d+ s; came: rank 0 on {world.node}$", finding.fact)


def test_the_first_rank_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    world = as_rank(monkeypatch, 1, port := free_port())
    (finding,) = meeting.judge_meeting(meeting.hold_meeting(world, wait_s=2), world)
    assert finding.fact.startswith(f"rank 0 did not come: rank 1 on {world.node} cannot reach the meeting place 127.0.0.1:{port}: ConnectionRefused")


def test_somebody_else_has_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        world = as_rank(monkeypatch, 0, port := other.getsockname()[1])
        (finding,) = meeting.judge_meeting(meeting.hold_meeting(world, wait_s=2), world)
    assert finding.fact.startswith(f"rank 0 cannot open the meeting place 127.0.0.1:{port}") and "MASTER_PORT" in finding.fix


@contextmanager
def two_ranks(code: str, folders: list[Path]) -> Iterator[list[subprocess.Popen[str]]]:
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
        )
        for rank, folder in enumerate(folders)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.launch
def test_ranks_that_do_not_share_their_folder(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    code = (
        "from tunesmith.doctor.meeting import hold_meeting, judge_meeting\nfrom tunesmith.world import this_world\n"
        "world = this_world()\nprint([f.fact for f in judge_meeting(hold_meeting(world, 'outputs'), world) if f.verdict == 'fail'])"
    )
    with two_ranks(code, folders) as ranks:
        told = [process.communicate(timeout=150)[0] for process in ranks]
    for one in told:
        assert "outputs is no shared folder: rank 1 cannot see what rank 0 writes there" in one
    assert [list(folder.iterdir()) for folder in folders] == [[], []], "nothing is left there"


@pytest.mark.launch
def test_two_real_ranks_meet_and_one_report_is_printed(overrides: list[str]) -> None:
    code = "import sys; from tunesmith.doctor import doctor; sys.exit(doctor(sys.argv[1:], as_json=True))"
    command = ["torchrun", "--nproc-per-node=2", f"--master-port={free_port()}", "--no-python", sys.executable, "-c", code, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment({"HF_ENDPOINT": closed_port()}), cwd=ROOT)
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    findings = [Finding(**finding) for finding in record["findings"]]
    assert (done.returncode, [finding for finding in findings if finding.verdict == "fail"]) == (0, []), done.stderr
    facts_of = {finding.area: finding.fact for finding in findings}
    assert record["rank"] == 0 and record["machine"]["kind"] == "cpu"
    assert facts_of["ranks"].startswith("all 2 ranks came")
    assert re.match(r"all-reduce of 8 bytes \d+\.\d\d ms, of 1 MiB \d+\.\d\d ms \(\d+\.\d\d GB/s\)", facts_of["gloo"])
    assert "on 2 x cpu" in facts_of["plan"]


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_exit_code_says_whether_anything_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(room, "gather", lambda world, outputs: CPU)
    assert doctor([]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" ok, 0 warn, 0 fail")
    assert doctor(["--local_rank=0", "+exp=lora_cpuu"]) == 1
    assert "did you mean lora_cpu?" in capsys.readouterr().out
    monkeypatch.setattr(room, "gather", lambda world, outputs: with_device(A10, watts=100.0))
    assert doctor([], as_json=True) == 0, "a warning is no failure"
    record = json.loads(capsys.readouterr().out)
    assert [finding["fix"] for finding in record["findings"] if finding["verdict"] == "warn"] == ["sudo nvidia-smi -i 0 -pl 150"]
    monkeypatch.setenv("RANK", "0")
    assert doctor([]) == 1
    assert "WORLD_SIZE is not set although its sister is" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert doctor([]) == 1
    assert "export both" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert (doctor([]), capsys.readouterr().out) == (0, ""), "rank 0 says the same"


def test_the_doctor_itself_needs_no_torch() -> None:
    code = "import sys, tunesmith.doctor; print(sorted({'torch', 'transformers', 'deepspeed', 'bitsandbytes', 'pynvml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
