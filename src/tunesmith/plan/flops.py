"""Matmul FLOPs of one optimizer step in closed form: what the mathematics needs, and what the kernels execute.

A matmul of n tokens with a weight of a x b is 2 n a b FLOPs. Everything else (norms, softmax, rotary embedding, the
embedding lookup, the optimizer) is limited by memory and counts nothing, as in PaLM's MFU (arXiv 2204.02311, appendix B);
but for dequantisation, which is executed only: a product with its scale for each weight and use. What
autograd skips is not counted either: a frozen weight has no weight gradient, which makes LoRA about 4N instead of 6N a
token, and nothing flows below the lowest trained layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from tunesmith.config import Base, Method, MethodKind
from tunesmith.plan.shapes import Linear, ModelShape, joins_adapters

Attention = Literal["flash", "dense"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one optimizer step, over all ranks."""

    useful: float
    """Needed for the update: MFU's numerator."""
    executed: float
    """Done by the kernels, padding and recomputation included: HFU's numerator (arXiv 2205.05198)."""
    attention: float = 0.0
    """Of those executed, the ones over attention's scores, which kernels do at another rate."""
    over_context: float = 0.0
    """Of those executed, the ones over scores of keys that conversations share, which may be plain matmuls (model/kernels.py)."""

    def of_a_rank(self, ranks: int) -> Flops:
        """What each of so many ranks does."""
        return Flops(self.useful / ranks, self.executed / ranks, self.attention / ranks, self.over_context / ranks)


@dataclass(frozen=True)
class _Layer:
    """Matmul FLOPs of one decoder layer: a token's, and how many matmuls over the scores attention's backward needs."""

    forward: int
    backward: int
    score_matmuls: int
    """Of the four: dV, dP, dQ, dK."""
    keys_wanted: bool
    """Whether keys or values want a gradient, those of a context too."""
    prefix_matmuls: int
    """The same over the scores of learned keys."""
    saved_last: int
    """A token's in the layer's last matmul, behind which autograd saves nothing: a recomputation stops before it."""
    dora_forward: int = 0
    dora_backward: int = 0
    """A token's that DoRA does besides (executed only): with dropout on x, W x once more on the dropped one."""
    dora_norms: int = 0
    """Once a forward, whatever its tokens: DoRA multiplies B A out, to measure the rows of W + scale B A (executed only)."""
    scaled_forward: int = 0
    scaled_backward: int = 0
    """Once a micro-batch: weights that are dequantised (executed only). LLM.int8's forward multiplies integers."""


