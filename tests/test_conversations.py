"""Files to conversations: ChatGLM3's format in full, OpenAI's messages, and every mistake with its file, place and turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import read
from tests.test_templates import renderer
from tunesmith.config import Compat, Data, Policy, Refusal
from tunesmith.data.check import SHOWN
from tunesmith.data.conversations import Call, Conversation, Turn, parse_conversation
from tunesmith.data.files import Mistake
from tunesmith.data.parts import read_parts

# A busy machine is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi"}
CALL = {"role": "tool", "name": "track", "parameters": {"symbol": "10111"}}


def turns(*messages: Any) -> tuple[Turn, ...]:
    return parse_conversation({"conversations": list(messages)}, "f#0").turns


def mistake(*messages: Any) -> str:
    with pytest.raises(ValueError, match=r"^f#0") as error:
        turns(*messages)
    return str(error.value)


def refusal(path: Path) -> list[str]:
    data = Data(train=str(path), cache=str(path.parent / "cache"))
    try:
        return read_parts(data, renderer("chatml"))["train"].problems(data)
    except Refusal as refused:
        return str(refused).splitlines()


# --- ChatGLM3 ------------------------------------------------------------------------------------------------------


def test_the_example_of_chatglm3s_documentation() -> None:
    """Its README's stock example: tools, a tool turn with an observation, answers around it."""
    record = {
        "tools": [{"name": "track", "description": "Real-time price", "parameters": {"type": "object", "properties": {"symbol": {}}}}],
        "conversations": [
            {"role": "system", "content": "Answer as best you can."},
            {"role": "user", "content": "Price of 10111?"},
            {"role": "assistant", "content": "I look it up.", "loss": False},
            {"role": "tool", "name": "track", "parameters": {"symbol": "10111"}, "observation": {"price": 1234, "元": None}},
            {"role": "assistant", "content": "It is 1234."},
        ],
    }
    found = parse_conversation(record, "train.json#7")
    assert found == Conversation(
        (
            Turn("system", "Answer as best you can.", loss=False),
            Turn("user", "Price of 10111?", loss=False),
            Turn("assistant", "I look it up.", loss=False),
            Turn("assistant", call=Call("track", {"symbol": "10111"}), loss=True),
            Turn("observation", '{"price": 1234, "元": null}', loss=False),
            Turn("assistant", "It is 1234.", loss=True),
        ),
        record["tools"],
        {},
        "train.json#7",
    )


@pytest.mark.parametrize("tools", [["get the weather"], {"a": 1}, "any text", [{"name": "f", "parameters": {}}], 5, None, []])
def test_tools_are_any_json(tools: Any) -> None:
    assert parse_conversation({"tools": tools, "conversations": [USER, ANSWER]}, "f#0").tools == tools


def test_tools_may_be_absent() -> None:
    assert parse_conversation({"messages": [USER, ANSWER]}, "f#0").tools is None


def test_conversations_and_messages_are_the_same() -> None:
    assert parse_conversation({"messages": [USER, ANSWER]}, "p") == parse_conversation({"conversations": [USER, ANSWER]}, "p")


def test_a_tool_turn_without_an_observation_is_the_call_alone() -> None:
    assert turns(USER, CALL) == (Turn("user", "Hello"), Turn("assistant", call=Call("track", {"symbol": "10111"}), loss=True))
    assert turns(USER, {**CALL, "observation": None}) == turns(USER, CALL), "absent in another dress: a table fills with null"
    assert turns(USER, {"role": "tool", "name": "now"})[1].call == Call("now", {}), "a tool that takes nothing"


@pytest.mark.parametrize(
    ("observation", "text"), [("22 °C", "22 °C"), ({"t": "22 °C"}, '{"t": "22 °C"}'), ([1, None], "[1, null]"), (0, "0"), (False, "false")]
)
def test_observations_are_any_json(observation: Any, text: str) -> None:
    """Text as it is, all else as JSON with its characters kept; in a tool turn and in a turn of its own."""
    assert turns(USER, {**CALL, "observation": observation})[2] == Turn("observation", text)
    assert turns(USER, CALL, {"role": "observation", "content": observation})[2] == Turn("observation", text)


