"""From a conversation to tokens and targets, span by span, so that a mask never depends on finding text in text.

A template is a list of rules: which special tokens open and close a turn, and how a call is written. Special tokens are
put in by id; text is encoded with special tokens off, so no text of a user can become a role (injection-safe). The same
function makes the prompt at training and at inference. A model's own template is read in chat_template.py.
"""

from __future__ import annotations

import ast
import hashlib
import json
import keyword
import re
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tunesmith.config import Data, Refusal, ToolPrompt
from tunesmith.data.conversations import Call, Conversation, Turn
from tunesmith.data.tokens import Encoder, Part
from tunesmith.data.tokens import Tokenizer as Tokenizer


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation as tokens."""

    ids: np.ndarray
    """Token ids, int32 [tokens]."""
    targets: np.ndarray
    """What the model must say, bool [tokens]."""
    turns: np.ndarray
    """Index into `said` of the turn a token came from, -1 for the frame, int16 [tokens]."""
    said: tuple[Turn, ...]
    """The turns as rendered, with the system lines that were put in."""
    unstopped: int | None
    """Index into `said` of the first turn with loss whose stop token is not a target; None: all are."""


class Layout(NamedTuple):
    """A conversation as a template lays it out, before anything is encoded."""

    parts: list[Part]
    said: tuple[Turn, ...]
    unstopped: int | None = None
    is_late: bool = False
    """Whether the token after a learned one is the target, instead of it."""


class Renderer(ABC):
    """A template bound to a tokenizer; it can be pickled, and needs neither torch nor transformers where it is read."""

    def __init__(self, tokenizer: Tokenizer, data: Data, control: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.data = data
        self.encoder = Encoder(tokenizer, control)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "tokenizer": self.encoder.tokenizer}
        state.pop("_vocabulary", None)
        return state

    @property
    @abstractmethod
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer at inference; the first is the one that training teaches."""

    @property
    def text_end(self) -> int:
        """The token that ends plain text."""
        return self.stop_ids[0]

    @property
    def key(self) -> str:
        """A hash of all that the tokens of a conversation depend on besides the conversation and this code."""
        parts = [type(self).__name__, *self._own_key(), self.data.tools.name, self.data.system, self.encoder.digest]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _own_key(self) -> list[Any]:
        return []

    def opening(self) -> tuple[int, ...]:
        """Tokens before the first turn, and before plain text."""
        return ()

    @abstractmethod
    def header(self, role: str) -> tuple[int, ...]:
        """Tokens that open a turn of this role; for the assistant: the generation prompt."""

    @abstractmethod
    def lay_out(self, conversation: Conversation, ask: bool) -> Layout:
        """All turns of a dialogue; what the model must say, the end token included, is learned when its turn has loss.

        ask: end with what the model reads before it answers.
        """

    def call_text(self, call: Call) -> str:
        """A call as the model writes it."""
        if "<tool_call>" in self._vocabulary:  # Qwen and the Hermes family were trained on this form
            return f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': call.parameters}, ensure_ascii=False)}\n</tool_call>"
        return python_call(call)

    def tools_text(self, tools: Any) -> str:
        """The system text that offers tools."""
        shown = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        return f"You can call these tools:\n{shown}"

    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation as tokens."""
        return self.render_all([conversation])[0]

    def render_all(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """Each conversation as tokens; many at once are encoded much faster than one by one."""
        layouts = [self._layout(conversation) for conversation in conversations]
        found = iter(self.encoder.tokens([part.content for layout in layouts for part in layout.parts]))
        return [_rendered(layout, list(islice(found, len(layout.parts)))) for layout in layouts]

    def prompt(self, conversation: Conversation) -> list[int]:
        """What the model reads before it answers: every turn given, then the assistant's header; plain text it just goes on with."""
        layout = self._layout(conversation, ask=True)
        ids: list[int] = np.concatenate(self.encoder.tokens([part.content for part in layout.parts])).tolist()
        return ids

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text in which nothing is a special token."""
        return tuple(self.encoder.tokens([text])[0].tolist())

    def special(self, token: str) -> int:
        """Id of a special token; raises Refusal if the tokenizer lacks it."""
        if token not in self._vocabulary:
            raise Refusal(
                f"data.template={type(self).__name__.lower()}: the tokenizer has no token {token} — choose another data.template"
            )
        return self._vocabulary[token]

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    def _layout(self, conversation: Conversation, ask: bool = False) -> Layout:
        turn = conversation.turns[0]
        if turn.role != "text":
            return self.lay_out(conversation, ask)
        # No header, no system line: nobody speaks.
        parts = [Part(_array(self.opening()), -1, False), Part(turn.content, 0, turn.loss)]
        return Layout(parts if ask else [*parts, Part(_array([self.text_end]), 0, turn.loss)], conversation.turns)


def _rendered(layout: Layout, tokens: Sequence[np.ndarray]) -> Rendered:
    lengths = [len(ids) for ids in tokens]
    learned = np.repeat(np.array([part.learned for part in layout.parts]), lengths)
    turns = np.repeat(np.array([part.turn for part in layout.parts], np.int16), lengths)
    targets = np.concatenate([[False], learned[:-1]]) if layout.is_late else learned
    return Rendered(np.concatenate(tokens), targets, turns, layout.said, layout.unstopped)


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)


class RoleTemplate(Renderer):
    """A template in which a turn's tokens depend on that turn alone."""

    marks: ClassVar[tuple[str, ...]]
    """Its special tokens."""

    def __init__(self, tokenizer: Tokenizer, data: Data):
        super().__init__(tokenizer, data, self.marks)

    @abstractmethod
    def turn(self, turn: Turn, index: int) -> list[Part]:
        """One turn."""

    def lay_out(self, conversation: Conversation, ask: bool) -> Layout:
        said = self._with_system(conversation)
        parts = [Part(self._opening, -1, False)]
        for index, turn in enumerate(said):
            parts += self.turn(turn, index)
        return Layout([*parts, Part(self._header("assistant"), len(said), False)] if ask else parts, said)

    @cached_property
    def _opening(self) -> np.ndarray:
        return _array(self.opening())

    @cached_property
    def _end(self) -> np.ndarray:
        return _array(self.stop_ids[:1])

    @cached_property
    def _headers(self) -> dict[str, np.ndarray]:
        return {}

    def _header(self, role: str) -> np.ndarray:
        if role not in self._headers:
            self._headers[role] = _array(self.header(role))
        return self._headers[role]

    def _with_system(self, conversation: Conversation) -> tuple[Turn, ...]:
        turns = conversation.turns
        if self.data.system and turns[0].role != "system":
            turns = (Turn("system", self.data.system), *turns)
        if conversation.tools and self.data.tools is ToolPrompt.full:
            turns = (Turn("system", self.tools_text(conversation.tools)), *turns)
        return turns


