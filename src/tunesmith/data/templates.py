"""From a conversation to tokens and targets, span by span, so that a mask never depends on finding text in text.

A template is a list of rules: which special tokens open and close a turn, and how a call is written. Special tokens are
put in by id; text is encoded with special tokens off, so no text of a user can become a role (injection-safe). The same
function makes the prompt at training and at inference.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.config import Data, Refusal, Template, ToolPrompt
from tunesmith.data.conversations import Call, Conversation, Turn


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]: ...
    def convert_tokens_to_ids(self, token: str) -> int: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Piece:
    """A run of tokens that are all targets or all not."""

    ids: tuple[int, ...]
    target: bool
    turn: int
    """Index of the turn it came from, -1 for the frame."""


class Renderer(ABC):
    """A template bound to a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, data: Data):
        self.tokenizer = tokenizer
        self.data = data
        self._vocabulary = tokenizer.get_vocab()

    @property
    @abstractmethod
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer at inference; the first is the one that training teaches."""

    @property
    def text_end(self) -> int:
        """The token that ends plain text."""
        return self.stop_ids[0]

    @abstractmethod
    def opening(self) -> tuple[int, ...]:
        """Tokens before the first turn."""

    @abstractmethod
    def header(self, role: str) -> tuple[int, ...]:
        """Tokens that open a turn of this role; for the assistant: the generation prompt."""

    @abstractmethod
    def turn(self, turn: Turn, index: int) -> list[Piece]:
        """One turn; what the model must say, its end token included, is the target when the turn has loss."""

    @abstractmethod
    def call_text(self, call: Call) -> str:
        """A call as the model writes it."""

    def tools_text(self, tools: Any) -> str:
        """The system text that offers tools."""
        shown = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        return f"You can call these tools:\n{shown}"

    def render(self, conversation: Conversation) -> list[Piece]:
        """The whole conversation as pieces, in order."""
        pieces = [Piece(self.opening(), False, -1)] if self.opening() else []
        if conversation.turns[0].role == "text":  # no header, nobody speaks
            (turn,) = conversation.turns
            return [*pieces, Piece((*self.encode(turn.content), self.text_end), turn.loss, 0)]
        turns = self._with_system(conversation)
        for index, turn in enumerate(turns):
            pieces += self.turn(turn, index)
        return pieces

    def prompt(self, conversation: Conversation) -> list[int]:
        """What the model reads before it answers: every turn given, then the assistant's header; plain text it just goes on with."""
        ids = [token for piece in self.render(conversation) for token in piece.ids]
        return ids[:-1] if conversation.turns[0].role == "text" else [*ids, *self.header("assistant")]

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def special(self, token: str) -> int:
        """Id of a special token; raises Refusal if the tokenizer lacks it."""
        if token not in self._vocabulary:
            raise Refusal(
                f"data.template={type(self).__name__.lower()}: the tokenizer has no token {token} — choose another data.template"
            )
        return self._vocabulary[token]

    def _with_system(self, conversation: Conversation) -> list[Turn]:
        turns = list(conversation.turns)
        if self.data.system and turns[0].role != "system":
            turns.insert(0, Turn("system", self.data.system))
        if conversation.tools and self.data.tools is ToolPrompt.full:
            turns.insert(0, Turn("system", self.tools_text(conversation.tools)))
        return turns


class ChatML(Renderer):
    """<|im_start|>role, newline, text, <|im_end|>, newline: SmolLM2, Qwen and many others."""

    start, end = "<|im_start|>", "<|im_end|>"

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.special(self.end),)

    def opening(self) -> tuple[int, ...]:
        return ()

    def header(self, role: str) -> tuple[int, ...]:
        return (self.special(self.start), *self.encode(f"{role}\n"))

    def turn(self, turn: Turn, index: int) -> list[Piece]:
        role = "tool" if turn.role == "observation" else turn.role
        said = self.encode(self.call_text(turn.call) if turn.call else turn.content)
        return [
            Piece(self.header(role), False, index),
            Piece((*said, self.special(self.end)), turn.loss, index),
            Piece(self.encode("\n"), False, index),
        ]

    def call_text(self, call: Call) -> str:
        if "<tool_call>" in self._vocabulary:  # Qwen and the Hermes family were trained on this form
            return f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': call.parameters}, ensure_ascii=False)}\n</tool_call>"
        return python_call(call)


