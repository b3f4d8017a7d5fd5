"""What all conversations begin with, taken off them: the tools and system turn that method.alora reads once a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tunesmith.config import Refusal
from tunesmith.data.examples import Example, Examples


class Behind(Examples):
    """Conversations without their first `tokens` tokens, of which none is a target."""

    def __init__(self, examples: Examples, tokens: int):
        self._examples = examples
        self._tokens = tokens
        self.computed = examples.computed - tokens
        self.target_counts = examples.target_counts

    def __getitem__(self, index: int) -> Example:
        whole = self._examples[index]
        return Example(whole.ids[self._tokens :], whole.targets[self._tokens :], whole.place)


def common_beginning(conversations: Iterable[Sequence[int] | np.ndarray]) -> list[int]:
    """The tokens that all of some conversations begin with; none of none."""
    found: np.ndarray | None = None
    for ids in conversations:
        if found is None:
            found = np.asarray(ids)
        own = np.asarray(ids[: len(found)])
        different = np.flatnonzero(own != found[: len(own)])
        found = found[: int(different[0]) if len(different) else len(own)]
    return [] if found is None else [int(token) for token in found]


def before_first_question(parts: Sequence[Examples], header: Sequence[int]) -> list[int]:
    """The tokens that all conversations have in common before the only user turn of each; header: the tokens that open that turn.

    Raises Refusal where they have none, or where a conversation has several user turns: PEFT lets such an adapter act from the last one on.
    """
    advice = "type method.alora=false"
    common = common_beginning(example.ids for part in parts for example in part)
    places = _places(common, header)
    if not places or not places[0]:
        raise Refusal(
            f"method.alora=true: the conversations begin with {len(common)} tokens in common, which are no tools or system turn before "
            f"a user's — give all of them the same, or {advice}"
        )
    for part in parts:
        for example in part:
            if (turns := len(_places(example.ids.tolist(), header))) != 1:
                raise Refusal(
                    f"method.alora=true: {example.place} has {turns} user turns, and PEFT lets such an adapter act from the last one on "
                    f"— leave one turn in each, or {advice}"
                )
    return common[: places[0]]


def _places(ids: Sequence[int], header: Sequence[int]) -> list[int]:
    """Where `header` begins in ids."""
    known = list(header)
    return [at for at, token in enumerate(ids) if known and token == known[0] and list(ids[at : at + len(known)]) == known]
