"""Prepared files: once, whole, noticed when the source changes; in processes or not, with tokens kept or not, the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.conftest import ROOT, environment, tiny_conversations
from tests.conftest import read as parsed
from tests.test_templates import renderer
from tunesmith.compose import compose
from tunesmith.config import Data, Policy, Refusal
from tunesmith.data import prepare, workers
from tunesmith.data.parts import Part, read_parts
from tunesmith.hardware import Machine
from tunesmith.plan import problems, shape_of


def settings(folder: Path, **words: Any) -> Data:
    return Data(**{"folder": str(folder), "train": "train.jsonl", "cache": str(folder / "cache"), "workers": 1, **words})


def write(path: Path, records: list[dict[str, Any]] | None = None) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records or tiny_conversations(40)))
    return path


def read(data: Data) -> dict[str, Part]:
    return read_parts(data, renderer("chatml"))


def contents(part: Part) -> list[tuple[str, list[int], list[bool]]]:
    return [(Path(e.place).name, e.ids.tolist(), e.targets.tolist()) for e in part.examples]


# --- once ----------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_what_was_rendered(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    part = read(settings(tmp_path))["train"]
    expected = [renderer("chatml").render(conversation) for conversation in parsed("train.jsonl", tmp_path)]
    assert len(part.examples) == part.read == 40
    for example, rendered in zip(part.examples, expected, strict=True):
        np.testing.assert_array_equal(example.ids, rendered.ids)
        np.testing.assert_array_equal(example.targets, rendered.targets)
    assert part.examples.computed.tolist() == [example.computed for example in part.examples]
    assert part.examples.target_counts.tolist() == [example.target_count for example in part.examples]
    assert part.examples[0].place == f"{tmp_path}/train.jsonl:1"


def test_a_second_start_does_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.jsonl")
    first = read(settings(tmp_path))["train"]
    monkeypatch.setattr(workers, "prepare_piece", None)
    second = read(settings(tmp_path))["train"]
    assert contents(second) == contents(first)
    assert second.digest == first.digest


def test_a_source_that_was_not_touched_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "train.jsonl")
    os.utime(file, (1e9, 1e9))
    monkeypatch.setattr(prepare.time, "time", lambda: file.stat().st_ctime + 10)  # older than the clock's grain
    read(settings(tmp_path))
    opened: list[str] = []
    open_file = Path.open

    def watched(path: Path, *words: Any, **more: Any) -> Any:
        opened.append(path.name)
        return open_file(path, *words, **more)

    monkeypatch.setattr(Path, "open", watched)
    assert len(read(settings(tmp_path))["train"].examples) == 40
    assert opened
    assert "train.jsonl" not in opened


def test_a_changed_source_is_noticed_whatever_its_times_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "train.jsonl")
    about = file.stat()
    monkeypatch.setattr(prepare.time, "time", lambda: about.st_ctime + 10)
    before = contents(read(settings(tmp_path))["train"])
    text = file.read_text()
    file.write_text(text.replace("turn on", "twist on", 1).replace("please ", "pleas ", 1) + " " * 0)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    after = contents(read(settings(tmp_path))["train"])
    assert after != before


@pytest.mark.parametrize("changed", [{"system": "Be brief."}, {"tools": "omit"}, {"max_tokens": 999}, {"template": "llama3"}])
def test_settings_that_change_tokens_prepare_anew(changed: dict[str, Any], tmp_path: Path) -> None:
    from tunesmith.config import ToolPrompt

    records = [{**record, "tools": [{"name": "f"}]} for record in tiny_conversations(3)]
    write(tmp_path / "train.jsonl", records)
    words = {**changed, **({"tools": ToolPrompt.omit} if "tools" in changed else {})}
    read(settings(tmp_path))
    count = len(list((tmp_path / "cache").glob("*/rows.arrow")))
    made = {name: value for name, value in words.items() if name in ("system", "tools")}
    read_parts(settings(tmp_path, **words), renderer(words.get("template", "chatml"), **made))
    assert len(list((tmp_path / "cache").glob("*/rows.arrow"))) == count + 1


def test_the_cache_may_be_unwritable(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(Refusal, match=r"^data\.cache=.*cannot keep the prepared tokens of .*train\.jsonl there .* — data\.cache=FOLDER"):
        read(settings(tmp_path))


# --- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of kilobytes are treated as others of gigabytes."""
    from tunesmith.data import files

    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(workers, "LARGE", 100)


@pytest.mark.usefixtures("small_pieces")
def test_processes_make_the_same(tmp_path: Path) -> None:
    records = [*tiny_conversations(60), {"conversations": [{"role": "x"}]}, *tiny_conversations(3)]
    write(tmp_path / "train.jsonl", records)
    alone = read(settings(tmp_path, cache=str(tmp_path / "one")))["train"]
    together = read(settings(tmp_path, workers=2, cache=str(tmp_path / "two")))["train"]
    assert contents(together) == contents(alone)
    assert together.digest == alone.digest
    assert together.findings.stored() == alone.findings.stored()
    assert together.statistics.stored() == alone.statistics.stored()
    assert [kind for kind, _ in together.findings.tallies] == ["unknown_role", "duplicate"]


