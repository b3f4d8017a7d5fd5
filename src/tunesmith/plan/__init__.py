"""From a config, a machine and a number of ranks to a frozen plan, before anything heavy is imported or started.

`problems` (checks.py) says everything that is wrong at once; `make_plan` derives what follows from the settings: batch arithmetic,
memory, FLOPs, DeepSpeed's own config and the run's id; auto.py says what can be chosen where a setting is left to the plan; `describe`
prints it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith import matmul
from tunesmith.config import AUTO, NOT_IN_RUN_ID, Batching, Compute, Config, Method, Train, changed, leaves
from tunesmith.hardware import Machine
from tunesmith.peaks import overheads, peak_flops
from tunesmith.plan.auto import KEPT, engine_choices, left_to_plan, said_left, with_type
from tunesmith.plan.checks import PlanError, device_gib, problems, target, varies
from tunesmith.plan.deepspeed import deepspeed_config
from tunesmith.plan.flops import Flops, step_flops
from tunesmith.plan.memory import BYTES, TARGET_SHARE, memory_gib, state_number_bytes, tiles_gib
from tunesmith.plan.network import traffic
from tunesmith.plan.notes import notes
from tunesmith.plan.optimizers import state_bytes
from tunesmith.plan.pace import checkpoint_gib, step_seconds
from tunesmith.plan.shapes import ModelShape, above_frozen, gathers_by_hooks, multiplies_int8, shape_needs_files, shape_of
from tunesmith.plan.words import beside, describe, engine_words, method_words

__all__ = [
    "KEPT", "UNCOUNTED", "Cache", "Counts", "Flops", "ModelShape", "Plan", "PlanError", "above_frozen", "beside", "describe",
    "engine_choices", "make_plan", "memory_gib", "problems", "run_id", "shape_needs_files", "shape_of", "state_bytes", "step_flops",
    "steps_per_epoch", "trained_weights", "with_type",
]  # fmt: skip

ROOM = 0.92
"""Share of a device's memory that the plan fills: the rest is for fragmentation and what the model does not know."""
CPU_TOKENS = 1024
"""Tokens in one forward on a CPU, common beginnings left out, that more of them would not be much faster than, and memory grows with them:
830 are as fast as 1,660 on an Intel CPU, with two thirds of the memory, and cost an AMD one 8 % (docs/log.md). Behind a common beginning
of more than half of that, twice the beginning's own: each micro-batch computes it, and so it is a third of the work at most."""


@dataclass(frozen=True)
class Counts:
    """What is known of the training data; nothing of it before it has been read."""

    conversations: int | None = None
    tokens: int = 0
    """Of all of them."""
    longest_tokens: int = 0
    common_tokens: int = 0
    """That all begin with, and a micro-batch computes once."""
    beginning: int = 0
    """Tokens that are read once for all, before the run (method.alora)."""
    beginnings: int = 0
    """States that method.cache_frozen keeps."""


UNCOUNTED = Counts()

