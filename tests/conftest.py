"""What holds for every test: no hub, no network beyond this machine."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_connect = socket.socket.connect


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the fault suite; they must be known before its folder is collected."""
    parser.addoption("--faults", choices=("short", "long"), default="short", help="how many faults to inject")
    parser.addoption("--faults-tally", default="", metavar="FILE", help="write what was injected as JSON")


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to anything but this machine."""

    def connect(self: socket.socket, address: Any) -> Any:
        host = address[0] if isinstance(address, tuple) else address
        local = self.family == getattr(socket, "AF_UNIX", None) or str(host) in (
            "127.0.0.1",
            "127.0.0.2",
            "::1",
            "localhost",
        )
        if not local:
            raise AssertionError(f"a test tried to reach {host!r}; tests talk to this machine only")
        return _connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
