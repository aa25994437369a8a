"""What holds for the integrations' tests: no key, no tracing, no network beyond this machine."""

from __future__ import annotations

import os
import socket
import tempfile
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"
os.environ["LANGSMITH_TRACING"] = "false"
os.environ.setdefault("DSPY_CACHEDIR", tempfile.mkdtemp(prefix="dspy-cache-"))

_connect = socket.socket.connect


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to anything but this machine."""

    def connect(self: socket.socket, address: Any) -> Any:
        host = address[0] if isinstance(address, tuple) else address
        local = self.family == getattr(socket, "AF_UNIX", None) or str(host) in (
            "127.0.0.1",
            "::1",
            "localhost",
        )
        if not local:
            raise AssertionError(f"a test tried to reach {host!r}; tests talk to this machine only")
        return _connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
