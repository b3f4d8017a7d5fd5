"""DeepSpeed: ZeRO 0 to 3 by `deepspeed.initialize`."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import Config
from tunesmith.data.batches import MicroBatch
from tunesmith.engine import Clock, Engine, Outcome, set_rate
from tunesmith.model import TargetLoss, make_optimizer
from tunesmith.plan import Plan
from tunesmith.world import World

TAG = "engine"


def _import_deepspeed() -> Any:
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # Its shared-memory collectives take a minute of compiling on a fresh machine and save nothing for a few ranks; DeepSpeed
    # skips a builder that this table holds incompatible.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedEngine(Engine):
    def __init__(self, config: Config, plan: Plan, world: World, module: TargetLoss, device: torch.device):
        self.world = world
        self.device = device
        self.deepspeed = _import_deepspeed()
        os.environ["LOCAL_RANK"] = str(world.local_rank)  # a run of the other engine in this process took it away
        self.deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False, dist_init_required=False)
        self.splits_weights = config.engine.zero == 3
        optimizer = make_optimizer(module, config)
        set_rate(optimizer, 0.0)
        self.engine, _, _, _ = self.deepspeed.initialize(
            model=module, optimizer=optimizer, config=copy.deepcopy(plan.deepspeed), dist_init_required=False
        )
        # Beside halves without ZeRO it makes the optimizer's state by a step of its own, whose weight decay had no rate. AdamW would count
        # that step as one without a gradient: its first update would be (0.1 / 0.19) / sqrt(0.001 / 0.002), 0.74 of what it should be.
        optimizer.state.clear()
        self.loss_module = module

    def step(self, batches: Sequence[MicroBatch], targets: int, lr: float, clock: Clock) -> Outcome:
        self.communication_s()  # what saving and evaluating have sent is not this step's
        set_rate(self.engine.optimizer, lr)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            # The plan's accumulation holds for full steps; the last one of an epoch may have fewer micro-batches.
            self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            with clock("forward"):
                loss = self.engine(batch)
            with clock("backward"):
                # DeepSpeed averages over ranks; the sum of all ranks over all targets is wanted.
                self.engine.backward(loss * (self.world.size / targets), scale_wrt_gas=False)
            total += loss.detach()
        with clock("optimizer"):
            mean = float(self.sum(total)) / targets
            if not torch.isfinite(torch.tensor(mean)):
                raise FloatingPointError(f"loss {mean} before the update")
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm() or 0.0)
            applied = bool(self.engine.was_step_applied())
            if applied and not torch.isfinite(torch.tensor(norm)):
                # DeepSpeed clips and updates in one call: memory is spoiled now, but nothing of it has been saved.
                raise FloatingPointError(f"gradient norm {norm}")
        return Outcome(mean, norm, applied)

    def communication_s(self) -> float:
        comm = self.deepspeed.comm.comm
        # Its log adds a timer's whole history to itself at every call, and keeps it: the timers are read instead, and emptied.
        comm.comms_logger.comms_dict.clear()
        elapsed_ms = [timer.elapsed(reset=True) for timer in comm.timers.get_timers().values()]
        return float(sum(elapsed_ms)) / 1000

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)

    def restore(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)

    def trained_state(self) -> dict[str, torch.Tensor] | None:
        trainable = [(name, weight) for name, weight in self.loss_module.named_parameters() if weight.requires_grad]
        state = {}
        for name, weight in trainable:
            with self.deepspeed.zero.GatheredParameters([weight], enabled=self.splits_weights):
                if self.world.is_main:
                    state[name] = weight.detach().float().cpu().clone()
        return state if self.world.is_main else None

    def close(self) -> None:
        self.engine.destroy()
