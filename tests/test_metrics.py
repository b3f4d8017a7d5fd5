"""What a run measures, and where the numbers go: arithmetic by hand, and the real W&B client against broken servers."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, environment
from tests.wandb_server import ACCOUNT, WandbServer
from tunesmith.config import Config, Tracker, TrackerKind, TrackerMode
from tunesmith.metrics import Meter, Rate, meter, open_sinks, read_metrics
from tunesmith.metrics.sinks import Console, JsonLines, Sinks, WandbSink
from tunesmith.records import read_json
from tunesmith.run import RunFolder, as_mapping
from tunesmith.world import World

# --- the record ----------------------------------------------------------------------------------------------------


def test_every_step_is_a_line_and_a_resumed_run_goes_on_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for step in (1, 2, 3, 4):
        first.log(step, {"train/loss": 1 / step})
        assert len(path.read_text().splitlines()) == step, "on disk at once"
    first.close({}, completed=False)
    path.write_bytes(path.read_bytes()[:-9])  # killed within step 4
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    again = JsonLines(path)  # from the checkpoint after step 2
    for step in (3, 4, 5):
        again.log(step, {"train/loss": 10.0 + step})
    again.close({}, completed=True)
    rows = read_metrics(path)
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 13.0), (4, 14.0), (5, 15.0)]
    assert abs(rows[-1]["time"] - time.time()) < 60


def test_a_later_line_replaces_a_step_and_what_is_no_row_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    lines = ['{"step": 2, "a": 1, "dev/loss": 3}', '{"step": 3, "a{"step": 2, "a": 5}', "[]", '{"x": 1}', '{"step": "4"}', '{"step": 1}']
    path.write_text("\n".join([*lines, '{"st']))
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "a": 5}]


def test_a_full_disk_is_told_once_and_no_line_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Sinks([JsonLines(path)]) as sinks:
        sinks.log(1, {"train/loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        try:
            sinks.log(2, {"train/loss": 2.0})
            sinks.log(3, {"train/loss": 3.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert capsys.readouterr().err.count("training goes on") == 1
        sinks.log(4, {"train/loss": 4.0})
    assert [(row["step"], row["train/loss"]) for row in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


# --- the meter -----------------------------------------------------------------------------------------------------


class Clock:
    """Stands in for perf_counter: time passes only when a test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def spend(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tunesmith.metrics.meter.perf_counter", clock)
    return clock


CPU: Any = SimpleNamespace(type="cpu")
RATE = Rate(
    conversations=16,
    computed_tokens=4000,
    padding_tokens=400,
    shared_tokens=500,
    target_tokens=1000,
    useful_flops=6e12,
    executed_flops=9e12,
)


def take_step(measured: Meter, clock: Clock, communication_s: float = 0.0) -> dict[str, float]:
    """Two micro-batches in 10 seconds: data 1, forward 2, backward 4, optimizer 2, other 1."""
    measured.begin()
    with measured.phase("data"):
        clock.spend(1.0)
    for _ in range(2):
        with measured.phase("forward"):
            clock.spend(1.0)
        with measured.phase("backward"):
            clock.spend(2.0)
    with measured.phase("optimizer"):
        clock.spend(2.0)
    clock.spend(1.0)
    return measured.end(RATE, communication_s)


def phases(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"time/{name}_s"] for name in meter.PHASES}


@pytest.mark.parametrize(
    ("communication_s", "forward", "backward", "optimizer", "communication"),
    [(0.0, 2, 4, 2, 0), (3.0, 2, 1, 2, 3), (5.0, 2, 0, 1, 5), (7.0, 1, 0, 0, 7), (99.0, 0, 0, 0, 8)],
)
def test_phases_add_up_to_the_step(
    clock: Clock, communication_s: float, forward: float, backward: float, optimizer: float, communication: float
) -> None:
    metrics = take_step(Meter(CPU, 1, None), clock, communication_s)
    expected = {"data": 1, "forward": forward, "backward": backward, "optimizer": optimizer, "communication": communication, "other": 1}
    assert phases(metrics) == pytest.approx(expected)
    assert sum(phases(metrics).values()) == pytest.approx(metrics["time/step_s"], abs=1e-6)
    assert metrics["time/step_s"] == pytest.approx(10.0)