@dataclass(frozen=True)
class Cache:
    """What method.cache_frozen takes and saves."""

    tokens: int
    """States that are kept: one for each token of the training data, common beginnings once; 0 until counted."""
    number_bytes: int
    """Bytes of a number of a state."""
    flops: Flops
    """Of the step of Plan.flops whose states are all there."""
    time: dict[str, float]
    """Predicted seconds of such a step by part, reading left out; empty where Plan.time is."""


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
    """The mean where steps are in tokens; until counted, what they hold at least."""
    tokens_per_step: int
    """Tokens of a step, the mean of an epoch where counted; 0: steps are in conversations."""
    micro_batch: int
    """Conversations in a forward on one rank, at most; rows where they are packed."""
    packed: bool
    """Conversations share rows of longest_tokens tokens."""
    accumulation: int
    """Micro-batches in a step on each rank; packed, or with steps in tokens, that of an average step at most."""
    world_size: int
    local_size: int
    """Ranks on this machine, and on each of the others."""
    sent: float
    """Bytes that a rank sends in a step, and with ranks on several machines each machine's network too (plan/network.py)."""
    card: str
    """What it runs on: cpu, a row of the card table, or the device's own name where the table has none."""
    threads: int
    """CPU threads a rank."""
    method: str
    """Precision, method and engine in words."""
    shape: ModelShape
    trained_weights: int
    memory: dict[str, float]
    """GiB of each part on one rank, if every conversation of a micro-batch had longest_tokens tokens, on a CPU common beginnings once."""
    tiles: bool
    """Frozen weights are kept in the order of AMX's tiles too: a CPU has those, and memory for that."""
    memory_limit_gib: float
    """What a rank's device has (a rank's share of RAM on a CPU); 0.0 if unknown."""
    longest_tokens: int
    """Longest conversation: data.max_tokens until the data has been counted, and where rows are packed to that."""
    beginning: int
    """Tokens that are read once for all conversations, and count in no step (method.alora); 0 until the data has been read."""
    flops: Flops
    """Of a step in which every conversation had longest_tokens tokens, all of them targets: an upper bound, but for padding
    where steps are in tokens."""
    attention_cost: float
    """What attention adds to the cost of a conversation of n tokens: n + attention_cost * n^2, in units of a token's linear layers."""
    peak_flops: float | None
    """FLOPS of one rank's device that MFU divides by; None: unknown, or measured when the run starts."""
    peak_note: str
    deepspeed: dict[str, Any]
    """DeepSpeed's config; empty with engine=accelerate."""
    notes: list[str]
    expected_tokens: int
    """Tokens of a step that its time is predicted for: the mean of the data, or as if each conversation had longest_tokens."""
    time: dict[str, float]
    """Predicted seconds of a step by part (plan/pace.py); empty where the device's peak is unknown or not measured yet."""
    disk: tuple[float, float]
    """GiB of one checkpoint, and of the result."""
    cache: Cache | None
    """None without method.cache_frozen."""
    config: Config = field(repr=False)
    """What the run does: the settings as given, and what was left to the plan as it has chosen."""

    @property
    def memory_gib(self) -> float:
        """All parts of one rank together."""
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step; 0.0 if unknown."""
        return sum(self.time.values())

    @property
    def nodes(self) -> int:
        """Machines."""
        return math.ceil(self.world_size / self.local_size)

    @property
    def efficiency(self) -> float:
        """Predicted share of a step in which a rank does not wait for others, if nothing overlaps; 0.0 if unknown."""
        return 1 - self.time["communication"] / self.step_s if self.time else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Predicted tokens a second over all ranks; 0.0 if unknown."""
        return self.expected_tokens / self.step_s if self.time else 0.0

    def predicted(self, cached: bool = False) -> dict[str, float]:
        """What a run logs beside what it measures, by metric names; a time that is unknown is left out.

        cached: for a step whose states are all in the cache of frozen layers.
        """
        found = {"plan/peak_gib": self.memory_gib}
        step_s = self.cached_step_s if cached else self.step_s
        return found | {"plan/step_s": step_s, "plan/tokens_per_s": self.expected_tokens / step_s} if step_s else found

    @property
    def cached_step_s(self) -> float:
        """Predicted seconds of a step whose states are all in the cache of frozen layers; 0.0 if unknown."""
        return sum(self.cache.time.values()) if self.cache else 0.0

    @property
    def cache_gib(self) -> float:
        """GiB on disk of the cache of frozen layers; 0.0 until the data has been counted."""
        return self.cache.tokens * self.shape.hidden * self.cache.number_bytes / 2**30 if self.cache else 0.0

    @property
    def hours(self) -> float:
        """Predicted hours of training, without evaluation and saving; 0.0 if unknown."""
        cached = self.steps - math.ceil(self.steps / max(1.0, self.epochs)) if self.cache else 0
        return ((self.steps - cached) * self.step_s + cached * self.cached_step_s) / 3600

    @property
    def cost(self) -> float:
        """Predicted price of those hours on all ranks; 0.0 if no price is given."""
        return self.hours * self.world_size * self.config.hardware.price_per_h


