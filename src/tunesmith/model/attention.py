"""Attention over conversations laid end to end: no token sees another conversation, and no T x T mask exists.

Registered through transformers' AttentionInterface, so every model that takes its attention from there has it. The linear
layers see real tokens only; here alone conversations of similar length are put into a rectangle. Padding goes on the
right, where causality already hides it from every real token, so SDPA's causal path needs no mask, on any device.
Segments that continue a common beginning attend to it without a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tunesmith.data.layout import Segment

NAME = "tunesmith_ragged"
BEHIND = "tunesmith_behind"
"""Answers of several rows that go on from one beginning."""
WASTE = 1.25
"""A rectangle is closed when its cells would exceed its tokens by this factor; attention is a small share of a step, and
each rectangle costs a kernel call per layer."""


@dataclass(frozen=True)
class Rectangle:
    """Neighbouring segments that share one attention call."""

    start: int
    stop: int
    """Their tokens are [start, stop) of the micro-batch."""
    rows: int
    longest: int
    cells: torch.Tensor | None
    """Row-major cell of each token, int64 [stop - start]; None where all are equally long and a view does."""
    context: tuple[tuple[int, int], ...]
    """The [start, stop) of the segments that all of them continue."""


def rectangles(segments: Sequence[Segment], device: torch.device | str = "cpu") -> list[Rectangle]:
    """Cut a micro-batch into rectangles of neighbouring segments with the same context and bounded waste."""
    found: list[Rectangle] = []
    first = 0
    while first < len(segments):
        last, tokens, longest = first, 0, 0
        while last < len(segments) and segments[last].context == segments[first].context:
            widest = max(longest, segments[last].length)
            if (last - first + 1) * widest > WASTE * (tokens + segments[last].length):
                break
            last, tokens, longest = last + 1, tokens + segments[last].length, widest
        group = segments[first:last]
        cells = None
        if any(segment.length != longest for segment in group):
            cells = torch.cat([torch.arange(s.length) + row * longest for row, s in enumerate(group)]).to(device)
        found.append(Rectangle(group[0].start, group[-1].stop, len(group), longest, cells, group[0].context))
        first = last
    return found


def behind(tokens: int, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """A first segment of so many tokens, and these behind it, each of which continues it."""
    moved = [
        Segment(s.start + tokens, s.stop + tokens, ((0, tokens), *((start + tokens, stop + tokens) for start, stop in s.context)))
        for s in segments
    ]
    return Segment(0, tokens), *moved


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    ragged: Sequence[Rectangle] | None = None,
    prefix: Sequence[torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each segment to what is learned, to its context and to itself.

    query [1, heads, tokens, d], key and value [1, kv heads, tokens, d] -> [1, tokens, heads, d]. prefix: for each layer
    learned keys and values that every token sees, [2, virtual tokens, kv heads, d].
    """
    if ragged is None:
        raise RuntimeError(f"{NAME} attention needs the layout of the micro-batch (keyword `ragged`)")
    # Squeezed and split, not indexed and sliced: backward of those fills a tensor with zeros for each, and adds them up.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [tokens, heads, d]
    # What is learned is one more context, in front of what a segment continues.
    first_k, first_v = (k[:0], v[:0]) if prefix is None else prefix[cast(int, module.layer_idx)].to(k.dtype).unbind(0)
    shared = q.shape[1] // k.shape[1]
    grouped = shared > 1 and _flash_serves(q)
    if shared > 1 and not grouped:
        k, v, first_k, first_v = (x.repeat_interleave(shared, dim=1) for x in (k, v, first_k, first_v))
    done, sizes = [], [box.stop - box.start for box in ragged]
    for box, *parts in zip(ragged, *(torch.split(x, sizes) for x in (q, k, v)), strict=True):
        box_q, box_k, box_v = (_fill(part, box) for part in parts)
        if box.context or len(first_k):
            outer = [[first, *(x[a:b] for a, b in box.context)] for first, x in ((first_k, k), (first_v, v))]
            ck, cv = ((torch.cat(parts) if box.context else parts[0])[None].transpose(1, 2) for parts in outer)
            out = _with_context(box_q, box_k, box_v, ck, cv, scaling, dropout)
        else:
            out = F.scaled_dot_product_attention(
                box_q, box_k, box_v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
            )
        out = out.transpose(1, 2).reshape(box.rows * box.longest, *q.shape[1:])
        done.append(out if box.cells is None else out[box.cells])
    return torch.cat(done)[None] if len(done) > 1 else done[0][None], None


