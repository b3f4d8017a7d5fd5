"""python -m launcher.job --via srun (-- WORDS | --trials FILE): the inside of a Slurm job, what its batch script becomes.

Starts the ranks, passes the scheduler's signal on to them, and says in the run's status.json how the job ended and why. A run that was
preempted, reached the time limit or lost a node goes back to the queue, and the same job goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from signal import SIGTERM, SIGUSR1

from launcher.nodes import WAYS, Meeting, deepspeed_env_text, for_pdsh, hostfile_text, in_slurm
from launcher.slurm import folder_problems, read_trial
from launcher.watch import Ended, free_port, watch
from tunesmith.compose import compose
from tunesmith.config import Config, Refusal
from tunesmith.plan import run_id
from tunesmith.run import CODES, FAILED, REFUSED, STOPPED, RunFolder, refuse
from tunesmith.world import World

WAIT_FOR_END_S = 300.0
QUEUED_AGAIN = "queued again by Slurm or by hand"
MEMORY = re.compile(r"oom[-_]kill|out of memory|exceeded (?:job |step )?memory limit", re.I)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the job's ranks and leave with the code of the state that the run ends in."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--via", choices=[way for way in WAYS if way != "python"], default="srun")
    parser.add_argument("--trials", type=Path, help="take the words from line SLURM_ARRAY_TASK_ID + 1 of this file")
    parser.add_argument("words", nargs="*", help="as for train.py")
    asked = parser.parse_args(arguments)
    try:
        words = read_trial(asked.trials, int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))) if asked.trials else asked.words
        config = compose(words)
        meeting = meeting_of(os.environ)
        if len(meeting.hosts) > 1 and (found := list(folder_problems(config))):  # a job by hand was not looked at before
            raise Refusal("\n".join(found))
        run = RunFolder(Path(config.outputs) / config.name / run_id(config), World())
        if run.status().get("state") != "completed":
            begin(run, config, os.environ)
        code = conclude(run, start(asked.via, meeting, words, config))
    except Refusal as refusal:
        refuse(refusal)
    sys.exit(code)


def meeting_of(env: Mapping[str, str]) -> Meeting:
    """Nodes and ranks of the job that this process is the batch script or the interactive shell of; raises Refusal outside of one."""
    if "SLURM_JOB_ID" not in env:
        raise Refusal(
            "SLURM_JOB_ID is not set: this is no job of Slurm — type sbatch slurm/train.sbatch ..., or python -m launcher ... --slurm"
        )
    listed = subprocess.run(["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True)
    hosts = tuple(listed.stdout.split())
    tasks = re.match(r"\d+", env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1"))
    # Of this job alone, and not that of its own earlier start if a rank of that lives on.
    wanted = 20000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env.get("SLURM_RESTART_COUNT", "0"))) % 20000
    return Meeting(hosts, int(tasks[0]) if tasks else 1, free_port(wanted))


def start(via: str, meeting: Meeting, words: Sequence[str], config: Config, *, dry: bool = False) -> Ended:
    """Start the ranks of the job and wait for their end; with dry only print the command."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:  # read on this node only

        def prepare(env: Mapping[str, str]) -> tuple[list[list[str]], Mapping[str, str]]:
            hostfile, exports = Path(folder, "hostfile"), Path(folder, "deepspeed_env")
            hostfile.write_text(hostfile_text(meeting))
            exports.write_text(deepspeed_env_text(env))
            cpus = int(env.get("SLURM_CPUS_ON_NODE", "0")) if "SLURM_CPUS_PER_TASK" in env else 0
            command = in_slurm(via, meeting, words, hostfile=str(hostfile), container=config.slurm.container, cpus=cpus)
            print(shlex.join(command), flush=True)
            # deepspeed's srun gives the ranks a number, but neither meeting place nor port.
            env = {**env, "MASTER_ADDR": meeting.hosts[0], "MASTER_PORT": str(meeting.port)}
            return [command], for_pdsh(env, exports) if via == "pdsh" else env

        if dry:
            prepare(os.environ)
            return Ended(0, 0, "", "")
        # The shell of an salloc may be on the login node, which is no node of the job.
        return watch(prepare, os.environ.get("SLURMD_NODENAME") or socket.gethostname())


def begin(run: RunFolder, config: Config, env: Mapping[str, str]) -> None:
    """Note a start; raises Refusal, and marks the run as failed, where the ones before it led nowhere."""
    starts = list(run.status().get("starts", []))
    now = {"job": job_name(env), "restart": int(env.get("SLURM_RESTART_COUNT", "0")), "step": newest_step(run), "time": round(time.time())}
    if now["restart"] and run.status().get("state") == "running":
        starts[-1:] = [{**starts[-1], "ended": "node lost, or killed without a word"}] if starts else []
    run.path.mkdir(parents=True, exist_ok=True)
    idle = idle_requeues(starts, now)
    if idle >= config.slurm.most_idle_requeues:
        reason = f"no new checkpoint in {idle} requeues (step {now['step']} each time)"
        run.set_status("failed", reason=reason, starts=[*starts, now])
        print(f"tunesmith: {run.path}: {reason}: this job stops — a smaller train.save_every, or more slurm.signal_s", file=sys.stderr)
        sys.exit(FAILED)
    run.set_status("pending", job=now["job"], reason=None, error=None, starts=[*starts, now])


