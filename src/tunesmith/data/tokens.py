"""From texts to tokens: many conversations with few calls of the tokenizer, and a text that recurs only once.

Templates lay out parts; what is plain text, what may hold special tokens and what is a token id already is said by each part.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer as Backend

from tunesmith.data.words import Words, marks, splits_at_blanks

REMEMBERED = 2**22
"""Characters of recurring texts whose tokens are kept: tools and system lines of many kinds."""
NOTED = 2**17
"""Texts of which only a hash is kept, to tell whether they come again."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]: ...
    def convert_tokens_to_ids(self, token: str) -> int: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...


class Markup(NamedTuple):
    """A text written by a template, in which special tokens are recognised."""

    text: str
    after: str = ""
    """What stands before it, from the last special token on: it can change the text's tokens, and its own are not wanted."""


class Behind(NamedTuple):
    """Plain text behind other plain text, which can change its tokens, and whose own are not wanted."""

    text: str
    after: str


Content = str | Markup | Behind | np.ndarray
"""Plain text, in which nothing is a special token; a template's text; plain text behind another; or token ids, int32."""


class Part(NamedTuple):
    """A piece of a conversation that is all of one turn, and all learned or all not."""

    content: Content
    turn: int
    """Index of the turn it came from, -1 for the frame."""
    learned: bool


