"""How sure a number is: 95 % intervals of shares and of F1 over the questions asked, and the spread between seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

Interval = tuple[float, float]

Z = 1.959964
"""Normal quantile: 95 % lie within."""
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
    2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t by degrees of freedom, from 1: 95 % lie within. With two runs of one setting and nothing else it is 12.7."""
RESAMPLES = 1000


def student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t; the normal one beyond the table (2 % too small at most)."""
    return T[freedom - 1] if freedom <= len(T) else Z


def wilson(share: float, count: int) -> Interval:
    """95 % interval of a share of `count` independent questions (Wilson 1927): it stays within 0 and 1, and has a width at both ends."""
    square = Z * Z / count
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def f1_interval(counts: Sequence[tuple[int, int, int]]) -> Interval:
    """95 % interval of micro F1 over questions of (found, given, wanted), by resampling questions (percentile bootstrap, a fixed seed).

    Where every resample gives the same, as at F1 = 1, that says nothing: then it is the interval of a share of that many questions.
    """
    import numpy as np

    table = np.array(counts, np.int64)
    draws = np.random.default_rng(0)
    scores = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        found, given, wanted = draws.poisson(1.0, len(table)) @ table  # Poisson weights: the multinomial ones at a fraction of the cost
        scores[number] = 2 * found / max(1, given + wanted)
    low, high = (float(bound) for bound in np.quantile(scores, (0.025, 0.975)))
    if high - low > 1e-12:
        return low, high
    return wilson(low, len(table))


def spread(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, pooled over all of them, and its degrees of freedom; (0.0, 0) where no group has two."""
    squares = sum(sum((value - fmean(group)) ** 2 for value in group) for group in groups if len(group) > 1)
    freedom = sum(len(group) - 1 for group in groups if len(group) > 1)
    return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)


def between(first: float, first_interval: Interval, second: float, second_interval: Interval) -> Interval:
    """95 % interval of first - second from those of both, as if they were independent (Zou and Donner 2008; Newcombe's for shares)."""
    gap = first - second
    low = gap - math.hypot(first - first_interval[0], second_interval[1] - second)
    return low, gap + math.hypot(first_interval[1] - first, second - second_interval[0])
