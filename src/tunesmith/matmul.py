"""Who multiplies fp32 matrices on this CPU: the library that torch takes by itself, or oneDNN, which it has as well.

Torch's builds for x86 hand fp32 to MKL, which keeps its AVX-512 kernels for Intel's own CPUs: on an AMD EPYC of the fifth generation it
reaches half of what the cores can do, and oneDNN all of it (docs/log.md). Both add up in fp32, in another order. Which one is faster is
measured once a machine, with the peak that MFU divides by.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LEAST = 1 << 20
"""Multiplications below which a matmul stays with torch's own library: oneDNN's start, 25 microseconds, costs more than it saves there."""
FASTER = 1.25
"""How much faster oneDNN must be to be taken: less may be noise on a busy machine, and a change of library is a change of rounding."""

_taken: list[torch.library.Library] = []


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's linear layer for plain tensors."""
    import torch

    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """left @ right + bias for fp32 matrices on a CPU, computed by oneDNN: [m, k], [k, n] and [n] give [m, n]."""
    import torch

    linear = torch.ops.mkldnn._linear_pointwise.default
    # The first operand is copied unless its rows lie one after the other. As a gradient of weights, y^T x, either can be first.
    if bias is None and left.stride(1) != 1 and right.stride(0) != 1 and right.shape[1] < left.shape[0]:
        found: torch.Tensor = linear(right.t(), left, None, "none", [], "").t()
    else:
        found = linear(left, right.t(), bias, "none", [], "")
    return found


def take_onednn() -> None:
    """From now on torch's fp32 matmuls of two matrices on a CPU are oneDNN's, in forward and backward of all that this process computes.

    Batched matmuls and attention stay where they are.
    """
    import torch

    if _taken:
        return
    mm, mm_out, addmm = (torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "mm.out", "addmm"))

    def suits(left: torch.Tensor, right: torch.Tensor) -> bool:
        (rows, inner), (same, columns) = left.shape, right.shape
        return left.dtype is torch.float32 is right.dtype and inner == same and rows * inner * columns >= LEAST

    def product(keys: Any, left: torch.Tensor, right: torch.Tensor) -> Any:
        return by_onednn(left, right) if suits(left, right) else mm.call_boxed(keys, left, right)

    def product_into(keys: Any, left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> Any:
        if out.dtype is torch.float32 and suits(left, right):
            return out.resize_(left.shape[0], right.shape[1]).copy_(by_onednn(left, right))
        return mm_out.call_boxed(keys, left, right, out=out)

    def biased(keys: Any, added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
        is_bias = added.shape == right.shape[1:] and added.dtype is torch.float32 and beta == alpha == 1
        if is_bias and suits(left, right):
            return by_onednn(left, right, added)
        return addmm.call_boxed(keys, added, left, right, beta=beta, alpha=alpha)

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch's, as below
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # that a kernel is replaced is what is meant
        library.impl("mm", product, "CPU", with_keyset=True)  # type: ignore[no-untyped-call]
        library.impl("mm.out", product_into, "CPU", with_keyset=True)  # type: ignore[no-untyped-call]
        library.impl("addmm", biased, "CPU", with_keyset=True)  # type: ignore[no-untyped-call]
    _taken.append(library)  # kernels live as long as it


def leave_onednn() -> None:
    """Undo take_onednn."""
    while _taken:
        _taken.pop()._destroy()  # type: ignore[no-untyped-call]
