"""What stands between the frozen linear layers, keeping its inputs alone: RMSNorm, and the gate of an MLP.

transformers' own norm and gate are four operators and two, each of which keeps what the next one reads; and the linear layer behind them
keeps their result once more, as its adapter's gradient needs it. All of it can be had again from the input by a few passes that multiply
no matrix. So here backward computes it again, and a linear layer that is told how (`again`) keeps no input of its own. In numbers a token
and layer of a llama, h wide with an MLP of f: the norms' results (2h), silu(gate) and the product (2f) are not kept; 2h + 2f and
attention's own are. On a CPU in fp32 each of these is one pass of C++ (native.py), whose results may differ from transformers' in the last
bits; elsewhere PyTorch's operators give the same bits as transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from tunesmith.model import native

NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "GlmRMSNorm"}
GATES = {"LlamaMLP": "act_fn", "MistralMLP": "act_fn", "Qwen2MLP": "act_fn", "Qwen3MLP": "act_fn", "GlmMLP": "activation_fn"}
"""transformers' classes with the forward that is replaced; one of another name keeps its own. Of a gate, the name of its activation."""


@dataclass(frozen=True)
class Again:
    """How a tensor is computed again, and from what."""

    function: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor, ...]


def again(x: torch.Tensor) -> Again | None:
    """How x can be computed again; None: it has to be kept."""
    return getattr(x, "_again", None)


def keep_inputs_alone(model: nn.Module) -> None:
    """Replace the forward of a model's norms and gated MLPs where it is known; weights and names stay."""
    for module in model.modules():
        kind = type(module).__name__
        if kind in NORMS:
            module.forward = MethodType(_norm, module)
        elif kind in GATES and type(getattr(module, GATES[kind])).__name__ in ("SiLU", "SiLUActivation"):
            module.forward = MethodType(_mlp, module)


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    if weight.requires_grad or weight.dtype is not x.dtype:
        return cast(torch.Tensor, type(module).forward(module, x))
    y, root = cast("tuple[torch.Tensor, torch.Tensor]", _Norm.apply(x, weight, module.variance_epsilon))  # type: ignore[no-untyped-call]
    y._again = Again(_normed, (x.detach(), root, weight))  # type: ignore[attr-defined]
    return y


def _normed(x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return native.normed_again(x, root, weight) if native.takes(x) else (x * root).to(x.dtype).mul_(weight)


class _Norm(torch.autograd.Function):
    """w x / rms(x) with frozen w, and 1 / rms: x [..., width] gives [..., width] and fp32 [..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        if native.takes(x):
            x = x.contiguous()
            y, root = native.normed(x, weight, eps)
        else:
            root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
            y = _normed(x, root, weight)
        ctx.save_for_backward(x, root, weight)
        ctx.mark_non_differentiable(root)
        return y, root

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # With n = x / rms(x) and g the gradient to n: (g - n mean(g n)) / rms(x).
        x, root, weight = ctx.saved_tensors
        if native.takes(x):
            return native.normed_back(of_outputs[0], x, root, weight), None, None
        of_n = of_outputs[0] * weight
        of_n = of_n if of_n.dtype is torch.float32 else of_n.float()
        n = x * root
        along = (of_n * n).mean(-1, keepdim=True)
        return of_n.sub_(n.mul_(along)).mul_(root).to(x.dtype), None, None


def _mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    if hasattr(module, "gate_up_proj"):
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    if gate.dtype is not up.dtype:
        return cast(torch.Tensor, module.down_proj(F.silu(gate) * up))
    y = cast(torch.Tensor, _Gate.apply(gate, up))  # type: ignore[no-untyped-call]
    y._again = Again(_gated, (gate.detach(), up.detach()))  # type: ignore[attr-defined]
    return cast(torch.Tensor, module.down_proj(y))


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return native.gated(gate, up) if native.takes(gate) else F.silu(gate).mul_(up)


class _Gate(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        (of_y,) = of_outputs
        if native.takes(gate):
            return native.gated_back(of_y, gate, up)
        of_up = F.silu(gate).mul_(of_y)
        return torch.ops.aten.silu_backward(of_y * up, gate), of_up