class Llama3(Renderer):
    """<|start_header_id|>role<|end_header_id|>, two newlines, text, <|eot_id|>."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.special("<|eot_id|>"),)

    def opening(self) -> tuple[int, ...]:
        return (self.special("<|begin_of_text|>"),)

    def header(self, role: str) -> tuple[int, ...]:
        return (
            self.special("<|start_header_id|>"),
            *self.encode(role),
            self.special("<|end_header_id|>"),
            *self.encode("\n\n"),
        )

    def turn(self, turn: Turn, index: int) -> list[Piece]:
        role = "ipython" if turn.role == "observation" else turn.role
        said = self.encode(self.call_text(turn.call) if turn.call else turn.content)
        return [Piece(self.header(role), False, index), Piece((*said, self.special("<|eot_id|>")), turn.loss, index)]

    def call_text(self, call: Call) -> str:
        return f"[{python_call(call)}]"


class ChatGLM3(Renderer):
    """[gMASK] sop, then per turn: role id, metadata and newline, content; the next role id ends a turn.

    A position is a target if the token before it lies in a counted turn: the role id itself is not learned after
    someone else's turn, the role id that follows the answer (or the final eos) is, as it is what stops generation.
    """

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.special("<|user|>"), self.special("<|observation|>"), self.special("</s>"))

    @property
    def text_end(self) -> int:
        return self.special("</s>")

    def opening(self) -> tuple[int, ...]:
        return (self.special("[gMASK]"), self.special("sop"))

    def header(self, role: str) -> tuple[int, ...]:
        return (self.special(f"<|{role}|>"),)

    def turn(self, turn: Turn, index: int) -> list[Piece]:
        metadata, _, said = self.call_text(turn.call).partition("\n") if turn.call else ("", "", turn.content)
        return [Piece((*self.header(turn.role), *self.encode(f"{metadata}\n"), *self.encode(said)), turn.loss, index)]

    def render(self, conversation: Conversation) -> list[Piece]:
        if conversation.turns[0].role == "text":
            return super().render(conversation)  # no turn before it: its first token is a target too
        pieces = [*super().render(conversation), Piece((self.special("</s>"),), False, -1)]
        tokens = [(token, piece.target, piece.turn) for piece in pieces for token in piece.ids]
        before = [False, *(target for _, target, _ in tokens[:-1])]
        return [Piece((token,), target, turn) for (token, _, turn), target in zip(tokens, before, strict=True)]

    def prompt(self, conversation: Conversation) -> list[int]:
        if conversation.turns[0].role == "text":
            return super().prompt(conversation)
        return [*super().prompt(conversation)[:-2], self.special("<|assistant|>")]  # without the final eos

    def call_text(self, call: Call) -> str:
        return f"{call.name}\n```python\n{python_call(Call('tool_call', call.parameters))}\n```"

    def tools_text(self, tools: Any) -> str:
        shown = json.dumps(tools, ensure_ascii=False, indent=4)
        return f"Answer the following questions as best as you can. You have access to the following tools:\n{shown}"


RENDERERS: dict[Template, type[Renderer]] = {
    Template.chatml: ChatML,
    Template.llama3: Llama3,
    Template.chatglm3: ChatGLM3,
}


def renderer_for(tokenizer: Tokenizer, data: Data) -> Renderer:
    """The renderer that data.template names, or the one whose special tokens the tokenizer has; else raises Refusal."""
    chosen = data.template
    if chosen is Template.auto:
        vocabulary = tokenizer.get_vocab()
        marks = {"<|im_start|>": Template.chatml, "<|start_header_id|>": Template.llama3, "[gMASK]": Template.chatglm3}
        chosen = next((template for mark, template in marks.items() if mark in vocabulary), Template.auto)
    if chosen is Template.auto:
        raise Refusal(
            "data.template=auto: the tokenizer has the special tokens of none of the known templates — "
            f"name one: data.template={'|'.join(t.name for t in RENDERERS)}"
        )
    return RENDERERS[chosen](tokenizer, data)


def python_call(call: Call) -> str:
    """A call as Python writes it, name(key='value', ...); a name that cannot stand before = goes into a ** dictionary."""
    plain = [f"{key}={value!r}" for key, value in call.parameters.items() if _stands_alone(key)]
    other = {key: value for key, value in call.parameters.items() if not _stands_alone(key)}
    return f"{call.name}({', '.join([*plain, *([f'**{other!r}'] if other else [])])})"


def _stands_alone(key: str) -> bool:
    # `from` and `class` are common parameter names; Python's parser would also normalise what is not NFKC.
    return key.isidentifier() and not keyword.iskeyword(key) and unicodedata.is_normalized("NFKC", key)


def parse_call(text: str) -> Call | None:
    """Read a call back from what a model wrote in any of the forms above, literals only, nothing is executed; else None."""
    text = text.strip()
    if fenced := re.match(r"(?P<name>[^\n`]*)\n\s*```(?:python)?\n(?P<body>.*?)(?:\n```|$)", text, re.S):
        call = _python_form(fenced["body"].rstrip("`\n "))
        return Call(fenced["name"].strip(), call.parameters) if call and call.name == "tool_call" else call
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    if call := _python_form(text):
        return call
    return _json_form(text.partition("<tool_call>")[2].lstrip() or text)


def _python_form(text: str) -> Call | None:
    found = re.fullmatch(r"(?P<name>[\w.:/-]+)\((?P<arguments>.*)\)", text, re.S)
    if not found:
        return None
    parameters: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a stray backslash in what a model wrote
            # Under a name of our own: the tool's may be none that Python can read (get-weather).
            call = ast.parse(f"call({found['arguments']})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        for argument in call.keywords:
            value = ast.literal_eval(argument.value)
            parameters = {**parameters, **({argument.arg: value} if argument.arg else value)}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return Call(found["name"], parameters) if all(isinstance(key, str) for key in parameters) else None


def _json_form(text: str) -> Call | None:
    try:
        record, _ = json.JSONDecoder().raw_decode(text)  # what follows the object does not matter
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    name, parameters = record.get("name"), record.get("arguments", record.get("parameters", {}))
    return Call(name, parameters) if isinstance(name, str) and isinstance(parameters, dict) else None
