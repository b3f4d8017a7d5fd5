"""The real launcher on a real Slurm of two nodes: from `--slurm` to the end of a run, through preemption, failure and cancelling."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import SHARED, Cluster

pytestmark = pytest.mark.launch

TWO_BY_TWO = ("--nodes", "2", "--ranks", "2")
STEPS = 40
LONG = ["train.steps=100000", "slurm.in_pieces=true"]
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
            "data.dev=dev.json", f"train.steps={STEPS}", "train.conversations_per_step=8", "train.save_every=0", "train.eval_every=0",
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
        files = [folder / "metrics.jsonl" for folder in self.folders]
        return sum(file.read_text().count("\n") for file in files if file.is_file())

    @property
    def losses(self) -> list[float]:
        from tunesmith.metrics import read_metrics

        return [row["train/loss"] for row in read_metrics(self.folders[0] / "metrics.jsonl")]

    def until_training(self) -> None:
        self.cluster.until(lambda: self.steps >= 2, self.jobs)


@pytest.fixture
def run(cluster: Cluster, tiny_model: Path, tiny_data: Path, request: pytest.FixtureRequest) -> Run:
    return Run(cluster, tiny_model, tiny_data, re.sub(r"\W+", "-", request.node.name).strip("-"))


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tiny_model: Path, tiny_data: Path) -> Run:
    """A run that nothing happens to, started by srun."""
    run = Run(cluster, tiny_model, tiny_data, "uninterrupted")
    assert cluster.ended(run.submit()) == "COMPLETED", cluster.told()
    return run


@pytest.fixture(autouse=True)
def nothing_left(cluster: Cluster) -> Iterator[None]:
    """No test leaves a job or a rank to the next."""
    yield
    left = cluster.run("squeue", "--noheader", "-o", "%i %T").stdout
    cluster.run("scancel", "--user=root", "--full")
    cluster.until(lambda: not cluster.run("squeue", "--noheader").stdout and not cluster.ranks(), [], timeout_s=30)
    assert not left, f"jobs were left: {left}"


def test_a_job_of_two_nodes_and_four_ranks_completes(cluster: Cluster, uninterrupted: Run) -> None:
    (job,) = uninterrupted.jobs
    assert (uninterrupted.status["state"], uninterrupted.status["job"]) == ("completed", job)
    losses = uninterrupted.losses
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.4
    assert json.loads((uninterrupted.folders[0] / "environment.json").read_text())["world_size"] == 4
    again = uninterrupted.submit()
    assert cluster.ended(again) == "COMPLETED", cluster.told()
    assert uninterrupted.losses == losses, "a run that is complete is not run again"


@pytest.fixture(params=["the batch script is warned", "the ranks are warned"])
def warning(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """Whom Slurm signals on preemption: the batch script by SIGUSR1 or, as it does by default, the ranks of srun by SIGTERM."""
    told = "\nSlurmctldParameters=preempt_send_user_signal", "\n# SlurmctldParameters=preempt_send_user_signal"
    if request.param == "the ranks are warned":
        cluster.configure(*told)
    yield request.param
    if request.param == "the ranks are warned":
        cluster.configure(*reversed(told))


def test_a_preempted_job_goes_on_by_itself(cluster: Cluster, run: Run, uninterrupted: Run, warning: str) -> None:
    via = "srun" if warning == "the batch script is warned" else "deepspeed"
    job = run.submit("slurm.partition=low", options=(*TWO_BY_TWO, "--via", via))
    run.until_training()
    ranks = cluster.ranks()
    assert len(ranks) == 4
    cluster.run("kill", "-STOP", *ranks)  # or a quick machine would be done before Slurm has looked
    assert run.steps < STEPS - 1
    rival = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    ).stdout.strip()
    cluster.until(lambda: cluster.job(job).get("PreemptTime", "None") != "None", [job, rival])
    # Where Slurm warns the ranks themselves it sends them SIGCONT too: one may have saved and left by now.
    cluster.run("kill", "-CONT", *ranks, check=False)
    seen = cluster.until(lambda: run.status["state"] == "requeued" and run.status, [job, rival])
    assert seen["reason"] == "preempted"
    assert cluster.ended(rival) == "COMPLETED"
    assert cluster.ended(job) == "COMPLETED", cluster.told()
    assert cluster.job(job)["Restarts"] == "1"
    status = run.status
    assert status["state"] == "completed" and [start["restart"] for start in status["starts"]] == [0, 1]
    assert 0 < status["starts"][1]["step"] < STEPS, "it began again from nothing"
    assert run.losses == pytest.approx(uninterrupted.losses, rel=1e-6)


def test_a_rank_that_is_killed_ends_the_job_as_failed(cluster: Cluster, run: Run) -> None:
    job = run.submit(*LONG, options=(*TWO_BY_TWO, "--via", "pdsh"))  # whose ranks are in no step that Slurm would end
    run.until_training()
    cluster.run("kill", "-KILL", cluster.ranks("node2")[0])
    assert cluster.ended(job) == "FAILED", cluster.told()
    assert run.status["state"] == "failed" and "node2 was killed" in run.status["error"], run.status
    assert not cluster.ranks()


def test_a_sweep_is_an_array(cluster: Cluster, run: Run) -> None:
    job = run.submit("optim.lr=1e-3,2e-3", options=())
    assert cluster.ended(job) == "COMPLETED", cluster.told()
    ended = [json.loads((folder / "status.json").read_text()) for folder in run.folders]
    assert [(one["state"], one["job"]) for one in sorted(ended, key=lambda one: str(one["job"]))] == [
        ("completed", f"{job}_0"),
        ("completed", f"{job}_1"),
    ]
    assert len({(folder / "metrics.jsonl").read_text() for folder in run.folders}) == 2


def test_a_cancelled_job_saves_and_leaves_nothing(cluster: Cluster, run: Run) -> None:
    job = run.submit(*LONG, options=(*TWO_BY_TWO, "--via", "torchrun"))
    run.until_training()
    cluster.run("scancel", job)
    assert cluster.ended(job) == "CANCELLED"
    cluster.until(lambda: not cluster.ranks(), [job], timeout_s=10)
    assert (run.status["state"], run.status["reason"]) == ("stopped", "cancelled"), run.status
    assert list((run.folders[0] / "checkpoints").glob("step-*")), "nothing was saved"


def test_accelerate_starts_the_same_ranks(cluster: Cluster, run: Run, uninterrupted: Run) -> None:
    job = run.submit(options=(*TWO_BY_TWO, "--via", "accelerate"))
    assert cluster.ended(job) == "COMPLETED", cluster.told()
    assert run.status["state"] == "completed"
    assert run.losses == pytest.approx(uninterrupted.losses, rel=1e-6)


def test_a_node_that_crashes_sends_the_job_back_to_the_queue(cluster: Cluster, run: Run) -> None:
    job = run.submit(*LONG, "train.save_every=2")
    run.until_training()
    cluster.crash("node2")
    seen = cluster.until(lambda: run.status["state"] == "requeued" and run.status, [job])
    assert seen["reason"] == "node lost", seen
    cluster.switch_on("node2")
    cluster.until(lambda: run.status["state"] == "running" and cluster.job(job)["Restarts"] == "1", [job])
    assert run.status["starts"][1]["step"] >= 1
    cluster.run("scancel", job)
    assert cluster.ended(job) == "CANCELLED"
