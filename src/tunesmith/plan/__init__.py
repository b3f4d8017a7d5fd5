"""From a config, a machine and a number of ranks to a frozen plan, before anything heavy is imported or started.

`problems` says everything that is wrong at once; `make_plan` derives what follows from the settings: batch arithmetic,
memory, FLOPs, DeepSpeed's own config and the run's id; `describe` prints it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from tunesmith.config import NOT_IN_RUN_ID, Base, Compute, Config, EngineKind, Method, MethodKind, Refusal
from tunesmith.hardware import CARDS, Card, Machine, find_card, given_peak, peak_flops
from tunesmith.plan.flops import Flops, step_flops
from tunesmith.plan.memory import BUCKET, memory_gib
from tunesmith.plan.shapes import ModelShape, shape_needs_files, shape_of

__all__ = [
    "Flops", "ModelShape", "Plan", "PlanError", "describe", "make_plan", "memory_gib", "problems", "run_id", "shape_needs_files",
    "shape_of",
    "step_flops", "trained_weights",
]  # fmt: skip

ROOM = 0.92
"""Share of a device's memory that the plan fills: the rest is for fragmentation and what the model does not know."""
CPU_MICRO_BATCH = 16
"""Most conversations in one forward on a CPU: its caches are small, and larger ones gain nothing there."""


