"""`tunesmith doctor`: what this machine, its network and an experiment would trip over, before anything is loaded or started.

facts.py asks (asking.py with time limits, probe.py and meeting.py in processes of their own), rules.py and experiment.py
judge, legal.py is the table of what each compute capability can do. Nothing here imports torch in the doctor's own process.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from tunesmith.compose import drop_local_rank
from tunesmith.config import Refusal
from tunesmith.doctor.asking import Answer
from tunesmith.doctor.experiment import ask_inputs, composed, examine
from tunesmith.doctor.facts import Facts, gather
from tunesmith.doctor.findings import Finding, refused, text
from tunesmith.doctor.legal import choices, explain, matrix_table
from tunesmith.doctor.meeting import hold_meeting, judge_meeting
from tunesmith.doctor.rules import judge
from tunesmith.world import World, rendezvous, this_world

__all__ = ["Facts", "Finding", "doctor", "examine", "explain", "gather", "judge", "matrix_table"]

GRACE_S = 5.0
"""A launcher ends all ranks when one fails; rank 0 should have printed by then."""


def doctor(words: Sequence[str] = (), as_json: bool = False) -> int:
    """Print all findings about this machine and, if words name one, an experiment; 1 if any of them is a failure, else 0.

    Under a launcher every rank has to call it: the ranks meet, and the first of each machine prints.
    """
    words = drop_local_rank(list(words))
    world = World()
    try:
        world = this_world()
        if world.size > 1:
            rendezvous(world)
    except Refusal as refusal:
        return 0 if world.rank else _print(refused("ranks", refusal), as_json, world)
    config, findings = composed(words) if words else (None, [])
    if world.size > 1:
        answer = hold_meeting(world, config.outputs if config else "")
        findings += judge_meeting(answer, world)
        if not _speaks(answer, world):
            return 0
        if "came" not in answer.found and world.local_rank:  # nobody knows whether this machine's first rank is there to tell the rest
            return _print(findings, as_json, world)
    with ThreadPoolExecutor() as pool:
        inputs = pool.submit(ask_inputs, words) if config else None
        facts = gather(world, "" if config else "outputs")
    findings = [*judge(facts, config), *findings]
    if config and inputs:
        findings += examine(config, facts, inputs.result())
    elif facts.capability or not facts.devices:
        findings += choices(None, facts.capability)
    return _print(findings, as_json, world, facts)


def _speaks(answer: Answer, world: World) -> bool:
    """The first rank of each machine that came speaks for it; where it is not known who came, every rank does."""
    if "came" not in answer.found:
        return True
    first = world.rank - world.local_rank
    return world.rank == min(int(rank) for rank in answer.found["came"] if first <= int(rank) < first + world.local_size)


def _print(findings: Sequence[Finding], as_json: bool, world: World, facts: Facts | None = None) -> int:
    failed = any(finding.verdict == "fail" for finding in findings)
    if as_json:
        machine = asdict(facts.machine) if facts else None
        record = {"node": world.node, "rank": world.rank, "machine": machine, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(record, ensure_ascii=False), flush=True)
    else:
        width = min(140, shutil.get_terminal_size((140, 24)).columns)
        print(f"tunesmith doctor on {world.node}{f': {facts.machine}' if facts else ''}\n{text(findings, width)}", flush=True)
    if failed and world.rank:
        time.sleep(GRACE_S)
    return int(failed)
