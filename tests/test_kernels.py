"""Attention's kernels: merging on a CPU for real; rows for cards on operators that keep the same contract in plain arithmetic.

No card is here. What a card's row calls is held against PyTorch's own schemas and shapes, and its numbers against a reference of those
operators that refuses what the real ones do not take, or would misread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tunesmith import matmul
from tunesmith.data.layout import Segment
from tunesmith.model import attention, kernels
from tunesmith.model.attention import Layout, ragged_attention, rectangles
from tunesmith.model.kernels import CPU, EFFICIENT, FLASH, Causal, Kernels, attend, attend_backward, card_row, error, is_right

HERE = torch.device("cpu")


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor, scale: float | None) -> Any:
    """[heads, n, d], [heads, m, d] -> output and log-sum-exp."""
    scores = (q @ k.mT * (scale or q.shape[-1] ** -0.5)).masked_fill(~sees, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    sees: torch.Tensor,
    scale: float | None,
) -> Any:
    """As FlashAttention does: probabilities from the log-sum-exp that is given, and its sums of gradients from the output that is given."""
    scale = scale or q.shape[-1] ** -0.5
    shares = (q @ k.mT * scale - sums[..., None]).exp().masked_fill(~sees, 0.0)
    of_scores = shares * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return of_scores @ k, of_scores.mT @ q, shares.mT @ grad


def _sees(n: int, m: int, causal: bool) -> torch.Tensor:
    return torch.ones(n, m, dtype=torch.bool).tril() if causal else torch.ones(n, m, dtype=torch.bool)


def _efficient(q: Any, k: Any, v: Any, bias: Any, sums: bool, dropout: float = 0.0, causal: bool = False, *, scale: Any = None) -> Any:
    assert q.shape[1] == k.shape[1] == v.shape[1], "the kernel takes no grouped keys"
    assert bias is None and sums and not dropout and all(x.stride(-1) == 1 for x in (q, k, v))
    out, found = _forward(q, k, v, _sees(q.shape[2], k.shape[2], causal), scale)
    padded = torch.full((*q.shape[:2], math.ceil(q.shape[2] / 32) * 32), math.inf)
    padded[..., : q.shape[2]] = found
    return out.transpose(1, 2).contiguous().transpose(1, 2), padded, torch.empty((), dtype=torch.long), torch.empty((), dtype=torch.long)


def _efficient_backward(
    grad: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, sums: Any, seed: Any, offset: Any, dropout: float, wanted: Any, causal: bool = False, *, scale: Any = None
) -> Any:  # fmt: skip
    n = q.shape[2]
    assert seed.dtype is offset.dtype is torch.long and not dropout and list(wanted) == [True, True, True, False]
    assert out.transpose(1, 2).is_contiguous(), "the kernel steps through the output by heads x d"
    assert sums.is_contiguous() and sums.shape[-1] % 32 == 0 and bool((sums[..., n:] == math.inf).all())
    return *_backward(grad, q, k, v, out, sums[..., :n], _sees(n, k.shape[2], causal), scale), None


def _flash(
    q: Any, k: Any, v: Any, q_bounds: Any, k_bounds: Any, q_most: int, k_most: int, dropout: float, causal: bool, mask: bool, *, scale: Any = None, **_: Any
) -> Any:  # fmt: skip
    """[rows, n, heads, d], or between bounds [n, heads, d]; grouped keys as they are."""
    assert not dropout and not mask
    out, sums = [], []
    for one_q, one_k, one_v in _pieces((q, k, v), q_bounds, k_bounds, q_most, k_most):
        one_k, one_v = (x.repeat_interleave(q.shape[-2] // k.shape[-2], 0) for x in (one_k, one_v))
        one_out, one_sums = _forward(one_q, one_k, one_v, _sees(one_q.shape[1], one_k.shape[1], causal), scale)
        out.append(one_out.transpose(0, 1))
        sums.append(one_sums)
    together = (torch.stack(out), torch.stack(sums)) if q_bounds is None else (torch.cat(out), torch.cat(sums, dim=1))
    return *together, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), torch.empty(0)


def _flash_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, q_bounds: Any, k_bounds: Any, q_most: int, k_most: int, dropout: float, causal: bool, state: Any, unused: Any, *, scale: Any = None, **_: Any
) -> Any:  # fmt: skip
    assert state.dtype is torch.uint64 and sums.is_contiguous() and sums.shape[-1] == q.shape[-3]
    parts: list[Any] = [[], [], []]
    start, shared = 0, q.shape[-2] // k.shape[-2]
    for row, (one_grad, one_q, one_k, one_v, one_out) in enumerate(_pieces((grad, q, k, v, out), q_bounds, k_bounds, q_most, k_most)):
        one_k, one_v = (x.repeat_interleave(shared, 0) for x in (one_k, one_v))
        n = one_q.shape[1]
        one_sums = sums[row] if q_bounds is None else sums[:, start : start + n]
        start += n
        of_q, *of_keys = _backward(one_grad, one_q, one_k, one_v, one_out, one_sums, _sees(n, one_k.shape[1], causal), scale)
        for found, x in zip(parts, (of_q, *(x.unflatten(0, (-1, shared)).sum(1) for x in of_keys)), strict=True):
            found.append(x.transpose(0, 1))
    return tuple(torch.stack(found) if q_bounds is None else torch.cat(found) for found in parts)


def _pieces(tensors: Any, q_bounds: Any, k_bounds: Any, q_most: int, k_most: int) -> Iterator[Any]:
    """Each row or segment of all of them apart, [heads, n, d]."""
    if q_bounds is None:
        yield from zip(*(x.transpose(1, 2) for x in tensors), strict=True)
        return
    assert q_bounds.dtype is torch.int32 and torch.equal(q_bounds, k_bounds) and q_most == k_most == int(q_bounds.diff().max())
    assert int(q_bounds[0]) == 0 and all(int(q_bounds[-1]) == len(x) for x in tensors)
    for start, stop in zip(q_bounds.tolist()[:-1], q_bounds.tolist()[1:], strict=True):
        yield [x[start:stop].transpose(0, 1) for x in tensors]


@pytest.fixture
def card_operators() -> Iterator[None]:
    """What a CPU lacks of ATen's attention operators."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_efficient_attention", _efficient, "CPU")
        library.impl("_scaled_dot_product_efficient_attention_backward", _efficient_backward, "CPU")
        library.impl("_flash_attention_forward", _flash, "CPU")
        library.impl("_flash_attention_backward", _flash_backward, "CPU")
        yield


