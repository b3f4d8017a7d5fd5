"""A model's own chat template: Jinja text that writes a whole conversation, in which the turns are found again.

Nothing in the text is searched for: the same template is asked to write the conversation up to a turn, and up to the
prompt for that turn. Training text must begin with each prompt and with each learned answer as it was first written, else
what is trained would not be what is read at inference, and the conversation is refused.

What users say cannot become a special token: such texts are hidden from the template and put back as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from tunesmith.config import Data, Refusal, ToolPrompt
from tunesmith.data.conversations import Call, Conversation, Turn
from tunesmith.data.jinja import Tool, writer
from tunesmith.data.spans import Cut, Shape, Spans, place
from tunesmith.data.templates import RENDERERS, Layout, Renderer
from tunesmith.data.tokens import Encoder, Markup, Part, Tokenizer

FILES = (".jinja", ".j2")
HIDDEN = 0xF0000
"""First of the private-use characters that stand for special tokens in what users say."""
STANDINGS = re.compile("([\U000f0000-\U0010fffc])")
MARK = re.compile(r"[<\[{|].*[>\]}|]", re.S)
"""How tokens look that are no words, white space or runs of a sign."""
PLACE = "\U0010fffd"
"""Stands for a whole text, to see where the template puts it."""
SHAPES = 4096
"""Shapes of conversations that are remembered."""

ADVICE = f"another data.template ({'|'.join(RENDERERS)})"

TEXT = {"role", "content"}
"""Keys of a message that is nothing but text."""

FIND = Call("find_it", {"thing": "a_key"})

Message = dict[str, Any]


def own_template(tokenizer: Tokenizer, data: Data, chosen: str) -> ChatTemplate:
    """A renderer by the tokenizer's chat template (chosen: own) or by a Jinja file; raises Refusal if it can't be used."""
    where = f"data.template={chosen}"
    if chosen == "own":
        source: Any = getattr(tokenizer, "chat_template", None)
        if not source:
            raise Refusal(f"{where}: the tokenizer has no chat template — {ADVICE}, or a Jinja file (.jinja or .j2)")
    elif chosen.endswith(FILES):
        try:
            source = Path(chosen).expanduser().read_text("utf-8")
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", "") or "it is not UTF-8"
            raise Refusal(f"{where}: the file cannot be read ({reason}) — the path of a Jinja file, from where you start") from None
    else:
        raise Refusal(f"{where}: no such template — auto, own, {', '.join(RENDERERS)}, or a Jinja file (.jinja or .j2)")
    texts: Mapping[str, str] = source if isinstance(source, Mapping) else {"default": source}
    plain = texts["default"] if "default" in texts else next(iter(texts.values()))
    try:
        return ChatTemplate(tokenizer, data, chosen, plain, texts.get("tool_use", plain))
    except TemplateSyntaxError as error:
        raise Refusal(f"{where}: Jinja cannot read it, line {error.lineno}: {error.message} — correct it, or {ADVICE}") from None


@dataclass
class Draft:
    """A conversation in OpenAI's form, its special texts hidden."""

    said: tuple[Turn, ...]
    tools: list[Any] | None
    place: str
    shift: int
    """How many turns of `said` were put in front."""
    messages: list[Message] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    """Index into `said` of each message's first turn: what an assistant says and calls at once is one message."""
    hidden: dict[str, str] = field(default_factory=dict)
    """Text by text the character that stands for it."""

    def learned(self, number: int) -> bool:
        return self.said[self.firsts[number]].loss

    def turn(self, number: int) -> str:
        """Where a message stands in the file, for people."""
        first = self.firsts[number] - self.shift
        where = f"turn {first + 1} ({self.messages[number]['role']})" if first >= 0 else "the system turn put in"
        return f"{self.place} {where}"