LOSSES = {
    # role: (message, trained by default)
    "system": ({"role": "system", "content": "Be kind."}, False),
    "user": (USER, False),
    "assistant": (ANSWER, True),
    "observation": ({"role": "observation", "content": "ok"}, False),  # ChatGLM3's README would train it; a model must not invent results
    "tool": (CALL, True),
}


@pytest.mark.parametrize(("message", "default"), LOSSES.values(), ids=LOSSES)
def test_loss_flags(message: dict[str, Any], default: bool) -> None:
    """Any role may carry one; null means the role's default."""
    order: dict[str, list[dict[str, Any]]] = {"system": [], "user": [], "assistant": [USER], "observation": [USER, CALL], "tool": [USER]}
    before = order[message["role"]]

    def loss(**flag: Any) -> bool:
        return turns(*before, {**message, **flag})[-1].loss

    assert loss() is default
    assert loss(loss=None) is default
    assert loss(loss=True) is True
    assert loss(loss=False) is False


@pytest.mark.parametrize("flag", [True, False, None])
def test_a_tool_turns_flag_is_its_calls_and_never_its_observations(flag: bool | None) -> None:
    _, call, observation = turns(USER, {**CALL, "observation": "ok", "loss": flag})
    assert (call.loss, observation.loss) == (flag is not False, False)


def test_what_a_table_filled_with_null_is_as_if_absent() -> None:
    """Rows that went through Arrow have every key of every message."""
    filled = {"name": None, "parameters": None, "observation": None, "loss": None, "tool_calls": None}
    assert turns({**filled, **USER}, {**filled, **ANSWER}) == turns(USER, ANSWER)
    assert turns({**filled, **USER}, {**filled, **CALL, "content": None}) == turns(USER, CALL)


def test_metadata_is_kept() -> None:
    assert parse_conversation({"conversations": [USER], "metadata": {"id": 7}}, "p").metadata == {"id": 7}
    assert parse_conversation({"conversations": [USER], "metadata": "x"}, "p").metadata == {}


def test_orders_that_are_right() -> None:
    system, observation = {"role": "system", "content": "s"}, {"role": "observation", "content": "o"}
    assert len(turns(system, system, USER, ANSWER, ANSWER, CALL, observation, observation, ANSWER, USER)) == 10
    assert len(turns(USER, {**CALL, "observation": "a"}, {**CALL, "observation": "b"}, ANSWER)) == 6


# --- OpenAI's messages ---------------------------------------------------------------------------------------------

OPENAI_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Łódź", "days": 2}'}}


def test_openai_tool_calls_and_answers() -> None:
    found = turns(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "22 °C"},
        ANSWER,
    )
    assert found[1:3] == (Turn("assistant", call=Call("weather", {"city": "Łódź", "days": 2}), loss=True), Turn("observation", "22 °C"))


def test_openai_answer_with_the_functions_name_is_an_observation() -> None:
    """Not a call of that name without parameters, which would train the model to make it."""
    named = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "22 °C"}
    assert turns(USER, {"role": "assistant", "tool_calls": [OPENAI_CALL]}, named)[2] == Turn("observation", "22 °C")


def test_openai_parallel_calls_and_objects_as_arguments() -> None:
    plain = {"function": {"name": "now", "arguments": {}}}
    found = turns(USER, {"role": "assistant", "content": "", "tool_calls": [OPENAI_CALL, plain]})
    assert [turn.call.name for turn in found if turn.call] == ["weather", "now"]


def test_openai_words_before_a_call_are_kept() -> None:
    found = turns(USER, {"role": "assistant", "content": "Let me see.", "tool_calls": [OPENAI_CALL], "loss": False})
    assert [(turn.content, turn.call is not None, turn.loss) for turn in found[1:]] == [("Let me see.", False, False), ("", True, False)]


# --- what is malformed, in a turn ----------------------------------------------------------------------------------

