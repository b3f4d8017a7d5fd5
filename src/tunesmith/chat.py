"""Talk with what a run made: streams, and keeps the conversation. Where adapters act from the user's turn on (method.alora), each text
stands alone behind the tools and system turn of the training data, as it did there."""

from __future__ import annotations

import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

from tunesmith.config import Config
from tunesmith.data import Conversation, Turn
from tunesmith.data.conversations import parse_conversation
from tunesmith.data.files import sources
from tunesmith.data.templates import renderer_for
from tunesmith.model import load_tokenizer, model_folder, read_adapter, stream


def chat(result: Path, config: Config, once: str | None, max_new_tokens: int) -> None:
    """Answer one text, or a conversation from standard input until it ends, by the adapter or model that a run left."""
    base = model_folder(config.model)
    tokenizer = load_tokenizer(base)
    renderer = renderer_for(tokenizer, config.data)
    model = read_adapter(result, base)
    before, tools = _opening(config) if config.method.alora else ([], None)
    turns = list(before)
    if once is None:
        print("Type a message; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        said = once if once is not None else _ask()
        if not said:
            return
        turns.append(Turn("user", said))
        text = stream(model, renderer.prompt(Conversation(tuple(turns), tools)), tokenizer, renderer.stop_ids, max_new_tokens)
        turns = list(before) if config.method.alora else [*turns, Turn("assistant", text or "...")]
        if once is not None:
            return


def _opening(config: Config) -> tuple[list[Turn], Any]:
    """What all training conversations begin with, from the first of them: turns before the user's, and tools."""
    source = sources(config.data.train, Path(config.data.folder))[0]
    place, record = next(source.records())
    first = parse_conversation(record, place, config.data)
    return list(takewhile(lambda turn: turn.role != "user", first.turns)), first.tools


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
