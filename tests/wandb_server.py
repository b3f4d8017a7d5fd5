"""As much of W&B's server as its client (0.31) needs, on the loopback: keys, runs, saved views, and a sweep that leads agents."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY, SWEEP = "somebody", "sweep1"
ACCOUNT = {"WANDB_API_KEY": "0" * 40}


@dataclass
class Run:
    """A run as the server has it."""

    sweep: str
    """Its sweep's id, as the client gave it."""
    config: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Every line of its history, in the order of arrival."""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    """What each process that had it open has said at its end."""


Command = dict[str, Any]


class WandbServer:
    """Answers from another thread for as long as it is entered.

    delay_s: how long every answer takes. dies_at: part of a request that it does not live to answer.
    """

    def __init__(self, delay_s: float = 0.0, dies_at: str = "") -> None:
        self.delay_s, self.dies_at = delay_s, dies_at
        self.seen: list[str] = []
        """Path and body of each request."""
        self.runs: dict[str, Run] = {}
        self.sweep: str = ""
        """The sweep's file, as `wandb sweep` has sent it."""
        self.commands: Callable[[Mapping[str, bool]], list[Command]] = lambda running: []
        """What an agent is told at a heartbeat, from the runs that it has at work."""
        self._closing = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"wandb": self}))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up is what some tests are about
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a client talk to this server."""
        return {"WANDB_BASE_URL": self.url, **ACCOUNT}

    def sent(self, query: str) -> list[dict[str, Any]]:
        """Variables of every GraphQL request that has `query` in it."""
        bodies = [json.loads(request.partition(" ")[2]) for request in list(self.seen) if request.startswith("/graphql ")]
        return [body.get("variables", {}) for body in bodies if query in body["query"]]

    def opened(self, name: str) -> int:
        """How many processes have opened the run, the first one or to go on."""
        return sum(sent["name"] == name for sent in self.sent("query RunResumeStatus"))

    def answer(self, path: str, body: str) -> dict[str, Any]:
        self.seen.append(f"{path} {body}")
        dead = self.dies_at and any(self.dies_at in request for request in self.seen)
        self._closing.wait(None if dead else self.delay_s)
        if path == "/graphql":
            asked = json.loads(body)
            return {"data": self._graphql(asked["query"], asked.get("variables") or {})}
        if path.endswith("/file_stream"):
            self._stream(self.runs[path.split("/")[-2]], json.loads(body))
        return {}

    def _graphql(self, query: str, given: Mapping[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": given.get("project") or "tunesmith", "entity": {"id": "e", "name": ENTITY}}
        if "upsertBucket" in query:
            return {"upsertBucket": self._upsert(given, project)}
        if "query RunResumeStatus" in query:
            return {"model": {**project, "bucket": self._bucket(given["name"])}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "upsertView" in query:
            return {"upsertView": {"view": {"id": "v", "name": "nw-abc-v"}, "inserted": True}}
        if "upsertSweep" in query:
            self.sweep = given["config"]
            return {"upsertSweep": {"sweep": {"name": SWEEP, "project": project}, "configValidationWarnings": []}}
        if "query SweepWithRuns" in query:
            found = {"id": "s", "name": SWEEP, "config": self.sweep, "state": "RUNNING", "runs": {"edges": []}}
            return {"project": {"sweep": found if given["sweep"] == SWEEP else None}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "a"}}}
        if "agentHeartbeat" in query:
            told = self.commands(json.loads(given["runState"]))
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(told)}}
        if "viewer" in query:
            return {"viewer": {"id": "e", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _upsert(self, given: Mapping[str, Any], project: dict[str, Any]) -> dict[str, Any]:
        name = given["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(given.get("sweep") or "", {}))
        run.config |= json.loads(given.get("config") or "{}")
        bucket = {"id": f"id-{name}", "name": name, "displayName": name, "config": json.dumps(run.config), "project": project}
        return {"bucket": {**bucket, "sweepName": run.sweep or None, "historyLineCount": len(run.lines)}, "inserted": inserted}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        """A known run, as whoever resumes it asks for it."""
        if (run := self.runs.get(name)) is None:
            return None
        tail = json.dumps([json.dumps(line) for line in run.lines[-1:]])
        counts = {"logLineCount": 0, "historyLineCount": len(run.lines), "eventsLineCount": 0, "historyTail": tail, "eventsTail": "[]"}
        known = {"config": json.dumps(run.config), "summaryMetrics": json.dumps(run.summary), "tags": [], "notes": None}
        return {"id": f"id-{name}", "name": name, "displayName": name, **counts, **known, "wandbConfig": json.dumps({"t": 1})}

    def _stream(self, run: Run, sent: Mapping[str, Any]) -> None:
        files = sent.get("files") or {}
        run.lines += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run.summary = json.loads(line)
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])


class _Handler(BaseHTTPRequestHandler):
    wandb: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.close_connection = True
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        answer = json.dumps(self.wandb.answer(self.path, body)).encode()
        with suppress(OSError):  # the client has given up
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    do_PUT = do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass
