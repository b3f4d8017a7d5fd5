"""A connection from every rank to the launcher that started it, which watches over them on other machines too.

Through it the launcher asks all ranks to save and stop, whatever stands between (srun, torchrun, ssh). A rank says there how it ends,
so that one failure ends all. And since the system closes it when either side dies, however it dies, nothing outlives a launcher.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

VARIABLE = "TUNESMITH_LIFELINE"
"""Environment variable: HOST:PORT of the launcher; unset where a launcher of others started the ranks."""
SAVE, END = b"s", b"e"
AGAIN = 255
"""A rank's word that it starts again as a new process (out of memory), in the place of an exit code."""
ORPHAN_S = 30.0
"""How long a rank may take to save once its launcher is gone."""
GRACE_S = 3.0
"""How long ranks may take to say why they fail once another has failed."""
CONNECT_S = 20.0

_line: socket.socket | None = None
_said = False


def hold() -> None:
    """Connect to the launcher that VARIABLE names, if any, and follow it; ends the process with 75 if it is not there.

    Install the handler of SIGUSR1 first: that is how a request to save arrives.
    """
    global _line
    place = os.environ.get(VARIABLE, "")
    if not place or _line is not None:
        return
    host, _, port = place.rpartition(":")
    try:
        line = socket.create_connection((host, int(port)), timeout=CONNECT_S)
    except OSError as error:
        print(f"tunesmith: the launcher at {place} cannot be reached ({error}): this rank leaves", file=sys.stderr, flush=True)
        os._exit(75)
    line.settimeout(None)
    _keep_alive(line)
    _line = line
    threading.Thread(target=_follow, args=(line,), daemon=True, name="lifeline").start()


def _follow(line: socket.socket) -> None:
    word = b"?"
    with suppress(OSError):
        while (word := line.recv(1)) == SAVE:
            os.kill(os.getpid(), signal.SIGUSR1)
    if _said:  # the launcher closes its end then, and this process is about to go
        return
    if word != END:  # nobody is left to start this run again, so what is done is saved
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S if word == END else ORPHAN_S)
    os._exit(1 if word == END else 75)


def say(code: int) -> None:
    """Tell the launcher how this process ends: its exit code, or AGAIN."""
    global _said
    if _line is not None:
        _said = True
        with suppress(OSError):
            _line.sendall(bytes([code]))


class Lifeline:
    """The launcher's end: accepts ranks for as long as it is open."""

    def __init__(self, address: str, failed: Callable[[str], None]):
        """`failed` is called once, from a thread, with what is known, when a rank has failed or is lost."""
        self._door = socket.create_server(("", 0), backlog=1024)
        self.place = f"{address}:{self._door.getsockname()[1]}"
        self._failed = failed
        self._lines: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._asked = self._over = False
        threading.Thread(target=self._accept, daemon=True, name="lifeline").start()

    def save_and_stop(self) -> None:
        """Ask all ranks, and those that come later, to save and stop."""
        with self._lock:
            self._asked = True
            self._send(SAVE)

    def end(self) -> None:
        """End all ranks now."""
        with self._lock:
            self._over = True
            self._send(END)

    def _send(self, word: bytes) -> None:
        for line in self._lines:
            with suppress(OSError):
                line.sendall(word)

    def _accept(self) -> None:
        while True:
            line, _ = self._door.accept()
            _keep_alive(line)
            with self._lock:
                self._lines.add(line)
                word = END if self._over else SAVE if self._asked else b""
            with suppress(OSError):
                line.sendall(word)
            threading.Thread(target=self._listen, args=(line,), daemon=True).start()

    def _listen(self, line: socket.socket) -> None:
        known, _ = ("", 0) if not (peer := _peer(line)) else peer
        try:
            word = line.recv(1)
            told = "" if word and word[0] in (0, 75, AGAIN) else f"a rank on {known} " + (f"ended with {word[0]}" if word else "was killed")
        except OSError as error:
            lost = error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
            told = f"{known} does not answer any more" if lost else f"a rank on {known} was killed"
        with self._lock:
            self._lines.discard(line)
            first, self._over = not self._over, self._over or bool(told)
            if told and first:
                self._send(END)
        if told and first:
            self._failed(told)


def _peer(line: socket.socket) -> tuple[str, int] | None:
    with suppress(OSError):
        address, port = line.getpeername()[:2]
        with suppress(OSError):
            return socket.gethostbyaddr(address)[0], port
        return address, port
    return None


def _keep_alive(line: socket.socket) -> None:
    """Notice within half a minute that the other machine is gone: silent for 10 s, then 3 questions 5 s apart."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        line.setsockopt(socket.IPPROTO_TCP, option, value)
