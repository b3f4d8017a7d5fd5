"""fp16 ends at 65,504 and has 11 bits: which layers go beyond it, or far from fp32, and layers that are kept in fp32 for that reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunesmith.config import Base, Config, EngineKind, Int8, Refusal
from tunesmith.model.adapters import inner_model

if TYPE_CHECKING:
    from tunesmith.data.batches import MicroBatch
    from tunesmith.model import TargetLoss

LARGEST = 65504.0
"""Largest number of fp16: (2 - 2^-10) x 2^15."""
WIDENED = 2**27
"""Numbers of a weight that are copied to fp32, half a GB: a card that a model fills has no room for its head once more."""
ROWS = 256
"""Positions for which a layer is computed in fp32 too: a T4 takes eight times as long for it."""
SCALE = 2.0**12
"""Inputs are divided by it to see how large an output would be where there is no fp32: up to 2.7e8 can be told."""


@dataclass(frozen=True)
class Range:
    """What one layer came to in fp16."""

    name: str
    largest: float
    """Its largest absolute value; infinite where that cannot be told."""
    is_input: bool = False
    """Whether it was its input that was too large: a product or a sum before it."""
    error: float = 0.0
    """How far it is from what the same layer gives for the same input in fp32, as a share of that one's norm."""

    @property
    def overflows(self) -> bool:
        return self.largest > LARGEST


@dataclass(frozen=True)
class Probe:
    """What a forward in fp16 came to."""

    widest: Range
    """The first layer that left fp16's range; where none did, the one that came nearest."""
    roughest: Range
    """The layer that is furthest from fp32."""


