"""From files to tokens: read, check, render, and say which conversation goes into which step.

`load` is the door. Everything here runs before process groups exist; ranks that start together wait on a file lock, not
on a barrier that could time out while one of them works.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from tunesmith.config import Config, Data, Overlong, Prepare, Refusal
from tunesmith.data.conversations import Call, Conversation, Turn, read_conversations

if TYPE_CHECKING:
    from tunesmith.data.batches import Example
    from tunesmith.data.templates import Renderer, Tokenizer

__all__ = ["Call", "Conversation", "Dataset", "Question", "Turn", "load", "prepare_files"]


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
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    questions: list[Question]
    """The test conversations as prompts, in file order."""
    renderer: Renderer
    notes: list[str] = field(default_factory=list)
    """What was cut or left out, a line for each kind."""

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest training conversation."""
        return max(example.computed for example in self.train)

    @property
    def fingerprint(self) -> str:
        """8 hex of the rendered training data: a resumed run must find what it began with."""
        total = hashlib.sha256()
        for example in self.train:
            total.update(example.ids.tobytes())
            total.update(example.targets.tobytes())
        return total.hexdigest()[:8]


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
        raise Refusal(
            f"data.folder={folder}: cannot write the prepared files there ({error.strerror}) — choose another folder"
        ) from None
    except (ValueError, ImportError) as error:
        raise Refusal(str(error)) from None


def load(config: Config, tokenizer: Tokenizer) -> Dataset:
    """Read, check and render all the files of a run; raises Refusal listing everything that is wrong with them."""
    from tunesmith.data.templates import renderer_for

    renderer = renderer_for(tokenizer, config.data)
    parts: dict[str, list[Conversation]] = {"train": [], "dev": [], "test": []}
    problems: list[str] = []
    for part in parts:
        if spec := getattr(config.data, part):
            try:
                parts[part] = read_conversations(spec, f"data.{part}", config.data, Path(config.data.folder))
            except Refusal as refusal:
                problems.append(str(refusal))
    if problems:
        raise Refusal("\n".join(problems))
    notes: list[str] = []
    for part, conversations in parts.items():
        if config.data.overlong is not Overlong.error:
            parts[part], said = _shortened(part, conversations, renderer, config.data)
            notes += said
    rendered = {part: [_example(conversation, renderer) for conversation in found] for part, found in parts.items()}
    for part, examples in rendered.items():
        problems += _unusable(part, examples, config.data.max_tokens)
    problems += [
        f"data.max_tokens={config.data.max_tokens}: no conversation of data.{part} is short enough — a larger data.max_tokens"
        for part, conversations in parts.items()
        if getattr(config.data, part) and not conversations
    ]
    if problems:
        raise Refusal("\n".join(problems))
    questions = [question for conversation in parts["test"] if (question := _question(conversation, renderer))]
    return Dataset(rendered["train"], rendered["dev"], rendered["test"], questions, renderer, notes)


def _shortened(part: str, conversations: list[Conversation], renderer: Renderer, data: Data) -> tuple[list[Conversation], list[str]]:
    """The conversations that fit into data.max_tokens, cut or without the longer ones, and a line for each kind of loss."""
    kept: list[Conversation] = []
    cut = dropped = turns = 0
    for conversation in conversations:
        fitting = _fitting(conversation, renderer, data)
        if fitting is None:
            dropped += 1
            continue
        cut += fitting is not conversation
        turns += len(conversation.turns) - len(fitting.turns)
        kept.append(fitting)
    where = f"data.overlong={data.overlong.name}: data.{part}, of {len(conversations)} conversations"
    notes = [f"{where} {cut} lost {turns} turns at their front (data.max_tokens={data.max_tokens})"] if cut else []
    notes += [f"{where} {dropped} are left out, longer than data.max_tokens={data.max_tokens}"] if dropped else []
    return kept, notes


def _fitting(conversation: Conversation, renderer: Renderer, data: Data) -> Conversation | None:
    """The conversation, or its newest turns from a user turn on, behind its system turns; None if even they are too long.

    Cuts lie between turns, so no target and no stop token is ever torn off.
    """
    system = [turn for turn in conversation.turns if turn.role == "system"]
    others = conversation.turns[len(system) :]
    starts = [0]
    if data.overlong is Overlong.cut:
        starts += [index for index, turn in enumerate(others) if index and turn.role == "user"]
    for start in starts:
        rest = replace(conversation, turns=(*system, *others[start:])) if start else conversation
        pieces = renderer.render(rest)
        if sum(len(piece.ids) for piece in pieces) <= data.max_tokens:
            # What is left of a cut conversation may hold no target any more; then it teaches nothing.
            return rest if not start or any(piece.target for piece in pieces) else None
    return None


def _example(conversation: Conversation, renderer: Renderer) -> Example:
    from tunesmith.data.batches import Example

    pieces = renderer.render(conversation)
    ids = np.array([token for piece in pieces for token in piece.ids], np.int32)
    targets = np.array([piece.target for piece in pieces for _ in piece.ids], bool)
    return Example(ids, targets, conversation.place)


def _unusable(part: str, examples: list[Example], max_tokens: int) -> list[str]:
    problems = []
    if long := [example for example in examples if len(example.ids) > max_tokens]:
        longest = max(long, key=lambda example: len(example.ids))
        problems.append(
            f"data.max_tokens={max_tokens}: {len(long)} of {len(examples)} conversations in data.{part} are longer, the longest has "
            f"{len(longest.ids)} tokens ({longest.place}) — data.max_tokens={len(longest.ids)} takes all of them"
        )
    if empty := [example for example in examples if example.target_count == 0]:
        problems.append(
            f"data.{part}: {len(empty)} of {len(examples)} conversations have no target token (first: {empty[0].place}) — "
            "each needs an assistant or tool turn, or a turn with `loss: true`"
        )
    return problems


def _question(conversation: Conversation, renderer: Renderer) -> Question | None:
    """The conversation up to its last trained assistant turn; None if it has none."""
    for index in range(len(conversation.turns) - 1, 0, -1):
        turn = conversation.turns[index]
        if turn.role == "assistant" and turn.loss:
            asked = Conversation(
                conversation.turns[:index], conversation.tools, conversation.metadata, conversation.place
            )
            said = next((t.content for t in reversed(asked.turns) if t.role == "user"), "")
            return Question(renderer.prompt(asked), said, turn)
    return None
