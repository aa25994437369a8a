"""A headless Chromium over a pipe: opens pages, and says which dialogs, requests and elements they made."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-dev-shm-usage", "--disable-default-apps", "--mute-audio", "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Browser:
    """One tab. Scripts may run and the page's content policy is off, so that only escaping protects it."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._buffer, self._last = to, back, b"", 0
        self._session: str | None = None
        self.dialogs: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self._call(f"{domain}.enable")
        self._call("Page.setBypassCSP", enabled=True)

    def open(self, page: Path) -> None:
        """Go to a page and wait until it is loaded."""
        self._loaded = False
        self._call("Page.navigate", url=page.as_uri())
        deadline = time.monotonic() + 120
        while not self._loaded:
            self._receive(deadline)

    def run(self, expression: str) -> Any:
        """Value of an expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _call(self, method: str, **params: Any) -> Any:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        wanted, deadline = self._last, time.monotonic() + 180
        while True:
            found = self._receive(deadline)
            if found.get("id") == wanted:
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "Chromium does not answer"
            more = os.read(self._back, 1 << 20)
            assert more, "Chromium has ended"
            self._buffer += more
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            self._last += 1
            data = {"id": self._last, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
            os.write(self._to, json.dumps(data | {"sessionId": self._session}).encode() + b"\0")
        elif event == "Network.requestWillBeSent":
            request, kind = params["request"]["url"], params.get("type")
            own = kind == "Document" and request.startswith("file:") and request.endswith(".html")
            if not own:
                self.requests.append(request)


def find() -> str:
    """Path of the browser; a missing one is a failure that says how to get it."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    assert found, (
        "Chromium is not installed, and the report must be opened in a real browser. Debian and Ubuntu:"
        " apt-get install chromium (.ci/run does that); elsewhere put chromium or google-chrome on PATH."
    )
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium with an empty profile, and end it."""
    to_read, to_write = os.pipe()
    back_read, back_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads commands from descriptor 3 and answers on 4.
        line = f'exec "$0" "$@" 3<&{to_read} 4>&{back_write}'
        process = subprocess.Popen(
            ["bash", "-c", line, find(), *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, back_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(back_write)
        try:
            yield Browser(to_write, back_read)
        finally:
            os.close(to_write)  # the browser ends when its pipe does
            os.close(back_read)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