@torch.no_grad()
def probe(module: TargetLoss, batch: MicroBatch) -> Probe:
    """Run a micro-batch forward in fp16, and each linear layer and each norm once more in fp32, its weights copied for that moment."""
    seen: list[Range] = []
    watched = [(name, part) for name, part in module.named_modules() if _is_watched(part)]

    def looked_at(name: str, part: nn.Module) -> Iterator[Any]:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if _largest(inputs[0]) > LARGEST and not (seen and seen[-1].overflows):
                seen.append(Range(name, math.inf, is_input=True))
            return (_clamped(inputs[0]), *inputs[1:])

        def after(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            seen.append(_range_of(name, part, inputs, output))
            return _clamped(output)

        yield part.register_forward_pre_hook(before)
        yield part.register_forward_hook(after, prepend=True)  # while the weight is here: ZeRO 3 lets go of it in a hook of its own

    handles = [handle for name, part in watched for handle in looked_at(name, part)]
    was_training = module.training
    try:
        module.eval()
        module.whole_logits = True  # the head is one of those that are looked at
        module(_with_few_logits(batch))
    finally:
        module.whole_logits = False
        for handle in handles:
            handle.remove()
        module.train(was_training)
    widest = next((one for one in seen if one.overflows), max(seen, key=lambda one: one.largest))
    return Probe(widest, max(seen, key=lambda one: one.error))


def _with_few_logits(batch: MicroBatch) -> MicroBatch:
    """With ROWS predictions at most: their logits are made all at once here, and in training so many at a time (loss.py)."""
    of = torch.arange(len(batch.labels)) if batch.rows is None else batch.rows
    chosen = of < ROWS
    rows = None if batch.rows is None else of[chosen]
    return replace(batch, predicting=batch.predicting[:ROWS], rows=rows, labels=batch.labels[chosen], counts=batch.counts[chosen])


def _range_of(name: str, part: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> Range:
    if not output.numel() or not _is_in_halves(part, output):
        return Range(name, _largest(output))
    rows, given = inputs[0].flatten(0, -2), output.flatten(0, -2)
    beyond = (~(given.abs().amax(1) <= LARGEST)).nonzero().flatten()[:ROWS]  # what is no number too
    rows = rows[beyond] if len(beyond) else rows[:ROWS]
    exact = _exactly(part, rows) if len(inputs) == 1 and _has_exact(part) else None
    if len(beyond):
        size = exact if exact is not None else SCALE * type(part).forward(part, rows / SCALE).float()
        largest = float(size.abs().max())
        return Range(name, largest if LARGEST < largest < math.inf else math.inf)  # what has no size, or only its sums are too large
    error = 0.0 if exact is None else float((exact - given[:ROWS]).norm() / exact.norm().clamp_min(1e-30))
    return Range(name, float(given.abs().max()), error=error)


def _is_in_halves(part: nn.Module, output: torch.Tensor) -> bool:
    """Whether a layer multiplies in halves: bitsandbytes' do, whatever type they are called with and answer in."""
    by_bitsandbytes = getattr(part, "compute_dtype", None) is torch.float16 or type(part).__name__ == "Linear8bitLt"
    return output.dtype is not torch.float32 or by_bitsandbytes


def _has_exact(part: nn.Module) -> bool:
    """Whether a layer is computed in fp32 too: bitsandbytes multiplies int8 in halves alone."""
    numbers = getattr(part, "in_features", 0) * getattr(part, "out_features", 0)
    return type(part).__name__ != "Linear8bitLt" and numbers <= WIDENED


def _exactly(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer gives in fp32."""
    weights = [(weight, weight.data) for weight in part.parameters(recurse=False) if weight.is_floating_point()]
    compute = getattr(part, "compute_dtype", None)  # of bitsandbytes' 4-bit layers
    try:
        for weight, data in weights:
            weight.data = data.float()
        if compute is not None:
            setattr(part, "compute_dtype", torch.float32)  # noqa: B010  # not of nn.Module
        with torch.autocast(x.device.type, enabled=False):
            exact: torch.Tensor = type(part).forward(part, x.float())
    finally:
        for weight, data in weights:
            weight.data = data
        if compute is not None:
            setattr(part, "compute_dtype", compute)  # noqa: B010  # not of nn.Module
    return exact


def _is_watched(part: nn.Module) -> bool:
    return (hasattr(part, "in_features") and not any(part.children())) or "norm" in type(part).__name__.lower()


def _largest(value: torch.Tensor) -> float:
    """Largest absolute value, of what is not in fp32 itself; infinite if any is not a number, in fp32 too."""
    if not value.numel():
        return 0.0
    largest = float(value.abs().max())
    if not math.isfinite(largest):
        return math.inf
    return 0.0 if value.dtype is torch.float32 else largest


def _clamped(value: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(value, 0.0, LARGEST, -LARGEST)


def advice(found: Range, config: Config) -> str:
    """The line for a run that would overflow: what, how far, and what to type, with this engine and base."""
    path = found.name.removeprefix("model.").partition("layers.")[2].split(".")
    layer = f"layers.{path[0]}" if path[0].isdigit() else found.name.rpartition(".")[2]
    what = f"what {found.name} reads" if found.is_input else f"{found.name} gives {found.largest:,.0f}, and that"
    words = [f"precision.fp32_layers=[{layer}]"]
    if config.engine.kind is EngineKind.deepspeed:
        words.insert(0, "engine=accelerate")  # DeepSpeed turns every weight into halves
    if config.method.base is Base.int8 and config.precision.int8 is Int8.bnb:
        words.insert(0, "precision.int8=dynamic")  # bitsandbytes multiplies int8 layers in halves alone
    return (
        f"precision.compute=fp16: {what} is beyond fp16's {LARGEST:,.0f} — type {' '.join(words)}, which computes that layer "
        "in fp32, or precision=fp32"
    )


def generate_in(model: Any, compute: torch.dtype, device: torch.device) -> None:
    """Let a model of fp32 and of halves generate: training is under the engine's autocast, and generation has none of its own."""
    inner = inner_model(model)
    inner.forward = torch.autocast(device.type, dtype=compute)(inner.forward)


def keep_in_fp32(model: Any, names: Sequence[str], device: torch.device) -> None:
    """Let layers compute in fp32, and what comes behind them go on from fp32; raises Refusal for names the model lacks."""
    for wanted in names:
        found = [part for name, part in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            layers = sum(1 for name, _ in model.named_modules() if name.rpartition(".")[2].isdigit() and "layers." in name)
            raise Refusal(
                f"precision.fp32_layers={wanted}: this model has no such layer — layers.0 to layers.{layers - 1}, or parts as layers.0.mlp"
            )
        for part in found:
            _in_fp32(part, device)


def _in_fp32(part: nn.Module, device: torch.device) -> None:
    for inner in part.modules():
        if hasattr(inner, "compute_dtype"):  # bitsandbytes' 4-bit layers multiply in this type, whatever they store
            setattr(inner, "compute_dtype", torch.float32)  # noqa: B010  # not of nn.Module
    for weight in part.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.float()
    forward = part.forward

    def widened(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.float()
        return type(value)(widened(item) for item in value) if isinstance(value, (tuple, list)) else value

    def in_fp32(*inputs: Any, **named: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            return forward(*widened(inputs), **{name: widened(value) for name, value in named.items()})

    part.forward = in_fp32
