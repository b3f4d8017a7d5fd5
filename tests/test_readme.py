"""The documents against the program: every command is one that works, every link, file, test and setting they name is there."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

import launcher.__main__ as launcher_program
import tunesmith.cli as cli_program
from tests.conftest import ROOT, read
from tests.test_house import LADDER
from tunesmith.compose import choices, compose
from tunesmith.config import Config, Refusal
from tunesmith.data.conversations import parse_conversation
from tunesmith.hardware import FAKE_MACHINE, Machine, this_machine
from tunesmith.plan import make_plan

READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RAM_GIB = {1: 8.0, 2: 10.0}
"""By ranks: as little as the README asks for."""


def by_page(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)


# --- commands ------------------------------------------------------------------------------------------------------


@dataclass
class Command:
    """One line of a ```bash block."""

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    document: str = ""
    """What a `<<'EOF'` feeds to it."""

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands(page: Path) -> list[Command]:
    """The commands of a page's ```bash blocks in order, comments left out, with the variables that hold for each."""
    found: list[Command] = []
    for language, content in blocks(page):
        if language != "bash":
            continue
        lines, exported = iter(content.splitlines()), dict[str, str]()
        for line in lines:
            here, _, end = line.partition("<<'")
            document = "\n".join(iter(partial(next, lines), end.rstrip("'"))) if end else ""
            words = shlex.split(here.removesuffix("&"), comments=True)
            variables = dict(exported)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.S):
                name, _, value = words.pop(0).partition("=")
                variables[name] = value
            if words and words[0] == "export":
                exported |= dict(word.split("=", 1) for word in words[1:])
            if words:
                found.append(Command(words, variables, document))
    return found


RANKS_OF = {"--num_accelerators", "--num_gpus", "--nproc-per-node", "--num_processes"}
LAUNCHER_FLAGS = {"--multi_gpu", "--cpu"}
HYDRA_FLAGS = {"--cfg": True, "--help": False, "-m": False, "--multirun": False}
"""Hydra's own, and whether a value follows."""


def started(words: list[str], variables: dict[str, str]) -> tuple[int, list[str]] | None:
    """(ranks, the words after train.py) of a command that starts it; None if it does not. Unknown options are a failure."""
    if "train.py" not in words:
        return None
    place = words.index("train.py")
    how = iter(words[:place])
    name = next(how)
    assert name in ("python", "deepspeed", "torchrun") or (name == "accelerate" and next(how) == "launch"), f"{name} starts nothing"
    ranks = int(variables.get("WORLD_SIZE", 1))
    for option in how:
        option, _, value = option.partition("=")
        assert option in RANKS_OF | LAUNCHER_FLAGS, f"{option}: not an option that the README explains"
        ranks = int(value or next(how)) if option in RANKS_OF else ranks
    return ranks, words[place + 1 :]


def runs_of(words: list[str]) -> Iterator[list[str]]:
    """The overrides of each run that train.py's words mean: one, or with -m one for each combination of a,b."""
    flags = [word for word in words if word in HYDRA_FLAGS]
    kept, rest = [], iter(words)
    for word in rest:
        if HYDRA_FLAGS.get(word):
            next(rest)
        elif word not in HYDRA_FLAGS:
            assert "=" in word, f"{word}: neither key=value nor an option"
            kept.append(word)
    if "--help" in flags:
        assert not kept
        return
    if not {"-m", "--multirun"} & set(flags):
        yield kept
        return
    pairs = [word.partition("=") for word in kept]
    options = [[f"{key}={value}" for value in ([values] if values.startswith("[") else values.split(","))] for key, _, values in pairs]
    assert any(len(option) > 1 for option in options), "a sweep over nothing"
    yield from map(list, itertools.product(*options))


def small(ranks: int) -> Machine:
    return Machine(kind="cpu", cores=2, ram_gib=RAM_GIB.get(ranks, RAM_GIB[2]))


