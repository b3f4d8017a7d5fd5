"""Asking what may hang, crash or lie: in a process or a thread of its own, with a time limit, never raising."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import IO, Any, TypeVar

T = TypeVar("T")
REACH_S = 3.0
"""How long a server may take to answer."""


@dataclass(frozen=True)
class Answer:
    """What a probe found until it ended, and why it said no more."""

    found: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    """Empty: it came to its end."""


@dataclass(frozen=True)
class Reply:
    """A server's answer."""

    status: int
    """HTTP status; 0: none came."""
    body: bytes = b""
    why: str = ""
    """What kept an answer from coming."""


def ask_process(module: str, words: list[str], order: Mapping[str, Any], limit_s: float, extra: Mapping[str, str] | None = None) -> Answer:
    """Run `python -m MODULE WORDS` with the order on stdin and put together the JSON objects it prints, a line each.

    At the limit the whole group of processes is killed; what it printed before counts. The child has an alarm of its own,
    so that it does not outlive a doctor who was killed.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", module, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True, env={**os.environ, **(extra or {})},
    )  # fmt: skip
    why, out, err = "", "", ""
    try:
        out, err = child.communicate(json.dumps({**order, "limit_s": limit_s}), timeout=limit_s)
    except subprocess.TimeoutExpired:
        why = f"no answer within {limit_s:.0f} s"
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that hangs in a driver cannot even be killed
            out, err = child.communicate(timeout=5)
    if not why and child.returncode:
        died = f"died of {signal.Signals(-child.returncode).name}" if child.returncode < 0 else f"ended with code {child.returncode}"
        why = f"{died}: {last_line(err)}" if last_line(err) else died
    found: dict[str, Any] = {}
    for line in out.splitlines():
        with suppress(ValueError):
            found |= json.loads(line)
    return Answer(found, why)


def answer_to(probe: Callable[[Mapping[str, Any], Callable[[Mapping[str, Any]], None]], None]) -> None:
    """The child's side: read the order, hand it to the probe with a way to tell what is found, and leave at once.

    What libraries print goes to stderr, so that stdout carries nothing but answers.
    """
    order = json.loads(sys.stdin.readline())
    signal.alarm(int(order["limit_s"]) + 5)
    answers: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(found: Mapping[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    probe(order, tell)
    os._exit(0)  # a process group or a library's threads can hold up the interpreter's end


def within(limit_s: float, work: Callable[[], T]) -> T | None:
    """What the work returns, or None if it raises or takes longer; a thread that hangs is left behind."""
    results: list[T] = []

    def run() -> None:
        with suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    return results[0] if results else None


def ask_server(url: str, *, token: str = "", user: str = "", post: Any = None, limit_s: float = REACH_S) -> Reply:
    """One HTTP request, redirects not followed: a status below 400 means that what was asked for is there.

    token goes as a bearer's, or with a user as its password. As redirects are not followed, it is shown to nobody else.
    """
    headers = {"User-Agent": "tunesmith-doctor"}
    if user:
        import base64

        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{token}".encode()).decode()
    elif token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if post is None else json.dumps(post).encode()
    if data is not None:
        headers["Content-Type"] = "application/json"

    def request() -> Reply:
        try:
            asked = urllib.request.Request(url, data=data, headers=headers)
            with urllib.request.build_opener(_NoRedirect).open(asked, timeout=limit_s) as reply:
                return Reply(reply.status, reply.read(2**16))
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, error.read(2**16))
        except urllib.error.URLError as error:
            return Reply(0, why=str(error.reason))
        except (OSError, HTTPException, ValueError) as error:
            return Reply(0, why=str(error) or type(error).__name__)

    # The timeout of a socket begins anew with every byte, so a slow server needs another one.
    return within(limit_s + 0.5, request) or Reply(0, why=f"no answer within {limit_s:g} s")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def last_line(text: str) -> str:
    """The last line that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def first_line(error: BaseException) -> str:
    """The first line of an error, with its type where the text alone says little."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
