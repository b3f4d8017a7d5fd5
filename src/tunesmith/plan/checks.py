"""What is wrong with a config on this machine with this many ranks: everything at once, a line each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

from tunesmith.config import (
    Base,
    Batching,
    Compute,
    Config,
    EngineKind,
    Int8,
    Liger,
    Method,
    MethodKind,
    Optim,
    OptimizerKind,
    Policy,
    Refusal,
    changed,
    leaves,
)
from tunesmith.hardware import CARDS, Card, Machine, find_card
from tunesmith.peaks import given_peak
from tunesmith.plan.memory import memory_gib
from tunesmith.plan.optimizers import SETTINGS
from tunesmith.plan.shapes import ModelShape, gathers_by_hooks, multiplies_int8, without_liger


class PlanError(Refusal):
    """A config that cannot run as asked: its text has one problem a line."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


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
    found += [*_patience_problems(config), *_data_problems(config), *_combination_problems(config, shape, world_size)]
    if config.method.cache_frozen and 0 < local_size < world_size:
        found.append(
            f"method.cache_frozen=true: ranks read one file, and one that {math.ceil(world_size / local_size)} machines write is not the "
            "same on each of them right away — type method.cache_frozen=false, or start all ranks on one machine"
        )
    unclear = (*(f"method.{name}" for name in ("r", "targets", *ONLY_LORA, "virtual_tokens")), "data.max_tokens", "engine.checkpoint_every")
    if any(line.partition("=")[0] in unclear for line in found):
        shape = None  # memory cannot be predicted from numbers that make no sense
    return [*found, *_hardware_problems(config, machine, world_size, local_size or world_size, shape)]


_RULES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    (
        "method.r data.max_tokens data.prepare_train data.prepare_test train.conversations_per_step train.keep "
        "train.micro_batch train.log_every method.virtual_tokens engine.checkpoint_every eval.max_new_tokens eval.batch engine.timeout_s",
        "must be at least 1",
        lambda value: value >= 1,
    ),
    ("optim.lr optim.eps method.alpha method.b_lr_ratio tracker.init_timeout_s", "must be above 0", lambda value: value > 0),
    (
        "method.dropout optim.beta1 optim.beta2 optim.momentum optim.label_smoothing",
        "must be at least 0 and below 1",
        lambda value: 0 <= value < 1,
    ),
    ("method.last_layer", "must be a layer's number, or -1 for the last", lambda value: value >= -1),
    ("optim.min_lr_ratio optim.decay_share", "must be between 0 and 1", lambda value: 0 <= value <= 1),
)


