"""Attention's kernels, a row for each that PyTorch has: forward gives the log-sum-exp too, and backward takes merged ones.

All rows speak of the same tensors: queries, output and its gradient [rows, heads, n, d], keys and values [rows, kv heads, m, d], and the
log-sum-exp of each query's scaled scores [rows, heads, n], fp32, natural. What a kernel wants otherwise is in its row. Rows for cards are
checked against PyTorch's schemas and against plain arithmetic (tests/test_kernels.py); on a card itself a row has to give the right numbers
once (`is_right`), before anything is trained with it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from tunesmith import matmul
from tunesmith.model import native
from tunesmith.plan.shapes import HEAD_DIMS

aten = torch.ops.aten
Kept = Sequence[torch.Tensor]
"""What a kernel's backward wants besides: the random state of a dropout, also where there is none."""
ALIGNMENT = 32
"""The memory-efficient kernel reads log-sum-exps in blocks of so many queries."""
TOLERANCE = 0.03
"""Of a result's norm: bf16 rounds to 0.4 %, several times; a mistake in merging is worth tens of percent."""


@dataclass(frozen=True)
class Causal:
    """Each query sees the keys up to its own place, in its row; with bounds, in its own segment of the only row."""

    longest: int
    """Queries of the longest row or segment."""
    bounds: torch.Tensor | None = None
    """Where segments begin, and the last one ends: int32 [segments + 1], on the device."""


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Causal | None, float | None], tuple[torch.Tensor, torch.Tensor, Kept]]
Gradients = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
Backward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Kept, Causal | None, float | None, bool],
    Gradients,
]


@dataclass(frozen=True)
class Kernels:
    """A pair of kernels: (q, k, v, causal, scale) -> (output, log-sum-exp, kept), and (gradient of the output, q, k, v, output,
    log-sum-exp, kept, causal, scale, wants keys) -> gradients of q, k, v, the last two perhaps None if nobody wants them. Causal None:
    every query sees every key."""

    name: str
    groups: bool
    """Takes fewer heads of keys and values than of queries as they are."""
    packs: bool
    """Takes segments of different lengths end to end, between bounds; the others want rows of one length."""
    forward: Forward
    backward: Backward


CELLS = 1 << 20
"""Scores that are made at a time: 4 MB, which stay in a core's cache until the next matmul has read them."""


def by_passes(q: torch.Tensor) -> bool:
    """Whether C++ attends for these queries [..., d] on a CPU, with no score that leaves a core's cache (model/ragged.h)."""
    return native.takes(q) and q.shape[-1] in HEAD_DIMS and not matmul.by_tiles(q)


