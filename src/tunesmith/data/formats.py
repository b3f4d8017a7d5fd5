"""The other ways people write conversations, each turned into ChatGLM3's form, which alone is checked and rendered.

A record is told by its keys, so files of different origin can be mixed without saying which is which.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tunesmith.config import DataFormat

Record = dict[str, Any]

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


def as_conversation(record: Record, chosen: DataFormat, place: str) -> Record:
    """The record in ChatGLM3's form; raises ValueError with the place if it is of no known form."""
    found = detect(record) if chosen is DataFormat.auto else chosen
    if found is None:
        raise ValueError(
            f"{place}: no known format has the keys {', '.join(record) or '(none)'} — conversations or messages; instruction and output; "
            "prompt and response; or text"
        )
    return _READERS[found](record, place)


def _as_is(record: Record, place: str) -> Record:
    return record


def _sharegpt(record: Record, place: str) -> Record:
    messages = []
    for number, turn in enumerate(record.get("conversations", record.get("messages", [])), 1):
        source, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if source == "function_call":
            messages.append({"role": "assistant", "tool_calls": [_json(value, f"{place} turn {number}: function_call")]})
        elif source in SHAREGPT_ROLES:
            messages.append({"role": SHAREGPT_ROLES[source], "content": value})
        else:
            raise ValueError(f"{place} turn {number}: from {source!r} is unknown — one of {', '.join([*SHAREGPT_ROLES, 'function_call'])}")
        if isinstance(turn.get("loss"), bool):
            messages[-1]["loss"] = turn["loss"]
    if isinstance(record.get("system"), str) and record["system"]:
        messages.insert(0, {"role": "system", "content": record["system"]})
    tools = record.get("tools")
    if isinstance(tools, str) and tools:
        tools = _json(tools, f"{place}: tools")
    return {"conversations": messages, "tools": tools or None, "metadata": record.get("metadata")}


def _alpaca(record: Record, place: str) -> Record:
    messages: list[Record] = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{place}: history is a list of [question, answer] pairs")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n".join(text for text in (record.get("instruction"), record.get("input")) if text)
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": record.get("output")}]
    return {"conversations": messages, "metadata": record.get("metadata")}


def _prompt(record: Record, place: str) -> Record:
    answer = record.get("response", record.get("completion"))
    prompt = record.get("prompt")
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    # A list of messages as prompt is history: only what stands in the answer is trained.
    history = [{**message, "loss": False} if isinstance(message, dict) else message for message in before]
    return {"conversations": [*history, *after], "tools": record.get("tools"), "metadata": record.get("metadata")}


def _text(record: Record, place: str) -> Record:
    return {"conversations": [{"role": "text", "content": record.get("text")}], "metadata": record.get("metadata")}


def _json(text: Any, where: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg} at column {error.colno})") from None


_READERS: dict[DataFormat, Callable[[Record, str], Record]] = {
    DataFormat.chatglm3: _as_is,
    DataFormat.openai: _as_is,
    DataFormat.sharegpt: _sharegpt,
    DataFormat.alpaca: _alpaca,
    DataFormat.prompt: _prompt,
    DataFormat.text: _text,
}
