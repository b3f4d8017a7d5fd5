"""The output head and the cross-entropy as one operator: logits of some positions at a time, and none of them kept.

Forward turns the logits of a piece into their losses and, in the same memory, into the gradient to themselves, and that into the
gradients to the hidden states and to a trained head. Backward only multiplies those by what reaches the loss, as Liger-Kernel's does
(arXiv 2410.10989): the matmuls are those of the plain way, each once. Whoever does not ask a head for losses gets logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from tunesmith.matmul import NO_TILES, Term, Tiles, added_up
from tunesmith.model.adapters import inner_model
from tunesmith.plan.shapes import logits_at_once, words_at_once

if TYPE_CHECKING:
    from tunesmith.data.batches import MicroBatch

UNIT = 2.0**8
"""What a position's gradient to its logits is multiplied by until backward, which knows the loss's scale. p - 1 and p are at most 1, so
in fp16, which ends at 65,504, a gradient to hidden states has room for weights of 128, and probabilities count down to 1e-10."""


class Targets:
    """What a micro-batch wants to know of its output head: the losses of these targets, labels smoothed by `smoothing`."""

    def __init__(self, batch: MicroBatch, smoothing: float) -> None:
        self.batch, self.smoothing = batch, smoothing
        self.answer = 0
        """Where a head has put the loss; 0: it gave logits."""

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Heads that are called meanwhile answer with the loss, [1] for their one row of hidden states."""
        before = _ASKED.set(self)
        try:
            yield
        finally:
            _ASKED.reset(before)

    def loss(self, given: torch.Tensor) -> torch.Tensor:
        """The sum of the losses, fp32 scalar, from what the model gave: itself, or logits [positions, vocabulary].

        Raises RuntimeError if the model does something to what its head gives.
        """
        if not self.answer:
            return self._of(given)
        if given.data_ptr() != self.answer:
            raise RuntimeError("this model changes the logits that its head gives: a loss that is computed there would be another one")
        return given

    def _of(self, logits: torch.Tensor) -> torch.Tensor:
        batch, device = self.batch, logits.device
        if batch.rows is not None:
            # Where a common beginning parts, one position has several next tokens. index_select adds up their gradients in a
            # fixed order; an index that names a position twice would let the threads decide, and runs would differ in bits.
            logits = logits.index_select(0, batch.rows.to(device))
        losses = F.cross_entropy(logits.float(), batch.labels.to(device), reduction="none", label_smoothing=self.smoothing)
        return (losses * batch.counts.to(device)).sum()  # autocast would make a product of vectors in halves


_ASKED: ContextVar[Targets | None] = ContextVar("targets", default=None)