def over_context(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a mask, [1, heads, n, d] over [1, kv heads, c, d]: what it gives, and its log-sum-exps [1, heads, n]."""
    factor = factor_of(q, scale)
    if by_passes(q):
        seen = native.sees_all(q.shape[2], k.shape[2])
        its_q, keys, values = (by_token(x) for x in (q, k, v))
        out, sums = native.attended(its_q, keys, values, seen, factor)
        return out.transpose(0, 1)[None], sums[None]
    k, v = k.contiguous(), v.contiguous()  # oneDNN takes minutes over rows that lie apart
    rows = _by_key_head(q, k)
    if matmul.by_tiles(q):
        out, sums = matmul.attention(rows, k[0], v[0], factor)
        return out.view(q.shape), sums.view(q.shape[:3])
    out, sums = torch.empty_like(rows), rows.new_empty(rows.shape[:2])
    for head, part in _pieces(rows, k.shape[2]):
        scores = torch.mm(rows[head, part] * factor, k[0, head].t())
        if native.takes(scores):
            shares, sums[head, part] = scores, native.softmaxed(scores)
        else:
            shares = scores.softmax(dim=-1)
            # The largest share is exp(the largest score - the sum's logarithm).
            sums[head, part] = scores.amax(dim=-1) - shares.amax(dim=-1).log()
        out[head, part] = torch.mm(shares, v[0, head])
    return out.view(q.shape), sums.view(q.shape[:3])


def back_over_context(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    scale: float | None,
    wants_keys: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients to q, k and v (those only where they are wanted) of the share that the context has in a merged attention."""
    factor = factor_of(q, scale)
    if by_passes(q):
        seen = native.sees_all(q.shape[2], k.shape[2])
        of_out, its_q, keys, values, its_out = (by_token(x) for x in (grad, q, k, v, out))
        of_q, *of_keys = native.attended_back(of_out, its_q, keys, values, its_out, total[0].contiguous(), seen, factor, wants_keys)
        of_k, of_v = (x if x is None else x.transpose(0, 1)[None] for x in of_keys)
        return of_q.transpose(0, 1)[None], of_k, of_v
    k, v = k.contiguous(), v.contiguous()
    rows, of_out = _by_key_head(q, k), _by_key_head(grad, k)
    sums = total.reshape(rows.shape[:2])
    drift = (grad * out).sum(dim=-1).reshape(rows.shape[:2])  # what softmax takes off every score's gradient
    if matmul.by_tiles(q):
        of_out, rows, sums, drift = (x.contiguous() for x in (of_out, rows, sums, drift))
        of_rows, of_k, of_v = matmul.attention_back(of_out, rows, k[0], v[0], sums, drift, factor, wants_keys)
        return of_rows.view(q.shape), of_k if of_k is None else of_k[None], of_v if of_v is None else of_v[None]
    of_q = torch.empty_like(rows)
    of_k, of_v = (torch.zeros_like(k), torch.zeros_like(v)) if wants_keys else (None, None)
    for head, part in _pieces(rows, k.shape[2]):
        scaled = rows[head, part] * factor
        shares, of_scores = torch.mm(scaled, k[0, head].t()), torch.mm(of_out[head, part], v[0, head].t())
        if native.takes(shares):
            native.softmaxed_back(shares, of_scores, sums[head, part], drift[head, part])
        else:
            shares.sub_(sums[head, part, None]).exp_()
            of_scores.sub_(drift[head, part, None]).mul_(shares)
        if of_v is not None:
            of_v[0, head] += torch.mm(shares.t(), of_out[head, part])
        if of_k is not None:
            of_k[0, head] += torch.mm(of_scores.t(), scaled)
        of_q[head, part] = torch.mm(of_scores, k[0, head])
    return of_q.mul_(factor).view(q.shape), of_k, of_v


def by_token(x: torch.Tensor) -> torch.Tensor:
    """[1, heads, n, d] -> [n, heads, d], contiguous."""
    return x[0].transpose(0, 1).contiguous()


def _by_key_head(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[rows, heads, n, d] -> [rows * kv heads, heads / kv heads * n, d], contiguous: all queries that look at the same keys."""
    return x.reshape(k.shape[0] * k.shape[1], -1, x.shape[3]).contiguous()


def factor_of(q: torch.Tensor, scale: float | None) -> float:
    """What scores of queries [..., d] are multiplied by."""
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def _pieces(rows: torch.Tensor, keys: int) -> Iterator[tuple[int, slice]]:
    """Key head and rows of each piece of [kv heads, rows, d] that has at most CELLS scores with so many keys."""
    size = max(1, CELLS // max(1, keys))
    for head in range(rows.shape[0]):
        for start in range(0, rows.shape[1], size):
            yield head, slice(start, start + size)


def causal_by_tiles(q: torch.Tensor) -> bool:
    """Whether causal attention of these queries [..., n, d] goes by AMX's tiles (matmul.py): on a CPU, and enough of them."""
    return q.device.type == "cpu" and q.shape[-2] >= matmul.NARROW and matmul.by_tiles(q)


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: Causal | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, Kept]:
    if causal is None and q.dtype is torch.float32:
        return *over_context(q, k, v, scale), ()
    if causal is not None and causal_by_tiles(q):
        rows, keys, values = _by_key_head(q, k), *(x.flatten(0, 1).contiguous() for x in (k, v))
        out, sums = matmul.attention(rows, keys, values, factor_of(q, scale), q.shape[2])
        return out.view(q.shape), sums.view(q.shape[:3]), ()
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal is not None, scale=scale)
    return out, sums, ()