def make_plan(
    config: Config,
    machine: Machine,
    world_size: int,
    counts: Counts = UNCOUNTED,
    *,
    local_size: int = 0,
    model_folder: Path | None = None,
    micro_limit: int = 0,
    kept: Mapping[str, Any] | None = None,
) -> Plan:
    """Derive the plan; raises PlanError with every problem when the config cannot run as asked.

    Where the data has not been counted, the plan reckons with data.max_tokens in every conversation. local_size: ranks on this machine (0:
    all of them). model_folder: the model's files, where they are here. micro_limit: most conversations in a micro-batch, as a larger one
    ran out of memory (0: no limit). What is left to the plan, its `config` has as chosen, and runs go by that; kept: of that
    what it chose when this run began, if its checkpoints are of it.
    """

    typed_id = run_id(config)  # whatever is chosen: that may change when the data is counted, and the folder stays

    def plan(tried: Config) -> Plan:
        return _plan(tried, typed_id, machine, world_size, counts, local_size, model_folder, micro_limit)

    def chosen(typed: Config) -> Plan:
        if not (left := left_to_plan(config)):
            return plan(typed)
        choices = list(engine_choices(typed, world_size, left))
        if kept:
            choices = [choice for choice in choices if all(choice.get(path, value) == value for path, value in kept.items())]
        if not choices:
            began = ", ".join(f"{path}={json.dumps(value)}" for path, value in (kept or {}).items() if path in left)
            fact = f"this run began with {began}, which {world_size} ranks cannot have"
            raise PlanError([f"{said_left(config)}: {fact} — start as many ranks as before, or a run of its own with name=..."])
        return _fastest(typed, choices, plan)

    try:
        typed, why = with_type(config, machine, (kept or {}).get("precision.compute", ""))
    except PlanError as untyped:
        try:
            chosen(changed(config, {"precision.compute": Compute.fp16}))
        except PlanError as others:  # what is wrong whatever the type
            said = [one for one in others.problems if not one.startswith("precision.compute=fp16")]
            raise PlanError([*untyped.problems, *said]) from None
        raise
    try:
        found = chosen(typed)
    except PlanError as error:  # perhaps of another card than the one that the run began on, so say that it did
        raise PlanError([*(why if "precision.compute" in (kept or {}) else []), *error.problems]) from None
    return replace(found, notes=[*why, *found.notes])


def _fastest(config: Config, choices: Sequence[Mapping[str, Any]], plan: Callable[[Config], Plan]) -> Plan:
    """The plan with the engine settings that make a step fastest among those that fit; the first of equals.

    Raises PlanError for the last of them, the thriftiest, when none fits.
    """
    fitting: list[Plan] = []
    refusal: PlanError | None = None
    for changes in choices:
        try:
            fitting.append(plan(changed(config, {"engine.fit": False, **changes})))
        except PlanError as error:
            refusal = error
    if not fitting:
        assert refusal
        raise refusal
    best, *others = sorted(fitting, key=lambda one: one.step_s or one.flops.executed)
    beaten = f", before {engine_words(others[0].config)} ({others[0].step_s:.3g} s)" if others and others[0].step_s else ""
    note = f"{said_left(config)}: {engine_words(best.config)} is the fastest of {len(fitting)} that fit{beaten}"
    return replace(best, notes=[note, *best.notes])


