"""Frozen linear layers and their LoRA adapters as one operator: y = x W^T + b + s (x A^T) B^T.

PEFT computes it as four (arXiv 2106.09685): base, A, B and scale, each of which writes a tensor as wide as the layer and reads it again.
Here the adapter is added by the matmul that makes it, forward and backward, and what is kept for backward are x A^T, of r numbers
a token, and x, unless that can be computed again from what is kept anyway (between.py). Where anything is not as in `can_be_joined`,
PEFT's own forward runs.

Layers that read the same x (queries, keys and values; an MLP's gate and up) are computed together: x A^T and the gradients of all A are
one matmul each, x is quantised or computed again once, and the gradients to x are added up by the matmuls that make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from tunesmith.matmul import NO_TILES, Term, Tiles, added_up, goes_by_halves, has_tiles, in_tiles
from tunesmith.model import int8
from tunesmith.model.adapters import inner_model
from tunesmith.model.between import Again, again, keep_inputs_alone

READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""transformers' names of layers that a module calls with the same input, one after the other."""


@dataclass(frozen=True)
class Adapted:
    """A frozen linear layer and its adapter."""

    base: Any
    """nn.Linear or Int8Linear: W [outputs, inputs] and perhaps a bias."""
    a: torch.Tensor
    """[r, inputs]."""
    b: torch.Tensor
    """[outputs, r]."""
    scale: float


