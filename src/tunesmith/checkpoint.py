"""Checkpoints that are complete or absent: written aside, hashed, renamed; the newest good one is taken up."""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tunesmith.config import Refusal
from tunesmith.engine import Engine
from tunesmith.model import save_model
from tunesmith.records import read_json, write_json

NAME = re.compile(r"step-(\d+)")
MANIFEST = "manifest.json"


@dataclass
class Best:
    """The lowest held-out loss so far, where train.patience asks for it; every checkpoint carries it."""

    step: int = 0
    """0: none was seen."""
    loss: float = 0.0
    waited: int = 0
    """Held-out losses since, none of them lower."""

    def see(self, step: int, loss: float) -> bool:
        """Take note of a held-out loss; True if it is the lowest. (One that is not a number is not.)"""
        if loss < self.loss if self.step else math.isfinite(loss):
            self.step, self.loss, self.waited = step, loss, 0
            return True
        self.waited += 1
        return False


class Checkpoints:
    """The checkpoints of a run, shared by all its ranks."""

    def __init__(self, folder: Path, engine: Engine, keep: int):
        self.folder = folder
        self.engine = engine
        self.keep = keep
        self.alarm = ""
        """Why the last save did not come about; empty when it did."""
        self.best = Best()

    def save(self, step: int) -> bool:
        """Save all ranks' state after `step` updates; False, with an alarm on stderr, if the disk does not take it.

        A failed save removes what it wrote and leaves older checkpoints alone: training goes on and saves again later.
        """
        final = self.folder / f"step-{step:06d}"
        aside = self.folder / f".{final.name}.tmp"
        ok = self._on_main(lambda: self._clear(aside))
        if ok:
            ok = self._attempt(lambda: self._write_part(aside))
        if ok:
            ok = self._on_main(lambda: self._publish(aside, final, step))
        if not ok:
            self._on_main(lambda: shutil.rmtree(aside, ignore_errors=True))
        elif self.engine.world.is_main:
            self._forget_old()
        return ok

    def restore(self) -> int:
        """Take up the newest checkpoint that is whole; the number of updates it has, 0 if there is none.

        A damaged one is set aside as *.bad and the one before is taken. Raises Refusal if the newest was made by another
        number of ranks and cannot be split anew.
        """
        found = self.engine.broadcast(self._newest_good() if self.engine.world.is_main else None)
        if found is None:
            return 0
        step, folder, manifest = found
        now = {"engine": type(self.engine).__name__, "world_size": self.engine.world.size}
        split = manifest["engine"] != "AccelerateEngine"  # each rank has a part of its own
        if manifest["engine"] != now["engine"] or (split and manifest["world_size"] != now["world_size"]):
            raise Refusal(
                f"{folder}: written by {manifest['world_size']} ranks of {manifest['engine']}, "
                f"this is {now['world_size']} of {now['engine']} — "
                "start with as many ranks as before, or as a run of its own (name=... or train.seed=...)"
            )
        self.engine.restore(folder)
        rank = self.engine.world.rank if self.engine.world.rank < manifest["world_size"] else 0
        restore_random_state(torch.load(folder / f"random-{rank}.pt", weights_only=False))
        self.best = Best(**manifest.get("best", {}))
        return int(step)

    def take_best(self) -> bool:
        """Put the weights with the lowest held-out loss in the place of the present ones; False if they are not on the disk."""
        folder = self.folder / f"step-{self.best.step:06d}"
        there = self.engine.broadcast(_whole_manifest(folder) is not None if self.engine.world.is_main else None)
        if there:
            self.engine.restore(folder)
        return bool(there)

    def _write_part(self, aside: Path) -> None:
        self.engine.save(aside)
        torch.save(random_state(), aside / f"random-{self.engine.world.rank}.pt")

    def _publish(self, aside: Path, final: Path, step: int) -> None:
        files = {}
        for path in sorted(p for p in aside.rglob("*") if p.is_file()):
            files[str(path.relative_to(aside))] = {"bytes": path.stat().st_size, "sha256": digest(path)}
            _sync(path)
        made_by = {"engine": type(self.engine).__name__, "world_size": self.engine.world.size}
        record = {"step": step, **made_by, "best": asdict(self.best), "files": files}
        write_json(aside / MANIFEST, record)  # last: what has a manifest is complete
        _sync(aside)
        if final.exists():  # an earlier, damaged attempt at this step that was not taken up
            final.rename(_free_name(final))
        os.replace(aside, final)
        _sync(self.folder)

    def _newest_good(self) -> tuple[int, Path, dict[str, Any]] | None:
        for step, folder in reversed(self._present()):
            if manifest := _whole_manifest(folder):
                return step, folder, manifest
            bad = _free_name(folder)
            folder.rename(bad)
            print(f"tunesmith: checkpoint {folder.name} is damaged; set aside as {bad.name}, the one before is taken", file=sys.stderr)
        return None

    def _present(self) -> list[tuple[int, Path]]:
        """Complete checkpoints, oldest first, ordered by step: never by time, which a clock or a copy can change."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name))]
        return sorted(found)

    def _forget_old(self) -> None:
        old = [folder for step, folder in self._present()[: -self.keep] if step != self.best.step]
        for folder in old:
            doomed = folder.with_name(f".{folder.name}.old")
            os.replace(folder, doomed)  # out of sight in one move, then deleted at leisure
            shutil.rmtree(doomed, ignore_errors=True)

    def _clear(self, aside: Path) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def _on_main(self, work: Any) -> bool:
        return self._attempt(work if self.engine.world.is_main else lambda: None)

    def _attempt(self, work: Any) -> bool:
        """Do this rank's part; True on all ranks if it worked on all."""
        try:
            work()
            failed = 0
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.alarm = f"{type(error).__name__}: {error}"
            print(f"tunesmith: rank {self.engine.world.rank} could not save a checkpoint: {error}", file=sys.stderr)
            failed = 1
        return self.engine.agree(failed) == 0


