"""Requests to, and answers of, OpenAI-compatible servers as plain data; nothing here opens a connection.

Servers that call themselves compatible differ in how they return log-probabilities: a list of objects
(OpenAI's chat endpoint, and llama-server on *both* endpoints), a dict from token to log-probability (the
legacy completions endpoint, vLLM), or ``null`` with status 200. All are read into one form here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from proxyprompt.errors import InputError

from ._openai_labels import ListedToken, Position, UnreadableAnswerError
from .base import Rendered, Usage

Endpoint: TypeAlias = Literal["chat", "completions"]

PATHS: Mapping[str, str] = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "decisions": "/decisions",
}

_NOT_LISTED = -9999.0
"""OpenAI's sentinel for "outside the listed tokens"; it is not a log-probability."""

_CACHED = ("prompt_cache_hit_tokens", "cached_tokens", "cache_read_input_tokens")

_ROUNDING = 1e-4
"""A log-probability above zero by less than this is float32 rounding; above it, nonsense."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to one request; ``path`` is ``None`` where there are no log-probabilities of the text.

    ``thought``: the model reasoned in view before it answered; that is not part of ``text``.
    """

    text: str | None
    finish: str | None
    path: tuple[Position, ...] | None
    thought: bool = False
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One response: at least one choice."""

    choices: tuple[Choice, ...]
    usage: Usage
    model: str | None
    fingerprint: str | None

    @property
    def first(self) -> Choice:
        """The first choice."""
        return self.choices[0]


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


_ASK_LAST = "Which of the choices is the answer to the last message?"
_ASK_NEXT = "Which of the choices comes next, directly after the end of the input?"


def decision_fields(prompt: Rendered, candidates: Sequence[str]) -> dict[str, Any]:
    """Body of a request to the decisions endpoint: which of the labels comes next?"""
    question = {
        "type": "choice",
        "instructions": _ASK_NEXT if isinstance(prompt, str) else _ASK_LAST,
        "choices": [{"value": candidate.strip()} for candidate in candidates],
    }
    if isinstance(prompt, str):
        return {"input": prompt, "questions": [question]}
    turns = [{"type": "message", "role": turn.role, "content": turn.content} for turn in prompt]
    return {"input": turns, "questions": [question]}


def read_body(raw: bytes | str) -> dict[str, Any]:
    """A response body as an object; one that cannot be read may have been billed."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise UnreadableAnswerError("the answer is not JSON", uncertain=1) from None
    if not isinstance(body, dict):
        raise UnreadableAnswerError("the answer holds no choices", uncertain=1)
    return body


def read_answer(body: Mapping[str, Any], endpoint: Endpoint) -> Answer:
    """Read a response body; raise :class:`UnreadableAnswerError` where there is nothing to read."""
    told = body.get("usage")
    usage, model, fingerprint = read_usage(told), body.get("model"), body.get("system_fingerprint")
    listed = body.get("choices")
    choices = [choice for choice in listed if isinstance(choice, dict)] if isinstance(listed, list) else []
    if not choices:
        unknown = 0 if isinstance(told, dict) else 1
        error = body.get("error")
        message = error.get("message") if isinstance(error, dict) else error
        reason = f": {message}" if isinstance(message, str) and message else ""
        raise UnreadableAnswerError(f"the answer holds no choices{reason}", usage, unknown)
    return Answer(
        choices=tuple(_choice(choice, endpoint) for choice in choices),
        usage=usage,
        model=model if isinstance(model, str) else None,
        fingerprint=fingerprint if isinstance(fingerprint, str) else None,
    )


def _choice(choice: Mapping[str, Any], endpoint: Endpoint) -> Choice:
    text, finish, path = choice.get("text"), choice.get("finish_reason"), logprob_path(choice.get("logprobs"))
    thought, refusal = False, None
    if endpoint == "chat":
        message = choice.get("message")
        message = message if isinstance(message, dict) else {}
        text, thought = _without_thoughts(message)
        refusal = message.get("refusal")
        if thought and not _spells(path, text):
            path = None  # its first tokens are those of the reasoning
    if finish == "content_filter":
        text = None  # what is left of an answer that was withheld is no answer
    return Choice(
        text=text if isinstance(text, str) else None,
        finish=finish if isinstance(finish, str) else None,
        path=path,
        thought=thought,
        refusal=refusal if isinstance(refusal, str) else None,
    )