class _Summed(torch.autograd.Function):
    """The sum of the losses, [1] in fp32, of hidden states [positions, width] by a head's weight [vocabulary, width]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: Targets, compute: torch.dtype, recorded: bool, tiles: Tiles
    ) -> torch.Tensor:  # fmt: skip
        batch, smoothing, device = targets.batch, targets.smoothing, x.device
        wants_x, wants_weight = (recorded and wanted for wanted in ctx.needs_input_grad[:2])
        rows = torch.arange(len(x)) if batch.rows is None else batch.rows  # they ascend
        shares = torch.bincount(rows, batch.counts, len(x)).float().to(device)  # how often a position counts
        labels, counts = batch.labels.to(device), batch.counts.to(device)
        matrix = weight.to(compute)
        starts = torch.arange(0, len(x), logits_at_once(len(x)) or 1)
        pieces = [*zip(starts.tolist(), torch.searchsorted(rows, starts).tolist(), strict=True), (len(x), len(rows))]
        rows = rows.to(device)
        of_x = torch.empty_like(x, dtype=compute) if wants_x else None
        adds_up = wants_weight and compute is not torch.float32 and len(pieces) > 2
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if adds_up else None
        loss = x.new_zeros(1, dtype=torch.float32)
        for (start, first), (stop, last) in pairwise(pieces):
            part, share = x[start:stop].to(compute), shares[start:stop]
            of, named, count = rows[first:last] - start, labels[first:last], counts[first:last]
            # Into memory of its own: oneDNN would make one beside it all the same.
            gradient = added_up([Term(part, matrix.t(), 1.0, tiles.there)])
            logits = gradient.float()
            logits.sub_(logits.amax(1, keepdim=True))
            chosen = logits[of, named]
            mean = logits.mean(1) if smoothing else share
            total = logits.exp_().sum(1)
            height = total.log()
            loss += (1 - smoothing) * ((height[of] - chosen) @ count)
            if smoothing:
                loss += smoothing * ((height - mean) @ share)
            if wants_x or wants_weight:
                # Of a position's targets together as if they counted once: p - 1 where one of them is, p elsewhere.
                logits.mul_((UNIT / total)[:, None])
                if smoothing:
                    logits.sub_(UNIT * smoothing / len(weight))
                logits[of, named] -= (UNIT * (1 - smoothing)) * count / share[of]
                if gradient is not logits:
                    gradient.copy_(logits)
            del logits
            if of_x is not None:
                if tiles.back is not None:
                    of_x[start:stop] = added_up([Term(gradient, matrix, 1.0, tiles.back)])
                else:
                    torch.mm(gradient, matrix, out=of_x[start:stop])
            if wants_weight:
                part = (part * (share / UNIT)[:, None]).to(compute)
                of_weight = _added(of_weight, gradient, part)
            del gradient  # before there is the next piece's
        if of_weight is not None:
            of_weight = of_weight.to(weight.dtype)
        elif wants_weight:
            of_weight = torch.zeros_like(weight)
        ctx.made = of_x, of_weight, shares / UNIT, x.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x, of_weight, shares, dtype = ctx.made
        ctx.made = None  # it is multiplied in place: there is no second time
        if of_x is not None:
            of_x = of_x.float().mul_((shares * of_loss)[:, None]).to(dtype)
        if of_weight is not None:
            for block in torch.split(of_weight, _words(of_weight)):
                block.mul_(of_loss)
        return of_x, of_weight, None, None, None, None


def _added(total: torch.Tensor | None, gradient: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A piece's gradient to the weight, and what those before it came to, which is fp32."""
    if total is None:
        return torch.mm(gradient.t(), part)
    if part.dtype is total.dtype:
        return torch.addmm(total, gradient.t(), part, out=total)
    words = _words(total)
    for block, of_block in zip(torch.split(total, words), torch.split(gradient, words, dim=1), strict=True):
        block.add_(torch.mm(of_block.t(), part))
    return total


def _words(weight: torch.Tensor) -> int:
    """Rows of a head's weight that are worked on together where halves meet fp32: all on a card, which converts as it computes."""
    return words_at_once(*weight.shape) if weight.device.type == "cpu" else len(weight)


def measure_at_head(model: Any) -> None:
    """Let a model's output head answer with losses where it is asked for them; its weights and names stay as they are."""
    head = inner_model(model).get_output_embeddings()
    parts: list[Any] = [head.original_module, *head.modules_to_save.values()] if hasattr(head, "modules_to_save") else [head]
    for part in parts:
        if type(part) is nn.Linear:
            part.forward = MethodType(_forward, part)  # type: ignore[method-assign]


def _forward(head: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    targets, device = _ASKED.get(), x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    if targets is None or not can_be_measured(head, x, compute):
        return nn.Linear.forward(head, x)
    recorded = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        tiles = getattr(head, "tiles", NO_TILES) if compute is torch.float32 else NO_TILES
        loss = _Summed.apply(x.flatten(0, -2), head.weight, targets, compute, recorded, tiles)  # type: ignore[no-untyped-call]
    targets.answer = loss.data_ptr()
    return cast(torch.Tensor, loss)


def can_be_measured(head: nn.Linear, x: torch.Tensor, compute: torch.dtype) -> bool:
    """Whether the losses can be computed here: one row of hidden states, a plain weight that is whole, no bias.

    Not in fp16 where the head is trained: before backward knows the loss's scale, its gradient would have none that suits all words.
    """
    if type(head.weight) is not nn.Parameter or head.bias is not None or x.shape[0] != 1:
        return False
    if compute is torch.float16 and head.weight.requires_grad:
        return False
    return torch.is_autocast_enabled(x.device.type) or x.dtype is head.weight.dtype
