"""What a plan says in sentences: what is wasted, passed over or dearer than it need be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tunesmith.config import Base, Compute, Config, EngineKind, Matmul, MethodKind, Train, changed
from tunesmith.plan.checks import varies
from tunesmith.plan.memory import memory_gib
from tunesmith.plan.shapes import multiplies_int8

if TYPE_CHECKING:
    from tunesmith.plan import Plan

SPLIT_PAYS = 0.02
"""Least share of a rank's memory that ZeRO 1 or 2 must save, else the plan says that it only costs."""


def notes(config: Config, plan: Plan, tokens: int, longest: int, on_cpu: bool) -> Iterator[str]:
    """What a user should know of a plan besides its numbers; tokens, longest: of the training data, 0 until counted."""
    train, per_step = config.train, plan.conversations_per_step
    places = plan.micro_batch * plan.accumulation * plan.world_size

    def otherwise(changes: dict[str, Any]) -> float:
        """GiB of a rank with other settings and the same micro-batch."""
        row = plan.micro_batch * plan.longest_tokens
        parts = memory_gib(plan.shape, changed(config, changes), plan.world_size, row, cpu=on_cpu, accumulated=plan.accumulation > 1)
        return sum(parts.values())

    if not varies(config) and places > per_step:
        yield f"{per_step} conversations leave {places - per_step} of a step's {places} places empty"
    if wanted := train.tokens_per_step:
        if train.conversations_per_step != Train().conversations_per_step:
            yield f"train.conversations_per_step={train.conversations_per_step} is passed over, train.tokens_per_step={wanted} is set"
        if longest > wanted:
            yield f"the longest conversation has {longest:,} tokens, more than train.tokens_per_step={wanted}: its step is larger"
        if 0 < tokens < wanted:
            yield f"the data has {tokens:,} tokens, fewer than the {wanted:,} of a step"
        if tokens and per_step < plan.world_size:
            yield f"a step has about {per_step} conversations for {plan.world_size} ranks: some compute nothing"
    elif 0 < plan.conversations < per_step:
        yield f"the data has {plan.conversations} conversations, fewer than the {per_step} of a step"
    zero = config.engine.zero if config.engine.kind is EngineKind.deepspeed else 0
    if zero in (1, 2) and not config.engine.offload and plan.world_size > 1 and config.method.kind is not MethodKind.full:
        saved = otherwise({"engine.zero": 0}) - otherwise({})
        if saved < SPLIT_PAYS * plan.memory_gib:
            yield (
                f"engine.zero={zero} saves {max(0.0, saved):.2f} GiB a rank of {plan.memory_gib:.2f}: adapters leave little to split "
                "— type engine=accelerate"
            )
    if config.method.dora and config.method.dropout and config.method.base is Base.nf4:
        of_dropout = [otherwise({"method.dora": dora}) - otherwise({"method.dora": dora, "method.dropout": 0.0}) for dora in (True, False)]
        kept = of_dropout[0] - of_dropout[1]
        if kept > 0.01 * plan.memory_gib:
            yield (
                f"method.dora=true with method.dropout={config.method.dropout:g} keeps the dequantised weight of each adapted layer: "
                f"{kept:.2f} GiB of {plan.memory_gib:.2f}, which is what nf4 saves — type method.dropout=0"
            )
    if plan.cache and 0 < plan.epochs <= 1:
        yield "method.cache_frozen=true: the run is one epoch at most, and nothing is read again — type method.cache_frozen=false"
    if multiplies_int8(config):
        yield f"precision.int8=dynamic: MFU and HFU divide by the peak of {config.precision.multiplied}, so they may pass 100 %"
        yield "precision.int8=dynamic: learns a little less; the demo's slot F1 was 3 points lower (docs/engines.md)"
        if on_cpu and config.precision.compute is not Compute.fp32:
            yield "precision.int8=dynamic: the quick passes on a CPU are for fp32 — type precision=fp32"
    if config.precision.matmul is Matmul.high and config.precision.compute is not Compute.fp32 and not config.precision.fp32_layers:
        yield f"precision.matmul=high: precision.compute={config.precision.compute.value} multiplies no fp32 matrices"
    if on_cpu and config.precision.compute is Compute.bf16:
        yield "bf16 is slower than fp32 on a CPU without AMX — precision=fp32 is the one to compare"