def _cpu_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sums: torch.Tensor,
    kept: Kept, causal: Causal | None, scale: float | None, wants_keys: bool,
) -> Gradients:  # fmt: skip
    if causal is None and q.dtype is torch.float32:
        return back_over_context(grad, q, k, v, out, sums, scale, wants_keys)
    if causal is not None and causal_by_tiles(q):
        rows, of_out, drift = _by_key_head(q, k), _by_key_head(grad, k), _by_key_head((grad * out).sum(-1, keepdim=True), k)[..., 0]
        keys, values, sums = k.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous(), sums.reshape(rows.shape[:2]).contiguous()
        of_q, of_k, of_v = matmul.attention_back(of_out, rows, keys, values, sums, drift, factor_of(q, scale), True, q.shape[2])
        assert of_k is not None
        assert of_v is not None
        return of_q.view(q.shape), of_k.view(k.shape), of_v.view(v.shape)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
        grad, q, k, v, out, sums, 0.0, causal is not None, scale=scale
    )


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: Causal | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, Kept]:
    out, sums, *kept = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal is not None, scale=scale)
    return out, sums[..., : q.shape[2]], kept


def _efficient_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sums: torch.Tensor,
    kept: Kept, causal: Causal | None, scale: float | None, wants_keys: bool,
) -> Gradients:  # fmt: skip
    # Behind the last query infinity, so that its scores count nothing; and the output with a token's heads side by side, which is how
    # the kernel steps through it, whatever its strides say.
    sums = F.pad(sums, (0, -sums.shape[-1] % ALIGNMENT), value=math.inf)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    of_q, of_k, of_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, sums, *kept, 0.0, [True, wants_keys, wants_keys, False], causal is not None, scale=scale
    )
    return of_q, of_k, of_v


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: Causal | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, Kept]:
    q, k, v = (_flash_form(x, causal) for x in (q, k, v))
    out, sums, *kept, _ = aten._flash_attention_forward(q, k, v, *_flash_ends(q, k, causal), 0.0, causal is not None, False, scale=scale)
    return _our_form(out, causal), sums if causal is None else sums[None], kept


def _flash_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sums: torch.Tensor,
    kept: Kept, causal: Causal | None, scale: float | None, wants_keys: bool,
) -> Gradients:  # fmt: skip
    grad, q, k, v, out = (_flash_form(x, causal) for x in (grad, q, k, v, out))
    sums = sums.contiguous() if causal is None else sums[0].contiguous()
    gradients = aten._flash_attention_backward(
        grad, q, k, v, out, sums, *_flash_ends(q, k, causal), 0.0, causal is not None, *kept, scale=scale
    )
    of_q, of_k, of_v = (_our_form(x, causal) for x in gradients)
    return of_q, of_k, of_v


def _flash_form(x: torch.Tensor, causal: Causal | None) -> torch.Tensor:
    """[rows, heads, n, d] -> [rows, n, heads, d], or between bounds [n, heads, d]."""
    return x.transpose(1, 2) if causal is None else x.squeeze(0).transpose(0, 1)


def _our_form(x: torch.Tensor, causal: Causal | None) -> torch.Tensor:
    return x.transpose(1, 2) if causal is None else x.transpose(0, 1)[None]


def _flash_ends(q: torch.Tensor, k: torch.Tensor, causal: Causal | None) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    """Bounds and longest segment of queries and keys."""
    return (None, None, q.shape[1], k.shape[1]) if causal is None else (causal.bounds, causal.bounds, causal.longest, causal.longest)


