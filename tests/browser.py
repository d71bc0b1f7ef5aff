"""A headless Chromium, driven through its debugging pipe: real key presses, screenshots, emulated screens."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Looked for in this order.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Seconds for one reply of the browser.
_PATIENCE = 60


class Tab:
    """A page in the browser."""

    def __init__(self, process: subprocess.Popen[bytes], reads: int, writes: int) -> None:
        self._process, self._reads, self._writes = process, reads, writes
        self._sent, self._pending, self._session = 0, b"", ""
        # Errors of scripts and of the console, and requested addresses.
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self._sent:
            self._note(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def open(self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        """Load a page on a screen of this size."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Evaluate an expression in the page."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait(self, expression: str, seconds: float = 240) -> None:
        """Wait until an expression is true. Until the page is loaded, it may fail."""
        deadline = time.monotonic() + seconds
        while not self.value(f"(() => {{ try {{ return !!({expression}) }} catch {{ return false }} }})()"):
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"))
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press and release a key."""
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        code = {"Enter": 13, "Backspace": 8, "Tab": 9}.get(key, ord(key[0].upper()))
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path) -> None:
        """Save what the screen shows as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._reads], [], [], _PATIENCE)
            data = os.read(self._reads, 2**16) if ready else b""
            assert data, f"the browser does not answer (exit code {self._process.poll()})"
            self._pending += data
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])


@contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """Start a browser with its profile in a folder; skips the test if the machine has none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")
    (their_reads, writes), (reads, their_writes) = os.pipe(), os.pipe()
    # The browser reads commands from descriptor 3 and writes to 4.
    script = f'exec "$0" "$@" 3<&{their_reads} 4>&{their_writes}'
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "about:blank"]
    with open(folder / "browser.log", "wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", script, *command], pass_fds=(their_reads, their_writes), stdout=log, stderr=log
        )
    os.close(their_reads)
    os.close(their_writes)
    try:
        yield Tab(process, reads, writes)
    finally:
        process.kill()
        process.wait(240)
        os.close(reads)
        os.close(writes)
