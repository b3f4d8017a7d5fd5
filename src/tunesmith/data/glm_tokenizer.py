"""ChatGLM's tokenizer, read from its SentencePiece model.

The class that is published with these models is remote code, written for transformers 4. What it does for text is little:
SentencePiece's pieces, and a few special tokens whose ids follow them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import groupby
from multiprocessing import parent_process
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from tunesmith.config import Refusal

FRAME = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
MODEL, CODE, SETTINGS = "tokenizer.model", "tokenization_chatglm.py", "tokenizer_config.json"


class GlmTokenizer:
    """The tokenizer of ChatGLM2 and ChatGLM3, whose special tokens have ids and no spelling: no text becomes one."""

    def __init__(self, proto: bytes, roles: bool = True):
        """proto: the content of tokenizer.model; roles: whether ChatGLM3's role tokens follow the five of ChatGLM2."""
        self.proto = proto
        self.roles = roles
        self._pieces = SentencePieceProcessor(model_proto=proto)
        self._count: int = self._pieces.get_piece_size()
        self._special = {token: self._count + place for place, token in enumerate((*FRAME, *(ROLES if roles else ())))}
        controls = (self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id())
        self._names = {token: self._pieces.id_to_piece(token) for token in controls if token >= 0}
        self._names |= {token: name for name, token in self._special.items()}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GlmTokenizer:
        """The tokenizer of a model folder; raises Refusal if its tokenizer.model is missing or damaged."""
        folder = Path(folder)
        # ChatGLM2's pieces are those of ChatGLM3; it is told by code and settings that name no roles.
        told = [path.read_text("utf-8") for path in (folder / CODE, folder / SETTINGS) if path.is_file()]
        try:
            proto = (folder / MODEL).read_bytes()
            if not proto:  # SentencePiece takes that for a model to be loaded later
                raise RuntimeError
            return cls(proto, roles=not told or any("<|user|>" in text for text in told))
        except OSError as error:
            raise Refusal(f"model.path={folder}: {MODEL} cannot be read ({error.strerror}) — copy it there from the model") from None
        except RuntimeError:
            raise Refusal(
                f"model.path={folder}: {MODEL} is no SentencePiece model — download the file itself, not Git LFS's pointer"
            ) from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `from_pretrained` reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / MODEL).write_bytes(self.proto)
        settings = {"tokenizer_class": "ChatGLMTokenizer", "additional_special_tokens": list(self._special)}
        (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    def __reduce__(self) -> tuple[type[GlmTokenizer], tuple[bytes, bool]]:
        return type(self), (self.proto, self.roles)

    def __len__(self) -> int:
        return self._count + len(self._special)

    @property
    def eos_token_id(self) -> int:
        """Id of </s>."""
        return self._pieces.eos_id()

    @property
    def pad_token_id(self) -> int:
        """Id that fills up rows; ChatGLM takes <unk> for it."""
        return self._pieces.unk_id()

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        """Token ids of a text, with [gMASK] sop in front if wanted; special tokens in it are split whatever is asked for."""
        ids: list[int] = self._pieces.encode(text)
        return [self._special["[gMASK]"], self._special["sop"], *ids] if add_special_tokens else ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, on all cores."""
        threads = 1 if parent_process() else len(os.sched_getaffinity(0))  # a worker process is one of as many as there are cores
        found: list[list[int]] = self._pieces.encode(texts, num_threads=threads)
        return found

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids, without the blank that encoding put first."""
        texts: list[str] = []
        kept = [token for token in map(int, ids) if not skip_special_tokens or self._is_text(token)]
        for is_text, run in groupby(kept, self._is_text):
            tokens = list(run)
            # A model has more rows than there are tokens, and may say one.
            texts += [self._pieces.decode(tokens)] if is_text else [self._names.get(token, "") for token in tokens]
        return "".join(texts)

    def _is_text(self, token: int) -> bool:
        return 0 <= token < self._count and token not in self._names

    def convert_tokens_to_ids(self, token: str) -> int:
        """Id of a special token or a piece; that of <unk> if there is none."""
        return self._special[token] if token in self._special else self._pieces.piece_to_id(token)

    def get_vocab(self) -> dict[str, int]:
        """Ids of all pieces and special tokens; where a piece is spelt like a special token, of the latter."""
        pieces = self._pieces.id_to_piece(list(range(self._count)))
        return dict(zip(pieces, range(self._count), strict=True)) | self._special
