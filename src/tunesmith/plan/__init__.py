"""From a config, a machine and a number of ranks to a frozen plan, before anything heavy is imported or started.

`problems` (checks.py) says everything that is wrong at once; `make_plan` derives what follows from the settings: batch arithmetic,
memory, FLOPs, DeepSpeed's own config and the run's id; `describe` prints it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import NOT_IN_RUN_ID, Base, Compute, Config, EngineKind, Method, MethodKind
from tunesmith.hardware import Machine, peak_flops
from tunesmith.plan.checks import PlanError, changed, device_gib, leaves, problems, target
from tunesmith.plan.flops import Flops, step_flops
from tunesmith.plan.memory import BUCKET, memory_gib
from tunesmith.plan.shapes import ModelShape, shape_needs_files, shape_of

__all__ = [
    "Flops", "ModelShape", "Plan", "PlanError", "describe", "make_plan", "memory_gib", "problems", "run_id", "shape_needs_files",
    "shape_of", "step_flops", "trained_weights",
]  # fmt: skip

ROOM = 0.92
"""Share of a device's memory that the plan fills: the rest is for fragmentation and what the model does not know."""
CPU_MICRO_BATCH = 16
"""Most conversations in one forward on a CPU: its caches are small, and larger ones gain nothing there."""


@dataclass(frozen=True)
class Plan:
    """What follows from the settings on this machine with this many ranks."""

    name: str
    run_id: str
    """8 hex digits of everything that changes the result."""
    steps: int
    """Optimizer updates; 0 until the data has been counted."""
    epochs: float
    """Passes over the data; 0.0 while train.steps is set and the data is not counted."""
    conversations: int
    """Training conversations; 0 until counted."""
    conversations_per_step: int
    micro_batch: int
    """Conversations in a forward on one rank, at most."""
    accumulation: int
    """Micro-batches in a step on each rank."""
    world_size: int
    card: str
    """What it runs on: cpu, a row of the card table, or the device's own name where the table has none."""
    threads: int
    """CPU threads a rank."""
    method: str
    """Precision, method and engine in words."""
    shape: ModelShape
    trained_weights: int
    memory: dict[str, float]
    """GiB of each part on one rank, if every conversation of a micro-batch had longest_tokens tokens."""
    memory_limit_gib: float
    """What a rank's device has (a rank's share of RAM on a CPU); 0.0 if unknown."""
    longest_tokens: int
    """Longest conversation: data.max_tokens until the data has been counted."""
    flops: Flops
    """Of a step in which every conversation had longest_tokens tokens, all of them targets: an upper bound."""
    peak_flops: float | None
    """FLOPS of one rank's device that MFU divides by; None: unknown, or measured when the run starts."""
    peak_note: str
    deepspeed: dict[str, Any]
    """DeepSpeed's config; empty with engine=accelerate."""
    notes: list[str]

    @property
    def memory_gib(self) -> float:
        """All parts of one rank together."""
        return sum(self.memory.values())


