"""What errors of OpenAI-compatible servers mean: for the call, for the run, and for the money.

Pure functions over statuses, headers and messages; nothing here opens a connection.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal, TypeAlias

Fault: TypeAlias = Literal["fatal", "retry", "maybe-billed", "too-many-logprobs", "unsupported", "failed"]
"""``"fatal"`` ends the run; ``"retry"`` cost nothing and may pass; ``"maybe-billed"`` may pass, but the answer
may have been made and charged; ``"unsupported"`` names a field that the server does not take; ``"failed"`` ends the
call."""

_FATAL_CODES = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "invalid_api_key",
        "account_deactivated",
        "model_not_found",
    }
)
_RETRYABLE = frozenset({409, 425, 429, 500, 502, 503, 529})
_MAYBE_BILLED = frozenset({408, 504, 524})
"""A gateway gave up waiting for the model, which may have gone on."""

_REFUSALS = re.compile(
    r"unsupported|not support|n't support|unknown|unrecogni[sz]ed|unexpected|extra|not permitted|not allowed"
    r"|not available|only the default|instead|not implemented"
)
_BOUNDS = re.compile(r"greater than|less than|at most|maximum|max allowed|between|exceed|<=")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A fault, and with ``"unsupported"`` the field that was refused."""

    fault: Fault
    field: str | None = None


def classify(
    status: int, code: str | None, param: str | None, message: str, optional: Collection[str] = ()
) -> Verdict:
    """What an HTTP error means.

    Parameters
    ----------
    status : int
    code, param : str or None
        As the server's error body names them.
    message : str
    optional : collection of str
        Fields of the request's body that another attempt could do without.
    """
    text = message.lower()
    if status == 403 and "logprobs" in optional and _names("logprobs", text, param):
        return Verdict("unsupported", "logprobs")  # the model may be used, its log-probabilities may not
    if status in (401, 402, 403, 404) or code in _FATAL_CODES or 300 <= status < 400:
        return Verdict("fatal")
    if status in _RETRYABLE:
        return Verdict("retry")
    if status in _MAYBE_BILLED:
        return Verdict("maybe-billed")
    if code == "context_length_exceeded" or "context length" in text:
        return Verdict("failed")
    if status in (400, 422, 501):
        if "max_completion_tokens" in text and "max_tokens" in optional:
            return Verdict("unsupported", "max_tokens")
        if _names("logprobs", text, param) or _names("top_logprobs", text, param):
            too_many = _BOUNDS.search(text) and code != "unsupported_parameter"
            if too_many:
                return Verdict("too-many-logprobs")
            if "logprobs" in optional:
                return Verdict("unsupported", "logprobs")
        for field in optional:
            told = param == field and code in (
                "unsupported_parameter",
                "unsupported_value",
                "unknown_parameter",
            )
            # A limit on tokens may also be too large; the other fields have values that every server that takes them takes.
            if told or (_names(field, text, param) and (field != "max_tokens" or _REFUSALS.search(text))):
                return Verdict("unsupported", field)
    return Verdict("failed")


def error_words(body: object, otherwise: str) -> str:
    """What an error's body says, whichever dialect it is in; ``body`` is what the SDK made of it."""
    for key in ("message", "detail", "error"):
        told = body.get(key) if isinstance(body, dict) else None
        if told:
            return told if isinstance(told, str) else _details(told)
    return body if isinstance(body, str) and body else otherwise


def _details(told: object) -> str:
    """Where and what of each fault that a validator lists; not the ``input``, which repeats the request."""
    listed = told if isinstance(told, list) else [told]
    words = []
    for item in listed:
        if not isinstance(item, dict):
            words.append(str(item))
            continue
        place = item.get("loc")
        where = ".".join(map(str, place)) + ": " if isinstance(place, list) else ""
        message = item.get("msg") or item.get("message")
        words.append(where + (str(message) if message else json.dumps(item, default=str)))
    return "; ".join(words)


def error_name(value: object) -> str | None:
    """A ``code`` or ``param`` of an error's body as text; some servers send numbers, lists or objects."""
    return value if isinstance(value, str) and value else None


def error_code(code: object, kind: object) -> str | None:
    """The code of an error; some servers have it in ``type`` and a number, or nothing, in ``code``."""
    return kind if isinstance(kind, str) and kind in _FATAL_CODES else error_name(code)


def _names(field: str, text: str, param: str | None) -> bool:
    if param is not None:
        return param.rpartition(".")[2] == field
    # A one-letter name is only recognised in quotes: "n" is also a letter.
    pattern = rf"['\"`]{field}['\"`]" if len(field) < 3 else rf"(?<![\w]){field}(?![\w])"
    return re.search(pattern, text) is not None


def retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Seconds the server asks to wait, or ``None``; ``now`` (seconds since 1970) is for HTTP dates."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                date = parsedate_to_datetime(value)
                seconds = max(date.timestamp() - (time.time() if now is None else now), 0.0)
            except (TypeError, ValueError, OverflowError, IndexError):
                continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return None


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the server says is left in its current window: amount, and seconds until it is full again."""

    requests: int | None = None
    requests_reset: float | None = None
    tokens: int | None = None
    tokens_reset: float | None = None

    @property
    def until_refilled(self) -> float | None:
        """Seconds until what is used up is there again; ``None`` if nothing is."""
        pairs = ((self.requests, self.requests_reset), (self.tokens, self.tokens_reset))
        return max((reset for left, reset in pairs if left == 0 and reset), default=None)


_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


_MOMENT = 1e9
"""A reset from here on is no span but a moment, in seconds since 1970; from a thousand times that in milliseconds."""


def read_allowance(headers: Mapping[str, str], *, now: float | None = None) -> Allowance:
    """The ``x-ratelimit-*`` headers; absent or odd ones are ``None``; ``now`` as in :func:`retry_after`."""

    def amount(name: str) -> int | None:
        value = headers.get(f"x-ratelimit-remaining-{name}", "")
        return int(value) if re.fullmatch(r"\d{1,15}", value) else None

    def reset(name: str) -> float | None:
        value = headers.get(f"x-ratelimit-reset-{name}", "")
        if re.fullmatch(r"\d{1,15}(\.\d{1,15})?", value):
            number = float(value)
            if number < _MOMENT:
                return number
            moment = number / 1000 if number >= 1000 * _MOMENT else number
            return max(moment - (time.time() if now is None else now), 0.0)
        if not re.fullmatch(rf"(?:{_SPAN.pattern})+", value):
            return None
        return sum(float(number) * _UNITS[unit] for number, unit in _SPAN.findall(value))

    return Allowance(amount("requests"), reset("requests"), amount("tokens"), reset("tokens"))
