"""What a spec names: kinds of files, folders, globs, archives, tables, weights; and what becomes of conversations that are too long."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.conftest import read, tiny_conversations
from tests.test_templates import renderer
from tunesmith.compose import compose
from tunesmith.config import Config, Data, Overlong, Refusal
from tunesmith.data import load
from tunesmith.data.conversations import parse_conversation
from tunesmith.data.files import Mistake, sources
from tunesmith.data.parts import read_parts
from tunesmith.model import load_tokenizer

PAIR = {"prompt": "2 + 3 =", "response": "5"}


def texts(spec: str, folder: Path) -> list[str]:
    return [conversation.turns[0].content for conversation in read(spec, folder)]


def places(spec: str, folder: Path) -> list[str]:
    """Where each conversation of an epoch was read, weights included."""
    part = read_parts(Data(folder=str(folder), train=spec, cache=str(folder / "cache")), renderer("chatml"))["train"]
    return [example.place.removeprefix(f"{folder}/") for example in part.examples]


def write(path: Path, *prompts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps({"prompt": prompt, "response": "r"}) for prompt in prompts)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def test_folder_glob_archive_and_list(tmp_path: Path) -> None:
    write(tmp_path / "set/a.jsonl", "a")
    write(tmp_path / "set/b.jsonl.gz", "b1", "b2")
    write(tmp_path / "set/c.json", "c")
    (tmp_path / "set/notes.txt").write_text("not data")
    assert texts("set", tmp_path) == ["a", "b1", "b2", "c"]
    assert texts("set/*.jsonl", tmp_path) == ["a"]
    assert texts("set/c.json, set/a.jsonl", tmp_path) == ["c", "a"]
    with pytest.raises(Refusal, match=r"data\.train=.*notes\.txt: no file of this kind"):
        places("set/notes.txt", tmp_path)
    with pytest.raises(Refusal, match=r"no such file — the folder has a\.jsonl, b\.jsonl\.gz, c\.json"):
        texts("set/d.json", tmp_path)


def test_csv(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["instruction", "input", "output", "history"])
        rows.writerow(["Say, please", "", "A", json.dumps([["q", "a"]])])
        rows.writerow(["Line\nbreak", "x", "B", ""])
    found = read("t.csv", tmp_path)
    assert [turn.content for turn in found[0].turns] == ["q", "a", "Say, please", "A"]
    assert [turn.content for turn in found[1].turns] == ["Line\nbreak\nx", "B"]


def test_parquet(tmp_path: Path) -> None:
    """Nested columns, where every struct has the keys of all others, and columns of JSON in text."""
    records = [conversation | {"metadata": {"id": number}} for number, conversation in enumerate(tiny_conversations(6))]
    table = [json.loads(json.dumps(record)) for record in records]
    for record in table:
        for turn in record["conversations"]:
            if "observation" in turn:
                turn["observation"] = json.dumps(turn["observation"])
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "nested.parquet")
    parquet.write_table(
        pa.Table.from_pylist([{"conversations": json.dumps(record["conversations"]), "tools": ""} for record in records]), tmp_path / "text.parquet"
    )
    expected = [parse_conversation(record, "").turns for record in records]
    assert [conversation.turns for conversation in read("nested.parquet", tmp_path)] == expected
    assert [conversation.turns for conversation in read("text.parquet", tmp_path)] == expected
    assert [conversation.place for conversation in read("text.parquet", tmp_path)][5] == f"{tmp_path}/text.parquet#5"
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "text.parquet").read_bytes()[:-9])
    with pytest.raises(Refusal, match=r"broken\.parquet: cannot be read as Parquet \(.*\) — write the file anew"):
        texts("broken.parquet", tmp_path)


def test_weights_are_copies_and_a_fixed_subset(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a1", "a2")
    write(tmp_path / "b.jsonl", *(f"b{number}" for number in range(10)))
    first = places("a.jsonl*2,b.jsonl*0.5", tmp_path)
    assert first[:4] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:1", "a.jsonl:2"]
    assert len(first) == 9
    assert len(set(first[4:])) == 5
    assert places("a.jsonl*2,b.jsonl*0.5", tmp_path) == first
    with pytest.raises(Refusal, match="the weight is 0"):
        texts("a.jsonl*0", tmp_path)


def test_one_broken_line_of_many_is_one_finding(tmp_path: Path) -> None:
    lines = [json.dumps(PAIR).encode() for _ in range(1000)]
    lines[500] = b'{"prompt": "2'
    lines[700] = b'{"prompt": "\xff", "response": "x"}'
    lines[900] = b'{"prompt": "a\x00b", "response": "x"}'
    (tmp_path / "big.jsonl").write_bytes(b"\n".join(lines))
    found = list(sources("big.jsonl", tmp_path)[0].records())
    mistakes = [(record.kind, place.rpartition(":")[2]) for place, record in found if isinstance(record, Mistake)]
    assert mistakes == [("broken_json", "501"), ("not_utf8", "701"), ("nul", "901")]
    assert len(found) == 1000


def test_a_broken_archive_says_how_far_it_went(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl.gz", *("x" * 50 for _ in range(200)))
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(Mistake, match="the archive breaks off"):
        texts("a.jsonl.gz", tmp_path)


def test_hub_names_are_checked_before_any_network(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="write hub:OWNER/NAME"):
        sources("hub:nothing", tmp_path)


# --- too long ------------------------------------------------------------------------------------------------------


def long_dialogue(exchanges: int) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for number in range(exchanges):
        turns += [{"role": "user", "content": f"turn on light number {number}"}, {"role": "assistant", "content": f"light {number} is on"}]
    return {"conversations": turns}


@pytest.fixture
def long_config(tiny_model: Path, tmp_path: Path) -> Config:
    (tmp_path / "train.json").write_text(json.dumps([long_dialogue(1), long_dialogue(9), *tiny_conversations(2)]))
    words = ["name=t", "model=local", f"model.path={tiny_model}", "data=local", f"data.folder={tmp_path}", "data.train=train.json"]
    return compose([*words, "data.max_tokens=150"])


def test_error_names_the_longest(long_config: Config, tiny_model: Path) -> None:
    with pytest.raises(Refusal, match=r"1 of 4 conversations in data\.train are longer.*train\.json#1"):
        load(long_config, load_tokenizer(tiny_model))


def test_drop_counts(long_config: Config, tiny_model: Path) -> None:
    long_config.data.overlong = Overlong.drop
    dataset = load(long_config, load_tokenizer(tiny_model))
    assert len(dataset.train) == 3
    assert dataset.notes == ["data.overlong=drop: data.train, of 4 conversations 1 are left out, longer than data.max_tokens=150"]


def test_cut_keeps_system_newest_turns_and_stop_token(long_config: Config, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    long_config.data.overlong = Overlong.cut
    dataset = load(long_config, tokenizer)
    assert len(dataset.train) == 4
    example = dataset.train[1]
    assert len(example.ids) <= 150
    text = tokenizer.decode(example.ids.tolist(), skip_special_tokens=True)
    assert "Be brief." in text
    assert "light 8 is on" in text
    assert "light number 0" not in text
    stop = dataset.renderer.stop_ids[0]
    said = [i for i, token in enumerate(example.ids) if token == stop and example.targets[i]]
    assert len(said) == text.count(" is on"), "an answer lost its stop token"
    (note,) = dataset.notes
    assert "1 lost" in note
    # Longer by one more exchange than fits: nothing more than needed was cut.
    long_config.data.max_tokens = len(example.ids)
    assert len(load(long_config, tokenizer).train[1].ids) == len(example.ids)


def test_cut_that_leaves_no_target_is_left_out(long_config: Config, tiny_model: Path, tmp_path: Path) -> None:
    dialogue = long_dialogue(9)
    dialogue["conversations"][2]["loss"] = True
    for turn in dialogue["conversations"][4::2]:
        turn["loss"] = False
    (tmp_path / "train.json").write_text(json.dumps([long_dialogue(1), dialogue]))
    long_config.data.overlong = Overlong.cut
    dataset = load(long_config, load_tokenizer(tiny_model))
    assert len(dataset.train) == 1
    assert "1 are left out" in dataset.notes[0]


def test_nothing_left_is_refused(long_config: Config, tiny_model: Path) -> None:
    long_config.data.overlong, long_config.data.max_tokens = Overlong.drop, 5
    long_config.data.dev = "train.json"
    with pytest.raises(Refusal) as refused:
        load(long_config, load_tokenizer(tiny_model))
    lines = str(refused.value).splitlines()
    assert [line.split("no conversation of ")[1].split(" ")[0] for line in lines] == ["data.train", "data.dev"]