BAD_TURNS: dict[str, tuple[list[Any], str]] = {
    "no object": ([USER, "Hi"], "f#0 turn 2: role None is unknown — one of system, user, assistant, tool, observation"),
    "no role": ([{"content": "x"}], "f#0 turn 1: role None is unknown"),
    "unknown role": ([USER, {"role": "bot", "content": "x"}], "f#0 turn 2: role 'bot' is unknown"),
    "role no text": ([{"role": ["user"], "content": "x"}], "f#0 turn 1: role ['user'] is unknown"),
    "no content": ([USER, {"role": "assistant"}], "f#0 turn 2: the assistant turn has no content"),
    "empty content": ([{"role": "user", "content": ""}], "f#0 turn 1: the user turn has no content"),
    "content no text": (
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "f#0 turn 1: the user turn's content is a list — text",
    ),
    "loss a word": ([{**USER, "loss": "yes"}], "f#0 turn 1: loss is 'yes' — true or false"),
    "loss a number": ([{**USER, "loss": 0}], "f#0 turn 1: loss is 0 — true or false"),
    "tool without name or content": ([USER, {"role": "tool"}], "f#0 turn 2: the observation turn has no content and no `name`"),
    "tool's name no text": ([USER, {**CALL, "name": 7}], "f#0 turn 2: a tool turn's name is 7 — the tool's name as text"),
    "tool's name empty": ([USER, {**CALL, "name": ""}], "f#0 turn 2: a tool turn's name is ''"),
    "parameters a list": ([USER, {**CALL, "parameters": ["x"]}], "f#0 turn 2: parameters are a list — a JSON object"),
    "parameters text": ([USER, {**CALL, "parameters": "x=1"}], "f#0 turn 2: parameters are text — a JSON object"),
    "two users": ([USER, USER], "f#0 turn 2: two user turns in a row — join them"),
    "observation first": ([{"role": "observation", "content": "x"}], "f#0 turn 1: an observation without a call before it"),
    "observation after user": ([USER, {"role": "observation", "content": "x"}], "f#0 turn 2: an observation without a call before it"),
    "tool's answer after user": ([USER, {"role": "tool", "content": "x"}], "f#0 turn 2: an observation without a call before it"),
    "late system": (
        [USER, ANSWER, {"role": "system", "content": "x"}],
        "f#0 turn 3: a system turn after the first user turn — put it first",
    ),
    "arguments no JSON": (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}],
        "f#0 turn 2: arguments of the tool call are not JSON (",
    ),
    "arguments a list": (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
        "f#0 turn 2: a tool call needs function.name (text) and function.arguments (an object)",
    ),
    "call without name": ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], "f#0 turn 2: a tool call needs function.name"),
    "call no object": ([USER, {"role": "assistant", "tool_calls": ["f()"]}], "f#0 turn 2: a tool call is text — an object"),
    "function no object": ([USER, {"role": "assistant", "tool_calls": [{"function": "f"}]}], "f#0 turn 2: a tool call is text — an object"),
    "calls no list": (
        [USER, {"role": "assistant", "tool_calls": {"x": 1}}],
        "f#0 turn 2: tool_calls are an object in the assistant turn — a list",
    ),
    "calls a number": ([USER, {"role": "assistant", "tool_calls": 5}], "f#0 turn 2: tool_calls are 5 in the assistant turn — a list"),
    "calls of a user": (
        [{**USER, "tool_calls": [OPENAI_CALL]}],
        "f#0 turn 1: tool_calls are a list in the user turn — a list, in an assistant",
    ),
}


@pytest.mark.parametrize(("messages", "said"), BAD_TURNS.values(), ids=BAD_TURNS)
def test_a_malformed_turn_is_named(messages: list[Any], said: str) -> None:
    assert mistake(*messages).startswith(said)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([USER], "f#0: a conversation is a JSON object, this is a list"),
        ("x", "f#0: a conversation is a JSON object, this is text"),
        (None, "f#0: a conversation is a JSON object, this is null"),
        ({"conversation": [USER]}, "f#0: needs a non-empty list `conversations` (or `messages`); its keys are conversation"),
        ({"conversations": []}, "f#0: needs a non-empty list"),
        ({"conversations": "Hello"}, "f#0: needs a non-empty list"),
        ({}, "f#0: needs a non-empty list `conversations` (or `messages`); its keys are none"),
    ],
)
def test_a_malformed_record_is_named(record: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"^f#0: ") as error:
        parse_conversation(record, "f#0")
    assert str(error.value).startswith(said)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "observation"]) | JSON,
        "content": JSON,
        "loss": JSON,
        "name": JSON,
        "parameters": JSON,
        "observation": JSON,
        "tool_calls": JSON
        | st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": JSON, "arguments": JSON})}), max_size=2),
    },
)


