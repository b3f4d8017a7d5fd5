"""The tokens of a text word by word, from memory: several times as fast as the tokenizer alone, where that is provably the same.

Byte-level BPE splits a text by a regular expression and merges inside the pieces only. In the expressions below a blank can
only be the first character of a piece that has anything but blanks. So before a single blank between two visible characters
a piece always ends, whatever stands around it, and what lies between two such places has the same tokens everywhere.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

BOUNDARY = re.compile(r"(?<=\S)(?= \S)")
REMEMBERED = 2**22
"""Characters of words that are remembered."""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    # Llama 3, and Qwen 2 to 3; GPT-2's own is ByteLevel's with use_regex.
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class Words(dict[str, bytes]):
    """A memory of words in front of a tokenizer of the library `tokenizers` that encodes plain text: int32 token ids, as bytes."""

    def __init__(self, backend: Backend):
        super().__init__()
        self._backend = backend
        self._characters = 0

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._backend.encode(word, add_special_tokens=False).ids, np.int32).tobytes()
        self[word] = ids
        self._characters += len(word)
        return ids

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, equal to the tokenizer's own."""
        if self._characters > REMEMBERED:
            self.clear()
            self._characters = 0
        # Bytes are joined without a look at any token.
        return [np.frombuffer(b"".join(map(self.__getitem__, BOUNDARY.split(text))), np.int32) for text in texts]


def marks(about: dict[str, Any]) -> tuple[re.Pattern[str], dict[str, np.ndarray]] | None:
    """A pattern of a tokenizer's special tokens (of its tokenizer.json) and the id of each; None where one takes more than itself.

    Of several at one place the longest is taken, as the library does.
    """
    added = about.get("added_tokens", ())
    special = sorted((token["content"] for token in added if token["special"]), key=len, reverse=True)
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    takes_more = any(token[flag] for token in added if token["special"] for flag in flags)
    # An added word that begins before a special token would take it along.
    torn = any(mark in token["content"] for token in added if not token["special"] for mark in special)
    if takes_more or torn or not special:
        return None
    ids = {token["content"]: np.array([token["id"]], np.int32) for token in added if token["special"]}
    return re.compile(f"({'|'.join(map(re.escape, special))})"), ids


def splits_at_blanks(about: dict[str, Any]) -> bool:
    """Whether the memory may stand in front of this tokenizer (its tokenizer.json)."""
    model, normalizer = about["model"], about.get("normalizer")
    # An added token that is no special one is found in plain text too, and may reach over blanks.
    added = [token for token in about.get("added_tokens", ()) if not token["special"]]
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and (normalizer is None or normalizer["type"] == "NFC")  # a blank composes with nothing before it
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] or re.search(r"\s", token["content"]) for token in added)
        and _is_known(about.get("pre_tokenizer"))
    )


def _is_known(splitter: dict[str, Any] | None) -> bool:
    steps = [] if splitter is None else splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    by_pattern = [
        step["type"] == "Split" and step["pattern"].get("Regex") in PATTERNS and step["behavior"] == "Isolated" and not step["invert"]
        for step in steps
    ]
    by_gpt2 = [step["type"] == "ByteLevel" and step["use_regex"] for step in steps]
    harmless = [step["type"] == "Digits" or (step["type"] == "ByteLevel" and not step["use_regex"]) for step in steps]
    return any(by_pattern + by_gpt2) and all(map(any, zip(by_pattern, by_gpt2, harmless, strict=True)))
