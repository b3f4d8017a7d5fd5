"""What is submitted to Slurm, word by word; what a cluster would refuse; how a job's end is told. Without a cluster: tests/cluster has one."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGTERM, SIGUSR1

import pytest

from launcher import slurm
from launcher.job import QUEUED_AGAIN, conclude, idle_requeues, reason_of
from launcher.nodes import ROOT, Meeting, deepspeed_env_text, for_pdsh, in_slurm, read_hostfile
from launcher.slurm import Place, cluster_problems, folder_problems, hours_of, limit_problems, read_trial, sbatch_text, trials_text
from launcher.watch import Ended
from tunesmith.compose import compose
from tunesmith.config import Refusal
from tunesmith.hardware import FAKE_MACHINE
from tunesmith.lifeline import VARIABLE, Lifeline
from tunesmith.plan import Plan
from tunesmith.run import FAILED, RunFolder
from tunesmith.world import World

GOLDEN = Path(__file__).parent / "golden"
PLACE = Place(Path("/shared/me/outputs/x/job/0a1b2c3d"), Path("/shared/me"), Path("/shared/me/.venv/bin/python"), "5f0e")
ACCEPT = "TUNESMITH_ACCEPT=1 python -m pytest tests/test_slurm.py tests/test_scaling.py -k golden"


@pytest.fixture(autouse=True)
def login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAKE_MACHINE, json.dumps({"kind": "cpu", "cores": 8, "ram_gib": 64}))


def planned(*words: str, nodes: int = 1, ranks: int = 0) -> Plan:
    return slurm.plan_for(words, nodes, ranks)


SCRIPTS = {
    "one_card": (["+exp=lora_a10"], {}),
    "two_nodes": (["+exp=full_a10x4"], {"nodes": 2, "via": "torchrun"}),
    "all_settings": (
        [
            "+exp=qlora_t4", "slurm.partition=gpu", "slurm.account=lab", "slurm.time=8:00:00", "slurm.cpus=4", "slurm.memory=30G",
            "slurm.options=['--exclusive','--qos=long']", "slurm.setup=[module load cuda/12.4]", "data.system='It is ours, \"really\" $HOME'",
            "slurm.container='apptainer exec --nv /images/torch.sif'", "slurm.signal_s=300",
        ],
        {},
    ),
}  # fmt: skip


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("TUNESMITH_ACCEPT"):
        path.write_text(text)
    wanted = path.read_text() if path.is_file() else ""
    changes = "\n".join(difflib.unified_diff(wanted.splitlines(), text.splitlines(), "accepted", "now", lineterm="", n=0))
    assert text == wanted, f"\n{changes}\nto accept: {ACCEPT}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_golden_script(name: str) -> None:
    words, more = SCRIPTS[name]
    plan = planned(*words, nodes=more.get("nodes", 1))
    golden(f"slurm_{name}.sbatch", sbatch_text(plan, PLACE, [words], **more))


def test_golden_array() -> None:
    trials = [["+exp=lora_a10", f"optim.lr={lr}", "data.system='two words'"] for lr in ("1e-4", "2e-4", "5e-4")]
    golden("slurm_array.sbatch", sbatch_text(planned(*trials[0]), PLACE, trials, throttle=2))


def test_words_come_back_from_the_file_of_trials(tmp_path: Path) -> None:
    trials = [["+exp=lora_cpu", 'data.system=it\'s "x" $HOME `a` \\ *'], ["+exp=lora_cpu", "optim.lr=1e-3"]]
    (tmp_path / "trials.txt").write_text(trials_text(trials))
    assert [read_trial(tmp_path / "trials.txt", index) for index in (0, 1)] == trials
    with pytest.raises(Refusal, match="has 2 trials, SLURM_ARRAY_TASK_ID is 2"):
        read_trial(tmp_path / "trials.txt", 2)


# --- what would fail -----------------------------------------------------------------------------------------------

SINFO = (
    "gpu*|2|gpu:a10:4(S:0-1)|2-00:00:00|up|64|257000\nold|1|gpu:t4:1|1:00:00|up|8|32000\ncpu|8|(null)|infinite|up|32|128000\n"
    "broken|9|gpu:h100:8|infinite|down|64|257000\n"
)


@pytest.mark.parametrize(
    ("words", "nodes", "said"),
    [
        (["+exp=lora_a10"], 1, None),
        (["+exp=full_a10x4"], 2, None),
        (["+exp=lora_a10"], 4, "nodes=4: partition gpu has 2 nodes with gpu:a10 — type nodes=2"),
        (["+exp=qlora_t4"], 1, "hardware.gres=gpu:t4: 1 a node are needed, partition gpu has gpu:a10:4 — type hardware.gres=gpu:a10"),
        (
            ["+exp=lora_a10", "slurm.partition=broken"],
            1,
            "slurm.partition=broken: no such partition — type slurm.partition= one of cpu, gpu, old",
        ),
        (["+exp=qlora_t4", "slurm.partition=old"], 1, "slurm.time=24:00:00: partition old allows 1:00:00 — type slurm.time=1:00:00"),
        (["+exp=lora_cpu", "slurm.partition=cpu"], 8, None),
        (["+exp=full_a10x4", "slurm.cpus=16", "slurm.memory=250G"], 1, None),
        (["+exp=full_a10x4", "slurm.cpus=20"], 1, "slurm.cpus=20: 80 cores a node are needed, partition gpu has 64 — type slurm.cpus=16"),
        (["+exp=lora_a10", "slurm.memory=1T"], 1, "slurm.memory=1T: partition gpu has 257000 MiB a node — type slurm.memory=257000M"),
    ],
)
def test_what_a_cluster_would_never_give_is_refused(words: list[str], nodes: int, said: str | None) -> None:
    plan = planned(*words, nodes=nodes, ranks=0 if nodes < 3 else 1)
    assert list(cluster_problems(plan, nodes, SINFO)) == ([said] if said else [])
    assert not list(cluster_problems(plan, nodes, "")), "where no Slurm is, nothing is judged"


def test_too_short_a_time_is_refused_unless_the_run_goes_in_pieces() -> None:
    words = ["+exp=lora_a10", "train.steps=100000", "slurm.time=1:00:00"]
    (said,) = limit_problems(planned(*words), 1)
    assert said.startswith("slurm.time=1:00:00: the plan predicts ") and "slurm.in_pieces=true" in said
    assert not list(limit_problems(planned(*words, "slurm.in_pieces=true"), 1))
    assert next(limit_problems(planned("+exp=lora_a10", "slurm.time=soon"), 1)).startswith("slurm.time=soon: not a time limit")


@pytest.mark.parametrize(("text", "hours"), [("90", 1.5), ("1:30:00", 1.5), ("1-12", 36), ("1-0:30", 24.5), ("30:00", 0.5), ("x", 0)])
def test_time_limits_as_slurm_writes_them(text: str, hours: float) -> None:
    assert hours_of(text) == pytest.approx(hours)


def test_a_folder_that_each_node_has_its_own_of_is_refused() -> None:
    config = compose(["+exp=lora_cpu", "outputs=/tmp/x", "data.folder=/shared/d", "data.cache=/dev/shm/c"])
    assert [line.partition("=")[0] for line in folder_problems(config)] == ["outputs", "data.cache"]


# --- several nodes -------------------------------------------------------------------------------------------------

TWO = Meeting(("node1", "node2"), 2, 29500)


@pytest.mark.parametrize("via", ["srun", "torchrun", "accelerate", "deepspeed"])
def test_every_way_by_srun_ends_all_ranks_with_the_first_that_fails(via: str) -> None:
    command = in_slurm(via, TWO, ["+exp=lora_cpu"], hostfile="H")
    assert any("--kill-on-bad-exit=1" in word for word in command)
    assert command[-1] == "+exp=lora_cpu"


def test_golden_commands_in_a_container() -> None:
    """The words stand before each rank's program, or before each node's agent, which are the image's own then."""
    inside = "apptainer exec --nv '/images/my torch.sif'"
    commands = [
        in_slurm(via, TWO, ["+exp=lora_a10", "data.system=two words"], container=inside) for via in ("srun", "torchrun", "accelerate")
    ]
    golden("slurm_container.txt", "".join(f"{shlex.join(command)}\n" for command in commands).replace(str(ROOT), "/code"))
    for via in ("deepspeed", "pdsh"):
        with pytest.raises(Refusal, match=f"with --via {via} deepspeed starts the ranks itself — type --via srun"):
            slurm.submit([["+exp=lora_a10", f"slurm.container={inside!r}"]], via=via, dry=True)


