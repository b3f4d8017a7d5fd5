"""The peak that a plan predicts beside the one that the allocator saw, over a grid of small models on a CPU.

    python -m bench.memory                 the whole grid: a line each, the median and the worst error
    python -m bench.memory --only 3        the fourth configuration alone, with what the plan says is alive at the peak
    torchrun --nproc-per-node 2 -m bench.memory    FSDP2's pieces instead, those of the first rank

The ledger is the allocator's own: PyTorch's profiler reports every allocation and release, temporaries inside kernels included, and
their running sum has a highest point. It is taken over the second step of the real engine (Accelerate, one process), when the
optimizer's state exists; weights, buffers and that state are counted by their storages. Nothing of the process beside tensors is in
it: the interpreter, libraries and the allocator's rounding are the part that is declared.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tunesmith.config import Base, Batching, Compute, Config, EngineKind, Int8, MethodKind, changed
from tunesmith.plan import step_flops
from tunesmith.plan.flops import Flops
from tunesmith.plan.memory import GIB, memory_gib
from tunesmith.plan.shapes import ModelShape
from tunesmith.world import World, this_world

ALONE = World()
FAMILIES = {
    "llama": ModelShape("llama", 4, 128, 4, 2, 32, 352, 3000, 1024),
    "qwen2": ModelShape("qwen2", 3, 192, 6, 2, 32, 512, 2000, 1024, tied=True, qkv_bias=True),
    "qwen3": ModelShape("qwen3", 2, 128, 4, 2, 64, 384, 4000, 1024, tied=True, qk_norm=True),
}
GLM = ModelShape("glm", 3, 128, 4, 2, 32, 352, 3000, 1024, qkv_bias=True, fused=True)
BATCHES = ((64, 1, 0.5), (128, 4, 0.1), (512, 1, 0.9), (256, 2, 0.02), (96, 8, 0.3), (512, 2, 0.05), (192, 3, 0.6))
"""(tokens of a conversation, conversations, share of targets)."""
STEPS_OF_RANKS = 4
"""Measured with several ranks; the least of their peaks counts: gloo's thread lets go of what it has sent sooner or later."""
PREFIX, PROMPT = ("method.kind", MethodKind.prefix), ("method.kind", MethodKind.prompt)
MORE: tuple[tuple[tuple[str, Any], ...], ...] = (
    (PREFIX,),
    (PREFIX, ("method.virtual_tokens", 100)),
    (PROMPT,),
    (PROMPT, ("method.virtual_tokens", 100)),
    (("method.dora", True),),
    (("method.dora", True), ("method.targets", ("q_proj", "v_proj", "down_proj"))),
    (("method.first_layer", 1), ("engine.checkpoint_every", 2)),
    (("method.last_layer", 0), ("engine.checkpoint_every", 2)),
    (("method.modules_to_save", ("embed_tokens", "lm_head")),),
    (("method.modules_to_save", ("lm_head",)), ("engine.checkpoint_every", 3)),
    (("method.modules_to_save", ("embed_tokens",)), ("method.first_layer", 1)),
    (("method.base", Base.int8), ("precision.int8", Int8.dynamic)),
    (("optim.neftune_alpha", 5.0), ("optim.label_smoothing", 0.1)),
    (("method.base", Base.int8),),
    (("method.base", Base.int8), ("method.targets", ("q_proj", "down_proj"))),
    (("method.base", Base.int8), ("method.first_layer", 1), ("engine.checkpoint_every", 2)),
    (("method.base", Base.int8), PREFIX),
    (("method.base", Base.nf4),),
    (("method.base", Base.nf4), ("method.dora", True)),
)
"""Settings beside those that every configuration has."""
PRECISIONS = ((Compute.fp32, False), (Compute.bf16, False), (Compute.bf16, True))
METHODS = (0, 4, 16, 64)
"""Ranks of adapters; 0: full."""


@dataclass(frozen=True)
class Case:
    """One configuration of the grid."""

    family: str
    rank: int
    compute: Compute
    checkpointing: bool
    length: int
    rows: int
    share: float
    accumulation: int = 1
    dropout: float = 0.0
    halves: bool = False
    """Computed as under DeepSpeed in bf16, all weights in halves, without an optimizer."""
    more: tuple[tuple[str, Any], ...] = ()
    """Other settings, by their paths."""

    @property
    def shape(self) -> ModelShape:
        return GLM if self.family == "glm" else FAMILIES[self.family]

    @property
    def targets(self) -> int:
        """Of a conversation."""
        return max(1, round(self.length * self.share))

    def config(self) -> Config:
        config = Config(name="memory")
        config.method.kind = MethodKind.lora if self.rank else MethodKind.full
        config.method.r, config.method.dropout = self.rank or 16, self.dropout
        config.precision.compute, config.engine.kind = self.compute, EngineKind.deepspeed if self.halves else EngineKind.accelerate
        config.engine.zero = 0
        config.data.max_tokens = self.length
        config.engine.checkpointing = self.checkpointing
        return changed(config, dict(self.more))

    def __str__(self) -> str:
        method = f"LoRA {self.rank}" if self.rank else "full"
        more = f"{', recomputed' * self.checkpointing}{', dropout' * bool(self.dropout)}{', 2 accumulated' * (self.accumulation > 1)}"
        more += "".join(f", {path.partition('.')[2]}={said(value)}" for path, value in self.more)
        precision = f"{self.compute.value}{' weights' * self.halves}"
        return f"{self.family} {method}, {precision}, {self.rows} x {self.length} tokens, {self.targets} targets each{more}"


