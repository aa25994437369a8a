"""How many tokens a prompt may have, without the model's tokenizer: a bound for money, a guess for planning."""

from __future__ import annotations

import unicodedata

from .backends.base import Backend, Bounded, GenerateRequest, Planner, Rendered, ScoreRequest

__all__ = ["least_tokens", "likely_tokens", "most_completion", "most_tokens", "n_bytes"]

# What servers add around a prompt: marks of turns (three or four tokens each), and system texts of their own, which
# models with a chat template are given where the caller has none (the longest known have about a hundred tokens).
_TEXT_OVERHEAD = 16
_CHAT_OVERHEAD = 256
_TURN_OVERHEAD = 16
_BYTES_PER_TOKEN = 3.0
_LONGEST_TOKEN = 16


def _texts(prompt: Rendered) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]


def n_bytes(prompt: Rendered) -> int:
    """Bytes of UTF-8."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in _texts(prompt))


def most_tokens(prompt: Rendered, backend: Backend | None = None) -> int:
    """No fewer than the model will count: by its own tokenizer if that is at hand, else one token per byte and overhead.

    Every tokenizer in use falls back on single bytes, so a text never has more tokens than bytes. Some normalise
    first (NFKC), which may lengthen a text; the longer form counts.
    """
    if isinstance(backend, Planner):
        return backend.count_tokens(prompt)
    total = 0
    for text in _texts(prompt):
        raw = len(text.encode("utf-8", "surrogatepass"))
        normal = raw if text.isascii() else _normal_bytes(text)
        total += max(raw, normal)
    if isinstance(prompt, str):
        return total + _TEXT_OVERHEAD
    return total + _CHAT_OVERHEAD + _TURN_OVERHEAD * len(prompt)


def _normal_bytes(text: str) -> int:
    return len(unicodedata.normalize("NFKC", text).encode("utf-8", "surrogatepass"))


def likely_tokens(prompt: Rendered, backend: Backend | None = None, per_byte: float | None = None) -> int:
    """About as many as the model will count; ``per_byte``: tokens per byte of earlier prompts, if known."""
    if isinstance(backend, Planner):
        return backend.count_tokens(prompt)
    if per_byte is not None:
        return max(1, round(per_byte * n_bytes(prompt)))
    return sum(
        int(len(text.encode("utf-8", "surrogatepass")) / _BYTES_PER_TOKEN) + 1 for text in _texts(prompt)
    )


def least_tokens(prompt: Rendered, backend: Backend | None = None) -> int:
    """Hardly more than the model will count: no tokenizer averages sixteen bytes a token on text that people write."""
    if isinstance(backend, Planner):
        return backend.count_tokens(prompt)
    return n_bytes(prompt) // _LONGEST_TOKEN


def most_completion(request: ScoreRequest | GenerateRequest, backend: Backend | None = None) -> int:
    """No fewer completion tokens than one call may be billed for."""
    if isinstance(backend, Bounded):
        return backend.most_completion_tokens(request)
    if isinstance(request, GenerateRequest):
        return request.max_tokens
    longest = max((len(c.encode("utf-8", "surrogatepass")) for c in request.candidates), default=0)
    return max(8, 2 + longest)
