"""Requests to, and answers of, OpenAI-compatible servers as plain data; nothing here opens a connection.

Servers that call themselves compatible differ in how they return log-probabilities: a list of objects
(OpenAI's chat endpoint, and llama-server on *both* endpoints), a dict from token to log-probability (the
legacy completions endpoint, vLLM), or ``null`` with status 200. All are read into one form here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from proxyprompt.errors import InputError

from .base import Rendered, Usage

Endpoint: TypeAlias = Literal["chat", "completions"]
Fault: TypeAlias = Literal["fatal", "retry", "no-logprobs", "too-many-logprobs", "max-tokens-name", "failed"]

_NOT_LISTED = -9999.0
"""OpenAI's sentinel for "outside the listed tokens"; it is not a log-probability."""

_ROUNDING = 1e-4
"""A log-probability above zero by less than this is float32 rounding; above it, nonsense."""

_FATAL_CODES = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "invalid_api_key",
        "account_deactivated",
        "model_not_found",
    }
)
_RETRYABLE = frozenset({429, 500, 502, 503})
# The oldest scripts without spaces between words begin here; a "word boundary" means nothing beyond it.
_FIRST_UNSPACED = "\u2e80"


class UnreadableAnswerError(Exception):
    """The server answered, and ``usage`` was paid, but not in a readable form; becomes ``result.error``."""

    def __init__(self, message: str, usage: Usage | None = None) -> None:
        super().__init__(message)
        self.usage = usage


@dataclass(frozen=True, slots=True)
class ListedToken:
    """One entry of the list of top tokens; ``logprob`` is ``None`` where the server sent no usable number."""

    core: bytes
    logprob: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice. ``listed`` is ``None`` where the server sent no log-probabilities at all."""

    text: str | None
    finish: str | None
    listed: tuple[ListedToken, ...] | None
    usage: Usage
    model: str | None


def public_url(url: str) -> str:
    """``scheme://host[:port]/path`` of ``url``: no user, password, query or fragment."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        valid = False
    if not valid:
        # The value may hold a password, so the message does not repeat it.
        raise InputError("base_url is not an http(s) URL.", hint="Give e.g. http://127.0.0.1:8080/v1")
    host = parts.netloc.rpartition("@")[2].lower()
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}"


def prompt_fields(prompt: Rendered, endpoint: Endpoint) -> dict[str, Any]:
    """The part of a request's body that carries the prompt."""
    if endpoint == "chat":
        if isinstance(prompt, str):
            return {"messages": [{"role": "user", "content": prompt}]}
        return {"messages": [turn.to_dict() for turn in prompt]}
    if isinstance(prompt, str):
        return {"prompt": prompt}
    raise InputError(
        "A prompt of chat turns cannot be sent with api='completions', which takes text.",
        hint="Use api='chat' or 'auto', or render the prompt as text.",
    )


def read_answer(raw: bytes | str, endpoint: Endpoint) -> Answer:
    """Read a response body; raise :class:`UnreadableAnswerError` where there is nothing to read."""
    try:
        body = json.loads(raw)
    except ValueError:
        raise UnreadableAnswerError("the answer is not JSON") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        paid = _usage(body.get("usage")) if isinstance(body, dict) else None
        raise UnreadableAnswerError("the answer holds no choices", paid)
    choice = choices[0]
    text = choice.get("text")
    if endpoint == "chat":
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
    finish, model = choice.get("finish_reason"), body.get("model")
    return Answer(
        text=text if isinstance(text, str) else None,
        finish=finish if isinstance(finish, str) else None,
        listed=_listed(choice.get("logprobs")),
        usage=_usage(body.get("usage")),
        model=model if isinstance(model, str) else None,
    )


def _listed(logprobs: object) -> tuple[ListedToken, ...] | None:
    """The top tokens of the first position, whichever dialect they are in."""
    if not isinstance(logprobs, dict):
        return None
    content, legacy = logprobs.get("content"), logprobs.get("top_logprobs")
    entries: list[Any]
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        # A server asked for no alternatives, or ignoring the number, still reports the chosen token.
        entries = first.get("top_logprobs") or ([first] if first else [])
    elif isinstance(legacy, list):
        first = legacy[0] if legacy and isinstance(legacy[0], dict) else {}
        entries = [{"token": token, "logprob": value} for token, value in first.items()]
    elif isinstance(logprobs.get("tokens"), list):
        pairs = zip(logprobs["tokens"], logprobs.get("token_logprobs") or (), strict=False)
        entries = [{"token": token, "logprob": value} for token, value in list(pairs)[:1]]
    else:
        return None
    tokens = (_token(entry) for entry in entries if isinstance(entry, dict))
    return tuple(token for token in tokens if token is not None)


def _token(entry: Mapping[str, Any]) -> ListedToken | None:
    value, token, spelled = entry.get("logprob"), entry.get("token"), entry.get("bytes")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value <= _NOT_LISTED and math.isfinite(value):
            return None
        usable = math.isfinite(value) and value <= _ROUNDING
        value = min(float(value), 0.0) if usable else None
    else:
        value = None
    # Bytes first: a token may be half a character, which `token` cannot spell.
    if isinstance(spelled, list) and all(isinstance(b, int) and 0 <= b < 256 for b in spelled):
        core = bytes(spelled).strip()
    elif isinstance(token, str):
        core = token.strip().encode("utf-8", "surrogatepass")
    else:
        return None
    return ListedToken(core, value) if core else None


