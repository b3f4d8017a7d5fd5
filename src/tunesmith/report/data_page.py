"""Training data for people: conversations as the model reads them, with what it learns marked, in a terminal and as a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.data.conversations import Conversation
from tunesmith.data.ngram import Unlikely
from tunesmith.data.statistics import FRAME, SHARES, Finding, Statistics, percent
from tunesmith.report.pages import write_page

if TYPE_CHECKING:
    from tunesmith.data.templates import Rendered, Tokenizer

SHOWN = {False: (100, 40), True: (400, 100)}
"""First and last tokens that are shown of a run that is learned (True) or not: they are read by people."""
SHOWN_UNLIKELY = 60
"""Tokens of the targets that look least like the rest."""
SHOWN_FIRSTS = 3
"""Places of a finding that are seen without opening a list."""
LANGUAGES = 8

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# What one must see to judge a text and would not: control characters, and those that turn or hide what follows.
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0xAD, 0x200B, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
_UNSEEN = {code: f"‹{code:02X}›" for code in _CONTROLS} | {ord("\n"): "↵\n", ord("\t"): "→\t"}


@dataclass(frozen=True)
class Token:
    """One token for people."""

    id: int
    name: str
    """As the vocabulary writes it."""
    text: str
    """What it stands for; its bytes where it is only a part of a character."""
    kind: str
    """special, bytes or nothing."""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one turn that are all learned or all not."""

    learned: bool
    ids: Sequence[int]


@dataclass(frozen=True)
class Section:
    """A turn, or what the template puts around the turns."""

    label: str
    role: str
    runs: list[Run]

    @property
    def tokens(self) -> int:
        return sum(len(run.ids) for run in self.runs)

    @property
    def targets(self) -> int:
        return sum(len(run.ids) for run in self.runs if run.learned)


