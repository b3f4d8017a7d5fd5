"""Methods under real ranks: the same losses and the same result however weights are split, and resumed to the bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import launch
from tests.test_resume import QUIET, trained, with_fault

pytestmark = pytest.mark.launch

METHODS = {
    "LoRA+ and the embedding": ["method.b_lr_ratio=4", "method.modules_to_save=[embed_tokens]"],
}


@pytest.mark.parametrize("words", METHODS.values(), ids=METHODS)
def test_split_weights_make_no_difference(words: list[str], overrides: list[str], tmp_path: Path) -> None:
    """One process against two ranks of ZeRO 3 with accumulation: losses, and the adapter that is left."""
    words = [*overrides, *words, *QUIET, "data.max_tokens=256", "method.dropout=0.0"]
    one = launch("python", [*words, "engine=accelerate", f"outputs={tmp_path / 'one'}"])
    one.outputs = tmp_path / "one"
    assert one.code == 0, one.output
    two = launch("deepspeed", [*words, "engine.zero=3", "train.micro_batch=2"], 2)
    assert two.code == 0, two.output
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    left, right = (load_file(done.run / "adapter/adapter_model.safetensors") for done in (one, two))
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert float((weight - right[name]).norm() / weight.norm()) < 0.02, name  # Adam divides small gradients by small ones


def test_noise_is_resumed_to_the_bit(overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *QUIET, "method=prompt", "data.max_tokens=256", "optim.neftune_alpha=5", "optim.label_smoothing=0.1", "engine=accelerate"]
    whole = launch("python", [*words, f"outputs={tmp_path / 'whole'}"])
    whole.outputs = tmp_path / "whole"
    assert whole.code == 0, whole.output
    with_fault(words, "python", 1, f"0:3:{int(signal.SIGTERM)}", tmp_path)
    resumed = launch("python", words)
    assert resumed.code == 0, resumed.output
    assert resumed.losses == whole.losses
    assert trained(resumed) == trained(whole)
