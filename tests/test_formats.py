"""The other forms of a record: each is its ChatGLM3 twin, and what is trained on is what is read at inference."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.test_templates import every_form, flat, renderer, tokenizer
from tunesmith.config import Data, DataFormat
from tunesmith.data.conversations import Conversation, Turn, parse_conversation
from tunesmith.data.files import Mistake
from tunesmith.data.formats import detect

USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
TOOLS = [{"name": "weather", "parameters": {"type": "object"}}]
CALL = {"name": "weather", "arguments": {"city": "Łódź"}}
WITH_TOOL = {
    "tools": TOOLS,
    "conversations": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "tool", "name": "weather", "parameters": {"city": "Łódź"}, "observation": "22 °C"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ],
}
SHAREGPT = {
    "system": "Be brief.",
    "tools": json.dumps(TOOLS),
    "conversations": [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "22 °C"},
        {"from": "gpt", "value": "No."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}
OPENAI = {
    "tools": TOOLS,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "weather", "arguments": '{"city": "Łódź"}'}}]},
        {"role": "tool", "tool_call_id": "a", "content": "22 °C"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ],
}
ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "Be brief.", "history": [["Hello", "Hi"]]}

TWINS: dict[str, tuple[DataFormat, dict[str, Any], dict[str, Any]]] = {
    "chatglm3": (DataFormat.chatglm3, WITH_TOOL, WITH_TOOL),
    "openai": (DataFormat.openai, OPENAI, WITH_TOOL),
    "sharegpt": (DataFormat.sharegpt, SHAREGPT, WITH_TOOL),
    "sharegpt, other names": (
        DataFormat.sharegpt,
        {
            "messages": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "Hello"},
                {"from": "model", "value": "Hi", "loss": False},
            ]
        },
        {"conversations": [{"role": "system", "content": "s"}, USER, {**ANSWER, "loss": False}]},
    ),
    "alpaca": (
        DataFormat.alpaca,
        ALPACA,
        {
            "conversations": [
                {"role": "system", "content": "Be brief."},
                USER,
                ANSWER,
                {"role": "user", "content": "Add.\n1 + 1"},
                {"role": "assistant", "content": "2"},
            ]
        },
    ),
    "alpaca, no input": (DataFormat.alpaca, {"instruction": "Hello", "input": "", "output": "Hi"}, {"conversations": [USER, ANSWER]}),
    "prompt": (DataFormat.prompt, {"prompt": "Hello", "response": "Hi"}, {"conversations": [USER, ANSWER]}),
    "completion": (DataFormat.prompt, {"prompt": "Hello", "completion": "Hi", "metadata": {}}, {"conversations": [USER, ANSWER]}),
    "prompt of messages": (
        DataFormat.prompt,
        {"prompt": [USER, ANSWER, {"role": "user", "content": "Bye"}], "completion": [{"role": "assistant", "content": "Bye."}]},
        {
            "conversations": [
                USER,
                {**ANSWER, "loss": False},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "Bye."},
            ]
        },
    ),
    "text": (DataFormat.text, {"text": "Once."}, {"conversations": [{"role": "text", "content": "Once."}]}),
}
every_twin = pytest.mark.parametrize(("form", "record", "twin"), TWINS.values(), ids=TWINS)


@every_twin
def test_a_record_is_the_same_conversation_as_its_chatglm3_twin(form: DataFormat, record: dict[str, Any], twin: dict[str, Any]) -> None:
    expected = parse_conversation(twin, "f#0", Data(format=DataFormat.chatglm3))
    assert detect(record) is form
    assert parse_conversation(record, "f#0") == expected
    assert parse_conversation(record, "f#0", Data(format=form)) == expected, "named, not detected"
    filled = {**dict.fromkeys(("conversations", "messages", "instruction", "output", "prompt", "response", "completion", "text")), **record}
    assert parse_conversation(filled, "f#0") == expected, "what a table fills with null is as absent"


def test_every_format_has_a_twin() -> None:
    assert {form for form, _, _ in TWINS.values()} == set(DataFormat) - {DataFormat.auto}
    assert Data().format is DataFormat.auto


def test_alpaca_with_the_text_made_of_it_is_alpaca() -> None:
    """The original set has all four keys."""
    assert detect({"instruction": "a", "input": "", "output": "b", "text": "Below is an instruction ..."}) is DataFormat.alpaca
    assert detect({"conversations": "no list", "text": "x"}) is DataFormat.text
    assert detect({"question": "x"}) is None


MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown keys": (
        {"question": "x", "answer": "y"},
        "malformed",
        "f#0: needs a non-empty list `conversations` (or `messages`); its keys are question, answer — other forms have instruction and output",
    ),
    "null only": ({"text": None}, "malformed", "f#0: needs a non-empty list `conversations` (or `messages`); its keys are none"),
    "sharegpt, unknown": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "bot", "value": "y"}]},
        "unknown_role",
        "f#0 turn 2: from 'bot' is unknown — one of human,",
    ),
    "sharegpt, no name": ({"conversations": [{"from": ["human"], "value": "x"}]}, "unknown_role", "f#0 turn 1: from ['human'] is unknown"),
    "sharegpt, no object": ({"conversations": [{"from": "human", "value": "x"}, "y"]}, "unknown_role", "f#0 turn 2: from None is unknown"),
    "sharegpt, two users": (
        {"conversations": [{"from": "human", "value": "x"}] * 2},
        "user_after_user",
        "f#0 turn 2: two user turns in a row",
    ),
    "sharegpt, numbered as in the file": (
        {"system": "s", "conversations": [{"from": "human", "value": "x"}] * 2},
        "user_after_user",
        "f#0 turn 2: two user turns",
    ),
    "sharegpt, empty": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}]},
        "empty_content",
        "f#0 turn 2: the assistant turn has no content",
    ),
    "sharegpt, loss": ({"conversations": [{"from": "human", "value": "x", "loss": 1}]}, "loss_not_boolean", "f#0 turn 1: loss is 1"),
    "sharegpt, call": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "weather()"}]},
        "malformed",
        "f#0 turn 2: function_call is not JSON (Expecting value",
    ),
    "sharegpt, call without name": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{}"}]},
        "tool_without_name",
        "f#0 turn 2: a tool call needs function.name",
    ),
    "sharegpt, tools": ({"tools": "[", "conversations": [{"from": "human", "value": "x"}]}, "malformed", "f#0: tools is not JSON ("),
    "alpaca, no output": ({"instruction": "x", "output": ""}, "empty_content", "f#0 turn 2: the assistant turn has no content"),
    "alpaca, nothing asked": ({"instruction": "", "output": "y"}, "empty_content", "f#0 turn 1: the user turn has no content"),
    "alpaca, history": (
        {"instruction": "x", "output": "y", "history": ["a", "b"]},
        "malformed",
        "f#0: history is no list of [question, answer] pairs",
    ),
    "alpaca, history no list": ({"instruction": "x", "output": "y", "history": 5}, "malformed", "f#0: history is no list"),
    "alpaca, instruction": ({"instruction": ["x"], "output": "y"}, "malformed", "f#0 turn 1: instruction and input are [['x']] — text"),
    "alpaca, system": ({"instruction": "x", "output": "y", "system": 3}, "malformed", "f#0: system is 3 — text"),
    "prompt, number": ({"prompt": 5, "response": "y"}, "malformed", "f#0 turn 1: the user turn's content is 5 — text"),
    "prompt, no object": ({"prompt": ["x"], "response": "y"}, "unknown_role", "f#0 turn 1: role None is unknown"),
    "text, empty": ({"text": ""}, "empty_content", "f#0 turn 1: the text turn has no content"),
    "text, number": ({"text": 5}, "malformed", "f#0 turn 1: the text turn's content is 5 — text"),
    "text after a turn": (
        {"conversations": [USER, {"role": "text", "content": "x"}]},
        "malformed",
        "f#0 turn 2: a text turn is a whole conversation",
    ),
    "a turn after text": (
        {"conversations": [{"role": "text", "content": "x"}, USER]},
        "malformed",
        "f#0 turn 2: a text turn is a whole conversation",
    ),
}


@pytest.mark.parametrize(("record", "kind", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_with_its_place_and_turn(record: dict[str, Any], kind: str, said: str) -> None:
    with pytest.raises(Mistake) as error:
        parse_conversation(record, "f#0")
    assert str(error.value).startswith(said)
    assert error.value.kind == kind


@pytest.mark.parametrize("form", DataFormat)
@pytest.mark.parametrize("record", [{}, {"conversations": None}, {"conversations": 5}, {"messages": {}}, {"prompt": {}}, {"history": 1}])
def test_whatever_is_named_a_format_it_is_refused_not_a_crash(form: DataFormat, record: dict[str, Any]) -> None:
    with pytest.raises(Mistake, match=r"^f#0"):
        parse_conversation(record, "f#0", Data(format=form))


# --- rendering -----------------------------------------------------------------------------------------------------


@every_form
def test_plain_text_is_its_tokens_and_a_stop_token_all_targets(form: str) -> None:
    made = renderer(form, system="s")  # nobody speaks: no system turn either
    ids, targets = flat(made, Turn("text", "hi user", loss=True))
    opening, text = list(made.opening()), list(made.encode("hi user"))
    end = tokenizer(form).convert_tokens_to_ids({"llama3": "<|eot_id|>", "chatglm3": "</s>"}.get(form, "<|im_end|>"))
    assert ids == [*opening, *text, end]
    assert targets == [False] * len(opening) + [True] * (len(text) + 1)
    assert end in made.stop_ids


@every_form
def test_plain_text_may_be_shown_without_being_learned(form: str) -> None:
    parsed = parse_conversation({"conversations": [{"role": "text", "content": "hi", "loss": False}]}, "f#0")
    assert not any(flat(renderer(form), *parsed.turns)[1])


@every_form
@pytest.mark.parametrize("record", [record for _, record, _ in TWINS.values()], ids=TWINS)
def test_the_prompt_is_the_beginning_of_the_training_text(form: str, record: dict[str, Any]) -> None:
    """For each way of writing: up to each answer, train text is inference text."""
    made, conversation = renderer(form), parse_conversation(record, "f#0")
    ids, targets = flat(made, *conversation.turns, tools=conversation.tools)
    answers = [number for number, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    for number in answers:
        asked = made.prompt(Conversation(conversation.turns[:number], conversation.tools))
        assert ids[: len(asked)] == asked
        assert targets[len(asked)] is conversation.turns[number].loss
    if not answers:
        asked = made.prompt(conversation)
        assert [*asked, made.text_end] == ids


def test_the_data_page_shows_each_format_once() -> None:
    page = (ROOT / "docs/data.md").read_text("utf-8")
    lines = [line for block in re.findall(r"^```jsonl\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()]
    shown = [json.loads(line) for line in lines]
    for record in shown:
        assert parse_conversation(record, "docs/data.md").turns
    assert [detect(record) for record in shown] == [
        DataFormat.sharegpt,
        DataFormat.alpaca,
        DataFormat.prompt,
        DataFormat.prompt,
        DataFormat.text,
    ]
