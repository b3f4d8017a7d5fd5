"""The exact words that start a run's ranks, on this machine or on several, by each launcher."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.config import Config, Refusal
from tunesmith.hardware import CARDS, Machine

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("deepspeed", "pdsh", "torchrun", "accelerate", "srun", "python")
"""deepspeed starts ranks by srun inside a Slurm job and by pdsh elsewhere; pdsh by ssh in either case."""

# What a rank that is started by ssh gets of this environment. It stands in command lines that everybody on a node can read.
FORWARDED = (
    "PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_HOME", "XDG_CACHE_HOME", "OMP_NUM_THREADS", "SLURM_JOB_ID", "WANDB_MODE",
    "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_SWEEP_ID", "WANDB_RUN_ID",
    "PYTHONPATH", "PYTHONUNBUFFERED", "DS_ACCELERATOR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip
FORWARDED_FAMILIES = ("TUNESMITH_", "HF_", "NCCL_", "GLOO_", "TORCH_", "UCX_")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.I)
NEEDED_BY_SSH = ("HOME", "USER", "LOGNAME", "LANG", "TERM", "SSH_AUTH_SOCK")
"""What ssh itself needs on this side."""


@dataclass(frozen=True)
class Meeting:
    """Nodes, ranks on each, and where they meet: on the first node."""

    hosts: tuple[str, ...]
    ranks: int
    port: int

    @property
    def size(self) -> int:
        return len(self.hosts) * self.ranks


def ranks_a_node(config: Config, nodes: int) -> int:
    """Ranks on each of `nodes` nodes: hardware.count is that of all cards; 1 where it is not said. Raises Refusal if it does not divide."""
    count = config.hardware.count or nodes
    if count % nodes:
        raise Refusal(f"hardware.count={count}: does not divide by nodes={nodes} — type hardware.count={-(-count // nodes) * nodes}")
    return count // nodes


def node_machine(config: Config, here: Machine, ranks: int) -> Machine:
    """A node as hardware.card means it, with a card for each rank; where that is the CPU, this machine stands for it."""
    card = CARDS.get(config.hardware.card)
    if card is None:
        return here
    return replace(here, kind="cuda", device_names=(card.names[0],) * ranks, memory_gib=(card.memory_gib,) * ranks)


def on_this_machine(via: str, ranks: int, words: Sequence[str], port: int = 0) -> list[str]:
    """One command that starts `ranks` ranks of train.py here; port: where they meet (0: the launcher's own default)."""
    train = str(ROOT / "train.py")
    if via == "python":
        if ranks != 1:
            raise Refusal(f"--via python: starts one rank, --ranks is {ranks} — type --via torchrun")
        return [sys.executable, train, *words]
    if via not in ("deepspeed", "torchrun", "accelerate"):
        raise Refusal(f"--via {via}: starts ranks on several nodes — type --via deepspeed, torchrun or accelerate on this machine")
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


def in_slurm(via: str, meeting: Meeting, words: Sequence[str], *, hostfile: str = "", container: str = "", cpus: int = 0) -> list[str]:
    """One command that starts all ranks of a job from inside it.

    hostfile: of deepspeed (`hostfile_text`); container: words before each program; cpus: cores of the job on a node, 0: unknown.
    """
    inside, program = shlex.split(container), [str(ROOT / "train.py"), *words]
    nodes = len(meeting.hosts)
    # Without --kill-on-bad-exit the others would wait for a rank that has failed until their collectives time out.
    srun = ["srun", "--kill-on-bad-exit=1", f"--nodes={nodes}"]
    per_node = [*srun, f"--ntasks={nodes}", "--ntasks-per-node=1", *([f"--cpus-per-task={cpus}"] if cpus else [])]
    if via == "srun":
        each = [f"--cpus-per-task={cpus // meeting.ranks}"] if cpus >= meeting.ranks else []
        ranks = [*srun, f"--ntasks={meeting.size}", f"--ntasks-per-node={meeting.ranks}", *each]
        return [*ranks, *inside, sys.executable, *program]
    if via == "torchrun":
        return [*per_node, *inside, *_torchrun(meeting), *program]
    if via == "accelerate":
        # The node's number is known inside the step only.
        shell = f'exec {shlex.join([*inside, *_accelerate(meeting)])} --machine_rank "$SLURM_NODEID" "$@"'
        return [*per_node, "bash", "-c", shell, "accelerate", *program]
    if via == "deepspeed":
        # It runs srun itself and gives the ranks neither number nor meeting place: they come from Slurm and from the job.
        if inside:
            raise Refusal("slurm.container: deepspeed starts the ranks itself — type --via torchrun or srun")
        arguments = f"--kill-on-bad-exit=1 --ntasks-per-node={meeting.ranks}"
        return ["deepspeed", "--hostfile", hostfile, "--force_multi", "--launcher", "slurm", f"--launcher_args={arguments}", *program]
    if via == "pdsh":
        return _pdsh(meeting, words, hostfile)
    raise Refusal(f"--via {via}: starts one rank — type --via srun")


def by_ssh(via: str, meeting: Meeting, words: Sequence[str], environment: Mapping[str, str], *, hostfile: str = "") -> list[list[str]]:
    """The commands, run side by side from here, that start all ranks on machines that are reached by ssh."""
    if via in ("deepspeed", "pdsh"):
        return [_pdsh(meeting, words, hostfile)]
    if via not in ("torchrun", "accelerate"):
        raise Refusal(f"--via {via}: cannot start ranks by ssh — type --via deepspeed, torchrun or accelerate")
    commands = []
    for number, host in enumerate(meeting.hosts):
        agent = _torchrun(meeting) if via == "torchrun" else [*_accelerate(meeting), "--machine_rank", str(number)]
        exports = [f"{name}={value}" for name, value in forwarded(environment).items()]
        remote = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(['env', *exports, *agent, str(ROOT / 'train.py'), *words])}"
        commands.append(["ssh", "-o", "BatchMode=yes", host, remote])
    return commands


