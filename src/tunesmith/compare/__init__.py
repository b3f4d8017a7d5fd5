"""Many runs side by side: what differs between them, what came of it, which are Pareto-best, and which differences mean something."""

from tunesmith.compare.difference import Difference, difference
from tunesmith.compare.noise import Setting, judge_settings
from tunesmith.compare.runs import Glance, Run, find_runs, glance, runs_below
from tunesmith.compare.table import Comparison, Measure, compare, measure

__all__ = [
    "Comparison", "Difference", "Glance", "Measure", "Run", "Setting", "compare", "difference", "find_runs", "glance", "judge_settings",
    "measure", "runs_below",
]  # fmt: skip