def make_plan(
    config: Config,
    machine: Machine,
    world_size: int,
    conversations: int | None = None,
    *,
    local_size: int = 0,
    longest_tokens: int = 0,
    model_folder: Path | None = None,
) -> Plan:
    """Derive the plan; raises PlanError with every problem when the config cannot run as asked.

    conversations and longest_tokens: the training data's, where it has been counted (None and 0: not yet; the plan then
    reckons with data.max_tokens). local_size: ranks on this machine (0: all of them). model_folder: the model's files, where
    they are here.
    """
    shape, unknown = None, []
    try:
        shape = shape_of(str(model_folder or config.model.path), config.model.known_as)
    except ValueError as error:
        unknown = [str(error)]
    countable = config.train.conversations_per_step >= 1 and math.isfinite(config.train.epochs)
    steps, epochs = _length(config, conversations) if countable else (0, 0.0)
    counted = changed(config, {"data.max_tokens": longest_tokens or config.data.max_tokens})
    found = unknown + problems(counted, machine, world_size, shape, local_size=local_size, steps=steps)
    if found or shape is None:
        raise PlanError(found)

    on_cpu, card = target(config, machine)
    local_size = local_size or world_size
    limit_gib = device_gib(machine, on_cpu, local_size)
    tokens = longest_tokens or config.data.max_tokens
    micro, accumulation = _split(config, world_size, shape, tokens, limit_gib, on_cpu)
    threads = config.hardware.threads or max(1, machine.cores // local_size)
    per_step = config.train.conversations_per_step
    peak, peak_note = peak_flops(
        config.hardware.peak, machine, config.precision.compute.value, cpu=on_cpu, threads=threads, measure=False
    )
    return Plan(
        name=config.name,
        run_id=run_id(config),
        steps=steps,
        epochs=epochs,
        conversations=conversations or 0,
        conversations_per_step=per_step,
        micro_batch=micro,
        accumulation=accumulation,
        world_size=world_size,
        card="cpu" if on_cpu else card.key if card else machine.device_names[0],
        threads=threads,
        method=_words(config),
        shape=shape,
        trained_weights=trained_weights(shape, config.method),
        memory=memory_gib(shape, config, world_size, micro * tokens, cpu=on_cpu),
        memory_limit_gib=limit_gib,
        longest_tokens=tokens,
        flops=step_flops(
            shape, config.method, [tokens] * per_step, tokens * per_step, checkpointing=config.engine.checkpointing
        ),
        peak_flops=peak,
        peak_note=peak_note,
        deepspeed=_deepspeed(config, micro, accumulation, on_cpu),
        notes=list(_notes(config, per_step, micro * accumulation * world_size, conversations, on_cpu)),
    )


def trained_weights(shape: ModelShape, method: Method) -> int:
    """Number of weights that the optimizer updates."""
    return shape.total_weights if method.kind is MethodKind.full else shape.adapter_weights(method.r, method.targets)


def _length(config: Config, conversations: int | None) -> tuple[int, float]:
    """(steps, epochs). Every epoch ends with its own, perhaps short, step, so that epochs never mix."""
    steps, epochs, per_step = config.train.steps, config.train.epochs, config.train.conversations_per_step
    if not conversations:
        return steps, 0.0 if steps else epochs
    if steps > 0:
        return steps, steps / math.ceil(conversations / per_step)
    whole = math.floor(epochs)
    part = (epochs - whole) * conversations / per_step
    rest = math.ceil(round(part, 6))  # rounded, since 0.1 is a little more than a tenth
    return whole * math.ceil(conversations / per_step) + rest, epochs


def _split(
    config: Config, world_size: int, shape: ModelShape, tokens: int, limit_gib: float, on_cpu: bool
) -> tuple[int, int]:
    """(micro-batch, accumulation): as few micro-batches as memory allows, all of about the same size."""
    share = config.train.conversations_per_step // world_size
    most = config.train.micro_batch
    if not most:
        ceiling = min(share, CPU_MICRO_BATCH) if on_cpu else share

        def fits(micro: int) -> bool:
            parts = memory_gib(shape, config, world_size, micro * tokens, cpu=on_cpu)
            return not limit_gib or sum(parts.values()) <= ROOM * limit_gib

        most = 1
        while most < ceiling and fits(2 * most):
            most *= 2
        most = min(most, ceiling)
    accumulation = math.ceil(share / most)
    return math.ceil(share / accumulation), accumulation


def _deepspeed(config: Config, micro: int, accumulation: int, on_cpu: bool) -> dict[str, Any]:
    if config.engine.kind is not EngineKind.deepspeed:
        return {}
    zero: dict[str, Any] = {
        "stage": config.engine.zero,
        "overlap_comm": not on_cpu,  # there are no streams to overlap on a CPU
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if config.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    half: dict[str, Any] = {}
    if config.precision.compute is Compute.fp16:
        # Starts at 2^16, halves at an overflow, doubles after 1000 steps without one (arXiv 1710.03740).
        scaling = {
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
        half = {"fp16": {"enabled": True, **scaling}}
    elif config.precision.compute is Compute.bf16:
        half = {"bf16": {"enabled": True}}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "gradient_clipping": config.optim.clip,
        **half,
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's AdamW in every case ...
        "zero_force_ds_cpu_optimizer": False,  # ... with offload too
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "comms_logger": {"enabled": on_cpu, "verbose": False, "prof_all": True, "debug": False},
    }


def _notes(config: Config, per_step: int, places: int, conversations: int | None, on_cpu: bool) -> Iterator[str]:
    if places > per_step:
        yield f"{per_step} conversations leave {places - per_step} of a step's {places} places empty"
    if conversations and conversations < per_step:
        yield f"the data has {conversations} conversations, fewer than the {per_step} of a step"
    if on_cpu and config.precision.compute is Compute.bf16:
        yield "bf16 is slower than fp32 on a CPU without AMX — precision=fp32 is the one to compare"


def _words(config: Config) -> str:
    method, engine = config.method, config.engine
    kind = method.kind.value if method.kind is MethodKind.full else f"LoRA r={method.r}"
    base = "" if method.base is Base.as_is else f" on {method.base.value}"
    zero = f"DeepSpeed ZeRO {engine.zero}{', offload' if engine.offload else ''}"
    library = zero if engine.kind is EngineKind.deepspeed else "Accelerate"
    return (
        f"{kind}{base}, {config.precision.compute.value}, {library}{', checkpointing' if engine.checkpointing else ''}"
    )


def run_id(config: Config) -> str:
    """8 hex digits of all that changes the result: typing a default makes no difference, nor does NOT_IN_RUN_ID."""
    kept = {
        path: value
        for path, value in leaves(config)
        if not any(path == out or path.startswith(f"{out}.") for out in NOT_IN_RUN_ID)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:8]


def describe(plan: Plan) -> str:
    """The plan for people, at most 14 lines."""
    shape, per_step, gib = plan.shape, plan.conversations_per_step, plan.memory_gib
    places = plan.micro_batch * plan.accumulation * plan.world_size
    ranks = f"{plan.world_size} rank{'s' * (plan.world_size > 1)}"
    product = f"{plan.micro_batch} in a micro-batch x {plan.accumulation} accumulated x {ranks}"
    length = f"{plan.steps:,} steps" if plan.steps else "as many steps as the data asks for"
    if plan.conversations:
        length += f" = {plan.epochs:g} epochs of {plan.conversations:,} conversations"
    elif plan.epochs:
        length += f", {plan.epochs:g} epochs"
    limit = f" of {plan.memory_limit_gib:.1f}" if plan.memory_limit_gib else ""
    parts = " + ".join(f"{name} {size:.2f}" for name, size in plan.memory.items() if size >= 0.005)
    useful, executed, seconds = plan.flops.useful / 1e12, plan.flops.executed / 1e12, ""
    if plan.peak_flops:
        seconds = f", {plan.flops.executed / plan.world_size / plan.peak_flops:.3g} s at the peak"
    total, trained = shape.total_weights / 1e6, plan.trained_weights / 1e6
    lines = {
        "run": f"{plan.name}/{plan.run_id}",
        "model": f"{shape.name}, {total:,.1f} M weights, {trained:,.1f} M trained",
        "method": plan.method,
        "on": f"{plan.world_size} x {plan.card}" + (f" with {plan.threads} threads" if plan.card == "cpu" else ""),
        "step": f"{per_step} conversations {'=' if places == per_step else '<='} {product}",
        "length": length,
        "memory": f"{gib:.2f}{limit} GiB a rank, with conversations of {plan.longest_tokens:,} tokens",
        "": parts,
        "compute": f"at most {useful:,.4g} TFLOP a step ({executed:,.4g} executed){seconds}",
        "peak": f"{plan.peak_flops / 1e12:.4g} TFLOPS a rank, {plan.peak_note}" if plan.peak_flops else plan.peak_note,
    }
    return "\n".join(
        [*(f"{word:<8} {text}" for word, text in lines.items()), *(f"note     {note}" for note in plan.notes)]
    )