def _torchrun(meeting: Meeting) -> list[str]:
    return [
        "torchrun", f"--nnodes={len(meeting.hosts)}", f"--nproc-per-node={meeting.ranks}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting.hosts[0]}:{meeting.port}", f"--rdzv-id={meeting.port}",
    ]  # fmt: skip


def _accelerate(meeting: Meeting) -> list[str]:
    return [
        "accelerate", "launch", "--multi_gpu", "--num_machines", str(len(meeting.hosts)), "--num_processes", str(meeting.size),
        "--main_process_ip", meeting.hosts[0], "--main_process_port", str(meeting.port), "--rdzv_backend", "static",
        "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip


def _pdsh(meeting: Meeting, words: Sequence[str], hostfile: str) -> list[str]:
    program = [str(ROOT / "train.py"), *map(_through_pdsh, words)]
    place = ["--master_addr", meeting.hosts[0], "--master_port", str(meeting.port)]
    return ["deepspeed", "--hostfile", hostfile, "--force_multi", "--launcher", "pdsh", *place, *program]


def _through_pdsh(word: str) -> str:
    """A word as the shell on the other side wants it: deepspeed puts those with blanks into double quotes, and others as they are."""
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return shlex.quote(word)


def hostfile_text(meeting: Meeting) -> str:
    return "".join(f"{host} slots={meeting.ranks}\n" for host in meeting.hosts)


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host of deepspeed's hostfile; raises Refusal naming the line that is none."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise Refusal(f"--hostfile {path}: {error.strerror} — one line a node: NAME slots=RANKS") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (words := line.partition("#")[0].split()):
            continue
        match = re.fullmatch(r"slots=([1-9]\d*)", words[1]) if len(words) == 2 else None
        if not match or words[0] in slots:
            raise Refusal(f"{path}:{number}: {line.strip()!r} — one line a node: NAME slots=RANKS, each node once")
        slots[words[0]] = int(match[1])
    if not slots:
        raise Refusal(f"--hostfile {path}: names no node — one line a node: NAME slots=RANKS")
    if len(set(slots.values())) > 1:
        raise Refusal(f"--hostfile {path}: every node needs as many slots, here are {', '.join(f'{k} {v}' for k, v in slots.items())}")
    return slots


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """What ranks that are started by ssh get: names of an allow-list, none that sounds like a secret, values that a shell leaves alone."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in FORWARDED or name.startswith(FORWARDED_FAMILIES))
        and not SECRET.search(name)
        and not re.search(r"[\"'$`\\\n]|://[^/]*@", value)
    }


def deepspeed_env_text(environment: Mapping[str, str]) -> str:
    """A .deepspeed_env file: what deepspeed exports on every node."""
    return "".join(f"{name}={value}\n" for name, value in forwarded(environment).items())


def for_pdsh(environment: Mapping[str, str], deepspeed_env: Path) -> dict[str, str]:
    """The environment of deepspeed itself where it starts ranks by ssh: it sends whole families of variables to every node by itself."""
    here = {name: environment[name] for name in NEEDED_BY_SSH if name in environment}
    return {**here, **forwarded(environment), "DS_ENV_FILE": str(deepspeed_env)}
