"""How long a step takes, what the run costs and what it leaves on disk: a roofline from the card's data, part by part.

Nothing overlaps in this model but host and card, so it errs on the slow side where communication hides behind compute. Every share
below is declared with what it rests on; `python -m bench.pace` holds the CPU's against measured steps (docs/hardware.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tunesmith.config import Compute, Config, EngineKind, MethodKind
from tunesmith.hardware import Card
from tunesmith.peaks import Overheads
from tunesmith.plan.flops import Flops
from tunesmith.plan.memory import BYTES, TARGET_SHARE, setting_of
from tunesmith.plan.network import network_bytes_per_s, traffic
from tunesmith.plan.optimizers import state_bytes
from tunesmith.plan.replay import replayed
from tunesmith.plan.shapes import ModelShape, multiplies_int8

READS = 2
"""Times that a tensor is read for each time it is written: by the next operator, and in backward."""


@dataclass(frozen=True)
class Speed:
    """What a device sustains of what it promises."""

    matmul_share: float
    """Of the peak, in matmuls of a training step's sizes."""
    attention_share: float
    """Of the peak, over the scores of fused attention."""
    context_share: float
    """Of the peak, over scores of keys that conversations share."""
    row_s: float
    """Attention beside its FLOPs, of one query of one head, there or back: a softmax, and conversations that are short."""
    product_s: float
    """Time that a matmul takes besides: on a CPU a kernel's start; a card's is in operator_s."""
    bytes_per_s: float
    """Memory traffic of elementwise operators, reads and writes."""
    operator_s: float
    """Host time of one operator: on a CPU added to its work, on a card hidden as long as the card has enough to do."""
    function_s: float
    """Host time of an autograd function in Python, beside the operators in it."""
    layer_s: float
    """Host time of a layer that is computed again, beside its work."""
    random_s: float
    """One number of a dropout mask."""
    unpacked_s: float
    """One number of an NF4 weight that is dequantised, beside the memory it goes through."""
    link_bytes_per_s: float
    """Between ranks, one way."""
    host_bytes_per_s: float
    """Between a card and main memory, one way."""


class OfCpu(NamedTuple):
    """The same of a CPU, in what `peaks.overheads` measures there: of the peak, of bytes_per_s, of random_s (random, unpacked) and of
    function_s, and all others of operator_s."""

    matmul: float
    attention: float
    context: float
    product: float
    row: float
    layer: float
    bandwidth: float
    operator: float
    function: float
    random: float
    unpacked: float


# By least squares over bench/pace.py's steps, on two cores each. An operator of a model is several calls of Python, an autograd function of
# ours up to twenty, and a layer that is computed again goes through a hook in Python for each tensor it keeps.
_AMX = 205.0, 0.575, 2.56, 15.4, 0.89, 1.08
_AMX_HALVES = OfCpu(0.145, 0.5, 0.17, 22.5, 0.108, *_AMX)
_VECTORS = 223.0, 0.169, 2.18, 21.6, 0.87, 0.39
_VECTORS_HALVES = OfCpu(0.58, 0.37, 0.37, 13.1, 0.114, *_VECTORS)
CPU = {
    True: {Compute.fp32: OfCpu(0.75, 0.55, 0.6, 6.9, 0.0, *_AMX), Compute.bf16: _AMX_HALVES, Compute.fp16: _AMX_HALVES},
    False: {Compute.fp32: OfCpu(0.84, 0.72, 0.79, 8.9, 0.0, *_VECTORS), Compute.bf16: _VECTORS_HALVES, Compute.fp16: _VECTORS_HALVES},
}
"""With AMX (an Intel Xeon) and without (an AMD EPYC of the fourth generation), 2026-11-30. AMX's peak in halves is far above what bringing
matrices into its layout allows. With AMX fp32's attention and context are declared: C++ attends since, which was measured on the AMD CPU
alone (docs/log.md), and fp32's share of matmuls is what those of SmolLM2-135M reach of the rate at 2048 x 2048."""
TILES_CONTEXT, TILES_CAUSAL = 0.55, 0.45
"""By bf16 halves, of their own peak: to a context measured alone 0.6 forward and 0.8 back (docs/log.md), less beside other programs; causal
0.6 to 0.75 for 400 and 1,500 tokens, less for fewer."""
CPU_INT8, TILES_INT8 = 4.0, 7.0
"""How many times as fast as fp32 matmuls those of int8 are: 64 numbers an instruction with AVX-512 VNNI and not 16; 2,000 and 490 GOPS were
measured on an AMD EPYC, 2,000 to 3,700 and 400 here. By AMX from weights in tiles 2,200 to 2,700 with all that follows, and 310 to 400."""
TYPICAL = Overheads(43e9, 4.0e-6, 8.7e-6, 5.0e-9)
"""Of that machine, for one where nothing has been measured yet."""
CPU_LINK = 1.5e9
"""Gloo over one machine's memory, 1 to 2 GB/s; declared."""
MATMUL_SHARE = 0.65
"""Of a card's dense peak: cuBLAS reaches 70 to 85 % of it at 4096 and more on cards that keep their clock, and a step has smaller ones
too. Declared; compared with published steps in docs/hardware.md."""
CAPPED_SHARE = 0.45
"""The same for cards of at most CAPPED_W, whose power limit does not let them keep the clock that the peak is stated at."""
CAPPED_W = 165
BANDWIDTH_SHARE = 0.8
"""Of a card's memory bandwidth, that elementwise kernels reach; declared."""
LINK_SHARE = 0.75
"""Of a link's rate, that NCCL and pinned copies reach; declared."""
LAUNCH_S = 8e-6
"""Host time of an operator in eager PyTorch with a kernel launch; declared, 5 to 10 microseconds."""
FUNCTION_S = 3e-5
"""Of an autograd function in Python beside that; declared, 20 to 40 microseconds."""
MAIN_MEMORY = 20e9
"""Bytes/s of AdamW in main memory, offloaded; declared."""