class FastTokenizer:
    """A tokenizer of the library `tokenizers` in a copy of its own: what is set here is set for nobody else."""

    def __init__(self, serialised: str, control: Collection[str] = ()):
        """control: added tokens to take for special ones; some models have published theirs as if they were words."""
        self._backend = Backend.from_str(serialised)
        if any(token.content in control and not token.special for token in self._backend.get_added_tokens_decoder().values()):
            settings = json.loads(serialised)
            for token in settings["added_tokens"]:
                token["special"] |= token["content"] in control
            serialised = json.dumps(settings, ensure_ascii=False)
            self._backend = Backend.from_str(serialised)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.digest = hashlib.sha256(serialised.encode()).hexdigest()
        about = json.loads(serialised)  # once: a large vocabulary takes 0.2 s
        self._words = Words(self._backend) if splits_at_blanks(about) else None
        self.marks = marks(about) if self._words is not None else None
        """A pattern of its special tokens and the id of each, where a text may be cut at them."""
        self.added_tokens_decoder = self._backend.get_added_tokens_decoder()

    def __reduce__(self) -> tuple[type[FastTokenizer], tuple[str]]:
        return type(self), (self._backend.to_str(),)

    def encode_all(self, texts: list[str], split_special_tokens: bool = True) -> list[np.ndarray]:
        """Token ids of each text, int32, on as many cores as the library takes."""
        self._backend.encode_special_tokens = split_special_tokens
        if self._words is not None and split_special_tokens:
            return self._words.encode_all(texts)
        if self._words is not None and self.marks:
            return self._around_marks(texts)
        # Arrays at once: many lists that live on would have Python's garbage collector look at every object of torch.
        return [np.array(encoding.ids, np.int32) for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _around_marks(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids where special tokens are recognised: they cut a text, and what lies between two of them is plain."""
        assert self._words is not None
        assert self.marks
        pattern, ids = self.marks
        cut = [pattern.split(text) for text in texts]  # at every second place a special token
        self._backend.encode_special_tokens = True
        plain = iter(self._words.encode_all([piece for pieces in cut for piece in pieces[::2]]))
        joined = []
        for pieces in cut:
            found = [next(plain)]
            for mark in pieces[1::2]:
                found += [ids[mark], next(plain)]
            joined.append(np.concatenate(found))
        return joined

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        """Token ids of one text."""
        self._backend.encode_special_tokens = split_special_tokens
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def convert_tokens_to_ids(self, token: str) -> int:
        """Id of a token; raises KeyError if there is none."""
        return self.get_vocab()[token]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        """Ids of all tokens."""
        return self._backend.get_vocab()


class Encoder:
    """Tokens of many texts at once, those of recurring ones from memory."""

    def __init__(self, tokenizer: Tokenizer, control: Collection[str] = ()):
        """control: added tokens that no text may become, whether or not the tokenizer calls them special."""
        control = {*control, *getattr(tokenizer, "all_special_tokens", ())}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.tokenizer: Any = FastTokenizer(backend.to_str(), control) if isinstance(backend, Backend) else tokenizer
        """Needs no transformers if the one given has a backend, and goes to other processes in its place."""
        added = list(getattr(self.tokenizer, "added_tokens_decoder", {}).values())
        self.added = [token.content for token in added]
        """Texts of all tokens that are found in a text before it is taken apart into words."""
        special = {token.content for token in added if token.special} | control.intersection([*self.added, *tokenizer.get_vocab()])
        self.marks = sorted(special, key=lambda token: (-len(token), token))
        """Texts of all special tokens, the longest first."""
        self.special = re.compile("|".join(map(re.escape, self.marks)) or "(?!)")
        """Any special token's text; the longest where several begin at the same place."""
        self._control = tuple(sorted(control))
        self._memories = {marked: Memory(REMEMBERED) for marked in (False, True)}

    def __reduce__(self) -> tuple[type[Encoder], tuple[Any, tuple[str, ...]]]:
        return type(self), (self.tokenizer, self._control)

    @property
    def digest(self) -> str:
        """A hash of all that tokens depend on."""
        return getattr(self.tokenizer, "digest", "") or hashlib.sha256(pickle.dumps(self.tokenizer)).hexdigest()

    def apart(self, text: str, after: str) -> list[Content]:
        """What has the tokens of Markup(text, after), cut at special tokens where their texts may be cut."""
        if not (marks := getattr(self.tokenizer, "marks", None)):
            return [Markup(text, after)]
        pattern, ids = marks
        first, *others = pattern.split(text)
        before = pattern.split(after)[-1]
        contents: list[Content] = [Behind(first, before) if before else first]
        for mark, piece in zip(others[::2], others[1::2], strict=True):
            contents += [ids[mark], piece]
        return [content for content in contents if not isinstance(content, str) or content]

    def tokens(self, contents: Sequence[Content]) -> list[np.ndarray]:
        """The tokens of each content, int32; each distinct text is encoded once."""
        plain = self._all((content for content in contents if isinstance(content, str)), False)
        behind = self._behind({content for content in contents if isinstance(content, Behind)}, False)
        marked = self._behind({content for content in contents if isinstance(content, Markup)}, True)
        return [
            content
            if isinstance(content, np.ndarray)
            else plain[content]
            if isinstance(content, str)
            else behind[content]
            if isinstance(content, Behind)
            else marked[content]
            for content in contents
        ]

    def _behind(self, ones: Collection[Behind | Markup], marked: bool) -> dict[Behind | Markup, np.ndarray]:
        """The tokens of each without those of what stands before it."""
        encoded = self._all((text for one in ones for text in (one.after + one.text, one.after)), marked)
        found: dict[Behind | Markup, np.ndarray] = {}
        torn: dict[Behind | Markup, str] = {}
        for one in ones:
            whole, before = encoded[one.after + one.text], encoded[one.after]
            if not one.after:
                found[one] = whole
            elif whole[: len(before)].tobytes() == before.tobytes():
                found[one] = whole[len(before) :]
            else:  # a token would reach over the beginning: then the text stands behind the special token alone
                special = self.special.match(one.after)
                torn[one] = special[0] if special else ""
        if torn:
            encoded = self._all((special + one.text for one, special in torn.items()), marked)
            found |= {one: encoded[special + one.text][len(special) > 0 :] for one, special in torn.items()}
        return found

    def _all(self, texts: Iterable[str], marked: bool) -> dict[str, np.ndarray]:
        memory, counts = self._memories[marked], Counter(texts)
        found: dict[str, np.ndarray] = {}
        new: list[str] = []
        for text in counts:
            if (known := memory.get(text)) is None:
                new.append(text)
            else:
                found[text] = known
        for text, ids in zip(new, self._encoded(new, marked), strict=True):
            found[text] = ids
            memory.add(text, ids, recurs=counts[text] > 1)
        return found

    def _encoded(self, texts: list[str], marked: bool) -> list[np.ndarray]:
        if not texts:
            return []
        if isinstance(self.tokenizer, FastTokenizer):
            return self.tokenizer.encode_all(texts, split_special_tokens=not marked)
        if marked:
            return [self._taken_apart(text) for text in texts]
        if hasattr(self.tokenizer, "encode_all"):
            return [np.array(ids, np.int32) for ids in self.tokenizer.encode_all(texts)]
        each = (self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts)
        return [np.array(ids, np.int32) for ids in each]

    def _taken_apart(self, text: str) -> np.ndarray:
        """A template's text by a tokenizer of Python, which has its own mind about special tokens in a text."""
        ids: list[int] = []
        for piece in re.split(f"({self.special.pattern})", text):
            if self.special.fullmatch(piece):
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
        return np.array(ids, np.int32)


class Memory:
    """Tokens of texts that came more than once; those not asked for longest go first."""

    def __init__(self, characters: int):
        self._left = characters
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self._noted: set[int] = set()

    def get(self, text: str) -> np.ndarray | None:
        """Its tokens, if they are kept."""
        if (ids := self._kept.get(text)) is not None:
            self._kept.move_to_end(text)
        return ids

    def add(self, text: str, ids: np.ndarray, recurs: bool) -> None:
        """Keep the tokens if the text is known to recur, or was added before."""
        if not recurs and (key := hash(text)) not in self._noted:
            if len(self._noted) >= NOTED:
                self._noted.clear()
            self._noted.add(key)
            return
        self._kept[text] = ids
        self._left -= len(text)
        while self._left < 0:
            self._left += len(self._kept.popitem(last=False)[0])
