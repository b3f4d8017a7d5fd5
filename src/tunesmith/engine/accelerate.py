"""Accelerate: one process or DDP."""

# No `from __future__ import annotations` here: DDP compares the annotations of a communication hook with real types.
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tunesmith.config import Compute, Config
from tunesmith.data.batches import MicroBatch
from tunesmith.engine import Clock, Engine, Outcome, set_rate
from tunesmith.model import TargetLoss, make_optimizer, page_again
from tunesmith.world import World


class AccelerateEngine(Engine):
    def __init__(self, config: Config, world: World, module: TargetLoss, device: torch.device):
        self.world = world
        self.device = device
        self.loss_module = module
        self.clip = config.optim.clip
        compute = config.precision.compute
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # the engine is the config's choice, not `accelerate launch`'s
        if world.size == 1:
            os.environ.pop("LOCAL_RANK", None)  # with it Accelerate takes one process for a world and wraps the model in DDP
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=self._autocast(compute))
        if self.accelerator.num_processes != world.size:
            raise RuntimeError(f"accelerate sees {self.accelerator.num_processes} processes where there are {world.size}")
        self._waited_s = 0.0
        self.module = self._spread(module, compute)
        self.optimizer = self.accelerator.prepare(make_optimizer(module, config))

    @staticmethod
    def _autocast(compute: Compute) -> str:
        """Accelerate's word for the type that matmuls are cast to."""
        return "no" if compute is Compute.fp32 else compute.value

    def _spread(self, module: TargetLoss, compute: Compute) -> Any:
        """The module as it is called in training, over all ranks."""
        spread = self.accelerator.prepare(module)
        if self.world.size > 1:
            spread.register_comm_hook(None, self._timed_all_reduce)
        return spread

    def step(self, batches: Sequence[MicroBatch], targets: int, lr: float, clock: Clock) -> Outcome:
        set_rate(self.optimizer, lr)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            # DDP sends gradients once a step, with the last micro-batch. Pieces go with each: whole gradients would need DDP's memory.
            is_last = number == len(batches) - 1
            with nullcontext() if is_last or self.splits_weights else self.accelerator.no_sync(self.module):
                with clock("forward"):
                    loss = self.module(batch)
                with clock("backward"):
                    # DDP averages over ranks; the sum of all ranks over all targets is wanted.
                    self.accelerator.backward(loss * (self.world.size / targets))
            total += loss.detach()
        with clock("optimizer"):
            mean = float(self.sum(total)) / targets
            norm = self._clip()
            if self.accelerator.scaler is None and not (torch.isfinite(torch.tensor([mean, norm])).all()):
                raise FloatingPointError(f"loss {mean} and gradient norm {norm} before the update")
            self.optimizer.step()
            applied = not self.accelerator.optimizer_step_was_skipped
            self.optimizer.zero_grad()
        return Outcome(mean, norm, applied)

    def _clip(self) -> float:
        # Not by Accelerate's own, which lists all of the model's weights again for each of them: 2 % of a small step.
        self.accelerator.unscale_gradients()
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        return float(torch.nn.utils.clip_grad_norm_(trained, self.clip or float("inf")))

    def _timed_all_reduce(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        start = perf_counter()
        future = dist.all_reduce(bucket.buffer().div_(self.world.size), async_op=True).get_future()
        if self.device.type == "cuda" or not bucket.is_last():
            return cast(torch.futures.Future[torch.Tensor], future.then(lambda done: done.value()[0]))
        # On a CPU what remains after the last bucket is what backward waits for; earlier buckets travel behind compute.
        value = future.wait()[0]
        self._waited_s += perf_counter() - start
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(value)
        return done

    def communication_s(self) -> float:
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def save(self, folder: Path) -> None:
        if not self.world.is_main:  # DDP: every rank has the same
            return
        state = {
            "weights": self.trained_state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        torch.save(state, folder / "state.pt")

    def restore(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
        missing = self.loss_module.load_state_dict(state["weights"], strict=False).unexpected_keys
        if missing:
            raise ValueError(f"{folder / 'state.pt'} has weights that this model lacks: {', '.join(missing[:3])}")
        self.optimizer.load_state_dict(state["optimizer"])
        page_again(self.optimizer.optimizer)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def trained_state(self) -> dict[str, torch.Tensor] | None:
        if not self.world.is_main:
            return None
        named = self.loss_module.named_parameters()
        return {name: weight.detach().cpu() for name, weight in named if weight.requires_grad}

    def close(self) -> None:
        self.accelerator.free_memory()
        AcceleratorState._reset_state()  # a next run in this process (Hydra's -m) may have another precision
