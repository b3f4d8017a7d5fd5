"""From a file to conversations: ChatGLM3 and OpenAI-messages JSON, checked, each mistake with file, place and turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config import Refusal

ROLES = ("system", "user", "assistant", "tool", "observation")
SHOWN_MISTAKES = 20


@dataclass(frozen=True)
class Call:
    """A tool call: what the model is to produce, and what an evaluation compares."""

    name: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One message after expansion: a `tool` message becomes an assistant turn with a call and, if given, an observation."""

    role: str
    content: str = ""
    call: Call | None = None
    loss: bool = False
    """Whether what this turn says is a target."""


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    tools: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    """file:line, or file#index in a JSON list."""


def read_conversations(path: Path, setting: str) -> list[Conversation]:
    """All conversations of a .json (list) or .jsonl file.

    Raises Refusal naming `setting` if the file is missing or empty, else listing every malformed conversation by its place.
    """
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.json*")) if path.parent.is_dir() else []
        hint = (
            f"the folder has {', '.join(beside[:8])}"
            if beside
            else f"the folder {path.parent} has no .json or .jsonl file"
        )
        raise Refusal(f"{setting}={path}: no such file — {hint}")
    mistakes: list[str] = []
    conversations = []
    for place, record in _records(path, mistakes):
        try:
            conversations.append(parse_conversation(record, place))
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        more = [f"and {len(mistakes) - SHOWN_MISTAKES} more"] if len(mistakes) > SHOWN_MISTAKES else []
        raise Refusal("\n".join([*mistakes[:SHOWN_MISTAKES], *more]))
    if not conversations:
        raise Refusal(f"{setting}={path}: the file holds no conversation")
    return conversations


def parse_conversation(record: Any, place: str) -> Conversation:
    """Check one JSON object and expand it into turns; raises ValueError with place, turn and what to do."""
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a conversation is a JSON object, this is {_kind(record)}")
    messages = record.get("conversations", record.get("messages"))
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{place}: needs a non-empty list `conversations` (or `messages`); its keys are {', '.join(record) or 'none'}"
        )
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        turns.extend(_turns(message, f"{place} turn {number}", turns))
    metadata = record.get("metadata")
    return Conversation(tuple(turns), record.get("tools"), metadata if isinstance(metadata, dict) else {}, place)


def _turns(message: Any, where: str, before: list[Turn]) -> Iterator[Turn]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise ValueError(f"{where}: role {role!r} is unknown — one of {', '.join(ROLES)}")
    loss = message.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise ValueError(f"{where}: loss is {loss!r} — true or false")
    last = before[-1].role if before else None
    # OpenAI's answer of a tool may carry a name too; it has the answer as content, a call of ChatGLM3 has none.
    if role == "tool" and "name" in message and (message.get("parameters") is not None or not message.get("content")):
        name, parameters = message["name"], message.get("parameters", {})
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: a tool turn's name is {name!r} — the tool's name as text")
        if not isinstance(parameters, dict):
            raise ValueError(f"{where}: parameters are {_kind(parameters)} — a JSON object of name and value")
        yield Turn("assistant", call=Call(name, parameters), loss=loss is not False)
        if message.get("observation") is not None:
            yield Turn("observation", _text(message["observation"]))
        return
    if role == "tool":  # OpenAI's answer of a tool: what ChatGLM3 calls an observation
        role = "observation"
    content = message.get("content")
    if content is not None and not isinstance(content, str) and role != "observation":
        raise ValueError(f"{where}: the {role} turn's content is {_kind(content)} — text")
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise ValueError(f"{where}: tool_calls are {_kind(calls)} in the {role} turn — a list, in an assistant turn")
        if content:  # what was said before calling
            yield Turn("assistant", content, loss=loss is not False)
        yield from (Turn("assistant", call=_openai_call(call, where), loss=loss is not False) for call in calls)
        return
    if content is None or content == "":
        raise ValueError(
            f"{where}: the {role} turn has no content" + (" and no `name`" if message["role"] == "tool" else "")
        )
    if role == "user" and last == "user":
        raise ValueError(f"{where}: two user turns in a row — join them, or put the answer between them")
    if role == "observation" and (last not in ("assistant", "observation")):
        raise ValueError(f"{where}: an observation without a call before it")
    if role == "system" and any(turn.role == "user" for turn in before):
        raise ValueError(f"{where}: a system turn after the first user turn — put it first")
    # Observations are not trained by default: learning to invent a tool's result is never wanted. `loss: true` asks for it.
    trained = role == "assistant" if loss is None else loss
    yield Turn(role, _text(content), loss=trained)


def _openai_call(call: Any, where: str) -> Call:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ValueError(f"{where}: a tool call is {_kind(call if function is None else function)} — an object with name and arguments")
    name, arguments = function.get("name"), function.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: arguments of the tool call are not JSON ({error.msg})") from None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f"{where}: a tool call needs function.name (text) and function.arguments (an object)")
    return Call(name, arguments)


def _records(path: Path, mistakes: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text("utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        mistakes.append(f"{path}: byte {error.start} is not UTF-8 — save the file as UTF-8")
        return
    if path.suffix == ".jsonl" or not text.lstrip().startswith("["):
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON text may hold U+2028 as it is
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    mistakes.append(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})")
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        mistakes.append(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})")
        return
    yield from ((f"{path}#{index}", record) for index, record in enumerate(records))


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(type(value), repr(value))
