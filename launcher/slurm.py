"""Runs as jobs of Slurm: what a job asks for, the text of its batch script, what the cluster would refuse, submission.

Everything is composed, planned and examined on the login node, without torch, before anything waits in a queue.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.nodes import ROOT, node_machine, ranks_a_node, refuse_container
from tunesmith.compose import compose
from tunesmith.config import Config, Refusal
from tunesmith.doctor.experiment import tracker
from tunesmith.doctor.facts import disk
from tunesmith.doctor.inputs import data_findings
from tunesmith.doctor.rules import judge_disk
from tunesmith.hardware import this_machine
from tunesmith.plan import Plan, make_plan
from tunesmith.run import RunFolder, checkpoint_gib
from tunesmith.world import World

COPIED = ("train.py", "conf", "launcher", "src/tunesmith")
"""What a queued job runs from: a copy, so that what is edited meanwhile does not change it."""
CODE = (".py", ".yaml", ".j2", ".cpp", ".h")
"""What of it a job needs: Python, configs, templates and what is compiled."""
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")
"""Folders that every node has its own of."""


@dataclass(frozen=True)
class Place:
    """Where a job's files are, as absolute paths."""

    folder: Path
    """Script, code and, of an array, trials.txt; the job's output too."""
    workdir: Path
    """Where the command was typed: relative paths count from here."""
    python: Path
    """The interpreter; its folder has deepspeed, torchrun and accelerate."""
    commit: str = ""
    """Of the code, for the record."""


def sbatch_text(plan: Plan, place: Place, trials: Sequence[Sequence[str]], *, via: str = "srun", nodes: int = 1, throttle: int = 0) -> str:
    """The batch script of a run (one trial: the words for train.py), or of an array with a task for each trial.

    A task of an array takes its words from line SLURM_ARRAY_TASK_ID + 1 of trials.txt in place.folder (`trials_text`), and at most
    `throttle` of them run at once (0: no limit). `plan` is that of the first trial; all ask for the same. Pure: nothing is read or written.
    """
    config, ranks = plan.config, plan.world_size // nodes
    slurm, array = config.slurm, len(trials) > 1
    limit = f"%{throttle}" if throttle else ""
    options = [
        f"--job-name={config.name if array else f'{plan.name}-{plan.run_id}'}",
        *([f"--array=0-{len(trials) - 1}{limit}"] if array else []),
        f"--nodes={nodes} --ntasks-per-node={ranks}",
        *([f"--gres={config.hardware.gres}:{ranks}"] if config.hardware.gres else []),
        *([f"--cpus-per-task={slurm.cpus}"] if slurm.cpus else []),
        *([f"--mem={slurm.memory}"] if slurm.memory else []),
        *([f"--partition={slurm.partition}"] if slurm.partition else []),
        *([f"--account={slurm.account}"] if slurm.account else []),
        f"--time={slurm.time}",
        f"--requeue --open-mode=append --signal=B:USR1@{slurm.signal_s}",
        f"--chdir={shlex.quote(str(place.workdir))}",
        f"--output={shlex.quote(str(place.folder / ('%A_%a.out' if array else '%j.out')))}",
        *slurm.options,
    ]
    code = place.folder / "code"
    exports = {
        "PATH": f"{shlex.quote(str(place.python.parent))}:$PATH",
        "PYTHONPATH": f"{shlex.quote(str(code / 'src'))}:{shlex.quote(str(code))}",
        **({"TUNESMITH_COMMIT": place.commit} if place.commit else {}),
    }
    what = ["--trials", str(place.folder / "trials.txt")] if array else ["--", *trials[0]]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        f"# Planned: {_planned(plan)}.",
        "trap '' USR1 # until Python listens: it would end the job",
        *slurm.setup,
        f"export {' '.join(f'{name}={value}' for name, value in exports.items())}",
        f"exec {shlex.join([str(place.python), '-m', 'launcher.job', '--via', via, *what])}",
    ]
    return "\n".join(lines) + "\n"


