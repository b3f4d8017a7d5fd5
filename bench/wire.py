"""What ranks really send in a step: every byte that this process's TCP connections carry, as the kernel counts them.

    python -m bench.wire --ranks 2 4    a line for each engine: MB that the plan predicts (plan/network.py), and MB on the wire

Real engines, real gloo, a small Llama on this CPU; a rank's connections are asked for TCP_INFO before and after a step. Gloo's
all-reduce and all-gather are rings, as NCCL's are; the bytes depend on neither card nor speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.memory import model_in
from bench.scaling import table
from tunesmith.config import Batching, Compute, Config, EngineKind, MethodKind
from tunesmith.plan import network, trained_weights
from tunesmith.plan.network import Traffic
from tunesmith.plan.shapes import ModelShape

# ZeRO 3 leaves weights of fewer than 100,000 numbers whole, so no matrix is smaller here.
SHAPE = ModelShape("wire", 3, 384, 6, 6, 64, 1024, 1200, 256)
ENGINES = {"DDP": None, "FSDP2": None, "ZeRO 0": 0, "ZeRO 1": 1, "ZeRO 2": 2, "ZeRO 3": 3}
SENT = 120
"""Where TCP_INFO has tcpi_bytes_acked (linux/tcp.h)."""


@dataclass(frozen=True)
class Run:
    """One way to train, counted."""

    engine: str
    kind: MethodKind
    compute: Compute
    accumulation: int
    checkpointing: bool = False
    reused: int = network.REUSED
    """DeepSpeed's stage3_max_reuse_distance: a small model with a small one is gathered as a large model is with the default."""

    def config(self) -> Config:
        config = Config(name="wire")
        config.method.kind, config.precision.compute = self.kind, self.compute
        config.engine.kind = EngineKind.accelerate if ENGINES[self.engine] is None else EngineKind.deepspeed
        config.engine.fsdp, config.engine.zero = self.engine == "FSDP2", ENGINES[self.engine] or 0
        config.engine.checkpointing = self.checkpointing
        return config

    def predicted(self, ranks: int) -> Traffic:
        config, default = self.config(), network.REUSED
        network.REUSED = self.reused
        try:
            return network.traffic(SHAPE, config, ranks, self.accumulation, trained_weights(SHAPE, config.method))
        finally:
            network.REUSED = default

    def __str__(self) -> str:
        more = ", recomputed" * self.checkpointing + (f", reuse {self.reused:,}" if self.reused != network.REUSED else "")
        return f"{self.engine}, {self.kind.value}, {self.compute.value}, {self.accumulation} micro-batches{more}"


def runs() -> list[Run]:
    """Every engine, once a step or with each micro-batch, and what ZeRO 3 gathers with layers recomputed and in a large model."""
    full, lora, fp32, bf16 = MethodKind.full, MethodKind.lora, Compute.fp32, Compute.bf16
    found = [Run(engine, kind, compute, 3) for engine in ENGINES for kind, compute in ((full, fp32), (full, bf16), (lora, bf16))]
    found += [Run(engine, full, bf16, 1) for engine in ("ZeRO 1", "ZeRO 2", "ZeRO 3")]
    return found + [Run("ZeRO 3", full, bf16, 3, recomputed, reused) for reused in (10_000_000, 4_000_000) for recomputed in (False, True)]


def sent_bytes() -> int:
    """Bytes that this process's open TCP connections have sent so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    total += struct.unpack_from("Q", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), SENT)[0]
        except OSError:  # closed meanwhile, or not of TCP
            continue
    return total


def on_gloo(expected: Traffic) -> float:
    """Bytes where a reduce-scatter is an all-reduce of which each rank takes its part, as gloo's is."""
    return expected.sent + expected.scattered


def rank_work(asked: Sequence[int]) -> None:
    """A rank's part: walk through the runs; rank 0 prints a line of JSON for each."""
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    from tunesmith.data.batches import Example, lay_out
    from tunesmith.engine import build_engine, join
    from tunesmith.hardware import prepare_environment, this_machine
    from tunesmith.model import build_model
    from tunesmith.plan import make_plan
    from tunesmith.world import this_world

    prepare_environment(on_cpu=True)
    world, device, folder = this_world(), torch.device("cpu"), Path(os.environ["WIRE_FOLDER"]) / SHAPE.name
    join(runs()[0].config(), world, device, 1)
    for number in asked:
        run = runs()[number]
        config = run.config()
        config.model.path, config.data.train, config.data.max_tokens = str(folder), "none.json", 32
        config.train.conversations_per_step, config.train.micro_batch = world.size * run.accumulation, 1
        config.hardware.peak = "1e12"
        plan = make_plan(config, this_machine(), world.size, model_folder=folder)
        if run.reused != network.REUSED:
            # What is fetched early stays as well, so that less is sent; here one rule is looked at, not both.
            plan.deepspeed["zero_optimization"] |= {"stage3_max_reuse_distance": run.reused, "stage3_prefetch_bucket_size": 0}
        AcceleratorState._reset_state(reset_partial_state=False)  # it keeps the first precision of a process
        engine = build_engine(config, plan, world, build_model(config, folder, device), device)
        ids = np.random.default_rng(world.rank).integers(0, SHAPE.vocab, 16).astype(np.int32)
        batches = [lay_out([Example(ids, np.arange(16) > 8, "made up")], Batching.ragged) for _ in range(run.accumulation)]
        for _ in range(3):  # ZeRO 3 learns the order of weights in the first step
            dist.barrier()
            before = sent_bytes()
            engine.step(batches, 7 * world.size * run.accumulation, 1e-4, lambda _: nullcontext())
            dist.barrier()
            time.sleep(0.05)  # until what has arrived is acknowledged
            sent = sent_bytes() - before
        said: list[int] = engine.gather(sent)
        if world.is_main:
            print(json.dumps([number, said]), flush=True)
        engine.close()
        del engine
        gc.collect()
    os._exit(0)


def measured(ranks: int, chosen: Sequence[int]) -> list[tuple[Run, list[int]]]:
    """(run, bytes that each rank sent) for the runs of these numbers, on that many ranks of this CPU."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as probe:
        model_in(Path(folder), SHAPE)
        port = probe.getsockname()[1]
        probe.close()
        shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WIRE_FOLDER": folder}
        command = [sys.executable, "-m", "bench.wire", "--rank", *map(str, chosen)]
        processes = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True, stdout=subprocess.PIPE)
            for rank in range(ranks)
        ]
        told = [process.communicate(timeout=900)[0] for process in processes]
    if failed := [process.returncode for process in processes if process.returncode]:
        raise RuntimeError(f"ranks failed: {failed}")
    lines = [json.loads(line) for line in told[0].splitlines() if line.startswith("[")]
    return [(runs()[number], said) for number, said in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], metavar="N")
    parser.add_argument("--only", type=int, nargs="*", metavar="RUN")
    parser.add_argument("--rank", type=int, nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        rank_work(asked.rank)
    chosen = asked.only or range(len(runs()))
    cells: dict[Run, list[str]] = {runs()[number]: [] for number in chosen}
    for ranks in asked.ranks:
        for run, said in measured(ranks, chosen):
            cells[run] += [f"{on_gloo(run.predicted(ranks)) / 1e6:.3f}", f"{max(said) / 1e6:.3f}"]
    head = ["", *(f"{ranks} ranks, {word} MB" for ranks in asked.ranks for word in ("predicted", "measured"))]
    print(table(head, ([str(run), *row] for run, row in cells.items())))


if __name__ == "__main__":
    main()
