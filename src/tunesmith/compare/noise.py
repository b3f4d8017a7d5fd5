"""Which differences between settings are more than noise: by runs that differ in the seed alone, and by intervals over the questions asked.

A setting is all that a run was asked to do but its seed. Two kinds of noise are known, and each has its own evidence: training again
with another seed (order of the data, beginning of adapters, dropout), and which questions happen to be in the test set. A difference
counts as outside the noise only if it is outside of all that there is evidence for; where there is none, that is what is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tunesmith.compare.runs import Run
from tunesmith.config import NOT_IN_RUN_ID
from tunesmith.metrics.uncertainty import Interval, between, spread, student

INSIDE, OUTSIDE, UNKNOWN, BEST, SAME = "inside the noise", "outside the noise", "no evidence", "best", "equal"


@dataclass(frozen=True)
class Setting:
    """One setting held against the best one by one measure."""

    runs: list[int]
    """Places of its runs that have the measure."""
    mean: float
    gap: float
    """mean - that of the best."""
    verdict: str
    evidence: str
    """What the verdict rests on, with numbers."""


def is_left_out(key: str) -> bool:
    """Whether a setting does not change the result, or says only what the run is called."""
    return key in ("name", "train.seed") or any(key == out or key.startswith(f"{out}.") for out in NOT_IN_RUN_ID)


def signature(run: Run) -> tuple[object, ...]:
    """Equal for runs that differ in the seed alone: the settings that change a result, the data's fingerprint, and what it ran on."""
    settings = sorted((key, repr(value)) for key, value in run.config.items() if not is_left_out(key))
    return (*settings, run.status.get("data"), run.plan.get("card"), run.ranks)


def settings_of(runs: Sequence[Run]) -> list[list[int]]:
    """Places of the runs of each setting, in the order in which they come. Of runs with one seed too, one counts."""
    groups: dict[tuple[object, ...], dict[str, int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(signature(run), {}).setdefault(repr(run.config.get("train.seed")), place)
    return [list(seeds.values()) for seeds in groups.values()]


def judge_settings(
    groups: Sequence[Sequence[int]], found: Sequence[float | None], intervals: Sequence[Interval | None], lower_is_better: bool
) -> list[Setting]:
    """Each setting against the one with the best mean, best first.

    found and intervals: by run, None where the run has none. The spread between seeds is taken to be the same for all settings, and
    pooled; t has the pooled degrees of freedom.
    """
    measured = [[place for place in group if found[place] is not None] for group in groups]
    groups = [group for group in measured if group]
    if not groups:
        return []
    of: Mapping[int, float] = {place: value for place, value in enumerate(found) if value is not None}
    ranked = sorted(groups, key=lambda group: fmean(of[place] for place in group) * (1 if lower_is_better else -1))
    deviation, freedom = spread([[of[place] for place in group] for group in groups])
    best = ranked[0]
    return [_against(best, group, of, intervals, deviation, freedom) for group in ranked]


def _against(
    best: Sequence[int], group: Sequence[int], of: Mapping[int, float], intervals: Sequence[Interval | None], deviation: float, freedom: int
) -> Setting:
    mean, top = (fmean(of[place] for place in some) for some in (group, best))
    gap = mean - top
    if group is best:
        return Setting(list(group), mean, 0.0, BEST, "")
    said: list[str] = []
    outside: list[bool] = []
    if freedom:
        margin = student(freedom) * deviation * math.sqrt(1 / len(group) + 1 / len(best))
        outside.append(abs(gap) > margin)
        said.append(f"seeds: ±{margin:.3g}")
    pairs = [[intervals[place] for place in some] for some in (group, best)]
    if all(pair is not None for some in pairs for pair in some):
        mine, theirs = ((fmean(pair[0] for pair in some if pair), fmean(pair[1] for pair in some if pair)) for some in pairs)
        low, high = between(mean, mine, top, theirs)
        outside.append(not low <= 0 <= high)
        said.append(f"questions: {low:+.3g} to {high:+.3g}")
    if not outside:
        return Setting(list(group), mean, gap, SAME if gap == 0 else UNKNOWN, "one seed each, and no interval")
    verdict = SAME if gap == 0 else OUTSIDE if all(outside) else INSIDE
    return Setting(list(group), mean, gap, verdict, ", ".join(said))


def evidence_line(groups: Sequence[Sequence[int]], found: Sequence[float | None]) -> str:
    """What is known about the noise between seeds, for one measure."""
    values = [[value for place in group if (value := found[place]) is not None] for group in groups]
    deviation, freedom = spread(values)
    if not freedom:
        return "no two runs differ in train.seed alone, so nothing is known about noise between seeds — run one again with train.seed=1"
    several = sum(len(group) > 1 for group in values)
    runs = sum(len(group) for group in values if len(group) > 1)
    return (
        f"between seeds it varies by {deviation:.3g} (standard deviation; {runs} runs of {several} setting{'s' * (several > 1)}, "
        f"{freedom} degree{'s' * (freedom > 1)} of freedom{', so margins are wide' if freedom < 5 else ''})"
    )