def test_phases_add_up_on_the_real_clock() -> None:
    measured = Meter(CPU, 1, None)
    measured.begin()
    for name in ("data", "forward", "backward", "optimizer"):
        with measured.phase(name):
            time.sleep(0.002)
    metrics = measured.end(RATE, communication_s=0.001)
    assert sum(phases(metrics).values()) == pytest.approx(metrics["time/step_s"], abs=1e-6)
    assert all(seconds >= 0 for seconds in phases(metrics).values())


def test_what_lies_between_two_steps_counts_nowhere(clock: Clock) -> None:
    measured = Meter(CPU, 1, None)
    first = take_step(measured, clock)
    with measured.phase("forward"):  # an evaluation
        clock.spend(50.0)
    clock.spend(1000.0)  # a checkpoint
    second = take_step(measured, clock)
    for metrics in (first, second):
        assert metrics["time/step_s"] == pytest.approx(10.0)
        assert metrics["time/forward_s"] == pytest.approx(2.0)


def test_speeds_by_hand(clock: Clock) -> None:
    metrics = take_step(Meter(CPU, 4, peak_flops=1e12), clock)
    assert metrics["speed/computed_tokens_per_s"] == pytest.approx(400.0)
    assert metrics["speed/target_tokens_per_s"] == pytest.approx(100.0)
    assert metrics["speed/conversations_per_s"] == pytest.approx(1.6)
    assert metrics["speed/tflops_per_device"] == pytest.approx(6 / 10 / 4)
    assert metrics["speed/mfu"] == pytest.approx(6 / (10 * 4 * 1))
    assert metrics["speed/hfu"] == pytest.approx(9 / (10 * 4 * 1))
    counts = {name.removeprefix("data/"): count for name, count in metrics.items() if name.startswith("data/")}
    assert counts == {"conversations": 16, "computed_tokens": 4000, "padding_tokens": 400, "shared_tokens": 500, "target_tokens": 1000}
    assert metrics["memory/peak_gib"] == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, rel=0.1)


def test_no_peak_no_mfu(clock: Clock) -> None:
    metrics = take_step(Meter(CPU, 1, None), clock)
    assert not {"speed/mfu", "speed/hfu"} & metrics.keys()
    assert "speed/tflops_per_device" in metrics


# --- the card ------------------------------------------------------------------------------------------------------

UUID = "8c1d9aa5-61d5-0d4f-1c0c-b2f3a0a9d0f1"


