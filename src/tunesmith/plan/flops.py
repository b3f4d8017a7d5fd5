"""Matmul FLOPs of one optimizer step in closed form: what the mathematics needs, and what the kernels execute.

A matmul of n tokens with a weight of a x b is 2 n a b FLOPs. Everything else (norms, softmax, rotary embedding, the
embedding lookup, dequantisation, the optimizer) is limited by memory and counts nothing, as in PaLM's MFU (arXiv
2204.02311, appendix B). What autograd skips is not counted either: a frozen weight has no weight gradient, which makes
LoRA about 4N instead of 6N a token, and nothing flows below the first adapter, since the embedding is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.config import Method, MethodKind
from tunesmith.plan.shapes import Linear, ModelShape

Attention = Literal["flash", "dense"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one optimizer step, over all ranks."""

    useful: float
    """Needed for the update: MFU's numerator."""
    executed: float
    """Done by the kernels, padding and recomputation included: HFU's numerator (arXiv 2205.05198)."""


@dataclass(frozen=True)
class _Layer:
    """Matmul FLOPs of one decoder layer: a token's, and how many matmuls over the scores attention's backward needs."""

    forward: int
    backward: int
    score_matmuls: int
    """Of the four: dV, dP, dQ, dK."""


def step_flops(
    shape: ModelShape,
    method: Method,
    lengths: Sequence[int],
    targets: int,
    *,
    padded_to: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    checkpointing: bool = False,
    logits_positions: int | None = None,
    attention: Attention = "flash",
) -> Flops:
    """FLOPs of one step on conversations of these lengths (tokens) with this many target tokens.

    With contexts (tokens each), lengths are segments of conversations that begin alike: each also attends to the context
    that it continues, which is computed once, as a segment of its own.
    Conventions. Useful: each conversation attends causally to itself alone, exactly n(n+1)/2 scores for n tokens; a
    score costs 2 x head_dim FLOPs for QK^T and as much for AV (grouped keys save memory, not FLOPs), and twice that in
    backward; logits exist at target tokens only. nf4 and int8 bases need the same FLOPs as any frozen base.
    Executed: lengths become padded_to; logits_positions (default: targets) logits are made; "dense" attention computes
    all n^2 scores (eager), "flash" the causal ones, with a fifth backward matmul that recomputes the scores (arXiv
    2205.14135), all five whenever any gradient is wanted; checkpointing runs each layer's forward once more, up to the
    last tensor it has to save, i.e. without the layer's last matmul (torch's non-reentrant checkpoint stops early).
    Raises ValueError when padded_to does not fit lengths, or method.targets not the model.
    """
    padded = lengths if padded_to is None else padded_to
    if len(padded) != len(lengths) or any(long < short for short, long in zip(lengths, padded, strict=True)):
        raise ValueError(f"padded_to={list(padded)} does not cover lengths={list(lengths)}")
    full = method.kind is MethodKind.full
    # Full training wants gradients below layer 0, for the embedding; LoRA starts at layer 0's first adapter.
    layers = [_layer(shape, method, input_gradient=full)] + [_layer(shape, method, input_gradient=True)] * (
        shape.layers - 1
    )
    per_token = sum(layer.forward + layer.backward for layer in layers)
    per_score = 2 * shape.query_width  # one matmul over one score, all heads
    per_logit = (
        2 * shape.vocab * shape.hidden * (3 if full else 2)
    )  # forward, to the input, and to the weight if trained

    before = [0] * len(lengths) if contexts is None else contexts

    def causal(conversations: Sequence[int]) -> int:
        return sum(n * c + n * (n + 1) // 2 for n, c in zip(conversations, before, strict=True))

    score_matmuls = sum(2 + layer.score_matmuls for layer in layers)
    useful = per_token * sum(lengths) + per_score * score_matmuls * causal(lengths) + per_logit * targets

    if attention == "flash":
        scores = causal(padded)
        score_matmuls = sum(2 + (5 if layer.score_matmuls else 0) for layer in layers)
    else:
        scores = sum(n * (c + n) for n, c in zip(padded, before, strict=True))
    if checkpointing:
        per_token += shape.layers * (layers[0].forward - _last_matmul(shape, method))
        score_matmuls += 2 * shape.layers
    logits = targets if logits_positions is None else logits_positions
    return Flops(useful, per_token * sum(padded) + per_score * score_matmuls * scores + per_logit * logits)


def _layer(shape: ModelShape, method: Method, input_gradient: bool) -> _Layer:
    """Walk through a layer and follow where gradients flow; input_gradient: whether the layer's input wants one."""
    full = method.kind is MethodKind.full
    adapted = set() if full else set(shape.adapted(method.targets))
    forward = backward = 0

    def run(linear: Linear, wanted: bool) -> bool:
        """Count one linear layer; wanted: its input wants a gradient. Says whether its output has one to pass back."""
        nonlocal forward, backward
        _, inputs, outputs = linear
        forward += 2 * inputs * outputs
        backward += 2 * inputs * outputs * (wanted + full)
        if linear in adapted:  # y += B(Ax): B's and A's gradients, B^T g on the way to A, and A^T B^T g if wanted
            forward += 2 * method.r * (inputs + outputs)
            backward += 2 * method.r * (2 * outputs + (1 + wanted) * inputs)
        return wanted or full or linear in adapted

    reads, out, ups, down = shape.blocks
    flows = [run(linear, input_gradient) for linear in reads]
    query, key, value = flows if len(flows) == 3 else flows * 3
    score_matmuls = value + (query or key) + query + key  # dV; dP; dQ and dK from it
    residual = run(out[0], any(flows)) or input_gradient
    run(down[0], any([run(linear, residual) for linear in ups]))  # a list: every one is counted
    return _Layer(forward, backward, score_matmuls)


def _last_matmul(shape: ModelShape, method: Method) -> int:
    """FLOPs a token of a layer's last matmul: the down projection, or its adapter's B."""
    _, inputs, outputs = down = shape.linears[-1]
    if method.kind is MethodKind.lora and down in shape.adapted(method.targets):
        return 2 * method.r * outputs
    return 2 * inputs * outputs
