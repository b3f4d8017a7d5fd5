"""Out of memory: all ranks start again together, from the last checkpoint, with half the micro-batch.

A rank that runs out stands in the middle of collectives that the others wait in, and no library can take them out of there.
So each process replaces itself by a new one under the same number: launchers notice nothing, and a card's memory is free.
The global step stays what it was, as its conversations don't depend on how it is split.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tunesmith import lifeline
from tunesmith.config import Refusal
from tunesmith.records import read_json, write_json
from tunesmith.world import World

_ENVIRONMENT = dict(os.environ)
"""What the launcher set, before any library adds to it."""
POLL_S = 0.2


class OutOfMemory(Exception):
    """A rank could not get the memory for a step."""

    def __init__(self, step: int, phase: str, micro_batch: int, error: Exception):
        super().__init__(str(error).splitlines()[0] if str(error) else type(error).__name__)
        self.step = step
        """Updates that were done."""
        self.phase = phase
        """fp16 probe, forward, backward, optimizer, or held-out loss."""
        self.micro_batch = micro_batch


class Restarts:
    """`restarts.json` of a run folder: how often its ranks started again, and the micro-batch that is left."""

    def __init__(self, run: Path, world: World):
        self.path = run / "restarts.json"
        self.world = world
        record = read_json(self.path) or {}
        self.events: list[dict[str, Any]] = record.get("events", [])
        self.micro_batch: int = record.get("micro_batch", 0)
        """Most conversations in a micro-batch; 0: as planned."""

    @property
    def count(self) -> int:
        return len(self.events)

    def lines(self) -> list[str]:
        """Each time in words."""
        return [
            f"rank {event['rank']} ran out of memory in step {event['step'] + 1} ({event['phase']}): micro-batch {event['micro_batch']} -> "
            f"{max(1, event['micro_batch'] // 2)}"
            for event in self.events
        ]

    def watch(self) -> None:
        """Start again too as soon as another rank does; this one may be deep inside a collective."""

        def look() -> None:
            while True:
                time.sleep(POLL_S)
                if self.is_asked():
                    self.replace_process()

        threading.Thread(target=look, daemon=True, name="restarts").start()

    def is_asked(self) -> bool:
        """Whether a rank has written since this process started."""
        return len((read_json(self.path) or {}).get("events", [])) > self.count

    def wait_for_main(self, timeout_s: float) -> None:
        """Until rank 0 has started again: before that the others would meet in what is left of its last life."""
        end = time.monotonic() + timeout_s
        while (read_json(self.path) or {}).get("started", 0) < self.count:
            if time.monotonic() > end:
                raise TimeoutError(f"rank 0 did not start again within {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def note_start(self) -> None:
        """Rank 0: tell the others that it has started again."""
        if self.count:
            write_json(self.path, {"micro_batch": self.micro_batch, "events": self.events, "started": self.count})

    def begin_again(self, short: OutOfMemory) -> NoReturn:
        """Write down why, and start again; raises Refusal if the micro-batch is one conversation already."""
        if short.micro_batch <= 1:
            raise Refusal(
                f"rank {self.world.rank} ran out of memory in step {short.step + 1} ({short.phase}) with one conversation in a micro-batch "
                f"({short}) — engine.checkpointing=true, method.base=nf4 or a smaller data.max_tokens need less; the same command goes on"
            )
        event = {"rank": self.world.rank, "step": short.step, "phase": short.phase, "micro_batch": short.micro_batch, "error": str(short)}
        if not self.is_asked():  # ranks of one cost run out together, and one time counts once
            with suppress(FileNotFoundError):  # another was faster with the same
                write_json(self.path, {"micro_batch": short.micro_batch // 2, "events": [*self.events, event], "started": self.count})
        self.replace_process()

    def replace_process(self) -> NoReturn:
        """Become a new process with the number, the command and the environment of this one."""
        sys.stdout.flush()
        sys.stderr.flush()
        lifeline.say(lifeline.AGAIN)
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # the list's own is closed already
                if number > 2:  # sockets of the process group, the card, and the pipe to W&B's process, which ends with it
                    # Closed by the system, as the new process begins: gloo's threads abort if it happens under them.
                    os.set_inheritable(number, False)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], _ENVIRONMENT)
