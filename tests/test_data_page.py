"""Conversations for people: what is learned is seen with and without colours, nothing of a text acts, nothing is fetched."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tunesmith.data.conversations import Conversation, Turn
from tunesmith.data.ngram import Unlikely
from tunesmith.data.statistics import Finding, Statistics
from tunesmith.data.templates import Rendered
from tunesmith.report.data_page import SHOWN, Reader, show_in_terminal, visible, write_data_page

SPECIAL = ["<|im_start|>", "<|im_end|>"]


class Letters:
    """A byte-level tokenizer, a token a byte, with names as Hugging Face writes them; `tokens` are known besides."""

    def __init__(self, *tokens: str):
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in plain]
        self.names = {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(others)}
        self.bytes = {byte: bytes([byte]) for byte in range(256)}
        for token in tokens:
            number = len(self.bytes)
            self.bytes[number] = token.encode()
            self.names[number] = "".join(self.names[byte] for byte in token.encode())
        self.first_special = len(self.bytes)
        self.names |= {self.first_special + number: name for number, name in enumerate(SPECIAL)}

    def encode(self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool = True) -> list[int]:
        return [*text.encode()]

    def special(self, name: str) -> int:
        return self.first_special + SPECIAL.index(name)

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        special = [b"" if skip_special_tokens else name.encode() for name in SPECIAL]
        parts = [special[number - self.first_special] if number >= self.first_special else self.bytes[number] for number in ids]
        return b"".join(parts).decode("utf-8", "replace")

    def get_vocab(self) -> dict[str, int]:
        return {name: number for number, name in self.names.items()}


LETTERS = Letters()


def render(*turns: Turn, place: str = "file.jsonl:1", tokenizer: Letters = LETTERS) -> tuple[Conversation, Rendered]:
    """Role and text between special tokens, as ChatML does; the text and its end are learned where the turn is."""
    ids: list[int] = []
    targets: list[bool] = []
    numbers: list[int] = []
    for number, turn in enumerate(turns):
        header = [tokenizer.special("<|im_start|>"), *tokenizer.encode(f"{turn.role}\n")]
        said = [*tokenizer.encode(turn.content), tokenizer.special("<|im_end|>")]
        ids += [*header, *said, *tokenizer.encode("\n")]
        targets += [False] * len(header) + [turn.loss] * len(said) + [False]
        numbers += [number] * (len(header) + len(said) + 1)
    rendered = Rendered(np.array(ids, np.int32), np.array(targets), np.array(numbers, np.int16), tuple(turns), None)
    return Conversation(tuple(turns), place=place), rendered


ASKED = (Turn("system", "Be brief."), Turn("user", "Licht 开?"), Turn("assistant", "Ja 好\nok", loss=True))


def terminal(*turns: Turn, width: int = 100, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    show_in_terminal(console, *render(*turns), LETTERS)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def page(tmp_path: Path, **values: Any) -> str:
    filled: dict[str, Any] = {"title": "t", "samples": [], "statistics": {}, "findings": [], "unlikely": [], "tokenizer": LETTERS}
    write_data_page(tmp_path / "page.html", **{**filled, **values})
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def tokens(text: str) -> list[tuple[str, str]]:
    """(text, what is told of it) of every token of the samples."""
    found = re.findall(r'<i tabindex="-1"(?: class="\w+")? data-t="([^"]*)">([^<]*)</i>', text)
    return [(html.unescape(shown), html.unescape(told)) for told, shown in found]


# --- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_are_told_apart() -> None:
    reader = Reader(Letters(" light", "\ufffd", " \U0001f600"[:2]))
    assert (reader.token(ord("a")).text, reader.token(ord("a")).kind) == ("a", "")
    assert (reader.token(256).text, reader.token(256).name) == (" light", "Ġlight")
    assert reader.token(0xE4).kind == "bytes" and reader.token(0xE4).text == "‹E4›"
    assert (reader.token(257).text, reader.token(257).kind) == ("\ufffd", ""), "this character is really there"
    assert (reader.token(259).text, reader.token(259).kind) == ("<|im_start|>", "special")


def test_runs_are_decoded_as_a_whole() -> None:
    reader, ids = Reader(LETTERS), [*"好a好".encode()]
    assert reader.text(ids) == "好a好"
    assert reader.text(ids[1:-1]) == "‹A5›‹BD›a‹E5›‹A5›", "cut inside a character: not damaged"
    assert reader.text([*b"a\xff", LETTERS.special("<|im_end|>"), *"好".encode()]) == "a‹FF›<|im_end|>好"
    assert reader.text([]) == ""


def test_a_space_that_sentencepiece_takes_for_its_own_is_seen() -> None:
    class Pieces(Letters):
        def get_vocab(self) -> dict[str, int]:
            return {**super().get_vocab(), "▁light": 256, "<0xE4>": 0xE4}

        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
            return super().decode(ids, skip_special_tokens=skip_special_tokens).removeprefix(" ")

    reader = Reader(Pieces(" light"))
    assert (reader.token(256).text, reader.text([256, 256])) == (" light", " light light")
    assert reader.token(0xE4).text == "‹E4›"


def test_what_cannot_be_seen_is_seen() -> None:
    assert visible("a\n\tb\r\x1b[31m\x00\u202e\ufeff") == "a↵\n→\tb‹0D›‹1B›[31m‹00›‹202E›‹FEFF›"
    assert visible("ok 好 👍🏽 می‌خواهم") == "ok 好 👍🏽 می‌خواهم"


# --- terminal ------------------------------------------------------------------------------------------------------


def test_a_terminal_without_colours_has_marks() -> None:
    assert terminal(*ASKED) == "\n".join(
        [
            "file.jsonl:1: 10 of 59 tokens are learned (in «marks»)",
            "turn           tokens  text as the model reads it",
            "1 system           19  <|im_start|>system↵",
            "                       Be brief.<|im_end|>↵",
            "2 user             18  <|im_start|>user↵",
            "                       Licht 开?<|im_end|>↵",
            "3 assistant  10 of 22  <|im_start|>assistant↵",
            "                       «Ja 好↵",
            "                       ok<|im_end|>»↵",
            "",
        ]
    )


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = terminal(*ASKED, force_terminal=True, color_system="standard")
    assert "«" not in coloured
    assert re.search(r"\x1b\[1;32mJa 好↵", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    marked = terminal(*ASKED, force_terminal=True, color_system="standard")
    assert "«Ja 好↵" in re.sub(r"\x1b\[\d+m", "", marked)
    assert "32m" not in marked


def test_a_text_does_not_steer_the_terminal() -> None:
    shown = terminal(Turn("user", "[red]x[/red] \x1b]0;title\x07 \x1b[2J :smile:"), Turn("assistant", "ok", loss=True))
    assert "[red]x[/red] ‹1B›]0;title‹07› ‹1B›[2J :smile:" in shown
    assert "\x1b" not in shown


def test_a_stream_will_do() -> None:
    stream = io.StringIO()
    show_in_terminal(stream, *render(*ASKED), LETTERS)
    assert "«Ja 好↵" in stream.getvalue()


def test_a_long_run_is_shortened_and_says_so() -> None:
    shown = terminal(Turn("user", "x" * 5000), Turn("assistant", "y" * 300, loss=True))
    assert f"… {5008 - sum(SHOWN[False]):,} tokens …" in " ".join(shown.split())
    assert shown.count("x") == sum(SHOWN[False]) - 8 + 1, "and the one in the word text"
    assert shown.count("y") == 300


# --- page ----------------------------------------------------------------------------------------------------------


def test_every_token_is_there_and_told(tmp_path: Path) -> None:
    sample = render(*ASKED)
    text = page(tmp_path, samples=[sample])
    found = tokens(text)
    assert len(found) == len(sample[1].ids) == 59
    reader = Reader(LETTERS)
    assert [told for _, told in found] == [f"{number} {visible(reader.token(number).name)}" for number in sample[1].ids.tolist()]
    assert [shown for shown, _ in found][-10:] == ["J", "a", " ", "‹E5›", "‹A5›", "‹BD›", "↵\n", "o", "k", "<|im_end|>", "↵\n"][1:]
    learned = re.findall(r'<span class="learned">(.*?)</span>\n?', text[text.index("<article>") :], flags=re.DOTALL)
    assert len(learned) == 1
    assert "".join(shown for shown, _ in tokens(learned[0])) == "Ja ‹E5›‹A5›‹BD›↵\nok<|im_end|>"
    assert text.count("&quot; · learned · turn 3, assistant&quot;") == 1
    assert "file.jsonl:1 · 10 of 59 tokens are learned" in text
    assert "targets only" in text and text.count("unlearned") == 3, "the style and two turns"


def test_what_comes_from_data_is_text(tmp_path: Path) -> None:
    bad = "</script><b>\" onmouseover='x' </style>&lt;"
    letters = Letters(bad)
    conversation, rendered = render(Turn("user", bad), Turn("assistant", bad, loss=True), place=bad, tokenizer=letters)
    rendered.ids[-5] = 256
    text = page(
        tmp_path, title=bad, samples=[(conversation, rendered)], tokenizer=letters, findings=[Finding(bad, bad, bad, 3, (bad,) * 5)],
        unlikely=[Unlikely(0, bad, 1.0, np.array([256], np.int32))], statistics={bad: counted(bad)},
    )  # fmt: skip
    for harmful in ("</script", "<script", "<b>", "</style>&", "\" onmouseover", "' onmouseover"):
        assert harmful not in text
    assert text.count(html.escape(bad).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")) >= 10
    assert text.count("</style>") == 1


def test_the_page_fetches_and_runs_nothing(tmp_path: Path) -> None:
    text = page(tmp_path, samples=[render(*ASKED)], statistics={"train": counted("train")})
    assert "default-src 'none'; style-src 'unsafe-inline'" in text, "the browser itself refuses every request and every script"
    assert not re.search(r"""\b(src|action|poster|srcset)\s*=|@import|url\(|https?://|<link|<iframe|<script|\son\w+=""", text)
    assert set(re.findall(r'href="(.)', text)) == {"#"}
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def counted(place: str, conversations: int = 40) -> Statistics:
    statistics = Statistics()
    for number in range(conversations):
        said = Turn("user", "Could you please turn on the light in the kitchen? " * (1 + number % 7))
        statistics.add(*render(said, Turn("assistant", "Done.", loss=True), place=f"{place}:{number}"))
    return statistics


def test_counts_and_bars(tmp_path: Path) -> None:
    statistics = {"train": counted("train"), "dev": counted("dev", 4), "test": Statistics()}
    text = page(tmp_path, statistics=statistics)
    body = " ".join(re.sub(r"<[^>]+>", " ", text[text.index("<body>") :]).split())
    assert "train dev conversations 40 4 turns 80 8" in body, "a part without conversations is left out"
    assert f"tokens {statistics['train'].tokens:,} {statistics['dev'].tokens:,}" in body
    assert f"assistant {statistics['train'].roles['assistant'][0]:,}, " in body
    assert "en 40 of 40" in body and "en 4 of 4" in body
    told = re.findall(r'data-t="([\d,–]+) tokens: ([\d,]+) conversations"', text)
    assert sum(int(count.replace(",", "")) for _, count in told) == 44
    told = re.findall(r'data-t="(\d+–\d+ %) targets: (\d+) conversations"', text)
    assert len(told) == 40 and sum(int(count) for _, count in told) == 44


def test_findings_and_what_is_unlikely(tmp_path: Path) -> None:
    firsts = tuple(f"a.jsonl:{number}: equals a.jsonl:1" for number in range(2, 22))
    unlikely = [Unlikely(7, "a.jsonl:8", 9.8765, np.array([*b"qzx"] * 100, np.int32))]
    text = page(tmp_path, findings=[Finding("duplicate", "train", "keep", 1234, firsts)], unlikely=unlikely)
    body = " ".join(re.sub(r"<[^>]+>", " ", text[text.index("<body>") :]).split())
    assert "duplicate train keep 1,234 a.jsonl:2: equals a.jsonl:1" in body
    assert "17 more of 1,234" in body and firsts[-1] in body
    assert "9.88 300 a.jsonl:8 " + "qzx" * 20 + " …" in body
    assert "Nothing." in page(tmp_path)


def test_twenty_samples_are_small(tmp_path: Path) -> None:
    turns = [Turn("system", "s" * 4000), Turn("user", "please turn on the light"), Turn("assistant", "y" * 60, loss=True)]
    text = page(tmp_path, samples=[render(*turns)] * 20, statistics={"train": counted("train")})
    assert len(text.encode()) < 350_000
    assert text.count("tokens …") == 20


def test_the_page_takes_a_real_tokenizer(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    start, end = tokenizer.convert_tokens_to_ids(SPECIAL)
    ids = [start, *tokenizer.encode("assistant\nturn on 好 the light", add_special_tokens=False, split_special_tokens=True), end]
    said = Turn("assistant", "", loss=True)
    rendered = Rendered(np.array(ids, np.int32), np.ones(len(ids), bool), np.zeros(len(ids), np.int16), (said,), None)
    text = page(tmp_path, samples=[(Conversation((said,)), rendered)], tokenizer=tokenizer)
    shown = [shown for shown, _ in tokens(text)]
    assert "".join(shown) == "<|im_start|>assistant↵\nturn on ‹E5›‹A5›‹BD› the light<|im_end|>"
    assert f"{len(ids) - 1} of {len(ids)} tokens are learned" in text, "nothing predicts the first token"