def _number_problems(config: Config) -> Iterator[str]:
    rules = {path: (words, fits) for paths, words, fits in _RULES for path in paths.split()}
    defaults = dict(leaves(Config()))
    for path, value in leaves(config):
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
    train = config.train
    per_step = 0 if train.tokens_per_step else train.conversations_per_step  # in tokens, ranks need not get equally many
    if per_step >= 1 and per_step % world_size:
        nearest = max(1, round(per_step / world_size)) * world_size
        yield (
            f"train.conversations_per_step={per_step}: does not divide by {world_size} ranks, and each takes as many "
            f"— type train.conversations_per_step={nearest}"
        )
    elif train.least_micro_batch > (share := per_step // world_size) >= 1:
        yield (
            f"train.micro_batch={train.micro_batch}: a rank has only {share} of a step's {per_step} conversations "
            f"({per_step} / {world_size} ranks) — type train.micro_batch={share}, or train.micro_batch=auto"
        )
    steps = train.steps or steps
    if 0 < steps <= config.optim.warmup_steps:
        yield (
            f"optim.warmup_steps={config.optim.warmup_steps}: the run has only {steps} steps, so lr would never arrive "
            f"— type optim.warmup_steps={steps // 10}"
        )


def _patience_problems(config: Config) -> Iterator[str]:
    train = config.train
    if train.patience > 0 and not config.data.dev:
        yield f"train.patience={train.patience}: there is no held-out loss to wait for — type data.dev= a file, or train.patience=0"
    if train.patience > 0 and train.eval_every == 0:
        yield f"train.patience={train.patience}: train.eval_every=0 measures at the end only — type train.eval_every=50"


CANNOT_BE_KEPT = ("broken_json", "not_utf8", "nul", "malformed", "unknown_role", "loss_not_boolean", "tool_without_name", "no_target")
TEMPLATES = ("auto", "own", "chatml", "llama3", "chatglm3")


def _data_problems(config: Config) -> Iterator[str]:
    for kind in CANNOT_BE_KEPT:
        if getattr(config.data.check, kind) is Policy.keep:
            yield f"data.check.{kind}=keep: there is nothing that could be kept — type data.check.{kind}=skip"
    template = config.data.template
    if template not in TEMPLATES and not template.endswith((".jinja", ".j2")):
        yield f"data.template={template}: unknown — type one of {', '.join(TEMPLATES)}, or the path of a .jinja file"
    elif template not in TEMPLATES and not Path(template).is_file():
        yield f"data.template={template}: no such file — type its path, or one of {', '.join(TEMPLATES)}"


def _combination_problems(config: Config, shape: ModelShape | None, world_size: int) -> Iterator[str]:
    engine, method, base = config.engine, config.method, config.method.base
    deepspeed = engine.kind is EngineKind.deepspeed
    if not 0 <= engine.zero <= 3:
        yield f"engine.zero={engine.zero}: ZeRO has stages 0 to 3 — type engine.zero=2"
    elif engine.offload and not deepspeed:
        yield "engine.offload=true: only DeepSpeed offloads — type engine=deepspeed, or engine.offload=false"
    elif engine.offload and engine.zero < 2:
        yield f"engine.offload=true: ZeRO {engine.zero} keeps the optimizer on the card — type engine.zero=2"
    yield from _fsdp_problems(config, world_size)
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
    if config.precision.int8 is Int8.dynamic and base is not Base.int8:
        yield f"precision.int8=dynamic: method.base={base.value} has nothing in int8 — type precision.int8=bnb, or method=lora_int8"
    if layers := config.precision.fp32_layers:
        named = f"precision.fp32_layers=[{','.join(layers)}]"
        if config.precision.compute is Compute.fp32:
            yield f"{named}: every layer computes in fp32 — type precision.fp32_layers=[]"
        elif engine.kind is EngineKind.deepspeed:
            yield f"{named}: DeepSpeed turns every weight into {config.precision.compute.value} — type engine=accelerate"
        elif engine.fsdp:
            yield f"{named}: FSDP2 casts all weights of a layer alike — type engine=accelerate engine.fsdp=false"
        elif base is Base.int8 and config.precision.int8 is Int8.bnb:
            yield f"{named}: bitsandbytes multiplies int8 layers in fp16 alone — type precision.int8=dynamic, or method.base=nf4"
    if engine.checkpoint_every > 1 and not engine.checkpointing:
        yield f"engine.checkpoint_every={engine.checkpoint_every}: nothing is recomputed — type engine.checkpointing=true"
    yield from _optimizer_problems(config)
    yield from _method_problems(config, shape)
    if method.cache_frozen:
        yield from (f"method.cache_frozen=true: {line}, or method.cache_frozen=false" for line in _cache_problems(config, shape))
    virtual = method.virtual_tokens if method.kind in (MethodKind.prefix, MethodKind.prompt) else 0
    if shape and config.data.max_tokens + virtual > shape.max_positions:
        behind = f", {virtual} of them for virtual tokens" if virtual else ""
        yield (
            f"data.max_tokens={config.data.max_tokens}: {shape.name} knows {shape.max_positions} positions{behind} "
            f"— type data.max_tokens={shape.max_positions - virtual}"
        )


def _fsdp_problems(config: Config, world_size: int) -> Iterator[str]:
    engine, method, optim = config.engine, config.method, config.optim.name
    if not engine.fsdp:
        return
    if engine.kind is EngineKind.deepspeed:
        yield "engine.fsdp=true: DeepSpeed splits weights by ZeRO 3 — type engine=fsdp, or engine.zero=3 engine.fsdp=false"
    if world_size == 1:
        yield (
            "engine.fsdp=true: nothing to shard on 1 rank — type engine=accelerate engine.fsdp=false, or start several: "
            "torchrun --nproc-per-node 2 train.py ..."
        )
    if method.base is not Base.as_is:
        yield (
            f"engine.fsdp=true: cuts weights into pieces, which tears a {method.base.value} base from the scales it is stored with "
            "— type engine.fsdp=false, or method.base=as_is"
        )
    if optim not in (OptimizerKind.adamw, OptimizerKind.sgd):
        why = "needs the rows and columns of whole matrices" if optim is OptimizerKind.adafactor else "has kernels for whole tensors only"
        yield f"optim.name={optim.value}: {why}, and engine.fsdp=true leaves pieces — type optim.name=adamw, or engine.fsdp=false"
    if config.precision.compute is Compute.fp16:
        yield (
            "engine.fsdp=true: fp16's loss scaling is not tried on gradients in pieces, and no CPU can try it "
            "— type precision=bf16, or engine.fsdp=false"
        )


def _optimizer_problems(config: Config) -> Iterator[str]:
    engine, optim, defaults = config.engine, config.optim, Optim()
    for name, readers in SETTINGS.items():
        value, default = getattr(optim, name), getattr(defaults, name)
        if value != default and optim.name not in readers:
            yield f"optim.{name}={value}: {optim.name.value} has none — type optim.{name}={default}, or optim.name={readers[0].value}"
    if optim.name is OptimizerKind.adafactor and engine.kind is EngineKind.deepspeed and (
        engine.zero > 0 or config.precision.compute is not Compute.fp32
    ):
        why = f"ZeRO {engine.zero}" if engine.zero else f"DeepSpeed's {config.precision.compute.value} mode"
        yield (
            f"optim.name=adafactor: keeps a number for each row and column of a matrix, and {why} lays all weights out in one flat "
            "piece — type optim.name=adamw_8bit, or engine=accelerate"
        )
    if optim.name is OptimizerKind.paged_adamw_8bit and engine.kind is EngineKind.deepspeed:
        elsewhere = "engine=accelerate engine.offload=false" if engine.offload else "engine=accelerate"
        yield (
            f"optim.name=paged_adamw_8bit: DeepSpeed puts a resumed state onto the card, outside of pages — type {elsewhere}, "
            "optim.name=adamw_8bit, or optim.name=adamw engine.offload=true"
        )
    elif optim.name is OptimizerKind.adamw_8bit and engine.kind is EngineKind.deepspeed and engine.offload:
        yield (
            "optim.name=adamw_8bit: saves memory of the card, and engine.offload=true keeps none of the optimizer there "
            "— type optim.name=adamw, or engine.offload=false"
        )


ONLY_LORA = ("rslora", "dora", "alora", "b_lr_ratio", "first_layer", "last_layer", "modules_to_save")
"""Settings of method that mean something to adapters alone."""


def _method_problems(config: Config, shape: ModelShape | None) -> Iterator[str]:
    method, defaults = config.method, Method()
    if method.kind is not MethodKind.lora:
        for name in ONLY_LORA:
            value, default = getattr(method, name), getattr(defaults, name)
            if value != default:
                said = ",".join(value) if isinstance(value, list) else str(value).lower()
                instead = f"method.{name}={str(default).lower()}"
                yield f"method.{name}={said}: method.kind={method.kind.value} has no adapters — type {instead}, or method=lora"
        return
    if method.dora and method.base is Base.int8 and config.precision.int8 is Int8.dynamic:
        yield (
            "method.dora=true: PEFT measures the rows of a weight in floats, and precision.int8=dynamic has none — type method.base=nf4, "
            "or method.dora=false"
        )
    elif method.dora and method.base is Base.int8:
        yield (
            "method.dora=true: PEFT loses an int8 layer's scales when it measures the rows of its weight (a CPU's forward fails, a card's "
            "is untested) — type method.base=nf4, or method.dora=false"
        )
    if method.dora and config.engine.kind is EngineKind.deepspeed and config.engine.zero == 3:
        yield "method.dora=true: measures whole weights outside their layers, and ZeRO 3 leaves a part of each there — type engine.zero=2"
    if method.alora and method.dora:
        yield "method.alora=true: PEFT has no DoRA that acts from a place on — type method.dora=false"
    if method.alora and method.modules_to_save:
        yield (
            f"method.modules_to_save={','.join(method.modules_to_save)}: what stands before the user's turn is read once, by a model that "
            "does not change (method.alora=true) — type method.modules_to_save=[]"
        )
    if method.alora and method.cache_frozen:
        yield "method.cache_frozen=true: not tried with method.alora=true — type method.cache_frozen=false"
    if method.alora and (config.engine.fsdp or (config.engine.kind is EngineKind.deepspeed and config.engine.zero == 3)):
        yield "method.alora=true: not tried with weights in pieces — type engine.zero=2, or engine=accelerate engine.fsdp=false"
    if not shape:
        return
    last = method.last_layer
    if last >= shape.layers or 0 <= last < method.first_layer:
        yield (
            f"method.last_layer={last}: {shape.name} has layers 0 to {shape.layers - 1}, and method.first_layer={method.first_layer} "
            "is the lowest with an adapter — type method.last_layer=-1"
        )
    if method.first_layer >= shape.layers:
        yield (
            f"method.first_layer={method.first_layer}: {shape.name} has layers 0 to {shape.layers - 1}, and none would get an adapter "
            f"— type method.first_layer={shape.layers // 2}"
        )
    try:
        if not shape.adapted(method.targets):
            yield "method.targets=[]: no layer gets an adapter — type method.targets=[all-linear]"
        shape.trained_ends(method)
    except ValueError as error:
        yield str(error)


def _cache_problems(config: Config, shape: ModelShape | None) -> Iterator[str]:
    """Why what enters the lowest trained layer would not be the same each time, or not be computed twice: the fact, what to type."""
    engine, method, optim = config.engine, config.method, config.optim
    middle = max(1, shape.layers // 2) if shape else 1
    if method.kind is not MethodKind.lora:
        trained = "every layer" if method.kind is MethodKind.full else f"a {method.kind.value} that every layer sees"
        yield f"method.kind={method.kind.value} trains {trained} — type method=lora method.first_layer={middle}"
        return
    if method.first_layer == 0:
        yield f"method.first_layer=0 trains every layer from the lowest on — type method.first_layer={middle}"
    with suppress(ValueError):  # of a name that _method_problems tells
        if shape and "embed_tokens" in shape.trained_ends(method):
            tied = "" if "embed_tokens" in method.modules_to_save else ", which is the head too"
            yield f"method.modules_to_save trains the embedding{tied}, below all layers — type method.modules_to_save=[]"
    if optim.neftune_alpha > 0:
        yield f"optim.neftune_alpha={optim.neftune_alpha:g} puts other noise below all layers each time — type optim.neftune_alpha=0"
    if method.base is Base.int8:
        yield "method.base=int8 rounds a token's numbers by what is in the micro-batch beside it — type method.base=as_is"
    if config.precision.fp32_layers:
        yield "precision.fp32_layers makes states of a type that is not planned for — type precision.fp32_layers=[]"
    if gathers_by_hooks(engine) or engine.fsdp:
        name, instead = ("engine.fsdp=true", "engine.fsdp=false") if engine.fsdp else ("engine.zero=3", "engine.zero=2")
        yield f"under {name} all ranks gather every layer together, and none may leave one out — type {instead}"
    if config.data.streaming:
        yield "data.streaming=true keeps no tokens, by which a state is found — type data.streaming=false"
    if config.train.steps == 0 and 0 < config.train.epochs <= 1:
        yield f"train.epochs={config.train.epochs:g} computes nothing twice — type train.epochs=3"


def _hardware_problems(
    config: Config, machine: Machine, world_size: int, local_size: int, shape: ModelShape | None
) -> Iterator[str]:
    wanted, compute = config.hardware.card, config.precision.compute
    if wanted not in ("cpu", "any", *CARDS):
        yield f"hardware.card={wanted}: no such row — type one of cpu, any, {', '.join(CARDS)}"
        return
    on_cpu, card = target(config, machine)
    if on_cpu and config.optim.name is OptimizerKind.paged_adamw_8bit:
        yield (
            "optim.name=paged_adamw_8bit: pages go between a CUDA card and the machine's memory, and this run has no card "
            "— type optim.name=adamw_8bit"
        )
    if on_cpu and compute is Compute.fp16:
        yield "precision.compute=fp16: on a CPU half precision is slower than fp32, and overflows — type precision=fp32"
    if card and compute is Compute.bf16 and card.capability[0] < 8:
        yield (
            f"precision.compute=bf16: the {card.key} has no bf16 units (compute capability {card.capability[0]}."
            f"{card.capability[1]}, they come with 8.0) and emulates it slowly — type precision=fp16"
        )
    if card and multiplies_int8(config) and "int8" not in card.peak:
        yield (
            f"precision.int8=dynamic: the {card.key} has no int8 units (compute capability {card.capability[0]}."
            f"{card.capability[1]}, they come with 7.5) — type precision.int8=bnb method.base=nf4"
        )
    # A card of no row says itself what it is, when the model is built.
    without = without_liger(config, card.capability if card else None, not (shape and shape.fused)) if on_cpu or card else ""
    if without and config.engine.liger is Liger.on:
        yield f"engine.liger=on: {without} — type engine.liger=auto"
    size_gib = least_gib(config, world_size, shape, on_cpu) if shape else 0.0

    needed = config.hardware.count or world_size
    if card and machine.kind == "cpu":
        predicted = f", {size_gib:.1f} predicted" if shape else ""
        advice = "type hardware=cpu precision=fp32 to run this very experiment here, or +exp=lora_cpu, made for a CPU"
        if shape:
            as_fp32 = changed(config, {"precision.compute": Compute.fp32})
            on_cpu_gib, ram_gib = least_gib(as_fp32, world_size, shape, True), machine.ram_gib / local_size
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
    limit_gib = device_gib(machine, on_cpu, local_size)
    if shape and limit_gib and size_gib > limit_gib:
        yield _too_large(config, world_size, shape, limit_gib, on_cpu)


def _too_large(config: Config, world_size: int, shape: ModelShape, limit_gib: float, on_cpu: bool) -> str:
    """The line for a model that does not fit, with the nearest three ways that do: fewest changes first."""
    size_gib, tokens, train = least_gib(config, world_size, shape, on_cpu), config.data.max_tokens, config.train
    full = config.method.kind is MethodKind.full
    quantisable = not full and config.method.base is Base.as_is
    zero = config.engine.zero if config.engine.kind is EngineKind.deepspeed else -1
    # In the order of what they cost: first those that leave the result as it is.
    remedies: list[tuple[bool, str, dict[str, Any]]] = [
        (not config.engine.checkpointing, "engine.checkpointing=true", {"engine.checkpointing": True}),
        (config.engine.checkpoint_every > 1, "engine.checkpoint_every=1", {"engine.checkpoint_every": 1}),
        (train.least_micro_batch > 1, "train.micro_batch=1", {"train.micro_batch": 1}),
        (0 <= zero < 3 and world_size > 1, "engine.zero=3", {"engine.zero": 3}),
        (zero < 0 and not config.engine.fsdp and world_size > 1, "engine=fsdp", {"engine.fsdp": True}),
        (zero in (2, 3) and not config.engine.offload and not on_cpu, "engine.offload=true", {"engine.offload": True}),
        (quantisable, "method.base=int8", {"method.base": Base.int8}),
        (quantisable, "method.base=nf4", {"method.base": Base.nf4}),
        *(
            (quantisable and config.engine.fsdp, f"engine.fsdp=false method.base={base.value}", {"engine.fsdp": False, "method.base": base})
            for base in (Base.int8, Base.nf4)
        ),
        (full, "method=lora", {"method.kind": MethodKind.lora}),
        (tokens >= 256, f"data.max_tokens={tokens // 2}", {"data.max_tokens": tokens // 2}),
        (tokens >= 512, f"data.max_tokens={tokens // 4}", {"data.max_tokens": tokens // 4}),
    ]

    def after(changes: Iterable[Mapping[str, Any]]) -> float:
        together = {path: value for change in changes for path, value in change.items()}
        if not goes_with(config, together, world_size, shape):
            return math.inf  # as a quantised base with ZeRO 3: torn from its scales
        return least_gib(changed(config, together), world_size, shape, on_cpu)

    possible = [(words, changes) for fits, words, changes in remedies if fits]
    found: list[tuple[tuple[str, ...], float]] = []
    roomier: list[tuple[tuple[str, ...], float]] = []  # where less is enough: they leave room for more tokens
    for count in (1, 2, 3):
        for chosen in combinations(possible, count):
            words = tuple(word for word, _ in chosen)
            paths = [path for _, changes in chosen for path in changes]
            if len(set(paths)) < len(paths):
                continue  # it says a thing twice
            enough = any(set(fewer) <= set(words) for fewer, _ in found)
            if (not enough or count == 2) and (gib := after(changes for _, changes in chosen)) <= limit_gib:
                (roomier if enough else found).append((words, gib))
        if len(found) >= 3:
            break
    found += roomier
    advice = ", or ".join(f"{' '.join(words)} ({gib:.1f} GiB)" for words, gib in found[:3])
    if not advice:
        least = min((after([changes]) for _, changes in possible), default=size_gib)
        advice = f"model= a smaller one: no three settings are enough (the best single one leaves {least:.1f} GiB)"
    return (
        f"data.max_tokens={tokens}: {shape.name} with {train.least_micro_batch} x {tokens} tokens needs "
        f"{size_gib:.1f} GiB a rank, and the {'RAM of a rank' if on_cpu else 'card'} is {limit_gib:.1f} GiB — type {advice}"
    )


def goes_with(config: Config, changes: Mapping[str, Any], world_size: int, shape: ModelShape | None = None) -> bool:
    """Whether changes bring no problem between settings that the config has not already."""
    already = set(_combination_problems(config, shape, world_size))
    return already.issuperset(_combination_problems(changed(config, changes), shape, world_size))


def least_gib(config: Config, world_size: int, shape: ModelShape, on_cpu: bool) -> float:
    """Memory of a rank with the smallest micro-batch that the config allows."""
    tokens = config.train.least_micro_batch * config.data.max_tokens
    return sum(memory_gib(shape, config, world_size, tokens, cpu=on_cpu).values())


def target(config: Config, machine: Machine) -> tuple[bool, Card | None]:
    """Whether the run is meant for the CPU, and the row of the card it is meant for (None: a CPU, or no row)."""
    wanted = config.hardware.card
    if wanted == "cpu" or (wanted == "any" and machine.kind == "cpu"):
        return True, None
    return False, find_card(machine.device_names[0]) if wanted == "any" else CARDS[wanted]


def device_gib(machine: Machine, on_cpu: bool, local_size: int) -> float:
    """GiB of the smallest device that a rank gets (its share of RAM on a CPU); 0.0 if unknown."""
    return machine.ram_gib / local_size if on_cpu else min(machine.memory_gib[:local_size], default=0.0)


def varies(config: Config) -> bool:
    """Whether steps differ in how many micro-batches they need, and not only the last one of an epoch."""
    return config.train.tokens_per_step > 0 or config.data.batching is Batching.packed
