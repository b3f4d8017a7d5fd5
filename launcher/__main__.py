"""python -m launcher +exp=lora_cpu [overrides] [--ranks 2] [--via deepspeed|torchrun|accelerate|python] [--dry]

Composes, types and plans first, without torch, so that a mistake costs a second and no rank; then becomes the launcher.
Words such as optim.lr=1e-4,2e-4 are a sweep: each combination is a run of its own, one after the other.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from launcher.sweep import free_port, outline, plan_trials, run_sweep, trials
from tunesmith.config import Refusal
from tunesmith.hardware import this_machine
from tunesmith.plan import describe
from tunesmith.run import leave, refuse

ROOT = Path(__file__).resolve().parents[1]


def command(via: str, ranks: int, words: Sequence[str], port: int = 0) -> list[str]:
    """The exact words that start `ranks` ranks of train.py on this machine by a launcher; port: where they meet (0: its own default)."""
    train = str(ROOT / "train.py")
    if via == "python":
        if ranks != 1:
            raise Refusal(f"--via python: starts one rank, --ranks is {ranks} — type --via torchrun")
        return [sys.executable, train, *words]
    option = {"deepspeed": "--master_port", "torchrun": "--master-port", "accelerate": "--main_process_port"}[via]
    meeting = [option, str(port)] if port else []
    start = {
        "deepspeed": ["deepspeed", "--num_accelerators", str(ranks), *meeting, train],
        "torchrun": ["torchrun", f"--nproc-per-node={ranks}", *meeting, train],
        # --multi_gpu starts several ranks on a CPU as well; --cpu would start one, whatever --num_processes says.
        "accelerate": [
            "accelerate", "launch", "--multi_gpu" if ranks > 1 else "--cpu", "--num_processes", str(ranks), "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", *meeting, train,
        ],
    }[via]  # fmt: skip
    return [*start, *words]


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, print the command, and unless --dry become it."""
    parser = argparse.ArgumentParser(prog="python -m launcher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=0, help="ranks on this machine (default: its cards, or 1)")
    parser.add_argument("--via", choices=["deepspeed", "torchrun", "accelerate", "python"], default="deepspeed")
    parser.add_argument("--dry", action="store_true", help="print the plan and the command, start nothing")
    asked, words = parser.parse_known_args(arguments)
    try:
        machine = this_machine()
        ranks = asked.ranks or max(1, len(machine.device_names))
        planned = plan_trials(trials(words), machine, ranks)
        print(describe(planned[0].plan))
        if len(planned) > 1:
            print(outline(planned), flush=True)
        commands = [command(asked.via, ranks, trial.words) for trial in planned]
    except Refusal as refusal:
        refuse(refusal)
    if asked.dry:
        print("\n".join(map(shlex.join, commands)))
        return
    os.chdir(ROOT)
    if len(planned) > 1:
        leave(run_sweep(planned, partial(command, asked.via, ranks)))
    full = command(asked.via, ranks, planned[0].words, free_port())
    print(shlex.join(full), flush=True)
    os.execvp(full[0], full)


if __name__ == "__main__":
    main()
