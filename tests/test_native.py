"""Passes of C++ on a CPU against the same in PyTorch's operators, in double where a sum is taken; and PyTorch's own without a compiler."""

from __future__ import annotations

import shutil
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from tunesmith.data.layout import Segment
from tunesmith.model import attention, between, native
from tunesmith.model.attention import Layout
from tunesmith.model.fused import turn_natively
from tunesmith.plan.shapes import HEAD_DIMS

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


FOREST = (Segment(0, 9), Segment(9, 22, ((0, 9),)), Segment(22, 23, ((0, 9), (9, 22))), Segment(23, 61, ((0, 9), (9, 22))), Segment(61, 65))
"""A beginning, what continues it, two leaves of that, and a tree of its own."""


@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("beginning", [0, 7], ids=["", "behind a beginning"])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_attention_of_short_segments_is_plain_arithmetics(d: int, beginning: int, groups: int) -> None:
    torch.manual_seed(0)
    tokens, heads, scale = 65, 6, 0.3
    exact = [torch.randn(n, many, d, dtype=torch.float64) for n, many in ((tokens, heads), *[(tokens, groups)] * 2, *[(beginning, groups)] * 2)]
    mine = [x.float().requires_grad_() for x in exact]
    exact = [x.requires_grad_() for x in exact]
    sees = torch.zeros(tokens, beginning + tokens, dtype=torch.bool)
    sees[:, :beginning] = True
    for one in FOREST:
        sees[one.start : one.stop, beginning + one.start : beginning + one.stop] = torch.ones(one.length, one.length).tril().bool()
        for start, stop in one.context:
            sees[one.start : one.stop, beginning + start : beginning + stop] = True
    q, k, v, first_k, first_v = (x.transpose(0, 1) for x in exact)
    keys, values = (torch.cat(both, 1).repeat_interleave(heads // groups, 0) for both in ((first_k, k), (first_v, v)))
    wanted = ((q @ keys.mT * scale).masked_fill(~sees, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    out = attention._AtOnce.apply(*mine, Layout(FOREST).native, scale)
    assert near(out, wanted)
    trained = 5 if beginning else 3
    wanted_gradients, found = gradients(wanted, *exact[:trained]), gradients(out, *mine[:trained])
    assert all(near(one, other) for one, other in zip(found, wanted_gradients, strict=True))
    frozen = [*mine[:3], *(x.detach() for x in mine[3:])]
    alone = gradients(attention._AtOnce.apply(*frozen, Layout(FOREST).native, scale), *mine[:3])
    assert all(torch.equal(one, other) for one, other in zip(alone, found, strict=False)), "a frozen beginning changes nothing else"


@pytest.mark.parametrize("segments", [FOREST, (Segment(0, 700),)], ids=["short", "long"])
def test_attention_gives_the_same_bits_whatever_threads_share(segments: tuple[Segment, ...]) -> None:
    torch.manual_seed(0)
    mine = [torch.randn(segments[-1].stop, many, 32).requires_grad_() for many in (3, 1, 1)]
    nothing, threads, found = torch.empty(0, 1, 32), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            out = attention._AtOnce.apply(*mine, nothing, nothing, Layout(segments).native, None)
            found.append((out, *gradients(out, *mine)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("d", [16, 64, 128])
@pytest.mark.parametrize("name", ["one", "many", "uneven", "beginning", "nested"])
def test_attention_of_long_segments_is_plain_arithmetics(name: str, d: int) -> None:
    """Several blocks of keys, several parts of a segment and several copies of the gradients to keys, with and without what is continued."""
    segments = {
        "one": (Segment(0, 700),),
        "many": tuple(Segment(start, start + 150) for start in range(0, 1200, 150)),
        "uneven": (Segment(0, 290), Segment(290, 291), Segment(291, 800)),
        "beginning": (Segment(0, 530), *(Segment(start, start + 40, ((0, 530),)) for start in range(530, 770, 40))),
        "nested": (Segment(0, 260), Segment(260, 600, ((0, 260),)), Segment(600, 900, ((0, 260), (260, 600)))),
    }[name]
    torch.manual_seed(0)
    heads, groups, tokens = 6, 3, segments[-1].stop
    exact = [torch.randn(tokens, many, d, dtype=torch.float64) for many in (heads, groups, groups)]
    mine, exact = [x.float().requires_grad_() for x in exact], [x.requires_grad_() for x in exact]
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    for one in segments:
        sees[one.start : one.stop, one.start : one.stop] = torch.ones(one.length, one.length).tril().bool()
        for start, stop in one.context:
            sees[one.start : one.stop, start:stop] = True
    q, k, v = (x.transpose(0, 1).repeat_interleave(heads // x.shape[1], 0) for x in exact)
    wanted = ((q @ k.mT * d**-0.5).masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    layout = Layout(segments)
    assert layout.native.copies(groups) == (1 if name == "many" else 4), "of four threads or fewer"
    out = attention._AtOnce.apply(*mine, torch.empty(0, groups, d), torch.empty(0, groups, d), layout.native, None)
    assert near(out, wanted)
    assert all(near(one, other) for one, other in zip(gradients(out, *mine), gradients(wanted, *exact), strict=True))


def test_scores_of_a_thousand_are_no_infinity() -> None:
    """Exponentials are of differences to the largest yet, and blocks before it count nothing."""
    torch.manual_seed(0)
    q, k, v = torch.ones(600, 1, 64), torch.zeros(600, 1, 64), torch.randn(600, 1, 64)
    k[500] = 125.0
    out, sums = native.attended(q, k, v, native.Segments([(0, 600, ())]), 64**-0.5)
    assert torch.allclose(out[500:], v[500].expand(100, 1, 64), rtol=1e-5, atol=1e-5)
    assert torch.allclose(sums[0, 500:], torch.tensor(1000.0)) and torch.allclose(out[499], v[:500].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_many_queries_see_many_keys_of_others(threads: int) -> None:
    """A part of attention that is apart from the others: out and gradients of all keys, and merged with what is seen besides."""
    torch.manual_seed(0)
    n, keys, heads, groups, d, before = 400, 600, 4, 2, 32, torch.get_num_threads()
    exact = [torch.randn(many, width, d, dtype=torch.float64) for many, width in ((n, heads), *[(n, groups)] * 2, *[(keys, groups)] * 2)]
    mine, exact = [x.float().requires_grad_() for x in exact], [x.requires_grad_() for x in exact]
    q, k, v, first_k, first_v = (x.transpose(0, 1).repeat_interleave(heads // x.shape[1], 0) for x in exact)
    sees = torch.cat([torch.ones(n, keys), torch.ones(n, n).tril()], 1).bool()
    scores = (q @ torch.cat([first_k, k], 1).mT * d**-0.5).masked_fill(~sees, -torch.inf)
    wanted = (scores.softmax(-1) @ torch.cat([first_v, v], 1)).transpose(0, 1)
    torch.set_num_threads(threads)
    try:
        out = attention._AtOnce.apply(*mine, native.Segments([(0, n, ())]), None)
        found = gradients(out, *mine)
    finally:
        torch.set_num_threads(before)
    assert near(out, wanted)
    assert all(near(one, other) for one, other in zip(found, gradients(wanted, *exact), strict=True))


@pytest.mark.parametrize(
    ("lengths", "groups", "threads", "copies"),
    [([700], 3, 2, 4), ([700], 4, 2, 1), ([700], 2, 16, 8), ([150] * 16, 1, 2, 1), ([1500, *[50] * 15], 1, 2, 4), ([40] * 4, 8, 2, 1)],
)
def test_gradients_to_keys_have_as_many_copies_as_threads_want(lengths: list[int], groups: int, threads: int, copies: int) -> None:
    ends, before = list(accumulate(lengths)), torch.get_num_threads()
    segments = native.Segments([(end - length, end, ()) for end, length in zip(ends, lengths, strict=True)])
    torch.set_num_threads(threads)
    try:
        assert segments.copies(groups) == copies
    finally:
        torch.set_num_threads(before)


def test_a_key_that_is_no_number_stays_with_those_who_see_it() -> None:
    q, k, v = (torch.randn(300, 1, 32) for _ in range(3))
    k[290] = float("nan")
    out, _ = native.attended(q, k, v, native.Segments([(0, 300, ())]), 1.0)
    assert out[:290].isfinite().all() and out[290:].isnan().all()