def said(value: Any) -> str:
    return "+".join(value) if isinstance(value, list | tuple) else str(getattr(value, "value", value)).lower()


def grid() -> list[Case]:
    """Every family, method, precision and checkpointing with two batches each in turn, all in halves, and the kinds of MORE."""
    cases: list[Case] = []
    for turn in range(2):
        for family in FAMILIES:
            for rank in METHODS:
                for compute in (Compute.fp32, Compute.bf16):
                    for checkpointing in (False, True):
                        number = len(cases)
                        length, rows, share = BATCHES[(number + turn) % len(BATCHES)]
                        accumulation = 1 + (number // 2 + turn) % 2
                        dropout = 0.1 if rank and number % 5 == 0 else 0.0
                        cases.append(Case(family, rank, compute, checkpointing, length, rows, share, accumulation, dropout))
    for number, (family, rank, checkpointing) in enumerate(product(FAMILIES, (0, 16), (False, True))):
        cases.append(Case(family, rank, Compute.bf16, checkpointing, *BATCHES[number % len(BATCHES)], accumulation=2, halves=True))
    for number, (more, (compute, halves), checkpointing) in enumerate(product(MORE, PRECISIONS, (False, True))):
        settings = dict(more)
        family = list(FAMILIES)[(number // 2 + number // 6) % len(FAMILIES)]
        rank = 0 if "method.kind" in settings else (4, 16)[number // 2 % 2]
        dropout = 0.1 if rank and number % 3 == 0 else 0.0
        if not checkpointing:
            settings.pop("engine.checkpoint_every", None)
        batch = BATCHES[(number + number // 6) % len(BATCHES)]
        cases.append(Case(family, rank, compute, checkpointing, *batch, 1 + number // 3 % 2, dropout, halves, tuple(settings.items())))
    kinds: tuple[tuple[int, tuple[tuple[str, Any], ...]], ...] = ((0, ()), (16, ()), (0, (PREFIX,)))
    for number, ((rank, more), (compute, halves), checkpointing) in enumerate(product(kinds, PRECISIONS, (False, True))):
        accumulation = 2 if halves else 1 + number % 2
        cases.append(Case("glm", rank, compute, checkpointing, *BATCHES[number % len(BATCHES)], accumulation, 0.0, halves, more))
    return cases


def sharded() -> list[Case]:
    """The configurations for several ranks: every family and method in both precisions, with and without recomputation."""
    kinds: tuple[tuple[int, tuple[tuple[str, Any], ...]], ...] = ((0, ()), (16, ()), (0, (PREFIX,)))
    cases: list[Case] = []
    for family, (rank, more), compute, checkpointing in product(FAMILIES, kinds, (Compute.fp32, Compute.bf16), (False, True)):
        batch = BATCHES[len(cases) % len(BATCHES)]
        cases.append(Case(family, rank, compute, checkpointing, *batch, 1 + len(cases) // 2 % 2, more=(*more, ("engine.fsdp", True))))
    return cases


def predicted(case: Case, ranks: int = 1) -> dict[str, float]:
    """Bytes by part at the predicted peak of a rank, the process left out."""
    tokens, targets = case.rows * case.length, case.rows * case.targets
    parts = memory_gib(case.shape, case.config(), ranks, tokens, targets=targets, cpu=True, accumulated=case.accumulation > 1)
    return {name: gib * GIB for name, gib in parts.items() if name != "context" and not (case.halves and name == "optimizer")}


def measured(case: Case, folder: Path, world: World = ALONE) -> int:
    """Bytes at the highest point of a step's ledger; the model is made in `folder` if it is not there."""
    import torch
    from torch.distributed.tensor import DTensor

    module = module_of(case, folder)
    batches = [batch_of(case, seed) for seed in range(case.accumulation)]
    states: list[Any] = []
    if case.halves:
        module = module.to(torch.bfloat16)

        def step() -> None:
            module.zero_grad()
            for batch in batches:
                module(batch).backward()
    else:
        engine = engine_of(case, module, world)

        def step() -> None:
            engine.step(batches, sum(batch.target_count for batch in batches), 1e-4, lambda _: nullcontext())

    step()
    module.zero_grad()
    gc.collect()
    if not case.halves:
        states = [value for state in engine.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in (*module.parameters(), *module.buffers(), *scales(module), *states)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    peaks = [peak_of(step) for _ in range(1 if world.size == 1 else STEPS_OF_RANKS)]
    return int(sum(held.values()) + min(peaks))


def peak_of(step: Callable[[], object]) -> int:
    """The most bytes that a step has beside what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as ledger:
        step()
    live = peak = 0
    for _, size in sorted(entries(ledger), key=lambda entry: entry[0]):
        live += size
        peak = max(peak, live)
    return peak


def module_of(case: Case, folder: Path) -> Any:
    """A model of the case's shape with its loss; its files are made in `folder` if they are not there."""
    import torch

    from tunesmith.model import build_model

    return build_model(case.config(), model_in(folder, case.shape), torch.device("cpu"))


def engine_of(case: Case, module: Any, world: World = ALONE) -> Any:
    """The real engine around a model."""
    import torch
    from accelerate.state import AcceleratorState

    from tunesmith.engine.accelerate import AccelerateEngine
    from tunesmith.engine.fsdp import FsdpEngine

    threads, config = torch.get_num_threads(), case.config()
    AcceleratorState._reset_state(reset_partial_state=world.size == 1)  # it keeps the first precision of a process
    engine = (FsdpEngine if config.engine.fsdp else AccelerateEngine)(config, world, module, torch.device("cpu"))
    torch.set_num_threads(threads)  # Accelerate takes one for a rank
    return engine


def flops(case: Case) -> Flops:
    """Of a step."""
    lengths = [case.length] * case.rows * case.accumulation
    targets = case.rows * case.targets * case.accumulation
    return step_flops(case.shape, case.config().method, lengths, targets, checkpointing=case.checkpointing)


def scales(module: Any) -> Iterator[Any]:
    """What quantised layers hold beside their weights, as neither parameter nor buffer."""
    for layer in module.modules():
        if (scale := getattr(layer, "scales", None)) is not None:
            yield scale
        if (scale := getattr(getattr(layer, "state", None), "SCB", None)) is not None:
            yield scale
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        while state is not None:
            yield from (state.absmax, state.code)
            state = state.state2


def entries(ledger: Any) -> Iterator[tuple[int, int]]:
    """(time, bytes) of allocations (positive) and releases (negative)."""
    return ((event.start_ns(), event.nbytes()) for event in ledger.profiler.kineto_results.events() if event.name() == "[memory]")


def model_in(folder: Path, shape: ModelShape) -> Path:
    """A folder with a model of this shape and random weights."""
    from transformers import (
        GlmConfig,
        GlmForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )  # fmt: skip

    place = folder / shape.name
    if not place.is_dir():
        sizes = dict(
            hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab, max_position_embeddings=shape.max_positions,
            tie_word_embeddings=shape.tied,
        )  # fmt: skip
        if shape.fused:
            model: Any = GlmForCausalLM(GlmConfig(**sizes, head_dim=shape.head_dim, attention_bias=True, pad_token_id=0))
        elif shape.qk_norm:
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=shape.head_dim))
        elif shape.qkv_bias:
            model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        model.save_pretrained(place)
    return place


def batch_of(case: Case, seed: int) -> Any:
    """Random conversations, all of the same length, that share no beginning."""
    from tunesmith.data.batches import Example, lay_out

    chance = np.random.default_rng(seed)

    def conversation(row: int) -> Example:
        ids = chance.integers(0, case.shape.vocab, case.length + 1).astype(np.int32)
        ids[0] = seed * case.rows + row
        return Example(ids, np.arange(case.length + 1) > case.length - case.targets, f"row {row}")

    return lay_out([conversation(row) for row in range(case.rows)], Batching.ragged)


def compare(cases: list[Case], world: World = ALONE) -> Iterator[tuple[Case, float, int]]:
    """(case, predicted, measured) bytes."""
    with tempfile.TemporaryDirectory() as folder:
        if world.size > 1:
            import torch.distributed as dist

            for shape in {case.shape for case in cases}:
                model_in(Path(folder), shape)  # once they are together transformers lets the first rank alone write files
            dist.init_process_group("gloo")
        for case in cases:
            yield case, sum(predicted(case, world.size).values()), measured(case, Path(folder), world)
        if world.size > 1:
            dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, default=-1)
    parser.add_argument("--every", type=int, default=1, help="every so many-th configuration")
    asked = parser.parse_args()
    world = this_world()
    cases = grid() if world.size == 1 else sharded()
    cases = cases[:: asked.every] if asked.only < 0 else [cases[asked.only]]
    say = print if world.is_main else lambda *_, **__: None
    errors = []
    say("| configuration | predicted MB | measured MB | error |\n|---|---|---|---|")
    for case, guess, truth in compare(cases, world):
        errors.append(guess / truth - 1)
        say(f"| {case} | {guess / 1e6:.2f} | {truth / 1e6:.2f} | {errors[-1]:+.2%} |", flush=True)
    if asked.only >= 0:
        say({part: round(size / 1e6, 3) for part, size in predicted(cases[0], world.size).items()})
    sizes = sorted(map(abs, errors))
    say(f"\n{len(cases)} configurations: median error {median(sizes):.2%}, worst {sizes[-1]:.2%}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
