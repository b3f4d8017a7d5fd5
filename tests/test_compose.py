"""From words to a typed config: every experiment plans for its machine, and every mistake is explained in a line of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from tunesmith import compose as room
from tunesmith.compose import choices, compose, drop_local_rank, explain, stored_config
from tunesmith.config import Base, Compute, MethodKind, Refusal, Schedule
from tunesmith.hardware import CARDS, FAKE_MACHINE, Machine, this_machine
from tunesmith.plan import make_plan
from tunesmith.run import as_mapping

from .conftest import ROOT, environment

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "exp").glob("*.yaml"))
LAYERS = {"smoke"}  # laid over another experiment
MAIN = [sys.executable, str(ROOT / "train.py")]


def machine_for(experiment: str) -> Machine:
    """The machine that an experiment is meant for: one of its card, or the cores and memory that its header promises."""
    hardware = compose([f"+exp={experiment}"]).hardware
    if hardware.card in CARDS:
        card, count = CARDS[hardware.card], hardware.count or 1
        return Machine("cuda", (card.names[0],) * count, (card.memory_gib,) * count, cores=8 * count, ram_gib=32.0 if count == 1 else 192.0)
    header = (ROOT / "conf" / "exp" / f"{experiment}.yaml").read_text()
    promised = re.search(r"(\d+) CPU cores, (\d+) GiB", header)
    assert promised, "the header of an experiment for a CPU says how many CPU cores and GiB it takes"
    return Machine(cores=int(promised[1]), ram_gib=float(promised[2]))


def train(folder: Path, words: Sequence[str], extra: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """train.py as a person starts it, from a folder of its own; on a machine without a card."""
    return subprocess.run([*MAIN, *words], cwd=folder, env=environment(extra), capture_output=True, text=True, timeout=120)


def refusal_of(*overrides: str) -> list[str]:
    with pytest.raises(Refusal) as refused:
        compose(overrides)
    return str(refused.value).splitlines()


# --- experiments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name not in LAYERS])
def test_every_experiment_plans_for_its_machine(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_for(experiment)
    monkeypatch.setenv(FAKE_MACHINE, json.dumps(asdict(machine)))
    assert this_machine() == machine
    config = compose([f"+exp={experiment}"])
    plan = make_plan(config, this_machine(), config.hardware.count or 1)  # refuses, listing its problems, if there are any
    assert plan.name == experiment
    assert plan.conversations_per_step == plan.micro_batch * plan.accumulation * plan.world_size
    assert 0 < plan.memory_gib <= plan.memory_limit_gib
    assert plan.card == config.hardware.card


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if "several" in (ROOT / f"conf/exp/{name}.yaml").read_text()])
def test_one_or_several_means_several_too(experiment: str) -> None:
    one = machine_for(experiment)
    four = Machine("cuda", one.device_names * 4, one.memory_gib * 4, cores=32, ram_gib=128.0)
    assert make_plan(compose([f"+exp={experiment}"]), four, world_size=4).world_size == 4


def test_what_the_choices_mean() -> None:
    """The recipes by their names, against what the literature calls so."""
    qlora, int8, full = (compose([f"+exp={name}"]) for name in ("qlora_t4", "lora_int8_a10", "full_t4"))
    assert (qlora.method.kind, qlora.method.base, qlora.precision.compute) == (MethodKind.lora, Base.nf4, Compute.fp16)
    assert (int8.method.kind, int8.method.base) == (MethodKind.lora, Base.int8)
    assert (full.method.kind, full.method.base) == (MethodKind.full, Base.as_is)


def test_a_layer_stacks_on_an_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_for("lora_cpu")
    monkeypatch.setenv(FAKE_MACHINE, json.dumps(asdict(machine)))
    below, config = compose(["+exp=lora_cpu"]), compose(["+exp=[lora_cpu,smoke]"])
    assert config.name == "smoke"
    assert make_plan(config, this_machine(), world_size=1).steps == 2
    assert config.optim.lr == below.optim.lr != compose(["name=x"]).optim.lr, "what the layer does not say stays"
    assert config.data == below.data


def test_the_command_line_wins_over_the_experiment() -> None:
    config = compose(["+exp=lora_cpu", "optim.lr=7e-6", "optim.schedule=linear", "method.targets=[q_proj,v_proj]", "name=mine"])
    assert (config.optim.lr, config.optim.schedule, config.name) == (7e-6, Schedule.linear, "mine")
    assert config.method.targets == ["q_proj", "v_proj"]


def test_composing_and_planning_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    """The CPU time of the whole process, the interpreter's start included: other work on the machine does not count in it.

    The better of two runs, as the first may have to compile what it imports.
    """
    code = """
