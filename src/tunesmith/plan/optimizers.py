"""What each optimizer keeps beside the trained weights, and which of its settings mean something to it."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.config import Config, Method, MethodKind, OptimizerKind
from tunesmith.plan.shapes import ModelShape

EIGHT_BIT = (OptimizerKind.adamw_8bit, OptimizerKind.paged_adamw_8bit)
SETTINGS = {
    "beta1": (OptimizerKind.adamw, *EIGHT_BIT),
    "beta2": (OptimizerKind.adamw, *EIGHT_BIT),
    "eps": (OptimizerKind.adamw, *EIGHT_BIT),
    "momentum": (OptimizerKind.sgd,),
}
"""Settings of optim that not every optimizer reads, and those that do."""
FEWEST_IN_8_BIT = 4096
"""bitsandbytes keeps the moments of a tensor with fewer weights in 32 bits."""


def state_bytes(shape: ModelShape, config: Config) -> float:
    """Bytes of the optimizer's own numbers for all trained weights, those of gradients and masters not among them."""
    name, trained = config.optim.name, shape.trained_weights(config.method)
    if name is OptimizerKind.adamw:
        return trained * 8  # two moments
    if name is OptimizerKind.sgd:
        return trained * 4 if config.optim.momentum else 0
    if name is OptimizerKind.adafactor:
        return 4 * sum(count * (rows + columns) for count, rows, columns in trained_tensors(shape, config.method))
    total = 0.0
    for count, rows, columns in trained_tensors(shape, config.method):
        weights = max(1, rows) * columns
        # Two moments of a byte, and for each 256 of them their largest as fp32: 2 x (1 + 4 / 256).
        total += count * (8 * weights if weights < FEWEST_IN_8_BIT else 2 * weights + 8 * -(-weights // 256))
    return total


def trained_tensors(shape: ModelShape, method: Method) -> Iterator[tuple[int, int, int]]:
    """(how many, rows, columns) of the trained tensors that are alike; a vector has 0 rows."""
    if method.kind is MethodKind.prompt:
        yield 1, method.virtual_tokens, shape.hidden
    elif method.kind is MethodKind.prefix:
        yield 1, method.virtual_tokens, shape.layers * 2 * shape.kv_width
    elif method.kind is MethodKind.lora:
        layers = len(shape.adapted_layers(method))
        for _, inputs, outputs in shape.adapted(method.targets):
            yield layers, method.r, inputs
            yield layers, outputs, method.r
            if method.dora:
                yield layers, 0, outputs
    else:
        for _, inputs, outputs in shape.linears:
            yield shape.layers, outputs, inputs
        if shape.qkv_bias:
            yield from ((shape.layers, 0, width) for width in (shape.query_width, shape.kv_width, shape.kv_width))
        if shape.out_bias:
            yield shape.layers, 0, shape.hidden
        if shape.qk_norm:
            yield 2 * shape.layers, 0, shape.head_dim
        yield 2 * shape.layers + 1, 0, shape.hidden  # norms
    if ends := shape.trained_ends(method):
        yield 1 if shape.tied else len(ends), shape.vocab, shape.hidden
