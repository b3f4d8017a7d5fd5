"""What is left to the plan: the settings on auto, and what may take their place. Which of it is fastest, `make_plan` finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from tunesmith.config import AUTO, Compute, Config, EngineKind, changed, leaves
from tunesmith.hardware import CARDS, Machine
from tunesmith.plan.checks import PlanError, goes_with, target

SPLITTING = ("engine.zero", "engine.offload", "engine.fsdp")
"""Where a run's state lies, which its checkpoints depend on."""
KEPT = (*SPLITTING, "precision.compute")
"""What a run goes on with as it began, where it was left to the plan."""
LEFT_TO_PLAN = (*SPLITTING, "engine.checkpointing")
"""What can be left to it beside the type."""
BF16_FROM = (8, 0)
"""Compute capability of the first cards with units for bf16."""


def left_to_plan(config: Config) -> tuple[str, ...]:
    """The settings that the plan chooses: those on auto, or all with engine.fit."""
    given = dict(leaves(config))
    return LEFT_TO_PLAN if config.engine.fit else tuple(path for path in LEFT_TO_PLAN if given[path] == AUTO)


def said_left(config: Config) -> str:
    """What was typed to leave settings to the plan."""
    return "engine.fit" if config.engine.fit else ", ".join(f"{path}=auto" for path in left_to_plan(config))


def with_type(config: Config, machine: Machine, begun: str = "") -> tuple[Config, list[str]]:
    """The config with a type in place of precision.compute=auto, and a line that says why; raises PlanError where nobody can tell.

    begun: the type that this run's checkpoints are of.
    """
    if config.precision.compute is not Compute.auto:
        return config, []
    if begun:
        return changed(config, {"precision.compute": Compute(begun)}), [f"precision.compute=auto: {begun}, as this run began with it"]
    if config.hardware.card not in ("any", "cpu", *CARDS):
        return changed(config, {"precision.compute": Compute.fp32}), []  # `problems` says so
    on_cpu, card = target(config, machine)
    if not on_cpu and card is None:
        raise PlanError(
            [
                f"precision.compute=auto: {machine.device_names[0]} has no row in the card table — type precision=bf16 where its compute "
                "capability is 8.0 or higher, else precision=fp16"
            ]
        )
    if on_cpu or card is None:
        chosen, why = Compute.fp32, "the fastest type on a CPU"
    else:
        capability = ".".join(map(str, card.capability))
        chosen, why = Compute.fp16, f"as capability {capability} has no units for bf16"
        if card.capability >= BF16_FROM:
            chosen, why = Compute.bf16, f"which capability {capability} has units for, and which needs no loss scaling"
    return changed(config, {"precision.compute": chosen}), [f"precision.compute=auto: {chosen.value}, {why}"]


def engine_choices(config: Config, world_size: int, left: Sequence[str] = LEFT_TO_PLAN) -> Iterator[dict[str, Any]]:
    """What can be chosen for the settings that are left to the plan, the thriftiest with memory last: ZeRO's stages and offload, or DDP and
    FSDP2, each without recomputation, with some layers recomputed, and with all; of these, what can be with the other settings.

    What is left to the plan and the config's engine has not is its default.
    """
    deepspeed, every = config.engine.kind is EngineKind.deepspeed, config.engine.checkpoint_every
    own = {"engine.zero": (0, 1, 2, 3), "engine.offload": (False, True)} if deepspeed else {"engine.fsdp": (False, True)}
    given, defaults = dict(leaves(config)), dict(leaves(Config()))

    def values(path: str) -> Sequence[Any]:
        return own.get(path, (defaults[path],)) if path in left else (given[path],)

    recomputed: list[dict[str, Any]] = [{}]
    if "engine.checkpointing" in left and every < 1:
        recomputed = [{"engine.checkpointing": True}]  # so that `problems` sees that number
    elif "engine.checkpointing" in left:
        some = every if every > 1 and not config.engine.fit else 2
        recomputed = [{"engine.checkpointing": n > 0, "engine.checkpoint_every": max(1, n)} for n in (0, some, 1)]
    least = changed(config, {**{path: values(path)[0] for path in SPLITTING}, **recomputed[0]})
    for fsdp, offload, zero in product(values("engine.fsdp"), values("engine.offload"), values("engine.zero")):
        if deepspeed and "engine.zero" in left and world_size == 1 and zero not in (0, 2 * offload):
            continue  # it splits nothing
        place = {"engine.zero": zero, "engine.offload": offload, "engine.fsdp": fsdp}
        if goes_with(least, place, world_size):
            for again in recomputed:
                yield {**place, **again}
