"""A real model behind a real server on this machine, and scripted models for arithmetic and errors."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dspy_proxyprompt import ProxyPrune
from llama import llama_server

from proxyprompt import Settings


def _load(name: str) -> None:
    """Import a neighbour under a name of its own: several distributions have tests."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_load("dspy_scripted")


@pytest.fixture(autouse=True)
def own_loop() -> Iterator[None]:
    """A loop for the main thread that is closed in the end.

    litellm's logger asks for one outside of any coroutine; without this Python makes it, nobody closes it, and a
    later test fails when it is collected.
    """
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def pruner(tmp_path: Path) -> Callable[..., ProxyPrune]:
    """Makes pruners that share a ledger."""

    def make(metric: Any = None, **kwargs: Any) -> ProxyPrune:
        kwargs.setdefault("settings", Settings(interactions="off", clean=False))
        kwargs.setdefault("num_threads", 4)
        return ProxyPrune(
            metric or sys.modules["dspy_scripted"].right, ledger=tmp_path / "ledger.db", **kwargs
        )

    return make


@pytest.fixture(scope="session")
def llama() -> Iterator[str]:
    """Base URL of a real server."""
    yield from llama_server(n_ctx=4096)
