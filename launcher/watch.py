"""Start the ranks' command and stay with it: requests to stop go to every rank, and the end of one is the end of all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO

from tunesmith.lifeline import GRACE_S, VARIABLE, Lifeline

Commands = Callable[[Mapping[str, str]], tuple[list[list[str]], Mapping[str, str]]]
TAIL = 40


@dataclass(frozen=True)
class Ended:
    """How the ranks' commands ended."""

    code: int
    """The first exit code that is not 0. Launchers translate: a run's status says more."""
    signal: int
    """The first signal that asked for the end; 0: none."""
    lost: str
    """What is known of a rank that failed or a node that is gone; empty: nothing of that kind."""
    tail: str
    """The last lines on stderr."""


def watch(prepare: Commands, address: str, *, keep_tail: bool = True) -> Ended:
    """Run commands side by side until all have ended.

    prepare: from the environment with the launcher's own place to the commands and their environment. address: this machine's name, as
    the nodes reach it. SIGUSR1, SIGTERM and SIGINT ask all ranks to save and stop. When a rank fails, all end, whatever started them.
    keep_tail: pass stderr on line by line and keep the last lines; otherwise the commands have this process's own.
    """
    asked: list[int] = []
    lost: list[str] = []
    processes: list[subprocess.Popen[str]] = []

    def failed(what: str) -> None:
        lost.append(what)
        time.sleep(2 * GRACE_S)  # the ranks end by themselves, and most launchers notice
        for process in processes:
            _end(process)

    line = Lifeline(address, failed)

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        # In a thread, as this may have interrupted whoever holds the lock. Ctrl-C again means: now.
        if len(asked) == 1 or asked.count(signal.SIGINT) == 2:
            threading.Thread(target=line.save_and_stop if len(asked) == 1 else line.end, daemon=True).start()

    before = {number: signal.signal(number, handle) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    commands, environment = prepare({**os.environ, VARIABLE: line.place})
    tail: deque[str] = deque(maxlen=TAIL)
    readers = []
    stderr = subprocess.PIPE if keep_tail else None
    for command in commands:
        # A group of its own: what a terminal or a scheduler sends to this one's group reaches the ranks through the lifeline, once.
        process = subprocess.Popen(command, env=dict(environment), stderr=stderr, text=True, errors="replace", start_new_session=True)
        processes.append(process)
        if process.stderr is None:
            continue
        readers.append(threading.Thread(target=_pass_on, args=(process.stderr, tail), daemon=True))
        readers[-1].start()
    codes = [process.wait() for process in processes]
    for reader in readers:
        reader.join(timeout=GRACE_S)
    line.end()  # whoever is left on another machine
    for number, handler in before.items():
        signal.signal(number, handler)
    code = next((code for code in codes if code), 0)
    return Ended(code if code >= 0 else 128 - code, asked[0] if asked else 0, lost[0] if lost else "", "\n".join(tail))


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)


def _pass_on(stream: IO[str], tail: deque[str]) -> None:
    for text in stream:
        tail.append(text.rstrip("\n"))
        sys.stderr.write(text)
        sys.stderr.flush()


def free_port(first: int) -> int:
    """The first port from `first` on that nobody listens at on this machine."""
    for port in range(first, first + 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("", port))
                return port
    raise OSError(f"no port from {first} to {first + 199} is free")
