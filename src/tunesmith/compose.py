"""From Hydra's words to the typed tree: one schema registration, and mistakes explained in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import BooleanNode, DictConfig, IntegerNode, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tunesmith.config import AUTO, Config, Refusal, changed, leaves

CONF = Path(__file__).resolve().parents[2] / "conf"
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
WHOLE, TRUE = (IntegerNode, "a whole number"), (BooleanNode, "true or false")
OR_AUTO = {"WholeOrAuto": WHOLE, "WholeOrStillAuto": WHOLE, "TrueOrAuto": TRUE}
"""By the type that config.py gives to settings which can be left to the plan: what else they may be, in OmegaConf's words and in ours."""
OPTIONS_WITH_VALUE = (
    "-c", "--cfg", "-i", "--info", "-p", "--package", "-cn", "--config-name", "-cp", "--config-path", "-cd", "--config-dir",
)  # fmt: skip


def register_schema() -> None:
    """Make the dataclasses the schema that every composed config is checked against."""
    ConfigStore.instance().store(name="schema", node=Config)


def typed(composed: DictConfig) -> Config:
    """Turn a composed config into plain dataclasses; raises Refusal listing what is missing, or naming what leads nowhere."""
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if not missing:
            config = OmegaConf.to_object(composed)
            assert isinstance(config, Config)
            left = {path: value for path, value in leaves(config) if path in _left_to_plan()}
            if wrong := [line for key, value in left.items() for line in _wrong_word(key, value)]:
                raise Refusal("\n".join(wrong))
            return changed(config, {key: _number_or_auto(key, value) for key, value in left.items()})
    except OmegaConfBaseException as error:  # ${...} of something that is not there
        raise Refusal(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    lines = [f"{key}: no value — set {key}=..." for key in missing]
    if "name" in missing:
        lines.append(f"or start from an experiment: +exp=NAME, one of {', '.join(choices('exp'))}")
    raise Refusal("\n".join(lines))


def compose(overrides: Sequence[str]) -> Config:
    """Compose and type a config outside of a Hydra application; raises Refusal explaining every mistake."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_schema()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return typed(hydra_compose("config", overrides=list(overrides)))
    except COMPOSITION_ERRORS as error:
        raise Refusal(explain(error, overrides)) from None


def stored_config(run: Path) -> Config:
    """The config of an earlier run, from its folder; raises Refusal if it is not one of this version's."""
    path = run / "config.yaml"
    try:
        return typed(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))  # type: ignore[arg-type]  # a DictConfig
    except OmegaConfBaseException as error:
        raise Refusal(f"{path}: not a config of this version of tunesmith — {str(error).splitlines()[0]}") from None


def drop_local_rank(arguments: list[str]) -> list[str]:
    """`deepspeed` puts --local_rank=N before the user's words, which Hydra refuses; LOCAL_RANK says the same."""
    return [word for word in arguments if not word.startswith(("--local_rank=", "--local-rank="))]


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """Every mistake in the overrides and in the files they choose, a line each; Hydra's own words if none is found."""
    pairs = pairwise(["", *overrides])
    lines = list(_mistakes([word for before, word in pairs if not word.startswith("-") and before not in OPTIONS_WITH_VALUE]))
    return "\n".join(dict.fromkeys(lines)) or " ".join(str(error).split())