import sys, time
from tunesmith.compose import compose
from tunesmith.hardware import this_machine
from tunesmith.plan import make_plan
make_plan(compose(["+exp=lora_cpu"]), this_machine(), 1)
print(time.process_time(), "torch" in sys.modules)
"""
    extra = {FAKE_MACHINE: json.dumps(asdict(machine_for("lora_cpu")))}
    spent = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(extra), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        cpu_s, torch_loaded = done.stdout.split()
        assert torch_loaded == "False"
        spent.append(float(cpu_s))
    assert min(spent) < 1.5


# --- mistakes ------------------------------------------------------------------------------------------------------

ONE_MISTAKE = {
    "unknown key": ("optim.lrr=1", "override optim.lrr=1: optim.lrr: no such key — did you mean optim.lr? (valid in optim: name, lr, schedule, "),
    "unknown section": ("optimm.lr=1", "override optimm.lr=1: optimm.lr: no such key — did you mean optim? (valid: name, outputs, model, "),
    "key of another section": ("train.lr=1", "override train.lr=1: train.lr: no such key (valid in train: epochs, "),
    "part of a value": ("optim.lr.peak=1", "override optim.lr.peak=1: optim.lr is a single value and has no part 'peak'"),
    "text for a number": ("optim.lr=fast", "override optim.lr=fast: optim.lr: 'fast' is not a number"),
    "fraction for a whole number": ("train.steps=2.5", "override train.steps=2.5: train.steps: 2.5 is not a whole number"),
    "word for a switch": ("method.dora=maybe", "override method.dora=maybe: method.dora: 'maybe' is not true or false"),
    "word for a switch or auto": ("engine.offload=maybe", "engine.offload: 'maybe' is not true or false, and not auto"),
    "fraction for a number or auto": ("engine.zero=2.5", "engine.zero: 2.5 is not a whole number, and not auto"),
    "nothing for a switch or auto": ("engine.offload=null", "override engine.offload=null: engine.offload: None is not true or false, and not auto"),
    "word for a number or auto": ("engine.zero=most", "engine.zero: 'most' is not a whole number, and not auto"),
    "fraction for a micro-batch": ("train.micro_batch=1.5", "train.micro_batch: 1.5 is not a whole number, and not auto"),
    "nothing": ("data.system=null", "override data.system=null: data.system: None is not text"),
    "word for a list": ("method.targets=q_proj", "override method.targets=q_proj: method.targets: 'q_proj' is not a list [a,b]"),
    "value for a section": ("optim=5", "override optim=5: optim is a section, not a value — write optim.KEY=..., KEY one of name, lr, "),
    "bad enum": ("optim.schedule=cosin", "override optim.schedule=cosin: optim.schedule: 'cosin' is not one of constant, linear, cosine"),
    "unknown choice": (
        "method=qlorra",
        "override method=qlorra: no such option — did you mean qlora? (valid: full, lora, lora_int8, prefix, prompt, qlora)",
    ),
    "not key=value": ("lr", "override lr: missing EQUAL at '<EOF>' — write key=value, +exp=NAME or group=option"),
    "experiment without +": ("exp=lora_cpu", "override exp=lora_cpu: experiments are added — write +exp=lora_cpu"),
}


@pytest.mark.parametrize(("word", "said"), ONE_MISTAKE.values(), ids=ONE_MISTAKE)
def test_a_mistake_is_explained(word: str, said: str) -> None:
    words = [word] if word.startswith("exp=") else ["+exp=lora_cpu", word]
    line, *more = refusal_of(*words)
    assert line.startswith(said)
    assert not more


def test_an_unknown_experiment_is_explained() -> None:
    (line,) = refusal_of("+exp=lora_cp")
    assert line.startswith("override +exp=lora_cp: no such option — did you mean lora_cpu? (valid: ")
    assert all(name in line for name in EXPERIMENTS)
    (line,) = refusal_of("+exp=[lora_cpu,smok]")
    assert "did you mean smoke?" in line


def test_several_mistakes_are_told_at_once() -> None:
    lines = refusal_of("+exp=lora_cp", "optim.lrr=1", "train.steps=many", "engine.fsdp=some", "method=x")
    assert [line.split(": ")[0] for line in lines] == [
        "override +exp=lora_cp", "override optim.lrr=1", "override train.steps=many", "override engine.fsdp=some", "override method=x",
    ]  # fmt: skip


def test_without_a_name_the_experiments_are_listed() -> None:
    lines = refusal_of()
    assert lines[0] == "name: no value — set name=..."
    assert lines[1] == f"or start from an experiment: +exp=NAME, one of {', '.join(EXPERIMENTS)}"
    assert refusal_of("name=x", "data=local") == ["data.train: no value — set data.train=..."]
    assert refusal_of("name=x", "data=local", "model=local") == [
        "data.train: no value — set data.train=...", "model.path: no value — set model.path=...",
    ]  # fmt: skip


def test_an_interpolation_that_leads_nowhere_is_explained() -> None:
    assert refusal_of("+exp=lora_cpu", "data.folder=${nowhere}") == ["data.folder: Interpolation key 'nowhere' not found"]


def test_what_is_no_mistake_is_not_called_one() -> None:
    """Hydra's own words where nothing of ours is wrong; options and their values are no overrides."""
    assert explain(HydraException("in two\n  lines"), ["+exp=lora_cpu", "hydra.verbose=true", "hydra/launcher=x"]) == "in two lines"
    assert explain(HydraException("other"), ["--cfg", "job", "-m", "-cn", "config", "+exp=lora_cpu", "optim.lr=1e-4,2e-4"]) == "other"
    lines = explain(HydraException("other"), ["--cfg", "job", "optim.lrr=1"]).splitlines()
    assert [line.split(":")[0] for line in lines] == ["override optim.lrr=1"]


