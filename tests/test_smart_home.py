"""The smart-home data set: what training never shows, that texts have one target, and that hassil agrees."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hassil")
home_assistant_intents = pytest.importorskip("home_assistant_intents")

from hassil.intents import Intents, SlotList, TextSlotList  # noqa: E402
from hassil.recognize import recognize_all  # noqa: E402

from tunesmith.data import smart_home, smart_home_words  # noqa: E402

SIZES: dict[str, Any] = {"train": 250, "dev": 50, "test": 70}
SMALL: dict[str, Any] = {"language": "te", "train": 20, "dev": 5, "test": 5}
"""Telugu has twelve patterns only: quick to prepare."""

COPIED = ("area", "floor", "name", "item", "message", "search_query", "conversation_command")
"""Parameters whose values come from the word lists."""

Splits = dict[str, list[dict[str, Any]]]


def read(folder: Path) -> Splits:
    return {split: json.loads((folder / f"{split}.json").read_text(encoding="utf-8")) for split in SIZES}


def everything(splits: Splits) -> list[dict[str, Any]]:
    return [conversation for conversations in splits.values() for conversation in conversations]


def text_of(conversation: dict[str, Any]) -> str:
    return str(conversation["conversations"][0]["content"])


def call_of(conversation: dict[str, Any]) -> dict[str, Any]:
    call: dict[str, Any] = conversation["conversations"][1]
    return call


@pytest.fixture(scope="module")
def english_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("english") / "not" / "there" / "yet"
    smart_home.prepare(folder, **SIZES)
    return folder


@pytest.fixture(scope="module")
def english(english_folder: Path) -> Splits:
    return read(english_folder)


def test_every_split_has_its_size_and_format(english: Splits) -> None:
    assert {split: len(conversations) for split, conversations in english.items()} == SIZES
    for conversation in everything(english):
        user, tool = conversation["conversations"]
        assert user.keys() == {"role", "content"} and user["role"] == "user"
        assert tool.keys() == {"role", "name", "parameters"} and tool["role"] == "tool"
        assert conversation["metadata"]["intent"] == tool["name"]
        assert len(conversation["tools"]) == 42


def test_one_conversation_a_line(english_folder: Path, english: Splits) -> None:
    first, *lines, last = (english_folder / "dev.json").read_text(encoding="utf-8").splitlines()
    assert (first, last) == ("[", "]")
    assert [json.loads(line.rstrip(",")) for line in lines] == english["dev"]


def test_same_arguments_same_bytes(english_folder: Path, tmp_path: Path) -> None:
    smart_home.prepare(tmp_path, **SIZES)
    for name in ("train.json", "dev.json", "test.json", "prepared.json"):
        assert (tmp_path / name).read_bytes() == (english_folder / name).read_bytes()


def test_another_seed_is_other_data(english: Splits, tmp_path: Path) -> None:
    smart_home.prepare(tmp_path, **SIZES, seed=1)
    other = read(tmp_path)
    for split, conversations in english.items():
        assert {text_of(one) for one in other[split]} != {text_of(one) for one in conversations}


def test_prepared_tells_what_was_made(english_folder: Path, english: Splits) -> None:
    prepared = json.loads((english_folder / "prepared.json").read_text(encoding="utf-8"))
    assert prepared["counts"] == SIZES
    assert prepared["versions"].keys() == {"hassil", "home-assistant-intents"}
    for split in SIZES:
        assert prepared["sha256"][split] == hashlib.sha256((english_folder / f"{split}.json").read_bytes()).hexdigest()
        shown = {(one["metadata"]["intent"], one["metadata"]["pattern"]) for one in english[split]}
        assert 0 < len(shown) <= prepared["patterns"][split]
    assert not [path.name for path in english_folder.iterdir() if path.name.startswith(".")]


def test_dev_and_test_have_patterns_of_their_own(english: Splits) -> None:
    patterns = {split: {one["metadata"]["pattern"].casefold() for one in english[split]} for split in SIZES}
    assert not patterns["train"] & patterns["dev"]
    assert not patterns["train"] & patterns["test"]
    assert not patterns["dev"] & patterns["test"]


def test_a_template_of_two_intents_is_only_trained_on() -> None:
    data = {"sentences": ["do it", "do that", "go", "run"]}
    other = {"sentences": ["Do  it", "halt", "stop", "stay"]}
    intents = Intents.from_dict({"language": "en", "intents": {"A": {"data": [data]}, "B": {"data": [other]}}})
    for seed in range(20):
        splits = smart_home._split(smart_home._patterns(intents, []), str(seed))
        assert [pattern.template for pattern in splits["train"] if pattern.key == "do it"] == ["do it", "Do  it"]
        assert len(splits["test"]) == 2


def test_dev_and_test_have_names_of_their_own(english: Splits) -> None:
    def values(split: str) -> set[str]:
        found = [call_of(one)["parameters"].get(slot) for one in english[split] for slot in COPIED]
        return {value.casefold() for value in found if value is not None}

    assert len(values("train")) > 100
    assert len(values("dev")) > 20
    assert not values("train") & (values("dev") | values("test"))


@pytest.mark.parametrize("language", sorted(smart_home_words.WORDS))
def test_word_lists(language: str) -> None:
    train = smart_home_words.names(language, held_out=False)
    held_out = smart_home_words.names(language, held_out=True)
    assert train.keys() == held_out.keys() == smart_home_words.names("en", held_out=False).keys()
    assert min(len(names) for names in train.values()) >= 12
    assert min(len(names) for names in held_out.values()) >= 6
    for names in (*train.values(), *held_out.values()):
        assert len({name.casefold() for name in names}) == len(names)
        assert all(name == name.strip() and name for name in names)
    assert not {n.casefold() for names in train.values() for n in names} & {
        n.casefold() for names in held_out.values() for n in names
    }


def test_every_intent_is_trained_on(english: Splits) -> None:
    tools = {tool["name"] for tool in english["train"][0]["tools"]}
    assert {call_of(one)["name"] for one in english["train"]} == tools


def test_texts_are_clean_and_never_repeated(english: Splits) -> None:
    texts = [text_of(one) for one in everything(english)]
    for text in texts:
        assert text == " ".join(text.split()) != ""
        assert not set(text) & set("{}<>[]|()")
    assert len({text.casefold() for text in texts}) == len(texts)


def test_calls_keep_to_the_schemas(english: Splits) -> None:
    tools = english["train"][0]["tools"]
    assert all(conversation["tools"] == tools for conversation in everything(english))
    schemas = {tool["name"]: tool["parameters"]["properties"] for tool in tools}
    kinds: dict[str, tuple[type, ...]] = {"string": (str,), "number": (int, float)}
    for conversation in everything(english):
        call = call_of(conversation)
        for slot, value in call["parameters"].items():
            schema = schemas[call["name"]][slot]
            types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            assert any(isinstance(value, kinds[kind]) for kind in types)
            assert value in schema.get("enum", [value])
    assert schemas["HassLightSet"]["brightness"] == {"type": "number"}
    assert schemas["HassLightSet"]["color"]["enum"][:2] == ["black", "blue"]
    assert schemas["HassNevermind"] == {}


def test_names_are_copied_from_the_text(english: Splits) -> None:
    copied = 0
    for conversation in everything(english):
        for slot, value in call_of(conversation)["parameters"].items():
            if slot in COPIED:
                copied += 1
                assert value.casefold() in text_of(conversation).casefold()
    assert copied > 200


def test_numbers_are_whole_where_they_can_be(english: Splits) -> None:
    numbers = [
        value
        for conversation in everything(english)
        for value in call_of(conversation)["parameters"].values()
        if isinstance(value, int | float)
    ]
    assert len(numbers) > 100
    assert all(isinstance(number, int) or number != int(number) for number in numbers)


def test_hassil_hears_the_intent(english: Splits) -> None:
    data = home_assistant_intents.get_intents("en")
    intents = Intents.from_dict(data)
    words = [smart_home_words.names("en", held_out=held_out) for held_out in (False, True)]
    blocks = [block for intent in data["intents"].values() for block in intent["data"]]
    domains = sorted({domain for block in blocks for domain in block.get("requires_context", {}).get("domain", [])})
    lists: dict[str, SlotList] = {
        kind: TextSlotList.from_strings([name for names in words for name in names[kind]]) for kind in ("area", "floor")
    }
    lists["name"] = TextSlotList.from_tuples(
        (name, name, {"domain": domain}) for names in words for domain in domains for name in names.get(domain, [])
    )
    heard = []
    for conversation in english["train"][:30] + english["test"][:30]:
        results = recognize_all(
            text_of(conversation), intents, slot_lists=lists, intent_context={"area": "kitchen"}, language="en"
        )
        heard.append(call_of(conversation)["name"] in {result.intent.name for result in results})
    assert sum(heard) >= 0.95 * len(heard)


@pytest.mark.parametrize(("language", "letters"), [("de", "äöüß"), ("zh-CN", "打开的")])
def test_other_languages(language: str, letters: str, tmp_path: Path) -> None:
    prepared = smart_home.prepare(tmp_path, language=language, **SIZES)
    assert prepared["names_language"] == language
    assert prepared["counts"] == SIZES
    splits = read(tmp_path)
    texts = "\n".join(text_of(one) for one in splits["train"])
    assert all(letter in texts for letter in letters)
    assert "\\u" not in (tmp_path / "train.json").read_text(encoding="utf-8")
    assert {call_of(one)["name"] for one in splits["train"]} == {tool["name"] for tool in splits["train"][0]["tools"]}


def test_a_language_without_names_borrows_the_english_ones(tmp_path: Path) -> None:
    prepared = smart_home.prepare(tmp_path, language="sv", train=60, dev=5, test=5)
    assert prepared["names_language"] == "en"
    areas = {call_of(one)["parameters"].get("area") for one in read(tmp_path)["train"]}
    assert areas - {None} and areas - {None} <= set(smart_home_words.names("en", held_out=False)["area"])


def test_a_split_that_runs_dry_is_counted_as_it_is(tmp_path: Path) -> None:
    prepared = smart_home.prepare(tmp_path, language="mn", train=20, dev=10, test=10)
    assert prepared["patterns"]["dev"] == prepared["counts"]["dev"] == 0
    assert read(tmp_path)["dev"] == []
    assert len(read(tmp_path)["train"]) == prepared["counts"]["train"] == 20


def test_a_text_of_two_intents_is_dropped() -> None:
    intents = Intents.from_dict(
        {
            "language": "en",
            "intents": {
                "A": {"data": [{"sentences": ["go [now]"]}]},
                "B": {"data": [{"sentences": ["go (now|later)"]}]},
            },
        }
    )
    splits = smart_home._split(smart_home._patterns(intents, []), "0")
    samples, dropped = smart_home._sample_all(splits, {"train": 3, "dev": 0, "test": 0}, intents, "en", "0")
    assert {(one.text, one.pattern.intent) for one in samples["train"]} == {("go", "A"), ("go later", "B")}
    assert dropped["two_intents"] >= 2


def test_a_text_of_one_intent_keeps_its_first_parameters() -> None:
    block = {"slots": {"to": "on"}, "sentences": ["go"]}
    other = {"slots": {"to": "off"}, "sentences": ["[please] go"]}
    intents = Intents.from_dict({"language": "en", "intents": {"A": {"data": [block, other]}}})
    splits = smart_home._split(smart_home._patterns(intents, []), "0")
    samples, dropped = smart_home._sample_all(splits, {"train": 3, "dev": 0, "test": 0}, intents, "en", "0")
    assert sorted(one.text for one in samples["train"]) == ["go", "please go"]
    assert dropped["other_parameters"] > 0


def test_an_unknown_language_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no intents for the language 'tlh'; there are 65: af, .*zh-CN"):
        smart_home.prepare(tmp_path, language="tlh", **SIZES)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "home_assistant_intents", None)
    monkeypatch.delitem(sys.modules, "tunesmith.data.smart_home")
    with pytest.raises(ImportError, match=r"pip install 'tunesmith\[demo\]'"):
        importlib.import_module("tunesmith.data.smart_home")


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="negative"):
        smart_home.prepare(tmp_path, train=-1)


def test_a_second_call_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = smart_home.prepare(tmp_path, **SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(home_assistant_intents, "get_intents", lambda language: pytest.fail("prepared again"))
    assert smart_home.prepare(tmp_path, **SMALL) == first
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_other_arguments_are_prepared_again(tmp_path: Path) -> None:
    smart_home.prepare(tmp_path, **SMALL)
    assert smart_home.prepare(tmp_path, **{**SMALL, "train": 25})["counts"]["train"] == 25
    assert len(read(tmp_path)["train"]) == 25


def test_an_interrupted_preparation_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = smart_home._write

    def fail_at_test(path: Path, lines: Any) -> str:
        if path.name == "test.json":
            raise KeyboardInterrupt
        return write(path, lines)

    with monkeypatch.context() as patch:
        patch.setattr(smart_home, "_write", fail_at_test)
        with pytest.raises(KeyboardInterrupt):
            smart_home.prepare(tmp_path, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.json", "train.json"]
    (tmp_path / "train.json").write_text("[", encoding="utf-8")
    smart_home.prepare(tmp_path, **SMALL)
    assert {split: len(conversations) for split, conversations in read(tmp_path).items()} == {
        split: SMALL[split] for split in SIZES
    }


def test_a_mark_that_is_no_json_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "prepared.json").write_text("{", encoding="utf-8")
    assert smart_home.prepare(tmp_path, **SMALL)["counts"]["train"] == 20
    assert len(read(tmp_path)["train"]) == 20
