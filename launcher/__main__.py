"""python -m launcher +exp=lora_cpu [overrides] [--ranks 2] [--via deepspeed|torchrun|accelerate|python] [--dry]

Composes, types and plans first, without torch, so that a mistake costs a second and no rank; then becomes the launcher.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tunesmith.compose import compose
from tunesmith.config import Refusal
from tunesmith.hardware import this_machine
from tunesmith.plan import describe, make_plan
from tunesmith.run import refuse

ROOT = Path(__file__).resolve().parents[1]


def command(via: str, ranks: int, words: Sequence[str]) -> list[str]:
    """The exact words that start `ranks` ranks of train.py on this machine by a launcher."""
    train = str(ROOT / "train.py")
    if via == "python":
        if ranks != 1:
            raise Refusal(f"--via python: starts one rank, --ranks is {ranks} — type --via torchrun")
        return [sys.executable, train, *words]
    start = {
        "deepspeed": ["deepspeed", "--num_accelerators", str(ranks), train],
        "torchrun": ["torchrun", f"--nproc-per-node={ranks}", train],
        # --multi_gpu starts several ranks on a CPU as well; --cpu would start one, whatever --num_processes says.
        "accelerate": [
            "accelerate", "launch", "--multi_gpu" if ranks > 1 else "--cpu", "--num_processes", str(ranks), "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", train,
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
        print(describe(make_plan(compose(words), machine, ranks)))
        full = command(asked.via, ranks, words)
    except Refusal as refusal:
        refuse(refusal)
    print(shlex.join(full), flush=True)
    if not asked.dry:
        os.chdir(ROOT)
        os.execvp(full[0], full)


if __name__ == "__main__":
    main()
