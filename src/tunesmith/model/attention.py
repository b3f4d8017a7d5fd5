"""Attention over conversations laid end to end: no token sees another conversation, and no T x T mask exists.

Registered through transformers' AttentionInterface, so every model that takes its attention from there has it. The linear
layers see real tokens only. In fp32 on a CPU attention does too: C++ takes all segments at once (ragged.h). Elsewhere
conversations of similar length are put into a rectangle, padded on the right, where causality already hides the padding from
every real token; or, where a kernel takes segments between bounds (kernels.py), they stay end to end. Segments that continue
a common beginning attend to it without a copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tunesmith import matmul
from tunesmith.data.layout import Segment
from tunesmith.model import native
from tunesmith.model.kernels import (
    Causal,
    Kernels,
    attend,
    attend_backward,
    back_over_context,
    beside_context,
    by_token,
    causal_by_tiles,
    factor_of,
    kernels_for,
    over_context,
)  # fmt: skip
from tunesmith.plan.shapes import HEAD_DIMS

NAME = "tunesmith_ragged"
BEHIND = "tunesmith_behind"
"""Answers of several rows that go on from one beginning."""
FEW_BY_TILES = 1 << 19
"""Scores of all heads; more of them are faster by AMX's tiles (docs/log.md)."""
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
    width: int
    """Cells of a row."""
    causal: Causal
    cells: torch.Tensor | None
    """Row-major cell of each token, int64 [stop - start]; None where there is no padding and a view does."""
    context: tuple[tuple[int, int], ...]
    """The [start, stop) of the segments that all of them continue."""


def rectangles(segments: Sequence[Segment], device: torch.device | str = "cpu", packed: bool = False) -> list[Rectangle]:
    """Cut a micro-batch into rectangles of neighbouring segments with the same context and bounded waste.

    packed: none of it is wasted: all neighbours with the same context are one row, with bounds between them.
    """
    found: list[Rectangle] = []
    first = 0
    while first < len(segments):
        last, tokens, longest = first, 0, 0
        while last < len(segments) and segments[last].context == segments[first].context:
            widest = max(longest, segments[last].length)
            if not packed and (last - first + 1) * widest > WASTE * (tokens + segments[last].length):
                break
            last, tokens, longest = last + 1, tokens + segments[last].length, widest
        group = segments[first:last]
        rows, width, cells, bounds = len(group), longest, None, None
        if packed:
            rows, width = 1, tokens
            starts = [*(segment.start - group[0].start for segment in group), tokens]
            bounds = torch.tensor(starts, dtype=torch.int32).to(device)
        elif any(segment.length != longest for segment in group):
            cells = torch.cat([torch.arange(s.length) + row * longest for row, s in enumerate(group)]).to(device)
        found.append(Rectangle(group[0].start, group[-1].stop, rows, width, Causal(longest, bounds), cells, group[0].context))
        first = last
    return found


class Layout:
    """Where a micro-batch's segments lie, for all layers; an object, so that nobody on the way takes it apart."""

    def __init__(self, segments: Sequence[Segment], device: torch.device | str = "cpu"):
        self.segments, self.device = segments, device

    @cached_property
    def padded(self) -> list[Rectangle]:
        return rectangles(self.segments, self.device)

    @cached_property
    def native(self) -> native.Segments:
        return native.Segments([(segment.start, segment.stop, segment.context) for segment in self.segments])

    @cached_property
    def packed(self) -> list[Rectangle]:
        return rectangles(self.segments, self.device, packed=True)