def _plan(
    config: Config, typed_id: str, machine: Machine, world_size: int, counts: Counts, local_size: int, model_folder: Path | None,
    micro_limit: int,
) -> Plan:  # fmt: skip
    """The plan of a config in which nothing is left to choose but the micro-batch."""
    shape, unknown = None, []
    try:
        shape = shape_of(str(model_folder or config.model.path), config.model.known_as)
    except ValueError as error:
        unknown = [str(error)]
    train, max_tokens = config.train, config.data.max_tokens
    conversations, tokens, beginning = counts.conversations, counts.tokens, counts.beginning
    if train.tokens_per_step and not tokens:
        conversations = None  # their number alone does not say how many steps they make
    longest = max_tokens if config.data.batching is Batching.packed else counts.longest_tokens or max_tokens
    countable = train.conversations_per_step >= 1 and train.tokens_per_step >= 0 and math.isfinite(train.epochs)
    steps, epochs = _length(train, conversations, tokens) if countable else (0, 0.0)
    counted = changed(config, {"data.max_tokens": longest})
    found = unknown + problems(counted, machine, world_size, shape, local_size=local_size, steps=steps)
    if found or shape is None:
        raise PlanError(found)

    on_cpu, card = target(config, machine)
    local_size = local_size or world_size
    limit_gib = device_gib(machine, on_cpu, local_size)
    per_step, step_tokens = _size(config, conversations, tokens)
    kept_gib = shape.layers * 2 * shape.kv_width * beginning * BYTES[config.precision.compute] / 2**30  # keys and values
    room_gib = limit_gib and max(0.1, limit_gib - kept_gib)
    expected = step_tokens or per_step * (min(longest, round(tokens / conversations)) if tokens and conversations else longest)
    mean = max(1, round(expected / per_step))
    common = min(counts.common_tokens, mean - 1) if config.data.batching is Batching.ragged else 0
    in_memory = common if on_cpu else 0  # a card's kernels may want what conversations share once for each
    micro, accumulation = _split(counted, world_size, per_step, shape, longest, in_memory, mean - common, room_gib, on_cpu, micro_limit)
    threads = config.hardware.threads or max(1, machine.cores // local_size)
    # An epoch is cut within half a conversation of where it should be, so a step has up to a whole one more.
    lengths = [longest] * (step_tokens // longest + 1) + [step_tokens % longest] if step_tokens else [longest] * per_step
    peak, peak_note = peak_flops(config.hardware.peak, machine, config.precision.multiplied, cpu=on_cpu, threads=threads, measure=False)
    gain = 1.0
    if on_cpu and peak and config.precision.multiplied == "tf32":
        own, _ = peak_flops(config.hardware.peak, machine, "fp32", cpu=True, threads=threads, measure=False)
        gain = peak / own if own else 1.0
    trained = trained_weights(shape, config.method)

    def effort(shape: ModelShape, config: Config) -> tuple[Flops, dict[str, float]]:
        """FLOPs of the longest step, and seconds of a mean one."""
        seconds, forwards = {}, accumulation * world_size
        if peak:
            own, contexts = [mean - common] * per_step, [common] * per_step
            if common:  # once in each micro-batch
                own, contexts = [common] * forwards + own, [0] * forwards + contexts
            work = _flops(shape, config, own, round(mean * per_step * TARGET_SHARE), forwards, contexts, beginning)
            seconds = step_seconds(
                shape, config, None if on_cpu else card, world_size, local_size=local_size,
                work=work.of_a_rank(world_size), peak_flops=peak, gain=gain, tiles=on_cpu and machine.amx,
                tokens=max(1, math.ceil((expected - per_step * common) / forwards) + common), accumulation=accumulation, trained=trained,
                overheads=overheads(machine, threads, measure=False) if on_cpu else None,
            )  # fmt: skip
        return _flops(shape, config, lengths, sum(lengths), forwards, beginning=beginning), seconds

    flops, seconds = effort(shape, config)
    cache = None
    if config.method.cache_frozen:
        above, method = above_frozen(shape, config.method)
        cache = Cache(counts.beginnings, state_number_bytes(shape, config), *effort(above, replace(config, method=method)))
    tokens_in_memory = in_memory + micro * (longest - in_memory)
    memory = memory_gib(shape, counted, world_size, tokens_in_memory, cpu=on_cpu, accumulated=accumulation > 1)
    memory["buffers"] += kept_gib
    tiles = 0.0
    if on_cpu and machine.amx and not micro_limit:  # after running out of memory nothing is taken that only saves time
        # Where it is not known yet what multiplies, halves do.
        high = config.precision.multiplied == "tf32"
        _, measured = peak_flops("table", machine, "tf32", cpu=True, threads=threads, measure=False) if high else (None, "")
        tiles = tiles_gib(shape, config, matmul.HALVES.name in measured or not measured.startswith("measured: "))
    if limit_gib and sum(memory.values()) + tiles > ROOM * limit_gib:
        tiles = 0.0
    memory["weights"] += tiles
    plan = Plan(
        name=config.name,
        run_id=typed_id,
        steps=steps,
        epochs=epochs,
        conversations=conversations or 0,
        conversations_per_step=per_step,
        tokens_per_step=step_tokens,
        micro_batch=micro,
        packed=config.data.batching is Batching.packed,
        accumulation=accumulation,
        world_size=world_size,
        local_size=local_size,
        sent=traffic(shape, config, world_size, accumulation, trained).sent,
        card="cpu" if on_cpu else card.key if card else machine.device_names[0],
        threads=threads,
        method=method_words(config),
        shape=shape,
        trained_weights=trained,
        memory=memory,
        tiles=tiles > 0,
        memory_limit_gib=limit_gib,
        longest_tokens=longest,
        beginning=beginning,
        flops=flops,
        attention_cost=_attention_cost(shape, config),
        peak_flops=peak,
        peak_note=peak_note,
        # The engine says itself which micro-batch is a step's last. But with offload, versions of DeepSpeed accumulate only where this
        # number is above 1, and a step larger than the mean may have two micro-batches.
        deepspeed=deepspeed_config(config, micro, max(2, accumulation) if varies(config) else accumulation, on_cpu),
        notes=[],
        expected_tokens=expected,
        time=seconds,
        disk=checkpoint_gib(shape, config),
        cache=cache,
        config=config,
    )
    return replace(plan, notes=list(notes(config, plan, tokens, counts.longest_tokens, on_cpu)))


def steps_per_epoch(conversations: int, tokens: int, conversations_per_step: int, tokens_per_step: int = 0) -> int:
    """Steps in one pass over the data: as many as come nearest to tokens_per_step tokens each, else by conversations."""
    if tokens_per_step:
        return min(max(1, round(tokens / tokens_per_step)), conversations)  # each has one conversation at least
    return math.ceil(conversations / conversations_per_step)


def trained_weights(shape: ModelShape, method: Method) -> int:
    """Number of weights that the optimizer updates."""
    return shape.trained_weights(method)


def _length(train: Train, conversations: int | None, tokens: int) -> tuple[int, float]:
    """(steps, epochs). Every epoch ends with its own, perhaps short, step, so that epochs never mix."""
    if not conversations:
        return train.steps, 0.0 if train.steps else train.epochs
    per_epoch = steps_per_epoch(conversations, tokens, train.conversations_per_step, train.tokens_per_step)
    if train.steps > 0:
        return train.steps, train.steps / per_epoch
    whole = math.floor(train.epochs)
    part = train.epochs - whole
    part *= per_epoch if train.tokens_per_step else conversations / train.conversations_per_step
    rest = math.ceil(round(part, 6))  # rounded, since 0.1 is a little more than a tenth
    return whole * per_epoch + rest, train.epochs


def _size(config: Config, conversations: int | None, tokens: int) -> tuple[int, int]:
    """(conversations, tokens) of a step: means where steps are in tokens, otherwise what is set and 0."""
    train = config.train
    if not train.tokens_per_step:
        return train.conversations_per_step, 0
    if not conversations:
        return max(1, train.tokens_per_step // config.data.max_tokens), train.tokens_per_step
    steps = steps_per_epoch(conversations, tokens, train.conversations_per_step, train.tokens_per_step)
    return round(conversations / steps), round(tokens / steps)


def _split(
    config: Config,
    world_size: int,
    per_step: int,
    shape: ModelShape,
    longest: int,
    common: int,
    own: int,
    limit_gib: float,
    on_cpu: bool,
    micro_limit: int,
) -> tuple[int, int]:
    """(micro-batch, accumulation): as few micro-batches as memory allows and a CPU gains from, all of about the same size.

    longest: tokens of the longest conversation, of which `common` are computed once; own: a conversation's other tokens, on average.
    """
    share = math.ceil(per_step / world_size)
    most = config.train.least_micro_batch
    if config.train.micro_batch == AUTO:
        ceiling = min(share, max(1, max(CPU_TOKENS, 2 * common) // own)) if on_cpu else share

        def fits(micro: int) -> bool:
            computed = common + micro * (longest - common)
            parts = memory_gib(shape, config, world_size, computed, cpu=on_cpu, accumulated=micro < share)
            return not limit_gib or sum(parts.values()) <= ROOM * limit_gib

        most = 1
        while most < ceiling and fits(min(2 * most, ceiling)):
            most = min(2 * most, ceiling)
    most = min(most, micro_limit or most)
    accumulation = math.ceil(share / most)
    # Where each step has another number of conversations or rows, a smaller limit would only make more micro-batches of some.
    return most if varies(config) else math.ceil(share / accumulation), accumulation


def _attention_cost(shape: ModelShape, config: Config) -> float:
    """The a in n + a * n^2, which a conversation of n tokens costs in proportion.

    Its FLOPs without logits are F(n) = linear * n + score * n (n + 1) / 2, as attention is causal. So score is F(2) - 2 F(1), and
    F(n) is (linear + score / 2) n + score / 2 n^2.
    """
    one, two = (_flops(shape, config, [n], 0, 0).executed for n in (1, 2))
    half = (two - 2 * one) / 2
    return half / (one - half)


def _flops(
    shape: ModelShape, config: Config, lengths: list[int], targets: int, micro_batches: int, contexts: list[int] | None = None,
    beginning: int = 0,
) -> Flops:
    engine = config.engine
    return step_flops(
        shape, config.method, lengths, targets, contexts=contexts, checkpointing=engine.checkpointing,
        checkpoint_every=engine.checkpoint_every,
        micro_batches=micro_batches, gathered=gathers_by_hooks(engine), in_int8=multiplies_int8(config),
        beginning=beginning,
    )  # fmt: skip


def run_id(config: Config) -> str:
    """8 hex digits of all that changes the result: typing a default makes no difference, nor does NOT_IN_RUN_ID."""
    # Where the run's end depends on them, the steps between held-out losses change the result.
    without = {path for path in NOT_IN_RUN_ID if not (path == "train.eval_every" and config.train.patience)}
    below = tuple(f"{path}." for path in without)
    kept = {path: value for path, value in leaves(config) if path not in without and not path.startswith(below)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:8]