class NVMLError(Exception):
    pass


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """NVML with one card, of which energy grows; torch says which card it is. No card is needed."""
    import torch

    nvml = ModuleType("pynvml")
    energy_mj = iter((5_000_000, 5_250_000, 7_500_000))

    def find(uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise NVMLError("not found")
        return "handle"

    functions = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": find,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=87, memory=40),
        "nvmlDeviceGetPowerUsage": lambda handle: 71_300,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: next(energy_mj),
        "NVMLError": NVMLError,
    }
    for name, function in functions.items():
        setattr(nvml, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    return nvml


CARD: Any = SimpleNamespace(type="cuda")


def test_card_sensors_have_units(card: ModuleType) -> None:
    sensors = meter.CardSensors(CARD)
    assert sensors.read() == pytest.approx({"card/utilisation": 0.87, "card/power_w": 71.3, "card/energy_kj": 0.25})
    assert sensors.read()["card/energy_kj"] == pytest.approx(2.5), "since the run began"


def refuse(*_: object) -> None:
    raise NVMLError("not supported")


def test_card_sensors_leave_out_what_a_card_lacks(card: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "nvmlDeviceGetTotalEnergyConsumption", refuse)  # before Volta
    assert meter.CardSensors(CARD).read() == pytest.approx({"card/utilisation": 0.87, "card/power_w": 71.3})


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_card_sensors_are_silent_without_a_driver(card: ModuleType, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, function, refuse)
    assert meter.CardSensors(CARD).read() == {}


def test_card_sensors_are_silent_on_a_cpu() -> None:
    assert meter.CardSensors(CPU).read() == {}


# --- the console ---------------------------------------------------------------------------------------------------

NUMBERS = {"train/loss": 1.2345, "speed/computed_tokens_per_s": 12345.6, "speed/tflops_per_device": 41.27, "speed/mfu": 0.4126}


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [1000.0]
    monkeypatch.setattr("tunesmith.metrics.sinks.time.monotonic", lambda: now[0])
    console = Console(steps=100, done=20)
    for step in range(21, 101):
        now[0] += 4.0
        console.log(step, NUMBERS | ({"dev/loss": 1.5} if step == 60 else {}))
    console.close({}, completed=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    lines = err.splitlines()
    assert lines[0] == "step 21/100 · loss 1.234 · tokens/s 12,346 · TFLOPS 41.3 · MFU 41% · left 5 min", "79 steps of 4 s"
    assert lines[-1] == "step 100/100 · loss 1.234 · tokens/s 12,346 · TFLOPS 41.3 · MFU 41% · left 0 s"
    assert [line for line in lines if "held-out loss 1.500" in line and line.startswith("step 60/100")]
    assert len(lines) < 80 / 2, "a line every 10 s, not one a step"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        console = Console(steps=100, done=20)
        console.log(60, NUMBERS)
        console.close({}, completed=True)
    written = b""
    with suppress(OSError):  # which is how a terminal ends
        while piece := os.read(ours, 100_000):
            written += piece
    os.close(ours)
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())
    assert "60/100" in seen
    assert "━" in seen
    assert "loss 1.234 · tokens/s 12,346 · TFLOPS 41.3 · MFU 41% · left 0 s" in seen


class Gone(io.StringIO):
    """A terminal whose connection was cut."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_is_gone_does_not_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    with Sinks([Console(steps=2, done=0)]) as sinks:
        sinks.log(1, NUMBERS)
        sinks.log(2, NUMBERS)


# --- W&B -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_account(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's own W&B settings or key reaches a test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(home))


def wandb_config(mode: TrackerMode) -> Config:
    config = Config(name="demo", tracker=Tracker(TrackerKind.wandb, mode, group="sweep-7", tags=["lora", "cpu"], job_type="tune"))
    config.model.path, config.data.train = "models/tiny", "train.json"
    return config


def records(run: Path, kind: str = "offline-run") -> list[list[dict[str, Any]]]:
    """What each W&B run in a run folder holds, oldest first, by wandb's own reader."""
    found = []
    for path in sorted(run.glob(f"wandb/{kind}-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        reader = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
        text = subprocess.run(reader, capture_output=True, text=True, check=True, timeout=60).stdout
        found.append([json.loads(line) for line in text.splitlines()])
    return found


def of_type(kind: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row[kind] for row in rows if row["type"] == kind]


def losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["item"]["_step"]: row["item"]["train/loss"] for row in of_type("history", rows)}


def test_offline_holds_the_run_and_a_resumed_run_has_the_same_id(tmp_path: Path) -> None:
    config = wandb_config(TrackerMode.offline)
    for first, last, completed in ((1, 5, False), (4, 8, True)):
        record = JsonLines(tmp_path / "metrics.jsonl")
        sink = WandbSink(config, tmp_path, as_mapping(config))
        for step in range(first, last + 1):
            record.log(step, {"train/loss": 1 / step, "speed/mfu": 0.4})
            sink.log(step, {})
        record.close({}, completed)
        sink.close({"test/slot_f1": 0.9} if completed else {}, completed)
    one, two = records(tmp_path)
    known = read_json(tmp_path / "wandb.json")
    assert known
    assert known["read"] == (tmp_path / "metrics.jsonl").stat().st_size
    for rows in (one, two):
        (run,) = of_type("run", rows)
        assert run["run_id"] == known["id"]
        assert re.fullmatch("[0-9a-f]{8}", run["run_id"])
        assert run["project"] == "tunesmith"
        assert run["run_group"] == "sweep-7"
        assert run["job_type"] == "tune"
        assert run["display_name"] == f"demo-{tmp_path.name}"
        assert sorted(run["tags"]) == ["cpu", "lora"]
        found = {name: value for name, value in run["config"]["update"].items() if name != "_wandb"}
        assert found == as_mapping(config), "the resolved config, whole"
    assert losses(one) == {step: 1 / step for step in range(1, 6)}
    assert losses(two) == {step: 1 / step for step in range(4, 9)}, "only what the first process has not read"
    assert all(row["item"]["speed/mfu"] == 0.4 for row in of_type("history", one))
    assert [of_type("exit", rows)[-1].get("exit_code", 0) for rows in (one, two)] == [1, 0]
    times = [row["item"]["_timestamp"] for row in of_type("history", one)]
    assert times == pytest.approx([row["time"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()[:5])])
    summary = {name: value for row in of_type("summary", two) for name, value in row["update"].items()}
    assert summary["test/slot_f1"] == 0.9


TRAINER = """
import json, sys, time
from pathlib import Path
from tunesmith.config import Config, Tracker, TrackerKind, TrackerMode
from tunesmith.metrics.sinks import WandbSink, open_sinks
from tunesmith.run import RunFolder
from tunesmith.world import World

run, mode, go_on, first = Path(sys.argv[1]), TrackerMode[sys.argv[2]], Path(sys.argv[5]), int(sys.argv[6])
init_timeout_s, WandbSink.CLOSE_S = float(sys.argv[3]), float(sys.argv[4])
run.mkdir(exist_ok=True)
config = Config(name="demo", tracker=Tracker(TrackerKind.wandb, mode, init_timeout_s=init_timeout_s))
config.model.path, config.data.train = "models/tiny", "train.json"
start, logged = time.perf_counter(), []
with open_sinks(config, RunFolder(run, World()), 5, 0) as sinks:
    opened = time.perf_counter() - start
    for step in range(first, first + 5):
        before = time.perf_counter()
        sinks.log(step, {"train/loss": 1 / step})
        logged.append(time.perf_counter() - before)
    while not go_on.exists():
        time.sleep(0.05)
    sinks.summarise({"test/slot_f1": 0.9, "seconds": 3.0})
    ending = time.perf_counter()
print(json.dumps({"open_s": opened, "log_s": sorted(logged), "close_s": time.perf_counter() - ending, "wandb": "wandb" in sys.modules}))
"""


def trainer(
    run: Path, mode: str = "online", init_timeout_s: float = 1.0, close_s: float = 20.0, go_on: Path = ROOT, first: int = 1, **extra: str
) -> subprocess.Popen[str]:
    """A process that logs five steps, from `first` on, to W&B as a training does, and ends once the file `go_on` is there."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", TRAINER, str(run), mode, str(init_timeout_s), str(close_s), str(go_on), str(first)],
        cwd=run.parent, env=environment(extra), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


EXPECTED = {step: 1 / step for step in range(1, 6)}


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[WandbServer]:
    """A loopback W&B server; its parameter: how it misbehaves."""
    with WandbServer(**getattr(request, "param", {})) as one:
        yield one


def check(process: subprocess.Popen[str], run: Path, close_s: float, within_s: float = 40) -> str:
    """The training was not held up, ended well and promptly, and nothing is missing; what it said on stderr."""
    start = time.monotonic()
    out, err = process.communicate(timeout=within_s)
    assert process.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["open_s"] < 0.5
    assert told["log_s"][-2] < 0.05, "one may meet a busy machine"
    assert told["log_s"][-1] < 0.5
    assert told["close_s"] < close_s, f"{told}\n{err}"
    assert time.monotonic() - start < told["close_s"] + 10, "left promptly"
    assert not told["wandb"], "the training itself never imports W&B"
    assert "Traceback" not in err
    assert {row["step"]: row["train/loss"] for row in read_metrics(run / "metrics.jsonl")} == EXPECTED
    return err


def is_offline(run: Path) -> None:
    (rows,) = records(run)
    assert losses(rows) == EXPECTED
    known = read_json(run / "wandb.json")
    assert known
    assert of_type("run", rows)[0]["run_id"] == known["id"], "the id that was tried online"


@pytest.mark.parametrize("server", [{"delay_s": 3.0}], indirect=True, ids=["3 s an answer"])
def test_refused_silent_slow_or_without_a_key(server: WandbServer, tmp_path: Path) -> None:
    """Side by side, as each of them waits most of the time; a socket that listens and is never accepted from is silent."""
    with socket.socket() as closed, socket.socket() as silent:
        closed.bind(("127.0.0.1", 0))
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        cases = {
            "refused": ACCOUNT | {"WANDB_BASE_URL": f"http://127.0.0.1:{closed.getsockname()[1]}"},
            "silent": ACCOUNT | {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"},
            "slow": server.environment,
            "no key": {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"},
        }
        processes = {name: trainer(tmp_path / name, **extra) for name, extra in cases.items()}
        said = {name: check(process, tmp_path / name, close_s=25) for name, process in processes.items()}
    for name, text in said.items():
        assert f"logging offline, later: wandb sync {tmp_path / name}/wandb/offline-run-*" in text
        is_offline(tmp_path / name)
    assert "No API key configured" in said["no key"]


@pytest.mark.parametrize("server", [{"dies_at": "/file_stream"}], indirect=True, ids=["when numbers come"])
def test_a_server_that_dies_under_way(server: WandbServer, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    process = trainer(tmp_path / "run", init_timeout_s=15.0, close_s=2.0, go_on=go_on, **server.environment)
    wait_for(lambda: any("/file_stream" in request for request in server.seen), 30)
    go_on.touch()
    said = check(process, tmp_path / "run", close_s=2 + 8)
    assert "tracker.mode=online: not finished after 2 s — for the rest: wandb sync" in said
    is_offline(tmp_path / "run")


def test_a_server_that_works(server: WandbServer, tmp_path: Path) -> None:
    """And a run that goes on later is the same run to it, with only what is new."""
    process = trainer(tmp_path / "run", init_timeout_s=15.0, **server.environment)
    said = check(process, tmp_path / "run", close_s=20)
    assert "offline" not in said
    assert records(tmp_path / "run") == []
    (rows,) = records(tmp_path / "run", kind="run")
    assert losses(rows) == EXPECTED
    ((name, run),) = server.runs.items()
    assert {line["_step"]: line["train/loss"] for line in run.lines} == EXPECTED
    again = trainer(tmp_path / "run", init_timeout_s=15.0, first=6, **server.environment)
    _, err = again.communicate(timeout=40)
    assert again.returncode == 0, err
    assert list(server.runs) == [name] and server.opened(name) == 2
    assert [line["_step"] for line in run.lines] == list(range(1, 11))
    assert run.exit_codes == [0, 0] and run.summary["test/slot_f1"] == 0.9


def test_a_killed_training_loses_nothing(tmp_path: Path) -> None:
    """What W&B's client has in memory would die with it (7 bytes on disk after 15 s); its process outlives training."""
    run = tmp_path / "run"
    process = trainer(run, "offline", go_on=tmp_path / "never")
    wait_for(lambda: any(run.glob("wandb/*/*.wandb")), 30)
    process.kill()
    process.communicate(timeout=40)
    wait_for(lambda: (read_json(run / "wandb.json") or {}).get("read"), 30)
    (rows,) = records(run)
    assert losses(rows) == EXPECTED
    assert of_type("exit", rows)[-1]["exit_code"] == 1


def is_for(process: psutil.Process, run: Path) -> bool:
    """Whether it is the process that hands a run's numbers to W&B."""
    with suppress(psutil.Error):
        words = process.cmdline()
        return len(words) > 1 and words[1].endswith("to_wandb.py") and any(str(run) in file.path for file in process.open_files())
    return False


def test_signals_are_for_training(tmp_path: Path) -> None:
    """SIGTERM and SIGUSR1 to all processes of a job do not end W&B's; SIGINT there is W&B's stop button and is passed on."""
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    config = wandb_config(TrackerMode.offline)
    try:
        record = JsonLines(tmp_path / "metrics.jsonl")
        sink = WandbSink(config, tmp_path, {})
        wait_for(lambda: any(tmp_path.glob("wandb/*/*.wandb")), 30)
        wait_for(lambda: any(is_for(process, tmp_path) for process in psutil.process_iter()), 10)
        (wandb,) = (process for process in psutil.process_iter() if is_for(process, tmp_path))
        assert wandb.ppid() != os.getpid(), "who ends training with all its descendants does not end this"
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            wandb.send_signal(number)
        record.log(1, {"train/loss": 1.0})
        wait_for(asked.is_set, 10)
        record.close({}, completed=True)
        sink.close({}, completed=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert losses(records(tmp_path)[0]) == {1: 1.0}


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("tracker", [Tracker(TrackerKind.wandb, TrackerMode.disabled), Tracker(TrackerKind.none, TrackerMode.online)])
def test_disabled_writes_nothing(tracker: Tracker, tmp_path: Path) -> None:
    with open_sinks(Config(tracker=tracker), RunFolder(tmp_path, World()), 1, 0) as sinks:
        sinks.log(1, {"train/loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_have_no_sinks(tmp_path: Path) -> None:
    config = wandb_config(TrackerMode.online)
    with open_sinks(config, RunFolder(tmp_path, World(rank=1, size=2)), 1, 0) as sinks:
        assert sinks.sinks == []
        sinks.log(1, {"train/loss": 1.0})
        sinks.summarise({"test/loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_reading_metrics_needs_neither_torch_nor_wandb() -> None:
    program = "import sys, tunesmith.metrics, tunesmith.report; print([name for name in ('torch', 'wandb') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


# --- communication -------------------------------------------------------------------------------------------------

COMMUNICATE = """
import json, os, time
from tunesmith.hardware import prepare_environment
prepare_environment(on_cpu=True)
import torch
from tunesmith.config import Config
from tunesmith.engine import join
from tunesmith.engine.deepspeed import DeepSpeedEngine, _import_deepspeed
from tunesmith.world import World

join(Config(), World(), torch.device("cpu"), threads=1)
engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
engine.deepspeed = deepspeed = _import_deepspeed()
deepspeed.init_distributed(dist_backend="gloo", verbose=False, dist_init_required=False)
deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False, debug=False)
one, all = torch.ones(8_000_000), torch.empty(8_000_000)
deepspeed.comm.all_gather_into_tensor(all, one)
engine.communication_s()
found = []
for _ in range(3):
    wall_s = 0.0
    for _ in range(10):
        start = time.perf_counter()
        deepspeed.comm.all_gather_into_tensor(all, one)
        deepspeed.comm.all_reduce(one)
        wall_s += time.perf_counter() - start
    found.append((wall_s, engine.communication_s()))
kept = sum(len(timer.event_timers) for timer in deepspeed.comm.comm.timers.get_timers().values())
kept += len(deepspeed.comm.comm.comms_logger.comms_dict)
print(json.dumps({"found": found, "again": engine.communication_s(), "kept": kept}), flush=True)
os._exit(0)  # on a busy machine gloo's threads now and then abort the interpreter's end
"""


def test_deepspeed_communication_is_wall_time() -> None:
    """DeepSpeed's own log adds up running totals: over these ten pairs of calls it would say several times the truth."""
    done = subprocess.run([sys.executable, "-c", COMMUNICATE], capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for wall_s, communication_s in told["found"]:
        assert 0.3 * wall_s < communication_s < 1.05 * wall_s, told
    assert told["again"] == 0.0
    assert told["kept"] == 0, "nothing grows with the steps"


# --- docs/metrics.md -----------------------------------------------------------------------------------------------

NAME = re.compile(r"(train|dev|test|speed|data|time|memory|card|plan|run)/[a-z0-9_]+")


def logged_names() -> set[str]:
    """Every metric name that the sources write: literals, and what is made from parts by calling what makes them."""
    from tunesmith.loop import held_out

    names: set[str] = set()
    for file in ("loop.py", "evaluate.py", "metrics/meter.py", "metrics/totals.py", "plan/__init__.py"):
        tree = ast.parse((ROOT / "src/tunesmith" / file).read_text())
        names |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    measured = Meter(CPU, 1, peak_flops=1.0)
    names |= measured.end(RATE, 0.0).keys()
    engine: Any = SimpleNamespace(evaluate=lambda batches: (1.0, 1))
    for split in ("dev", "test"):
        names |= held_out(engine, [], split).keys()
    return {name for name in names if NAME.fullmatch(name)}


def test_every_metric_is_documented() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    documented = {name for name in re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE) if "/" in name}
    assert logged_names() == documented
