"""Frozen linear layers in int8 that are multiplied in int8, forward and back (precision.int8=dynamic).

A matrix M is quantised row by row: M = diag(s) Q about, with s the largest magnitude of a row / 127. A few large numbers would leave the
others of their row few steps, so everything is rotated first, by Hadamard matrices H of 64 rows (orthogonal and symmetric) along the
diagonal, as QuaRot does (arXiv 2404.00456); each large number is then spread over 64, and both sides of a product are rotated alike, which
leaves it as it was. With the weight W [outputs, inputs] kept as H W H = diag(s) Q, an activation X and a gradient G [tokens, ...]:

    X W^T = (X H) (H W H)^T H  is about  (diag(t) (P Q^T) diag(s)) H,   where diag(t) P is X H, quantised
    G W   = (G H) (H W H) H    is about  (diag(u) (R Q)) H,             where diag(u) R is (G H) diag(s), quantised

The products in brackets are exact sums of integers. They take a ninth of the time of fp32 on a CPU with VNNI, so that what stands around
them decides: a pass that rotates and quantises, and one that scales and rotates back. Each is a loop of C++ on a CPU (native.cpp), a
matmul by H and a kernel of torch.compile on a card, and several passes of PyTorch where there is no compiler. With AMX the second is
part of the product (matmul.cpp), from weights that are kept in the order of its tiles.

Layers that read the same X are one product: their weights lie one after the other (`end_to_end`), each rotated for itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from tunesmith.config import Refusal
from tunesmith.matmul import Term, Tiles, by_int8
from tunesmith.model import native

LEVELS = 127
"""Quantised values go from -127 to 127: symmetric, so that 0 stays 0 and a sign costs nothing."""
BLOCK = 64
"""Numbers that are mixed with each other, at most."""
LEAST_ROWS, MULTIPLE = 32, 8
"""What cuBLASLt's int8 kernels want: more than 16 rows, and inputs and outputs in multiples of 8."""


class Int8Linear(nn.Linear):
    """A frozen linear layer: weight int8 [outputs, inputs], rotated; scales fp32 [outputs]; bias as it was."""

    scales: torch.Tensor
    """Neither parameter nor buffer: DeepSpeed turns all floating parameters into halves, and DDP sends buffers with each forward."""

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        """Of `layer`, which is emptied."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        whole = layer.weight.detach().to(device)
        layer.weight = nn.Parameter(whole.new_empty(0), requires_grad=False)
        quantised, scales = _quantise([rotated(whole.float().t()).t()], None)
        self.weight = nn.Parameter(quantised, requires_grad=False)
        self.scales = scales
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Linear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = self.scales.to(self.weight.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] in any floating type; under autocast in its type."""
        device = x.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            return cast(torch.Tensor, _Product.apply(x.to(compute), self.weight, self.scales, self.bias))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """A layer without an adapter, which keeps nothing for backward but itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight, scales)
        (y,) = multiply(x.flatten(0, -2), weight, scales, [bias], [len(weight)])
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        (of_y,) = of_outputs
        of_x = multiply_back([of_y.flatten(0, -2)], weight, scales)
        return of_x.view(*of_y.shape[:-1], -1), None, None, None


def multiply(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, biases: Sequence[torch.Tensor | None], outputs: Sequence[int],
    added: Sequence[Term] = (), tiles: Sequence[Tiles] = (),
) -> list[torch.Tensor]:  # fmt: skip
    """x W^T + bias + what is added to it, in x's type, for layers side by side: x [tokens, inputs] gives [tokens, outputs] of each.

    weight and scales are those of an Int8Linear, or of several end to end; tiles: the weights in tiles, where x is fp32.
    """
    quantised, rows = _quantise([x], None)
    theres = [one.there for one in tiles if one.there is not None]
    if theres and len(theres) == len(outputs):
        whole = zip(theres, torch.split(scales, list(outputs)), biases, added, outputs, strict=True)
        return [
            by_int8(quantised, rows, [(one, x.shape[1])], width, of_rows, bias, more._replace(right=more.right.contiguous()))
            for one, of_rows, bias, more, width in whole
        ]
    products = _dequantise(_matmul(quantised, weight.t()), rows, scales, biases, outputs, x.dtype)
    for product, more in zip(products, added, strict=False):
        torch.addmm(product, more.left, more.right, alpha=more.scale, out=product)
    return products


def multiply_back(
    of_y: Sequence[torch.Tensor], weight: torch.Tensor, scales: torch.Tensor, added: Term | None = None, tiles: Sequence[Tiles] = ()
) -> torch.Tensor:
    """The layers' of_y W, added up, and what is added to it, in of_y's type, [tokens, inputs].

    What a row of the weight is scaled by goes into a column of of_y, before it is quantised.
    """
    quantised, rows = _quantise(of_y, scales)
    backs = [one.back for one in tiles if one.back is not None]
    if backs and len(backs) == len(of_y):
        rights = [(one, of.shape[1]) for one, of in zip(backs, of_y, strict=True)]
        return by_int8(quantised, rows, rights, weight.shape[1], None, None, added)
    (of_x,) = _dequantise(_matmul(quantised, weight), rows, None, [None], [weight.shape[1]], of_y[0].dtype)
    if added is not None:
        torch.addmm(of_x, added.left, added.right, alpha=added.scale, out=of_x)
    return of_x


def fits_tiles(layer: Int8Linear) -> bool:
    """Whether native.cpp quantises what it multiplies, and numbers are mixed in whole blocks, as the product by tiles rotates them."""
    has_fitting_bias = layer.bias is None or layer.bias.dtype is torch.float32
    return native.library() is not None and has_fitting_bias and layer.in_features % BLOCK == layer.out_features % BLOCK == 0


def end_to_end(layers: Sequence[Int8Linear]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and scales of layers with the same inputs, [all outputs, inputs] and [all outputs], one layer after the other.

    They are moved there once, so that each layer's own are views of it. Whoever moves a layer elsewhere has them moved again.
    """
    if len(layers) > 1:
        for tensors in ([layer.weight for layer in layers], [layer.scales for layer in layers]):
            if not all(_adjoin(one, other) for one, other in pairwise(tensors)):
                whole = torch.cat([tensor.data for tensor in tensors])
                for tensor, part in zip(tensors, torch.split(whole, [len(tensor) for tensor in tensors]), strict=True):
                    tensor.data = part
    first, outputs, inputs = layers[0], sum(layer.out_features for layer in layers), layers[0].in_features
    return first.weight.data.as_strided((outputs, inputs), (inputs, 1)), first.scales.data.as_strided((outputs,), (1,))


