"""python -m launcher +exp=lora_cpu [overrides] [--ranks 2] [--via deepspeed|torchrun|accelerate|srun|pdsh|python] [--dry]
python -m launcher +exp=full_a10x4 nodes=2 --hostfile hosts        on machines that are reached by ssh
python -m launcher +exp=lora_a10 [nodes=2] --slurm                 as a job of Slurm
python -m launcher +exp=lora_a10 optim.lr=1e-4,2e-4 [--slurm]      a sweep: each combination is a run, one after the other or as one array
python -m launcher +exp=lora_a10 'optim.lr=tag(log,interval(1e-5,1e-3))' --search 20      a search: trials by TPE, hopeless ones pruned

Composes, types and plans first, without torch, so that a mistake costs a second and no rank; then starts the ranks, or submits.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from launcher.job import meeting_of, start
from launcher.nodes import (
    WAYS,
    Meeting,
    by_ssh,
    deepspeed_env_text,
    for_pdsh,
    hostfile_text,
    node_machine,
    on_this_machine,
    ranks_a_node,
    read_hostfile,
)
from launcher.slurm import folder_problems, submit
from launcher.sweep import outline, plan_trials, run_sweep, trials
from launcher.watch import Ended, free_port, watch, watch_here
from tunesmith.compose import compose
from tunesmith.config import Config, Refusal
from tunesmith.hardware import this_machine
from tunesmith.metrics import opened_by_agent
from tunesmith.plan import describe, make_plan
from tunesmith.run import leave, refuse


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, print the command, and unless --dry start it and stay with it, or submit it (--slurm)."""
    parser = argparse.ArgumentParser(prog="python -m launcher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=0, help="ranks on each machine (default: its cards, or 1)")
    parser.add_argument(
        "--nodes", type=int, default=0, help="machines; nodes=N says the same (default: all of the hostfile or the job, or 1)"
    )
    parser.add_argument("--via", choices=WAYS, help="what starts the ranks (default: deepspeed, with --slurm srun)")
    parser.add_argument("--hostfile", type=Path, help="machines that are reached by ssh, a line each: NAME slots=RANKS")
    parser.add_argument("--slurm", action="store_true", help="submit as a job of Slurm")
    parser.add_argument("--throttle", type=int, default=0, help="with --slurm: most trials of a sweep at work together (default: all)")
    parser.add_argument("--search", type=int, metavar="TRIALS", help="try so many of the values and intervals in the words, by TPE")
    parser.add_argument("--parallel", type=int, help="with --search: trials side by side on this machine (default: 1)")
    parser.add_argument("--seed", type=int, help="with --search: of the proposals (default: 0)")
    parser.add_argument("--no-prune", action="store_true", help="with --search: let every trial go to its end")
    parser.add_argument("--dry", action="store_true", help="print the plan and the command or the batch script, start nothing")
    asked, words = parser.parse_known_args(arguments)
    try:
        words = take_nodes(asked, words)
        if asked.search is not None:
            leave(search(asked, words))
        if asked.parallel is not None or asked.seed is not None or asked.no_prune:
            raise Refusal("--parallel, --seed and --no-prune belong to --search — type --search 20 with them")
        if asked.slurm:
            if asked.hostfile:
                raise Refusal("--hostfile: Slurm chooses the nodes — leave --hostfile or --slurm out")
            said = submit(
                trials(words), throttle=asked.throttle, via=asked.via or "srun", nodes=asked.nodes or 1, ranks=asked.ranks, dry=asked.dry
            )
            print(said if asked.dry else f"submitted {said}", end="" if asked.dry else "\n")
            return
        several = trials(words)
        if len(several) > 1 and (asked.hostfile or asked.nodes > 1 or asked.via == "srun"):
            raise Refusal(f"{len(several)} trials: a sweep runs on this machine or by --slurm — type --slurm, or one trial's words")
        if len(several) > 1 and opened_by_agent():
            raise Refusal(f"{len(several)} trials for the one run that W&B's agent has opened — one value a parameter, lists in brackets")
        if asked.hostfile:
            sys.exit(on_hosts(asked, words))
        if asked.nodes > 1 or asked.via == "srun":
            sys.exit(inside_job(asked, words))
        machine = this_machine()
        ranks = asked.ranks or max(1, len(machine.device_names))
        planned = plan_trials(several, machine, ranks)
        print(describe(planned[0].plan))
        if len(planned) > 1:
            print(outline(planned), flush=True)
        via = asked.via or "deepspeed"
        commands = [on_this_machine(via, ranks, trial.words) for trial in planned]
    except Refusal as refusal:
        refuse(refusal)
    if asked.dry:
        print("\n".join(map(shlex.join, commands)))
        return
    if len(planned) > 1:
        leave(run_sweep(planned, partial(on_this_machine, via, ranks)))
    # Several agents on one machine begin at the same time: each looks from a place of its own, below those that the system gives away.
    first = 29500 + (os.getpid() % 3000 if opened_by_agent() else 0)
    full = on_this_machine(via, ranks, planned[0].words, free_port(first))
    print(shlex.join(full), flush=True)
    leave(code_for_agent(watch_here(full)))


def code_for_agent(ended: Ended) -> int:
    """The exit code of ranks that have ended, but under a W&B agent what was stopped ends this process by the signal that asked for it.

    The agent takes any code above 0 for a failure: after 3 in its first minute, or 5 and no success, it starts no more trials.
    """
    if ended.code and ended.signal and opened_by_agent():
        signal.signal(ended.signal, signal.SIG_DFL)
        os.kill(os.getpid(), ended.signal)
    return ended.code


def take_nodes(asked: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """Put nodes=N into `asked`, and give the other words; raises Refusal for a number that is none."""
    for word in words:
        if word.startswith("nodes="):
            if not word[6:].isdigit():
                raise Refusal(f"{word}: not a number of machines — type nodes=2")
            asked.nodes = int(word[6:])
    if asked.nodes < 0 or asked.ranks < 0:
        raise Refusal("--nodes and --ranks are at least 1")
    return [word for word in words if not word.startswith("nodes=")]


def search(asked: argparse.Namespace, words: Sequence[str]) -> int:
    """Try values of the words' intervals on this machine, or only say how; raises Refusal if that cannot be."""
    try:
        from launcher.search import Asked, check, run_search, share_of
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise Refusal("--search needs the package optuna — pip install 'tunesmith[sweep]'") from None
    parallel = 1 if asked.parallel is None else asked.parallel
    if asked.search < 1 or parallel < 1:
        raise Refusal("--search and --parallel are at least 1")
    if asked.slurm:
        raise Refusal(
            "--slurm --search: a search decides after each trial, on one machine — submit the whole of it, the same command goes on in the "
            "next job: sbatch --wrap 'python -m launcher ... --search N', or a list of values without --search"
        )
    if asked.hostfile or asked.nodes > 1 or asked.via in ("srun", "pdsh"):
        raise Refusal("--search: trials run on this machine — leave --hostfile, nodes= and --via srun or pdsh out")
    machine = this_machine()
    if parallel > 1 and asked.via == "deepspeed" and machine.device_names:
        raise Refusal("--parallel: deepspeed takes all cards that it sees — type --via torchrun")
    share = share_of(machine, parallel)
    if parallel > 1 and not share.device_names and not any(word.startswith("hardware.threads=") for word in words):
        words = [*words, f"hardware.threads={max(1, share.cores // (asked.ranks or 1))}"]
    ranks = asked.ranks or max(1, len(share.device_names))
    found = check(words, Asked(asked.search, parallel, asked.seed or 0, not asked.no_prune), share, ranks)
    print(f"{describe(found.largest.plan)}\n{found.describe()}", flush=True)
    command = partial(on_this_machine, asked.via or ("torchrun" if parallel > 1 else "deepspeed"), ranks)
    if asked.dry:
        print(shlex.join(command(found.largest.words)))
        return 0
    return run_search(found, command)


def on_hosts(asked: argparse.Namespace, words: Sequence[str]) -> int:
    """Start ranks on the machines of a hostfile, or only say how."""
    config, slots = compose(words), read_hostfile(asked.hostfile)
    hosts = tuple(slots)[: asked.nodes or None]
    if asked.nodes > len(slots):
        raise Refusal(f"nodes={asked.nodes}: {asked.hostfile} names {len(slots)} — type nodes={len(slots)}")
    meeting = Meeting(hosts, asked.ranks or next(iter(slots.values())), free_port(29500))
    plan_several(config, meeting)
    via = asked.via or "deepspeed"
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        hostfile, exports = Path(folder, "hostfile"), Path(folder, "deepspeed_env")

        def prepare(env: Mapping[str, str]) -> tuple[list[list[str]], Mapping[str, str]]:
            env = {**env, "PATH": f"{Path(sys.executable).parent}:{env.get('PATH', '')}"}
            hostfile.write_text(hostfile_text(meeting))
            exports.write_text(deepspeed_env_text(env))
            commands = by_ssh(via, meeting, words, env, hostfile=str(hostfile))
            print("\n".join(shlex.join(command) for command in commands), flush=True)
            return commands, for_pdsh(env, exports) if via in ("deepspeed", "pdsh") else env

        if asked.dry:
            prepare(os.environ)
            return 0
        return code_for_agent(watch(prepare, socket.gethostname()))


def inside_job(asked: argparse.Namespace, words: Sequence[str]) -> int:
    """Start ranks on the nodes of the Slurm job that this shell is in (salloc), or only say how."""
    if "SLURM_JOB_ID" not in os.environ:
        raise Refusal(
            f"nodes={asked.nodes or 1}: on which machines? — type --hostfile FILE (reached by ssh), --slurm to submit, or salloc first"
        )
    config, job = compose(words), meeting_of(os.environ)
    hosts = job.hosts[: asked.nodes or None]
    if asked.nodes > len(job.hosts):
        raise Refusal(f"nodes={asked.nodes}: this job has {len(job.hosts)} — salloc --nodes={asked.nodes} ...")
    meeting = Meeting(hosts, asked.ranks or job.ranks, job.port)
    plan_several(config, meeting)
    return start(asked.via or "deepspeed", meeting, words, config, dry=asked.dry).code


def plan_several(config: Config, meeting: Meeting) -> None:
    """Print the plan of a run on several machines like the config means; raises Refusal where it cannot go as asked."""
    if found := list(folder_problems(config)):
        raise Refusal("\n".join(found))
    if config.hardware.count:
        ranks_a_node(config, len(meeting.hosts))
    machine = node_machine(config, this_machine(), meeting.ranks)
    print(describe(make_plan(config, machine, meeting.size, local_size=meeting.ranks)))


if __name__ == "__main__":
    main()
