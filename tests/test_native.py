"""Passes of C++ on a CPU against the same in PyTorch's operators, in double where a sum is taken; and PyTorch's own without a compiler."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from tunesmith.model import between, native
from tunesmith.model.fused import turn_natively

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here, so the passes are PyTorch's operators"
)
WIDTHS = [576, 64, 33, 1]


def gradients(y: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a loss that weighs each number of y otherwise."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return torch.autograd.grad(y, inputs, weights)


def near(mine: torch.Tensor, other: torch.Tensor) -> bool:
    """To some units in the last place of the largest number."""
    mine, other = mine.detach(), other.detach()
    return float((mine.double() - other.double()).abs().max()) <= 2e-6 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 7, width) * 3, torch.rand(width) + 0.5
    exact = x.double().requires_grad_()
    wanted = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    mine = x.clone().requires_grad_()
    y, root = between._Norm.apply(mine, weight, 1e-5)
    assert near(y, wanted) and root.shape == (2, 7, 1)
    assert near(*(gradients(one, of)[0] for one, of in ((y, mine), (wanted, exact))))
    assert torch.equal(native.normed_again(x, root, weight), y)


@pytest.mark.parametrize("halves", [False, True], ids=["two tensors", "halves of one"])
@pytest.mark.parametrize("width", WIDTHS)
def test_gates(width: int, halves: bool) -> None:
    torch.manual_seed(0)
    both = torch.randn(3, 5, 2 * width) * 10
    both[0, 0, 0], both[0, 1, 0] = 200, -200  # as far as exponentials go, and beyond
    gate, up = both.chunk(2, dim=-1)
    if not halves:
        gate, up = gate.contiguous(), up.contiguous()
    exact, mine = ([x.detach().to(dtype).requires_grad_() for x in (gate, up)] for dtype in (torch.float64, torch.float32))
    if halves:
        mine = [x.detach().requires_grad_() for x in (gate, up)]
    wanted, y = F.silu(exact[0]) * exact[1], between._Gate.apply(*mine)
    assert near(y, wanted)
    for one, other in zip(gradients(y, *mine), gradients(wanted, *exact), strict=True):
        assert near(one, other)


def test_exponentials_go_wrong_where_numbers_do() -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    y = native.gated(x, torch.ones(1, 4))
    assert y[0, 0].isnan() and y[0, 1].isinf() and not y[0, 2].isfinite() and y[0, 3] == 0
    assert torch.equal(y.isnan()[0, :2], F.silu(x).isnan()[0, :2])


@pytest.mark.parametrize("rows", [1, 3])
def test_rotary_embedding_is_transformers(rows: int) -> None:
    """Of queries and keys as a model makes them, and of a gradient; each half of a head by angles of its own."""
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, vocab_size=9))
    before = modeling_llama.apply_rotary_pos_emb
    plain = getattr(before, "plain", before)
    try:
        turn_natively(model)
        turn_natively(model)
        ours = modeling_llama.apply_rotary_pos_emb
        assert ours.plain is plain, "replaced once"
        cos, sin = torch.randn(2, 1, 11, 8)
        q, k = (torch.randn(rows, 11, heads, 8, requires_grad=True) for heads in (4, 2))
        found = [turn(q.transpose(1, 2), k.transpose(1, 2), cos, sin) for turn in (ours, plain)]
        assert all("_Turn" in type(x.grad_fn).__name__ for x in found[0])
        for mine, other, leaf in zip(*found, (q, k), strict=True):
            assert near(mine, other)
            assert near(*(gradients(x, leaf)[0] for x in (mine, other)))
        halves = [x.bfloat16() for x in (q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
        assert all(torch.equal(mine, other) for mine, other in zip(ours(*halves), plain(*halves), strict=True)), "halves stay transformers'"
    finally:
        modeling_llama.apply_rotary_pos_emb = before


@pytest.mark.parametrize("keys", [3061, 16, 5])
def test_softmax_and_its_way_back(keys: int) -> None:
    torch.manual_seed(0)
    scores, of_shares, v = torch.randn(7, keys) * 20, torch.randn(7, keys), torch.randn(keys)
    exact = scores.double().requires_grad_()
    shares = exact.softmax(-1)
    (wanted,) = torch.autograd.grad(shares, exact, of_shares.double())
    shares = shares.detach()
    mine = scores.clone()
    sums = native.softmaxed(mine)
    assert near(mine, shares) and near(sums, exact.logsumexp(-1)) and near(mine @ v, shares @ v.double())
    again, of_scores = scores.clone(), of_shares.clone()
    native.softmaxed_back(again, of_scores, sums, (of_shares * mine).sum(-1))
    assert float((again.double() - shares).abs().max()) < 1e-5, "an exponential of a difference of large numbers"
    assert float((of_scores.double() - wanted).abs().max()) < 1e-5


def test_without_a_library_pytorch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, gate, up = torch.randn(5, 48), torch.rand(48), torch.randn(5, 48), torch.randn(5, 48)
    found = []
    for library in (native.library(), None):
        monkeypatch.setattr(native, "library", lambda library=library: library)
        assert native.takes(x) is (library is not None)
        leaf = x.clone().requires_grad_()
        y, _ = between._Norm.apply(leaf, weight, 1e-6)
        found.append((y, gradients(y, leaf)[0], between._gated(gate, up)))
    assert all(near(mine, other) for mine, other in zip(*found, strict=True))
