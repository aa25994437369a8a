"""Rules for the arguments of :class:`~proxyprompt.backends.openai.OpenAIBackend`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from proxyprompt.errors import InputError

_OWN_FIELDS = frozenset(
    {
        "best_of", "echo", "logprobs", "max_completion_tokens", "max_tokens", "messages", "model", "n", "prompt",
        "prompt_cache_key", "stop", "stream", "temperature", "top_logprobs",
    }
)  # fmt: skip


def check_options(
    *,
    model: object,
    api: object,
    top_logprobs: object,
    repeats: object,
    reasoning_tokens: object,
    concurrency: object,
    rpm: object,
    tpm: object,
    timeout: object,
    max_tries: object,
    max_wait: object,
    paid_retries: object,
    model_change: object,
    batch: object,
    batch_size: object,
    batch_poll: object,
    batch_wait: object,
    allow_http: object,
) -> None:
    """Raise :class:`~proxyprompt.errors.InputError` for the first argument that breaks a rule."""
    if not isinstance(model, str) or not model.strip():
        raise InputError(f"model={model!r} must be a model name.")
    _check_choice("api", api, ("auto", "chat", "completions"))
    _check_choice("model_change", model_change, ("warn", "error", "ignore"))
    _check_range("top_logprobs", top_logprobs, 1, 100)
    _check_range("concurrency", concurrency, 1, 256)
    _check_range("repeats", repeats, 1, 100)
    _check_range("reasoning_tokens", reasoning_tokens, 0, 1_000_000)
    _check_range("max_tries", max_tries, 1, 20)
    _check_range("paid_retries", paid_retries, 0, 20)
    for parameter, flag in (("batch", batch), ("allow_http", allow_http)):
        if not isinstance(flag, bool):
            raise InputError(f"{parameter}={flag!r} must be true or false.")
    _check_range("batch_size", batch_size, 1, 50_000)
    for parameter, value, what in (
        ("timeout", timeout, "number of seconds"),
        ("max_wait", max_wait, "number of seconds"),
        ("batch_poll", batch_poll, "number of seconds"),
        ("batch_wait", batch_wait, "number of seconds"),
        ("rpm", rpm, "number of requests"),
        ("tpm", tpm, "number of tokens"),
    ):
        if value is not None or parameter in ("timeout", "max_wait", "batch_poll"):
            _check_positive(parameter, value, what)


def checked_fields(parameters: Mapping[str, Any] | None, repeats: int) -> Mapping[str, Any]:
    """Further fields of every request, none of which the backend sets itself."""
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InputError(
            f"parameters is a {type(parameters).__name__}; a mapping of fields to values is needed."
        )
    try:
        # A copy, as the identity must not change under the ledger.
        given = json.loads(json.dumps(dict(parameters or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"parameters cannot be sent as JSON: {error}.") from None
    own = sorted(set(given) & _OWN_FIELDS)
    if own:
        raise InputError(f"parameters: {', '.join(own)} are set by the backend and cannot be given.")
    if repeats > 1 and "seed" in given:
        raise InputError(
            f"parameters: a seed with repeats={repeats} makes all samples alike.",
            hint="Leave one of them out.",
        )
    return dict(given)


def _check_choice(parameter: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        *most, last = map(repr, allowed)
        raise InputError(f"{parameter}={value!r} must be {', '.join(most)} or {last}.")


def _check_range(parameter: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{parameter}={value!r} must be an integer from {low} to {high}.")


def _check_positive(parameter: str, value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{parameter}={value!r} must be a positive {what}.")
