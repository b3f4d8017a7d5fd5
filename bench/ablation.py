"""What makes tunesmith's training fast or small, each part of it with a way to switch it off: for bench/train.py --ablation.

A part is switched off by replacing functions of tunesmith in the process that is measured, before it builds a model, or by a setting.
Nothing of this is in tunesmith: a switch that nobody needs would have to be tested with all others. Every row computes the same losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tunesmith.data.examples import Example
    from tunesmith.data.layout import MicroBatch, Node

Replacement = tuple[Any, str, Any]
"""(module or class, name, what takes the place of what it has there)."""


@dataclass(frozen=True)
class Part:
    """One of the things that are switched."""

    says: str
    """What is done without it."""
    off: Callable[[], Sequence[Replacement]] = tuple
    """What is replaced to be without it. Called when it is switched off, as some wrap what is there, and import torch."""
    without: tuple[str, ...] = ()
    """Settings that are without it."""
    settings: tuple[str, ...] = ()
    """Settings that it is, where it is not tunesmith's own choice; all others are on unless they are switched off."""


def _padded() -> list[Replacement]:
    """Rows filled up to the longest that goes on from the same beginning, and a dense mask as transformers makes it."""
    import torch
    import torch.nn.functional as F

    from tunesmith.data import batches, layout
    from tunesmith.model import attention

    arrange = layout.arrange

    def filled_up(*args: Any, **named: Any) -> list[Node]:
        nodes = arrange(*args, **named)
        continued, longest = {node.parent for node in nodes}, dict[int | None, int]()
        for node in nodes:
            longest[node.parent] = max(longest.get(node.parent, 0), node.real)
        # A beginning that others continue keeps its length: what is padded is seen by whoever comes behind.
        padding = [0 if number in continued else longest[node.parent] - node.real for number, node in enumerate(nodes)]
        return [replace(node, padding=cells) for node, cells in zip(nodes, padding, strict=True)]

    @lru_cache(maxsize=4)
    def mask_of(rows: int, width: int) -> torch.Tensor:
        """One for all layers: bool [rows, 1, width, width]."""
        return torch.ones(rows, 1, width, width, dtype=torch.bool).tril()

    plain: Callable[..., torch.Tensor] = F.scaled_dot_product_attention

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool = False, **named: Any) -> torch.Tensor:
        return plain(q, k, v, **named, **({"attn_mask": mask_of(len(q), q.shape[2])} if is_causal else {}))

    return [
        (layout, "arrange", filled_up),
        (batches, "arrange", filled_up),
        (attention, "WASTE", float("inf")),  # all rows are one rectangle
        (attention, "kernels_for", lambda *_: None),  # a beginning is repeated for each row, and masked with it
        (attention, "F", SimpleNamespace(scaled_dot_product_attention=masked)),
        *_in_rectangles(),
    ]


def _nothing_shared() -> list[Replacement]:
    """Every conversation from its first token. The plan is told too: it has room for fewer where they are long."""
    from tunesmith import data
    from tunesmith.data import batches, layout

    arrange, never = layout.arrange, 1 << 40

    def apart(examples: Sequence[Example], batching: Any, least_shared: int = never, row: int = 0) -> list[Node]:
        return arrange(examples, batching, never, row)

    return [(layout, "arrange", apart), (batches, "arrange", apart), (data.Dataset, "common_tokens", 0)]


def _all_positions() -> list[Replacement]:
    """The head at every token, of which those with targets are taken."""
    import torch

    from tunesmith.model import TargetLoss

    forward = TargetLoss.forward

    def at_all(self: TargetLoss, batch: MicroBatch) -> torch.Tensor:
        rows = batch.predicting if batch.rows is None else batch.predicting[batch.rows]
        return forward(self, replace(batch, predicting=torch.arange(len(batch.ids)), rows=rows))

    return [(TargetLoss, "forward", at_all)]


def _whole_logits() -> list[Replacement]:
    from tunesmith.model import TargetLoss

    return [(TargetLoss, "whole_logits", True)]


def _pefts_own() -> list[Replacement]:
    from tunesmith import model
    from tunesmith.model import linear

    # What join_adapters does besides, by its name there: it may be switched off as well.
    there: Any = linear
    return [(model, "join_adapters", lambda built: there.keep_inputs_alone(built))]


def _transformers_own() -> list[Replacement]:
    from tunesmith.model import linear

    return [(linear, "keep_inputs_alone", lambda built: None)]


def _each_by_itself() -> list[Replacement]:
    from tunesmith.model import linear

    return [(linear, "READ_TOGETHER", ())]


def _pytorchs_operators() -> list[Replacement]:
    from tunesmith.model import native

    return [(native, "library", lambda: None)]