def test_secrets_are_not_sent_over_ssh(tmp_path: Path) -> None:
    env = {
        "PATH": "/bin", "HOME": "/h", "HF_HOME": "/hf", "HF_TOKEN": "s1", "WANDB_API_KEY": "s2", "MLFLOW_TRACKING_PASSWORD": "s3",
        "AWS_SECRET_ACCESS_KEY": "s4", "HTTPS_PROXY": "http://me:s5@proxy", "PYTHONPATH": "/p", "OTHER": "s6",
    }  # fmt: skip
    assert deepspeed_env_text(env) == "HF_HOME=/hf\nPATH=/bin\nPYTHONPATH=/p\n"
    assert set(for_pdsh(env, tmp_path)) == {"HOME", "HF_HOME", "PATH", "PYTHONPATH", "DS_ENV_FILE"}


def test_a_hostfile_with_a_mistake_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode1 slots=2\n\nnode2 slots=2\n")
    assert read_hostfile(path) == {"node1": 2, "node2": 2}
    for text, said in (("node1\n", "hosts:1: 'node1'"), ("", "names no node"), ("a slots=1\nb slots=2\n", "as many slots")):
        path.write_text(text)
        with pytest.raises(Refusal, match=said):
            read_hostfile(path)


def test_a_rank_that_has_told_its_end_does_not_take_the_answer_for_the_launchers_death() -> None:
    failed: list[str] = []
    line = Lifeline("127.0.0.1", failed.append)
    rank = "import os, time; from tunesmith import lifeline; lifeline.hold(); lifeline.say({0}); time.sleep(0.5); os._exit({0})"
    for code in (0, 4):
        assert subprocess.run([sys.executable, "-c", rank.format(code)], env=os.environ | {VARIABLE: line.place}).returncode == code
    assert len(failed) == 1 and failed[0].endswith("ended with 4")