class ChatML(RoleTemplate):
    """<|im_start|>role, newline, text, <|im_end|>, newline: SmolLM2, Qwen and many others."""

    marks = start, end = ("<|im_start|>", "<|im_end|>")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.special(self.end),)

    def header(self, role: str) -> tuple[int, ...]:
        return (self.special(self.start), *self.encode(f"{role}\n"))

    def turn(self, turn: Turn, index: int) -> list[Part]:
        role = "tool" if turn.role == "observation" else turn.role
        return [
            Part(self._header(role), index, False),
            Part(self.call_text(turn.call) if turn.call else turn.content, index, turn.loss),
            Part(self._end, index, turn.loss),
            Part("\n", index, False),
        ]


class Llama3(RoleTemplate):
    """<|start_header_id|>role<|end_header_id|>, two newlines, text, <|eot_id|>."""

    marks = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

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

    def turn(self, turn: Turn, index: int) -> list[Part]:
        role = "ipython" if turn.role == "observation" else turn.role
        return [
            Part(self._header(role), index, False),
            Part(self.call_text(turn.call) if turn.call else turn.content, index, turn.loss),
            Part(self._end, index, turn.loss),
        ]

    def call_text(self, call: Call) -> str:
        return f"[{python_call(call)}]"


class ChatGLM3(RoleTemplate):
    """[gMASK] sop, then per turn: role id, metadata and newline, content; the next role id ends a turn.

    A position is a target if the token before it lies in a counted turn: the role id itself is not learned after
    someone else's turn, the role id that follows the answer (or the final eos) is, as it is what stops generation.
    """

    marks = ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "</s>")

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

    def turn(self, turn: Turn, index: int) -> list[Part]:
        metadata, _, said = self.call_text(turn.call).partition("\n") if turn.call else ("", "", turn.content)
        contents = (self._header(turn.role), f"{metadata}\n", said)
        return [Part(content, index, turn.loss) for content in contents]

    def lay_out(self, conversation: Conversation, ask: bool) -> Layout:
        layout = super().lay_out(conversation, ask)
        parts = layout.parts if ask else [*layout.parts, Part(_array([self.text_end]), -1, False)]
        return layout._replace(parts=parts, is_late=True)

    def call_text(self, call: Call) -> str:
        return f"{call.name}\n```python\n{python_call(Call('tool_call', call.parameters))}\n```"

    def tools_text(self, tools: Any) -> str:
        shown = json.dumps(tools, ensure_ascii=False, indent=4)
        return f"Answer the following questions as best as you can. You have access to the following tools:\n{shown}"


