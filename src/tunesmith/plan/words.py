"""A plan in words: before the run what it would be, and after it what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from tunesmith.config import Base, Config, EngineKind, MethodKind, OptimizerKind
from tunesmith.plan.network import ASSUMED_GBIT_PER_S
from tunesmith.plan.shapes import multiplies_int8

if TYPE_CHECKING:
    from tunesmith.plan import Cache, Plan


def describe(plan: Plan) -> str:
    """The plan for people, at most 17 lines."""
    shape, gib = plan.shape, plan.memory_gib
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
        "step": _step_words(plan),
        "length": length,
        "memory": f"{gib:.2f}{limit} GiB a rank, with {'rows' if plan.packed else 'conversations'} of {plan.longest_tokens:,} tokens",
        "": parts,
        "compute": f"at most {useful:,.4g} TFLOP a step ({executed:,.4g} executed){seconds}",
        "time": _time_words(plan),
        **({"nodes": _nodes_words(plan)} if plan.nodes > 1 else {}),
        "disk": _disk_words(plan),
        **({"cache": _cache_words(plan, plan.cache)} if plan.cache else {}),
        "peak": f"{plan.peak_flops / 1e12:.4g} TFLOPS a rank, {plan.peak_note}" if plan.peak_flops else plan.peak_note,
    }
    return "\n".join(
        [*(f"{word:<8} {text}" for word, text in lines.items()), *(f"note     {note}" for note in plan.notes)]
    )


def _step_words(plan: Plan) -> str:
    per_step, places = plan.conversations_per_step, plan.micro_batch * plan.accumulation * plan.world_size
    parts = f"{plan.micro_batch}{' rows' * plan.packed} in a micro-batch"
    ranks = f"{plan.world_size} rank{'s' * (plan.world_size > 1)}"
    if plan.tokens_per_step:
        many = f"about {per_step:,}" if plan.conversations else f"{per_step:,} or more"
        return f"~{plan.tokens_per_step:,} tokens, {many} conversations, at most {parts} x about {plan.accumulation} accumulated x {ranks}"
    sign = "=" if places == per_step and not plan.packed else "<="
    return f"{per_step} conversations {sign} {parts} x {plan.accumulation} accumulated x {ranks}"


def _time_words(plan: Plan) -> str:
    if not plan.time:
        return "known when the device's peak is"
    parts = " + ".join(f"{name} {seconds:.2g}" for name, seconds in plan.time.items() if seconds >= 0.01 * plan.step_s)
    words = f"{plan.step_s:.3g} s a step ({parts}), {plan.tokens_per_s:,.0f} tokens/s"
    if plan.hours:
        words += f", {plan.hours:.3g} h" + (f", cost {plan.cost:.2f}" if plan.cost else "")
    return words


def _nodes_words(plan: Plan) -> str:
    gbit = plan.config.hardware.network_gbit_per_s
    network = f"{gbit or ASSUMED_GBIT_PER_S:g} Gbit/s {'each' if gbit else 'assumed'}"
    useful = f", {plan.efficiency:.0%} of a step is not waiting" if plan.time else ""
    return f"{plan.nodes:,} x {plan.local_size} ranks, network {network}: {_bytes(plan.sent)} a step{useful} (predicted, no overlap)"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.3g} GB" if size >= 1e9 else f"{size / 1e6:,.3g} MB"


def _disk_words(plan: Plan) -> str:
    each, result = plan.disk
    kept = plan.config.train.keep
    # One is complete before the oldest goes.
    return f"{(kept + 1) * each + result:.3g} GiB: {kept} + 1 checkpoints of {each:.3g}, and {result:.3g} for the result"


def _cache_words(plan: Plan, cache: Cache) -> str:
    each = f"{plan.shape.hidden:,} numbers x {cache.number_bytes} bytes"
    size = f"{plan.cache_gib:.3g} GiB more on disk: {cache.tokens:,} tokens x {each}" if cache.tokens else f"{each} a token on disk"
    words = f"{size}; a step of tokens that are there takes {1 - cache.flops.executed / plan.flops.executed:.0%} fewer FLOPs"
    return words + (f", {plan.cached_step_s:.3g} s" if cache.time else "")


def beside(plan: Plan, rows: Sequence[Mapping[str, float]]) -> str:
    """What was predicted beside what a run's metrics say: the highest memory and the middle step after the first three."""
    peaks = [row["memory/peak_gib"] for row in rows if "memory/peak_gib" in row]
    settled = [row for row in rows if "time/step_s" in row][3:]
    words = []
    if peaks:
        words.append(f"memory {plan.memory_gib:.2f} GiB predicted, {max(peaks):.2f} measured")
    for kind, predicted in (("step", plan.step_s), ("cached step", plan.cached_step_s)):
        cached = kind != "step"
        measured = [row["time/step_s"] for row in settled if bool(row.get("data/cached_tokens")) is cached]
        if measured and predicted:
            words.append(f"{kind} {predicted:.3g} s predicted, {median(measured):.3g} measured")
    return "; ".join(words)


def method_words(config: Config) -> str:
    """Precision, method and engine."""
    method = config.method
    kind = {
        MethodKind.full: "full",
        MethodKind.lora: f"{'DoRA' if method.dora else 'LoRA'} r={method.r}",
        MethodKind.prefix: f"prefix of {method.virtual_tokens} tokens",
        MethodKind.prompt: f"prompt of {method.virtual_tokens} tokens",
    }[method.kind]
    if method.kind is MethodKind.lora:
        kind += f" from layer {method.first_layer}" if method.first_layer else ""
        kind += f" to layer {method.last_layer}" if method.last_layer >= 0 else ""
        kind += f" and {', '.join(method.modules_to_save)}" if method.modules_to_save else ""
    base = "" if method.base is Base.as_is else f" on {'dynamic ' if multiplies_int8(config) else ''}{method.base.value}"
    high = " (matmul high)" if config.precision.multiplied == "tf32" else ""
    return f"{kind}{base}, {config.precision.compute.value}{high}, {engine_words(config)}"


def engine_words(config: Config) -> str:
    """Engine, its stage, optimizer and recomputation."""
    engine = config.engine
    zero = f"DeepSpeed ZeRO {engine.zero}{', offload' if engine.offload else ''}"
    every = f" every {engine.checkpoint_every} layers" if engine.checkpoint_every > 1 else ""
    checkpointing = f", checkpointing{every}" if engine.checkpointing else ""
    library = zero if engine.kind is EngineKind.deepspeed else "FSDP2" if engine.fsdp else "Accelerate"
    optimizer = "" if config.optim.name is OptimizerKind.adamw else f", {config.optim.name.value}"
    return f"{library}{optimizer}{checkpointing}"