def behind_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    prefix: Sequence[torch.Tensor],
    seen: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of rows to a beginning that all of them continue and, causally, to what of their own is not padding. No gradients.

    query [rows, heads, n, d] is that of the last n of a row's tokens, key and value [rows, kv heads, tokens, d] -> [rows, n, heads, d].
    prefix: the beginning's keys and values in each layer, [2, its tokens, kv heads, d]; seen: what is no padding, bool [rows, tokens].
    """
    rows, heads, n = query.shape[:3]
    tokens = key.shape[2]
    ck, cv = (x[None].transpose(1, 2) for x in prefix[cast(int, module.layer_idx)].to(key.dtype).unbind(0))
    place = torch.arange(tokens, device=query.device)
    own_place = place[tokens - n :, None]
    # Padding sees itself: nobody sees it, but a row of nothing would give NaN.
    mask = ((place <= own_place) & seen[:, None, :] | (place == own_place))[:, None]  # [rows, 1, n, tokens]
    if query.device.type != "cpu":
        keys, values = (torch.cat([x.expand(rows, -1, -1, -1), own], dim=2) for x, own in ((ck, key), (cv, value)))
        keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
        mask = torch.cat([mask.new_ones(rows, 1, n, ck.shape[2]), mask], dim=3)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling).transpose(1, 2), None
    outer, outer_sum = _over_context(_one_row(query), ck, cv, scaling)
    barred = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    own, own_sum = _forward(query, key, value, attn_mask=barred, scale=scaling)
    return _merged(outer, outer_sum, own, own_sum)[0].transpose(1, 2), None


def _fill(tokens: torch.Tensor, box: Rectangle) -> torch.Tensor:
    """[tokens, heads, d] -> [rows, heads, longest, d]."""
    if box.cells is not None:
        cells = tokens.new_zeros(box.rows * box.longest, *tokens.shape[1:])
        tokens = cells.index_copy(0, box.cells, tokens)
    return tokens.view(box.rows, box.longest, *tokens.shape[1:]).transpose(1, 2)


def _with_context(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ck: torch.Tensor, cv: torch.Tensor, scale: float | None, dropout: float
) -> torch.Tensor:
    """Rows of queries [rows, heads, n, d] over one context [1, kv heads, c, d] and, causally, their own keys."""
    if q.device.type == "cpu" and not dropout:
        return cast(torch.Tensor, _MergedAttention.apply(q, k, v, ck, cv, scale))  # type: ignore[no-untyped-call]  # torch's
    # Elsewhere the context is repeated for each row, with a mask of n x (c + n) for all rows together.
    rows, n, c = q.shape[0], q.shape[2], ck.shape[2]
    mask = torch.ones(n, c + n, dtype=torch.bool, device=q.device).tril(c)
    keys, values = (torch.cat([x.expand(rows, -1, -1, -1), own], dim=2) for x, own in ((ck, k), (cv, v)))
    if (shared := q.shape[1] // k.shape[1]) > 1:  # flash has no mask, and the memory-efficient kernel takes no grouped keys
        keys, values = (x.repeat_interleave(shared, dim=1) for x in (keys, values))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, dropout_p=dropout)


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _MergedAttention(torch.autograd.Function):
    """Attention to a shared context and attention to oneself, each by its own kernel call, merged exactly.

    Softmax over two parts is their outputs weighted by the exponentials of their log-sum-exps (FlashAttention's own rule,
    arXiv 2205.14135). Backward: a kernel that is given the merged output and log-sum-exp returns its exact share of the
    gradient, since both parts' probabilities are normalised by the same sum. The context is neither copied nor masked.
    In fp32 its scores are made by plain matmuls, some rows at a time, which are faster than the kernel (docs/log.md).
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ck: torch.Tensor, cv: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        outer, outer_sum = _over_context(_one_row(q), ck, cv, scale)
        own, own_sum = _forward(q, k, v, 0.0, True, scale=scale)
        out, total = _merged(outer, outer_sum, own, own_sum)
        ctx.save_for_backward(q, k, v, ck, cv, out, total)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, ck, cv, out, total = ctx.saved_tensors
        rows, heads, n, d = q.shape
        grad = gradients[0].contiguous()
        wants_context = any(ctx.needs_input_grad[3:5])
        outer_q, grad_ck, grad_cv = _back_over_context(
            _one_row(grad), _one_row(q), ck, cv, _one_row(out), _one_row(total), ctx.scale, wants_context
        )
        if not any(ctx.needs_input_grad[:3]):  # the lowest layer under a learned prefix
            return None, None, None, grad_ck, grad_cv, None
        own_q, grad_k, grad_v = _backward(grad, q, k, v, out, total, 0.0, True, scale=ctx.scale)
        return outer_q.view(heads, rows, n, d).transpose(0, 1) + own_q, grad_k, grad_v, grad_ck, grad_cv, None