def step_flops(
    shape: ModelShape,
    method: Method,
    lengths: Sequence[int],
    targets: int,
    *,
    padded_to: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    checkpointing: bool = False,
    checkpoint_every: int = 1,
    micro_batches: int = 1,
    logits_positions: int | None = None,
    attention: Attention = "flash",
    gathered: bool = False,
    in_int8: bool = False,
    beginning: int = 0,
) -> Flops:
    """FLOPs of one step on conversations of these lengths (tokens) with this many target tokens.

    With contexts (tokens each), lengths are segments of conversations that begin alike: each also attends to the context
    that it continues, which is computed once, as a segment of its own. micro_batches: forwards over all ranks; each has a
    prompt's virtual tokens once, as the beginning of all its conversations. beginning: tokens that the frozen model has read before
    (method.alora): each token attends to them, and no gradient goes to them.
    Conventions. Useful: each conversation attends causally to itself alone, exactly n(n+1)/2 scores for n tokens; a
    score costs 2 x head_dim FLOPs for QK^T and as much for AV (grouped keys save memory, not FLOPs), and twice that in
    backward; logits exist at target tokens only. nf4 and int8 bases need the same FLOPs as any frozen base; in_int8
    (precision.int8=dynamic), a product of integers counts as one of floats would.
    Executed: lengths become padded_to; logits_positions (default: targets) logits are made; "dense" attention computes
    all n^2 scores (eager), "flash" the causal ones, with a fifth backward matmul that recomputes the scores (arXiv
    2205.14135), all five whenever any gradient is wanted; checkpointing runs the forward of every checkpoint_every-th layer
    from the lowest trained one on once more, up to the last tensor it has to save, i.e. without the layer's last matmul
    (torch's non-reentrant checkpoint stops early; where PEFT computes an adapter, as it does when gathered, only its B is
    left out); DoRA's norms.
    Raises ValueError when padded_to does not fit lengths, or method.targets not the model.
    """
    padded = lengths if padded_to is None else padded_to
    if len(padded) != len(lengths) or any(long < short for short, long in zip(lengths, padded, strict=True)):
        raise ValueError(f"padded_to={list(padded)} does not cover lengths={list(lengths)}")
    before = [0] * len(lengths) if contexts is None else list(contexts)
    prompt = method.virtual_tokens if method.kind is MethodKind.prompt else 0
    if prompt:
        lengths, padded = ([prompt] * micro_batches + list(some) for some in (lengths, padded))
        before = [0] * micro_batches + [context + prompt for context in before]
    prefix = method.virtual_tokens if method.kind is MethodKind.prefix else 0

    trained_ends = shape.trained_ends(method)
    embedding = "embed_tokens" in trained_ends or prompt > 0
    first = method.first_layer if method.kind is MethodKind.lora else 0
    lowest = 0 if embedding else first
    adapted = shape.adapted_layers(method)
    kinds = {
        kind: _layer(shape, method, adapted=kind[0], input_gradient=kind[1], gathered=gathered, in_int8=in_int8)
        for kind in product((False, True), repeat=2)
    }
    layers = [kinds[number in adapted, embedding or number > lowest] for number in range(shape.layers)]
    again = layers[lowest::checkpoint_every] if checkpointing else []
    per_score = 2 * shape.query_width  # one matmul over one score, all heads
    per_logit = 2 * shape.vocab * shape.hidden * (3 if "lm_head" in trained_ends else 2)  # the third: the head's own gradient

    def scores(conversations: Sequence[int]) -> tuple[int, int, int]:
        """Over learned keys, over contexts, and over what a segment has itself."""
        own = sum(n * (n + 1) // 2 if attention == "flash" else n * n for n in conversations)
        return prefix * sum(conversations), sum(n * c for n, c in zip(conversations, before, strict=True)), own

    causal = sum(n * c + n * (n + 1) // 2 for n, c in zip(lengths, before, strict=True))
    useful: float = per_logit * targets
    for layer in layers:
        useful += (layer.forward + layer.backward) * sum(lengths)
        useful += per_score * ((2 + layer.score_matmuls) * causal + (2 + layer.prefix_matmuls) * prefix * sum(lengths))
        useful += per_score * (2 + 2 * bool(layer.score_matmuls)) * beginning * sum(lengths)  # backward: dP, and dQ from it

    learned, outer, own = scores(padded)
    executed: float = per_logit * (targets if logits_positions is None else logits_positions)
    over_own = over_context = 0.0
    for layer in layers:
        executed += (layer.forward + layer.backward + layer.dora_forward + layer.dora_backward) * sum(padded)
        executed += (layer.dora_norms + layer.scaled_forward + layer.scaled_backward) * micro_batches
        # Apart from all else, and backward makes the scores again (model/attention.py). Where a segment's context is in one tensor with it,
        # that wants its gradients.
        continued = sum(n for n, context in zip(padded, before, strict=True) if context)
        kernels = 5 * sum(padded) + 2 * continued * layer.keys_wanted if layer.score_matmuls else 2 * sum(padded)
        over_context += per_score * beginning * kernels
        # Learned keys and contexts go into one kernel call, a segment's own keys into another.
        outside, inside = (layer.prefix_matmuls or layer.score_matmuls), layer.score_matmuls
        if attention == "flash":
            # A kernel makes all five; over a context without the gradients of keys and values that want none.
            learns = layer.keys_wanted or layer.prefix_matmuls > 0
            outside, inside = (5 if learns else 3) * bool(outside), 5 * bool(inside)
        else:
            inside = outside
        over_context += per_score * (2 + outside) * (learned + outer)
        over_own += per_score * (2 + inside) * own
    for layer in again:
        executed += (layer.forward + layer.dora_forward - layer.saved_last) * sum(padded)
        executed += (layer.dora_norms + layer.scaled_forward) * micro_batches
        over_context += per_score * 2 * (beginning * sum(padded) + learned + outer)
        over_own += per_score * 2 * own
    return Flops(useful, executed + over_own + over_context, over_own, over_context)


def _layer(shape: ModelShape, method: Method, *, adapted: bool, input_gradient: bool, gathered: bool, in_int8: bool) -> _Layer:
    """Walk through a layer and follow where gradients flow.

    adapted: whether it has adapters, where the method has any; input_gradient: whether its input wants a gradient.
    """
    full, dora = method.kind is MethodKind.full, method.dora
    with_adapter = set(shape.adapted(method.targets)) if adapted and method.kind is MethodKind.lora else set()
    forward = backward = dora_forward = dora_backward = dora_norms = scaled_forward = scaled_backward = 0

    def run(linear: Linear, wanted: bool) -> bool:
        """Count one linear layer; wanted: its input wants a gradient. Says whether its output has one to pass back."""
        nonlocal forward, backward, dora_forward, dora_backward, dora_norms, scaled_forward, scaled_backward
        _, inputs, outputs = linear
        forward += 2 * inputs * outputs
        backward += 2 * inputs * outputs * (wanted + full)
        scaled_forward += inputs * outputs * (method.base is Base.nf4)
        scaled_backward += inputs * outputs * (method.base is not Base.as_is and not in_int8) * wanted
        if linear in with_adapter:  # y += B(Ax): B's and A's gradients, B^T g on the way to A, and A^T B^T g if wanted
            forward += 2 * method.r * (inputs + outputs)
            backward += 2 * method.r * (2 * outputs + (1 + wanted) * inputs)
            if dora:  # B(A I), I the identity of `inputs` rows
                dora_norms += 2 * method.r * inputs * (inputs + outputs)
                dora_forward += 2 * inputs * outputs * (method.dropout > 0)
                dora_backward += 2 * inputs * outputs * (method.dropout > 0) * wanted
        return wanted or full or linear in with_adapter

    reads, out, ups, down = shape.blocks
    flows = [run(linear, input_gradient) for linear in reads]
    query, key, value = flows if len(flows) == 3 else flows * 3
    score_matmuls = value + (query or key) + query + key  # dV; dP; dQ and dK from it
    prefix_matmuls = 3 + query if method.kind is MethodKind.prefix else 0  # learned keys and values always want dV, dP and dK
    residual = run(out[0], any(flows) or prefix_matmuls > 0) or input_gradient
    run(down[0], any([run(linear, residual) for linear in ups]))  # a list: every one is counted

    _, inputs, outputs = last = down[0]
    saved_last = 2 * inputs * outputs
    if last in with_adapter:  # the adapter's B; DoRA saves what comes out of it
        saved_last = 0 if dora else 2 * method.r * outputs + (saved_last if joins_adapters(method, gathered, in_int8) else 0)
    return _Layer(
        forward, backward, score_matmuls, key or value, prefix_matmuls, saved_last, dora_forward, dora_backward, dora_norms,
        scaled_forward, scaled_backward,
    )  # fmt: skip