# --- mistakes in files ---------------------------------------------------------------------------------------------


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ to break."""
    copy = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", copy, ignore=shutil.ignore_patterns("local"))
    monkeypatch.setattr(room, "CONF", copy)
    return copy


def test_a_bad_experiment_is_named_with_all_its_mistakes(conf: Path) -> None:
    (conf / "exp" / "broken.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /method: lorra\nname: broken\noptim: {lrr: 1}\ntrain: {steps: many}\n"
    )
    lines = refusal_of("+exp=broken", "eval.batch=x")
    assert [line.split(" ")[0] for line in lines] == ["override", *["conf/exp/broken.yaml:"] * 3]
    assert "method: lorra: no such option — did you mean lora?" in lines[1]
    assert "optim.lrr: no such key — did you mean optim.lr?" in lines[2]
    assert "train.steps: 'many' is not a whole number" in lines[3]


def test_a_file_that_is_no_yaml_is_named_with_the_line(conf: Path) -> None:
    (conf / "exp" / "broken.yaml").write_text("# @package _global_\nname: broken\noptim: {lr: 1\n")
    (line,) = refusal_of("+exp=broken")
    assert line.startswith("conf/exp/broken.yaml: ")
    assert "line 3" in line or "line 4" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- name\n- x\n", "conf/exp/broken.yaml: a list — write lines of key: value"),
        ("name: x\n", "conf/exp/broken.yaml: its keys would land in a section exp — let its first line be # @package _global_"),
        ("# @package _global_\noptim: 3\n", "conf/exp/broken.yaml: optim is a section, not a value"),
        ("# @package _global_\nname: a\nname: b\n", "conf/exp/broken.yaml: while constructing a mapping"),
    ],
)
def test_a_file_of_the_wrong_shape_is_named(text: str, said: str, conf: Path) -> None:
    (conf / "exp" / "broken.yaml").write_text(text)
    (line,) = refusal_of("+exp=broken")
    assert line.startswith(said)


def test_a_mistake_in_a_choice_is_named_by_its_section(conf: Path) -> None:
    (conf / "method" / "lora.yaml").write_text("kind: lora\nrank: 8\n")
    (line,) = refusal_of("+exp=lora_cpu")
    assert line.startswith("conf/method/lora.yaml: method.rank: no such key")


def test_a_mistake_below_an_experiment_is_found(conf: Path) -> None:
    """An experiment may start from another: the mistake lies in the file that has it."""
    (conf / "exp" / "below.yaml").write_text("# @package _global_\nname: below\ntrain: {stepps: 3}\n")
    (conf / "exp" / "above.yaml").write_text("# @package _global_\ndefaults: [below]\nname: above\n")
    assert [line.split(": ")[:2] for line in refusal_of("+exp=above")] == [["conf/exp/below.yaml", "train.stepps"]]


def test_settings_of_this_machine_are_optional_and_win_over_defaults(conf: Path) -> None:
    assert compose(["+exp=lora_cpu"]).outputs == "outputs"
    (conf / "local").mkdir()
    (conf / "local" / "default.yaml").write_text("# @package _global_\noutputs: /scratch/me\ntracker: {entity: us}\n")
    config = compose(["+exp=lora_cpu"])
    assert (config.outputs, config.tracker.entity) == ("/scratch/me", "us")
    assert compose(["+exp=lora_cpu", "outputs=here"]).outputs == "here"


# --- a run's stored config -----------------------------------------------------------------------------------------


def test_a_stored_config_comes_back_equal(tmp_path: Path) -> None:
    config = compose(["+exp=qlora_t4", "method.targets=[q_proj]", "optim.lr=3e-5"])
    OmegaConf.save(OmegaConf.create(as_mapping(config)), tmp_path / "config.yaml")
    assert stored_config(tmp_path) == config
    (tmp_path / "config.yaml").write_text("name: x\nnew_in_version_9: 1\n")
    with pytest.raises(Refusal, match="not a config of this version"):
        stored_config(tmp_path)


# --- the command line ----------------------------------------------------------------------------------------------


def test_local_rank_is_taken_out_and_nothing_else() -> None:
    words = ["--local_rank=3", "+exp=lora_cpu", "--local-rank=0", "data.system=--local_rank", "--local_addr=x", "--cfg", "job"]
    assert drop_local_rank(words) == ["+exp=lora_cpu", "data.system=--local_rank", "--local_addr=x", "--cfg", "job"]


def test_the_config_can_be_shown(tmp_path: Path) -> None:
    done = train(tmp_path, ["--local_rank=0", "+exp=lora_cpu", "optim.lr=3e-4", "--cfg", "job"])
    assert done.returncode == 0, done.stderr
    shown = OmegaConf.create(done.stdout)
    assert (shown.optim.lr, shown.name, shown.method.kind) == (3e-4, "lora_cpu", "lora")
    assert not list(tmp_path.iterdir()), "showing leaves nothing behind"


def test_help(tmp_path: Path) -> None:
    done = train(tmp_path, ["--help"])
    assert done.returncode == 0, done.stderr
    assert "exp: " in done.stdout
    assert all(name in done.stdout for name in EXPERIMENTS)


def test_a_run_for_another_machine_is_refused_at_once_in_a_line(tmp_path: Path) -> None:
    """What it needs, what is here, what to type; the time is the process's own CPU time, so a busy machine does not count."""
    command = [*MAIN, "+exp=lora_a10"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 2
    assert usage.ru_utime + usage.ru_stime < 3
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert re.fullmatch(
        r"tunesmith: hardware\.card=a10: needs 1 x a10 \(22 GiB each, [\d.]+ predicted\), "
        r"here is no GPU, \d+ cores, .* — type hardware=cpu .*",
        line,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


def test_a_sweep_for_another_machine_is_refused_without_a_traceback(tmp_path: Path) -> None:
    done = train(tmp_path, ["-m", "+exp=lora_a10", "optim.lr=1e-4,2e-4"])
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "hardware.card=a10: needs" in done.stderr


MISTAKES = {
    "key": (["+exp=lora_cpu", "optim.lrr=1"], {}, "override optim.lrr=1: optim.lrr: no such key"),
    "no experiment": ([], {}, "or start from an experiment: +exp=NAME"),
    "interpolation": (["+exp=lora_cpu", "data.folder=${x}"], {}, "data.folder: Interpolation key 'x' not found"),
    "ranks": (["+exp=lora_cpu"], {"RANK": "0"}, "WORLD_SIZE is not set although its sister is"),
    "machine": (["+exp=lora_cpu"], {FAKE_MACHINE: "[]"}, f"{FAKE_MACHINE}='[]'"),
}


@pytest.mark.parametrize(("words", "extra", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_persons_mistake_ends_with_code_2_and_no_traceback(words: list[str], extra: dict[str, str], said: str, tmp_path: Path) -> None:
    done = train(tmp_path, words, extra)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_choices_are_the_files() -> None:
    assert choices("method") == ["full", "lora", "lora_int8", "prefix", "prompt", "qlora"]
    assert choices("nonsense") == []


def test_what_can_be_auto_is_typed_in_as_many_ways_as_before() -> None:
    words = ["engine.zero='1'", "engine.offload=yes", "engine.fsdp=0", "engine.checkpointing=auto"]
    engine = compose(["+exp=lora_cpu", *words]).engine
    assert (engine.zero, engine.offload, engine.fsdp, engine.checkpointing) == (1, True, False, "auto")
