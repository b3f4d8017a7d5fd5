"""W&B's sweeps as they are used: the real `wandb sweep` and `wandb agent`, the real launcher with two ranks a trial, a server on the loopback."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import ROOT, environment
from tests.wandb_server import ENTITY, SWEEP, Command, WandbServer
from tunesmith.metrics import read_metrics
from tunesmith.records import read_json

# The client as it is installed, but for the 5 s that the agent waits between two looks at its trials.
WANDB = "from wandb.wandb_agent import Agent; Agent.POLL_INTERVAL = 0.5; from wandb.cli.cli import cli; cli()"
ON_CPU = ["hardware=cpu", "precision=fp32", "engine=accelerate", "engine.checkpointing=false", "eval.before=false", "eval.after=false"]


def client(words: list[str], extra: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    full = [sys.executable, "-c", WANDB, *words]
    return subprocess.run(full, cwd=ROOT, env=extra, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s)


def working_for(server: WandbServer) -> list[psutil.Process]:
    """Processes that were started with this server's address: agent, launchers, ranks, W&B's."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("WANDB_BASE_URL") == server.url and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def command(kind: str, run: str, parameters: Mapping[str, Any]) -> Command:
    """A trial, as W&B sends it to an agent."""
    return {"type": kind, "run_id": run, "program": "train.py", "args": {key: {"value": value} for key, value in parameters.items()}}


class Lead:
    """The sweep's side: trials one after the other; `long` is stopped once it trains, taken up again, and at work when the sweep is over."""

    def __init__(self, server: WandbServer, common: list[str], outputs: Path):
        self.server, self.outputs = server, outputs
        given: dict[str, Any] = dict(word.split("=", 1) for word in common)
        good = given | {"name": "good", "optim.lr": 0.01, "method.r": 4}
        long = good | {"name": "long", "train.steps": 20000}
        quick = {"--via": "torchrun"}  # deepspeed takes seconds more to start ranks, and has ways of its own to end them
        self.coming = [
            command("run", "good", good | quick),
            command("run", "bad", good | quick | {"name": "bad", "optim.lr": 1e30}),
            command("run", "again", good | quick),
            command("run", "long", long),
            command("resume", "long", long | quick),
        ]
        self.stopped_as = ""
        """State of `long` when it had been stopped."""
        self.steps_before = 0

    @property
    def long(self) -> Path | None:
        return next(self.outputs.glob("long/*/"), None)

    def steps(self) -> int:
        """Steps that `long` has taken."""
        rows = read_metrics(self.long / "metrics.jsonl") if self.long else []
        return int(rows[-1]["step"]) if rows else 0

    def __call__(self, running: Mapping[str, bool]) -> list[Command]:
        if "long" in running:
            trains = self.server.opened("long") == 2 - len(self.coming) and self.steps() > self.steps_before + 2
            return [] if not trains else [{"type": "stop", "run_id": "long"}] if self.coming else [{"type": "exit"}]
        if running:
            return []
        if len(self.coming) == 1 and self.long:
            self.stopped_as, self.steps_before = (read_json(self.long / "status.json") or {})["state"], self.steps()
        return [self.coming.pop(0) if self.coming else {"type": "exit"}]


@pytest.mark.launch
def test_a_sweep_of_wandb(overrides: list[str], tmp_path: Path) -> None:
    """Trials that complete, diverge, are complete already, are stopped and taken up again; then the sweep is over while one is at work."""
    sweep = yaml.safe_load((ROOT / "sweeps/grid.yaml").read_text("utf-8"))
    sweep["command"][4:4] = ["--ranks", "2"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    common = [word for word in overrides if not word.startswith("name=")] + [*ON_CPU, "train.steps=3", "optim.warmup_steps=0"]
    outputs = tmp_path / "outputs"
    with WandbServer() as server:
        lead = server.commands = Lead(server, common, outputs)
        account = {**server.environment, "WANDB_ERROR_REPORTING": "false", "WANDB_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
        account |= {"NETRC": str(tmp_path / "netrc")} | {f"WANDB_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "CACHE", "DATA")}
        extra = environment(account)
        made = client(["sweep", str(tmp_path / "sweep.yaml")], extra, 60)
        assert f"wandb agent {ENTITY}/tunesmith/{SWEEP}" in made.stdout, made.stdout
        done = client(["agent", f"{ENTITY}/tunesmith/{SWEEP}"], extra, 200)
        assert done.returncode == 0, done.stdout
        assert lead.coming == [], f"the agent gave up\n{done.stdout}"
        deadline = time.monotonic() + 30
        while left := working_for(server):
            assert time.monotonic() < deadline, f"orphans: {[process.cmdline() for process in left]}"
            time.sleep(0.1)

        runs = server.runs
        assert sorted(runs) == ["again", "bad", "good", "long"], "a run for each trial, of the agent's id; rank 1 has none"
        assert [server.opened(name) for name in ("good", "bad", "again", "long")] == [1, 1, 1, 2]
        assert {run.sweep for run in runs.values()} == {SWEEP}
        assert {(sent["entity"], sent["project"]) for sent in server.sent("upsertBucket")} == {(ENTITY, "tunesmith")}
        assert [runs[name].exit_codes for name in ("good", "bad", "again", "long")] == [[0], [1], [0], [1, 1]]

        # Parameters arrived as overrides, and numbers as they are in the record.
        (good,), (bad,), (long,) = (list(outputs.glob(f"{name}/*/")) for name in ("good", "bad", "long"))
        assert (read_json(good / "environment.json") or {})["world_size"] == 2
        config = yaml.safe_load((good / "config.yaml").read_text())
        assert (config["optim"]["lr"], config["method"]["r"], config["train"]["steps"]) == (0.01, 4, 3)
        assert runs["good"].config["optim"]["value"]["lr"] == runs["good"].config["optim.lr"]["value"] == 0.01
        rows = {row["step"]: row["train/loss"] for row in read_metrics(good / "metrics.jsonl")}
        for name in ("good", "again"):
            assert {line["_step"]: line["train/loss"] for line in runs[name].lines} == rows
            assert runs[name].lines[-1]["dev/loss"] == runs[name].summary["dev/loss"], "what the sweep looks at"
            assert runs[name].summary["run/ended"].startswith("all ")

        # What went wrong is said.
        assert (read_json(bad / "status.json") or {})["state"] == "nan"
        assert runs["bad"].summary["run/ended"].startswith("FloatingPointError: step 2: loss nan")

        # Stopped twice, by the agent's SIGTERM and by its SIGKILL to the launcher: saved, and one run of W&B without a gap.
        assert lead.stopped_as == "stopped"
        status = read_json(long / "status.json") or {}
        assert status["state"] == "stopped" and status["step"] > lead.steps_before
        assert max(path.name for path in long.glob("checkpoints/*")) == f"step-{status['step']:06d}"
        assert (read_json(long / "wandb.json") or {})["id"] == "long", "whoever types the same words later goes on with it"
        assert [line["_step"] for line in runs["long"].lines] == list(range(1, status["step"] + 1))