RENDERERS: dict[str, type[Renderer]] = {"chatml": ChatML, "llama3": Llama3, "chatglm3": ChatGLM3}


def renderer_for(tokenizer: Tokenizer, data: Data) -> Renderer:
    """The renderer that data.template names, or for auto the one that the tokenizer knows; else raises Refusal."""
    chosen = data.template
    if chosen == "auto":
        vocabulary = tokenizer.get_vocab()
        marks = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}
        if "[gMASK]" in vocabulary and "sop" in vocabulary:  # GLM-4 has <sop>, and other rules
            chosen = "chatglm3"
        elif getattr(tokenizer, "chat_template", None):
            chosen = "own"
        else:
            chosen = next((template for mark, template in marks.items() if mark in vocabulary), "auto")
    if chosen in RENDERERS:
        return RENDERERS[chosen](tokenizer, data)
    if chosen == "auto":
        raise Refusal(
            "data.template=auto: the tokenizer has neither a chat template nor the special tokens of a known one — "
            f"name one: data.template={'|'.join(RENDERERS)}, or a Jinja file (.jinja or .j2)"
        )
    from tunesmith.data.chat_template import own_template

    return own_template(tokenizer, data, chosen)


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
    text = re.sub(r"^\s*(\[TOOL_CALLS\]|<\|python_tag\|>)", "", text).strip()
    if fenced := re.match(r"(?P<name>[^\n`]*)\n\s*```(?:python)?\n(?P<body>.*?)(?:\n```|$)", text, re.S):
        call = _python_form(fenced["body"].rstrip("`\n "))
        return Call(fenced["name"].strip(), call.parameters) if call and call.name == "tool_call" else call
    if text.startswith("["):
        text = text[1:].removesuffix("]")
    if call := _python_form(text):
        return call
    if named := re.match(r"(?P<name>[\w.:/-]+)(\n\s*|\[ARGS\])?(?P<arguments>\{.*)", text, re.S):  # GLM-4, Mistral's newer models
        arguments = _first_object(named["arguments"])
        return None if arguments is None else Call(named["name"], arguments)
    return _json_form(text) or _json_form(text.partition("<tool_call>")[2].lstrip())


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
    record = _first_object(text) or {}
    name, parameters = record.get("name"), record.get("arguments", record.get("parameters", {}))
    return Call(name, parameters) if isinstance(name, str) and isinstance(parameters, dict) else None


def _first_object(text: str) -> dict[str, Any] | None:
    try:
        found, _ = json.JSONDecoder().raw_decode(text)  # what follows the object does not matter
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