def speed_of(card: Card | None, compute: Compute, overheads: Overheads | None = None, amx: bool = False) -> Speed:
    """What a card sustains; for None a CPU with these overheads, with AMX or without."""
    if card is None:
        cpu, of = overheads or TYPICAL, CPU[amx][compute]
        return Speed(
            of.matmul, of.attention, of.context, of.row * cpu.operator_s, of.product * cpu.operator_s, of.bandwidth * cpu.bytes_per_s,
            of.operator * cpu.operator_s, of.function * cpu.function_s, of.layer * cpu.operator_s, of.random * cpu.random_s,
            of.unpacked * cpu.random_s, CPU_LINK, MAIN_MEMORY,
        )  # fmt: skip
    share = CAPPED_SHARE if card.watts <= CAPPED_W else MATMUL_SHARE
    link, host = card.link_gb_per_s * 1e9 * LINK_SHARE, card.host_gb_per_s * 1e9 * LINK_SHARE
    bandwidth = card.bandwidth_gb_per_s * 1e9 * BANDWIDTH_SHARE
    return Speed(share, share, share, 0.0, 0.0, bandwidth, LAUNCH_S, FUNCTION_S, 0.0, 0.0, 0.0, link, host)


def step_seconds(
    shape: ModelShape,
    config: Config,
    card: Card | None,
    world_size: int,
    *,
    local_size: int = 0,
    work: Flops,
    peak_flops: float,
    gain: float = 1.0,
    tiles: bool = False,
    tokens: int,
    accumulation: int,
    trained: int,
    targets: int | None = None,
    overheads: Overheads | None = None,
    speed: Speed | None = None,
) -> dict[str, float]:
    """Seconds of one step on one rank by part: matmul, memory, operators, optimizer, communication.

    local_size: ranks on a machine (0: all are on one). work: this rank's in a step. gain: how many times that of torch's own matmuls the
    peak is on a CPU, with precision.matmul=high. tiles: that CPU has AMX. tokens: of one of its `accumulation` micro-batches.
    card None: a CPU. trained: weights that the optimizer updates. targets: tokens of a micro-batch with a loss (None: TARGET_SHARE of
    them). overheads: of this CPU. speed: what the device sustains (None: `speed_of` it).
    """
    compute = BYTES[config.precision.compute]
    speed = speed or speed_of(card, config.precision.compute, overheads, amx=tiles)
    counted = round(tokens * TARGET_SHARE) if targets is None else targets
    step = replayed(shape, setting_of(shape, config, cpu=card is None), tokens, counted)
    lowest = config.method.first_layer if config.method.kind is MethodKind.lora else 0
    again = range(lowest, shape.layers, config.engine.checkpoint_every) if config.engine.checkpointing else ()
    passes = 2 * shape.layers - lowest + len(again)  # through a layer: forward, back, and forward again
    in_int8 = 2.0 * shape.matmul_weights_per_layer * passes * accumulation * tokens if multiplies_int8(config) else 0.0
    own = card.peak_of(config.precision.multiplied) if card else None
    times_int8 = card.peak["int8"] / own if card and own and in_int8 and "int8" in card.peak else (TILES_INT8 if tiles else CPU_INT8) / gain
    linear = work.executed - work.attention - work.over_context - in_int8 + in_int8 / times_int8
    context_share = TILES_CONTEXT if gain > 1 else speed.context_share
    attention = work.attention / (TILES_CAUSAL if gain > 1 else speed.attention_share) + work.over_context / context_share
    matmul = linear / speed.matmul_share + attention
    rows = tokens * shape.heads * passes * (2 if work.over_context else 1)
    matmul = matmul / peak_flops + accumulation * (step.products * speed.product_s + rows * speed.row_s)
    memory = (1 + READS) * step.written / speed.bytes_per_s + step.random * speed.random_s + step.unpacked * speed.unpacked_s
    memory *= accumulation
    host = accumulation * (step.operators * speed.operator_s + step.functions * speed.function_s + len(again) * speed.layer_s)
    if card:
        host = max(0.0, host - matmul - memory)  # what the card waits for
    deepspeed, zero = config.engine.kind is EngineKind.deepspeed, config.engine.zero
    updated = trained / (world_size if (deepspeed and zero) or config.engine.fsdp else 1)
    # AdamW reads weight, gradient and two moments and writes three of them, in fp32; with a copy in halves for the matmuls.
    update = updated * (28 + (4 if deepspeed and compute == 2 else 0))
    if deepspeed and config.engine.offload:
        moved = updated * 2 * (compute if deepspeed else 4) / speed.host_bytes_per_s  # gradients down, weights up
        optimizer = update / MAIN_MEMORY + moved
    else:
        optimizer = update / speed.bytes_per_s
    sent = traffic(shape, config, world_size, accumulation, trained)
    waited = sent.seconds(world_size, local_size or world_size, speed.link_bytes_per_s, network_bytes_per_s(config))
    return {"matmul": matmul, "memory": memory, "operators": host, "optimizer": optimizer, "communication": waited}


def checkpoint_gib(shape: ModelShape, config: Config) -> tuple[float, float]:
    """GiB on disk of one checkpoint (trained weights and the optimizer's state) and of the result (fp32: weights, or adapters)."""
    half = config.engine.kind is EngineKind.deepspeed and BYTES[config.precision.compute] == 2
    trained = shape.trained_weights(config.method)
    return ((2 + 4 if half else 4) * trained + state_bytes(shape, config)) / 2**30, 4 * trained / 2**30
