"""How much to do, where to count it, and the process that forks the victims."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama import llama_server

from .harness import Workshop
from .proxy import FaultProxy, fault_proxy

KEY = "canary-key-7c1f"


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether this is the long run (``--faults long``)."""
    return bool(request.config.getoption("--faults") == "long")


@pytest.fixture(scope="session")
def tallies(request: pytest.FixtureRequest) -> Iterator[dict[str, Counter[str]]]:
    """Counts by test, written as JSON to ``--faults-tally`` at the end."""
    counts: dict[str, Counter[str]] = {}
    yield counts
    path = request.config.getoption("--faults-tally")
    if path:  # one file for each process of the run
        Path(path + os.environ.get("PYTEST_XDIST_WORKER", "")).write_text(
            json.dumps(counts, indent=1, sort_keys=True) + "\n"
        )


@pytest.fixture
def tally(tallies: dict[str, Counter[str]], request: pytest.FixtureRequest) -> Counter[str]:
    """What this test did and saw, for the published table."""
    return tallies.setdefault(request.node.name, Counter())


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a kill leaves the page cache whole, so a slow disk adds only time."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def shop() -> Iterator[Workshop]:
    """One worker process for the whole run."""
    workshop = Workshop()
    yield workshop
    workshop.close()


@pytest.fixture(scope="session")
def remote_shop() -> Iterator[Workshop]:
    """One whose children speak to a server; they need no import of their own."""
    workshop = Workshop("openai", "proxyprompt.backends.openai")
    yield workshop
    workshop.close()


@pytest.fixture(scope="session")
def llama() -> Iterator[str]:
    """Address of llama.cpp's server with SmolLM2-135M, one thread, the same numbers for the same prompt."""
    for base_url in llama_server(repeatable=True):
        yield base_url.removesuffix("/v1")


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """The credential that must never be seen."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return KEY


@pytest.fixture
def proxy(llama: str, key: str) -> Iterator[FaultProxy]:
    """The fault proxy in front of it."""
    with fault_proxy(llama) as running:
        yield running
