"""Talk with what a run made: streams, keeps the conversation, offers the run's tools."""

from __future__ import annotations

import sys
from pathlib import Path

from tunesmith.config import Config
from tunesmith.data import Conversation, Turn
from tunesmith.data.templates import renderer_for
from tunesmith.model import load_tokenizer, model_folder, read_adapter, stream


def chat(result: Path, config: Config, once: str | None, max_new_tokens: int) -> None:
    """Answer one text, or a conversation from standard input until it ends, by the adapter or model that a run left."""
    base = model_folder(config.model)
    tokenizer = load_tokenizer(base)
    renderer = renderer_for(tokenizer, config.data)
    model = read_adapter(result, base)
    turns: list[Turn] = []
    if once is None:
        print("Type a message; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        said = once if once is not None else _ask()
        if not said:
            return
        turns.append(Turn("user", said))
        text = stream(model, renderer.prompt(Conversation(tuple(turns))), tokenizer, renderer.stop_ids, max_new_tokens)
        turns.append(Turn("assistant", text or "..."))
        if once is not None:
            return


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
