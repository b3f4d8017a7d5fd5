"""A program that reads a run's metrics.jsonl and hands the numbers to W&B; WandbSink starts it and tells it when to end.

W&B's client waits for its server, for minutes and in an atexit hook too, keeps a quarter of a minute of numbers in memory,
and can crash on an odd answer. In a process of its own none of that stops, delays or outlives training, and nothing is
lost when it is ended early: the record is there, and another process reads it again.

stdin: a line with the order, and at the end a line with the summary. End of file instead means that training died.
Argument: number of a pipe's writing end, which is written to once everything is handed over.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

POLL_S = 0.5


def main() -> None:
    """Follow the order on stdin; W&B's trouble ends with one line on stderr and exit code 1, at once."""
    outcome, trainer = int(sys.argv[1]), os.getppid()
    os.set_inheritable(outcome, False)
    # deepspeed ends a rank with all its descendants, and W&B's own program dies of any signal. A child of nobody is no descendant.
    if os.fork():
        os._exit(0)
    # A scheduler signals every process of a job, and training is the one that knows what to do about it. SIGINT is W&B's
    # stop button, as a terminal's Ctrl-C does not reach this session: training saves and stops.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    gone = select.poll()
    gone.register(0, 0)  # nothing but that the other end is closed
    signal.signal(signal.SIGINT, lambda *_: None if gone.poll(0) else os.kill(trainer, signal.SIGINT))
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        order = json.loads(stdin.readline())
        try:
            follow(start(order), order, stdin)
        except Exception as error:  # W&B's errors have no common base
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            print(f"tracker.mode={order['init']['mode']}: {told} — {order['otherwise']}", file=sys.stderr, flush=True)
            os._exit(1)  # not sys.exit: the atexit hook would wait for the server
    os.write(outcome, b"0")


def start(order: Mapping[str, Any]) -> Any:
    """Start or resume the W&B run."""
    import wandb

    settings = wandb.Settings(**order["settings"])
    run = wandb.init(settings=settings, **order["init"])
    if order["init"]["mode"] == "online":
        print(f"W&B      {run.url}", flush=True)
    return run


def follow(run: Any, order: Mapping[str, Any], stdin: BinaryIO) -> None:
    """Log lines as they are written; at the end the summary, and for a resumed run how far the record has been read."""
    import wandb

    with open(order["metrics"], "rb") as lines:
        lines.seek(order["read"])
        ended = False
        while not ended:
            ended = bool(select.select([stdin], [], [], POLL_S)[0])  # asked before reading: then all lines are there
            log_new(run, lines)
        read = lines.tell()
    last = json.loads(stdin.readline() or "null")
    # Training would end this process if it takes too long, but may itself be gone by then.
    watchdog = threading.Timer(order["close_s"] + (2 if last else 0), os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    run.summary.update(last["summary"] if last else {})
    run.finish(exit_code=0 if last and last["completed"] else 1)
    wandb.teardown()  # only now is everything on disk, or sent
    state = Path(order["state"])
    aside = state.with_suffix(".tmp")
    aside.write_text(json.dumps({"id": order["init"]["id"], "read": read}))
    os.replace(aside, state)


def log_new(run: Any, lines: BinaryIO) -> None:
    """Log every whole line from where `lines` stands."""
    while (line := lines.readline()).endswith(b"\n"):
        try:
            record = json.loads(line)
            step, record["_timestamp"] = record.pop("step"), record.pop("time")  # when it happened, not when it was read
        except (ValueError, KeyError):  # torn by a kill
            continue
        run.log(record, step=step, commit=True)
    lines.seek(-len(line), os.SEEK_CUR)


if __name__ == "__main__":
    main()
