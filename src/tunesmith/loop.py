"""The train loop: only verbs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.again import OutOfMemory
from tunesmith.checkpoint import Checkpoints
from tunesmith.config import Compute, Config, Optim, Refusal, Schedule
from tunesmith.data import Dataset
from tunesmith.data.batches import Batches, MicroBatch, data_line, held_out_batches, outlook
from tunesmith.engine import Engine, is_out_of_memory
from tunesmith.hardware import Machine
from tunesmith.metrics import CardSensors, Meter, Rate, Sinks
from tunesmith.model import DTYPES, FrozenStates, perplexity
from tunesmith.model.halves import LARGEST, advice, probe
from tunesmith.peaks import peak_flops
from tunesmith.plan import Plan, above_frozen, step_flops
from tunesmith.plan.shapes import gathers_by_hooks, multiplies_int8
from tunesmith.run import RunFolder, Stopped, StopSignal


@dataclass
class Training:
    """The parts that the loop drives."""

    config: Config
    plan: Plan
    engine: Engine
    batches: Batches
    dev: list[MicroBatch]
    meter: Meter
    sensors: CardSensors
    sinks: Sinks
    checkpoints: Checkpoints
    stop: StopSignal
    states: FrozenStates | None = None
    """With method.cache_frozen."""

    @classmethod
    def of(
        cls,
        config: Config,
        plan: Plan,
        engine: Engine,
        dataset: Dataset,
        machine: Machine,
        sinks: Sinks,
        saves: Checkpoints,
        stop: StopSignal,
        states: FrozenStates | None = None,
    ) -> Training:
        """Put the parts together: batches and the meter follow from the rest."""
        world = engine.world
        batches = batches_of(config, plan, dataset, states)
        dev = held_out_batches(dataset.dev, plan.micro_batch, world.rank, world.size) if dataset.dev else []
        on_cpu, compute = engine.device.type == "cpu", config.precision.multiplied
        # Rank 0 measures (alone on the cores), then the others read what it cached.
        peak, note = engine.broadcast(
            peak_flops(config.hardware.peak, machine, compute, engine.threads, cpu=on_cpu) if world.is_main else None
        )
        if world.is_main and note != plan.peak_note:
            print(f"peak     {note}")
        meter = Meter(engine.device, world.size, peak)
        return cls(config, plan, engine, batches, dev, meter, CardSensors(engine.device), sinks, saves, stop, states)


@contextmanager
def enough_memory(plan: Plan, step: int, phase: Callable[[], str]) -> Iterator[None]:
    """Tell that memory did not suffice, whichever library says so."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(step, phase(), plan.micro_batch, error) from error


def batches_of(config: Config, plan: Plan, dataset: Dataset, states: FrozenStates | None = None) -> Batches:
    """The training data as steps; states: what its micro-batches read and write."""
    train = config.train
    return Batches(
        dataset.train, train.conversations_per_step, plan.micro_batch, train.seed, config.data.batching,
        tokens_per_step=train.tokens_per_step, row=config.data.max_tokens, attention_cost=plan.attention_cost,
        beginnings=states.beginnings if states else None,
    )  # fmt: skip


def data_notes(config: Config, plan: Plan, dataset: Dataset) -> list[str]:
    """What the plan can say once the data is read: how much it is, what sharing saves, what was left out."""
    return [data_line(dataset.train, outlook(batches_of(config, plan, dataset), plan.world_size)), *dataset.notes]