def export(engine: Engine, folder: Path) -> None:
    """Leave the adapter (PEFT layout) or the full model (Hugging Face layout) in `folder`, whole or not at all.

    What was written is read again and held against the weights; raises RuntimeError on all ranks where it is not the same.
    """
    state = engine.trained_state()
    wrong = ""
    if engine.world.is_main:
        assert state is not None
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        save_model(engine.model, aside, {name.removeprefix("model."): weight for name, weight in state.items()})
        wrong = not_written(state, aside)
        if wrong:
            shutil.rmtree(aside)
    if wrong := engine.broadcast(wrong):
        raise RuntimeError(f"{folder}: {wrong} — nothing was left there; the checkpoints are whole, and the same command writes it anew")
    if engine.world.is_main:
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)


def not_written(state: Mapping[str, torch.Tensor], folder: Path) -> str:
    """What of the weights is not in the folder's .safetensors files, shape and bits, in words; empty if all of it is.

    By content: PEFT and Hugging Face write other names than the model's own.
    """
    if empty := [name for name, weight in state.items() if not weight.numel()]:  # a shard that was never gathered looks so
        return f"{len(empty)} of {len(state)} trained weights are empty (first: {empty[0]})"
    written = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                written |= {_content(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            return f"{path.name} cannot be read ({error})"
    lost = [name for name, weight in state.items() if _content(weight) not in written]
    return f"{len(lost)} of {len(state)} trained weights are not what the file has (first: {lost[0]})" if lost else ""


def _content(weight: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = weight.detach().contiguous().reshape(-1).view(torch.uint8)
    return weight.dtype, weight.shape, hashlib.sha256(flat.numpy().data).digest()


def random_state() -> dict[str, Any]:
    """The generators that dropout and data may draw from, of this rank."""
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def digest(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _whole_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint of which every file is there as it was written, else None."""
    manifest = read_json(folder / MANIFEST)
    whole = manifest and all(_is_whole(folder / name, facts) for name, facts in manifest["files"].items())
    return manifest if whole else None


def _is_whole(path: Path, facts: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == facts["bytes"] and digest(path) == facts["sha256"]


def _free_name(folder: Path) -> Path:
    number = 0
    while (bad := folder.with_name(f"{folder.name}.bad{number or ''}")).exists():
        number += 1
    return bad


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
