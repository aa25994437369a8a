"""A real model behind a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from llama import llama_server


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    """SmolLM2 behind llama.cpp's server on loopback."""
    yield from llama_server(alias="smollm2")