class PlanError(Refusal):
    """A config that cannot run as asked: its text has one problem a line."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


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


# --- what is wrong -------------------------------------------------------------------------------------------------


def problems(
    config: Config,
    machine: Machine,
    world_size: int,
    shape: ModelShape | None = None,
    *,
    local_size: int = 0,
    steps: int = 0,
) -> list[str]:
    """Everything that is wrong, a line each: the config path and its value, the fact in numbers, what to type.

    local_size: ranks on this machine (0: all of them); steps: updates, where the data tells (0: train.steps). Without a
    shape the model's memory and layer names go unchecked.
    """
    found = [*_number_problems(config), *_batch_problems(config, world_size, steps)]
    found += _combination_problems(config, shape)
    if any(line.startswith(("method.r=", "method.targets=", "data.max_tokens=")) for line in found):
        shape = None  # memory cannot be predicted from numbers that make no sense
    return [*found, *_hardware_problems(config, machine, world_size, local_size or world_size, shape)]


_RULES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    (
        "method.r data.max_tokens data.prepare_train data.prepare_test train.conversations_per_step train.keep "
        "train.log_every eval.max_new_tokens eval.batch engine.timeout_s",
        "must be at least 1",
        lambda value: value >= 1,
    ),
    ("optim.lr optim.eps method.alpha tracker.init_timeout_s", "must be above 0", lambda value: value > 0),
    ("method.dropout optim.beta1 optim.beta2", "must be at least 0 and below 1", lambda value: 0 <= value < 1),
    ("optim.min_lr_ratio", "must be between 0 and 1", lambda value: 0 <= value <= 1),
)


def _number_problems(config: Config) -> Iterator[str]:
    rules = {path: (words, fits) for paths, words, fits in _RULES for path in paths.split()}
    defaults = dict(_leaves(Config()))
    for path, value in _leaves(config):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        words, fits = rules.get(path, ("must not be negative or infinite", lambda value: value >= 0))
        if not (math.isfinite(value) and fits(value)):
            yield f"{path}={value}: {words} — type {path}={defaults[path]}"
    if config.train.steps <= 0 and config.train.epochs <= 0:
        yield f"train.epochs={config.train.epochs}: not one step, nor does train.steps say any — type train.epochs=3"
    if config.hardware.peak not in ("table", "measure"):
        try:
            given_peak(config.hardware.peak)
        except ValueError as error:
            yield str(error)


def _batch_problems(config: Config, world_size: int, steps: int) -> Iterator[str]:
    train, per_step = config.train, config.train.conversations_per_step
    if per_step >= 1 and per_step % world_size:
        nearest = max(1, round(per_step / world_size)) * world_size
        yield (
            f"train.conversations_per_step={per_step}: does not divide by {world_size} ranks, and each takes as many "
            f"— type train.conversations_per_step={nearest}"
        )
    elif train.micro_batch > (share := per_step // world_size) >= 1:
        yield (
            f"train.micro_batch={train.micro_batch}: a rank has only {share} of a step's {per_step} conversations "
            f"({per_step} / {world_size} ranks) — type train.micro_batch={share}, or 0 to let the plan choose"
        )
    steps = train.steps or steps
    if 0 < steps <= config.optim.warmup_steps:
        yield (
            f"optim.warmup_steps={config.optim.warmup_steps}: the run has only {steps} steps, so lr would never arrive "
            f"— type optim.warmup_steps={steps // 10}"
        )


def _combination_problems(config: Config, shape: ModelShape | None) -> Iterator[str]:
    engine, method, base = config.engine, config.method, config.method.base
    deepspeed = engine.kind is EngineKind.deepspeed
    if not 0 <= engine.zero <= 3:
        yield f"engine.zero={engine.zero}: ZeRO has stages 0 to 3 — type engine.zero=2"
    elif engine.offload and not deepspeed:
        yield "engine.offload=true: only DeepSpeed offloads — type engine=deepspeed, or engine.offload=false"
    elif engine.offload and engine.zero < 2:
        yield f"engine.offload=true: ZeRO {engine.zero} keeps the optimizer on the card — type engine.zero=2"
    if base is not Base.as_is and method.kind is MethodKind.full:
        recipe = "qlora" if base is Base.nf4 else "lora_int8"
        yield (
            f"method.base={base.value}: a quantised base stays frozen and method.kind=full trains it "
            f"— type method={recipe}, or method.base=as_is"
        )
    elif base is not Base.as_is and deepspeed and engine.zero == 3:
        yield (
            f"engine.zero=3: splits weights into flat pieces, which tears a {base.value} base from the scales it is "
            "stored with — type engine.zero=2"
        )
    if method.kind is MethodKind.lora and shape:
        try:
            if not shape.adapted(method.targets):
                yield "method.targets=[]: no layer gets an adapter — type method.targets=[all-linear]"
        except ValueError as error:
            yield str(error)
    if shape and config.data.max_tokens > shape.max_positions:
        yield (
            f"data.max_tokens={config.data.max_tokens}: {shape.name} knows {shape.max_positions} positions "
            f"— type data.max_tokens={shape.max_positions}"
        )


def _hardware_problems(
    config: Config, machine: Machine, world_size: int, local_size: int, shape: ModelShape | None
) -> Iterator[str]:
    wanted, compute = config.hardware.card, config.precision.compute
    if wanted not in ("cpu", "any", *CARDS):
        yield f"hardware.card={wanted}: no such row — type one of cpu, any, {', '.join(CARDS)}"
        return
    on_cpu, card = _target(config, machine)
    if on_cpu and compute is Compute.fp16:
        yield "precision.compute=fp16: on a CPU half precision is slower than fp32, and overflows — type precision=fp32"
    if card and compute is Compute.bf16 and card.capability[0] < 8:
        yield (
            f"precision.compute=bf16: the {card.key} has no bf16 units (compute capability {card.capability[0]}."
            f"{card.capability[1]}, they come with 8.0) and emulates it slowly — type precision=fp16"
        )
    size_gib = _size_gib(config, world_size, shape, on_cpu) if shape else 0.0

    needed = config.hardware.count or world_size
    if card and machine.kind == "cpu":
        predicted = f", {size_gib:.1f} predicted" if shape else ""
        advice = "type hardware=cpu precision=fp32 to run this very experiment here, or +exp=lora_cpu, made for a CPU"
        if shape:
            as_fp32 = _with(config, {"precision.compute": Compute.fp32})
            on_cpu_gib, ram_gib = _size_gib(as_fp32, world_size, shape, True), machine.ram_gib / local_size
            if on_cpu_gib > ram_gib:
                advice = (
                    f"it would not fit here either ({on_cpu_gib:.1f} of {ram_gib:.1f} GiB a rank); +exp=lora_cpu does"
                )
        yield (
            f"hardware.card={wanted}: needs {needed} x {wanted} ({card.memory_gib:g} GiB each{predicted}), "
            f"here is {machine} — {advice}"
        )
        return
    if not on_cpu:
        here = find_card(machine.device_names[0])
        if wanted != "any" and (here is None or here.key != wanted):
            words = f"hardware.card={here.key}" if here else "hardware.card=any"
            yield f"hardware.card={wanted}: here is {machine.device_names[0]} — type {words}"
        if local_size > len(machine.device_names):
            cards = len(machine.device_names)
            yield (
                f"hardware.card={wanted}: {local_size} ranks on this machine, but {cards} x {machine.device_names[0]} "
                f"— start {cards} here: deepspeed --num_gpus {cards} train.py ..."
            )
        elif needed != world_size:
            yield (
                f"hardware.count={needed}: {world_size} started — deepspeed --num_gpus {needed} train.py ..., or type "
                f"hardware.count={world_size}"
            )
    limit_gib = _limit_gib(machine, on_cpu, local_size)
    if shape and limit_gib and size_gib > limit_gib:
        yield _too_large(config, world_size, shape, limit_gib, on_cpu)


def _too_large(config: Config, world_size: int, shape: ModelShape, limit_gib: float, on_cpu: bool) -> str:
    """The line for a model that does not fit, with the three settings that save most and what they would leave."""
    size_gib, tokens, train = _size_gib(config, world_size, shape, on_cpu), config.data.max_tokens, config.train
    lora, as_is = config.method.kind is MethodKind.lora, config.method.base is Base.as_is
    zero = config.engine.zero if config.engine.kind is EngineKind.deepspeed else -1
    remedies: list[tuple[bool, str, dict[str, Any]]] = [
        (lora and as_is and zero != 3, "method.base=nf4", {"method.base": Base.nf4}),
        (not lora, "method=lora", {"method.kind": MethodKind.lora}),
        (not config.engine.checkpointing, "engine.checkpointing=true", {"engine.checkpointing": True}),
        (train.micro_batch > 1, "train.micro_batch=1", {"train.micro_batch": 1}),
        (0 <= zero < 3 and world_size > 1 and as_is, "engine.zero=3", {"engine.zero": 3}),
        (zero in (2, 3) and not lora and not on_cpu, "engine.offload=true", {"engine.offload": True}),
        (tokens >= 256, f"data.max_tokens={tokens // 2}", {"data.max_tokens": tokens // 2}),
    ]

    def after(changes: Mapping[str, Any]) -> float:
        return _size_gib(_with(config, changes), world_size, shape, on_cpu)

    possible = sorted(
        ((after(changes), words, changes) for fits, words, changes in remedies if fits), key=lambda x: x[0]
    )
    best = [remedy for remedy in possible if remedy[0] < size_gib][:3]
    advice = [f"{words} ({gib:.1f} GiB)" for gib, words, _ in best]
    if len(best) > 1 and best[0][0] > limit_gib:
        together = after({path: value for _, _, changes in best for path, value in changes.items()})
        advice.append(f"all of them ({together:.1f} GiB)")
    return (
        f"data.max_tokens={tokens}: {shape.name} with {max(1, train.micro_batch)} x {tokens} tokens needs "
        f"{size_gib:.1f} GiB a rank, and the {'RAM of a rank' if on_cpu else 'card'} is {limit_gib:.1f} GiB "
        f"— type {', or '.join(advice) or 'model= a smaller one'}"
    )


def _size_gib(config: Config, world_size: int, shape: ModelShape, on_cpu: bool) -> float:
    """Memory of a rank with the smallest micro-batch that the config allows."""
    tokens = max(1, config.train.micro_batch) * config.data.max_tokens
    return sum(memory_gib(shape, config, world_size, tokens, cpu=on_cpu).values())


def _with(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with some keys changed, by their dotted paths."""
    for path, value in changes.items():
        section, key = path.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