class ChatTemplate(Renderer):
    """A chat template in Jinja, with the tokens that transformers would make of it."""

    def __init__(self, tokenizer: Tokenizer, data: Data, name: str, source: str, source_for_tools: str):
        super().__init__(tokenizer, data)
        self._name = f"data.template={name}"
        self._sources = (source, source_for_tools)
        self._words = dict(getattr(tokenizer, "special_tokens_map", {}))
        for text in self._sources:
            writer(text)
        self._header = self._user_header = self._closing = ""
        self._silence: Message = {}
        self._shapes: dict[Any, Shape | None] = {}
        self._offered: list[Any] | None = None
        self._writes_calls = self._writes_tools = self._joins_text = self._joins_calls = False
        stops = [self._vocabulary[stop] for stop in self._learn()]
        end = getattr(tokenizer, "eos_token_id", None)
        ends = [end] if isinstance(end, int) else []
        if not stops and not ends:
            raise Refusal(f"{self._name}: no special token ends an answer, and the tokenizer has no eos token — {ADVICE}")
        self._stop_ids = tuple(dict.fromkeys([*stops, *ends]))
        self._text_end = [*ends, *stops][0]

    @cached_property
    def _foreign(self) -> re.Pattern[str]:
        return re.compile(f"{self.encoder.special.pattern}|[\\U000F0000-\\U0010FFFF]")

    @cached_property
    def _firsts(self) -> frozenset[str]:
        """First characters of the special tokens."""
        return frozenset(token[0] for token in self.encoder.marks)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    @property
    def text_end(self) -> int:
        return self._text_end

    def _own_key(self) -> list[Any]:
        return [self._sources, sorted((name, str(value)) for name, value in self._words.items())]

    def header(self, role: str) -> tuple[int, ...]:
        """The generation prompt, or what opens a user's turn; nothing for other roles, whose headers are seen in a conversation only."""
        header = {"assistant": self._header, "user": self._user_header}.get(role, "")
        return tuple(self.encoder.tokens([Markup(header)])[0].tolist())

    def call_text(self, call: Call) -> str:
        if not self._writes_calls:
            return super().call_text(call)
        draft = self._trial(Turn("user", "Where?"), Turn("assistant", call=call, loss=True))
        try:
            spans = self._spans(draft, ask=False)
        except Refusal:  # no conversation with calls can be rendered either; this one is for people
            return super().call_text(call)
        ((begin, end),) = spans.learned
        said = "".join(piece for piece, _ in self._shown(spans.text[begin:end], draft.hidden))
        return said.removesuffix(spans.stops[0] if spans.stops else "").strip()

    # --- what the template can do ------------------------------------------------------------------------------------

    def _learn(self) -> list[str]:
        """See by a few turns how the template opens and ends them, and whether it knows calls; gives the tokens that end answers."""
        asked, told = Turn("user", "Where?"), Turn("assistant", "There.", loss=True)
        question, answer = ({"role": turn.role, "content": turn.content} for turn in (asked, told))
        try:
            frame = self._learn_turns(Draft((asked, told), None, "a trial", 0, [question, answer], [0, 1]))
            frame += self._learn_calls(question)
            # Some tokenizers have their marks as words, be it that they were converted so.
            marks = [token for token in self.encoder.added if token in frame and MARK.fullmatch(token)]
            if not all(map(self.encoder.special.fullmatch, marks)):
                self.encoder = Encoder(self.tokenizer, marks)
            spans = self._spans(self._trial(asked, told), ask=False)
            stops = spans.stops or self._spans(self._trial(asked, told, asked), ask=False).stops
        except Refusal as refusal:
            reason = str(refusal).partition(f"{self._name}: ")[2]
            raise Refusal(f"{self._name}: it cannot write a question and its answer: {reason}") from None
        if (system := self.data.system) and not _has(self._written([{"role": "system", "content": system}, question], None), system):
            raise Refusal(f'data.system="{system}": the template writes no system turn — data.system="", or {ADVICE}')
        calling = Turn("assistant", call=FIND, loss=True)
        for turns in ((asked, calling), (asked, calling, Turn("observation", "Here."))):
            with suppress(Refusal):  # conversations with calls will say why
                stops = stops + self._spans(self._trial(*turns), ask=False).stops
        return stops

    def _learn_turns(self, draft: Draft) -> str:
        """What opens and closes turns; gives what the template wrote but an answer."""
        prompt, asked, told = self._write(draft, 1, ask=True), self._write(draft, 1), self._write(draft, 2)
        for closing in self.encoder.special.findall(asked)[-1:]:
            # Phi-3's template closes with <|endoftext|> what is no prompt.
            if not prompt.startswith(asked) and prompt.startswith(asked.removesuffix(closing)) and told.endswith(closing):
                self._closing, asked, told = closing, asked.removesuffix(closing), told.removesuffix(closing)
        self._header = prompt.removeprefix(asked) if prompt.startswith(asked) else ""
        again, found, _ = self._written([*draft.messages, {"role": "user", "content": PLACE}], None).partition(PLACE)
        self._user_header = again.removeprefix(told) if found and again.startswith(told) else ""
        system = self._written([{"role": "system", "content": ""}, draft.messages[0]], None)
        return prompt + system + told.removeprefix(prompt).rpartition(draft.said[1].content)[2]

    def _learn_calls(self, asked: Message) -> str:
        """What the template does with calls and tools; gives how it wrote a tool's answer."""
        offered = _schemas([{"name": FIND.name, "description": "Finds.", "parameters": {"type": "object", "properties": {}}}])
        self._writes_tools = FIND.name in self._written([asked], offered)
        if len(set(self._sources)) > 1:  # the template for tools is used only where there are some
            self._offered = offered
        first, second = _call(0, FIND.name, FIND.parameters), _call(1, "take_it", FIND.parameters)

        def writes(said: Message, *words: str) -> bool:
            text = self._written([asked, said], self._offered)
            return all(word in text for word in words)

        for silence in ({"content": ""}, {}):  # some templates ask whether there is a text, some what is in it
            if not self._writes_calls:
                self._silence = {"role": "assistant", **silence}
                self._writes_calls = writes({**self._silence, "tool_calls": [first]}, FIND.name, "a_key")
        if not self._writes_calls:
            return ""
        self._joins_text = writes({**self._silence, "content": "Let me look.", "tool_calls": [first]}, "Let me look.", FIND.name)
        self._joins_calls = writes({**self._silence, "tool_calls": [first, second]}, FIND.name, "take_it")
        called = [asked, {**self._silence, "tool_calls": [first]}]
        result = {"role": "tool", "content": "Here.", "tool_call_id": first["id"], "name": FIND.name}
        return self._written([*called, result], self._offered).removeprefix(self._written(called, self._offered))

    def _trial(self, *turns: Turn) -> Draft:
        draft = Draft(turns, self._offered if any(turn.call for turn in turns) else None, "a trial", 0)
        self._add_messages(draft)
        return draft

    def _written(self, messages: list[Message], tools: list[Any] | None, ask: bool = False) -> str:
        """What the template writes; empty if it refuses."""
        try:
            return self._rendered(messages, tools, ask)
        except Exception:  # foreign code again; what it does not write, `_learn` takes for what it cannot do
            return ""

    # --- writing -----------------------------------------------------------------------------------------------------

    def _rendered(self, messages: list[Message], tools: list[Any] | None, ask: bool) -> str:
        write = writer(self._sources[1 if tools else 0])
        text = write({"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": ask, **self._words})
        return text if ask else text.removesuffix(self._closing)

    def _write(self, draft: Draft, count: int, ask: bool = False) -> str:
        """The first messages as the template writes them; raises Refusal with its words if it does not want to."""
        try:
            return self._rendered(draft.messages[:count], draft.tools, ask)
        except Exception as error:  # whatever foreign code raises
            said = str(error) or type(error).__name__
            raise Refusal(f"{draft.place}: {self._name}: the template says {said!r} — change the conversation, or {ADVICE}") from None

    def _draft(self, conversation: Conversation, ask: bool = False) -> Draft:
        said = conversation.turns
        if self.data.system and said[0].role != "system":
            said = (Turn("system", self.data.system), *said)
        tools = conversation.tools if self.data.tools is ToolPrompt.full and conversation.tools else None
        schemas = _schemas(tools) if self._writes_tools else None
        if tools and not schemas:  # the template has no words for them
            text = self.tools_text(tools)
            if said[0].role == "system":
                said = (replace(said[0], content=f"{text}\n\n{said[0].content}"), *said[1:])
            else:
                said = (Turn("system", text), *said)
        draft = Draft(said, None, conversation.place, len(said) - len(conversation.turns))
        draft.tools = schemas and [Tool(self._hide(schema, draft.hidden)) for schema in schemas]
        self._add_messages(draft)
        if ask and len(draft.messages) > 1 and draft.messages[-1]["role"] == "assistant" and self._may_go_on(draft.messages[-1]):
            # What an assistant has begun to say is not over yet: it is asked for from its beginning.
            draft.messages.pop()
            draft.firsts.pop()
        return draft

    def _may_go_on(self, message: Message) -> bool:
        return self._joins_calls if "tool_calls" in message else self._joins_text

    def _add_messages(self, draft: Draft) -> None:
        waiting: list[tuple[str, str]] = []  # (id, name) of calls without an answer
        count = 0
        for index, turn in enumerate(draft.said):
            last = draft.messages[-1] if draft.messages else {}
            if turn.call and self._writes_calls:
                call = _call(count, self._hide(turn.call.name, draft.hidden), self._hide(turn.call.parameters, draft.hidden))
                waiting.append((call["id"], call["function"]["name"]))
                count += 1
                if last.get("role") == "assistant" and self._may_go_on(last) and draft.said[index - 1].loss is turn.loss:
                    last.setdefault("tool_calls", []).append(call)
                    continue
                draft.messages.append({**self._silence, "tool_calls": [call]})
            else:
                text = self.call_text(turn.call) if turn.call else turn.content
                role = "tool" if turn.role == "observation" else turn.role
                draft.messages.append({"role": role, "content": self._hide(text, draft.hidden)})
                if role == "tool" and waiting:
                    draft.messages[-1]["tool_call_id"], draft.messages[-1]["name"] = waiting.pop(0)
            draft.firsts.append(index)

    def _hide(self, value: Any, hidden: dict[str, str]) -> Any:
        """The same with a character of our own for each special token's text, and for each character that could be taken for one."""
        if isinstance(value, str):
            if value.isascii() and not any(first in value for first in self._firsts):
                return value  # most texts: to look for a sign is much faster than for an expression
            return self._foreign.sub(lambda found: hidden.setdefault(found[0], chr(HIDDEN + len(hidden))), value)
        if isinstance(value, dict):
            return {self._hide(key, hidden): self._hide(item, hidden) for key, item in value.items()}
        return [self._hide(item, hidden) for item in value] if isinstance(value, (list, tuple)) else value

    def _shown(self, text: str, hidden: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
        """(piece, whether someone said what looks like a special token) of a text that the template wrote."""
        if not hidden:
            yield text, False
            return
        back = {standing: said for said, standing in hidden.items()}
        so_far = ""
        for piece in STANDINGS.split(text):
            said = back.get(piece, piece)
            if piece in back and self.encoder.special.fullmatch(said):
                yield from [(so_far, False)] if so_far else []
                yield said, True
                so_far = ""
            else:
                so_far += said
        yield from [(so_far, False)] if so_far else []

    # --- finding -----------------------------------------------------------------------------------------------------

    def lay_out(self, conversation: Conversation, ask: bool) -> Layout:
        draft = self._draft(conversation, ask)
        if shape := self._shape(draft, ask):
            texts = [message["content"] for message in draft.messages]
            parts = self._parts(shape.cuts(texts), draft.hidden) if draft.hidden else shape.parts(texts)
            unstopped = shape.unstopped
        else:
            spans = self._spans(draft, ask)
            parts, unstopped = self._parts(spans.cuts([*draft.firsts, len(draft.said)]), draft.hidden), spans.unstopped
        if self._closing and not ask:
            parts.append(Part(Markup(self._closing), -1, False))
        return Layout(parts, draft.said, unstopped)

    def _parts(self, cuts: list[Cut], hidden: Mapping[str, str]) -> list[Part]:
        parts = []
        for text, after, turn, learned in cuts:
            for piece, is_hidden in self._shown(text, hidden):
                content = piece if is_hidden else Markup(piece, "" if hidden and STANDINGS.search(after) else after)
                parts.append(Part(content, turn, learned))
                after = ""
        return parts

    def _shape(self, draft: Draft, ask: bool) -> Shape | None:
        """The shape of a conversation; None if its text cannot be had by filling one.

        Of conversations in which only texts differ the first is looked at with characters in place of texts. The others are
        written once, and are cut where it is if that is what the template writes; else they are looked at for themselves.
        """
        if draft.tools is not None or not all(message.keys() == TEXT for message in draft.messages):
            return None
        key = (ask, *[(message["role"], draft.learned(number)) for number, message in enumerate(draft.messages)])
        if key not in self._shapes:
            if len(self._shapes) >= SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._new_shape(draft, ask)
        shape, texts = self._shapes[key], [message["content"] for message in draft.messages]
        fits = shape and shape.filled(texts, self.encoder.special) == self._written(draft.messages, None, ask)
        return shape if fits else None

    def _new_shape(self, draft: Draft, ask: bool) -> Shape | None:
        messages = [{**message, "content": place(number)} for number, message in enumerate(draft.messages)]
        try:
            spans = self._spans(replace(draft, messages=messages, hidden={}), ask)
        except Refusal:  # each conversation will say why for itself
            return None
        return Shape(spans, spans.cuts([*draft.firsts, len(draft.said)]), self.encoder)

    def _spans(self, draft: Draft, ask: bool) -> Spans:
        """Where each message begins and which stretches are learned; raises Refusal where the template rewrites what it wrote."""
        count = len(draft.messages)
        text = self._write(draft, count, ask)
        spans = Spans(text, [found.span() for found in self.encoder.special.finditer(text)], [self._frame(draft, text), *[None] * count])
        for number in range(count):
            if draft.learned(number):
                begin = self._begin(draft, number, spans)
                end = len(text)
                if number + 1 < count or ask:
                    end = self._same(draft, number, "if the conversation ends here", self._write(draft, number + 1), text)
                self._check(draft, number, text[begin:end])
                spans.starts[number + 1] = end
                stop = spans.stop(begin, end)
                spans.learned.append((begin, stop[1] if stop else end))
                if stop:
                    spans.stops.append(text[slice(*stop)])
                elif spans.unstopped is None:
                    spans.unstopped = draft.firsts[number]
            elif draft.messages[number]["role"] != "assistant":  # what an assistant said before is the template's to shorten
                self._check(draft, number, text)
            if spans.starts[number] is None:
                before = self._written(draft.messages[:number], draft.tools)
                spans.starts[number] = len(before) if before and text.startswith(before) else None
        if spans.starts[count] is None and ask and text.endswith(self._header):
            spans.starts[count] = len(text) - len(self._header)
        return spans

    def _frame(self, draft: Draft, text: str) -> int:
        """Where the first message begins, behind what belongs to no turn."""
        if draft.messages[0]["role"] == "user" and self.encoder.special.search(self._user_header):
            return max(0, text.find(self._user_header))
        bos = self._words.get("bos_token") or ""
        return len(bos) if text.startswith(bos) else 0

    def _begin(self, draft: Draft, number: int, spans: Spans) -> int:
        """Where what a message says begins."""
        message = draft.messages[number]
        if number and message["role"] == "assistant":
            prompt = self._write(draft, number, ask=True)
            begin = self._same(draft, number, "as the prompt", prompt, spans.text)
            if spans.starts[number] is None and prompt.endswith(self._header):
                spans.starts[number] = begin - len(self._header)
            return begin
        before, found, _ = self._written([*draft.messages[:number], {**message, "content": PLACE}], draft.tools).partition(PLACE)
        # A text that is not written anywhere has no beginning either, and is refused as such.
        return len(before) if found and spans.text.startswith(before) else len(spans.text)

    def _check(self, draft: Draft, number: int, text: str) -> None:
        """Refuse a template that leaves out what was said: some cut off what a model thought, some know no tools."""
        message = draft.messages[number]
        for said in (message.get("content", ""), *(call["function"]["name"] for call in message.get("tool_calls", ()))):
            if not _has(text, said):
                raise Refusal(f"{draft.turn(number)}: {self._name}: the template does not write all of {said[:30]!r} — {ADVICE}")

    def _same(self, draft: Draft, number: int, when: str, written: str, text: str) -> int:
        """The length of what the template wrote for a part of the conversation, if the whole begins with it."""
        if text.startswith(written):
            return len(written)
        place = _common(written, text)
        alone, whole = (one[max(0, place - 20) : place + 30] for one in (written, text))
        raise Refusal(
            f"{draft.turn(number)}: {self._name}: the template writes {alone!r} {when} but {whole!r} in the whole, so training text "
            f"would not be what is read at inference — {ADVICE}, or a conversation for each answer"
        )


def _has(text: str, said: str) -> bool:
    """Whether a text holds what was said, white space aside, in JSON perhaps."""
    if said in text:
        return True
    forms = (said, json.dumps(said, ensure_ascii=False)[1:-1])
    squeezed = "".join(text.split())
    return any("".join(form.split()) in squeezed for form in forms)


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), min(len(one), len(other)))


def _call(number: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    # Mistral's template wants an id of nine characters.
    return {"type": "function", "id": f"call{number:05}", "function": {"name": name, "arguments": arguments}}


def _schemas(tools: Any) -> list[Any] | None:
    """Tools as chat templates expect them; None if they are something else."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