CPU = Kernels("cpu", groups=True, packs=False, forward=_cpu, backward=_cpu_backward)
EFFICIENT = Kernels("efficient", groups=False, packs=False, forward=_efficient, backward=_efficient_backward)
FLASH = Kernels("flash", groups=True, packs=True, forward=_flash, backward=_flash_backward)


def kernels_for(query: torch.Tensor, dropout: float = 0.0) -> Kernels | None:
    """The row for queries of this device, type and head size [..., d]; None where there is none, as with dropout.

    flash from compute capability 8.0 in halves, memory-efficient on other cards and in fp32; both want head sizes in eights.
    """
    device, dtype, head_dim = query.device, query.dtype, query.shape[-1]
    if dropout:
        return None
    if device.type == "cpu":
        return CPU
    if device.type != "cuda" or torch.version.hip or head_dim % 8:
        return None
    row = card_row(torch.cuda.get_device_capability(device), dtype, head_dim, torch.backends.cuda.is_flash_attention_available())
    return row if row is not None and is_right(row, device, dtype, head_dim) else None


def card_row(capability: tuple[int, int], dtype: torch.dtype, head_dim: int, has_flash: bool = True) -> Kernels | None:
    """The row for a card's compute capability. Flash's backward is left alone above a head size of 192, where it depends on the card."""
    if capability[0] >= 8:
        return FLASH if has_flash and dtype in (torch.float16, torch.bfloat16) and head_dim <= 192 else EFFICIENT
    return None if dtype is torch.bfloat16 else EFFICIENT


# --- merging -------------------------------------------------------------------------------------------------------


def attend(
    kernels: Kernels, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: tuple[torch.Tensor, torch.Tensor] | None,
    causal: Causal, scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, Kept, Kept]:  # fmt: skip
    """Attention to oneself, and to a context's keys and values [1, kv heads, c, d] that all rows share: output, log-sum-exp, kept.

    Softmax over two parts is their outputs weighted by the exponentials of their log-sum-exps (FlashAttention's own rule,
    arXiv 2205.14135). The context is neither copied nor masked.
    """
    if context is None:
        out, total, own_kept = kernels.forward(q, k, v, causal, scale)
        return out, total, (), own_kept
    outer, outer_sum, outer_kept = kernels.forward(_one_row(q), *context, None, scale)
    own, own_sum, own_kept = kernels.forward(q, k, v, causal, scale)
    return *_merged(outer, outer_sum, own, own_sum), outer_kept, own_kept


