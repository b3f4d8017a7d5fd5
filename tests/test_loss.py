"""The head and the loss as one operator (model/loss.py) against the plain way: all logits, and torch's cross-entropy."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench.memory import peak_of
from tests.test_flops import LLAMA, QWEN2, QWEN3, model_of
from tests.test_model import config_for
from tunesmith.config import Batching, MethodKind
from tunesmith.data.layout import Example, MicroBatch, Segment, lay_out
from tunesmith.model import build_model, loss
from tunesmith.model.loss import Targets, can_be_measured, measure_at_head
from tunesmith.plan import shapes
from tunesmith.plan.shapes import LOGITS_ROWS, ModelShape, logits_at_once

# PEFT still asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
CPU = torch.device("cpu")


class Head(nn.Module):
    """An output head as a model has it."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.3)
        measure_at_head(self)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


def targets_of(positions: int, vocabulary: int, shared: bool = False) -> MicroBatch:
    """Targets at all positions; shared: some of them with several, that stand in several conversations each."""
    draw = np.random.default_rng(0)
    pairs = [(row, int(draw.integers(vocabulary))) for row in range(positions) for _ in range(1 + (row % 3 if shared else 0))]
    pairs = sorted(set(pairs))
    rows, labels = (torch.tensor(column, dtype=torch.int64) for column in zip(*pairs, strict=True))
    counts = torch.from_numpy(draw.integers(1, 5 if shared else 2, len(pairs)).astype(np.float32))
    every = torch.arange(positions)
    return MicroBatch(every, every, (Segment(0, positions),), every, rows if shared else None, labels, counts, positions)


def measured(head: nn.Linear, x: torch.Tensor, batch: MicroBatch, smoothing: float = 0.0, whole: bool = False) -> torch.Tensor:
    """The loss of hidden states [positions, width], there or from all logits."""
    targets = Targets(batch, smoothing)
    with nullcontext() if whole else targets.asked():
        given = head(x[None])[0]
    assert bool(targets.answer) is not whole
    return targets.loss(given)


def gradients(head: nn.Linear, x: torch.Tensor, of_loss: torch.Tensor) -> list[torch.Tensor]:
    x.grad = head.weight.grad = None
    of_loss.backward()  # type: ignore[no-untyped-call]
    return [weight.grad.clone() for weight in (x, head.weight) if weight.grad is not None]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("positions", [1, 40, 101])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_it_is_the_plain_loss_with_its_gradients(
    trained: bool, shared: bool, smoothing: float, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "LOGITS_ROWS", 40)
    head, batch = Head(300, 24).lm_head.requires_grad_(trained), targets_of(positions, 300, shared)
    x = torch.randn(positions, 24).requires_grad_()
    ours, plain = (measured(head, x, batch, smoothing, whole) for whole in (False, True))
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6) and ours.dtype is torch.float32
    found, wanted = gradients(head, x, ours * 0.37), gradients(head, x, plain * 0.37)
    assert len(found) == len(wanted) == 1 + trained
    assert all(distance(*pair) < 1e-6 for pair in zip(found, wanted, strict=True))
    with torch.no_grad():
        assert torch.equal(measured(head, x, batch, smoothing), ours)


METHODS: dict[str, tuple[ModelShape, dict[str, Any]]] = {
    "full, tied": (QWEN2, {"kind": MethodKind.full}),
    "full": (LLAMA, {"kind": MethodKind.full}),
    "LoRA": (LLAMA, {"r": 4}),
    "LoRA and a tied head": (QWEN2, {"r": 4, "modules_to_save": ["lm_head"]}),
    "LoRA and a head": (LLAMA, {"r": 4, "modules_to_save": ["lm_head"]}),
    "prompt": (QWEN3, {"kind": MethodKind.prompt, "virtual_tokens": 5}),
    "prefix": (LLAMA, {"kind": MethodKind.prefix, "virtual_tokens": 5}),
}


