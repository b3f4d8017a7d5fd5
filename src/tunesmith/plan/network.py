"""What the ranks of a step send each other, and how long that takes: within a machine and from machine to machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunesmith.config import Config, EngineKind, MethodKind
from tunesmith.plan.memory import BUCKET, BYTES
from tunesmith.plan.shapes import ModelShape

ASSUMED_GBIT_PER_S = 25.0
"""Of a node's network where hardware.network_gbit_per_s does not say: what machines with such cards are often rented with. Declared."""
NETWORK_SHARE = 0.75
"""Of a network's rate, that NCCL reaches; declared."""
NETWORK_HOP_S, HOP_S = 30e-6, 5e-6
"""From one machine to the next through the kernel's sockets, and from one card to the next in a machine; declared."""
DDP_BUCKET = 25 * 2**20
"""Bytes of gradients that DDP sends together, its default."""


REUSED = 1_000_000_000
"""ZeRO 3 leaves a weight gathered when it is used again after fewer weights than this (DeepSpeed's stage3_max_reuse_distance)."""
KEPT_WHOLE = 100_000
"""A weight of fewer numbers stays whole under ZeRO 3 (DeepSpeed's stage3_param_persistence_threshold)."""


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a step. Of a tensor a ring of n ranks sends (n - 1) / n for each collective; an all-reduce is two."""

    reduced: float = 0.0
    """Bytes for all-reduces."""
    scattered: float = 0.0
    """Bytes for reduce-scatters."""
    gathered: float = 0.0
    """Bytes for all-gathers."""
    rings: int = 0
    """Reduce-scatters and all-gathers: each takes n - 1 hops one after the other."""
    trees: int = 0
    """All-reduces, which NCCL also does up and down a tree of the machines."""

    @property
    def sent(self) -> float:
        """Bytes of all of them."""
        return self.reduced + self.scattered + self.gathered

    def seconds(self, world_size: int, local_size: int, link_bytes_per_s: float, network_bytes_per_s: float) -> float:
        """Of a step, if nothing overlaps.

        A ring goes from machine to machine once: a machine's network carries what one rank sends, and all wait for the slowest
        link. Hops count where ranks are on several machines.
        """
        if world_size <= local_size:
            return self.sent / link_bytes_per_s
        nodes = math.ceil(world_size / local_size)
        ring = nodes * NETWORK_HOP_S + (world_size - nodes) * HOP_S
        tree = 2 * (math.ceil(math.log2(nodes)) * NETWORK_HOP_S + (local_size - 1) * HOP_S)
        return self.sent / min(link_bytes_per_s, network_bytes_per_s) + self.rings * ring + self.trees * tree


def traffic(shape: ModelShape, config: Config, world_size: int, accumulation: int, trained: int) -> Traffic:
    """What one of `world_size` ranks sends in a step of `accumulation` micro-batches, when `trained` weights are updated.

    `python -m bench.wire` holds it against the bytes on the wire of real ranks (docs/scaling.md).
    """
    if world_size == 1:
        return Traffic()
    compute, deepspeed = BYTES[config.precision.compute], config.engine.kind is EngineKind.deepspeed
    zero = 3 if config.engine.fsdp else config.engine.zero if deepspeed else 0
    ring = (world_size - 1) / world_size
    gradients = trained * (compute if deepspeed else 4) * ring
    buckets = math.ceil(trained / BUCKET)
    if zero == 0:
        return Traffic(reduced=2 * gradients, trees=buckets if deepspeed else math.ceil(4 * trained / DDP_BUCKET))
    if zero == 3:  # layer by layer, for each forward, each backward, and each backward's gradients; embedding and head are one more
        gathered = _gathered_weights(shape, config, accumulation, trained) * compute * ring
        return Traffic(scattered=accumulation * gradients, gathered=gathered, rings=accumulation * 3 * (shape.layers + 1))
    # DeepSpeed all-reduces whole buckets under ZeRO 1 and 2 as well (use_multi_rank_bucket_allreduce), and each rank keeps its part.
    reduced = accumulation if zero == 2 else 1
    return Traffic(reduced=reduced * 2 * gradients, gathered=trained * compute * ring, rings=buckets, trees=reduced * buckets)


def _gathered_weights(shape: ModelShape, config: Config, accumulation: int, trained: int) -> float:
    """Weights that are gathered in a step where each rank keeps a piece of all (ZeRO 3, FSDP2), counted as often as they are."""
    added = 0 if config.method.kind is MethodKind.full else trained
    if config.engine.fsdp:  # embedding, last norm and head stay whole from a forward to its backward
        return accumulation * (2 * (shape.total_weights + added) - shape.embedding_weights - shape.hidden)
    # From a weight's forward to its backward those above it are used in the forward, perhaps again to recompute, and in the backward.
    between = 3 if config.engine.checkpointing else 2
    gathered = accumulation * (2 * shape.total_weights - min(shape.total_weights, REUSED / between))
    small = config.method.kind is MethodKind.lora and config.method.r * max(shape.hidden, shape.intermediate) < KEPT_WHOLE
    return gathered + (added if small else 2 * accumulation * added)


def network_bytes_per_s(config: Config) -> float:
    """What a machine's network carries one way: hardware.network_gbit_per_s, or what is assumed, as far as it is reached."""
    return (config.hardware.network_gbit_per_s or ASSUMED_GBIT_PER_S) / 8 * 1e9 * NETWORK_SHARE
