"""What the ranks of a step send each other, and how long that takes: within a machine and from machine to machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunesmith.config import Config, EngineKind
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


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a step."""

    sent: float
    """Bytes. A ring sends (n - 1) / n of a tensor for a reduce-scatter or an all-gather, and twice that for an all-reduce."""
    rings: int
    """Reduce-scatters and all-gathers: each takes n - 1 hops one after the other."""
    trees: int
    """All-reduces, which NCCL also does up and down a tree of the machines."""

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
    """What one of `world_size` ranks sends in a step of `accumulation` micro-batches, when `trained` weights are updated."""
    if world_size == 1:
        return Traffic(0.0, 0, 0)
    compute, deepspeed = BYTES[config.precision.compute], config.engine.kind is EngineKind.deepspeed
    zero = 3 if config.engine.fsdp else config.engine.zero if deepspeed else 0
    ring = (world_size - 1) / world_size
    gradients = trained * (compute if deepspeed else 4) * ring
    buckets = math.ceil(trained / BUCKET)
    if zero == 0:
        return Traffic(2 * gradients, 0, buckets if deepspeed else math.ceil(4 * trained / DDP_BUCKET))
    if zero == 3:  # all weights are gathered for each forward and each backward, layer by layer; embedding and head are one more
        return Traffic(accumulation * (2 * shape.total_weights * compute * ring + gradients), accumulation * 3 * (shape.layers + 1), 0)
    reduced = accumulation if zero == 2 else 1
    return Traffic(reduced * gradients + trained * compute * ring, (reduced + 1) * buckets, 0)


def network_bytes_per_s(config: Config) -> float:
    """What a machine's network carries one way: hardware.network_gbit_per_s, or what is assumed, as far as it is reached."""
    return (config.hardware.network_gbit_per_s or ASSUMED_GBIT_PER_S) / 8 * 1e9 * NETWORK_SHARE