class _Joined(torch.autograd.Function):
    """Keeps what backward needs, and gives each y still unwritten and x A^T of all adapters: see `joined`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, frozen: tuple[torch.Tensor, ...], tiles: Sequence[Tiles], scales: tuple[float, ...], made: Again,
        *pairs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        a, b = pairs[::2], pairs[1::2]
        inner = x.flatten(0, -2) @ _stacked(a, x.dtype).t()
        # One number long: the products take their place.
        shapes = [(*x.shape[:-1], len(each)) for each in b]
        ys = [torch.empty_strided(shape, (0,) * len(shape), dtype=x.dtype, device=x.device) for shape in shapes]
        ctx.save_for_backward(inner, *pairs, *frozen, *made.tensors)
        ctx.settings = scales, len(frozen), tiles, made.function, (x.shape, x.dtype, x.device.type)
        ctx.mark_non_differentiable(inner)
        return *ys, inner

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scales, of_frozen, tiles, remake, (shape, dtype, device) = ctx.settings
        inner, *kept = ctx.saved_tensors
        pairs, frozen, made_from = kept[: 2 * len(scales)], kept[2 * len(scales) :][:of_frozen], kept[2 * len(scales) + of_frozen :]
        wants_x, _, _, _, _, *wants = ctx.needs_input_grad
        all_a, ranks = pairs[::2], [len(a) for a in pairs[::2]]
        of_y = [of.flatten(0, -2) for of in of_outputs[: len(scales)]]
        of_pairs: list[torch.Tensor | None] = [None] * len(pairs)
        with torch.autocast(device, enabled=False):
            of_inner = torch.empty_like(inner)
            for place, of, scale, mine, of_mine in zip(
                range(1, len(pairs), 2), of_y, scales, _columns(inner, ranks), _columns(of_inner, ranks), strict=True
            ):
                _scaled(scale, of, pairs[place].to(dtype), of_mine)
                if wants[place]:
                    # As the transpose of a low matrix: half the time of a narrow one by MKL (docs/log.md).
                    of_pairs[place] = _scaled(scale, mine.t(), of, of.new_empty(mine.shape[1], of.shape[1])).t().to(pairs[place].dtype)
            if any(wants[::2]):
                of_a = torch.mm(of_inner.t(), remake(*made_from).flatten(0, -2)).to(all_a[0].dtype)
                of_pairs[::2] = [of if wanted else None for of, wanted in zip(torch.split(of_a, ranks), wants[::2], strict=True)]
            of_x: torch.Tensor | None = None
            if wants_x:
                by_adapters = Term(of_inner, _stacked(all_a, dtype))
                if frozen[0].dtype is torch.int8:
                    of_x = int8.multiply_back(of_y, frozen[0], frozen[1], by_adapters, tiles)
                else:
                    terms = [Term(of, weight, 1.0, packed.back) for of, weight, packed in zip(of_y, frozen, tiles, strict=True)]
                    of_x = added_up([*terms, by_adapters])
        return of_x if of_x is None else of_x.view(shape), None, None, None, None, *of_pairs


def _scaled(scale: float, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = scale * left @ right, whatever was in it."""
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def _stacked(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The rows of all parts, in a type."""
    return (parts[0] if len(parts) == 1 else torch.cat(tuple(parts))).to(dtype)


def _columns(x: torch.Tensor, widths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """x [rows, all columns] cut into parts of these widths."""
    return torch.split(x, list(widths), 1)


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def joined(x: torch.Tensor, layers: Sequence[Adapted]) -> list[torch.Tensor]:
    """x W^T + bias + scale (x A^T) B^T of each layer in x's type: x [..., inputs] gives [..., outputs].

    All bases are of one kind; W and bias of an nn.Linear have x's type, A and B any. The products are written after what backward needs has
    been kept: a checkpoint that computes a layer again ends as soon as it has all of that, and so leaves the layer's last matmul out.
    """
    is_int8 = isinstance(layers[0].base, int8.Int8Linear)
    with torch.autocast(x.device.type, enabled=False):
        made = again(x) or Again(_itself, (x,))
        frozen = int8.end_to_end([one.base for one in layers]) if is_int8 else tuple(one.base.weight for one in layers)
        pairs = [tensor for one in layers for tensor in (one.a, one.b)]
        tiles = [getattr(one.base, "tiles", NO_TILES) if x.dtype is torch.float32 else NO_TILES for one in layers]
        outputs = _Joined.apply(x, frozen, tiles, tuple(one.scale for one in layers), made, *pairs)  # type: ignore[no-untyped-call]
        *ys, inner = cast("tuple[torch.Tensor, ...]", outputs)
        with torch.no_grad():
            rows, biases = x.flatten(0, -2), [one.base.bias for one in layers]
            adapters = [
                Term(mine, one.b.to(x.dtype).t(), one.scale)
                for one, mine in zip(layers, _columns(inner, [len(one.a) for one in layers]), strict=True)
            ]
            if is_int8:
                products = int8.multiply(rows, frozen[0], frozen[1], biases, [len(one.b) for one in layers], adapters, tiles)
            else:
                products = [
                    added_up([Term(rows, weight.t(), 1.0, packed.there), adapter], bias)
                    for weight, packed, adapter, bias in zip(frozen, tiles, adapters, biases, strict=True)
                ]
            for y, product in zip(ys, products, strict=True):
                y.data = product.view(y.shape)
    return ys


def keep_tiles(model: Any) -> None:
    """Keep frozen weights that tiles multiply in the order of these too: of PEFT's LoRA layers that can be joined, and of the head."""
    if not has_tiles():
        return
    from peft.tuners.lora.layer import Linear

    layers = [layer.base_layer for layer in model.modules() if type(layer) is Linear and can_be_joined(layer)]
    in_int8 = [base for base in layers if isinstance(base, int8.Int8Linear) and int8.fits_tiles(base)]
    ends = [*layers, inner_model(model).get_output_embeddings()]
    in_fp32 = [base for base in ends if type(base) is nn.Linear and goes_by_halves(base.weight)]
    for bases in (in_int8, in_fp32):
        for base, tiles in zip(bases, in_tiles([base.weight.data for base in bases]), strict=True):
            setattr(base, "tiles", tiles)  # noqa: B010  # not of nn.Module


def join_adapters(model: nn.Module) -> None:
    """Let PEFT's LoRA layers compute as one operator wherever that is the same, and what is between them keep its inputs alone.

    Names, weights and what is saved stay PEFT's.
    """
    from peft.tuners.lora.layer import Linear

    keep_inputs_alone(model)
    for layer in model.modules():
        if type(layer) is Linear:
            layer.forward = MethodType(_forward, layer)
    for module in model.modules():
        for names in READ_TOGETHER:
            layers = [layer for name in names for layer in [getattr(module, name, None)] if type(layer) is Linear]
            if len(layers) > 1:
                Together(layers)


class Together:
    """Layers that are called one after the other with the same input: the first to be called computes all of them."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._x: torch.Tensor | None = None
        self._ready: dict[int, torch.Tensor] = {}
        """By place among the layers, what is computed of them for that input and was not asked for yet."""
        for place, layer in enumerate(layers):
            layer.forward = MethodType(self._of(place), layer)

    def _of(self, place: int) -> Any:
        def forward(layer: Any, x: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
            if self._x is x and place in self._ready and not args and not named:
                found = self._ready.pop(place)
                if not self._ready:
                    self._x = None  # nobody else shall keep it
                return found
            self._x, self._ready = None, {}
            if args or named or not all(map(can_be_joined, self.layers)):
                return _forward(layer, x, *args, **named)
            computed = as_joined(self.layers, x)
            if computed is None:
                return _forward(layer, x)
            self._x, self._ready = x, dict(enumerate(computed))
            return self._ready.pop(place)

        return forward


def _forward(layer: Any, x: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
    if not args and not named and can_be_joined(layer) and (found := as_joined([layer], x)):
        return found[0]
    return cast(torch.Tensor, type(layer).forward(layer, x, *args, **named))


def as_joined(layers: Sequence[Any], x: torch.Tensor) -> list[torch.Tensor] | None:
    """What layers that can be joined give for x; None where types differ in a way that autocast and PEFT have to settle."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    compute = torch.get_autocast_dtype(device) if autocast else x.dtype
    adapted = []
    for layer in layers:
        (name,), base = layer.active_adapters, layer.base_layer
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        is_int8 = isinstance(base, int8.Int8Linear)
        if not (is_int8 or base.weight.dtype is compute) or not (autocast or a.dtype is b.dtype is compute):
            return None
        adapted.append(Adapted(base, a, b, layer.scaling[name]))
    if len({type(one.base) for one in adapted}) > 1:
        return None
    return joined(x.to(compute), adapted)


def can_be_joined(layer: Any) -> bool:
    """Whether a PEFT LoRA layer is y = Wx + b + s B(A(x)) at this moment, and nothing else happens in it.

    One adapter, active and not merged; no variant of it (DoRA), no dropout, no bias of its own; plain weights or an Int8Linear's (not
    otherwise quantised, not in pieces), the base frozen; and nobody listens to, or has replaced, the layers inside: what ZeRO 3 gathers a
    weight by.
    """
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or layer.fan_in_fan_out:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant:
        return False
    base, a, b, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0):
        return False
    if a.bias is not None or b.bias is not None or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return False
    return all(_is_plain(part) for part in (base, a, b))


def _is_plain(part: nn.Module) -> bool:
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    is_known = type(part) in (nn.Linear, int8.Int8Linear) and type(part.weight) is nn.Parameter
    return is_known and "forward" not in vars(part) and not any(hooks)