def check(command: Command, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    words, machine = command.words, small(2 if "--ranks" in command.words else 1)
    if fake := command.variables.get(FAKE_MACHINE):
        monkeypatch.setenv(FAKE_MACHINE, fake)
        machine = this_machine()
    if start := started(words, command.variables):
        ranks, rest = start
        shown_only = "--cfg" in rest  # a config is shown for any machine
        for overrides in runs_of(rest):
            config = compose(overrides)
            if not shown_only:
                make_plan(config, small(ranks), ranks)
    elif words[:3] == ["python", "-m", "launcher"]:
        monkeypatch.setenv(FAKE_MACHINE, fake or json.dumps({"kind": machine.kind, "cores": machine.cores, "ram_gib": machine.ram_gib}))
        assert "--dry" in words, "a reader who copies a block in one go must not wait in the middle of it"
        with redirect_stdout(io.StringIO()) as said:
            launcher_program.main(words[3:])
        assert "train.py" in said.getvalue().splitlines()[-1]
    elif words[:2] == ["tunesmith", "data"]:
        asked: list[argparse.Namespace] = []
        monkeypatch.setattr(cli_program, "look_at_data", asked.append)
        cli_program.main(words[1:])
        config = cli_program.data_config(asked[0].words)
        assert config.data.train == ",".join(word for word in asked[0].words if "=" not in word) or "+exp" in str(words)
    elif words[:2] == ["tunesmith", "plan"]:
        with redirect_stdout(io.StringIO()) as said:
            cli_program.main(words[1:])
        assert "GiB a rank" in said.getvalue()
    elif words[:2] == ["tunesmith", "doctor"]:
        assert compose([word for word in words[2:] if not word.startswith("--")]).name
    elif words[0] == "tunesmith":
        # Its words are understood, and what is missing is the run that an earlier command makes.
        with pytest.raises(Refusal, match=r"^outputs/.*\*: not a run folder"):
            cli_program.main(words[1:])
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for word in words[1:]:
            name, is_variable, value = word.partition("=")
            assert re.search(rf"^{name} \?=" if is_variable else rf"^{name}:", makefile, re.M), f"make knows no {name}"
            assert name != "EXP" or value in choices("exp")
            if name == "demo":
                make_plan(compose(["+exp=lora_cpu"]), small(1), 1)
    elif words[0] == "cat":
        file = folder / Path(words[2]).name
        file.write_text(command.document, "utf-8")
        assert read(file)
    else:
        assert words[0] in ("mkdir", "export", "unset", "wait") or words == ["source", ".venv/bin/activate"], "not checked by anything"


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A refusal ends the process; here it is raised."""

    def refuse(refusal: Refusal) -> None:
        raise refusal

    for program in (launcher_program, cli_program):
        monkeypatch.setattr(program, "refuse", refuse)
    monkeypatch.chdir(ROOT)
    return monkeypatch


ENGLISH = commands(READMES[0])


@pytest.mark.parametrize("command", ENGLISH, ids=[f"{number}-{str(command)[:60]}" for number, command in enumerate(ENGLISH)])
def test_a_command_of_the_readme_is_understood(command: Command, refusing: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check(command, refusing, tmp_path)


def test_both_readmes_have_the_same_commands() -> None:
    first, second = (commands(page) for page in READMES)
    assert [(c.words, c.variables, c.document) for c in first] == [(c.words, c.variables, c.document) for c in second]
    assert {"make demo", "make test"} <= {str(command) for command in first}


def test_both_readmes_have_the_same_structure() -> None:
    """Headings by depth, blocks by language, table rows and links: a translation that has fallen behind shows."""

    def structure(page: Path) -> dict[str, Any]:
        text = prose(page)
        return {
            "headings": [len(found) for found in re.findall(r"^(#+) ", text, re.M)],
            "blocks": [language for language, _ in blocks(page)],
            "rows": [row.count("|") for row in re.findall(r"^\|.*$", text, re.M)],
            # A translated page has headings, hence anchors, of its own.
            "links": sorted(
                target.partition("#")[0].replace(".zh-CN", "") for target in links(page) if not target.startswith("README")
            ),
            "code": sorted(set(re.findall(r"`([^`\n]+)`", text))),
        }

    first, second = map(structure, READMES)
    assert first == second


def test_the_readers_of_commands_see_mistakes(refusing: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The checks above can fail."""
    for wrong, error in (
        ("python train.py +exp=lora_cpu optim.lrr=1", Refusal),
        ("python train.py +exp=lora_t4", Refusal),
        ("torchrun --nproc=2 train.py +exp=lora_cpu", AssertionError),
        ("make dmeo", AssertionError),
        ("tunesmith chat", SystemExit),
        ("tunesmith data chek train.jsonl", SystemExit),
        ("tunesmith data check train.jsonl data.maxtokens=9", Refusal),
        ("tunesmith doctor +exp=lora_cppu", Refusal),
        ("pip install tunesmith", AssertionError),
    ):
        with pytest.raises(error):
            check(Command(shlex.split(wrong)), refusing, tmp_path)


def test_every_experiment_is_in_the_table() -> None:
    for page in READMES:
        rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", prose(page), re.M)
        listed = [name for name, rest in rows if name in choices("exp") and rest.count("|") == 3]
        assert sorted(listed) == choices("exp"), page.name


# --- links, files, tests and settings ------------------------------------------------------------------------------


def links(page: Path) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Headings as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page(PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@by_page(PAGES)
def test_named_tests_and_files_exist(page: Path) -> None:
    places = (ROOT, ROOT / "src/tunesmith", page.parent)
    for name in re.findall(r"`([\w./-]+\.(?:py|sbatch|cfg|txt|md))(?:::\w+)?`", prose(page)):
        elsewhere = name in ("command.txt", "first_error.txt") or "NAME" in name  # in a run folder; a file to be written
        assert elsewhere or any((place / name).is_file() for place in places), f"{page.name}: {name}"
    for file, test in re.findall(r"`(tests/test_\w+\.py)::(\w+)`", prose(page)):
        assert f"def {test}(" in (ROOT / file).read_text("utf-8"), f"{page.name}: {file}::{test}"


def settings(section: Any = None, prefix: str = "") -> Iterator[str]:
    for item in fields(section or Config):
        value = item.default_factory() if callable(item.default_factory) else item.default
        yield prefix + item.name
        if is_dataclass(value):
            yield from settings(value, f"{prefix}{item.name}.")


@by_page(PAGES)
def test_settings_that_are_named_exist(page: Path) -> None:
    known = set(settings())
    sections = "|".join(sorted({name.split(".")[0] for name in known if "." in name}))
    for name in re.findall(rf"`((?:{sections})\.[a-z_0-9.]+)(?=[`= ])", prose(page)):
        assert name.rstrip(".") in known or Path(name).suffix in (".py", ".json", ".jsonl", ".html"), f"{page.name}: {name}"


# --- examples and pages --------------------------------------------------------------------------------------------


@by_page(PAGES)
def test_json_examples_are_read(page: Path) -> None:
    for number, (language, content) in enumerate(blocks(page)):
        if language == "json":
            record = json.loads(content)
            for one in record if isinstance(record, list) else [record]:
                if {"conversations", "messages"} & set(one):
                    parse_conversation(one, f"{page.name}, block {number}")


def test_both_data_pages_have_the_same_examples_and_tables() -> None:
    first, second = ROOT / "docs/data.md", ROOT / "docs/data.zh-CN.md"
    assert blocks(first) == blocks(second)
    for pattern in (r"^(#+) ", r"^\| (`[a-z_0-9]+`) \|", r"^\|[-|]+$"):
        assert re.findall(pattern, prose(first), re.M) == re.findall(pattern, prose(second), re.M)
    assert set(re.findall(r"`(data\.[a-z_.]+)", prose(first))) == set(re.findall(r"`(data\.[a-z_.]+)", prose(second)))


DATA_COMMANDS = commands(ROOT / "docs/data.md")


@pytest.mark.parametrize("command", DATA_COMMANDS, ids=map(str, DATA_COMMANDS))
def test_a_command_of_the_data_page_is_understood(command: Command, refusing: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check(command, refusing, tmp_path)


def test_data_page_shows_every_role_and_both_forms() -> None:
    shown = [json.loads(content) for language, content in blocks(ROOT / "docs/data.md") if language == "json"]
    turns = [turn for one in shown for turn in one.get("conversations", one.get("messages"))]
    assert {turn["role"] for turn in turns} == {"system", "user", "assistant", "tool", "observation"}
    assert any("tool_calls" in turn for turn in turns)
    assert {turn.get("loss") for turn in turns} == {None, True, False}


def test_architecture_has_the_rooms_in_the_ladders_order() -> None:
    section = (ROOT / "docs/architecture.md").read_text("utf-8").partition("## The rooms")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, re.M)) == LADDER