def choices(group: str) -> list[str]:
    """Options of a config group, by name."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _mistakes(overrides: Sequence[str]) -> Iterator[str]:
    files: dict[str, None] = {"config": None}
    for word in overrides:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            yield f"override {word}: {str(error).splitlines()[0]} — write key=value, +exp=NAME or group=option"
            continue
        key, value = override.key_or_group, override.value()
        if (CONF / key).is_dir():
            options = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            for option in map(str, options):
                if option in choices(key):
                    files[f"{key}/{option}"] = None
                else:
                    yield f"override {word}: no such option{_nearest(option, choices(key))} (valid: {', '.join(choices(key))})"
            if key == "exp" and not override.is_add():
                yield f"override {word}: experiments are added — write +{word.lstrip('+')}"
        elif not override.is_delete() and not override.is_sweep_override():
            yield from _mismatch(f"override {word}", key, value)
    checked: set[str] = set()
    while files:
        name = next(iter(files))
        del files[name]
        if name in checked:
            continue
        checked.add(name)
        yield from _mistakes_in_file(name, files)


def _mistakes_in_file(name: str, files: dict[str, None]) -> Iterator[str]:
    path = CONF / f"{name}.yaml"
    if not path.exists():
        return
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # any YAML error: its text has the line and column
        yield f"conf/{name}.yaml: {' '.join(str(error).split())}"
        return
    if not isinstance(content, DictConfig):
        yield f"conf/{name}.yaml: a list — write lines of key: value"
        return
    if name.startswith(("exp/", "local/")) and "@package _global_" not in path.read_text("utf-8"):
        yield f"conf/{name}.yaml: its keys would land in a section {name.split('/')[0]} — let its first line be # @package _global_"
    for default in content.pop("defaults", []):
        if isinstance(default, str):
            files[default.lstrip("/") if "/" in default else f"{Path(name).parent}/{default}"] = None
            continue
        for group, option in default.items():
            group = str(group).removeprefix("override ").removeprefix("optional ").lstrip("/")
            if group == "local" or group.startswith("hydra/") or option is None:
                continue
            if str(option) in choices(group):
                files[f"{group}/{option}"] = None
            else:
                valid = choices(group)
                yield f"conf/{name}.yaml: {group}: {option}: no such option{_nearest(str(option), valid)} (valid: {', '.join(valid)})"
    is_global = "/" not in name or name.startswith(("exp/", "local/"))
    prefix = "" if is_global else name.split("/")[0] + "."
    for key, value in _leaves(content):
        yield from _mismatch(f"conf/{name}.yaml", prefix + key, value)


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in map(str, node):
        value = node._get_node(key)
        if isinstance(value, DictConfig):
            yield from _leaves(value, f"{prefix}{key}.")
        elif not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            yield f"{prefix}{key}", OmegaConf.to_container(value) if isinstance(value, ListConfig) else node[key]


def _mismatch(where: str, key: str, value: Any) -> Iterator[str]:
    """One line if key is not in the schema, or value not of its type."""
    if key.replace("/", ".").split(".")[0] == "hydra":
        return
    kind: Any = Config
    for depth, part in enumerate(parts := key.split(".")):
        if not is_dataclass(kind):
            yield f"{where}: {'.'.join(parts[:depth])} is a single value and has no part {part!r}"
            return
        names = [item.name for item in fields(kind)]
        if part not in names:
            section = ".".join(parts[:depth])
            nearest = difflib.get_close_matches(part, names, n=1)
            hint = f" — did you mean {'.'.join([*parts[:depth], *nearest])}?" if nearest else ""
            yield f"{where}: {key}: no such key{hint} (valid{' in ' + section if section else ''}: {', '.join(names)})"
            return
        kind = get_type_hints(kind)[part]
    if is_dataclass(kind) and not isinstance(value, dict):
        yield f"{where}: {key} is a section, not a value — write {key}.KEY=..., KEY one of {', '.join(item.name for item in fields(kind))}"
    if value == "???" or is_dataclass(kind):
        return
    if key in _left_to_plan():
        yield from (f"{where}: {line}" for line in _wrong_word(key, value))
        return
    schema = OmegaConf.structured(Config)
    try:
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException:
        if isinstance(kind, type) and issubclass(kind, Enum):
            wanted = "one of " + ", ".join(member.name for member in kind)
        else:
            wanted = getattr(kind, "__name__", str(kind))
            words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list [a,b]"}
            wanted = words.get(wanted, str(kind))
        yield f"{where}: {key}: {value!r} is not {wanted}"


@cache
def _left_to_plan() -> dict[str, str]:
    """The settings that can be left to the plan, and how config.py calls the type of each."""
    groups = {item.name: getattr(Config(), item.name) for item in fields(Config)}
    return {
        f"{name}.{item.name}": str(item.type)
        for name, group in groups.items() if is_dataclass(group) for item in fields(group) if item.type in OR_AUTO
    }  # fmt: skip


def _number_or_auto(key: str, value: Any) -> Any:
    """A value of such a setting as the number or truth value that it says, or auto; raises OmegaConf's ValidationError for others."""
    node, _ = OR_AUTO[_left_to_plan()[key]]
    return AUTO if value == AUTO else node(value, is_optional=False)._value()


def _wrong_word(key: str, value: Any) -> Iterator[str]:
    """One line for anything else as the value of such a setting."""
    try:
        _number_or_auto(key, value)
    except OmegaConfBaseException:
        yield f"{key}: {value!r} is not {OR_AUTO[_left_to_plan()[key]][1]}, and not {AUTO}"


def _nearest(word: str, valid: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, valid, n=1)
    return f" — did you mean {found[0]}?" if found else ""