@patient
@given(st.lists(MESSAGES | JSON, max_size=4))
def test_whatever_a_record_holds_it_is_read_or_refused_with_its_place(messages: list[Any]) -> None:
    """Never another exception, and what is read has only the four roles of the layout, with text as content."""
    try:
        found = parse_conversation({"conversations": messages}, "f#0")
    except ValueError as error:
        assert str(error).startswith("f#0")  # noqa: PT017 - either way is right
    else:
        assert {turn.role for turn in found.turns} <= {"system", "user", "assistant", "observation"}
        assert all(isinstance(turn.content, str) and isinstance(turn.loss, bool) for turn in found.turns)
        assert all(turn.role == "assistant" and isinstance(turn.call.parameters, dict) for turn in found.turns if turn.call)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_only_python_takes_for_json_is_a_mistake(constant: str, tmp_path: Path) -> None:
    """In a file, and in OpenAI's arguments, which are JSON in a text: a call with it could not be read back."""
    call = {"function": {"name": "f", "arguments": f'{{"a": {constant}}}'}}
    assert f"({constant} is no JSON)" in mistake(USER, {"role": "assistant", "tool_calls": [call]})
    (tmp_path / "a.jsonl").write_text(f'{{"conversations": [], "a": {constant}}}\n')
    assert f"({constant} is no JSON)" in refusal(tmp_path / "a.jsonl")[0]


# --- what may be kept, and rules that differ ------------------------------------------------------------------------

KEEPABLE = {
    "empty_content": [USER, {"role": "assistant", "content": ""}, ANSWER],
    "user_after_user": [USER, USER, ANSWER],
    "observation_without_call": [USER, {"role": "observation", "content": "12"}, ANSWER],
    "damaged_text": [{"role": "user", "content": "caf\ufffd"}, ANSWER],
}


@pytest.mark.parametrize("kind", KEEPABLE)
def test_what_is_kept_is_told_and_what_is_not_is_refused(kind: str) -> None:
    record, data = {"conversations": KEEPABLE[kind]}, Data()
    setattr(data.check, kind, Policy.keep)
    doubts: list[Mistake] = []
    assert len(parse_conversation(record, "f#0", data, doubts).turns) == len(KEEPABLE[kind])
    assert [doubt.kind for doubt in doubts] == [kind]
    assert str(doubts[0]).startswith("f#0 turn ")
    setattr(data.check, kind, Policy.fail)
    with pytest.raises(Mistake) as refused:
        parse_conversation(record, "f#0", data, [])
    assert refused.value.kind == kind


OBSERVED = [{**USER, "loss": True}, {**ANSWER, "loss": False}, {"role": "observation", "content": "12"}, ANSWER]


@pytest.mark.parametrize(
    ("compat", "learned"),
    [
        (Compat.tunesmith, [True, False, False, True]),
        (Compat.readme, [True, False, True, True]),
        (Compat.preprocess, [False, False, True, True]),
        (Compat.script, [False, True, True, True]),
    ],
)
def test_each_source_of_chatglm3_learns_other_turns(compat: Compat, learned: list[bool]) -> None:
    found = parse_conversation({"conversations": OBSERVED}, "f#0", Data(compat=compat))
    assert [turn.loss for turn in found.turns] == learned


@pytest.mark.parametrize("compat", Compat)
def test_an_answer_of_openais_tool_and_one_inside_a_tool_turn_are_never_learned_unasked(compat: Compat) -> None:
    asked = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    by_openai = parse_conversation({"messages": [USER, asked, {"role": "tool", "content": "12"}]}, "f#0", Data(compat=compat))
    by_chatglm3 = parse_conversation({"conversations": [USER, {**CALL, "observation": "12"}]}, "f#0", Data(compat=compat))
    assert not by_openai.turns[-1].loss
    assert not by_chatglm3.turns[-1].loss