# --- what follows --------------------------------------------------------------------------------------------------


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
    counted = _with(config, {"data.max_tokens": longest_tokens or config.data.max_tokens})
    found = unknown + problems(counted, machine, world_size, shape, local_size=local_size, steps=steps)
    if found or shape is None:
        raise PlanError(found)

    on_cpu, card = _target(config, machine)
    local_size = local_size or world_size
    limit_gib = _limit_gib(machine, on_cpu, local_size)
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


def _target(config: Config, machine: Machine) -> tuple[bool, Card | None]:
    """Whether the run is meant for the CPU, and the row of the card it is meant for (None: a CPU, or no row)."""
    wanted = config.hardware.card
    if wanted == "cpu" or (wanted == "any" and machine.kind == "cpu"):
        return True, None
    return False, find_card(machine.device_names[0]) if wanted == "any" else CARDS[wanted]


def _limit_gib(machine: Machine, on_cpu: bool, local_size: int) -> float:
    return machine.ram_gib / local_size if on_cpu else min(machine.memory_gib[:local_size], default=0.0)


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
        for path, value in _leaves(config)
        if not any(path == out or path.startswith(f"{out}.") for out in NOT_IN_RUN_ID)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:8]


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, plain value) of every setting; a whole number in a float field counts as that float."""
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        elif isinstance(value, Enum):
            yield prefix + item.name, value.value
        else:
            yield prefix + item.name, float(value) if item.type == "float" else value


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