def behind(tokens: int, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """A first segment of so many tokens, and these behind it, each of which continues it."""
    moved = [
        Segment(s.start + tokens, s.stop + tokens, ((0, tokens), *((start + tokens, stop + tokens) for start, stop in s.context)))
        for s in segments
    ]
    return Segment(0, tokens), *moved


def attends_at_once(head_dim: int, scores: int, by_tiles: bool) -> bool:
    """Whether C++ attends for all segments at once; by_tiles: AMX's tiles would do it otherwise (precision.matmul=high)."""
    return head_dim in HEAD_DIMS and not (by_tiles and scores > FEW_BY_TILES)


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    ragged: Layout | None = None,
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
    q, k, v = (_as_computed(x).squeeze(0).transpose(0, 1) for x in (query, key, value))  # [tokens, heads, d]
    # What is learned is one more context, in front of what a segment continues.
    first_k, first_v = (k[:0], v[:0]) if prefix is None else prefix[cast(int, module.layer_idx)].to(k.dtype).unbind(0)
    if not dropout and native.takes(q) and attends_at_once(q.shape[2], q.shape[1] * ragged.native.scores, matmul.by_tiles(q)):
        return cast(torch.Tensor, _AtOnce.apply(q, k, v, first_k, first_v, ragged.native, scaling))[None], None  # type: ignore[no-untyped-call]
    kernels = kernels_for(q, dropout)
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and not (kernels and kernels.groups):
        # Grouped keys would send SDPA to its plain path with n x n scores; repeated keys keep its memory-efficient kernel.
        k, v, first_k, first_v = (x.repeat_interleave(shared, dim=1) for x in (k, v, first_k, first_v))
    boxes = ragged.packed if kernels and kernels.packs else ragged.padded
    done, sizes = [], [box.stop - box.start for box in boxes]
    for box, *parts in zip(boxes, *(torch.split(x, sizes) for x in (q, k, v)), strict=True):
        box_q, box_k, box_v = (_fill(part, box) for part in parts)
        ck = cv = None
        if box.context or len(first_k):
            outer = [[first, *(x[a:b] for a, b in box.context)] for first, x in ((first_k, k), (first_v, v))]
            ck, cv = ((torch.cat(parts) if box.context else parts[0])[None].transpose(1, 2) for parts in outer)
        if kernels and (kernels.packs or ck is not None or causal_by_tiles(box_q)):
            out = cast(torch.Tensor, _Attention.apply(box_q, box_k, box_v, ck, cv, kernels, box.causal, scaling))  # type: ignore[no-untyped-call]
        elif ck is None or cv is None:
            grouped = box_q.shape[1] > box_k.shape[1]
            out = F.scaled_dot_product_attention(box_q, box_k, box_v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
        else:
            out = _masked(box_q, box_k, box_v, ck, cv, scaling, dropout)
        out = out.transpose(1, 2).reshape(box.rows * box.width, *q.shape[1:])
        done.append(out if box.cells is None else out[box.cells])
    return torch.cat(done)[None] if len(done) > 1 else done[0][None], None


def _as_computed(x: torch.Tensor) -> torch.Tensor:
    """In autocast's type, which SDPA casts to and kernels of our own choice do not: rotary embedding may have left fp32 queries."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


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
    return beside_context(query, key, value, (ck, cv), mask, scaling).transpose(1, 2), None


def _fill(tokens: torch.Tensor, box: Rectangle) -> torch.Tensor:
    """[tokens, heads, d] -> [rows, heads, width, d]."""
    if box.cells is not None:
        cells = tokens.new_zeros(box.rows * box.width, *tokens.shape[1:])
        tokens = cells.index_copy(0, box.cells, tokens)
    return tokens.view(box.rows, box.width, *tokens.shape[1:]).transpose(1, 2)


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ck: torch.Tensor, cv: torch.Tensor, scale: float | None, dropout: float
) -> torch.Tensor:
    """Where no kernels can be merged: the context is repeated for each row, with a mask of n x (c + n) for all rows together."""
    rows, n, c = q.shape[0], q.shape[2], ck.shape[2]
    mask = torch.ones(n, c + n, dtype=torch.bool, device=q.device).tril(c)
    keys, values = (torch.cat([x.expand(rows, -1, -1, -1), own], dim=2) for x, own in ((ck, k), (cv, v)))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, dropout_p=dropout)


class _Attention(torch.autograd.Function):
    """Attention to a shared context (None: there is none) and to oneself, by kernels.py: [rows, heads, n, d] and [1, kv heads, c, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ck: torch.Tensor | None, cv: torch.Tensor | None,
        kernels: Kernels, causal: Causal, scale: float | None,
    ) -> torch.Tensor:  # fmt: skip
        context = None if ck is None or cv is None else (ck, cv)
        out, total, outer_kept, own_kept = attend(kernels, q, k, v, context, causal, scale)
        ctx.save_for_backward(q, k, v, ck, cv, out, total, *outer_kept, *own_kept)
        ctx.settings = kernels, causal, scale, len(outer_kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, ck, cv, out, total, *kept = ctx.saved_tensors
        kernels, causal, scale, count = ctx.settings
        context = None if ck is None else (ck, cv)
        wants_own = any(ctx.needs_input_grad[:3])  # not in the lowest layer under a learned prefix
        wants_context = any(ctx.needs_input_grad[3:5])  # not where the context is frozen
        found = attend_backward(
            kernels, gradients[0], q, k, v, context, out, total, (kept[:count], kept[count:]), causal, scale, wants_own, wants_context
        )
        return *found, None, None, None


class _AtOnce(torch.autograd.Function):
    """Attention of all segments at once in C++: q [tokens, heads, d], k and v [tokens, kv heads, d], what all see
    besides [any, kv heads, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_k: torch.Tensor, first_v: torch.Tensor,
        segments: native.Segments, scale: float | None,
    ) -> torch.Tensor:  # fmt: skip
        q, k, v = (x.contiguous() for x in (q, k, v))
        outer = None
        if len(first_k):
            found = over_context(_by_head(q), _by_head(first_k), _by_head(first_v), scale)
            outer = by_token(found[0]), found[1][0].contiguous()
        out, sums = native.attended(q, k, v, segments, factor_of(q, scale), outer)
        ctx.save_for_backward(q, k, v, first_k, first_v, out, sums)
        ctx.settings = segments, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, first_k, first_v, out, sums = ctx.saved_tensors
        segments, scale = ctx.settings
        grad = gradients[0].contiguous()
        found: tuple[torch.Tensor | None, ...] = (None, None, None)
        of_first: list[torch.Tensor | None] = [None, None]
        if any(ctx.needs_input_grad[:3]):  # not in the lowest layer under a learned prefix
            found = native.attended_back(grad, q, k, v, out, sums, segments, factor_of(q, scale))
        if len(first_k):
            wants_first = any(ctx.needs_input_grad[3:5])  # not where it is frozen
            of_out, its_q, keys, values, its_out = (_by_head(x) for x in (grad, q, first_k, first_v, out))
            of_q, *of_keys = back_over_context(of_out, its_q, keys, values, its_out, sums[None], scale, wants_first)
            of_first = [None if x is None else x[0].transpose(0, 1) for x in of_keys]
            if found[0] is not None:
                found[0].add_(of_q[0].transpose(0, 1))
        return *found, *of_first, None, None


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, d] -> [1, heads, tokens, d]."""
    return x.transpose(0, 1)[None]


AttentionInterface.register(NAME, ragged_attention)
AttentionInterface.register(BEHIND, behind_attention)
for name in (NAME, BEHIND):
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