PREPARES = """
import sys
from tests.test_prepare import read, settings
from pathlib import Path
from tunesmith.data import files, workers
files.CHUNK_BYTES, workers.LARGE = 20_000, 1000
print("begins", flush=True)
part = read(settings(Path(sys.argv[1]), workers=2))["train"]
print(len(part.examples), part.digest)
"""


def starting(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARES, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment({"PYTHONPATH": str(ROOT)}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_leaves_no_half_and_no_orphan(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", tiny_conversations(60_000))
    process = starting(tmp_path)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob(".*/rows.arrow")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    while len(children := psutil.Process(process.pid).children(recursive=True)) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((tmp_path / "cache").glob("[!.]*/rows.arrow")), "half of it has the name of the whole"
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    said, _ = starting(tmp_path).communicate(timeout=120)
    assert said.split()[1] == "60000"
    assert not list((tmp_path / "cache").glob(".*")), "what was left is cleared away"


def test_two_starts_at_once_prepare_once(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", tiny_conversations(3000))
    finished = [process.communicate(timeout=120) for process in [starting(tmp_path), starting(tmp_path)]]
    assert finished[0][0] == finished[1][0]
    assert sorted("preparing data.train" in errors for _, errors in finished) == [False, True]


# --- streaming -----------------------------------------------------------------------------------------------------


def test_streaming_gives_the_same_and_keeps_no_tokens(tmp_path: Path) -> None:
    records = [*tiny_conversations(40), {"messages": [{"role": "user", "content": "é\u2028 " * 30}, {"role": "assistant", "content": "元"}]}]
    text = "\n\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    stored, streamed = (read(settings(tmp_path, streaming=streaming))["train"] for streaming in (False, True))
    assert contents(streamed) == contents(stored)
    assert streamed.digest == stored.digest
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cache").glob("*/rows.arrow"))
    tokens = sum(len(example.ids) for example in stored.examples)
    assert sizes[1] - sizes[0] > 4 * tokens - 16 * len(records), "the smaller one holds no tokens"


@pytest.mark.parametrize("changed", ["kitchen->cellar!", "{->[", "all->"])
def test_streaming_notices_a_file_that_changes_while_a_run_goes_on(changed: str, tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl")
    examples = read(settings(tmp_path, streaming=True))["train"].examples
    assert len(examples[0].ids)
    old, _, new = changed.partition("->")
    file.write_text("" if old == "all" else file.read_text().replace(old, new))
    with pytest.raises(Refusal, match=rf"^{file}:1: the file has changed since this run began"):
        examples[0]


def test_a_source_that_cannot_be_read_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").symlink_to("/proc/self/mem")  # a regular file whose first bytes are an error of the device
    with pytest.raises(Refusal, match=r"^data\.train=.*train\.jsonl: cannot be read \("):
        read(settings(tmp_path))


def test_streaming_needs_lines(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(tiny_conversations(3)))
    with pytest.raises(Refusal, match=r"data\.streaming=true: only \.jsonl can be read at any place"):
        read(settings(tmp_path, train="train.json", streaming=True))


def test_streaming_cuts_as_before(tmp_path: Path) -> None:
    from tests.test_files import long_dialogue
    from tunesmith.config import Overlong

    write(tmp_path / "train.jsonl", [long_dialogue(1), long_dialogue(9)])
    words = {"max_tokens": 400, "overlong": Overlong.cut}
    stored, streamed = (read(settings(tmp_path, streaming=streaming, **words))["train"] for streaming in (False, True))
    assert contents(streamed) == contents(stored)
    assert [kind for kind, _ in streamed.findings.tallies] == ["overlong"]


# --- what is known already -----------------------------------------------------------------------------------------


def test_duplicates_are_kept_and_told_or_skipped(tmp_path: Path) -> None:
    made = tiny_conversations(5)
    write(tmp_path / "train.jsonl", [*made, made[1], made[3], made[1]])
    data = settings(tmp_path)
    part = read(data)["train"]
    assert len(part.examples) == 8
    (note,) = part.notes(data)
    assert note.startswith(f"data.check.duplicate=keep: data.train, of 8 conversations 3 are kept as they are (first: {tmp_path}/train.jsonl:6: equals")
    assert f"equals {tmp_path}/train.jsonl:2," in note
    data.check.duplicate = Policy.skip
    part = read(data)["train"]
    assert [example.place.rpartition(":")[2] for example in part.examples] == ["1", "2", "3", "4", "5"]
    data.check.duplicate = Policy.fail
    assert len(read(data)["train"].problems(data)) == 4


def test_what_is_trained_on_and_tested_too_is_refused(tmp_path: Path) -> None:
    made = tiny_conversations(6)
    write(tmp_path / "train.jsonl", made)
    write(tmp_path / "test.jsonl", made[4:])
    data = settings(tmp_path, test="test.jsonl")
    first, second, advice = read(data)["train"].problems(data)
    assert first.startswith(f"{tmp_path}/train.jsonl:5: is in data.test too")
    assert second.startswith(f"{tmp_path}/train.jsonl:6: ")
    assert advice.startswith("data.train: 2 leak — data.check.KIND=skip")
    data.check.leak = Policy.skip
    parts = read(data)
    assert len(parts["train"].examples) == 4
    assert len(parts["test"].examples) == 2, "what is tested stays whole"
    data.check.leak = Policy.keep
    assert len(read(data)["train"].examples) == 6


def test_overlap_of_thirteen_tokens_is_told(tmp_path: Path) -> None:
    said = "the quick brown fox jumps over the lazy dog and runs far away into the deep dark forest at night"
    other = "every good boy deserves fudge while seven hungry sailors sing beside an old lighthouse in the rain"
    ask = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]} for text in (said + " 1", other)]
    write(tmp_path / "train.jsonl", ask)
    write(tmp_path / "dev.jsonl", [{"messages": [{"role": "user", "content": f"{said} 2"}, {"role": "assistant", "content": "no"}]}])
    data = settings(tmp_path, dev="dev.jsonl")
    (note,) = read(data)["train"].notes(data)
    assert "data.check.overlap=keep: data.train, of 2 conversations 1 are kept" in note
    assert "of its runs of 13 tokens are in data.dev" in note


def test_tools_and_system_lines_are_no_overlap(tmp_path: Path) -> None:
    tools = [{"name": f"tool_{number}", "description": "what it does for the house"} for number in range(20)]
    said = {"train": "please switch off every lamp upstairs", "dev": "how warm is it going to be tomorrow"}
    for name, text in said.items():
        turns = [{"role": "system", "content": "You are the voice of a house, brief and friendly."}, {"role": "user", "content": text}]
        write(tmp_path / f"{name}.jsonl", [{"messages": [*turns, {"role": "assistant", "content": text[::-1]}], "tools": tools}])
    data = settings(tmp_path, dev="dev.jsonl", max_tokens=10**5)
    assert read(data)["train"].notes(data) == []


@pytest.mark.parametrize("policy", [Policy.fail, Policy.skip])
def test_each_kind_of_mistake_can_be_skipped_and_is_counted(policy: Policy, tmp_path: Path) -> None:
    good = json.dumps(tiny_conversations(1)[0]).encode()
    bad = {
        "broken_json": b'{"conversations": [',
        "not_utf8": b'{"prompt": "\xff", "response": "x"}',
        "nul": b'{"prompt": "a\x00b", "response": "x"}',
        "malformed": b'{"rows": 1}',
        "unknown_role": b'{"messages": [{"role": "x", "content": "y"}]}',
        "loss_not_boolean": b'{"messages": [{"role": "user", "content": "y", "loss": 1}]}',
        "tool_without_name": b'{"messages": [{"role": "user", "content": "y"}, {"role": "tool"}]}',
        "empty_content": b'{"messages": [{"role": "user", "content": ""}]}',
        "user_after_user": b'{"messages": [{"role": "user", "content": "y"}, {"role": "user", "content": "y"}]}',
        "observation_without_call": b'{"messages": [{"role": "observation", "content": "y"}]}',
        "no_target": b'{"messages": [{"role": "user", "content": "y"}]}',
    }
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([good, *bad.values(), good.replace(b"kitchen", b"cellar")]))
    data = settings(tmp_path)
    for kind in bad:
        setattr(data.check, kind, policy)
    part = read(data)["train"]
    assert part.read == len(bad) + 2
    assert [example.place.rpartition(":")[2] for example in part.examples] == ["1", str(len(bad) + 2)]
    assert {kind for kind, _ in part.findings.tallies} == set(bad)
    if policy is Policy.fail:
        assert len(part.problems(data)) == len(bad) + 1
    else:
        assert part.problems(data) == []
        assert [note.split(":")[0] for note in part.notes(data)] == [f"data.check.{kind}=skip" for kind, _ in part.findings.tallies]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data.check.broken_json=keep", "data.check.broken_json=keep: there is nothing that could be kept — type data.check.broken_json=skip"),
        ("data.check.leak=keep", ""),
        ("data.template=chatlm", "data.template=chatlm: unknown — type one of auto, own, chatml, llama3, chatglm3, or the path of a .jinja file"),
        ("data.template=nowhere.jinja", "data.template=nowhere.jinja: no such file — type its path, or one of auto, own, chatml, llama3, chatglm3"),
    ],
)
def test_the_plan_refuses_what_data_cannot_do(words: str, said: str) -> None:
    config = compose(["+exp=lora_cpu", words])
    found = problems(config, Machine(kind="cpu", cores=2, ram_gib=16), 1, shape_of("x/SmolLM2-135M"))
    assert "\n".join(line for line in found if line.startswith("data.")) == said