def frozen_states(config: Config, plan: Plan, engine: Engine, dataset: Dataset, folder: RunFolder, base: Path) -> FrozenStates | None:
    """The cache of frozen layers, taken up or begun anew and at work in the model; None without method.cache_frozen.

    base: the model's folder. Raises Refusal where the disk has no room, or the model no states that are the same each time.
    """
    if plan.cache is None:
        if engine.world.is_main:
            shutil.rmtree(folder.frozen, ignore_errors=True)  # of a start with it
        return None
    dtype = torch.float32 if plan.cache.number_bytes == 4 else DTYPES[config.precision.compute]
    method, refused = config.method, None
    states = FrozenStates(folder.frozen, dataset.beginnings, method.first_layer, plan.shape.hidden, dtype, base, method.base.value)
    engine.loss_module.take_states(states)
    if engine.world.is_main:
        try:
            folder.say(states.prepare())
        except Refusal as refusal:
            refused = refusal
    if refused := engine.broadcast(refused):
        raise refused
    states.open()
    return states


def check_range(config: Config, plan: Plan, engine: Engine, dataset: Dataset) -> str:
    """How far the first micro-batch goes in fp16, as a line (none for other types); raises Refusal with the layer that goes beyond it."""
    if config.precision.compute is not Compute.fp16:
        return ""
    world = engine.world
    batch = batches_of(config, plan, dataset).micro_batches(0, world.rank, world.size)[0]
    with enough_memory(plan, 0, lambda: "fp16 probe"):
        of_ranks = engine.gather(probe(engine.loss_module, batch))
    widest = max((one.widest for one in of_ranks), key=lambda one: one.largest)
    roughest = max((one.roughest for one in of_ranks), key=lambda one: one.error)
    if widest.overflows:
        raise Refusal(advice(widest, config))
    return (
        f"fp16     largest value {widest.largest:,.0f} of {LARGEST:,.0f}, at {widest.name}; "
        f"furthest from fp32, by {100 * roughest.error:.2g} %, {roughest.name}"
    )


def train(parts: Training, done: int) -> tuple[int, str]:
    """Take the updates from `done` to the plan's last, or until train.patience is at its end; how many were taken, and why no more.

    Raises Stopped after saving when a signal asked for it.
    """
    every, last, best = parts.config.train, parts.plan.steps, parts.checkpoints.best
    over = 0 < every.patience <= best.waited
    parts.stop.arm()
    while done < last and not over:
        with enough_memory(parts.plan, done, lambda: parts.meter.at):
            metrics = take_step(parts, done)
            parts.batches.note(done)
            done += 1
            if due(done, every.eval_every, last) and parts.dev:
                parts.meter.at = "held-out loss"
                metrics |= held_out(parts.engine, parts.dev)
        lowest = False
        if "dev/loss" in metrics:
            # Ranks act on one number, not on each its own.
            lowest = every.patience > 0 and best.see(done, parts.engine.broadcast(metrics["dev/loss"]))
            over = 0 < every.patience <= best.waited
        if due(done, every.log_every, last) or "dev/loss" in metrics:
            parts.sinks.log(done, metrics)
        stopping = parts.engine.agree(parts.stop.asked)
        if stopping or lowest or over or due(done, every.save_every, last):
            if parts.states and parts.engine.world.is_main and done < last:
                parts.states.commit()
            saved = parts.checkpoints.save(done)
            if stopping:
                kept = "saved" if saved else f"NOT saved ({parts.checkpoints.alarm}); an older checkpoint may exist"
                told = f"stopped by signal {stopping} after step {done} of {last}, {kept} — the same command goes on"
                raise Stopped(told, done, stopping)
    parts.stop.disarm()
    if parts.states:
        parts.states.close()
        if parts.engine.world.is_main:
            parts.states.remove()
    return done, _ending(parts, done)


def _ending(parts: Training, done: int) -> str:
    """Why the run ends after `done` updates; with train.patience, the best weights are taken up."""
    patience, last, best = parts.config.train.patience, parts.plan.steps, parts.checkpoints.best
    why = f"all {last} steps are done"
    if done < last:
        why = f"step {done} of {last}: no lower held-out loss in {patience} evaluations"
    if not best.step or best.step == done:
        return why
    lowest = f"step {best.step} with dev/loss {best.loss:.4f}"
    if parts.checkpoints.take_best():
        return f"{why}; {lowest} is the result"
    return f"{why}; {lowest} is NOT on the disk any more, so these last weights are the result"


