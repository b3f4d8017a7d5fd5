"""A frozen linear layer and its LoRA adapter as one operator: y = x W^T + b + s (x A^T) B^T.

PEFT computes it as four (arXiv 2106.09685): base, A, B and scale, each of which writes a tensor as wide as the layer and reads it again.
Here the adapter is added by the matmul that makes it, forward and backward, and what is kept for backward are x A^T, of r numbers
a token, and x, unless that can be computed again from what is kept anyway (between.py). Where anything is not as in `can_be_joined`,
PEFT's own forward runs.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from tunesmith.model import int8
from tunesmith.model.between import Again, again, keep_inputs_alone


class _Joined(torch.autograd.Function):
    """Keeps what backward needs, and gives y still unwritten and x A^T: see `joined`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        made: Again,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inner = x.flatten(0, -2) @ a.to(x.dtype).t()
        shape = (*x.shape[:-1], len(weight))
        y = torch.empty_strided(shape, (0,) * len(shape), dtype=x.dtype, device=x.device)  # one number long: the product takes its place
        ctx.save_for_backward(inner, weight, scales, a, b, *made.tensors)
        ctx.scale, ctx.remake, ctx.like_x = scale, made.function, (x.shape, x.dtype, x.device.type)
        ctx.mark_non_differentiable(inner)
        return y, inner

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inner, weight, scales, a, b, *made_from = ctx.saved_tensors
        shape, dtype, device = ctx.like_x
        wants_x, _, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        of_y = of_outputs[0].flatten(0, -2)
        with torch.autocast(device, enabled=False):
            of_inner = (of_y @ b.to(dtype)).mul_(ctx.scale)
            of_b = torch.mm(of_y.t(), inner).mul_(ctx.scale).to(b.dtype) if wants_b else None
            of_a = torch.mm(of_inner.t(), ctx.remake(*made_from).flatten(0, -2)).to(a.dtype) if wants_a else None
            of_x: torch.Tensor | None = None
            if wants_x:
                of_x = torch.mm(of_y, weight) if scales is None else int8.multiply_back(of_y, weight, scales)
                torch.addmm(of_x, of_inner, a.to(dtype), out=of_x)
        return of_x if of_x is None else of_x.view(shape), None, None, of_a, of_b, None, None


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def joined(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias + scale (x A^T) B^T in x's type: x [..., inputs], W [outputs, inputs] frozen, A [r, inputs], B [outputs, r].

    W and bias have x's type, A and B any; with scales, W is that of an Int8Linear. The product is written after what backward needs has
    been kept: a checkpoint that computes a layer again ends as soon as it has all of that, and so leaves the layer's last matmul out.
    """
    with torch.autocast(x.device.type, enabled=False):
        made = again(x) or Again(_itself, (x,))
        outputs = _Joined.apply(x, weight, scales, a, b, scale, made)  # type: ignore[no-untyped-call]
        y, inner = cast("tuple[torch.Tensor, torch.Tensor]", outputs)
        with torch.no_grad():
            rows = x.flatten(0, -2)
            if scales is not None:
                product = int8.multiply(rows, weight, scales, bias)
            else:
                product = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
            y.data = torch.addmm(product, inner, b.to(x.dtype).t(), alpha=scale, out=product).view(y.shape)
    return y


def join_adapters(model: nn.Module) -> None:
    """Let PEFT's LoRA layers compute as one operator wherever that is the same, and what is between them keep its inputs alone.

    Names, weights and what is saved stay PEFT's.
    """
    from peft.tuners.lora.layer import Linear

    keep_inputs_alone(model)
    for layer in model.modules():
        if type(layer) is Linear:
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
    if args or named or not can_be_joined(layer):
        return cast(torch.Tensor, type(layer).forward(layer, x, *args, **named))
    (name,), base = layer.active_adapters, layer.base_layer
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # What autocast or PEFT would cast, and to which type the result belongs, is theirs to say where types differ without autocast.
    scales = base.scales if isinstance(base, int8.Int8Linear) else None
    is_other = scales is None and base.weight.dtype is not compute
    if is_other or (not torch.is_autocast_enabled(device) and not a.dtype is b.dtype is compute):
        return cast(torch.Tensor, type(layer).forward(layer, x))
    bias = base.bias if scales is None or base.bias is None else base.bias.to(compute)
    return joined(x.to(compute), base.weight, bias, a, b, layer.scaling[name], scales)


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