@pytest.mark.parametrize(("shape", "method"), METHODS.values(), ids=METHODS)
def test_every_method_has_the_plain_gradients(shape: ModelShape, method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "LOGITS_ROWS", 16)
    model_of(shape).save_pretrained(tmp_path)
    config = config_for(tmp_path, **method)
    config.optim.label_smoothing, config.engine.checkpointing = 0.1, True
    module = build_model(config, tmp_path, CPU)
    draw = np.random.default_rng(0)
    begin = draw.integers(0, 90, 20)
    texts = [np.concatenate([begin, draw.integers(0, 90, 9 + number)]).astype(np.int32) for number in range(5)]
    batch = lay_out([Example(text, np.arange(len(text)) > 5, "made up") for text in texts], Batching.ragged)
    assert batch.rows is not None and len(batch.predicting) > 48

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        module.zero_grad()
        of_batch = module(batch)
        of_batch.backward()
        return of_batch.item(), {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}

    calls = counted_calls(monkeypatch)
    ours, found = step()
    assert len(calls) == 1
    module.whole_logits = True
    plain, wanted = step()
    assert len(calls) == 1, "by a head that gives logits"
    assert ours == pytest.approx(plain, rel=1e-6)
    assert found.keys() == wanted.keys() and found
    largest = max(float(weight.norm()) for weight in wanted.values())
    for weight, grad in wanted.items():
        assert float((found[weight] - grad).norm()) < 1e-5 * max(float(grad.norm()), 1e-3 * largest), weight


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each loss that a head computes."""
    calls: list[int] = []
    forward = loss._Summed.forward

    def counted(ctx: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(x))
        return forward(ctx, x, *rest)

    monkeypatch.setattr(loss._Summed, "forward", staticmethod(counted))
    return calls


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_halves_are_no_worse_than_the_plain_way(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast and as DeepSpeed has it, all in bf16; a trained head's gradient is summed up in fp32."""
    monkeypatch.setattr(shapes, "LOGITS_ROWS", 16)
    batch, head = targets_of(200, 300, shared=True), Head(300, 32).lm_head.requires_grad_(trained)
    x = torch.randn(200, 32).requires_grad_()
    exact = gradients(head, x, measured(head, x, batch, whole=True))
    for in_halves in (False, True):
        if in_halves:
            head, x = head.bfloat16(), x.detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=not in_halves):
            ours, plain = (measured(head, x, batch, whole=whole) for whole in (False, True))
        assert ours.item() == pytest.approx(plain.item(), rel=1e-4)
        for mine, others, wanted in zip(gradients(head, x, ours), gradients(head, x, plain), exact, strict=True):
            assert mine.dtype is others.dtype
            assert distance(mine, wanted) < 1.1 * distance(others, wanted) + 1e-3


