"""Two runs: what was asked, read, installed and planned otherwise, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.compare.noise import is_left_out
from tunesmith.compare.runs import Run, flatten
from tunesmith.compare.table import Measure, measure
from tunesmith.metrics.uncertainty import between

PLANNED = ("card", "world_size", "micro_batch", "accumulation", "steps", "epochs", "longest_tokens", "trained_weights")


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same; a result is told where it is the same, too."""

    part: str
    """settings, data, versions, plan or results."""
    name: str
    first: Any
    second: Any
    remark: str


def difference(first: Run, second: Run) -> list[Difference]:
    """All that differs between two runs, and their results side by side."""
    found = _unlike("settings", first.config, second.config)
    found = [
        one if not _only_names(one.name) else Difference(one.part, one.name, one.first, one.second, "does not change the result")
        for one in found
    ]
    found += _unlike(
        "data", {"fingerprint": first.status.get("data")}, {"fingerprint": second.status.get("data")}, "of all parts, prepared"
    )
    found += _unlike("data", _counts(first), _counts(second))
    found += _unlike("versions", flatten(first.environment), flatten(second.environment))
    found += _unlike("plan", {key: first.plan.get(key) for key in PLANNED}, {key: second.plan.get(key) for key in PLANNED})
    found += _unlike("results", {"state": first.state}, {"state": second.state})
    return found + [_result(measure(key), first, second) for key in dict.fromkeys([*first.results, *second.results])]


def _counts(run: Run) -> dict[str, Any]:
    return {"conversations": run.plan.get("conversations") or None}


def _only_names(key: str) -> bool:
    return is_left_out(key) and key != "train.seed"


def _unlike(part: str, first: dict[str, Any], second: dict[str, Any], remark: str = "") -> list[Difference]:
    return [
        Difference(part, key, first.get(key), second.get(key), remark)
        for key in dict.fromkeys([*first, *second])
        if repr(first.get(key)) != repr(second.get(key))
    ]


def _result(one: Measure, first: Run, second: Run) -> Difference:
    """A result of both, how far apart they are, and whether that means something as far as one run each can tell."""
    mine, theirs = (run.results.get(one.key) for run in (first, second))
    if mine is None or theirs is None:
        return Difference("results", one.key, mine, theirs, "")
    gap = theirs - mine
    better = "" if gap == 0 else "better" if (gap < 0) == one.lower_is_better else "worse"
    said = f"{gap:+.3g} {better}" if gap else "equal"
    if one.key.startswith(("dev/", "test/")) and gap:
        pair = [run.intervals.get(one.key) for run in (first, second)]
        if pair[0] and pair[1]:
            low, high = between(theirs, pair[1], mine, pair[0])
            said += f"; {'inside' if low <= 0 <= high else 'outside'} the noise of the questions ({low:+.3g} to {high:+.3g})"
        else:
            said += "; one run each: no evidence about noise"
    return Difference("results", one.key, mine, theirs, said)
