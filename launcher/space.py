"""What a search may try: the values and intervals that the words of a command leave open, in Hydra's grammar for sweeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from launcher.sweep import parsed
from tunesmith.compose import choices
from tunesmith.config import AUTO, Config, Refusal, leaves

MOST_CORNERS = 24


@dataclass(frozen=True)
class Space:
    """What the words of a search leave open, and the words of each point of it."""

    words: tuple[str, ...]
    """As typed, but of settings that are searched only what is left of the equals sign."""
    ranges: Mapping[str, BaseDistribution]
    """By what is left of the equals sign."""

    def changed(self, point: Mapping[str, Any]) -> list[str]:
        """The words that make a trial this one."""
        return [f"{key}={typed(point[key], among)}" for key, among in self.ranges.items()]

    def at(self, point: Mapping[str, Any]) -> list[str]:
        """All words of a trial, for train.py."""
        return [f"{word}={typed(point[word], self.ranges[word])}" if word in self.ranges else word for word in self.words]

    @property
    def size(self) -> float:
        """How many different trials there are."""
        return math.prod(_count(among) for among in self.ranges.values())

    def corners(self) -> list[dict[str, Any]]:
        """Points at the ends: every combination of lowest, highest and each choice; where these are many, each beside the lowest others."""
        ends = {key: _ends(among) for key, among in self.ranges.items()}
        if math.prod(map(len, ends.values())) <= MOST_CORNERS:
            return [dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values())]
        low, high = {key: values[0] for key, values in ends.items()}, {key: values[-1] for key, values in ends.items()}
        return [low, *({**low, key: value} for key, values in ends.items() for value in values[1:]), high]

    def describe(self) -> str:
        """A line for each setting that is searched."""
        width = max(map(len, self.ranges))
        return "\n".join(f"{key:{width}}  {_in_words(among)}" for key, among in self.ranges.items())


def space_of(words: Sequence[str]) -> Space:
    """The space that words mean, in Hydra's grammar for sweeps; raises Refusal for those that none can be made of."""
    ranges, kept = {}, []
    for one, word in zip(parsed(words), words, strict=True):
        if one.is_sweep_override():
            kept.append(key := one.get_key_element())
            ranges[key] = _range_of(one, word)
        else:
            kept.append(word)
    if not ranges:
        raise Refusal(
            "--search: nothing is left open — type values or an interval: optim.lr='tag(log,interval(1e-5,1e-3))' method.r=8,16,32"
        )
    return Space(tuple(kept), ranges)


def _range_of(one: Override, word: str) -> BaseDistribution:
    value = one.value()
    tags: set[str] = getattr(value, "tags", set())
    log = "log" in tags
    if tags - {"log"} or (log and one.is_choice_sweep()):
        raise Refusal(f"override {word}: a search knows the tag log, of an interval or a range — leave the tag out")
    if one.is_choice_sweep():
        if not (found := list(dict.fromkeys(one.sweep_string_iterator()))):
            raise Refusal(f"override {word}: a choice of nothing (options: {', '.join(choices(one.key_or_group)) or 'none'})")
        return CategoricalDistribution(found)
    default = dict(leaves(Config())).get(one.key_or_group, 0.0)  # of an unknown setting composing will say that
    if default == AUTO:
        default = 1  # what stands beside it is a whole number
    if isinstance(default, bool) or not isinstance(default, int | float):
        raise Refusal(f"override {word}: {one.key_or_group} is not a number — type its values: {one.key_or_group}=a,b,c")
    step: float = 0
    if isinstance(value, RangeSweep):
        numbers: list[float] = list(value.range())
        low, high, step = min(numbers, default=0), max(numbers, default=0), abs(value.step)
    else:
        assert isinstance(value, IntervalSweep)
        assert value.start is not None
        assert value.end is not None
        low, high = value.start, value.end
    if isinstance(default, int):
        low, high = math.ceil(low), math.floor(high)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise Refusal(f"override {word}: has no two values — type the lower end first, then the higher one")
    if log and low <= 0:
        raise Refusal(f"override {word}: a logarithmic scale begins above 0")
    if log and step not in (0, 1):
        raise Refusal(f"override {word}: a logarithmic scale has no steps of {step:g} — type tag(log,interval({low:g},{high:g}))")
    if isinstance(default, int):
        return IntDistribution(int(low), int(high), log=log, step=int(step) or 1)
    return FloatDistribution(low, high, log=log, step=step if step and not log else None)


def typed(value: Any, among: BaseDistribution) -> str:
    """A value as a word: numbers to four digits, which says as much and makes words that can be typed."""
    if isinstance(among, FloatDistribution):
        return repr(min(max(float(f"{value:.4g}"), among.low), among.high))
    return str(value)


def _ends(among: BaseDistribution) -> list[Any]:
    if isinstance(among, CategoricalDistribution):
        return list(among.choices)
    return [among.low, among.high]  # type: ignore[attr-defined]  # all other distributions have them, their base does not say so


def _count(among: BaseDistribution) -> float:
    if isinstance(among, CategoricalDistribution):
        return len(among.choices)
    if isinstance(among, IntDistribution):
        return (among.high - among.low) // among.step + 1
    assert isinstance(among, FloatDistribution)
    return round((among.high - among.low) / among.step) + 1 if among.step else math.inf


def _in_words(among: BaseDistribution) -> str:
    if isinstance(among, CategoricalDistribution):
        return ", ".join(map(str, among.choices))
    low, high = (typed(end, among) for end in _ends(among))
    assert isinstance(among, IntDistribution | FloatDistribution)
    if among.log:
        return f"{low} to {high}, logarithmic"
    step = f", in steps of {among.step:g}" if among.step and among.step != 1 else ""
    wide = among.low > 0 and among.high / among.low >= 100
    return f"{low} to {high}{step}{' (tag(log,interval(...)) would give small values their share)' if wide else ''}"