def idle_requeues(starts: Sequence[Mapping[str, object]], now: Mapping[str, object]) -> int:
    """How many requeues of this job in a row, this one included, found the same step."""
    count = 0
    for one in reversed(starts):
        if (one["job"], one["step"]) != (now["job"], now["step"]):
            break
        count += 1
    return count


def newest_step(run: RunFolder) -> int:
    """Updates in the newest complete checkpoint; 0: there is none."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in run.checkpoints.glob("step-*"))
    return max((int(match[1]) for match in found if match), default=0)


def job_name(env: Mapping[str, str]) -> str:
    """The job's id; of a task of an array ID_INDEX."""
    array = env.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]


def conclude(run: RunFolder, ended: Ended) -> int:
    """Write how the job ended and why, queue it again if that helps, and give the exit code."""
    status = run.status()
    state, job = str(status.get("state", "")), job_facts(os.environ["SLURM_JOB_ID"])
    if state == "completed":
        return CODES[state]
    if ended.code == REFUSED and state == "pending":
        run.set_status("failed", reason="refused", error=ended.tail.rpartition("tunesmith: ")[2][:500])
        return REFUSED
    why = reason_of(job, ended, time.time(), int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    if why == QUEUED_AGAIN:
        run.set_status("requeued", reason=why, error=None, rank=None)
        return STOPPED
    if state in ("oom", "nan") or (state == "failed" and why != "node lost"):
        if state == "failed" and ended.lost.endswith("was killed"):  # it could not say so; the others tell of closed connections
            run.set_status(state, error=ended.lost, rank=None, node=None)
        return CODES[state]
    left_early = ended.code == STOPPED or bool(ended.signal)  # asked before there was anything to save
    if why in ("preempted", "time limit", "node lost") and (state in ("preempted", "stopped") or left_early or why == "node lost"):
        run.set_status("requeued", reason=why, error=None, rank=None)
        return queue_again(why)
    if state in ("preempted", "stopped") or (why == "cancelled" and ended.signal):
        run.set_status("stopped", reason=why)
        return STOPPED
    first = run.path / "first_error.txt"
    told = first.read_text().splitlines()[0] if first.is_file() else ended.lost
    if MEMORY.search(ended.tail):
        run.set_status("oom", reason="the node's memory was full", error=told or None)
        return CODES["oom"]
    run.set_status("failed", reason=why, error=told or f"the ranks' command ended with {ended.code}")
    return FAILED


def reason_of(job: Mapping[str, str], ended: Ended, now_s: float, restart: int = 0) -> str:
    """Why the ranks ended, from what Slurm and the launcher know: preempted, cancelled, time limit, node lost, signal N, or failed.

    restart: how often the job had been queued again when this start of it began; QUEUED_AGAIN if it has been once more since.
    """
    state = job.get("JobState", "")
    if job.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"):
        return "preempted"
    if state in ("CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"):
        return {"CANCELLED": "cancelled", "TIMEOUT": "time limit", "NODE_FAIL": "node lost", "PREEMPTED": "preempted"}.get(state, "memory")
    if ended.signal == SIGUSR1:  # nobody else sends it before the job is over
        return "time limit" if near_end(job, now_s) else "preempted"
    if "does not answer any more" in ended.lost or "Node failure" in ended.tail or "NODE FAIL" in ended.tail:
        return "node lost"
    if int(job.get("Restarts", "0")) > restart:  # `scontrol requeue`, or a node that was taken out of service
        return QUEUED_AGAIN
    return f"signal {ended.signal}" if ended.signal and ended.signal != SIGTERM else "cancelled" if ended.signal else "failed"


def near_end(job: Mapping[str, str], now_s: float) -> bool:
    """Whether the job is in the last tenth of its time, or the last five minutes: Slurm may signal a minute early."""
    try:
        begun, end = (datetime.fromisoformat(job[key]).timestamp() for key in ("StartTime", "EndTime"))
    except (KeyError, ValueError):
        return False
    return end - now_s < max(300.0, (end - begun) / 10)


def queue_again(why: str) -> int:
    """Send this job back to the queue and wait for Slurm to end it: a job that leaves by itself counts as over."""
    print(f"tunesmith: {why}: this job goes back to the queue, and on from its checkpoint", file=sys.stderr, flush=True)
    done = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True)
    if done.returncode and "job is pending" not in done.stderr.lower():
        print(f"tunesmith: scontrol requeue: {done.stderr.strip()}", file=sys.stderr)
        return STOPPED
    time.sleep(WAIT_FOR_END_S)
    return STOPPED


def job_facts(job: str) -> dict[str, str]:
    """What Slurm knows of a job; empty if it does not answer."""
    try:
        done = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


if __name__ == "__main__":
    main()
