"""Who am I: rank, size, node and job, read once from the variables that each launcher sets."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.config import Refusal


@dataclass(frozen=True)
class World:
    """This process's place among all ranks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: str = "localhost"
    job: str = ""
    """Scheduler's job id, empty outside a scheduler."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def this_world(environment: Mapping[str, str] | None = None) -> World:
    """Read the world from RANK/WORLD_SIZE/... (deepspeed, torchrun, accelerate), else from a Slurm step, else one rank.

    RANK wins over SLURM_PROCID: under `srun torchrun` every rank inherits its agent's SLURM_PROCID.
    Raises Refusal when the variables contradict each other or only one of RANK and WORLD_SIZE is set.
    """
    env = os.environ if environment is None else environment
    node = env.get("SLURMD_NODENAME") or socket.gethostname()
    job = env.get("SLURM_JOB_ID", "")
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in ("RANK", "WORLD_SIZE") if name not in env]
        if missing:
            raise Refusal(f"{missing[0]} is not set although its sister is: set both, or neither for a single process")
        rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        # deepspeed calls it LOCAL_SIZE, torchrun and accelerate LOCAL_WORLD_SIZE; one node when nobody says.
        local_size = _number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", size))
        local_rank = _number(env, "LOCAL_RANK", rank % max(local_size, 1))
    elif "SLURM_STEP_ID" in env and _number(env, "SLURM_NTASKS", 1) > 1:
        rank, size = _number(env, "SLURM_PROCID"), _number(env, "SLURM_NTASKS")
        local_rank = _number(env, "SLURM_LOCALID")
        local_size = _tasks_here(env, size)
    else:
        return World(node=node, job=job)
    if not 0 <= rank < size:
        raise Refusal(f"RANK={rank} with WORLD_SIZE={size}: the rank must be at least 0 and below the size")
    if not 0 <= local_rank < local_size <= size:
        raise Refusal(
            f"LOCAL_RANK={local_rank} with LOCAL_WORLD_SIZE={local_size} and WORLD_SIZE={size}: "
            "the local rank must be at least 0 and below the local size, which is at most the size"
        )
    return World(rank, size, local_rank, local_size, node, job)


def rendezvous(world: World, environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Address and port where the ranks meet; a free local port for a single process.

    Raises Refusal when several ranks have no MASTER_ADDR/MASTER_PORT to agree on.
    """
    env = os.environ if environment is None else environment
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return env["MASTER_ADDR"], _number(env, "MASTER_PORT")
    if world.size == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", probe.getsockname()[1]
    raise Refusal(
        f"WORLD_SIZE={world.size} but MASTER_ADDR and MASTER_PORT are not set: export both (the first node's name and a "
        "free port), or start with deepspeed, torchrun or accelerate, which do"
    )


def _tasks_here(env: Mapping[str, str], size: int) -> int:
    """Tasks of a Slurm step on this node: its entry in SLURM_STEP_TASKS_PER_NODE=2(x3),1, else evenly spread ones."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]
    node = _number(env, "SLURM_NODEID", 0)
    if node < len(counts):
        return counts[node]
    return _number(env, "SLURM_NTASKS_PER_NODE", -(-size // max(_number(env, "SLURM_NNODES", 1), 1)))


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise Refusal(f"{name} is not set")
        return default
    try:
        return int(text)
    except ValueError:
        raise Refusal(f"{name}={text!r} is not a whole number") from None
