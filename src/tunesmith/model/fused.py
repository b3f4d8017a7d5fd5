"""Norms, rotary embedding and SwiGLU as single kernels: on cards those of Liger (arXiv 2410.10989), where they are installed.

In eager PyTorch they are about thirty operators of a decoder layer, each of which reads and writes a tensor as wide as the layer. Liger's
loss is not taken: ours makes logits at targets only. Its kernels rotate queries and keys in place, and write the gradients of SwiGLU over
gate and up: nothing in a layer keeps a linear layer's output but they themselves, so nobody misses what was there. Beside a frozen base
only rotary embedding is Liger's.

On a CPU in fp32 rotary embedding is one pass of C++ (native.py), with or without adapters.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from tunesmith.config import Config, Liger, MethodKind, Refusal
from tunesmith.model import native
from tunesmith.plan.shapes import without_liger

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Of transformers' model_type: what `apply_liger_kernel_to_...` is called here, and the plan counts."""


def fuse(model: Any, config: Config, device: torch.device) -> bool:
    """Let a model just loaded compute with Liger's kernels, as engine.liger says; whether it does. Raises Refusal where `on` cannot be.

    On a CPU its rotary embedding is native.py's where that takes it.
    """
    if native.is_here(device) and model.config.model_type in FAMILIES:
        turn_natively(model)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    known = model.config.model_type in FAMILIES and model.config.hidden_act in ("silu", "swish")
    if why := without_liger(config, capability, known):
        if config.engine.liger is Liger.on:
            raise Refusal(f"engine.liger=on: {why} — type engine.liger=auto")
        return False
    apply_kernels(model, config.method.kind is MethodKind.full)
    return True


def apply_kernels(model: Any, full: bool) -> None:
    """Liger's own way into a model that is there already; liger_kernel imports Triton, so it is not imported before.

    Where adapters are trained, norms and gates are those of between.py, which let the linear layers behind them keep no input.
    """
    from liger_kernel import transformers as liger

    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it reports each of its back ends that is not installed
    apply = getattr(liger, f"apply_liger_kernel_to_{model.config.model_type}")
    apply(rope=True, rms_norm=full, swiglu=full, cross_entropy=False, fused_linear_cross_entropy=False, model=model)


def turn_natively(model: Any) -> None:
    """Replace the function that a model's attention calls for rotary embedding, for all models of its family, as Liger does."""
    module: Any = sys.modules[type(model).__module__]
    plain = module.apply_rotary_pos_emb
    if not hasattr(plain, "plain"):
        module.apply_rotary_pos_emb = _turning(plain)


def _turning(plain: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
        takes = all(x.ndim == 4 and x.dtype is cos.dtype is sin.dtype and x.shape[-1] == cos.shape[-1] for x in (q, k))
        if not takes or unsqueeze_dim != 1 or not native.takes(cos) or len(cos) not in (1, len(q)):
            return plain(q, k, cos, sin, unsqueeze_dim)
        cos, sin = (x.expand(len(q), -1, -1).contiguous() for x in (cos, sin))
        return tuple(cast(torch.Tensor, _Turn.apply(x, cos, sin)) for x in (q, k))  # type: ignore[no-untyped-call]

    apply_rotary_pos_emb.plain = plain  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


class _Turn(torch.autograd.Function):
    """Rotary embedding of x [rows, heads, tokens, d] by cos and sin [rows, tokens, d]; a token's heads lie side by side, as before."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return native.turned(x.transpose(1, 2).contiguous(), cos, sin).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return native.turned(of_outputs[0].transpose(1, 2).contiguous(), cos, sin, back=True).transpose(1, 2), None, None
