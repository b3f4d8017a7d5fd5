"""From files to tokens: read, check, render, and say which conversation goes into which step.

`load` is the door. Everything here runs before process groups exist; ranks that start together wait on a file lock, not
on a barrier that could time out while one of them works.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from tunesmith.config import Config, Prepare, Refusal
from tunesmith.data.beginning import Behind, before_first_question, common_beginning
from tunesmith.data.conversations import Call, Conversation, Turn
from tunesmith.data.examples import Example, Examples, ListedExamples
from tunesmith.plan import Counts

if TYPE_CHECKING:
    from tunesmith.data.parts import Part
    from tunesmith.data.prefixes import Beginnings
    from tunesmith.data.templates import Renderer, Tokenizer

__all__ = [
    "Call", "Conversation", "Dataset", "Example", "Examples", "ListedExamples", "Question", "Turn", "load", "prepare_files", "survey",
]  # fmt: skip

LOOKED_AT = 1000
"""Conversations whose beginnings are compared, at most."""


@dataclass(frozen=True)
class Question:
    """A held-out conversation cut before its last answer."""

    prompt: list[int]
    """Tokens that the model reads."""
    text: str
    """What the user said last, for people."""
    answer: Turn
    """What is wanted."""


@dataclass(frozen=True)
class Dataset:
    train: Examples
    dev: Examples
    test: Examples
    questions: list[Question]
    """The test conversations as prompts, in file order."""
    renderer: Renderer
    notes: list[str]
    """What was cut, left out or kept all the same, a line for each kind."""
    fingerprint: str
    """8 hex of the rendered training data: a resumed run must find what it began with."""
    beginning: tuple[int, ...] = ()
    """Tokens before the user's turn that every conversation has, and train, dev and test are without (method.alora)."""
    invocation: tuple[int, ...] = ()
    """Tokens that open the user's turn behind them."""

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest training conversation."""
        return int(self.train.computed.max())

    @cached_property
    def beginnings(self) -> Beginnings:
        """Every beginning of the training conversations once, for method.cache_frozen."""
        from tunesmith.data.prefixes import Beginnings

        return Beginnings(self.train)

    @property
    def tokens(self) -> int:
        """Tokens of all training conversations that go through the model."""
        return int(self.train.computed.sum())

    @property
    def common_tokens(self) -> int:
        """Tokens that the training conversations all begin with and a micro-batch computes once, as far as LOOKED_AT of them say."""
        from tunesmith.data.layout import LEAST_SHARED

        chosen = np.unique(np.linspace(0, len(self.train) - 1, LOOKED_AT).astype(np.int64))
        common = len(common_beginning((one := self.train[int(number)]).ids[: one.computed] for number in chosen))
        return common if common >= LEAST_SHARED else 0

    def counts(self, config: Config) -> Counts:
        """What a plan has to know of all this."""
        states = len(self.beginnings) if config.method.cache_frozen else 0
        return Counts(len(self.train), self.tokens, self.longest_tokens, self.common_tokens, len(self.beginning), states)


def prepare_files(config: Config) -> None:
    """Make the data files that `data.prepare` names, once, whichever rank or run comes first; the others wait."""
    if config.data.prepare is Prepare.none:
        return
    from tunesmith.data.smart_home import prepare

    folder = Path(config.data.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder.with_suffix(".lock"))):
            prepare(
                folder,
                language=config.data.language,
                train=config.data.prepare_train,
                dev=config.data.prepare_dev,
                test=config.data.prepare_test,
            )
    except OSError as error:
        raise Refusal(f"data.folder={folder}: cannot write the prepared files there ({error.strerror}) — choose another folder") from None
    except (ValueError, ImportError) as error:
        raise Refusal(str(error)) from None


def load(config: Config, tokenizer: Tokenizer) -> Dataset:
    """Read, check and render all the files of a run; raises Refusal listing everything that is wrong with them."""
    from tunesmith.data.templates import renderer_for

    renderer = renderer_for(tokenizer, config.data)
    parts = survey(config, renderer)
    if problems := [line for part in parts.values() for line in part.problems(config.data)]:
        raise Refusal("\n".join(problems))
    nothing = ListedExamples([])
    dataset = Dataset(
        parts["train"].examples,
        parts["dev"].examples if "dev" in parts else nothing,
        parts["test"].examples if "test" in parts else nothing,
        list(_questions(parts["test"])) if "test" in parts else [],
        renderer,
        [note for part in parts.values() for note in part.notes(config.data)],
        parts["train"].digest[:8],
    )
    return _without_beginning(dataset) if config.method.alora else dataset


def _without_beginning(dataset: Dataset) -> Dataset:
    """The same conversations from the user's turn on, and what stood before it."""
    header = dataset.renderer.header("user")
    parts = (dataset.train, dataset.dev, dataset.test)
    beginning = before_first_question(parts, header)
    train, dev, test = (Behind(part, len(beginning)) for part in parts)
    note = f"alora    {len(beginning):,} tokens before the user's turn are read once by the frozen model; all else counts from there"
    return replace(
        dataset, train=train, dev=dev, test=test, beginning=tuple(beginning), invocation=header, notes=[*dataset.notes, note]
    )


def survey(config: Config, renderer: Renderer) -> dict[str, Part]:
    """Every part with all that was found in it, whether or not it forbids a start: train, dev, test, as far as they are named."""
    from tunesmith.data.parts import read_parts

    parts = read_parts(config.data, renderer)
    return {name: parts[name] for name in ("train", "dev", "test") if name in parts}


def _questions(part: Part) -> Iterator[Question]:
    for index in range(len(part.examples)):
        file, row = part.examples.find(index)
        if found := file.question(row):
            turn = found["answer"]
            call = Call(**turn.pop("call")) if turn["call"] else None
            yield Question(found["prompt"], found["text"], Turn(**{**turn, "call": call}))
