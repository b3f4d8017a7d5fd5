"""Every combination of method, engine, precision, optimizer and checkpointing trains, or is refused with what to type."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, environment, free_port
from tests.matrix import TABLES, Walk, alone, baseline, combinations, mixtures, name_of, named, page, pairs
from tunesmith.compose import compose
from tunesmith.model.source import model_folder
from tunesmith.world import this_world

pytestmark = pytest.mark.launch
PAGE = ROOT / "docs/matrix.md"


def walk(ranks: int, model: Path, out: Path, *only: str) -> list[dict[str, Any]]:
    torchrun = ["torchrun", "--nproc-per-node", str(ranks), f"--master-port={free_port()}"]
    start = torchrun if ranks > 1 else [sys.executable]
    command = [*start, "-m", "tests.matrix", str(model), str(out), *only]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    records: list[dict[str, Any]] = json.loads(out.read_text())
    failed = [record for record in records if record["outcome"] == "failed"]
    assert not failed, "\n".join(f"{record['names']}: {record['error']}" for record in failed) + done.stderr[-6000:]
    return records


@pytest.mark.timeout(2000)  # 574 combinations: about nine minutes on busy cores
def test_the_whole_matrix_trains_or_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """With one rank and with two; what `Walk.record` asserts holds for each, and the page says what was found."""
    is_legal = Walk(tiny_model, this_world(), tmp_path).is_legal
    tried = [*combinations(), *mixtures(is_legal)]
    names = [name_of(each) for each in [*tried, *sorted({baseline(each) for each in tried if is_legal(each)} - set(tried))]]
    with ThreadPoolExecutor(2) as pool:  # one rank has one core: two of them, each half of the way
        halves = pool.map(lambda half: walk(1, tiny_model, tmp_path / f"1.{half}.json", *names[half::2]), range(2))
    found = {name_of(record["names"]): record for half in halves for record in half}
    walks = [[found[name] for name in names], walk(2, tiny_model, tmp_path / "2.json", *names)]
    for records in walks:
        assert [name_of(record["names"]) for record in records] == names
    losses = {(*record["names"], record["ranks"]): record["loss"] for records in walks for record in records if record["outcome"] == "trains"}
    for (*each, _), found in losses.items():
        room = 2e-3 if "fp32" in each else 0.02
        assert found == pytest.approx(losses[(*baseline(named(name_of(each))), 1)], rel=room), f"{each}: elsewhere, another loss"
    trained = {pair for *each, ranks in losses if ranks == 2 for pair in pairs(named(name_of(each)))}
    missed = {pair for each in product(*TABLES) for pair in pairs(each)} - trained
    assert not [pair for pair in missed if is_legal(alone(pair))], "they go together, and were not tried"
    written = page(walks)
    (tmp_path / "matrix.md").write_text(written)
    assert PAGE.read_text("utf-8") == written, f"cp {tmp_path / 'matrix.md'} {PAGE}"


def test_of_all_other_combinations_the_plan_knows_what_to_type_instead(tiny_model: Path, tmp_path: Path) -> None:
    walk = Walk(tiny_model, this_world(), tmp_path)
    others = sorted({*product(*TABLES)} - {*combinations()})
    legal = [walk.foresee(names, ranks) for names in random.Random(0).sample(others, 500) for ranks in (1, 2)]
    assert 0 < sum(legal) < len(legal)


def test_a_real_model_trains_as_the_small_one_does(tmp_path: Path) -> None:
    wanted = [f"{method}/Accelerate/fp32/AdamW" for method in ("LoRA", "QLoRA (NF4)", "prefix")]
    records = walk(1, model_folder(compose(["+exp=lora_cpu"]).model), tmp_path / "real.json", *wanted)
    assert [record["outcome"] for record in records] == ["trains"] * len(wanted)
