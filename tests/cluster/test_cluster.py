"""The real launcher on a real Slurm of two nodes: from `--slurm` to the end of a run, through preemption, failure and cancelling."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import SHARED, Cluster
from tests.conftest import ROOT

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
            "eval.after=false", "hardware.gres=gpu:a10", "slurm.time=1:00:00", "slurm.signal_s=60",
        ]  # fmt: skip
        self.jobs: list[str] = []

    def submit(self, *words: str, options: tuple[str, ...] = TWO_BY_TWO) -> str:
        self.jobs.append(self.cluster.launch([*self.words, *words], *options))
        return self.jobs[-1]

    def submit_by_hand(self, *words: str) -> str:
        options = ["--partition=low", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:a10:2", f"--output={SHARED}/%j.out"]
        command = ["sbatch", "--parsable", *options, "slurm/train.sbatch", *self.words, *words]
        self.jobs.append(self.cluster.run(*command, folder=ROOT).stdout.strip())
        return self.jobs[-1]

    def launched_here(self, *options: str) -> list[str]:
        """The launcher's command on several machines, without submitting."""
        return [sys.executable, "-m", "launcher", *self.words, "nodes=2", *options]

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

    @property
    def printed(self) -> str:
        """What the last job has printed."""
        (file,) = self.cluster.outside(SHARED).rglob(f"{self.jobs[-1]}.out")
        return file.read_text()

    def until_training(self) -> None:
        """Wait for two more steps."""
        at = self.steps
        self.cluster.until(lambda: self.steps >= at + 2, self.jobs)

    def until_requeued(self, reason: str) -> None:
        seen = self.cluster.until(lambda: self.status["state"] == "requeued" and self.status, self.jobs)
        assert seen["reason"] == reason, seen

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop the ranks in mid-run, as a quick machine would be done before anybody has looked; afterwards they go on."""
        self.until_training()
        ranks = self.cluster.ranks()
        self.cluster.run("kill", "-STOP", *ranks)
        assert len(ranks) == 4 and self.steps < STEPS - 1
        yield
        # One may have gone on, saved and left by now: Slurm itself sends SIGCONT with SIGTERM.
        self.cluster.run("kill", "-CONT", *ranks, check=False)

    def preempt(self) -> None:
        """Let a job of a higher partition take the nodes from the last one in mid-run."""
        rival = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
        with self.held():
            other = self.cluster.run(*rival).stdout.strip()
            self.cluster.until(lambda: self.cluster.job(self.jobs[-1]).get("PreemptTime", "None") != "None", [*self.jobs, other])
        self.until_requeued("preempted")
        assert self.cluster.ended(other) == "COMPLETED"

    def has_gone_on(self, job: str, restarts: int) -> None:
        """The job was queued again so often, each time with more steps done."""
        assert self.cluster.job(job)["Restarts"] == str(restarts)
        status = self.status
        assert status["state"] == "completed" and [start["restart"] for start in status["starts"]] == list(range(restarts + 1))
        at = [start["step"] for start in status["starts"]]
        assert at == sorted({*at, 0}) and at[-1] < STEPS, at


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
    given = cluster.job(job)
    assert (given["TresPerNode"], given["JOB_GRES"]) == ("gres:gpu:a10:2", "gpu:a10:4"), "a card for each rank"
    again = uninterrupted.submit()
    assert cluster.ended(again) == "COMPLETED", cluster.told()
    assert uninterrupted.losses == losses, "a run that is complete is not run again"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["hardware.gres=gpu:h100", "train.steps=100000", "slurm.cpus=6"],
            [
                "slurm.time=1:00:00: the plan predicts",
                "hardware.gres=gpu:h100: 2 a node are needed, partition gpu has gpu:a10:4 — type hardware.gres=gpu:a10",
            ],
        ),
        (["slurm.partition=fast"], ["slurm.partition=fast: no such partition — type slurm.partition= one of gpu, high, low, short"]),
        (
            ["slurm.partition=short", "slurm.cpus=6", "slurm.memory=30G"],
            [
                "slurm.time=1:00:00: partition short allows 0:30:00 — type slurm.time=0:30:00",
                "nodes=2: partition short has 1 node with gpu:a10 — type nodes=1",
                "slurm.cpus=6: 12 cores a node are needed, partition short has 8 — type slurm.cpus=4",
                "slurm.memory=30G: partition short has 8000 MiB a node — type slurm.memory=8000M",
            ],
        ),
        (["hardware.card=t4", "model.path=nobody/has-it", "model.known_as=llama-3.1-8b"], ["GiB a rank, and the card is 14.6 GiB"]),
    ],
)
def test_what_would_fail_is_refused_on_the_login_node(cluster: Cluster, run: Run, words: list[str], said: list[str]) -> None:
    refused = cluster.run(sys.executable, "-m", "launcher", *run.words, *words, "--slurm", *TWO_BY_TWO, check=False)
    assert refused.returncode == 2, refused
    lines = refused.stderr.splitlines()
    assert all(any(text in line for line in lines) for text in said), refused.stderr


def test_a_job_by_hand_does_not_take_a_nodes_own_folder_for_a_shared_one(cluster: Cluster, run: Run) -> None:
    job = run.submit_by_hand("outputs=/tmp/outputs")
    assert cluster.ended(job) == "FAILED" and cluster.job(job)["ExitCode"] == "2:0"
    assert "outputs=/tmp/outputs: every node has a /tmp of its own" in run.printed


@pytest.fixture
def ranks_are_warned(cluster: Cluster) -> Iterator[None]:
    """On preemption Slurm signals the ranks of srun by SIGTERM, as it does by default, and not the batch script by SIGUSR1."""
    told = "\nSlurmctldParameters=preempt_send_user_signal", "\n# SlurmctldParameters=preempt_send_user_signal"
    cluster.configure(*told)
    yield
    cluster.configure(*reversed(told))


@pytest.mark.usefixtures("ranks_are_warned")
def test_a_preempted_job_goes_on_by_itself(cluster: Cluster, run: Run, uninterrupted: Run) -> None:
    job = run.submit("slurm.partition=low", options=(*TWO_BY_TWO, "--via", "deepspeed"))
    run.preempt()
    assert cluster.ended(job) == "COMPLETED", cluster.told()
    run.has_gone_on(job, restarts=1)
    assert run.losses == pytest.approx(uninterrupted.losses, rel=1e-6)


def test_a_job_by_hand_goes_on_after_its_time_limit_and_after_preemption(cluster: Cluster, run: Run, uninterrupted: Run) -> None:
    """With slurm/train.sbatch, whose batch script is warned by SIGUSR1, and in one run of W&B."""
    job = run.submit_by_hand("tracker=wandb", "tracker.mode=offline")
    with run.held():
        # Slurm looks every 30 s, and warns a job of whose time less than --signal's 120 s, and those 30, are left.
        minutes = int(cluster.job(job)["RunTime"].split(":")[1])
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")
        cluster.until(lambda: "SIGUSR1: all ranks are asked" in run.printed, [job])
    run.until_requeued("time limit")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # or it would be warned again, and again
    run.preempt()
    assert cluster.ended(job) == "COMPLETED", cluster.told()
    run.has_gone_on(job, restarts=2)
    assert run.losses == pytest.approx(uninterrupted.losses, rel=1e-6)
    pieces = [path.name.rpartition("-")[2] for path in (run.folders[0] / "wandb").glob("offline-run-*")]
    assert pieces == [json.loads((run.folders[0] / "wandb.json").read_text())["id"]] * 3


def test_a_job_that_makes_no_progress_in_its_requeues_stops(cluster: Cluster, run: Run) -> None:
    job = run.submit(*LONG, "slurm.most_idle_requeues=1", options=())
    cluster.until(lambda: run.status.get("starts"), [job])
    cluster.run("scontrol", "requeue", job)  # its ranks are not at work yet
    run.until_requeued("queued again by Slurm or by hand")
    assert cluster.ended(job) == "FAILED", cluster.told()
    assert (run.status["state"], run.status["reason"]) == ("failed", "no new checkpoint in 1 requeues (step 0 each time)")
    assert "this job stops — a smaller train.save_every, or more slurm.signal_s" in run.printed


def test_a_rank_that_is_killed_ends_the_job_as_failed(cluster: Cluster, run: Run) -> None:
    job = run.submit(*LONG, options=(*TWO_BY_TWO, "--via", "pdsh"))  # whose ranks are in no step that Slurm would end
    run.until_training()
    cluster.run("kill", "-KILL", cluster.ranks("node2")[0])
    assert cluster.ended(job) == "FAILED", cluster.told()
    assert run.status["state"] == "failed" and "node2 was killed" in run.status["error"], run.status
    assert not cluster.ranks()


def test_a_sweep_is_an_array(cluster: Cluster, run: Run) -> None:
    job = run.submit("optim.lr=1e-3,2e-3", options=("--throttle", "1"))
    assert cluster.job(job)["ArrayTaskThrottle"] == "1"
    assert cluster.ended(job) == "COMPLETED", cluster.told()
    first, second = sorted(cluster.tasks(job), key=lambda task: task["StartTime"])
    assert first["EndTime"] <= second["StartTime"], "they ran together"
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


def test_accelerate_starts_the_same_ranks_from_inside_an_allocation(cluster: Cluster, run: Run, uninterrupted: Run) -> None:
    cluster.run("salloc", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:a10:2", *run.launched_here("--via", "accelerate"))
    assert run.status["state"] == "completed"
    assert run.losses == pytest.approx(uninterrupted.losses, rel=1e-6)


def test_by_ssh_alone_no_rank_outlives_its_launcher_and_the_same_command_goes_on(cluster: Cluster, run: Run, uninterrupted: Run) -> None:
    """The machines of a hostfile, without Slurm; the launcher is killed, as for lack of memory."""
    cluster.outside(SHARED / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    command = run.launched_here("--hostfile", "hosts")
    launcher = cluster.start(*command)
    with run.held():
        cluster.run("kill", "-KILL", *cluster.launchers())
        launcher.wait()
    launcher.communicate(timeout=30)  # until whoever wrote there is gone
    assert not cluster.ranks()
    assert run.status["state"] == "stopped" and 0 < run.status["step"] < STEPS, run.status
    cluster.run(*command)
    assert run.status["state"] == "completed"
    assert run.losses == pytest.approx(uninterrupted.losses, rel=1e-6)


def test_a_node_that_crashes_sends_the_job_back_to_the_queue(cluster: Cluster, run: Run) -> None:
    job = run.submit(*LONG, "train.save_every=2")
    cluster.until(lambda: run.folders and list((run.folders[0] / "checkpoints").glob("step-*")), [job])
    cluster.crash("node2")
    run.until_requeued("node lost")
    cluster.switch_on("node2")
    cluster.until(lambda: run.status["state"] == "running" and cluster.job(job)["Restarts"] == "1", [job])
    assert run.status["starts"][1]["step"] >= 1
    cluster.run("scancel", job)
    assert cluster.ended(job) == "CANCELLED"
