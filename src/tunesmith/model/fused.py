"""Norms, rotary embedding and SwiGLU as single kernels on cards: those of Liger (arXiv 2410.10989), where they are installed.

In eager PyTorch they are about thirty operators of a decoder layer, each of which reads and writes a tensor as wide as the layer. Liger's
loss is not taken: ours makes logits at targets only. Its kernels rotate queries and keys in place, and write the gradients of SwiGLU over
gate and up: nothing in a layer keeps a linear layer's output but they themselves, so nobody misses what was there. Beside a frozen base
only rotary embedding is Liger's.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from tunesmith.config import Config, Liger, MethodKind, Refusal
from tunesmith.plan.shapes import without_liger

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Of transformers' model_type: what `apply_liger_kernel_to_...` is called here, and the plan counts."""


def fuse(model: Any, config: Config, device: torch.device) -> bool:
    """Let a model just loaded compute with Liger's kernels, as engine.liger says; whether it does. Raises Refusal where `on` cannot be."""
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
