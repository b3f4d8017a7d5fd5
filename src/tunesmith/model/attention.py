"""Attention over conversations laid end to end: no token sees another conversation, and no T x T mask exists.

Registered through transformers' AttentionInterface, so every model that takes its attention from there has it. The linear
layers see real tokens only; here alone conversations of similar length are put into a rectangle. Padding goes on the
right, where causality already hides it from every real token, so SDPA's causal path needs no mask, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "tunesmith_ragged"
WASTE = 1.25
"""A rectangle is closed when its cells would exceed its tokens by this factor; attention is a small share of a step, and
each rectangle costs a kernel call per layer."""


@dataclass(frozen=True)
class Rectangle:
    """Neighbouring conversations that share one SDPA call."""

    start: int
    stop: int
    """Their tokens are [start, stop) of the micro-batch."""
    rows: int
    longest: int
    cells: torch.Tensor | None
    """Row-major cell of each token, int64 [stop - start]; None where all are equally long and a view does."""


def rectangles(lengths: Sequence[int], device: torch.device | str = "cpu") -> list[Rectangle]:
    """Cut a micro-batch, longest conversation first, into rectangles of bounded waste."""
    found: list[Rectangle] = []
    start = first = 0
    while first < len(lengths):
        last, tokens = first, 0
        while last < len(lengths) and (last - first + 1) * max(lengths[first : last + 1]) <= WASTE * (tokens + lengths[last]):
            tokens += lengths[last]
            last += 1
        group = lengths[first:last]
        longest = max(group)
        cells = None
        if min(group) != longest:
            cells = torch.cat([torch.arange(n) + row * longest for row, n in enumerate(group)]).to(device)
        found.append(Rectangle(start, start + tokens, len(group), longest, cells))
        start, first = start + tokens, last
    return found


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    ragged: Sequence[Rectangle] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each conversation to itself.

    query [1, heads, tokens, d], key and value [1, kv heads, tokens, d] -> [1, tokens, heads, d].
    """
    if ragged is None:
        raise RuntimeError(f"{NAME} attention needs the layout of the micro-batch (keyword `ragged`)")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, d]
    shared = q.shape[1] // k.shape[1]
    grouped = shared > 1 and _flash_serves(q)
    if shared > 1 and not grouped:
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    parts = []
    for box in ragged:
        box_q, box_k, box_v = (_fill(x[box.start : box.stop], box) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            box_q, box_k, box_v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
        )
        out = out.transpose(1, 2).reshape(box.rows * box.longest, *q.shape[1:])
        parts.append(out if box.cells is None else out[box.cells])
    return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None], None


def _flash_serves(query: torch.Tensor) -> bool:
    """Whether SDPA has a flash kernel here, which takes grouped keys as they are. Without it (T4, fp32 on a card) grouped
    keys would send SDPA to its plain path with n x n scores; repeated keys keep its memory-efficient kernel."""
    if query.device.type == "cpu":
        return True
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(query.device)[0] >= 8


def _fill(tokens: torch.Tensor, box: Rectangle) -> torch.Tensor:
    """[tokens, heads, d] -> [rows, heads, longest, d]."""
    if box.cells is not None:
        cells = tokens.new_zeros(box.rows * box.longest, *tokens.shape[1:])
        tokens = cells.index_copy(0, box.cells, tokens)
    return tokens.view(box.rows, box.longest, *tokens.shape[1:]).transpose(1, 2)


AttentionInterface.register(NAME, ragged_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