def _in_rectangles() -> list[Replacement]:
    from tunesmith.model import attention, kernels

    return [(attention, "attends_at_once", lambda *_: False), (kernels, "by_passes", lambda _: False)]


def _packed_anew() -> list[Replacement]:
    from tunesmith import engine

    return [(engine, "keep_tiles", lambda _: None)]


def _given_back() -> list[Replacement]:
    from tunesmith import hardware

    return [(hardware, "_prepare_heap", lambda: None)]


def _torchs_own() -> list[Replacement]:
    from tunesmith import matmul

    return [(matmul, "take", lambda _: None)]


HIGH, INT8, TILES = "matmul high", "int8", "tiles"
PARTS: dict[str, Part] = {
    "the plan's micro-batch": Part("one conversation in a micro-batch", without=("train.micro_batch=1",)),
    "ragged": Part("rows padded to the longest, in linear layers too, and a dense mask in attention", _padded),
    "sharing": Part("every conversation from its first token; of long ones the plan puts fewer into a micro-batch", _nothing_shared),
    "targets only": Part("the head at all positions", _all_positions),
    "loss in pieces": Part("all logits at once, and torch's cross-entropy", _whole_logits),
    "joined": Part("PEFT's own LoRA layer: four operators", _pefts_own),
    "kept inputs": Part("transformers' norms and gates, which keep what they give", _transformers_own),
    "together": Part("queries, keys and values, and gate and up, each by themselves", _each_by_itself),
    "passes": Part("norms, gates and rotary embedding by PyTorch's operators", _pytorchs_operators),
    "at once": Part("torch's kernels attend: rectangles, and a merge with what conversations share", _in_rectangles),
    "memory kept": Part("glibc gives large blocks back to the system, and has pages of 4 KB", _given_back),
    "oneDNN": Part("fp32 matmuls by torch's own choice, MKL", _torchs_own),
    HIGH: Part("fp32 matrices in fp32", settings=("precision.matmul=high",)),
    INT8: Part("fp32", settings=("method.base=int8", "precision.int8=dynamic")),
    TILES: Part("frozen weights are packed at each use, and int8 is multiplied by torch's own (AMX alone)", _packed_anew),
}
"""In the order of the ladder. Without `ragged` what several begin with is still computed once, unless `sharing` is off too."""
BEFORE_TORCH = {"memory kept"}
"""Has to be off before the environment is prepared, which comes before torch; the others import it."""


def switch_off(names: Iterable[str]) -> None:
    """Replace what these parts are made of, for the rest of this process."""
    for name in names:
        for owner, attribute, instead in PARTS[name].off():
            setattr(owner, attribute, instead)


@dataclass(frozen=True)
class Row:
    """One training that is measured, by turns with another one that differs in one thing."""

    kind: str
    """`ladder`, `without` or `settings`."""
    without: tuple[str, ...] = ()
    """Parts that are switched off."""
    settings: tuple[str, ...] = ()
    beside: str | None = None
    """The row that it is measured by turns with: on the ladder the rung below, else `as it is`. None: nothing but others' neighbour."""

    @property
    def same_losses(self) -> bool:
        """Whether it computes what the others compute: int8 rounds otherwise."""
        return not set(PARTS[INT8].settings) & set(self.settings)


AS_IT_IS, PLAIN = "as it is", "plain"


def rows() -> dict[str, Row]:
    """All rows of an ablation, by their names: each part off with all others on, other settings, and a ladder from nothing upwards."""
    own = [name for name, part in PARTS.items() if not part.settings]
    found = {AS_IT_IS: Row("without")}
    for name in own:
        if name != TILES:  # as it is, nothing is multiplied by them
            found[f"without {name}"] = Row("without", (name,), PARTS[name].without, AS_IT_IS)
    found[HIGH] = Row("settings", (), PARTS[HIGH].settings, AS_IT_IS)
    found[f"{HIGH}, without {TILES}"] = Row("settings", (TILES,), PARTS[HIGH].settings, HIGH)
    found["recomputed"] = Row("settings", (), ("engine.checkpointing=true",), AS_IT_IS)
    found["DeepSpeed, ZeRO 2"] = Row("settings", (), ("engine=deepspeed",), AS_IT_IS)
    below = None
    for number, rung in enumerate([PLAIN, *(f"+ {name}" for name in PARTS)]):
        on = list(PARTS)[:number]
        off = [name for name in own if name not in on]
        settings = [word for name in off for word in PARTS[name].without] + [word for name in on for word in PARTS[name].settings]
        found[rung] = Row("ladder", tuple(off), tuple(settings), below)
        below = rung
    return found