def trials_text(trials: Sequence[Sequence[str]]) -> str:
    """The words of each trial as a shell would read them, a line a trial."""
    return "".join(f"{shlex.join(words)}\n" for words in trials)


def read_trial(path: Path, index: int) -> list[str]:
    """The words of trial `index` (from 0) of a trials.txt; raises Refusal if it has none."""
    lines = path.read_text("utf-8").splitlines()
    if not 0 <= index < len(lines):
        raise Refusal(f"{path}: has {len(lines)} trials, SLURM_ARRAY_TASK_ID is {index}")
    return shlex.split(lines[index])


def submit(
    trials: Sequence[Sequence[str]],
    *,
    folder: Path | None = None,
    via: str = "srun",
    nodes: int = 1,
    ranks: int = 0,
    throttle: int = 0,
    dry: bool = False,
) -> str:
    """Compose, plan and examine every trial (words for train.py), then submit: one as a job, several as one job array.

    folder: where script and code are put (empty: job/ in the run folder, or outputs/NAME/job for an array). ranks: on each node (0: as the
    config has cards). Marks each run as pending in its status.json. Returns the job's id; with dry nothing is written or submitted, and
    the script is returned. Raises Refusal with everything that would fail, a line each: words, plan, what sinfo tells, folders.
    """
    if not trials:
        raise Refusal("no trial to submit")
    planned = [plan_for(words, nodes, ranks) for words in trials]
    slowest = max(planned, key=lambda plan: plan.hours)
    first, several = planned[0], len(trials) > 1
    if len({(plan.world_size, plan.config.hardware.gres, *map(str, vars(plan.config.slurm).values())) for plan in planned}) > 1:
        raise Refusal("trials of one array ask for the same nodes and cards: sweep over settings outside of hardware and slurm")
    refuse_container(via, first.config.slurm.container)
    found = [line for plan in planned for line in [*folder_problems(plan.config), *input_problems(plan)]]
    found += [*limit_problems(slowest, nodes), *cluster_problems(slowest, nodes, _sinfo())]
    if found:
        raise Refusal("\n".join(dict.fromkeys(found)))
    home = Path(first.config.outputs) / first.name
    under = (folder or (home if several else home / first.run_id) / "job").absolute()
    place = Place(under / _digest(trials, f"{via} {nodes} {throttle} {first.config}"), Path.cwd(), Path(sys.executable), _commit())
    script = sbatch_text(first, place, trials, via=via, nodes=nodes, throttle=throttle)
    if dry:
        return script
    if shutil.which("sbatch") is None:
        raise Refusal("sbatch is not here: --slurm submits from a login node of a Slurm cluster; --dry only prints the script")
    _write(place.folder, script, trials)
    done = subprocess.run(["sbatch", "--parsable", str(place.folder / "train.sbatch")], capture_output=True, text=True)
    if done.returncode:
        raise Refusal(f"sbatch refuses {place.folder / 'train.sbatch'}: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().partition(";")[0]
    for index, plan in enumerate(planned):
        run = RunFolder.of(plan.config, plan.run_id, World())
        if run.status().get("state") not in ("running", "completed"):  # the job itself may have been quicker
            run.path.mkdir(parents=True, exist_ok=True)
            run.set_status("pending", job=f"{job}_{index}" if several else job)
    return job


def plan_for(words: Sequence[str], nodes: int, ranks: int) -> Plan:
    """The plan of a run on `nodes` nodes of the kind that its config means; raises Refusal if it cannot go as asked."""
    config = compose(words)
    local = ranks or ranks_a_node(config, nodes)
    return make_plan(config, node_machine(config, this_machine(), local), nodes * local, local_size=local)


# --- what would fail -----------------------------------------------------------------------------------------------


def folder_problems(config: Config) -> Iterator[str]:
    """Folders that must be shared by all nodes, and lie where each node has its own."""
    named = {"outputs": config.outputs, "data.folder": config.data.folder, "data.cache": config.data.cache}
    if config.model.path.startswith(("/", ".")):
        named["model.path"] = config.model.path
    for setting, value in named.items():
        here = Path(value).resolve()
        if value and (own := next((place for place in NODE_LOCAL if here.is_relative_to(Path(place).resolve())), "")):
            yield f"{setting}={value}: every node has a {own} of its own — type {setting}= a folder that all nodes share"


def input_problems(plan: Plan) -> Iterator[str]:
    """What a login node can see of data, disk and tracker: what fails is a problem, what is doubtful is printed."""
    config = plan.config
    findings = [
        *data_findings(config, [f"name={config.name}"]),
        judge_disk(disk("outputs", Path(config.outputs)), checkpoint_gib(plan, config), must=True),
        *tracker(config),
    ]
    for finding in findings:
        if finding.verdict == "fail":
            yield f"{finding.fact} — {finding.fix}"
        elif finding.verdict == "warn":
            print(f"note     {finding.fact} — {finding.fix}", file=sys.stderr)


def limit_problems(plan: Plan, nodes: int) -> Iterator[str]:
    """A time limit that is none, or below what the plan predicts."""
    slurm = plan.config.slurm
    hours = hours_of(slurm.time)
    if not hours:
        yield f"slurm.time={slurm.time}: not a time limit — write minutes, h:mm:ss or d-h:mm:ss, as slurm.time=24:00:00"
    elif plan.hours > hours and not slurm.in_pieces:
        enough = math.ceil(plan.hours * 1.2)
        yield (
            f"slurm.time={slurm.time}: the plan predicts {plan.hours:.3g} h of training — type slurm.time={enough}:00:00, or "
            "slurm.in_pieces=true to go on in another job at the limit"
        )
    if hours and slurm.signal_s > hours * 1800:
        yield f"slurm.signal_s={slurm.signal_s}: more than half of slurm.time={slurm.time} — type slurm.signal_s={round(hours * 360)}"
    if plan.world_size % nodes:
        yield f"nodes={nodes}: {plan.world_size} ranks do not divide by them"


@dataclass(frozen=True)
class Offer:
    """Nodes of one kind in a partition, as sinfo tells."""

    partition: str
    default: bool
    nodes: int
    gres: tuple[tuple[str, int], ...]
    """(gpu:a10, 4), ... of one node."""
    hours: float
    """The partition's time limit."""
    cores: int
    memory_mib: int
    """Both of one node."""


SINFO = ("sinfo", "--noheader", "--exact", "-o", "%P|%D|%G|%l|%a|%c|%m")


def offers(text: str) -> list[Offer]:
    """What partitions offer, from the output of SINFO; those that are down are left out."""
    found = []
    for line in text.splitlines():
        name, nodes, gres, limit, state, cores, memory = line.split("|")
        given = tuple((match[1].rstrip(":"), int(match[2])) for match in re.finditer(r"(gpu:(?:[^:,()]+:)?)(\d+)", gres))
        if state.startswith("up"):
            found.append(Offer(name.rstrip("*"), name.endswith("*"), int(nodes), given, hours_of(limit), int(cores), int(memory)))
    return found


def cluster_problems(plan: Plan, nodes: int, sinfo: str) -> Iterator[str]:
    """What no partition would ever give; an empty sinfo (no Slurm here) is not judged."""
    config, known = plan.config, offers(sinfo)
    slurm, local = config.slurm, plan.world_size // nodes
    if not known:
        return
    names = sorted({offer.partition for offer in known})
    of_it = [offer for offer in known if (offer.partition == slurm.partition if slurm.partition else offer.default)]
    if not of_it:
        what = (
            f"slurm.partition={slurm.partition}: no such partition"
            if slurm.partition
            else "slurm.partition=: this cluster has no default one"
        )
        yield f"{what} — type slurm.partition= one of {', '.join(names)}"
        return
    where = f"partition {of_it[0].partition}"
    if hours_of(slurm.time) > (most := max(offer.hours for offer in of_it)):
        shown = f"{math.floor(most)}:{round(most % 1 * 60):02}:00"
        yield f"slurm.time={slurm.time}: {where} allows {shown} — type slurm.time={shown}"
    wanted = config.hardware.gres
    if not wanted:
        fitting, have = of_it, ""
    else:
        fitting = [offer for offer in of_it if any(_is(wanted, name) and count >= local for name, count in offer.gres)]
        have = ", ".join(sorted({f"{name}:{count}" for offer in of_it for name, count in offer.gres})) or "none"
    there = sum(offer.nodes for offer in fitting)
    if not fitting:
        kinds = sorted({name for offer in of_it for name, _ in offer.gres})
        advice = (
            f"type hardware.gres={kinds[0]}"
            if kinds and not any(_is(wanted, kind) for kind in kinds)
            else "ask for fewer cards a node, on more nodes"
        )
        yield f"hardware.gres={wanted}: {local} a node are needed, {where} has {have} — {advice}"
    elif there < nodes:
        yield f"nodes={nodes}: {where} has {there} node{'s' * (there > 1)} with {wanted or 'room'} — type nodes={there}"
    if fitting and slurm.cpus * local > (most_cores := max(offer.cores for offer in fitting)):
        needed = f"{slurm.cpus * local} cores a node are needed"
        yield f"slurm.cpus={slurm.cpus}: {needed}, {where} has {most_cores} — type slurm.cpus={most_cores // local}"
    if fitting and mib_of(slurm.memory) > (most_memory := max(offer.memory_mib for offer in fitting)):
        yield f"slurm.memory={slurm.memory}: {where} has {most_memory} MiB a node — type slurm.memory={most_memory}M"


def _is(wanted: str, given: str) -> bool:
    return wanted == given or (wanted == "gpu" and given.startswith("gpu:"))


def mib_of(memory: str) -> float:
    """MiB of an amount as Slurm writes it (512, 30G, 1.5T); 0.0 if it is none, which sbatch itself will say."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", memory, re.I)
    return float(match[1]) * 1024.0 ** ("KMGT".index(match[2].upper() or "M") - 1) if match else 0.0


def hours_of(limit: str) -> float:
    """Hours of a time limit as Slurm writes it (60, 1:30 as m:s, 2:00:00, 1-12, 1-0:30, infinite); 0.0 if it is none."""
    if limit.lower() in ("infinite", "unlimited"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        return 0.0
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1]:
        return days * 24 + first + second / 60 + third / 3600
    if match[4]:
        return first + second / 60 + third / 3600
    return first / 60 + second / 3600


# --- files ---------------------------------------------------------------------------------------------------------


def _planned(plan: Plan) -> str:
    time = f", {plan.hours:.3g} h" if plan.hours else ""
    limit = f" of {plan.memory_limit_gib:.1f}" if plan.memory_limit_gib else ""
    return f"{plan.world_size} x {plan.card}, {plan.memory_gib:.2f}{limit} GiB a rank{time}"


def _digest(trials: Sequence[Sequence[str]], request: str) -> str:
    """8 hex digits of what a job runs, so that a job that waits keeps its own files."""
    digest = hashlib.sha256(f"{request}\n{trials_text(trials)}".encode())
    for path in _code():
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _code() -> Iterator[Path]:
    for name in COPIED:
        top = ROOT / name
        yield from [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.suffix in CODE)


def _write(folder: Path, script: str, trials: Sequence[Sequence[str]]) -> None:
    """The script, the trials and the code, there whole or not at all; what is there already is the same."""
    if not (folder / "code").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
        for path in _code():
            copy = aside / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        aside.chmod(0o755)
        os.replace(aside, folder / "code")
    (folder / "train.sbatch").write_text(script)
    if len(trials) > 1:
        (folder / "trials.txt").write_text(trials_text(trials))


def _sinfo() -> str:
    if shutil.which(SINFO[0]) is None:
        return ""
    done = subprocess.run(SINFO, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip()
