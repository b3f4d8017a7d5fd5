"""The walls of the house, read from the source with `ast`: who imports whom, which library is named where, what is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith import config as config_room
from tunesmith.config import NOT_IN_RUN_ID, Config

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "tunesmith"
CONF = ROOT / "conf"

# The one list: a room imports only rooms before it, inside functions and for type checkers too.
LADDER = (
    "config", "hardware", "compiled", "matmul", "peaks", "world", "compose", "plan", "data", "model", "engine", "records", "lifeline", "again", "run", "metrics", "checkpoint", "loop",
    "evaluate", "compare", "report", "doctor", "chat", "cli",
)  # fmt: skip
# What plans and refuses in half a second must not wait for torch (three seconds and more).
TORCH_FREE = ("config", "hardware", "compiled", "matmul", "peaks", "world", "compose", "plan", "records", "lifeline", "again", "run", "compare", "report", "cli", "data")

# Each wrapped library is named in one room, so that one file knows its quirks. train.py and launcher/ are the doors.
HOMES = {
    "deepspeed": {"engine", "doctor"},  # the doctor tries whether what others use works at all
    "accelerate": {"engine"},
    "wandb": {"metrics"},
    "wandb_workspaces": {"metrics"},
    "rich": {"metrics", "data", "report"},  # whoever talks to a terminal
    "peft": {"model"},
    "bitsandbytes": {"model", "doctor"},
    "liger_kernel": {"model"},
    "transformers": {"model"},
    "huggingface_hub": {"model"},
    "hydra": {"compose", "train.py", "launcher"},
    "omegaconf": {"config", "compose", "train.py", "launcher"},
    "optuna": {"launcher"},
    "plotly": {"report"},
    "jinja2": {"report", "data"},
    "pynvml": {"hardware", "metrics", "doctor"},  # what the machine is; what a card does while a run goes on; what ails it
    "hassil": {"data"},
    "home_assistant_intents": {"data"},
}
LONGEST_FILE = 560
TABLES = {"data/smart_home_words.py"}  # names of things in seven languages: nothing to read line by line

# A choice file says what it is named after, also where that is the default: an empty file would explain nothing.
SAYS_ITS_NAME = {
    ("method/lora.yaml", "method.kind"),
    ("method/qlora.yaml", "method.kind"),
    ("method/lora_int8.yaml", "method.kind"),
    ("precision/fp32.yaml", "precision.compute"),
    ("engine/deepspeed.yaml", "engine.kind"),
    ("tracker/none.yaml", "tracker.kind"),
    ("hardware/cpu.yaml", "hardware.card"),
}


def imports(code: str, package: str = "") -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a module imports, wherever it stands, relative and by-name imports included.

    `from a import b` gives a.b, as b may be a module.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def rooms_named(path: Path) -> set[tuple[int, str]]:
    """(line, room) of the rooms that a file of the package imports, its own left out."""
    package = ".".join(["tunesmith", *path.relative_to(SOURCE).parent.parts])
    named = {(line, name.split(".")[1]) for line, name in imports(path.read_text("utf-8"), package) if name.startswith("tunesmith.")}
    return {(line, room) for line, room in named if room not in (room_of(path), "__version__")}


ROOM_FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
OUTER_FILES = [ROOT / "train.py", *sorted((ROOT / "launcher").rglob("*.py"))]


def by_path(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


# --- the ladder ----------------------------------------------------------------------------------------------------


def test_the_reader_of_imports_sees_all_of_them() -> None:
    code = """
import a.b as c, d
from tunesmith.run import RunFolder
from . import meter
from ..engine import Engine
if TYPE_CHECKING:
    from tunesmith import loop
def f():
    import hidden
    importlib.import_module("by.name")
    __import__("dunder")
