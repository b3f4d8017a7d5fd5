"""What stands between matmuls, in C++ on a CPU in fp32: passes over rows, each of which reads and writes a tensor once (native.cpp), and
attention (ragged.h).

PyTorch has several operators for each of them, and each of those goes through memory. Where there is no compiler, a line says so and
PyTorch's operators do the same.
Every tensor here is fp32, on a CPU and contiguous, unless it is said otherwise.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch

from tunesmith import compiled

ROWS = 16
"""Of what is quantised memory goes on to a multiple of so many."""


def is_here(device: torch.device) -> bool:
    """Whether there are passes for this device."""
    return device.type == "cpu" and library() is not None


def takes(x: torch.Tensor) -> bool:
    """Whether there are passes over a tensor of this type and device."""
    return x.dtype is torch.float32 and is_here(x.device)


def quantised(parts: Sequence[torch.Tensor], blocks: Sequence[int], by: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 q [rows, all columns] and fp32 t [rows], such that q * t is about by times the parts side by side, each rotated by its block.

    parts: [rows, columns], rows may lie apart; by [all columns], None: 1.
    """
    parts = [x if x.stride(1) == 1 else x.contiguous() for x in parts]
    rows, width = len(parts[0]), sum(x.shape[1] for x in parts)
    # Products by tiles read whole groups of rows (matmul.by_int8), whatever stands in the last ones.
    q, scales = torch.empty(-(-rows // ROWS) * ROWS, width, dtype=torch.int8)[:rows], torch.empty(rows)
    _call("quantise", len(parts), _places(parts), _whole([x.stride(0) for x in parts]), *_rotations(parts, blocks), by, q, scales, rows)
    return q, scales


def dequantised(
    sums: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None, biases: Sequence[torch.Tensor | None], widths: Sequence[int],
    blocks: Sequence[int],
) -> list[torch.Tensor]:  # fmt: skip
    """rotated(sums * rows * columns) + bias, [rows, width] of each width: sums int32 [rows, all columns]; columns None: 1, a bias None: 0.

    Where there is one part, it takes the memory of sums.
    """
    made = [sums.view(torch.float32)] if len(widths) == 1 else [torch.empty(len(sums), width) for width in widths]
    _call(
        "dequantise", len(made), sums, rows, columns, _places(biases), _places(made), *_rotations(made, blocks), len(sums)
    )  # fmt: skip
    return made


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """weight x / rms(x), and 1 / rms(x) [..., 1]."""
    y, root = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    _call("norm", x, weight, y, root, root.numel(), x.shape[-1], ctypes.c_float(eps))
    return y, root


def normed_again(x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight x / rms(x) from what `normed` has given."""
    y = torch.empty_like(x)
    _call("norm_again", x, weight, y, root, root.numel(), x.shape[-1])
    return y


def normed_back(of_y: torch.Tensor, x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient to x of weight x / rms(x)."""
    of_x = torch.empty_like(x)
    _call("norm_back", of_y.contiguous(), x, weight, root, of_x, root.numel(), x.shape[-1])
    return of_x


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both contiguous or halves of one tensor's rows."""
    y = torch.empty(gate.shape)
    gate, up, step = _side_by_side(gate, up)
    _call("gated", ctypes.c_void_p(gate.data_ptr()), ctypes.c_void_p(up.data_ptr()), step, y, y.numel() // y.shape[-1], y.shape[-1])
    return y


def gated_back(of_y: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients to gate and up of silu(gate) * up."""
    of_gate, of_up = torch.empty(gate.shape), torch.empty(gate.shape)
    gate, up, step = _side_by_side(gate, up)
    places = ctypes.c_void_p(gate.data_ptr()), ctypes.c_void_p(up.data_ptr())
    _call("gated_back", of_y.contiguous(), *places, step, of_gate, of_up, of_y.numel() // of_y.shape[-1], of_y.shape[-1])
    return of_gate, of_up


def _side_by_side(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Both with rows that lie a step apart, and the step."""
    rows = [x.flatten(0, -2) for x in (gate, up)]  # a copy where it can be no view
    if rows[0].stride() == rows[1].stride() and rows[0].stride(1) == 1:
        return rows[0], rows[1], rows[0].stride(0)
    return gate.contiguous(), up.contiguous(), gate.shape[-1]


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Rotary embedding of x [..., tokens, heads, d] with halves side by side, by cos and sin [..., tokens, d]; back: of its gradient."""
    y = torch.empty_like(x)
    heads, width = x.shape[-2:]
    _call("turned", x, cos, sin, y, cos.numel() // width, heads, width, int(back))
    return y


def softmaxed(scores: torch.Tensor) -> torch.Tensor:
    """Scores [queries, keys] become their softmax, in place; the logarithms of its sums, [queries]."""
    sums = scores.new_empty(len(scores))
    _call("softmax", scores, sums, *scores.shape)
    return sums


def softmaxed_back(scores: torch.Tensor, of_shares: torch.Tensor, sums: torch.Tensor, drift: torch.Tensor) -> None:
    """Scores become shares, by their log-sum-exps [queries], and the gradients to shares those to scores, both in place.

    drift [queries]: over all that a query sees, the sum of share times gradient to it.
    """
    _call("softmax_back", scores, of_shares, sums, drift, *scores.shape)


FEW, MANY = 4, 16
"""Parts of attention's backward, up to so many threads, and beyond."""


class Segments:
    """Where the segments of a micro-batch lie, and what they continue, for C++: of each start, stop, and those of what it continues.

    is_causal: each sees itself too, up to each of its tokens.
    """

    def __init__(self, segments: Sequence[tuple[int, int, Sequence[tuple[int, int]]]], is_causal: bool = True) -> None:
        places = np.array([(start, stop, len(context)) for start, stop, context in segments], dtype=np.int64).reshape(-1, 3)
        begins = 2 * (np.cumsum(places[:, 2]) - places[:, 2])
        self._segments = torch.from_numpy(np.column_stack([places, begins]))
        self._ranges = torch.tensor([number for _, _, context in segments for one in context for number in one] or [0], dtype=torch.int64)
        self._is_causal = is_causal
        lengths = places[:, 1] - places[:, 0]
        largest = float(np.square(lengths).max(initial=0) / max(1, np.square(lengths).sum()))
        self._share = largest if is_causal and not places[:, 2].any() else math.inf
        """Of all scores those of the segment that has most, where each sees itself alone."""
        seen = np.array([stop - start + sum(b - a for a, b in context) for start, stop, context in segments], dtype=np.int64)
        self.scores = int((lengths * seen).sum())
        """Of a head, those that causality hides included."""

    def arguments(self, q: torch.Tensor, k: torch.Tensor, factor: float) -> tuple[object, ...]:
        shape = q.shape[0], k.shape[0], q.shape[1], *k.shape[1:]
        return self._segments, self._ranges, len(self._segments), *shape, int(self._is_causal), ctypes.c_float(factor)

    def copies(self, groups: int) -> int:
        """Of the gradients to keys, each of which one thread adds up for a group of heads; 1 where it does so for one segment too.

        The same for one thread as for some, so that all add up in the same order.
        """
        parts = FEW if torch.get_num_threads() <= FEW else MANY
        if self._share * parts <= groups and len(self._segments) * groups >= 2 * parts:
            return 1
        return parts // math.gcd(parts, groups)


@lru_cache(maxsize=64)
def sees_all(queries: int, keys: int) -> Segments:
    """So many queries, each of which sees all of so many keys of others."""
    assert keys
    return Segments([(0, queries, ((0, keys),))], is_causal=False)


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, factor: float,
    outer: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of segments to what they continue and, causally, to themselves, and the log-sum-exp of each query's scores [heads, tokens].

    Queries and outputs are [tokens, heads, d], keys and values [keys, kv heads, d]. outer: what attention to a part that all of them see
    besides gives by itself, and its log-sum-exps.
    """
    out, sums = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    _call("ragged", *segments.arguments(q, k, factor), q, k, v, *(outer or (None, None)), out, sums)
    return out, sums


def attended_back(
    of_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sums: torch.Tensor, segments: Segments,
    factor: float, wants_keys: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """The gradients to q, k and v (those only where they are wanted) of what `attended` has given, or of its part in merged ones."""
    of_q, copies = torch.empty_like(q), segments.copies(k.shape[1]) if wants_keys else 4 * torch.get_num_threads()
    of_k, of_v = (k.new_empty(copies, *k.shape) for _ in range(2)) if wants_keys else (None, None)
    _call("ragged_back", *segments.arguments(q, k, factor), copies, of_out, q, k, v, out, sums, of_q, of_k, of_v)
    of_k, of_v = (x if x is None else x[0] if copies == 1 else x.sum(0) for x in (of_k, of_v))
    return of_q, of_k, of_v


# --- calling ---------------------------------------------------------------------------------------------------------

READ = (torch.float32, torch.int8, torch.int32, torch.int64)
"""Types that C++ is given: halves would be read as half as many numbers of another kind."""


def _call(name: str, *given: object) -> None:
    """A function of the library: tensors by their place (None: nowhere), whole numbers as such, the rest as it is."""
    getattr(library(), name)(*(_argument(one) for one in given))


def _argument(one: object) -> object:
    if isinstance(one, torch.Tensor):
        assert one.is_contiguous()
        assert one.dtype in READ
        return ctypes.c_void_p(one.data_ptr())
    if one is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int64(one) if isinstance(one, int) else one


def _places(tensors: Sequence[torch.Tensor | None]) -> object:
    assert all(x is None or x.dtype is torch.float32 for x in tensors)
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def _whole(numbers: Sequence[int]) -> object:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _rotations(parts: Sequence[torch.Tensor], blocks: Sequence[int]) -> tuple[object, ...]:
    """Columns, block and norm of each part."""
    norms = (ctypes.c_float * len(blocks))(*(1 / math.sqrt(block) for block in blocks))
    return _whole([x.shape[1] for x in parts]), _whole(blocks), norms


# --- compiling -------------------------------------------------------------------------------------------------------


@cache
def library() -> ctypes.CDLL | None:
    """native.cpp for this CPU; None, with a line, where there is no compiler."""
    without = "norms, gates and rotary embedding take several passes each, attention is torch's, and precision.int8=dynamic saves little"
    return compiled.library(Path(__file__).with_suffix(".cpp"), without)