def _merged(
    outer: torch.Tensor, outer_sum: torch.Tensor, own: torch.Tensor, own_sum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys put together, [rows, heads, n, d], and its log-sum-exps; the first set's is of _one_row."""
    rows, heads, n, d = own.shape
    outer = outer.view(heads, rows, n, d).transpose(0, 1)
    outer_sum = outer_sum.reshape(heads, rows, n).transpose(0, 1)
    total = torch.logaddexp(outer_sum, own_sum)
    out: torch.Tensor = outer * (outer_sum - total).exp()[..., None] + own * (own_sum - total).exp()[..., None]
    return out.to(own.dtype), total


CELLS = 1 << 20
"""Scores that are made at a time: 4 MB, which stay in a core's cache until the next matmul has read them."""


def _over_context(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a mask, [1, heads, n, d] over [1, kv heads, c, d]: what it gives, and its log-sum-exps [1, heads, n]."""
    if q.dtype is not torch.float32:
        found: tuple[torch.Tensor, torch.Tensor] = _forward(q, k, v, scale=scale)
        return found
    k, v = k.contiguous(), v.contiguous()  # oneDNN takes minutes over rows that lie apart
    rows, factor = _by_key_head(q, k), _factor(q, scale)
    out, sums = torch.empty_like(rows), rows.new_empty(rows.shape[:2])
    for head, part in _pieces(rows, k.shape[2]):
        scores = torch.mm(rows[head, part] * factor, k[0, head].t())
        shares = scores.softmax(dim=-1)
        # The largest share is exp(the largest score - the sum's logarithm).
        sums[head, part] = scores.amax(dim=-1) - shares.amax(dim=-1).log()
        out[head, part] = torch.mm(shares, v[0, head])
    return out.view(q.shape), sums.view(q.shape[:3])


def _back_over_context(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    scale: float | None,
    wants_context: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients to q, k and v (those only where they are wanted) of the share that the context has in a merged attention."""
    if q.dtype is not torch.float32:
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _backward(grad, q, k, v, out, total, 0.0, False, scale=scale)
        return found
    k, v = k.contiguous(), v.contiguous()
    rows, of_out, factor = _by_key_head(q, k), _by_key_head(grad, k), _factor(q, scale)
    sums = total.reshape(rows.shape[:2])
    drift = (grad * out).sum(dim=-1).reshape(rows.shape[:2])  # what softmax takes off every score's gradient
    of_q = torch.empty_like(rows)
    of_k, of_v = (torch.zeros_like(k), torch.zeros_like(v)) if wants_context else (None, None)
    for head, part in _pieces(rows, k.shape[2]):
        scaled = rows[head, part] * factor
        shares = torch.mm(scaled, k[0, head].t()).sub_(sums[head, part, None]).exp_()
        if of_v is not None:
            of_v[0, head] += torch.mm(shares.t(), of_out[head, part])
        of_scores = torch.mm(of_out[head, part], v[0, head].t()).sub_(drift[head, part, None]).mul_(shares)
        if of_k is not None:
            of_k[0, head] += torch.mm(of_scores.t(), scaled)
        of_q[head, part] = torch.mm(of_scores, k[0, head])
    return of_q.mul_(factor).view(q.shape), of_k, of_v


def _by_key_head(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[1, heads, n, d] -> [kv heads, heads / kv heads * n, d]: all rows that look at the same keys."""
    return x.reshape(k.shape[1], -1, x.shape[3])


def _factor(q: torch.Tensor, scale: float | None) -> float:
    return float(q.shape[3] ** -0.5) if scale is None else scale


def _pieces(rows: torch.Tensor, keys: int) -> Iterator[tuple[int, slice]]:
    """Key head and rows of each piece of [kv heads, rows, d] that has at most CELLS scores with so many keys."""
    size = max(1, CELLS // max(1, keys))
    for head in range(rows.shape[0]):
        for start in range(0, rows.shape[1], size):
            yield head, slice(start, start + size)


def _one_row(x: torch.Tensor) -> torch.Tensor:
    """[rows, heads, n, ...] -> [1, heads, rows * n, ...]."""
    return x.transpose(0, 1).reshape(1, x.shape[1], -1, *x.shape[3:])


def _flash_serves(query: torch.Tensor) -> bool:
    """Whether SDPA has a flash kernel here, which takes grouped keys as they are. Without it (T4, fp32 on a card) grouped
    keys would send SDPA to its plain path with n x n scores; repeated keys keep its memory-efficient kernel."""
    if query.device.type == "cpu":
        return True
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(query.device)[0] >= 8


AttentionInterface.register(NAME, ragged_attention)
AttentionInterface.register(BEHIND, behind_attention)
for name in (NAME, BEHIND):
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