"""
    found = {name for _, name in imports(code, "tunesmith.metrics")}
    assert found == {
        "a.b", "d", "tunesmith.run.RunFolder", "tunesmith.metrics.meter", "tunesmith.engine.Engine", "tunesmith.loop",
        "hidden", "by.name", "dunder",
    }  # fmt: skip


def test_every_room_is_on_the_ladder_once() -> None:
    assert {room_of(path) for path in ROOM_FILES} == set(LADDER)
    assert len(set(LADDER)) == len(LADDER)


@by_path(ROOM_FILES)
def test_a_room_imports_only_rooms_before_it(path: Path) -> None:
    allowed = LADDER[: LADDER.index(room_of(path))]
    up = [f"line {line}: {room}" for line, room in sorted(rooms_named(path)) if room not in allowed]
    assert not up, f"{room_of(path)} comes before what it imports: {', '.join(up)}"


@by_path([*ROOM_FILES, *OUTER_FILES])
def test_each_library_is_named_in_its_own_room(path: Path) -> None:
    place = room_of(path) if path.is_relative_to(SOURCE) else path.relative_to(ROOT).parts[0]
    strangers = [
        f"line {line}: {name} belongs to {' and '.join(sorted(homes))}"
        for line, name in imports(path.read_text("utf-8"), "tunesmith")
        if (homes := HOMES.get(name.split(".")[0])) and place not in homes
    ]
    assert not strangers, strangers


def test_no_library_has_a_home_that_it_does_not_use() -> None:
    used: dict[str, set[str]] = {}
    for path in [*ROOM_FILES, *OUTER_FILES]:
        place = room_of(path) if path.is_relative_to(SOURCE) else path.relative_to(ROOT).parts[0]
        for _, name in imports(path.read_text("utf-8"), "tunesmith"):
            used.setdefault(name.split(".")[0], set()).add(place)
    idle = {library: homes - used.get(library, set()) - {"launcher"} for library, homes in HOMES.items()}
    assert not {library for library, homes in idle.items() if homes}


def test_torch_free_rooms_stay_so() -> None:
    """In a fresh process, as any test before this one has imported torch; train.py's head, hence every refusal, too."""
    names = ", ".join(f"tunesmith.{room}" for room in TORCH_FREE)
    code = (
        f"import {names}, importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('train', {str(ROOT / 'train.py')!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'accelerate', 'peft', 'bitsandbytes', 'wandb'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# --- names and sizes -----------------------------------------------------------------------------------------------


@by_path([*ROOM_FILES, *OUTER_FILES])
def test_names_and_sizes(path: Path) -> None:
    code = path.read_text("utf-8")
    assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py"), "a room is named after what it is for"
    classes = [node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if name.endswith("Manager")], "say what it does"
    if path.is_relative_to(SOURCE) and str(path.relative_to(SOURCE)) in TABLES:
        functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)]
        assert len(functions) <= 1, "a table is data: code in it would hide from the limit on lines"
    else:
        assert len(code.splitlines()) <= LONGEST_FILE


@by_path([*ROOM_FILES, *OUTER_FILES])
def test_every_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


# --- the config ----------------------------------------------------------------------------------------------------


def _undocumented(code: str) -> list[str]:
    """Fields of dataclasses with no text below them; a field that is a section is documented field by field in its class."""
    classes = [node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    sections = {node.name for node in classes if any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)}
    missing = []
    for node in (node for node in classes if node.name in sections):
        for item, below in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(item, ast.AnnAssign) or ast.unparse(item.annotation) in sections:
                continue
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            if not (isinstance(text, str) and text.strip()):
                missing.append(f"{node.name}.{ast.unparse(item.target)}")
    return missing


def test_every_setting_is_documented() -> None:
    assert _undocumented("@dataclass\nclass A:\n  x: int\n  '''x'''\n  y: int\n  z: int\n  ''' '''\n") == ["A.y", "A.z"]
    assert not _undocumented((SOURCE / "config.py").read_text("utf-8"))


def test_what_is_typed_for_a_choice_is_its_value() -> None:
    enums = [kind for kind in vars(config_room).values() if isinstance(kind, type) and issubclass(kind, Enum) and kind is not Enum]
    assert len(enums) >= 10
    assert [member for kind in enums for member in kind if member.name != member.value] == []


def _paths(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from _paths(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value.name if isinstance(value, Enum) else value


DEFAULTS = dict(_paths(Config()))
CONF_FILES = sorted(path for path in CONF.rglob("*.yaml") if path.relative_to(CONF).parts[0] != "local")


def test_what_is_left_out_of_the_run_id_exists() -> None:
    known = {*DEFAULTS, *(path.rpartition(".")[0] for path in DEFAULTS)}
    assert set(NOT_IN_RUN_ID) <= known


def _settings(path: Path) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a file in conf/, the defaults list and Hydra's own section left out."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    group = path.relative_to(CONF).parts[0]
    content = {key: value for key, value in (yaml.safe_load(path.read_text("utf-8")) or {}).items() if key not in ("defaults", "hydra")}
    yield from walk(content, "" if group in ("config.yaml", "exp") else f"{group}.")


def test_every_default_lives_in_the_dataclass() -> None:
    """A file in conf/ that repeats a default would go on saying the old one after it has changed there."""
    repeated = {
        (str(path.relative_to(CONF)), key)
        for path in CONF_FILES
        for key, value in _settings(path)
        if key in DEFAULTS and value == DEFAULTS[key] and value != "???"
    }
    assert repeated == SAYS_ITS_NAME


@by_path(CONF_FILES)
def test_files_in_conf_are_short_and_known(path: Path) -> None:
    assert not [key for key, _ in _settings(path) if key not in DEFAULTS]
    lines = path.read_text("utf-8").splitlines()
    if path.parent.name == "exp":
        assert len(lines) <= 30, "an experiment is its differences"
        assert lines[0] == "# @package _global_"
        assert "train.py" in lines[1], "the second line is the command"
        said = next(value for key, value in _settings(path) if key == "name")
        assert said == path.stem, "the run folder is found by the experiment's name"
