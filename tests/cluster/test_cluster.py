"""The real launcher on a real Slurm of two nodes: from `--slurm` to the end of a run, through preemption, failure and cancelling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import SHARED, Cluster

pytestmark = pytest.mark.launch

TWO_BY_TWO = ("--nodes", "2", "--ranks", "2")
LONG = ["train.steps=100000", "train.save_every=0", "slurm.in_pieces=true"]
"""Words for a run that a test will end."""


class Run:
    """A tiny experiment in the cluster's shared folder, and the run folder that its jobs make."""

    def __init__(self, cluster: Cluster, model: Path, data: Path, name: str):
        self.cluster, self.name = cluster, name
        for source, target in ((model, "model"), (data, "data")):
            shutil.copytree(source, cluster.outside(SHARED / target), dirs_exist_ok=True)
        self.words = [
            "engine=deepspeed", "engine.zero=2", f"name={name}", f"outputs={SHARED / 'outputs'}", f"data.cache={SHARED / 'cache'}",
            "model=local", f"model.path={SHARED / 'model'}", "data=local", f"data.folder={SHARED / 'data'}", "data.train=train.json",
            "data.dev=dev.json", "train.steps=7", "train.conversations_per_step=8", "train.save_every=0", "train.eval_every=0",
            "optim.lr=1e-2", "optim.warmup_steps=2", "method.r=4", "hardware.peak=1e11", "hardware.threads=1", "eval.before=false",
            "eval.after=false", "slurm.time=1:00:00", "slurm.signal_s=60",
        ]  # fmt: skip
        self.jobs: list[str] = []

    def submit(self, *words: str, options: tuple[str, ...] = TWO_BY_TWO) -> str:
        self.jobs.append(self.cluster.launch([*self.words, *words], *options))
        return self.jobs[-1]

    @property
    def folders(self) -> list[Path]:
        return sorted(path.parent for path in self.cluster.outside(SHARED / "outputs" / self.name).glob("*/status.json"))

    @property
    def status(self) -> dict[str, Any]:
        folders = self.folders
        assert len(folders) == 1, folders
        status: dict[str, Any] = json.loads((folders[0] / "status.json").read_text())
        return status

    @property
    def steps(self) -> int:
        return sum(1 for folder in self.folders if (folder / "metrics.jsonl").is_file() for _ in (folder / "metrics.jsonl").open())

    @property
    def losses(self) -> list[float]:
        from tunesmith.metrics import read_metrics

        return [row["train/loss"] for row in read_metrics(self.folders[0] / "metrics.jsonl")]

    def until_training(self) -> None:
        self.cluster.until(lambda: self.steps >= 2, self.jobs)


@pytest.fixture
def run(cluster: Cluster, tiny_model: Path, tiny_data: Path, request: pytest.FixtureRequest) -> Run:
    return Run(cluster, tiny_model, tiny_data, request.node.name.replace("[", "-").rstrip("]"))


@pytest.fixture(autouse=True)
def nothing_left(cluster: Cluster) -> Any:
    """No test leaves a job or a rank to the next."""
    yield
    left = cluster.run("squeue", "--noheader", "-o", "%i %T").stdout
    cluster.run("scancel", "--user=root", "--full")
    cluster.until(lambda: not cluster.run("squeue", "--noheader").stdout and not cluster.ranks(), [], timeout_s=30)
    assert not left, f"jobs were left: {left}"


def test_a_job_of_two_nodes_and_four_ranks_completes(cluster: Cluster, run: Run) -> None:
    job = run.submit()
    state = cluster.ended(job)
    assert (state, run.status["state"], run.status["job"]) == ("COMPLETED", "completed", job), cluster.told()
    assert len(run.losses) == 7 and run.losses[-1] < run.losses[0] - 0.4
    assert json.loads((run.folders[0] / "environment.json").read_text())["world_size"] == 4