def _adjoin(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one ends where the other begins, in the same piece of memory: a card's allocator puts strangers side by side too."""
    together = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return together and one.data_ptr() + one.nbytes == other.data_ptr()


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


def _quantise(parts: Sequence[torch.Tensor], by: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 q [rows, all columns] and fp32 t [rows]: q * t is about the parts, each rotated, side by side, times by [all columns]."""
    if native.is_here(parts[0].device):
        return native.quantised([x.float() for x in parts], [block_of(x.shape[1]) for x in parts], by)
    turned = [rotated(x) for x in parts]
    x = turned[0] if len(turned) == 1 else torch.cat(turned, 1)
    return (_compiled(quantised_by_torch) if x.is_cuda else quantised_by_torch)(x, by)


def _dequantise(
    sums: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None, biases: Sequence[torch.Tensor | None], outputs: Sequence[int],
    dtype: torch.dtype,
) -> list[torch.Tensor]:  # fmt: skip
    """rotated(sums * rows * columns) + bias in a type for each part of sums int32 [rows, all columns], whose memory may be taken.

    columns None: 1, a bias None: 0.
    """
    if native.is_here(sums.device):
        biases = [None if bias is None else bias.float() for bias in biases]
        made = native.dequantised(sums, rows, columns, biases, outputs, [block_of(width) for width in outputs])
        return [y.to(dtype) for y in made]
    scaled = (_compiled(scaled_by_torch) if sums.is_cuda else scaled_by_torch)(sums, rows, columns, dtype)
    made = [rotated(part) for part in scaled.split(list(outputs), 1)]
    return [y if bias is None else y + bias.to(dtype) for y, bias in zip(made, biases, strict=True)]


def rotated(x: torch.Tensor) -> torch.Tensor:
    """x [rows, columns] times blocks of a Hadamard matrix, which mix a block of neighbours. Twice, it is x again."""
    block = block_of(x.shape[1])
    return (x.reshape(-1, block) @ _hadamard(block).to(x)).view(x.shape)


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
    """As one kernel by torch.compile; where that cannot be made (no Triton, no C compiler), by PyTorch's operators, and a line says so."""
    from torch._dynamo.exc import TorchDynamoException

    chosen = torch.compile(function, dynamic=True)

    def call(*inputs: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*inputs)
        except TorchDynamoException as error:
            why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            logging.getLogger(__name__).warning(
                "precision.int8=dynamic: %s is not compiled here (%s); int8 may take longer than fp16 then", function.__name__, why
            )
            chosen = function
            return function(*inputs)

    return call
