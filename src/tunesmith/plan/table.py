"""`tunesmith plan`: the plan of a run for its card, here or not; and what fits there, method by method and length by length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.config import Base, Config, EngineKind, MethodKind, Refusal, changed
from tunesmith.hardware import CARDS, Machine
from tunesmith.plan import UNCOUNTED, Counts, Plan, PlanError, describe, engine_choices, make_plan, with_type
from tunesmith.plan.checks import device_gib, least_gib, target
from tunesmith.plan.shapes import shape_of

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
METHODS = (
    ("full", {"method.kind": MethodKind.full, "method.base": Base.as_is}),
    ("LoRA", {"method.kind": MethodKind.lora, "method.base": Base.as_is}),
    ("LoRA on int8", {"method.kind": MethodKind.lora, "method.base": Base.int8}),
    ("LoRA on nf4", {"method.kind": MethodKind.lora, "method.base": Base.nf4}),
    ("prefix", {"method.kind": MethodKind.prefix, "method.base": Base.as_is}),
    ("prompt", {"method.kind": MethodKind.prompt, "method.base": Base.as_is}),
)


@dataclass(frozen=True)
class Fit:
    """The fastest way to run a method at a length with an engine; plan None: none fits."""

    method: str
    engine: str
    tokens: int
    plan: Plan | None

    def __str__(self) -> str:
        if self.plan is None:
            return "—"
        speed = f"{self.plan.tokens_per_s:,.0f}/s " if self.plan.time else ""
        return f"{speed}{self.plan.memory_gib:.1f}{'*' * self.plan.config.engine.checkpointing}"


def planned_machine(config: Config, machine: Machine, ranks: int = 0) -> Machine:
    """The machine to plan for: this one, or where hardware.card is not here one with as many of it as are asked for."""
    card = CARDS.get(config.hardware.card)
    if card is None or machine.kind != "cpu":
        return machine
    count = ranks or 1
    return replace(machine, kind="cuda", device_names=(card.names[0],) * count, memory_gib=(card.memory_gib,) * count)


def plan_text(
    config: Config, machine: Machine, *, counts: Counts = UNCOUNTED, ranks: int = 0, nodes: int = 1, table: bool = False,
    model_folder: Path | None = None,
) -> str:  # fmt: skip
    """What `tunesmith plan` prints: the plan, or with table what fits; raises PlanError where the run cannot go as asked.

    ranks 0: hardware.count, or the cards of a machine like this times `nodes`, the number of machines.
    """
    asked = ranks or config.hardware.count
    if asked % nodes:
        raise Refusal(f"--nodes {nodes}: does not divide {asked} ranks — type --ranks {math.ceil(asked / nodes) * nodes}")
    there = planned_machine(config, machine, asked // nodes)
    world = asked or max(1, len(there.device_names)) * nodes
    local = world // nodes
    if table:
        return fit_table(with_type(config, there)[0], there, world, local, model_folder)
    elsewhere = "" if there == machine else f"note     planned for {world} x {config.hardware.card}, which is not here\n"
    text = describe(make_plan(config, there, world, counts, local_size=local, model_folder=model_folder))
    unread = "" if counts.conversations else (
        f"\nnote     reckoned with {config.data.max_tokens:,} tokens in every conversation and nothing shared; --data reads the files first"
    )  # fmt: skip
    return elsewhere + text + unread


def fits(config: Config, machine: Machine, world: int, local: int = 0, model_folder: Path | None = None) -> Iterator[Fit]:
    """Each method x what is split x length, with the faster of recomputing and not among those that fit."""
    try:
        shape = shape_of(str(model_folder or config.model.path), config.model.known_as)
    except ValueError as error:
        raise PlanError([str(error)]) from None
    lengths = [tokens for tokens in LENGTHS if tokens <= shape.max_positions]
    on_cpu = target(config, machine)[0]
    limit = device_gib(machine, on_cpu, local or world)
    for method, changes in METHODS:
        engines: dict[str, list[dict[str, Any]]] = {}
        for choice in engine_choices(changed(config, changes), world):
            if choice["engine.checkpoint_every"] > 1:
                continue  # between the other two in memory and in speed
            engines.setdefault(_split_words(changed(config, choice), world), []).append(choice)
        for words, choices in engines.items():
            still = True
            for tokens in lengths:
                plans = []
                for choice in choices if still else ():
                    tried = changed(config, {**changes, **choice, "engine.fit": False, "data.max_tokens": tokens})
                    if limit and least_gib(tried, world, shape, on_cpu) > limit:
                        continue
                    try:
                        plans.append(make_plan(tried, machine, world, local_size=local, model_folder=model_folder))
                    except PlanError:
                        continue
                best = min(plans, key=lambda plan: plan.step_s or plan.flops.executed, default=None)
                still = best is not None  # what does not fit at a length does not at a longer one
                yield Fit(method, words, tokens, best)


def _split_words(config: Config, world: int) -> str:
    """What is split over ranks, and by what."""
    engine = config.engine
    if engine.kind is EngineKind.deepspeed:
        return f"ZeRO {engine.zero}{', offload' * engine.offload}"
    return "FSDP2" if engine.fsdp else "DDP" if world > 1 else "—"


def fit_table(config: Config, machine: Machine, world: int, local: int = 0, model_folder: Path | None = None) -> str:
    """What fits on this machine as a table: methods and engines down, lengths across."""
    found = list(fits(config, machine, world, local, model_folder))
    lengths = sorted({fit.tokens for fit in found})
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for fit in found:
        rows.setdefault((fit.method, fit.engine), {})[fit.tokens] = str(fit)
    cells = [["method", "engine", *(f"{tokens:,}" for tokens in lengths)]]
    cells += [[*names, *(row.get(tokens, "—") for tokens in lengths)] for names, row in rows.items()]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    where = f"{world} x {machine.device_names[0] if machine.device_names else 'CPU'}"
    high = " (matmul high)" if config.precision.multiplied == "tf32" else ""
    model = f"{config.model.known_as or config.model.path} in {config.precision.compute.value}{high}"
    head = f"What fits on {where}: {model}, by tokens of the longest conversation"
    return "\n".join([head, *lines, "tokens/s predicted over all ranks, GiB a rank; * layers recomputed; — does not fit or cannot be"])