# --- files ---------------------------------------------------------------------------------------------------------


def test_the_three_ways_of_writing_a_file_hold_the_same(tmp_path: Path) -> None:
    """A list, lines, and lines in a .json; ChatGLM3 takes all of them."""
    records = [{"conversations": [{"role": "user", "content": f"Grüße {i}"}, ANSWER]} for i in range(3)]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1), "utf-8")
    (tmp_path / "lines.jsonl").write_text(f"{lines}\n\n", "utf-8")
    (tmp_path / "lines.json").write_text(lines, "utf-8")
    as_list, as_lines, in_json = (read(tmp_path / name) for name in ("list.json", "lines.jsonl", "lines.json"))
    assert [c.turns for c in as_list] == [c.turns for c in as_lines] == [c.turns for c in in_json]
    assert [c.place for c in as_list] == [f"{tmp_path / 'list.json'}#{i}" for i in range(3)]
    assert [c.place for c in as_lines] == [f"{tmp_path / 'lines.jsonl'}:{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_characters_that_only_look_like_line_ends(character: str, tmp_path: Path) -> None:
    """JSON may hold them as they are (writers with ensure_ascii=False do so); only \\n ends a line of a .jsonl."""
    said = f"one{character}two"
    text = json.dumps({"conversations": [{"role": "user", "content": said}]}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{text}\n{text}\n", "utf-8")
    assert [c.turns[0].content for c in read(tmp_path / "a.jsonl")] == [said, said]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_windows_files(name: str, tmp_path: Path) -> None:
    """A byte order mark in front, \\r\\n at the ends of lines."""
    record = json.dumps({"conversations": [USER, ANSWER]})
    text = f"[{record},\r\n{record}]" if name == "a.json" else f"{record}\r\n{record}\r\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(read(tmp_path / name)) == 2


def test_a_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.json", "notes.txt"):
        (tmp_path / name).touch()
    (line,) = refusal(tmp_path / "trian.json")
    assert line == f"data.train={tmp_path / 'trian.json'}: no such file — the folder has dev.json, train.jsonl"
    (line,) = refusal(tmp_path / "nowhere" / "x.json")
    assert line.endswith(f"no such file — the folder {tmp_path / 'nowhere'} has no .json or .jsonl file")


@pytest.mark.parametrize("text", ["", "\n \n", "[]", " [ ] "])
def test_an_empty_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    assert refusal(tmp_path / "a.json") == [f"data.train={tmp_path / 'a.json'}: the file holds no conversation"]


def test_all_mistakes_of_a_file_are_told_by_line(tmp_path: Path) -> None:
    good, path = json.dumps({"conversations": [USER, ANSWER]}), tmp_path / "a.jsonl"
    path.write_text("\n".join([good, "{oops", "", json.dumps({"conversations": [USER, USER]}), "7", good]))
    not_json, two_users, number, advice = refusal(path)
    assert advice == "data.train: 1 broken_json, 1 user_after_user, 1 malformed — data.check.KIND=skip leaves such conversations out and counts them"
    assert not_json.startswith(f"{path}:2: not JSON (")
    assert "at column 2" in not_json
    assert two_users.startswith(f"{path}:4 turn 2: two user turns in a row")
    assert number == f"{path}:5: a conversation is a JSON object, this is 7"


def test_mistakes_of_a_list_are_told_by_index(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"conversations": [USER, ANSWER]}, {"conversations": [ANSWER, {"role": "x"}]}, None]))
    assert [line.split(": ")[0] for line in refusal(path)[:-1]] == [f"{path}#1 turn 2", f"{path}#2"]


def test_a_broken_list_is_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"conversations": []},\n{"conversations": [}\n]')
    line, _ = refusal(path)
    assert line.startswith(f"{path}:2: not JSON (")


def test_only_the_first_mistakes_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("oops\n" * (SHOWN + 5))
    lines = refusal(path)
    assert len(lines) == SHOWN + 2
    assert lines[-2] == "and 5 more"


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"conversations": "\xff"}]')
    assert refusal(path)[0] == f"{path}: byte 20 is not UTF-8 — save the file as UTF-8"
