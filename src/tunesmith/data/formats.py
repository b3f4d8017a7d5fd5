"""The other ways people write conversations, each turned into ChatGLM3's form, which alone is checked and rendered.

A record is told by its keys, so files of different origin can be mixed without saying which is which.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from tunesmith.config import DataFormat
from tunesmith.data.files import Mistake

Record = dict[str, Any]


class Twin(NamedTuple):
    """A record in ChatGLM3's form."""

    record: Record
    first: int = 1
    """Number of its first turn: 0 where a system line, which is no turn in the file, was put in front."""


SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
    "system": "system", "observation": "observation", "tool": "observation", "function_response": "observation",
}  # fmt: skip


def detect(record: Record) -> DataFormat | None:
    """The format of a record by its keys; None if it is none of the known ones."""
    turns = record.get("conversations", record.get("messages"))
    if isinstance(turns, list):
        first = next((turn for turn in turns if isinstance(turn, dict)), {})
        if "from" in first:
            return DataFormat.sharegpt
        return DataFormat.openai if "messages" in record else DataFormat.chatglm3
    if "instruction" in record and "output" in record:
        return DataFormat.alpaca
    if "prompt" in record and ("response" in record or "completion" in record):
        return DataFormat.prompt
    if "text" in record:
        return DataFormat.text
    return None


def as_conversation(record: Record, chosen: DataFormat, place: str) -> Twin:
    """The record in ChatGLM3's form; raises Mistake with the place if it is of no known form or not of the chosen one."""
    record = {key: value for key, value in record.items() if value is not None}  # a table fills what is absent with null
    found = detect(record) if chosen is DataFormat.auto else chosen
    if found is None:
        raise Mistake(
            "malformed",
            f"{place}: needs a non-empty list `conversations` (or `messages`); its keys are {', '.join(record) or 'none'} — "
            "other forms have instruction and output; prompt and response; or text",
        )
    return _READERS[found](record, place)


def _as_is(record: Record, place: str) -> Twin:
    return Twin(record)


def _sharegpt(record: Record, place: str) -> Twin:
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list):
        return Twin(record)  # refused for the missing list, as ChatGLM3's form is
    messages: list[Record] = []
    for number, turn in enumerate(turns, 1):
        where = f"{place} turn {number}"
        source, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if source == "function_call":
            messages.append({"role": "assistant", "tool_calls": [_json(value, f"{where}: function_call")]})
        elif isinstance(source, str) and source in SHAREGPT_ROLES:
            # A tool's answer is an observation here; with the role `tool` it would have to be told from a call.
            messages.append({"role": SHAREGPT_ROLES[source], "content": value})
        else:
            raise Mistake("unknown_role", f"{where}: from {source!r} is unknown — one of {', '.join([*SHAREGPT_ROLES, 'function_call'])}")
        if "loss" in turn:
            messages[-1]["loss"] = turn["loss"]
    tools = record.get("tools")
    if isinstance(tools, str) and tools:
        tools = _json(tools, f"{place}: tools")
    return _with_system(record, messages, place, tools=tools or None)


def _alpaca(record: Record, place: str) -> Twin:
    messages: list[Record] = []
    history = record.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Mistake("malformed", f"{place}: history is no list of [question, answer] pairs — write [[question, answer], ...]")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = [record[key] for key in ("instruction", "input") if record.get(key)]
    if not all(isinstance(text, str) for text in asked):
        raise Mistake("malformed", f"{place} turn {len(messages) + 1}: instruction and input are {asked!r} — text")
    messages += [{"role": "user", "content": "\n".join(asked)}, {"role": "assistant", "content": record.get("output")}]
    return _with_system(record, messages, place)


def _prompt(record: Record, place: str) -> Twin:
    answer = record.get("response", record.get("completion"))
    prompt = record.get("prompt")
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    # A list of messages as prompt is history: only what stands in the answer is trained.
    history = [{**message, "loss": False} if isinstance(message, dict) else message for message in before]
    return _with_system(record, [*history, *after], place, tools=record.get("tools"))


def _text(record: Record, place: str) -> Twin:
    return Twin({"conversations": [{"role": "text", "content": record.get("text")}], "metadata": record.get("metadata")})


def _with_system(record: Record, messages: list[Record], place: str, tools: Any = None) -> Twin:
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise Mistake("malformed", f"{place}: system is {system!r} — text")
    before = [{"role": "system", "content": system}] if system else []
    return Twin({"conversations": [*before, *messages], "tools": tools, "metadata": record.get("metadata")}, 1 - len(before))


def _json(text: Any, where: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Mistake("malformed", f"{where} is not JSON ({error})") from None


_READERS: dict[DataFormat, Callable[[Record, str], Twin]] = {
    DataFormat.chatglm3: _as_is,
    DataFormat.openai: _as_is,
    DataFormat.sharegpt: _sharegpt,
    DataFormat.alpaca: _alpaca,
    DataFormat.prompt: _prompt,
    DataFormat.text: _text,
}
