"""A headless Chromium for tests of pages, driven over a pipe by its own protocol: real clicks and moves, and every request it makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")


class Browser:
    """One page at a time; `requests` holds every address that it asked for, `errors` what its programs raised."""

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False):
        self._profile = tempfile.mkdtemp()
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def wire() -> None:  # the protocol's pipe is file descriptors 3 and 4; away from them first, as one may be the other
            ends = os.dup(to_browser), os.dup(from_browser)
            high = [os.dup2(end, 60 + number) for number, end in enumerate(ends)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={self._profile}"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
        self._process = subprocess.Popen(
            [CHROMIUM, *flags], preexec_fn=wire, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._left, self._session = 0, b"", ""
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and its answer; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._left:
                part = os.read(self._in, 1 << 20)
                assert part, "the browser has ended"
                self._left += part
            line, self._left = self._left.split(b"\0", 1)
            told = json.loads(line)
            if told.get("method") == "Network.requestWillBeSent":
                self.requests.append(told["params"]["request"]["url"])
            elif told.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(told["params"]["exceptionDetails"]))
            elif told.get("id") == self._number:
                assert "error" not in told, told
                return dict(told["result"])

    def js(self, code: str) -> Any:
        """The value of an expression in the page."""
        told = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def open(self, page: Path, ready: str) -> None:
        """Go to a file, and wait until an expression is true."""
        self.ask("Page.navigate", url=page.resolve().as_uri())
        self.wait(ready)

    def wait(self, condition: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.js(f"document.documentElement && ({condition})"):
            assert time.monotonic() < end, f"waited in vain for {condition}; {self.errors}"
            time.sleep(0.05)

    def point(self, place: str) -> tuple[float, float]:
        """The middle of an element, scrolled into view: an expression that gives it."""
        x, y = self.js(
            f"(e => {{ e.scrollIntoView({{block: 'center', inline: 'center'}}); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2]; }})({place})"
        )
        return x, y

    def hover(self, place: str) -> None:
        x, y = self.point(place)
        for offset in (3, 0):
            self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x + offset, y=y)

    def click(self, place: str) -> None:
        self.hover(place)
        x, y = self.point(place)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
