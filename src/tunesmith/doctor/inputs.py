"""python -m tunesmith.doctor.inputs: do the data's files begin as they should, and does the tokenizer have a template?

In a process of its own: a tokenizer needs transformers, and a file on a dead network disk never answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.compose import compose
from tunesmith.config import Config, Prepare, Refusal
from tunesmith.doctor.asking import answer_to, first_line
from tunesmith.doctor.findings import Finding, fail, ok, refused, warn


def look(order: Mapping[str, Any], tell: Callable[[Mapping[str, Any]], None]) -> None:
    """Tell findings about the data, the model's folder if its files are here, and findings about its template."""
    config = compose(order["words"])
    tell({"data": [asdict(finding) for finding in data_findings(config, order["words"])]})
    # Nothing is fetched here: what is not on this machine is not checked.
    os.environ.update(HF_HUB_OFFLINE="1", PIP_NO_INDEX="1")
    folder, findings = model_findings(config, order["words"])
    tell({"model": [asdict(finding) for finding in findings]})
    tell({"folder": str(folder)} if folder else {"origin": origin(config.model.path)})


def data_findings(config: Config, words: list[str]) -> Iterator[Finding]:
    """For each part: its files are there, and the first record of each source is a conversation."""
    from tunesmith.data.conversations import parse_conversation
    from tunesmith.data.files import HUB, Mistake, sources

    data, folder = config.data, Path(config.data.folder)
    check = f"tunesmith data check {' '.join(words)}"
    made = data.prepare is not Prepare.none
    if data.prepare is Prepare.smart_home and (absent := [name for name in ("hassil", "home_assistant_intents") if not find_spec(name)]):
        yield fail("data", f"data.prepare={data.prepare.value} needs {' and '.join(absent)}", "pip install 'tunesmith[demo]'")
        return
    for part in ("train", "dev", "test"):
        if not (spec := str(getattr(data, part))):
            continue
        if made and not (folder / spec).exists():
            yield ok("data", f"data.{part}={folder / spec}: not there yet, data.prepare={data.prepare.value} makes it when a run starts")
            continue
        try:
            for source in sources(spec, folder):
                if source.name.startswith(HUB):
                    if not find_spec("datasets"):
                        yield fail("data", f"data.{part}={source.name}: needs the package datasets", "pip install 'tunesmith[hub]'")
                    continue
                place, record = next(source.records(), ("", None))
                if not place:
                    yield fail("data", f"data.{part}={source.name}: has no record", f"put conversations into it, or leave data.{part} out")
                    continue
                turns = len(parse_conversation(record, place, data).turns)
                size_mib = sum(path.stat().st_size for path in source.paths) / 2**20
                files = f"{len(source.paths)} file{'s' * (len(source.paths) > 1)}"
                yield ok("data", f"data.{part}: {files}, {size_mib:.1f} MiB, the first conversation ({place}) has {turns} turns")
        except Mistake as mistake:
            fact, _, advice = str(mistake).partition(" — ")
            yield fail("data", f"data.{part}: {fact}", f"{advice}; {check} shows all" if advice else f"{check} shows all that is wrong")
        except Refusal as refusal:
            yield from refused("data", refusal)


def model_findings(config: Config, words: list[str]) -> tuple[Path | None, list[Finding]]:
    """The model's folder with all its files, or None; and whether its tokenizer can be read and has a template."""
    from tunesmith.model.source import AlreadyQuantised, check_source, model_folder

    path = config.model.path
    unknown = warn("template", f"model.path={path}: its files are not here yet, so tokenizer and template are not checked",
                   f"tunesmith data check {' '.join(words)} fetches them and checks all")  # fmt: skip
    try:
        check_source(config.model)
    except Refusal as refusal:
        return None, refused("model", refusal)
    if Path(path).is_file():  # reading a GGUF file means converting it, minutes that a run takes once
        return None, [unknown]
    try:
        folder = model_folder(config.model)
    except AlreadyQuantised as refusal:
        return None, refused("model", refusal)
    except Refusal:
        return None, [unknown]
    from tunesmith.data import Conversation, Turn
    from tunesmith.data.templates import renderer_for
    from tunesmith.model import load_tokenizer

    hello = Conversation((Turn("user", "hello"), Turn("assistant", "hello", loss=True)))
    complete = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    try:
        tokenizer = load_tokenizer(folder)
        renderer = renderer_for(tokenizer, config.data)
        targets = int(renderer.render(hello).targets.sum())  # a renderer looks for its special tokens when it needs them
    except Refusal as refusal:
        return folder if complete else None, refused("template", refusal)
    except Exception as error:  # a tokenizer of a kind that transformers cannot read, a chat template that breaks
        fact = f"{folder}: tokenizer or template cannot be used: {first_line(error)}"
        return folder if complete else None, [fail("template", fact, "fetch the model's files anew, or choose a data.template")]
    name = f"{type(renderer).__name__}, data.template={config.data.template} with the tokenizer in {folder}"
    if not targets:
        return folder if complete else None, [fail("template", f"{name}: nothing of an answer is learned", "choose another data.template")]
    finding = ok("template", f"{name}: {targets} tokens of the answer 'hello' are learned")
    return folder if complete else None, [finding]


def origin(path: str) -> list[str]:
    """Where a model that is not here comes from: pypi, package, version; hub, name; or file."""
    from tunesmith.model.source import HUB_ID, PYPI

    if found := PYPI.fullmatch(path):
        return ["pypi", found["package"], found["version"]]
    if Path(path).is_file():
        return ["file"]
    return ["hub", path] if HUB_ID.fullmatch(path) and not Path(path).exists() else []


if __name__ == "__main__":
    answer_to(look)