def _without_thoughts(message: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The text of a message, and whether the model reasoned in view before it.

    Servers put the reasoning into a field of its own, into a part of its own, or, where they do not know the model's
    way of marking it, into the text between ``<think>`` and ``</think>``, the first of which may stand in the prompt.
    """
    content = message.get("content")
    thoughts = [message.get(name) for name in ("reasoning_content", "reasoning")]
    thought = any(isinstance(told, str) and told.strip() for told in thoughts)
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        thought = thought or any(part.get("type") in ("thinking", "reasoning") for part in parts)
        content = "".join(texts) if texts else None
    if not isinstance(content, str):
        return None, thought
    if "</think>" in content:
        return content.rpartition("</think>")[2].lstrip(), True
    if content.lstrip().startswith("<think>"):
        return None, True
    return content, thought


def _spells(path: Sequence[Position] | None, text: object) -> bool:
    """Whether the chosen tokens are those of the text from its beginning."""
    if path is None or not isinstance(text, str) or not text.strip():
        return False
    spelled = b"".join(position.chosen or b"" for position in path).strip()
    return spelled.startswith(text.strip().encode("utf-8", "surrogatepass"))


def read_decision_answer(body: Mapping[str, Any]) -> tuple[dict[str, object], Usage, str | None]:
    """Stated probabilities by label, usage, and model, of an answer of the decisions endpoint."""
    usage, model = read_usage(body.get("usage")), body.get("model")
    answers = body.get("answers")
    answer = answers[0] if isinstance(answers, list) and answers and isinstance(answers[0], dict) else {}
    if answer.get("type") == "refusal":
        raise UnreadableAnswerError("the model declined to decide", usage)
    listed = answer.get("probabilities")
    if not isinstance(listed, list):
        raise UnreadableAnswerError("the decision holds no probabilities", usage)
    stated = {
        str(item["value"]): item.get("probability")
        for item in listed
        if isinstance(item, dict) and isinstance(item.get("value"), str)
    }
    return stated, usage, model if isinstance(model, str) else None


# --- log-probabilities --------------------------------------------------------------------------------


def logprob_path(logprobs: object) -> tuple[Position, ...] | None:
    """The positions of an answer, whichever dialect they are in."""
    if not isinstance(logprobs, dict):
        return None
    content = logprobs.get("content")
    if isinstance(content, list):
        return tuple(_of_object(entry) for entry in content) or (Position(()),)
    legacy, tokens = logprobs.get("top_logprobs"), logprobs.get("tokens")
    if not isinstance(legacy, list) and not isinstance(tokens, list):
        return None
    spelled = tokens if isinstance(tokens, list) else []
    values = logprobs.get("token_logprobs")
    numbers = values if isinstance(values, list) else []
    tables = legacy if isinstance(legacy, list) else []
    return tuple(
        _of_dict(
            tables[k] if k < len(tables) else None,
            spelled[k] if k < len(spelled) else None,
            numbers[k] if k < len(numbers) else None,
        )
        for k in range(max(len(tables), len(spelled)))
    ) or (Position(()),)


def _of_object(entry: object) -> Position:
    if not isinstance(entry, dict):
        return Position(())
    # A server asked for no alternatives, or ignoring the number, still reports the chosen token.
    listed = entry.get("top_logprobs")
    entries = listed if isinstance(listed, list) and listed else [entry]
    return Position(_tokens(entries), _spelling(entry))


def _of_dict(table: object, chosen: object, value: object) -> Position:
    spelled = chosen.encode("utf-8", "surrogatepass") if isinstance(chosen, str) else None
    if isinstance(table, dict) and table:
        return Position(_tokens([{"token": t, "logprob": v} for t, v in table.items()]), spelled)
    if spelled is None:
        return Position(())
    return Position(_tokens([{"token": chosen, "logprob": value}]), spelled)


def _tokens(entries: Sequence[Any]) -> tuple[ListedToken, ...]:
    tokens = (_token(entry) for entry in entries if isinstance(entry, dict))
    return tuple(token for token in tokens if token is not None)


def _token(entry: Mapping[str, Any]) -> ListedToken | None:
    value, raw = entry.get("logprob"), _spelling(entry)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value <= _NOT_LISTED and math.isfinite(value):
            return None
        usable = math.isfinite(value) and value <= _ROUNDING
        value = min(float(value), 0.0) if usable else None
    else:
        value = None
    return ListedToken(raw, value) if raw else None


def _spelling(entry: Mapping[str, Any]) -> bytes | None:
    token, spelled = entry.get("token"), entry.get("bytes")
    # Bytes first: a token may be half a character, which `token` cannot spell.
    if isinstance(spelled, list) and all(
        isinstance(b, int) and not isinstance(b, bool) and 0 <= b < 256 for b in spelled
    ):
        return bytes(spelled)
    return token.encode("utf-8", "surrogatepass") if isinstance(token, str) else None


def read_usage(usage: object) -> Usage:
    """Token counts as the server states them; all 0, "not known", where it states no usable count for the prompt."""

    def count(holder: object, *keys: str) -> int:
        for key in keys:
            value = holder.get(key) if isinstance(holder, dict) else None
            if isinstance(value, str) and value.isascii() and value.isdigit():
                value = int(value[:20])
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return 0

    def part(*keys: str) -> object:
        return next((usage[k] for k in keys if isinstance(usage, dict) and usage.get(k)), None)

    taken = part("prompt_tokens_details", "input_tokens_details")
    made = part("completion_tokens_details", "output_tokens_details")
    prompt = count(usage, "prompt_tokens", "input_tokens")
    if not prompt:
        # The rest alone would pass for the whole, and the call for one that cost next to nothing.
        return Usage()
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=count(usage, "completion_tokens", "output_tokens"),
        # OpenAI, vLLM and llama.cpp put the number into the details, DeepSeek, Moonshot and LiteLLM beside the total.
        cached_tokens=min(count(taken, "cached_tokens") or count(usage, *_CACHED), prompt),
        cache_write_tokens=count(taken, "cache_write_tokens") or count(usage, "cache_creation_input_tokens"),
        reasoning_tokens=count(made, "reasoning_tokens"),
    )
