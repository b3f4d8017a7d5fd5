"""What the doctor says: a verdict, the fact behind it, and what to type."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.config import Refusal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    area: str
    verdict: Verdict
    """fail: the run will not start, or end badly; warn: it will run, but slower or otherwise than meant, or it is not known."""
    fact: str
    fix: str = ""
    """What to type or do; empty where all is well."""


def ok(area: str, fact: str) -> Finding:
    """A line that all is well."""
    return Finding(area, "ok", fact)


def warn(area: str, fact: str, fix: str) -> Finding:
    """A line about what runs, but not as meant."""
    return Finding(area, "warn", fact, fix)


def fail(area: str, fact: str, fix: str) -> Finding:
    """A line about what keeps a run from starting, or would end it."""
    return Finding(area, "fail", fact, fix)


def refused(area: str, refusal: Refusal) -> list[Finding]:
    """The lines of a refusal as findings: what stands behind the last dash is the fix."""
    lines = [line for line in str(refusal).splitlines() if line.strip()]
    parts = [line.rpartition(" — ") if " — " in line else (line, "", "change it, and ask again") for line in lines]
    return [fail(area, fact, fix) for fact, _, fix in parts]


def text(findings: Sequence[Finding], width: int = 140) -> str:
    """The findings as lines for a terminal, each fix below its fact, and a last line that counts."""
    lines = []
    for one in findings:
        head = f"{one.verdict:<5} {one.area:<13} "
        # Names and commands are to be copied, so nothing is broken but between words.
        wrap = textwrap.TextWrapper(max(40, width - len(head)), break_long_words=False, break_on_hyphens=False).wrap
        said = [*wrap(one.fact), *wrap(f"→ {one.fix}" if one.fix else "")]
        lines += [(head if not number else " " * len(head)) + part for number, part in enumerate(said)]
    counts = [f"{sum(one.verdict == verdict for one in findings)} {verdict}" for verdict in ("ok", "warn", "fail")]
    return "\n".join([*lines, ", ".join(counts)])