def _usage(usage: object) -> Usage:
    def count(holder: object, key: str) -> int:
        value = holder.get(key) if isinstance(holder, dict) else None
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    return Usage(
        count(usage, "prompt_tokens"), count(usage, "completion_tokens"), count(details, "cached_tokens")
    )


def read_labels(
    listed: Sequence[ListedToken], candidates: Sequence[str]
) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    """Log-probability of each label, and whether it is only an upper bound; see ``OpenAIBackend``'s Notes."""
    usable = [token.logprob for token in listed if token.logprob is not None]
    if not usable:
        raise UnreadableAnswerError("the server listed no usable log-probability")
    floor, mass = min(usable), _mass(listed)
    cores = [candidate.strip().encode() for candidate in candidates]
    # What a label may begin with: itself where it is listed whole, else every listed beginning of it.
    starts = [[core] if core in mass else [t for t in mass if core.startswith(t)] for core in cores]
    bounds: list[float] = []
    for candidate, own in zip(candidates, starts, strict=True):
        bound = _logsumexp([mass[token] for token in own]) if own else floor
        if bound is None:
            raise UnreadableAnswerError(f"the server sent no usable log-probability for {candidate!r}")
        bounds.append(bound)
    owners = {token: sum(token in own for own in starts) for token in mass}
    shared = [bool(own) and all(owners[token] > 1 for token in own) for own in starts]
    whole = [core in mass and not contested for core, contested in zip(cores, shared, strict=True)]
    best = max((bound for bound, sure in zip(bounds, whole, strict=True) if sure), default=-math.inf)
    # A shared beginning does not tell its labels apart; that is harmless only where none of them can win.
    if lost := [
        c for c, b, contested in zip(candidates, bounds, shared, strict=True) if contested and b > best
    ]:
        raise UnreadableAnswerError(
            f"labels {', '.join(map(repr, lost))} begin with the same token and cannot be told apart by the "
            "first one; use labels that differ in their first token"
        )
    return tuple(bounds), tuple(not sure for sure in whole)


def _mass(listed: Sequence[ListedToken]) -> dict[bytes, float | None]:
    grouped: dict[bytes, list[float | None]] = {}
    for token in listed:
        grouped.setdefault(token.core, []).append(token.logprob)
    return {core: _logsumexp(values) for core, values in grouped.items()}


def _logsumexp(values: Sequence[float | None]) -> float | None:
    """``log(sum(exp(v)))``, at most 0; ``None`` as soon as one value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    top = max(known)
    return min(top + math.log(math.fsum(math.exp(value - top) for value in known)), 0.0)


def match_label(text: str, candidates: Sequence[str]) -> int | None:
    """Index of the label that ``text`` begins with; the longest wins, same case before any case."""
    answer = text.strip()
    for fold in (str, str.casefold):
        folded = fold(answer)
        hits = [
            (len(label), index)
            for index, label in enumerate(fold(candidate.strip()) for candidate in candidates)
            if folded.startswith(label) and not _inside_word(folded, len(label))
        ]
        longest = [index for length, index in hits if length == max(hits)[0]]
        if longest:
            return longest[0] if len(longest) == 1 else None
    return None


def _inside_word(text: str, end: int) -> bool:
    """Whether position ``end`` splits a word or a number, as in "no" at the start of "not sure"."""
    around = text[end - 1 : end + 1]
    return len(around) == 2 and around.isalnum() and max(around) < _FIRST_UNSPACED


def label_tokens(candidates: Sequence[str]) -> int:
    """Enough tokens to spell any of the labels, since a token is at least one byte; at most 64."""
    return min(64, max(8, 2 + max(len(candidate.encode()) for candidate in candidates)))


def classify(status: int, code: str | None, param: str | None, message: str) -> Fault:
    """What an HTTP error means for the call and for the batch."""
    text = message.lower()
    if status in (401, 402, 403, 404) or code in _FATAL_CODES:
        return "fatal"
    if status in _RETRYABLE:
        return "retry"
    if status in (400, 422):
        if "max_completion_tokens" in text or (code == "unsupported_parameter" and param == "max_tokens"):
            return "max-tokens-name"
        if (param or "").endswith("logprobs") or "logprobs" in text:
            limit = re.search(r"greater than|less than|at most|maximum|max allowed|between|exceed|<=", text)
            return "too-many-logprobs" if limit and code != "unsupported_parameter" else "no-logprobs"
    return "failed"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait, or ``None``; HTTP dates are not understood and count as not given."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return None


def redact(text: str, secrets: Sequence[str]) -> str:
    """``text`` without the secrets and anything else that looks like a credential."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    text = re.sub(r"(?i)\b(sk-|bearer\s+)[\w.\-*]{4,}", r"\1***", text)
    return re.sub(r"(https?://)[^/@\s]+@", r"\1***@", text)


def one_line(text: str) -> str:
    """White space as single spaces, at most 300 characters."""
    return " ".join(text.split())[:300]
