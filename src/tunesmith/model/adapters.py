"""What is trained beside a frozen base, and at which rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from tunesmith.config import Config


def parameter_groups(module: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The trainable weights for an optimizer, each group with `params`, `weight_decay` and `lr_factor`, which the schedule's rate
    is multiplied by: method.b_lr_ratio for LoRA's B (LoRA+, arXiv 2402.12354), else 1. Vectors get no weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            decay = config.optim.weight_decay if weight.ndim >= 2 else 0.0
            factor = config.method.b_lr_ratio if ".lora_B." in name else 1.0
            groups.setdefault((factor, decay), []).append(weight)
    return [{"params": weights, "weight_decay": decay, "lr_factor": factor} for (factor, decay), weights in groups.items()]
