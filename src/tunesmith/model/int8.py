"""Frozen linear layers in int8 that are multiplied in int8, forward and back (precision.int8=dynamic).

A matrix M is quantised row by row: M = diag(s) Q about, with s the largest magnitude of a row / 127. A few large numbers would leave the
others of their row few steps, so everything is rotated first, by Hadamard matrices H of 64 rows (orthogonal and symmetric) along the
diagonal, as QuaRot does (arXiv 2404.00456); each large number is then spread over 64, and both sides of a product are rotated alike, which
leaves it as it was. With the weight W [outputs, inputs] kept as H W H = diag(s) Q, an activation X and a gradient G [tokens, ...]:

    X W^T = (X H) (H W H)^T H  is about  (diag(t) (P Q^T) diag(s)) H,   where diag(t) P is X H, quantised
    G W   = (G H) (H W H) H    is about  (diag(u) (R Q)) H,             where diag(u) R is (G H) diag(s), quantised

The products in brackets are exact sums of integers. They take a ninth of the time of fp32 on a CPU with VNNI, so that what stands around
them decides: a pass that rotates and quantises, and one that scales and rotates back. Each is a loop of C++ on a CPU (int8.cpp), a
matmul by H and a kernel of torch.compile on a card, and several passes of PyTorch where there is no compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from torch import nn
from torch.autograd.function import once_differentiable

from tunesmith.config import Refusal
from tunesmith.hardware import cache_folder

LEVELS = 127
"""Quantised values go from -127 to 127: symmetric, so that 0 stays 0 and a sign costs nothing."""
BLOCK = 64
"""Numbers that are mixed with each other, at most."""
LEAST_ROWS, MULTIPLE = 32, 8
"""What cuBLASLt's int8 kernels want: more than 16 rows, and inputs and outputs in multiples of 8."""


class Int8Linear(nn.Linear):
    """A frozen linear layer: weight int8 [outputs, inputs], rotated; scales fp32 [outputs]; bias as it was."""

    scales: nn.Parameter

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        """Of `layer`, which is emptied."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        whole = layer.weight.detach().to(device)
        layer.weight = nn.Parameter(whole.new_empty(0), requires_grad=False)
        quantised, scales = _quantise(rotated(whole.float().t()).t(), None)
        self.weight = nn.Parameter(quantised, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Linear:
        # An engine that turns a model into halves must not round the scales.
        scales = self.scales.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales.data = scales.to(self.weight.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] in any floating type; under autocast in its type."""
        device = x.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            bias = None if self.bias is None else self.bias.to(compute)
            return cast(torch.Tensor, _Product.apply(x.to(compute), self.weight, self.scales, bias))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """A layer without an adapter, which keeps nothing for backward but itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight, scales)
        return multiply(x.flatten(0, -2), weight, scales, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        (of_y,) = of_outputs
        of_x = multiply_back(of_y.flatten(0, -2), weight, scales)
        return of_x.view(*of_y.shape[:-1], -1), None, None, None


def multiply(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias in x's type: x [tokens, inputs] gives [tokens, outputs], weight and scales those of an Int8Linear."""
    quantised, rows = _quantise(x, None)
    return _dequantise(_matmul(quantised, weight.t()), rows, scales, bias, x.dtype)


def multiply_back(of_y: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """of_y W in of_y's type, [tokens, inputs]: what a row of the weight is scaled by goes into a column of of_y, before it is quantised."""
    quantised, rows = _quantise(of_y, scales)
    return _dequantise(_matmul(quantised, weight), rows, None, None, of_y.dtype)


def quantise_layers(model: Any, device: torch.device) -> None:
    """Turn every linear layer of a model but its output head into an Int8Linear on the device, one after the other.

    Raises Refusal where a card's kernels do not take a layer's size.
    """
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is head:
                continue
            if device.type == "cuda" and (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE):
                raise Refusal(
                    f"precision.int8=dynamic: {name} is {layer.out_features} x {layer.in_features}, and a card multiplies int8 in "
                    f"multiples of {MULTIPLE} — type precision.int8=bnb"
                )
            setattr(parent, name, Int8Linear(layer, device))
    if device.type == "cpu":
        for weight in model.parameters():  # a file of weights is mapped whole, and stays in memory as long as any of them lies in it
            weight.data = weight.data.clone()


# --- the passes ----------------------------------------------------------------------------------------------------


def _matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Exact product of int8 [tokens, a] and int8 [a, b], int32."""
    if not left.is_cuda:
        return torch._int_mm(left, right)
    # Not measured on a card yet. cuBLASLt promises int8 for a right side that lies column by column alone.
    right = right.t().contiguous().t()
    tokens = len(left)
    if tokens < LEAST_ROWS:
        left = torch.nn.functional.pad(left, (0, 0, 0, LEAST_ROWS - tokens))
    return torch._int_mm(left, right)[:tokens]


def _quantise(x: torch.Tensor, by: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 q [rows, columns] and fp32 t [rows], such that q * t is about rotated(x) * by; by [columns], None: 1."""
    x = x.contiguous()
    native = _native() if x.dtype is torch.float32 and not x.is_cuda else None
    if native is None:
        return (_compiled(quantised_by_torch) if x.is_cuda else quantised_by_torch)(rotated(x), by)
    quantised, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x))
    native.quantise(_at(x), _at(by), _at(quantised), _at(scales), *_sizes(x))
    return quantised, scales