def take_step(parts: Training, step: int) -> dict[str, float]:
    """One optimizer update, measured."""
    parts.meter.begin()
    with parts.meter.phase("data"):
        world = parts.engine.world
        batches = parts.batches.micro_batches(step, world.rank, world.size)
        targets = parts.batches.targets(step)
        # Each rank counts its own part: with 1,024 ranks, to count all would take longer than to compute one.
        own = torch.tensor([_counts(parts, step, known) for known in ((False, True) if parts.states else (False,))], dtype=torch.float64)
    lr = learning_rate(parts.config.optim, step, parts.plan.steps)
    try:
        outcome = parts.engine.step(batches, targets, lr, parts.meter.phase)
    except FloatingPointError as error:
        places = ", ".join(parts.batches.examples[i].place for i in parts.batches.conversations(step)[:4])
        advice = "a lower optim.lr or precision=fp32 may help"
        raise FloatingPointError(f"step {step + 1}: {error}; conversations {places}, ... — {advice}") from None
    *counts, useful, executed = parts.engine.sum(own.sum(0)).tolist()
    conversations, tokens, padding, shared, learned, cached = map(int, counts)
    rate = Rate(conversations, tokens, padding, shared, learned, useful, executed)
    return {
        "train/loss": outcome.loss,
        "train/lr": lr,
        "train/grad_norm": outcome.grad_norm,
        "train/skipped": float(not outcome.applied),
        **parts.meter.end(rate, parts.engine.communication_s()),
        **parts.sensors.read(),
        **({"data/cached_tokens": cached} if parts.states else {}),
        **parts.plan.predicted(cached=cached == tokens),
    }


def _counts(parts: Training, step: int, known: bool) -> list[float]:
    """This rank's part of a step for `Rate`, and of it the tokens that are read from the cache of frozen layers before its FLOPs.

    known: of the micro-batches alone that are read from there, or of the others.
    """
    world, shape, method, engine = parts.engine.world, parts.plan.shape, parts.config.method, parts.config.engine
    work = parts.batches.work(step, world.size, world.rank, known=known)
    if known:  # what is not computed counts nowhere
        shape, method = above_frozen(shape, method)
    flops = step_flops(
        shape, method, work.lengths, work.logits, padded_to=work.padded_lengths, contexts=work.contexts,
        checkpointing=engine.checkpointing, checkpoint_every=engine.checkpoint_every, micro_batches=work.micro_batches,
        gathered=gathers_by_hooks(engine), in_int8=multiplies_int8(parts.config), beginning=parts.plan.beginning,
    )  # fmt: skip
    computed, real = sum(work.padded_lengths), sum(work.lengths)
    shared = work.conversation_tokens - real
    return [work.conversations, computed, computed - real, shared, work.targets, computed * known, flops.useful, flops.executed]


def held_out(engine: Engine, batches: list[MicroBatch], name: str = "dev") -> dict[str, float]:
    """Mean held-out loss in nats per target token, and its perplexity."""
    total, count = engine.evaluate(batches)
    return {f"{name}/loss": total / count, f"{name}/perplexity": perplexity(total / count)}


def due(done: int, every: int, last: int) -> bool:
    """Whether something done every so many steps is due after `done`; always at the end, only there for 0."""
    return done == last or (every > 0 and done % every == 0)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Rate of update `step` (0-based): linear warm-up, then as the schedule says, down to min_lr_ratio of the peak."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    falling = {
        Schedule.constant: 1.0,
        Schedule.linear: 1.0 - progress,
        Schedule.cosine: 0.5 * (1.0 + math.cos(math.pi * progress)),
        Schedule.wsd: min(1.0, (steps - step) / max(1.0, optim.decay_share * steps)),
    }[optim.schedule]
    if optim.schedule is Schedule.constant:
        return optim.lr
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * falling)
