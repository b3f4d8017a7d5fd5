"""bench/ablation.py: every switch really switches, and what is computed stays the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear

from bench import ablation
from bench.ablation import AS_IT_IS, HIGH, INT8, PARTS, PLAIN, TILES
from bench.train import LOOKED_AT, Refused, ablated, same_losses
from bench.train_tunesmith import settings
from tests.test_model import CPU, config_for
from tunesmith import data, engine, hardware, matmul, peaks
from tunesmith.config import Base, Batching, Int8
from tunesmith.data.batches import Batches
from tunesmith.data.layout import Example
from tunesmith.model import build_model, keep_tiles, native
from tunesmith.model.between import NORMS

# PEFT still asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

REPLACED = [name for name, part in PARTS.items() if part.off()]
COMMON, PER_STEP = 24, 6


def conversations() -> list[Example]:
    """Some tokens that all begin with, and then different ones, of different lengths."""
    draw = np.random.default_rng(0)
    common = draw.integers(0, 300, COMMON)
    made = []
    for length in draw.integers(5, 40, PER_STEP):
        ids = np.concatenate([common, draw.integers(0, 300, length)]).astype(np.int32)
        targets = draw.random(len(ids)) < 0.3
        targets[-1] = True
        made.append(Example(ids, targets, "made up"))
    return made


def trained(folder: Path, off: Iterable[str], patch: pytest.MonkeyPatch) -> tuple[float, dict[str, torch.Tensor], dict[str, bool]]:
    """Without some parts, the loss of a step, its gradients, and of each part that is replaced whether it was seen at work."""
    masks, freed, head = [], [], []
    sdpa = F.scaled_dot_product_attention

    def listening(*args: Any, attn_mask: Any = None, **named: Any) -> torch.Tensor:
        masks.append(attn_mask is not None)
        return sdpa(*args, attn_mask=attn_mask, **named)

    patch.setattr(F, "scaled_dot_product_attention", listening)
    for name in off:  # as `switch_off`, and undone with the test
        for owner, attribute, instead in PARTS[name].off():
            patch.setattr(owner, attribute, instead)

    module: Any = build_model(config_for(folder), folder, CPU)
    torch.manual_seed(0)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    module.model.get_output_embeddings().register_forward_hook(lambda _, given, made: head.append((given[0].shape[1], made.numel())))
    batches = Batches(conversations(), PER_STEP, PER_STEP, 0, Batching.ragged).micro_batches(0, 0, 1)
    assert len(batches) == 1, "in one micro-batch, whatever is switched off"
    attended, calls = native.attended, []
    patch.setattr(native, "attended", lambda *given: calls.append(given) or attended(*given))  # type: ignore[func-returns-value]
    loss = module(batches[0])
    loss.backward()

    libc = SimpleNamespace(mallopt=lambda *words: freed.append(words), malloc=lambda _: None, free=lambda _: None, madvise=lambda *_: 0)
    patch.setattr(hardware.ctypes, "CDLL", lambda _: libc)
    for name in ("TOKENIZERS_PARALLELISM", "DS_ACCELERATOR"):
        patch.setenv(name, "cpu")
    hardware.prepare_environment(on_cpu=True)
    patch.setattr(peaks, "measure_peak", lambda *_: (1.0, " by oneDNN"))
    try:
        peaks.take_faster_matmul("fp32", 1)
        onednn = bool(matmul._taken)
    finally:
        matmul.give_back()

    (rows, numbers), layers = head[0], list(module.modules())
    seen = {
        "ragged": len(batches[0].ids) == batches[0].real_tokens and not any(masks),
        "sharing": any(segment.context for segment in batches[0].segments),
        "targets only": rows == len(batches[0].predicting) < len(batches[0].ids),
        "loss in pieces": numbers == 1,
        "joined": all("forward" in vars(layer) for layer in layers if type(layer) is Linear),
        "kept inputs": all("forward" in vars(layer) for layer in layers if type(layer).__name__ in NORMS),
        "together": any("Together" in layer.forward.__func__.__qualname__ for layer in layers if "forward" in vars(layer)),
        "passes": native.library() is not None or not any(map(shutil.which, ("c++", "g++", "clang++"))),
        "at once": bool(calls) or not any(map(shutil.which, ("c++", "g++", "clang++"))),
        "memory kept": bool(freed),
        "oneDNN": onednn,
        "tiles": engine.keep_tiles is keep_tiles,
    }
    return loss.item(), {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}, seen


@pytest.mark.parametrize("off", [*([name] for name in REPLACED), REPLACED], ids=[*REPLACED, "all"])
def test_a_part_is_off_the_others_are_on_and_nothing_else_changes(off: list[str], tiny_model: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        wanted, wanted_gradients, seen = trained(tiny_model, (), patch)
    assert all(seen.values()) and list(seen) == REPLACED, "a new part has to be looked at here"
    with pytest.MonkeyPatch.context() as patch:
        loss, gradients, seen = trained(tiny_model, off, patch)
    # Of PEFT's own none are together; and a mask, or no C++ at all, leaves nothing to attend to at once.
    with_it = {"together": {"joined"}, "at once": {"ragged", "passes"}}
    gone = [name for name in REPLACED if name in off or with_it.get(name, set()) & set(off)]
    assert [name for name, on in seen.items() if not on] == gone
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-4 * float(wanted_gradients[name].abs().max())), name


def test_without_sharing_the_plan_knows_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, attribute, instead in PARTS["sharing"].off():
        monkeypatch.setattr(owner, attribute, instead)
    assert data.Dataset.common_tokens == 0


def test_rows_are_each_part_off_and_a_ladder_from_nothing_to_all() -> None:
    rows = ablation.rows()
    own = [name for name, part in PARTS.items() if not part.settings]
    assert {name: row.without for name, row in rows.items() if row.kind == "without"} == {
        AS_IT_IS: (), **{f"without {name}": (name,) for name in own if name != TILES}
    }  # fmt: skip
    ladder = {name: row for name, row in rows.items() if row.kind == "ladder"}
    assert list(ladder) == [PLAIN, *(f"+ {name}" for name in PARTS)]
    assert [row.beside for row in ladder.values()] == [None, *list(ladder)[:-1]], "each beside the one below"
    assert ladder[PLAIN].without == tuple(own)
    for before, row, name in zip(ladder.values(), list(ladder.values())[1:], PARTS, strict=False):
        is_setting = bool(PARTS[name].settings)
        assert set(before.without) - set(row.without) == (set() if is_setting else {name})
        assert row.same_losses is (name not in list(PARTS)[list(PARTS).index(INT8) :])
    last = list(ladder.values())[-1]
    assert not last.without and last.settings == PARTS[HIGH].settings + PARTS[INT8].settings
    assert (rows[f"{HIGH}, without {TILES}"].without, rows[f"{HIGH}, without {TILES}"].beside) == ((TILES,), HIGH)
    assert all(rows[row.beside].kind in (row.kind, "without") for row in rows.values() if row.beside)


def test_parts_that_are_settings_reach_the_config() -> None:
    asked = {"train": "train.jsonl", "dev": "dev.jsonl", "steps": 4, "per_step": 8, "lr": 1e-4, "threads": 2}
    rows = ablation.rows()
    configs = {name: settings({**asked, "overrides": rows[name].settings}) for name in (AS_IT_IS, PLAIN, f"+ {INT8}")}
    assert [configs[name].train.micro_batch for name in configs] == ["auto", 1, "auto"]
    assert [(config.method.base, config.precision.int8) for config in configs.values()][::2] == [(Base.as_is, Int8.bnb), (Base.int8, Int8.dynamic)]


def test_another_loss_is_refused() -> None:
    same_losses({"one": [3.7, 3.3, 3.1], "same": [3.7005, 3.299, 3.1], "short": [3.7]})
    same_losses({"one": [3.7, 3.3, 3.1, 2.0], "later": [3.7, 3.3, 3.1, 2.9]})
    for number in range(LOOKED_AT):
        for wrong in (3.72, float("nan")):
            losses = [3.7, 3.7, 3.7]
            losses[number] = wrong
            with pytest.raises(Refused, match=f"other: update {number + 1}"):
                same_losses({"one": [3.7] * 3, "other": losses})


def test_the_table_says_each_gain_and_what_they_are_together() -> None:
    facts = {"conversations_per_s": 2.0, "micro_batch": 4, "peak_gib": 3.0, "over_gib": 2.5}
    rows = {
        AS_IT_IS: {**facts, "kind": "without"},
        "without joined": {**facts, "kind": "without", "gain": 1.25, "gains": [1.2, 1.25, 1.3]},
        PLAIN: {**facts, "kind": "ladder"},
        "+ ragged": {**facts, "kind": "ladder", "gain": 2.0, "gains": [2.0]},
        "+ joined": {**facts, "kind": "ladder", "gain": 1.5, "gains": [1.5]},
    }
    lines = ablated("head", {"rows": rows})
    joined = f"| without joined | {PARTS['joined'].says} | 2 | 1.25 (1.20 to 1.30) | 4 | 3.00 (2.50) |"
    assert joined in lines and "| + joined | 2 | 1.50 (1.50 to 1.50) | 3.00 | 4 | 3.00 (2.50) |" in lines
    for start in range(len(lines) - 1):
        if lines[start + 1].startswith("|--"):
            assert lines[start].count("|") == lines[start + 1].count("|") == lines[start + 2].count("|")