def _dequantise(
    sums: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """rotated(sums * rows * columns) + bias in a type: sums int32 [rows, columns], whose memory it takes; columns None: 1, bias None: 0."""
    native = _native() if dtype is torch.float32 and not sums.is_cuda else None
    if native is not None:
        out = sums.view(torch.float32)  # a number at a time, where it was
        native.dequantise(_at(sums), _at(rows), _at(columns), _at(bias), _at(out), *_sizes(sums))
        return out
    out = rotated((_compiled(scaled_by_torch) if sums.is_cuda else scaled_by_torch)(sums, rows, columns, dtype))
    return out if bias is None else out + bias


def rotated(x: torch.Tensor) -> torch.Tensor:
    """x [rows, columns] times blocks of a Hadamard matrix, which mix numbers columns / block apart. Twice, it is x again."""
    block = block_of(x.shape[1])
    matrix = _hadamard(block).to(x)
    return (matrix @ x.reshape(len(x), block, -1)).view(x.shape)


def block_of(columns: int) -> int:
    """Numbers that are mixed: the largest power of four up to BLOCK that divides columns, whose root is exact in any float."""
    return next(block for block in (BLOCK, 16, 4, 1) if columns % block == 0)


@cache
def _hadamard(block: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < block:  # Sylvester's construction
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(block)


def quantised_by_torch(x: torch.Tensor, by: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of x * by as int8 and a scale each, in PyTorch's own operators."""
    x = x.float() if by is None else x.float() * by
    largest = x.abs().amax(1)
    return (x * torch.where(largest > 0, LEVELS / largest, 0.0)[:, None]).round().to(torch.int8), largest / LEVELS


def scaled_by_torch(sums: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """sums * rows * columns in a type, in PyTorch's own operators."""
    return (sums * (rows[:, None] if columns is None else rows[:, None] * columns)).to(dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _sizes(matrix: torch.Tensor) -> tuple[Any, ...]:
    """Rows, columns, block and the norm of a rotation, as the library takes them."""
    rows, columns = matrix.shape
    block = block_of(columns)
    return ctypes.c_int64(rows), ctypes.c_int64(columns), ctypes.c_int64(block), ctypes.c_float(1 / math.sqrt(block))


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@cache
def _native() -> ctypes.CDLL | None:
    """int8.cpp as a library for this CPU, compiled once (a third of a second) into the cache; None, with a line, where that fails."""
    source = Path(__file__).with_suffix(".cpp")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        _warn("no C++ compiler here")
        return None
    command = [compiler, "-O3", "-march=native", "-fno-strict-aliasing", "-fopenmp", "-shared", "-fPIC", str(source)]
    # A cache may be shared by machines with other CPUs.
    made_from = "\n".join([source.read_text("utf-8"), *command[:-1], platform.platform(), _cpu()])
    library = cache_folder() / "native" / f"int8-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(library) + ".lock"):
            if not library.exists():
                with tempfile.TemporaryDirectory(dir=library.parent) as work:
                    made = Path(work) / library.name
                    subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=120)
                    os.replace(made, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        _warn(f"{compiler} makes no library of {source.name} ({said[0][:200] if said else 'no reason given'})")
        return None


def _warn(why: str) -> None:
    print(f"precision.int8=dynamic: {why}, so what surrounds the matmuls takes several passes and int8 saves little", file=sys.stderr)


def _cpu() -> str:
    """What this CPU can, in the kernel's words; its name where there are none."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
