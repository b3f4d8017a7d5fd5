"""How the comparison talks with a program that trains: lines of JSON, so that it can be of any framework and environment.

The program trains its first update unasked, and then stands until it is told: `steps N` takes N updates, `loss` gives the held-out loss.
It needs the standard library only: peers run it in environments of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

MARK = "@@"


class Worker:
    """The end of the program that trains."""

    def __init__(self, held_out: Callable[[], float]):
        self.held_out = held_out
        self.losses: list[float] = []
        """Of the updates so far, as far as the program tells them."""
        self.facts: dict[str, Any] = {}
        """What else the program has to say of itself in the end."""
        self.baseline = 0.0
        self._left, self._begun = 1, 0.0

    def imported(self) -> None:
        """All libraries are here, and no weight yet: what memory is measured from."""
        self.baseline = memory_gib("VmRSS")

    def step_done(self) -> None:
        """Count an update; at a window's end, tell how long it took and wait for what is next."""
        self._left -= 1
        if self._left:
            return
        now = time.perf_counter()
        if self._begun:
            self._tell(seconds=now - self._begun)
        else:
            self._tell(first_step_s=time.time() - float(os.environ["BENCH_STARTED"]))
        for line in sys.stdin:
            word, _, number = line.strip().partition(" ")
            if word == "steps":
                self._left, self._begun = int(number), time.perf_counter()
                return
            peak = memory_gib("VmHWM")  # before the held-out loss, which is not training
            self._tell(held_out=self.held_out(), losses=self.losses, peak_gib=peak, over_gib=peak - self.baseline, **self.facts)
        os._exit(0)  # the comparison is over

    def _tell(self, **facts: Any) -> None:
        print(MARK + json.dumps(facts), flush=True)


def memory_gib(name: str) -> float:
    """VmRSS (now) or VmHWM (highest so far) of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 2**20