@pytest.mark.parametrize("in_halves", [False, True], ids=["autocast", "halves"])
def test_blocks_of_a_trained_heads_gradient_are_the_whole_in_less_memory(in_halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 meets fp32, a CPU would copy all of it."""
    vocabulary, width = 4000, 64
    monkeypatch.setattr(shapes, "LOGITS_ROWS", 16)
    head = Head(vocabulary, width).lm_head.to(torch.bfloat16 if in_halves else torch.float32)
    x = torch.randn(40, width).to(head.weight.dtype).requires_grad_()
    found, peaks = [], []
    for numbers in (vocabulary * width, 300 * width):  # the last block is smaller
        monkeypatch.setattr(shapes, "BLOCK_NUMBERS", numbers)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=not in_halves):
                ours = measured(head, x, targets_of(40, vocabulary))
            found.append(gradients(head, x, ours * 0.37))

        peaks.append(peak_of(step))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    # oneDNN's scratch inside a matmul in bf16 differs by CPU: with AMX it is some KB more beside the blocks.
    assert peaks[0] - peaks[1] > 0.98 * vocabulary * width * 4, "of the copies in fp32, and of the products, about one whole is saved"


def test_what_is_small_in_fp16_does_not_vanish() -> None:
    """Words that the model is sure of: their gradients, 1e-5 at most, are as good without a scale as the plain way's with a large one."""
    batch, head = targets_of(64, 300), Head(300, 32).lm_head.requires_grad_(False)
    x = torch.randn(64, 32).requires_grad_()
    with torch.no_grad():
        for _ in range(400):  # solve for hidden states that predict their labels
            logits = head(x)
            error = torch.softmax(logits, 1)
            error[torch.arange(64), batch.labels] -= 1
            x -= 2.0 * error @ head.weight
        x *= 1.6
    def error(scale: float, whole: bool) -> float:
        with torch.autocast("cpu", torch.float16):
            of_loss = measured(head, x, batch, whole=whole) * scale
        (found,) = gradients(head, x, of_loss)
        return distance(found / scale, exact)

    half = head.weight.half().double()
    exact = (torch.softmax(x.detach().half().double() @ half.t(), 1) - nn.functional.one_hot(batch.labels, 300)) @ half
    least = error(2.0**12, whole=True)  # what is left of logits that are halves
    assert float(exact.abs().max()) < 1e-5 and error(1.0, whole=True) > 1.5 * least
    for scale in (1.0, 65536 / 4000, 2.0**12):
        assert error(scale, whole=False) < 1.35 * least


def test_an_infinite_gradient_reaches_the_scaler() -> None:
    """A scale that is too large must show: the scaler halves it then."""
    batch, head = targets_of(4, 300), Head(300, 32).lm_head.requires_grad_(False).half()
    x = torch.randn(4, 32).half().requires_grad_()
    (found,) = gradients(head, x, measured(head, x, batch) * 2.0**24)
    assert not torch.isfinite(found).all()
    (found,) = gradients(head, x, measured(head, x, batch) * 2.0**8)
    assert torch.isfinite(found).all()


def test_a_trained_head_in_fp16_gives_logits() -> None:
    head = Head(300, 32).lm_head
    x = torch.randn(1, 4, 32)
    assert can_be_measured(head, x, torch.float32) and not can_be_measured(head, x.bfloat16(), torch.float32)
    with torch.autocast("cpu", torch.float16):
        assert can_be_measured(head, x, torch.bfloat16) and not can_be_measured(head, x, torch.float16)
        targets = Targets(targets_of(4, 300), 0.0)
        with targets.asked():
            assert head(x).shape == (1, 4, 300) and not targets.answer
    assert not can_be_measured(head, x.expand(2, 4, 32), torch.float32)


def test_a_model_that_changes_its_logits_is_not_believed() -> None:
    head, targets = Head(300, 32).lm_head, Targets(targets_of(4, 300), 0.0)
    with targets.asked():
        given = head(torch.randn(1, 4, 32))
    with pytest.raises(RuntimeError, match="changes the logits"):
        targets.loss(30 * torch.tanh(given[0] / 30))
    assert targets.loss(given.detach()[0]) == given[0]


def test_no_targets_are_no_loss() -> None:
    head, batch = Head(300, 32).lm_head, targets_of(4, 300)
    none = MicroBatch(batch.ids, batch.positions, batch.segments, *(batch.predicting[:0], None, batch.labels[:0], batch.counts[:0]), 0)
    x = torch.randn(0, 32).requires_grad_()
    ours = measured(head, x, none)
    assert ours.item() == 0.0
    assert [float(grad.abs().sum()) for grad in gradients(head, x, ours)] == [0.0, 0.0]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_memory_does_not_grow_with_vocabulary_times_targets(trained: bool) -> None:
    """Beyond a piece, a position takes its hidden state's gradient and a few numbers."""
    vocabulary, width = 4000, 16
    head = Head(vocabulary, width).lm_head.requires_grad_(trained)

    def peak(positions: int, whole: bool = False) -> int:
        batch, x = targets_of(positions, vocabulary), torch.randn(positions, width).requires_grad_()
        return peak_of(lambda: gradients(head, x, measured(head, x, batch, whole=whole)))

    piece = LOGITS_ROWS * vocabulary * 4
    few, many = peak(LOGITS_ROWS), peak(8 * LOGITS_ROWS)
    assert piece < few < piece + 3 * trained * vocabulary * width * 4 + 0.1 * piece
    assert many - few < 7 * LOGITS_ROWS * (3 * width + 16) * 4 < 0.15 * piece
    assert peak(8 * LOGITS_ROWS, whole=True) > 8 * 2 * piece


def test_evaluation_makes_no_gradient() -> None:
    head, batch = Head(4000, 16).lm_head, targets_of(600, 4000)
    x = torch.randn(600, 16).requires_grad_()
    found: list[torch.Tensor] = []
    with torch.no_grad():
        peak = peak_of(lambda: found.append(measured(head, x, batch)))
    assert not found[0].requires_grad
    assert peak < 1.1 * logits_at_once(600) * 4000 * 4, "a piece at a time"
    assert torch.equal(found[0], measured(head, x, batch))


def test_pieces_are_of_one_size() -> None:
    assert [logits_at_once(n) for n in (0, 1, 255, 256, 257, 300, 512, 513)] == [0, 1, 255, 256, 129, 150, 256, 171]