@pytest.mark.parametrize("row", [CPU, EFFICIENT, FLASH], ids=lambda row: row.name)
def test_output_and_gradients_are_those_of_plain_arithmetic(row: Kernels, card_operators: None) -> None:
    assert error(row, HERE, torch.float32, 16) < 1e-5


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("row", [None, EFFICIENT, FLASH], ids=lambda row: row.name if row else "masked")
def test_a_micro_batch_is_the_same_by_every_row(
    row: Kernels | None, grouped: bool, card_operators: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of different lengths, two levels of contexts, loners, and learned keys in front of all of them."""
    prompt, turn = (0, 9), (9, 14)
    ends = [(14, 20), (20, 23)]
    segments = [
        Segment(0, 9),
        Segment(9, 14, (prompt,)),
        *(Segment(a, b, (prompt, turn)) for a, b in ends),
        Segment(23, 31),
        Segment(31, 33),
    ]
    torch.manual_seed(0)
    heads, few = 4, 2 if grouped else 4
    tensors = [torch.randn(1, many, 33, 8, requires_grad=True) for many in (heads, few, few)]
    learned = torch.randn(2, 5, few, 8, requires_grad=True)
    weights = torch.randn(1, 33, heads, 8)
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]

    def run(row: Kernels | None) -> list[torch.Tensor]:
        monkeypatch.setattr(attention, "kernels_for", lambda *_: row)
        out, _ = ragged_attention(module, *tensors, None, 0.3, ragged=Layout(segments), prefix=[learned])
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), [*tensors, learned])]

    for mine, wanted in zip(run(row), run(CPU), strict=True):
        assert float((mine - wanted).norm() / wanted.norm()) < 1e-5


def test_packed_rows_have_no_padding() -> None:
    prompt = (0, 9)
    segments = [Segment(0, 9), Segment(9, 14, (prompt,)), Segment(14, 16, (prompt,)), Segment(16, 20, (prompt,)), Segment(20, 27)]
    boxes = rectangles(segments, packed=True)
    assert [(box.start, box.stop) for box in boxes] == [(0, 9), (9, 20), (20, 27)]
    assert all((box.rows, box.width, box.cells) == (1, box.stop - box.start, None) for box in boxes)
    bounds = boxes[1].causal.bounds
    assert bounds is not None and (bounds.tolist(), bounds.dtype, boxes[1].causal.longest) == ([0, 5, 7, 11], torch.int32, 5)


# What is passed by its place in each operator, without what has a default and is left out.
PLACES = {
    "_scaled_dot_product_efficient_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal",
    "_scaled_dot_product_efficient_attention_backward": (
        "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset dropout_p grad_input_mask is_causal"
    ),
    "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
    "_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused"
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_operators_take_what_they_are_given(name: str) -> None:
    schema = getattr(torch.ops.aten, name).default._schema
    assert [one.name for one in schema.arguments if not one.kwarg_only] == PLACES[name].split()
    assert "scale" in [one.name for one in schema.arguments if one.kwarg_only]
    assert len(schema.returns) == {"_flash_attention_forward": 5, "_flash_attention_backward": 3}.get(name, 4)


@pytest.mark.parametrize("row", [EFFICIENT, FLASH], ids=lambda row: row.name)
@pytest.mark.parametrize("n", [32, 45])
def test_shapes_are_right_by_pytorchs_own_account(row: Kernels, n: int) -> None:
    """On the device `meta` PyTorch's operators for cards take the real arguments and say what shapes come out."""
    rows, few = 1 if row.packs else 3, 2 if row.groups else 6
    q = torch.empty(rows, 6, n, 64, dtype=torch.float16, device="meta")
    own = torch.empty(rows, few, n, 64, dtype=torch.float16, device="meta")
    outer = torch.empty(1, few, 70, 64, dtype=torch.float16, device="meta")
    causal = Causal(n - 9, torch.empty(3, dtype=torch.int32, device="meta")) if row.packs else Causal(n)
    out, total, *kept = attend(row, q, own, own, (outer, outer), causal, None)
    assert (out.shape, out.dtype, total.shape, total.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)
    found = attend_backward(row, out, q, own, own, (outer, outer), out, total, (kept[0], kept[1]), causal, None)
    assert [x.shape for x in found if x is not None] == [x.shape for x in (q, own, own, outer, outer)]


def test_each_card_has_its_row() -> None:
    half, fp32, bf16 = torch.float16, torch.float32, torch.bfloat16
    assert card_row((7, 5), half, 64) is card_row((7, 5), fp32, 64) is EFFICIENT
    assert card_row((7, 5), bf16, 64) is None, "emulated there, and the kernel has none"
    assert card_row((8, 6), half, 128) is card_row((8, 0), bf16, 64) is FLASH
    assert card_row((8, 6), fp32, 64) is card_row((8, 6), half, 256) is card_row((8, 6), half, 64, has_flash=False) is EFFICIENT


@pytest.mark.parametrize(("fault", "says"), [("in bits", "off by"), ("missing", "no kernel found")])
def test_a_row_that_is_wrong_on_a_device_is_not_used(fault: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    def forward(*given: Any) -> Any:
        if fault == "missing":
            raise RuntimeError("cutlassF: no kernel found to launch!")
        out, sums, kept = CPU.forward(*given)
        return out, sums / math.log(2), kept

    with caplog.at_level(logging.WARNING):
        assert not is_right(replace(CPU, forward=forward), HERE, torch.float32, 16)
    assert says in caplog.text and len(caplog.records) == 1
    caplog.clear()
    assert is_right(CPU, HERE, torch.float32, 16) and not caplog.records


@pytest.fixture
def by_halves() -> Iterator[None]:
    if not matmul.HALVES.is_here():
        pytest.skip("no AMX here")
    matmul.take(matmul.HALVES)
    yield
    matmul.give_back()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "keys", "d"),
    [(7, 3, 3, 5, 64), (33, 9, 3, 600, 64), (200, 4, 2, 1025, 48), (70, 2, 1, 520, 128), (64, 8, 8, 512, 32), (2, 3, 1, 40, 16)],
)
def test_by_halves_attention_to_a_context_is_plain_arithmetics(
    n: int, heads: int, kv_heads: int, keys: int, d: int, scale: float | None, threads: int, by_halves: None
) -> None:  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_num_threads()
    q, grad = (3 * torch.randn(1, heads, n, d) for _ in range(2))
    k, v = (torch.randn(1, kv_heads, keys, d) for _ in range(2))
    many = [x.double() for x in (q, k, v, grad)]
    wanted = kernels.over_context(*many[:3], scale)
    back = kernels.back_over_context(many[3], *many[:3], *wanted, scale, True)
    torch.set_num_threads(threads)
    try:
        found = kernels.over_context(q, k, v, scale)
        single = [x.float() for x in wanted]
        of_all = kernels.back_over_context(grad, q, k, v, *single, scale, True)
        of_q, *none = kernels.back_over_context(grad, q, k, v, *single, scale, False)
    finally:
        torch.set_num_threads(before)
    assert none == [None, None] and torch.equal(of_q, of_all[0])
    for one, other in zip((*found, *of_all), (*wanted, *back), strict=True):
        assert one is not None and other is not None and one.shape == other.shape
        # Scores are up to 40 here, of which halves leave 4 units of a million.
        assert float((one.double() - other).norm() / other.norm()) < 1e-4


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "n", "d"), [(1, 9, 3, 1100, 64), (3, 4, 2, 97, 64), (2, 2, 1, 513, 48), (1, 3, 3, 576, 128)])
def test_by_halves_causal_attention_is_plain_arithmetics(
    rows: int, heads: int, kv_heads: int, n: int, d: int, threads: int, by_halves: None
) -> None:  # fmt: skip
    torch.manual_seed(0)
    before, causal = torch.get_num_threads(), Causal(n)
    q, grad = (3 * torch.randn(rows, heads, n, d) for _ in range(2))
    k, v = (torch.randn(rows, kv_heads, n, d) for _ in range(2))
    many = [x.double() for x in (q, k, v, grad)]
    out, sums, _ = CPU.forward(*many[:3], causal, 0.2)
    wanted = (out, sums, *CPU.backward(many[3], *many[:3], out, sums, (), causal, 0.2, True))
    torch.set_num_threads(threads)
    try:
        found = CPU.forward(q, k, v, causal, 0.2)
        back = CPU.backward(grad, q, k, v, out.float(), sums.float(), (), causal, 0.2, True)
        with matmul.torchs_own():
            own = CPU.forward(q, k, v, causal, 0.2)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(found[0], own[0]), "by tiles"
    for one, other in zip((*found[:2], *back), wanted, strict=True):
        assert one is not None and other is not None and one.shape == other.shape
        assert float((one.double() - other).norm() / other.norm()) < 1e-4


def test_by_halves_a_key_far_above_the_others_takes_all(by_halves: None) -> None:
    """Scores of a thousand: exponentials are of differences to the largest yet, so nothing is infinite, and blocks before count nothing."""
    torch.manual_seed(0)
    q, k, v = torch.ones(1, 1, 40, 64), torch.zeros(1, 1, 1300, 64), torch.randn(1, 1, 1300, 64)
    k[0, 0, 1200] = 125.0
    out, sums = kernels.over_context(q, k, v, None)
    assert torch.allclose(out, v[:, :, 1200:1201].expand_as(out), rtol=1e-4, atol=1e-4)
    assert torch.allclose(sums, torch.full_like(sums, 1000.0))
