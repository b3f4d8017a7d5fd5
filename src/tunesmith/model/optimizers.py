"""What moves the trained weights: AdamW, also with a state of 8 bits, Adafactor, or SGD."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from tunesmith.config import Config, OptimizerKind
from tunesmith.model.adapters import parameter_groups


def make_optimizer(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer that optim.name says, over the trainable weights, with weight decay on matrices only."""
    optim, groups = config.optim, parameter_groups(module, config)
    if optim.name is OptimizerKind.sgd:
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    if optim.name is OptimizerKind.adafactor:
        # torch multiplies the rate by max(eps[1], RMS of the weight), and a LoRA's B begins at 0: with its eps[1] of 1e-3 the
        # adapter would hardly move. With 1 the rate is the rate, as AdamW's, for all but weights whose RMS is above 1. Its eps[0]
        # is held against mean squares too: 1.2e-7, the default, would take gradients below 3e-4 for noise; these are above 3e-8.
        return torch.optim.Adafactor(groups, lr=optim.lr, eps=(1e-15, 1.0))
    betas = (optim.beta1, optim.beta2)
    if optim.name is OptimizerKind.adamw:
        return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    import bitsandbytes.optim

    kind = bitsandbytes.optim.AdamW8bit if optim.name is OptimizerKind.adamw_8bit else bitsandbytes.optim.PagedAdamW8bit
    return cast(torch.optim.Optimizer, kind(groups, lr=optim.lr, betas=betas, eps=optim.eps))


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """Put a paged optimizer's state back into pages: bitsandbytes loads a saved one onto the card."""
    buffer_for = getattr(optimizer, "get_state_buffer", None)
    if buffer_for is None or not getattr(optimizer, "is_paged", False):
        return
    for weight, state in optimizer.state.items():
        for name in ("state1", "state2"):
            state[name] = buffer_for(weight, dtype=state[name].dtype).copy_(state[name])