# --- how a job's end is told ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "ended", "why"),
    [
        ({"PreemptTime": "2026-01-01T00:00:00"}, Ended(75, SIGUSR1, "", ""), "preempted"),
        ({"PreemptTime": "None", "JobState": "CANCELLED"}, Ended(143, SIGTERM, "", ""), "cancelled"),
        ({"JobState": "TIMEOUT"}, Ended(143, SIGTERM, "", ""), "time limit"),
        ({"JobState": "RUNNING"}, Ended(1, 0, "node2 does not answer any more", ""), "node lost"),
        ({"JobState": "RUNNING"}, Ended(1, 0, "", ""), "failed"),
        ({"JobState": "COMPLETING", "Restarts": "1"}, Ended(143, SIGTERM, "", ""), QUEUED_AGAIN),
        ({"JobState": "COMPLETING", "Restarts": "0"}, Ended(143, SIGTERM, "", ""), "cancelled"),
    ],
)
def test_ends_are_told_apart(job: dict[str, str], ended: Ended, why: str) -> None:
    assert reason_of(job, ended, time.time()) == why


def test_a_rank_that_was_killed_is_named_and_not_what_the_others_saw_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr("launcher.job.job_facts", lambda job: {})
    run = RunFolder(tmp_path, World())
    for lost, said in (("a rank on node2 was killed", "a rank on node2 was killed"), ("a rank on node1 ended with 1", "ValueError: x")):
        run.set_status("failed", error="ValueError: x", rank=0)
        assert conclude(run, Ended(1, 0, lost, "")) == FAILED
        assert (run.status()["state"], run.status()["error"]) == ("failed", said)


def test_a_signal_near_the_end_of_the_time_is_the_time_limit() -> None:
    job = {"JobState": "RUNNING", "StartTime": "2026-01-01T00:00:00", "EndTime": "2026-01-02T00:00:00"}
    end = time.mktime((2026, 1, 2, 0, 0, 0, 0, 0, -1))
    assert reason_of(job, Ended(75, SIGUSR1, "", ""), end - 100) == "time limit"
    assert reason_of(job, Ended(75, SIGUSR1, "", ""), end - 40000) == "preempted"


def test_requeues_without_a_new_checkpoint_are_counted_by_job() -> None:
    starts = [{"job": "1", "step": 0}, {"job": "2", "step": 5}, {"job": "2", "step": 5}]
    assert idle_requeues(starts, {"job": "2", "step": 5}) == 2
    assert idle_requeues(starts, {"job": "2", "step": 9}) == 0
    assert idle_requeues(starts, {"job": "3", "step": 5}) == 0


def test_a_jobs_copy_has_all_that_the_program_reads() -> None:
    """Whatever git has in the program's folders, but for what only people read: a suffix that is not copied is missed on the node."""
    listed = subprocess.run(["git", "ls-files", "src/tunesmith", "launcher", "conf"], cwd=ROOT, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.split() if (ROOT / name).exists()}
    assert "src/tunesmith/model/native.cpp" in tracked
    assert tracked <= {str(path.relative_to(ROOT)) for path in slurm._code()}
