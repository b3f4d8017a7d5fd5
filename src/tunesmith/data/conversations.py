"""From a record to a conversation: every form as ChatGLM3's, checked, each mistake with file, place and turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tunesmith.config import Compat, Data, Policy
from tunesmith.data.files import Mistake, no_json
from tunesmith.data.formats import as_conversation

ROLES = ("system", "user", "assistant", "tool", "observation", "text")


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


def parse_conversation(record: Any, place: str, data: Data | None = None, doubts: list[Mistake] | None = None) -> Conversation:
    """Check one record and expand it into turns; raises Mistake (a ValueError) with place, turn and what to do.

    Mistakes that data.check keeps are not raised but added to `doubts`.
    """
    data = data or Data()
    if isinstance(record, Mistake):  # what could not even be read
        raise record
    if not isinstance(record, dict):
        raise Mistake("malformed", f"{place}: a conversation is a JSON object, this is {_kind(record)}")
    record, first = as_conversation(record, data.format, place)
    messages = record.get("conversations", record.get("messages"))
    if not isinstance(messages, list) or not messages:
        raise Mistake(
            "malformed",
            f"{place}: needs a non-empty list `conversations` (or `messages`); its keys are {', '.join(record) or 'none'}",
        )
    turns: list[Turn] = []
    for number, message in enumerate(messages, first):
        turns.extend(_turns(message, f"{place} turn {number}", turns, data, [] if doubts is None else doubts))
    metadata = record.get("metadata")
    return Conversation(tuple(turns), record.get("tools"), metadata if isinstance(metadata, dict) else {}, place)


def _turns(message: Any, where: str, before: list[Turn], data: Data, doubts: list[Mistake]) -> Iterator[Turn]:
    def doubt(kind: str, text: str) -> None:
        mistake = Mistake(kind, f"{where}: {text}")
        if getattr(data.check, kind) is not Policy.keep:
            raise mistake
        doubts.append(mistake)

    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise Mistake("unknown_role", f"{where}: role {role!r} is unknown — one of {', '.join(ROLES)}")
    message = {key: value for key, value in message.items() if value is not None}  # a table fills what is absent with null
    loss = message.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise Mistake("loss_not_boolean", f"{where}: loss is {loss!r} — true or false")
    last = before[-1].role if before else None
    if before and "text" in (role, last):
        raise Mistake("malformed", f"{where}: a text turn is a whole conversation — give the {role} turn a conversation of its own")
    # OpenAI's answer of a tool may carry a name too; it has the answer as content, a call of ChatGLM3 has none.
    if role == "tool" and "name" in message and ("parameters" in message or not message.get("content")):
        name, parameters = message["name"], message.get("parameters", {})
        if not isinstance(name, str) or not name:
            raise Mistake("tool_without_name", f"{where}: a tool turn's name is {name!r} — the tool's name as text")
        if not isinstance(parameters, dict):
            raise Mistake("malformed", f"{where}: parameters are {_kind(parameters)} — a JSON object of name and value")
        yield Turn("assistant", call=Call(name, parameters), loss=_learned("assistant", loss, data.compat))
        if "observation" in message:
            yield Turn("observation", _text(message["observation"]))
        return
    if role == "tool":  # OpenAI's answer of a tool: what ChatGLM3 calls an observation
        role = "observation"
    content = message.get("content")
    if content is not None and not isinstance(content, str) and role != "observation":
        raise Mistake("malformed", f"{where}: the {role} turn's content is {_kind(content)} — text")
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise Mistake("malformed", f"{where}: tool_calls are {_kind(calls)} in the {role} turn — a list, in an assistant turn")
        if content:  # what was said before calling
            yield Turn("assistant", content, loss=_learned("assistant", loss, data.compat))
        for call in calls:
            yield Turn("assistant", call=_openai_call(call, where), loss=_learned("assistant", loss, data.compat))
        return
    if content is None or content == "":
        if message["role"] == "tool":
            raise Mistake("tool_without_name", f"{where}: the {role} turn has no content and no `name` — name the tool that is called")
        doubt("empty_content", f"the {role} turn has no content — give it some, or take the turn out")
        content = ""
    if isinstance(content, str) and "\ufffd" in content:
        doubt("damaged_text", f"the {role} turn has the character U+FFFD where an encoding broke — restore the text from its source")
    if role == "user" and last == "user":
        doubt("user_after_user", "two user turns in a row — join them, or put the answer between them")
    if role == "observation" and (last not in ("assistant", "observation")):
        doubt("observation_without_call", "an observation without a call before it — put the call before it")
    if role == "system" and any(turn.role == "user" for turn in before):
        raise Mistake("malformed", f"{where}: a system turn after the first user turn — put it first")
    yield Turn(role, _text(content), loss=_learned(role, loss, data.compat, native=message["role"] == role))


def _learned(role: str, loss: bool | None, compat: Compat, native: bool = True) -> bool:
    """Whether a turn is learned, by its flag (None: absent) and the chosen rule; native: not OpenAI's answer of a tool."""
    if compat is Compat.script:  # never read the flag
        return role in ("assistant", "text") or (role == "observation" and native)
    if compat is Compat.preprocess and role in ("user", "system"):
        return False
    if loss is not None:
        return loss
    # Learning to invent a tool's result is never wanted, whatever the README says: `loss: true` asks for it, or data.compat.
    return role in ("assistant", "text") or (role == "observation" and native and compat is not Compat.tunesmith)


def _openai_call(call: Any, where: str) -> Call:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Mistake(
            "malformed", f"{where}: a tool call is {_kind(call if function is None else function)} — an object with name and arguments"
        )
    name, arguments = function.get("name"), function.get("arguments")
    arguments = {} if arguments is None else arguments
    try:
        arguments = json.loads(arguments, parse_constant=no_json) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise Mistake("malformed", f"{where}: arguments of the tool call are not JSON ({error})") from None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        kind = "malformed" if name and isinstance(name, str) else "tool_without_name"
        raise Mistake(kind, f"{where}: a tool call needs function.name (text) and function.arguments (an object)")
    return Call(name, arguments)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(type(value), repr(value))
