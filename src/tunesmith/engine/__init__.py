"""DeepSpeed and Accelerate behind the same few verbs: step, evaluate, agree, gather, save, restore.

Nothing outside this room knows which of them is at work.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tunesmith import matmul
from tunesmith.config import Compute, Config, EngineKind
from tunesmith.data.batches import MicroBatch
from tunesmith.model import TargetLoss, act_from, for_generation, keep_tiles, read_beginning
from tunesmith.peaks import take_faster_matmul
from tunesmith.plan import Plan
from tunesmith.world import World, rendezvous

Clock = Callable[[str], AbstractContextManager[None]]
"""A phase timer: `with clock("forward"): ...`"""


@dataclass(frozen=True)
class Outcome:
    """What one step did, equal on all ranks."""

    loss: float
    """Mean loss in nats per target token of the whole global step."""
    grad_norm: float
    """Global gradient norm before clipping."""
    applied: bool
    """False if fp16 loss scaling skipped the update."""


class Engine(ABC):
    """One model, its optimizer, and all ranks."""

    world: World
    device: torch.device
    loss_module: TargetLoss
    splits_weights = False
    """Whether weights are split over ranks, so that every rank must take part in every forward."""

    @property
    def threads(self) -> int:
        """CPU threads of this rank."""
        return torch.get_num_threads()

    @abstractmethod
    def step(self, batches: Sequence[MicroBatch], targets: int, lr: float, clock: Clock) -> Outcome:
        """One optimizer update from this rank's micro-batches, the loss divided by the global step's `targets`.

        Raises FloatingPointError before any weight changes if loss or gradient is not finite (fp16 skips instead).
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer state into a folder that all ranks share."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Take up what `save` wrote."""

    @abstractmethod
    def trained_state(self) -> dict[str, torch.Tensor] | None:
        """Trainable weights by name, whole, on the CPU of rank 0; None on other ranks."""

    @abstractmethod
    def communication_s(self) -> float:
        """Seconds spent in collectives during backward and optimizer since the last call, where they can be told apart."""

    @property
    def model(self) -> Any:
        """The Hugging Face or PEFT model inside."""
        return self.loss_module.model

    def for_generation(self) -> AbstractContextManager[Any]:
        """The model inside, ready to generate; as it was before afterwards."""
        return for_generation(self.model)

    def read_beginning(self, ids: Sequence[int], invocation: Sequence[int]) -> None:
        """Let the frozen model read, now and never again, what all conversations go on from; what is saved says that the adapters
        act from the tokens `invocation` on, which come next (method.alora)."""
        with self.for_generation() as model, model.disable_adapter():
            self.loss_module.beginning = read_beginning(model, ids)
        act_from(self.model, invocation)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Sum of losses (nats) and count of target tokens over the micro-batches of all ranks."""
        self.loss_module.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            total[0] += float(self._forward(batch))
            total[1] += batch.target_count
        self.loss_module.train()
        total = self.sum(total)
        return float(total[0]), int(total[1])

    def _forward(self, batch: MicroBatch) -> torch.Tensor:
        loss: torch.Tensor = self.loss_module(batch)
        return loss

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a small tensor over all ranks."""
        if self.world.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def agree(self, flag: int) -> int:
        """The largest flag of all ranks, so that they act together."""
        if self.world.size == 1:
            return flag
        value = torch.tensor([flag], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def gather(self, item: Any) -> list[Any]:
        """Everyone's item, in rank order, on all ranks."""
        if self.world.size == 1:
            return [item]
        items: list[Any] = [None] * self.world.size
        dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item, on all ranks."""
        if self.world.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    @abstractmethod
    def close(self) -> None:
        """Free what the run holds. The process group stays for a next run in this process (Hydra's -m)."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a card or the machine had no memory left: torch's own error, or what its CPU allocator says."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in said or "CUDA out of memory" in said


def device_for(world: World, config: Config) -> torch.device:
    """This rank's device: the card of its local rank, or the CPU where the run is meant for it or no card is here."""
    if config.hardware.card == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank)


def join(config: Config, world: World, device: torch.device, threads: int, restarts: int = 0) -> None:
    """Meet the other ranks. Everything slow (data, conversion) is done before, so nobody waits for work here.

    restarts: how often these processes have met before; torchrun's store outlives them, and keeps what they wrote.
    """
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # where it is not set, Accelerate sets torch's threads anew
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision(config.precision.matmul.value if device.type == "cuda" else "highest")
    matmul.give_back()  # what a run before in this process took
    if device.type == "cpu" and config.precision.compute is Compute.fp32:
        take_faster_matmul(config.precision.multiplied, threads)
    if dist.is_initialized():
        return
    address, port = rendezvous(world)
    # deepspeed and accelerate read these themselves, and plain launchers set only some of them.
    os.environ.update(
        MASTER_ADDR=address, MASTER_PORT=str(port), RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank)
    )
    timeout = timedelta(seconds=config.engine.timeout_s)
    store, rank, size = next(dist.rendezvous("env://", rank=world.rank, world_size=world.size, timeout=timeout))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"start{restarts}", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )


def build_engine(config: Config, plan: Plan, world: World, module: TargetLoss, device: torch.device) -> Engine:
    """The engine that engine.kind names, around a model that already lies on this rank's device.

    Raises RuntimeError if a trainable weight is not fp32: small updates vanish in halves, whatever library left it so.
    """
    if halves := [name for name, weight in module.named_parameters() if weight.requires_grad and weight.dtype is not torch.float32]:
        raise RuntimeError(f"{len(halves)} trainable weights are not fp32 (first: {halves[0]})")
    if plan.tiles and device.type == "cpu":
        keep_tiles(module.model)
    if config.engine.kind is EngineKind.deepspeed:
        from tunesmith.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, plan, world, module, device)
    if config.engine.fsdp:
        from tunesmith.engine.fsdp import FsdpEngine

        return FsdpEngine(config, world, module, device)
    from tunesmith.engine.accelerate import AccelerateEngine

    return AccelerateEngine(config, world, module, device)


def set_rate(optimizer: Any, lr: float) -> None:
    """This step's learning rate, times each group's own factor (method.b_lr_ratio)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
