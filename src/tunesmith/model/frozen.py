"""What enters the lowest trained layer, kept on disk, so that nothing below it is computed twice (method.cache_frozen).

A state is what the frozen layers gave the first time that they computed it, in the type that they gave: nothing is rounded. Matmuls of
another shape may round the last bit otherwise, so computing it again in another micro-batch would give a state as good and not the same.

The file has a row of `width` numbers for each beginning (data/prefixes.py). It is read and written in place and not mapped, as pages of
a mapped file would count as memory of this process. Which rows may be read is in a record beside it, which is written anew before each
checkpoint, behind the rows themselves: what a crash tears is in no record, and is computed again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tunesmith.config import Refusal
from tunesmith.model.adapters import decoder_layers, inner_model

if TYPE_CHECKING:
    from tunesmith.data.batches import MicroBatch
    from tunesmith.data.layout import Kept
    from tunesmith.data.prefixes import Beginnings

STATES, RECORD = "states.bin", "about.json"


class FrozenStates:
    """The states of all beginnings of the training data: a file that the ranks of one machine share, and the layers that it stands for."""

    def __init__(self, folder: Path, beginnings: Beginnings, layer: int, width: int, dtype: torch.dtype, base: Path, stored: str):
        """layer: the lowest trained one; width and dtype: of a state; base: the model's folder; stored: how its weights are stored."""
        self.folder = folder
        self.beginnings = beginnings
        self.layer = layer
        self.width = width
        self.dtype = dtype
        self.made_of = {
            "layer": layer, "width": width, "type": str(dtype), "base": stored, "weights": _digest(base), "beginnings": beginnings.digest,
        }  # fmt: skip
        self._file = -1
        self._serving: Kept | None = None

    # --- on disk -----------------------------------------------------------------------------------------------------

    def prepare(self) -> str:
        """Take up what an earlier start left, or begin anew, with room for every state; a line for people. On one rank, before `open`.

        What was made of other weights, tokens or settings is not taken up. Raises Refusal where the disk has too little room.
        """
        size = len(self.beginnings) * self._row_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._read_record() is None:
                (self.folder / RECORD).unlink(missing_ok=True)
                (self.folder / STATES).unlink(missing_ok=True)
            file = os.open(self.folder / STATES, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if shutil.disk_usage(self.folder).free < size - 512 * os.fstat(file).st_blocks:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if sys.platform == "linux":
                    os.posix_fallocate(file, 0, size)  # blocks are taken now, so that none is missing in the middle of a run
                else:
                    os.ftruncate(file, size)
            finally:
                os.close(file)
        except OSError as error:
            free = shutil.disk_usage(self.folder.parent).free / 2**30
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self.remove()
            raise Refusal(
                f"method.cache_frozen=true: {size / 2**30:.2g} GiB for {len(self.beginnings):,} states, and {free:.2g} GiB are free in "
                f"{self.folder} ({error.strerror}) — free some space, choose another folder with outputs=/path, or type "
                "method.cache_frozen=false"
            ) from None
        there = self._read_record()
        have = int(there.sum()) if there is not None else 0
        return f"cache    {size / 2**30:.3g} GiB in {self.folder}, {have:,} of {len(self.beginnings):,} states are there"

    def open(self) -> None:
        """Take up the states that `prepare` has found."""
        there = self._read_record()
        self.beginnings.written[:] = False if there is None else there
        self._file = os.open(self.folder / STATES, os.O_RDWR)

    def commit(self) -> None:
        """Let a later start read what has been written until now. On one rank, when all have ended a step."""
        os.fsync(self._file)  # whichever process of this machine has written it
        flags = np.concatenate([[False], self.beginnings.written, [False]])
        runs = np.flatnonzero(flags[1:] != flags[:-1]).reshape(-1, 2)
        aside = self.folder / f".{RECORD}.tmp"
        try:
            with aside.open("w", encoding="utf-8") as file:
                json.dump({**self.made_of, "written": runs.tolist()}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.folder / RECORD)
        except OSError as error:  # the record from before still holds
            told = f"tunesmith: {self.folder / RECORD} cannot be written ({error.strerror}): a later start reads fewer states"
            print(told, file=sys.stderr)

    def remove(self) -> None:
        """Give the disk back; on one rank, when no other reads any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def _row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def _read_record(self) -> np.ndarray | None:
        """Which states are there, bool [beginnings]; None where that is not known, or they are not these."""
        try:
            record = json.loads((self.folder / RECORD).read_text("utf-8"))
            runs = np.array(record.pop("written"), np.int64).reshape(-1, 2)
            whole = (self.folder / STATES).stat().st_size == len(self.beginnings) * self._row_bytes
        except (OSError, ValueError, KeyError, AttributeError):
            return None
        if record != self.made_of or not whole:
            return None
        there = np.zeros(len(self.beginnings), bool)
        for start, stop in runs.tolist():
            there[start:stop] = True
        return there

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """The states of these rows, [rows, width]; zeros for -1."""
        states = torch.zeros(len(rows), self.width, dtype=self.dtype)
        numbers = states.view(torch.uint8).numpy()
        for start, stop in _runs(rows):
            self._move(os.preadv, numbers[start:stop], int(rows[start]))
        return states

    def write(self, rows: np.ndarray, states: torch.Tensor) -> None:
        """Put states [rows, width] into these rows; raises RuntimeError for states of another type or width."""
        if states.dtype is not self.dtype or states.shape[1:] != (self.width,):
            raise RuntimeError(
                f"method.cache_frozen: layer {self.layer} is given {tuple(states.shape[1:])} numbers of {states.dtype} a token, "
                f"expected were {self.width} of {self.dtype}"
            )
        numbers = states.cpu().contiguous().view(torch.uint8).numpy()
        for start, stop in _runs(rows):
            self._move(os.pwritev, numbers[start:stop], int(rows[start]))

    def _move(self, call: Callable[[int, list[memoryview], int], int], numbers: np.ndarray, row: int) -> None:
        """Read or write neighbouring rows from `row` on, all of them."""
        rest, place = memoryview(numbers.reshape(-1)), row * self._row_bytes  # type: ignore[arg-type]  # arrays are buffers, untyped
        while rest:
            done = call(self._file, [rest], place)
            if not done:
                raise OSError(f"{self.folder / STATES} ends at byte {place}, where a state should be")
            rest, place = rest[done:], place + done

    # --- in the model ------------------------------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        """Let the layers of a model read and write states while a micro-batch is served; raises Refusal where a layer draws at random."""
        layers = decoder_layers(model)
        below = layers[: self.layer]
        if found := next(_dropouts([inner_model(model).get_input_embeddings(), *below]), None):
            raise Refusal(
                f"method.cache_frozen=true: below layer {self.layer} this model drops numbers at random while it trains ({found}), so that "
                "its states differ each time — type method.cache_frozen=false"
            )
        for layer in below:
            layer.forward = self._unless_known(layer.forward)
        layers[self.layer].register_forward_pre_hook(self._enter)

    @contextmanager
    def serving(self, batch: MicroBatch) -> Iterator[None]:
        """What the model does inside it does for this micro-batch."""
        self._serving = batch.kept
        try:
            yield
        finally:
            self._serving = None

    def _unless_known(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: torch.Tensor, *others: Any, **named: Any) -> Any:
            return hidden if self._serving and self._serving.known else forward(hidden, *others, **named)

        return run

    def _enter(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the lowest trained layer, whose first input is [1, tokens, width]: read what was not computed, or write what was."""
        kept, (hidden, *others) = self._serving, inputs
        if kept is None:
            return None
        if kept.known:
            return self.read(kept.rows).to(hidden.device)[None], *others
        if len(kept.new):
            self.write(kept.rows[kept.new], hidden.detach()[0, torch.from_numpy(kept.new).to(hidden.device)])
        return None


def _digest(folder: Path) -> str:
    """Of what a model's folder holds: its config, and names, sizes and times of its weights (to read them all would take minutes)."""
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    stats = [(path.name, stat.st_size, stat.st_mtime_ns) for path in weights for stat in [path.stat()]]
    return hashlib.sha256((folder / "config.json").read_bytes() + json.dumps(stats).encode()).hexdigest()


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of the stretches of rows that follow each other, those of -1 left out."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    bounds = [0, *cuts.tolist(), len(rows)]
    # Behind -1 comes 0: they would be neighbours.
    found = [(start + (rows[start] < 0), stop) for start, stop in pairwise(bounds)]
    return [(int(start), stop) for start, stop in found if start < stop]


def _dropouts(parts: list[nn.Module]) -> Iterator[str]:
    """What draws at random in them in training mode, with how much of it."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                yield f"dropout {module.p:g}"
            share = getattr(module, "attention_dropout", 0.0)
            if isinstance(share, float) and share > 0:
                yield f"attention_dropout {share:g}"
