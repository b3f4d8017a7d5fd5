"""FSDP2: weights, gradients and optimizer state in pieces, one on each rank; Accelerate does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tunesmith.config import Compute
from tunesmith.data.batches import MicroBatch
from tunesmith.engine.accelerate import AccelerateEngine
from tunesmith.model import DTYPES, TargetLoss, decoder_layers


class FsdpEngine(AccelerateEngine):
    """Each decoder layer is gathered for its own forward and backward; embedding, last norm and head from a forward to its backward.

    PyTorch does the cutting: Accelerate 1.15 forgets its FSDP plugin without a word on a CPU, where it could not be tested then.
    """

    splits_weights = True

    @staticmethod
    def _autocast(compute: Compute) -> str:
        return "no"  # the pieces are fp32; what is gathered is of the compute type already

    def _spread(self, module: TargetLoss, compute: Compute) -> Any:
        how: dict[str, Any] = {"mesh": init_device_mesh(self.device.type, (self.world.size,))}
        if compute is not Compute.fp32:
            # Autocast would leave a half copy of every trained weight in the graph, whole. Of a micro-batch's own numbers none is cast.
            how["mp_policy"] = MixedPrecisionPolicy(DTYPES[compute], reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in decoder_layers(module.model):
            fully_shard(layer, **how)
        # The root is what is called, so that what a prompt or noise does with the embedding happens while it is whole.
        fully_shard(module, **how)
        if whole := [name for name, weight in module.named_parameters() if not isinstance(weight, DTensor)]:
            raise RuntimeError(f"{len(whole)} weights are not split over the ranks (first: {whole[0]})")
        return module

    def _clip(self) -> float:
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.clip or float("inf"))
        return float(cast(DTensor, norm).full_tensor())

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        try:
            return super().evaluate(batches)
        finally:  # a forward leaves embedding and head whole for its backward, and here is none
            cast(FSDPModule, self.loss_module).reshard()

    @contextmanager
    def for_generation(self) -> Iterator[Any]:
        """The model, its embedding and head whole meanwhile: generate() enters below the root, which would gather them."""
        root = cast(FSDPModule, self.loss_module)
        root.unshard()
        try:
            with super().for_generation() as model:
                yield model
        finally:
            root.reshard()

    def save(self, folder: Path) -> None:
        named = self.loss_module.named_parameters()
        state = {
            "weights": {name: weight.detach() for name, weight in named if weight.requires_grad},
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(_replaced(state, lambda piece: piece.to_local()), self._part(folder))

    def restore(self, folder: Path) -> None:
        state = torch.load(self._part(folder), map_location=self.device, weights_only=True)
        trained = {name: weight for name, weight in self.loss_module.named_parameters() if weight.requires_grad}
        with torch.no_grad():
            for name, weight in trained.items():
                cast(DTensor, weight).to_local().copy_(state["weights"][name])
        # What belongs to a weight number by number is a piece as its own; the count of steps is not.
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for number, kept in state["optimizer"]["state"].items():
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    kept[name] = _piece_like(weights[number], value)
        self.optimizer.load_state_dict(state["optimizer"])

    def trained_state(self) -> dict[str, torch.Tensor] | None:
        state = {}
        for name, weight in self.loss_module.named_parameters():
            if weight.requires_grad:
                whole = cast(DTensor, weight.detach()).full_tensor()  # all ranks take part
                if self.world.is_main:
                    state[name] = whole.cpu()
        return state if self.world.is_main else None

    def _part(self, folder: Path) -> Path:
        return folder / f"state-{self.world.rank}.pt"


def _replaced(state: Any, change: Callable[[DTensor], torch.Tensor]) -> Any:
    """Nested dicts and lists with every DTensor changed."""
    if isinstance(state, dict):
        return {key: _replaced(value, change) for key, value in state.items()}
    if isinstance(state, list):
        return [_replaced(value, change) for value in state]
    return change(state) if isinstance(state, DTensor) else state


def _piece_like(weight: DTensor, piece: torch.Tensor) -> DTensor:
    return DTensor.from_local(
        piece, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