class Reader:
    """Tokens back to text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._names = {number: name for name, number in tokenizer.get_vocab().items()}
        self.token = cache(self._token)

    def text(self, ids: Sequence[int]) -> str:
        """What tokens stand for together, special tokens by their names."""
        text = ""
        for special, group in groupby(ids, lambda number: self.token(number).kind == "special"):
            some = list(group)
            text += "".join(self.token(number).text for number in some) if special else self._whole(some)
        return text

    def _whole(self, ids: list[int]) -> str:
        """Text in which a character that begins or ends elsewhere is shown by its bytes, and not as damaged."""
        first, last, text = 0, len(ids), self._plain(ids)
        while text.startswith("\ufffd") and self.token(ids[first]).kind == "bytes":
            first += 1
            text = self._plain(ids[first:last])
        while text.endswith("\ufffd") and self.token(ids[last - 1]).kind == "bytes":
            last -= 1
            text = self._plain(ids[first:last])
        before, after = (("".join(self.token(number).text for number in some)) for some in (ids[:first], ids[last:]))
        return before + text + after

    def _plain(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        # SentencePiece takes the space before a first word for its own.
        missing = ids and self._names.get(ids[0], "").startswith("▁") and not text.startswith(" ")
        return f" {text}" if missing else text

    def _token(self, number: int) -> Token:
        name, text = self._names.get(number, ""), self._plain([number])
        if not text or not self._tokenizer.decode([number], skip_special_tokens=True):
            return Token(number, name, text or name, "special")
        if "\ufffd" in text and (raw := _bytes(name)):
            try:
                return Token(number, name, raw.decode(), "")  # the character U+FFFD itself
            except UnicodeDecodeError:
                return Token(number, name, f"‹{raw.hex(' ').upper()}›", "bytes")
        return Token(number, name, text, "")


def sections(rendered: Rendered) -> list[Section]:
    """A rendered conversation turn by turn, in the order of its tokens."""
    learned = rendered.targets.copy()
    learned[:1] = False  # nothing predicts the first token
    tokens = zip(rendered.turns.tolist(), learned.tolist(), rendered.ids.tolist(), strict=True)
    found = []
    for turn, of_turn in groupby(tokens, lambda token: token[0]):
        runs = [Run(yes, [token for *_, token in group]) for yes, group in groupby(of_turn, lambda token: token[1])]
        role = rendered.said[turn].role if turn >= 0 else FRAME
        found.append(Section(f"{turn + 1} {role}" if turn >= 0 else role, role, runs))
    return found


@dataclass(frozen=True)
class Part:
    """Tokens of a run that are shown, and how many after them are not."""

    ids: Sequence[int]
    left_out: int = 0


def parts(run: Run) -> list[Part]:
    """The whole run, or its beginning and end."""
    first, last = SHOWN[run.learned]
    left_out = len(run.ids) - first - last
    return [Part(run.ids[:first], left_out), Part(run.ids[-last:])] if left_out > 0 else [Part(run.ids)]


def visible(text: str) -> str:
    """Text with what cannot be seen, or would change how the rest is seen, replaced by signs."""
    return text.translate(_UNSEEN)


# --- terminal ------------------------------------------------------------------------------------------------------


def show_in_terminal(stream: IO[str] | Console, conversation: Conversation, rendered: Rendered, tokenizer: Tokenizer) -> None:
    """Print a conversation as the model reads it; what is learned is green, or in «marks» where there are no colours."""
    console = stream if isinstance(stream, Console) else Console(file=stream, highlight=False)
    has_colours = console.color_system is not None and not console.no_color
    reader, found = Reader(tokenizer), sections(rendered)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(overflow="fold")
    table.add_row(*(Text(word, "dim") for word in ("turn", "tokens", "text as the model reads it")))
    for section in found:
        count = f"{section.targets:,} of {section.tokens:,}" if section.targets else f"{section.tokens:,}"
        table.add_row(Text(section.label, "bold"), Text(count, "dim"), _terminal_text(section, reader, has_colours))
    targets, tokens = sum(section.targets for section in found), len(rendered.ids)
    how = Text("green", "bold green") if has_colours else Text("in «marks»")
    told = Text.assemble(f"{visible(conversation.place)}: {targets:,} of {tokens:,} tokens are learned (", how, ")")
    console.print(told, table, "", sep="\n", soft_wrap=False)


def _terminal_text(section: Section, reader: Reader, has_colours: bool) -> Text:
    shown = Text()
    for run in section.runs:
        begin, end = ("«", "»") if run.learned and not has_colours else ("", "")
        style = "bold green" if run.learned else ""
        shown.append(begin, style)
        for part in parts(run):
            shown.append(visible(reader.text(part.ids)), style)
            if part.left_out:
                shown.append(f" … {part.left_out:,} tokens … ", "dim italic")
        shown.append(end, style)
    if shown.plain.endswith("\n"):  # seen as a sign already
        shown.right_crop(1)
    return shown


# --- page ----------------------------------------------------------------------------------------------------------


def write_data_page(
    path: Path,
    *,
    title: str,
    samples: Sequence[tuple[Conversation, Rendered]],
    statistics: Mapping[str, Statistics],
    findings: Sequence[Finding],
    unlikely: Sequence[Unlikely],
    tokenizer: Tokenizer,
) -> None:
    """Write a page that needs neither network nor scripts: samples token by token, counts by part, and what looks wrong."""
    reader = Reader(tokenizer)
    full = {part: found for part, found in statistics.items() if found.conversations}
    values = {
        "title": title,
        "samples": [_sample(conversation, rendered) for conversation, rendered in samples],
        "numbers": list(_numbers(full)),
        "parts": list(full),
        "charts": [chart for chart in _charts(full) if chart["of"]],
        "findings": findings,
        "shown_firsts": SHOWN_FIRSTS,
        "unlikely": [_unlikely(one, reader) for one in unlikely],
        "visible": visible,
        "token": reader.token,
    }
    write_page(path, "data_page.html.j2", values)


def _sample(conversation: Conversation, rendered: Rendered) -> dict[str, Any]:
    turns = [
        {
            "label": section.label,
            "whose": f"turn {section.label.replace(' ', ', ')}" if section.role != FRAME else "frame of the template",
            "tokens": section.tokens,
            "targets": section.targets,
            "runs": [{"learned": run.learned, "parts": parts(run)} for run in section.runs],
        }
        for section in sections(rendered)
    ]
    return {"place": conversation.place, "tokens": len(rendered.ids), "targets": sum(turn["targets"] for turn in turns), "turns": turns}


def _unlikely(one: Unlikely, reader: Reader) -> dict[str, Any]:
    rest = len(one.ids) - SHOWN_UNLIKELY
    text = visible(reader.text(one.ids[:SHOWN_UNLIKELY].tolist()))
    return {"place": one.place, "nats": one.nats, "targets": len(one.ids), "text": text + (" …" if rest > 0 else "")}


def _numbers(statistics: Mapping[str, Statistics]) -> Iterator[tuple[str, list[str]]]:
    """Rows of the table of parts: a label, and a value for each part."""
    parts = statistics.values()
    yield "conversations", [f"{part.conversations:,}" for part in parts]
    yield "turns", [f"{part.turns:,}" for part in parts]
    yield "tokens", [f"{part.tokens:,}" for part in parts]
    yield "target tokens", [f"{part.targets:,}" for part in parts]
    yield "share of targets", [percent(part.targets, part.tokens) for part in parts]
    yield "shortest conversation", [f"{part.shortest:,}" for part in parts]
    yield "half have at most", [f"{part.at_most(0.5):,}" for part in parts]
    yield "95 % have at most", [f"{part.at_most(0.95):,}" for part in parts]
    yield "longest conversation", [f"{part.longest:,}" for part in parts]


def _charts(statistics: Mapping[str, Statistics]) -> Iterator[dict[str, Any]]:
    """Four kinds of bars, for each part: upright ones for histograms, lying ones where each has a name."""

    def of_parts(bars: Callable[[Statistics], Iterable[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
        return {part: list(bars(found)) for part, found in statistics.items()}

    lengths = of_parts(lambda found: _columns([(_range(bar.first, bar.last), bar.count) for bar in found.length_bars()], "tokens"))
    note = "Conversations by their tokens. Each bin is wider than the one before by the same ratio."
    yield {"title": "Lengths", "note": note, "upright": True, "of": lengths}
    percents = [f"{n * 100 // SHARES}–{(n + 1) * 100 // SHARES} %" for n in range(SHARES)]
    shares = of_parts(lambda found: _columns(list(zip(percents, found.shares, strict=True)), "targets"))
    yield {"title": "Share of targets", "note": "Conversations by how much of them is learned.", "upright": True, "of": shares}
    yield {"title": "Tokens by role", "note": "What is learned is in the stronger colour.", "upright": False, "of": of_parts(_role_bars)}
    note = "Guessed by py3langid from the beginning of what user and assistant say, for an even sample of conversations."
    yield {"title": "Languages", "note": note, "upright": False, "of": of_parts(_language_bars)}


def _columns(counts: Sequence[tuple[str, int]], unit: str) -> Iterator[dict[str, Any]]:
    most = max(1, *(count for _, count in counts))
    for label, count in counts:
        height = max(0.1, round(100 * count / most, 1)) if count else 0
        yield {"label": label, "told": f"{label} {unit}: {count:,} conversations", "height": height}


def _role_bars(found: Statistics) -> Iterator[dict[str, Any]]:
    most = max(tokens for tokens, _ in found.roles.values())
    for role, (tokens, targets) in found.roles.items():
        value = f"{tokens:,}, {percent(targets, tokens)} learned" if targets else f"{tokens:,}"
        yield {"label": role, "value": value, "strong": 100 * targets / most, "weak": 100 * (tokens - targets) / most}


def _language_bars(found: Statistics) -> Iterator[dict[str, Any]]:
    languages = found.languages()
    shown = list(languages.items())[:LANGUAGES]
    if rest := sum(languages.values()) - sum(count for _, count in shown):
        shown.append((f"{len(languages) - LANGUAGES} more", rest))
    total = sum(languages.values())
    for name, count in shown:
        yield {"label": name, "value": f"{count:,} of {total:,}", "strong": 100 * count / total, "weak": 0}


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


# --- bytes ---------------------------------------------------------------------------------------------------------


@cache
def _alphabet() -> dict[str, int]:
    """The characters in which byte-level vocabularies write bytes: printable ones as they are, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _bytes(name: str) -> bytes:
    """The bytes that a token of the vocabulary stands for; nothing if it is not written as bytes."""
    if found := _BYTE.fullmatch(name):
        return bytes([int(found[1], 16)])
    alphabet = _alphabet()
    return bytes(alphabet[letter] for letter in name) if all(letter in alphabet for letter in name) else b""
