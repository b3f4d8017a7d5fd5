"""The processes that prepare large files, piece by piece, and the bar that shows how far they are."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn, TransferSpeedColumn

from tunesmith.config import Refusal
from tunesmith.data.files import Chunk, chunks
from tunesmith.data.prepare import Piece, Work, prepare_piece

LARGE = 2**23
"""Bytes from which on a file is worth starting processes for: below, they take longer to start than to work."""


COLLECTED = 16
"""Pieces of a file between two collections of garbage."""
_DONE = count(1)


class Workers(AbstractContextManager["Workers"]):
    """The processes that prepare large files, started when the first one comes."""

    def __init__(self, count: int):
        self.count = count or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def pieces(self, origin: Path | str, work: Work) -> Iterator[Piece]:
        """The file's pieces in order, at most two for each process ahead of the reader."""
        size = origin.stat().st_size if isinstance(origin, Path) else 0
        if size < LARGE or self.count == 1:
            with _progress(f"preparing data.{work.part}", size) if size >= LARGE else nullcontext(lambda _: None) as advance:
                for chunk in chunks(origin):
                    yield prepare_piece(work, chunk)
                    advance(chunk.size)
            return
        if self._pool is None:
            # Spawned, as a fork would copy whatever locks torch's threads hold.
            self._pool = ProcessPoolExecutor(self.count, get_context("spawn"), _start_worker, (os.getpid(),))
        waiting: deque[Future[Piece]] = deque()
        try:
            # The renderer has megabytes of tokenizer: each process reads it once, not with every piece.
            with tempfile.NamedTemporaryFile() as order, _progress(f"preparing data.{work.part}", size) as advance:
                order.write(pickle.dumps(work))
                order.flush()
                for chunk in chunks(origin):
                    waiting.append(self._pool.submit(_in_worker, order.name, chunk))
                    if len(waiting) > 2 * self.count:
                        yield self._next(waiting, advance)
                while waiting:
                    yield self._next(waiting, advance)
        except BrokenProcessPool:
            raise Refusal(
                f"{origin}: a process that prepares it was killed, perhaps for memory ({self.count} run) — data.workers=1 needs the least"
            ) from None

    @staticmethod
    def _next(waiting: deque[Future[Piece]], advance: Callable[[int], None]) -> Piece:
        piece = waiting.popleft().result()
        advance(piece.size)
        return piece


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is one of as many as there are cores
    pa.set_cpu_count(1)
    # Thousands of small objects live as long as a piece does: the collector would walk through all of them again and again.
    gc.freeze()
    gc.disable()

    def watch() -> None:
        while os.getppid() == parent:  # a parent that is killed says nothing
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _order(name: str) -> Work:
    work = pickle.loads(Path(name).read_bytes())
    assert isinstance(work, Work)
    return work


def _in_worker(order: str, chunk: Chunk) -> Piece:
    piece = prepare_piece(_order(order), chunk)
    if next(_DONE) % COLLECTED == 0:
        gc.collect()  # takes a tenth of a piece's time; what is in no cycle has gone by itself
    return piece


@contextmanager
def _progress(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, on a terminal; a line at the beginning and at the end elsewhere."""
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{what}: {size / 2**20:,.0f} MiB", file=sys.stderr, flush=True)
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=size)
        yield lambda done: bar.update(task, advance=done)
    if not console.is_terminal:
        print(f"{what}: done in {time.perf_counter() - start:,.1f} s", file=sys.stderr, flush=True)