def beside_context(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Attention to a context that all rows share and to what the mask (bool [rows, 1, n, m]) lets a row see of itself; on a CPU only."""
    outer, outer_sum, _ = _cpu(_one_row(q), *context, None, scale)
    barred = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    own, own_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=barred, scale=scale)
    return _merged(outer, outer_sum, own, own_sum)[0]


def _merged(outer: torch.Tensor, outer_sum: torch.Tensor, own: torch.Tensor, own_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys put together, [rows, heads, n, d], and its log-sum-exps; the first set's is of _one_row."""
    rows, heads, n, d = own.shape
    outer = outer.reshape(heads, rows, n, d).transpose(0, 1)
    outer_sum = outer_sum.reshape(heads, rows, n).transpose(0, 1)
    total = torch.logaddexp(outer_sum, own_sum)
    out = outer * (outer_sum - total).exp()[..., None] + own * (own_sum - total).exp()[..., None]
    return out.to(own.dtype), total


def attend_backward(
    kernels: Kernels, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor] | None, out: torch.Tensor, total: torch.Tensor, kept: tuple[Kept, Kept],
    causal: Causal, scale: float | None, wants_own: bool = True, wants_context: bool = True,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v and the context's keys and values: of the last two only without wants_own, not of those without wants_context.

    A kernel that is given the merged output and log-sum-exp returns its exact share of the gradient, since both parts'
    probabilities are normalised by the same sum.
    """
    rows, heads, n, d = q.shape
    outer_q: torch.Tensor | None = None
    of_context: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if context is not None:
        one_grad, one_q, one_out, one_total = (_one_row(x) for x in (grad, q, out, total))
        outer_q, *found = kernels.backward(one_grad, one_q, *context, one_out, one_total, kept[0], None, scale, wants_context)
        of_context = (found[0], found[1])
    if not wants_own:
        return None, None, None, *of_context
    own_q, of_k, of_v = kernels.backward(grad, q, k, v, out, total, kept[1], causal, scale, True)
    if outer_q is not None:
        own_q = outer_q.reshape(heads, rows, n, d).transpose(0, 1) + own_q
    return own_q, of_k, of_v, *of_context


def _one_row(x: torch.Tensor) -> torch.Tensor:
    """[rows, heads, n, ...] -> [1, heads, rows * n, ...]."""
    return x.transpose(0, 1).reshape(1, x.shape[1], -1, *x.shape[3:])


# --- a row on the device itself ------------------------------------------------------------------------------------


@cache
def is_right(kernels: Kernels, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a small case, output and gradients, is what plain arithmetic makes of it; where not, a line says so and masks are used."""
    try:
        off = error(kernels, device, dtype, head_dim)
    except RuntimeError as failure:
        why = str(failure).splitlines()[0]
    else:
        if off <= TOLERANCE:
            return True
        why = f"results are off by {off:.0%}"
    logging.getLogger(__name__).warning(
        "attention: PyTorch's %s kernels cannot be merged on this device (%s); shared beginnings are copied and masked", kernels.name, why
    )
    return False


@torch.no_grad()
def error(kernels: Kernels, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """The largest error of output and gradients in a small case, as a share of each one's norm."""
    many, few, c = 4, 2 if kernels.groups else 4, 45
    lengths = (24, 17) if kernels.packs else (19, 19)
    n = sum(lengths)

    source = torch.Generator().manual_seed(0)  # of its own: the run's random numbers stay what they are

    def numbers(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, head_dim, generator=source).to(device, dtype).transpose(1, 2)

    q, grad = numbers(n, many), numbers(n, many)
    k, v, ck, cv = (numbers(m, few) for m in (n, n, c, c))
    starts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    causal = Causal(max(lengths), torch.tensor(starts, dtype=torch.int32, device=device) if kernels.packs else None)
    rows = 1 if kernels.packs else len(lengths)
    cut = [x.view(x.shape[1], rows, -1, head_dim).transpose(0, 1) for x in (q, k, v, grad)]
    out, total, *kept = attend(kernels, cut[0], cut[1], cut[2], (ck, cv), causal, None)
    found = attend_backward(kernels, cut[3], cut[0], cut[1], cut[2], (ck, cv), out, total, (kept[0], kept[1]), causal, None)
    ours = [_one_row(x) if number < 4 else x for number, x in enumerate((out, *found)) if x is not None]

    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device), output_size=n)
    sees = torch.cat([torch.ones(n, c, dtype=torch.bool, device=device), (segment[:, None] == segment).tril()], dim=1)
    wanted = _plainly(grad, q, torch.cat([ck, k], dim=2), torch.cat([cv, v], dim=2), sees)
    theirs = [wanted[0], wanted[1], *(x[:, :, c:] for x in wanted[2:]), *(x[:, :, :c] for x in wanted[2:])]
    return max(float((mine.float() - other).norm() / other.norm()) for mine, other in zip(ours, theirs, strict=True))


def _plainly(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradients of q, k, v with all scores written out, in fp32."""
    shared, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    grad, q, k, v = (x.float() for x in (grad, q, k, v))
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    shares = (q @ k.mT * scale).masked_fill(~sees, -math.inf).softmax(-1)
    of_shares = grad @ v.mT
    of_scores = shares * (of_shares - (shares * of_shares).sum(-1, keepdim=True)) * scale
    of_k, of_v = (x.view(1, -1, shared, *x.shape[2:]).sum(2) for x in (of_scores.mT @ q, shares.mT @ grad))
    return shares @ v, of_scores @ k, of_k, of_v
