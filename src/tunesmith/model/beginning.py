"""What many conversations begin with, read once: keys and values that all of them go on from, neither copied nor computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.model import attention
from tunesmith.model.adapters import inner_model
from tunesmith.model.kernels import by_passes

OPEN = 0.75
"""Rows whose answer has ended are taken out as soon as fewer than this share is still open: to take them out copies the others' keys."""


@dataclass(frozen=True)
class Beginning:
    """Tokens, and what every layer's attention knows of them."""

    ids: tuple[int, ...]
    keys: list[torch.Tensor]
    """Keys and values of each layer, [2, tokens, kv heads, head_dim], without a gradient."""


@torch.no_grad()
def read_beginning(model: Any, ids: Sequence[int]) -> Beginning:
    """One forward over these tokens by a model that is ready to generate, as it computes now (with its adapters, or without)."""
    from transformers import DynamicCache

    base, cache = inner_model(model), DynamicCache()
    device = next(base.parameters()).device
    base(input_ids=torch.tensor([list(ids)], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    # In memory a head's tokens lie one after the other, as matmuls want them, or a token's heads, as C++ reads them.
    keys = [torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2) for layer in cache.layers]
    return Beginning(tuple(ids), [one.contiguous() if by_passes(one) else one for one in keys])


@torch.no_grad()
def continue_all(
    model: Any, beginning: Beginning, prompts: Sequence[Sequence[int]], stop: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers to prompts that go on from `beginning` (one token each at least): token ids up to a stop token, without it.

    The same as generate() gives for beginning and prompt together, padded on the left, but for the order in which sums are rounded.
    """
    from transformers import DynamicCache

    base = inner_model(model)
    device = next(base.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.tensor([[stop[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    seen = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts], device=device)
    positions = (seen.long().cumsum(dim=1) - 1).clamp(min=0) + len(beginning.ids)
    ends, cache = torch.tensor(list(stop), device=device), DynamicCache()
    answers: list[list[int]] = [[] for _ in prompts]
    rows, is_open = torch.arange(len(prompts), device=device), torch.ones(len(prompts), dtype=torch.bool, device=device)
    before = base.config._attn_implementation
    base.set_attn_implementation(attention.BEHIND)
    try:
        for _ in range(max_new_tokens):
            logits = base(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1,
                prefix=beginning.keys, seen=seen,
            ).logits  # fmt: skip
            said = logits[:, -1].argmax(dim=-1)
            is_open &= ~torch.isin(said, ends)
            for row, token in zip(rows[is_open].tolist(), said[is_open].tolist(), strict=True):
                answers[row].append(token)
            if not is_open.any():
                break
            ids, positions, seen = said[:, None], positions[:, -1:] + 1, torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
            if is_open.float().mean() < OPEN:
                left = is_open.nonzero()[:, 0]
                cache.batch_select_indices(left)
                ids, positions, seen, rows, is_open = ids[left], positions[left], seen[left], rows[left], is_open[left]
    finally:
        base.set_attn_implementation(before)
    return answers
