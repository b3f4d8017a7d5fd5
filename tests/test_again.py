"""A rank runs out of memory: all start again with half the micro-batch, and the run ends as it would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT, Finished, launch
from tunesmith import loop
from tunesmith.again import OutOfMemory, Restarts
from tunesmith.config import Compute, Config, EngineKind, Refusal
from tunesmith.engine import is_out_of_memory
from tunesmith.hardware import Machine
from tunesmith.plan import make_plan
from tunesmith.records import write_json
from tunesmith.run import RunFolder, plan_record
from tunesmith.world import World

SMALL = ["eval.before=false", "eval.after=false", "tracker=none", "train.micro_batch=4", "train.steps=4"]


def with_shortage(launcher: str, words: list[str], ranks: int, fault: str, folder: Path) -> Finished:
    path = os.pathsep.join([str(ROOT / "tests/faults"), os.environ.get("PYTHONPATH", "")])
    extra = {"PYTHONPATH": path, "TUNESMITH_TEST_FAULT": fault, "TUNESMITH_TEST_FAULT_FILE": str(folder / "fault.txt")}
    return launch(launcher, words, ranks, extra=extra)


@pytest.mark.parametrize(
    ("launcher", "ranks", "engine", "fault"),
    [
        ("torchrun", 2, ["engine=accelerate"], "1:2:oom_backward"),
        ("deepspeed", 2, ["engine=deepspeed", "engine.zero=3"], "1:0:oom_backward"),
        ("plain", 2, ["engine=accelerate", "train.save_every=1"], "0:2:oom_forward"),
    ],
)
def test_all_ranks_go_on_with_half_the_micro_batch(
    launcher: str, ranks: int, engine: list[str], fault: str, overrides: list[str], tmp_path: Path
) -> None:
    words = [*overrides, "+exp=lora_cpu", *SMALL, *engine]
    whole = launch(launcher, [*words, f"outputs={tmp_path / 'whole'}"], ranks)
    whole.outputs = tmp_path / "whole"
    done = with_shortage(launcher, words, ranks, fault, tmp_path)
    assert (done.code, whole.code) == (0, 0), done.output
    rank, step, action = fault.split(":")
    (event,) = json.loads((done.run / "restarts.json").read_text())["events"]
    assert (event["rank"], event["step"], event["micro_batch"]) == (int(rank), int(step), 4)
    assert event["phase"] == action.removeprefix("oom_")
    assert json.loads((done.run / "plan.json").read_text())["micro_batch"] == 2
    assert f"rank {rank} ran out of memory in step {int(step) + 1} ({event['phase']}): micro-batch 4 -> 2" in done.output
    assert "micro-batch 4 -&gt; 2" in (done.run / "report.html").read_text()
    assert not (done.run / "first_error.txt").exists()
    assert len(done.losses) == 4, "no step is there twice"
    assert done.losses == pytest.approx(whole.losses, rel=1e-5), "the global step is the same"


def test_the_probe_in_fp16_may_run_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CPU trains in fp16, so the probe alone is called, as train.py does."""
    config, plan = Config(name="t4"), SimpleNamespace(micro_batch=4)
    config.precision.compute = Compute.fp16
    batches = SimpleNamespace(micro_batches=lambda *_: [None])
    engine = SimpleNamespace(world=World(rank=1, size=2), loss_module=None, gather=None)
    monkeypatch.setattr(loop, "batches_of", lambda *_: batches)

    def probe(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.5 GiB")

    monkeypatch.setattr(loop, "probe", probe)
    with pytest.raises(OutOfMemory, match=r"Tried to allocate 1.5 GiB") as caught:
        loop.check_range(config, plan, engine, None)  # type: ignore[arg-type]
    assert (caught.value.step, caught.value.phase, caught.value.micro_batch) == (0, "fp16 probe", 4)


def test_with_one_conversation_left_it_is_said_what_needs_less(overrides: list[str], tmp_path: Path) -> None:
    done = with_shortage("python", [*overrides, "+exp=lora_cpu", *SMALL, "engine=accelerate", "train.micro_batch=1"], 1, "0:1:oom_forward", tmp_path)
    assert done.code == 3
    assert "with one conversation in a micro-batch" in done.output and "engine.checkpointing=true" in done.output
    assert not (done.run / "restarts.json").exists()


def test_the_record_is_kept_until_somebody_removes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, other = Restarts(tmp_path, World(0, 2)), Restarts(tmp_path, World(1, 2))
    replaced: list[int] = []
    monkeypatch.setattr(Restarts, "replace_process", lambda self: replaced.append(self.world.rank))
    other.begin_again(OutOfMemory(7, "backward", 6, torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")))
    assert main.is_asked() and replaced == [1]
    main.begin_again(OutOfMemory(7, "backward", 6, torch.OutOfMemoryError()))
    assert replaced == [1, 0], "both ran out: it counts once"
    main, other = Restarts(tmp_path, World(0, 2)), Restarts(tmp_path, World(1, 2))
    assert (main.count, main.micro_batch) == (1, 3) and not main.is_asked()
    with pytest.raises(TimeoutError, match="rank 0 did not start again"):
        other.wait_for_main(0.1)
    main.note_start()
    other.wait_for_main(0.1)
    with pytest.raises(Refusal, match="one conversation"):
        main.begin_again(OutOfMemory(7, "forward", 1, MemoryError()))
    assert main.lines() == ["rank 1 ran out of memory in step 8 (backward): micro-batch 6 -> 3"]


def test_a_real_shortage_is_known_as_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("HIP out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_what_is_open_is_closed_only_as_the_new_process_begins(tmp_path: Path) -> None:
    """A thread of a library, as gloo's, waits at its own epoll until then; in the new process that is gone."""
    script = tmp_path / "starts_again.py"
    script.write_text(f"""
import os, select, sys, threading, time
from pathlib import Path
from tunesmith.again import Restarts
from tunesmith.world import World

known = Path({str(tmp_path / "number")!r})
if known.exists():
    try:
        os.fstat(int(known.read_text()))
    except OSError:
        print("closed")
    sys.exit()
epoll = select.epoll()
os.set_inheritable(epoll.fileno(), True)  # as a library's may be
known.write_text(str(epoll.fileno()))

def wait():
    try:
        while True:
            epoll.poll(0.01)
    except (OSError, ValueError):
        os._exit(6)

threading.Thread(target=wait, daemon=True).start()
replace = os.execve
os.execve = lambda *words: (time.sleep(0.3), replace(*words))  # what may lie between on a busy machine
Restarts(Path({str(tmp_path)!r}), World()).replace_process()
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "closed"), done.stderr


def test_what_engine_fit_chose_holds_as_long_as_there_are_checkpoints_of_it(tmp_path: Path) -> None:
    config = Config(name="fit")
    config.engine.kind, config.engine.fit, config.model.known_as, config.hardware.card = EngineKind.accelerate, True, "smollm2-135m", "cpu"
    plan = make_plan(config, Machine(cores=2, ram_gib=16.0), 1)
    write_json(tmp_path / "plan.json", plan_record(plan))
    folder = RunFolder(tmp_path, World())
    assert folder.kept() == {}, "nothing has been kept of it yet"
    (folder.checkpoints / ".step-000002.tmp").mkdir(parents=True)
    assert folder.kept() == {}, "a save that was killed is none"
    (folder.checkpoints / "step-000004").mkdir()
    assert folder.kept() == {"engine.zero": config.engine.zero, "engine.offload": False, "engine.fsdp": False, "precision.compute": "fp32"}
    assert make_plan(config, Machine(cores=2, ram_gib=16.0), 1, kept=folder.kept()).run_id == plan.run_id
