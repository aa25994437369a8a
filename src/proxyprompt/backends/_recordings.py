"""One line of a recordings file: read with every check, and written. The format: see ``replay``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from proxyprompt.errors import DataError, InputError

from .base import (
    GenerateRequest,
    GenerateResult,
    Message,
    Rendered,
    Role,
    ScoreRequest,
    ScoreResult,
    Usage,
)

Scored: TypeAlias = tuple[ScoreRequest, ScoreResult]
Generated: TypeAlias = tuple[GenerateRequest, GenerateResult]

_ROLES = ("system", "developer", "user", "assistant")
_SCORE_KEYS = frozenset(
    {"prompt", "candidates", "logprobs", "censored", "usage", "model", "evidence", "samples"}
)
_TEXT_KEYS = frozenset({"prompt", "max_tokens", "stop", "text", "usage", "model"})


def as_line(request: ScoreRequest | GenerateRequest, result: ScoreResult | GenerateResult) -> dict[str, Any]:
    prompt = request.prompt
    line: dict[str, Any] = {
        "prompt": prompt if isinstance(prompt, str) else [turn.to_dict() for turn in prompt]
    }
    if result.error is not None:
        raise InputError(
            f"A result with error={result.error!r} cannot be recorded.",
            hint="Leave failed calls out of pairs.",
        )
    if isinstance(request, ScoreRequest) and isinstance(result, ScoreResult):
        censored = result.censored or (False,) * len(result.logprobs)
        line |= {
            "candidates": list(request.candidates),
            "logprobs": ["-inf" if value == -math.inf else value for value in result.logprobs],
            "censored": list(censored),
        }
        if result.evidence != "logprobs":
            line |= {"evidence": result.evidence, "samples": result.samples}
    elif isinstance(request, GenerateRequest) and isinstance(result, GenerateResult):
        line |= {"max_tokens": request.max_tokens, "stop": list(request.stop), "text": result.text}
    else:
        raise InputError(f"A {type(request).__name__} was paired with a {type(result).__name__}.")
    usage = result.usage
    line["usage"] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
    }
    if result.model_returned is not None:
        line["model"] = result.model_returned
    return line


def parse_line(line: str, where: str) -> Scored | Generated:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}).") from error
    if not isinstance(entry, dict) or "prompt" not in entry:
        raise DataError(f"{where}: must be a JSON object with a prompt.")
    keys = _SCORE_KEYS if "candidates" in entry or "logprobs" in entry else _TEXT_KEYS
    if unknown := sorted(entry.keys() - keys):
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known here are {', '.join(sorted(keys))}.")
    prompt = _prompt(entry["prompt"], where)
    usage = _usage(entry.get("usage"), where)
    model = entry.get("model")
    if model is not None and not isinstance(model, str):
        raise DataError(f"{where}: model={model!r} must be text.")
    if keys is _SCORE_KEYS:
        return _parse_scores(entry, prompt, usage, model, where)
    limit, text, stop = entry.get("max_tokens"), entry.get("text"), entry.get("stop") or []
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise DataError(f"{where}: max_tokens={limit!r} must be an integer of at least 1.")
    if not isinstance(text, str):
        raise DataError(f"{where}: text={text!r} must be text.")
    if not isinstance(stop, list) or not all(isinstance(each, str) for each in stop):
        raise DataError(f"{where}: stop={stop!r} must be a list of texts.")
    return GenerateRequest(prompt, limit, tuple(stop)), GenerateResult(text, usage, model_returned=model)


def _parse_scores(
    entry: Mapping[str, Any], prompt: Rendered, usage: Usage, model: str | None, where: str
) -> Scored:
    candidates, logprobs = entry.get("candidates"), entry.get("logprobs")
    if (
        not isinstance(candidates, list)
        or not candidates
        or not all(isinstance(c, str) and c for c in candidates)
    ):
        raise DataError(f"{where}: candidates={candidates!r} must be a list of one or more texts.")
    if len(set(candidates)) != len(candidates):
        raise DataError(f"{where}: candidates={candidates!r} must differ from each other.")
    if not isinstance(logprobs, list) or len(logprobs) != len(candidates):
        raise DataError(
            f"{where}: logprobs={logprobs!r} must be a list of {len(candidates)}, one per candidate."
        )
    for value in logprobs:
        if value not in (None, "-inf") and not _is_logprob(value):
            raise DataError(
                f'{where}: log-probability {value!r} must be a number of at most 0, null, or "-inf".'
            )
    censored = entry.get("censored")
    if censored is None:
        censored = [False] * len(candidates)
    if (
        not isinstance(censored, list)
        or len(censored) != len(candidates)
        or not all(isinstance(each, bool) for each in censored)
    ):
        raise DataError(f"{where}: censored={censored!r} must be a list of {len(candidates)} true or false.")
    evidence, samples = entry.get("evidence", "logprobs"), entry.get("samples", 0)
    if evidence not in ("logprobs", "decisions", "texts"):
        raise DataError(f"{where}: evidence={evidence!r} must be 'logprobs', 'decisions' or 'texts'.")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise DataError(f"{where}: samples={samples!r} must be a whole number of at least 0.")
    values = tuple(None if value is None else float(value) for value in logprobs)
    return (
        ScoreRequest(prompt, tuple(candidates)),
        ScoreResult(values, tuple(censored), usage, model_returned=model, evidence=evidence, samples=samples),
    )


def _prompt(value: object, where: str) -> Rendered:
    if isinstance(value, str):
        return value
    turns: list[Message] = []
    for turn in value if isinstance(value, list) else ():
        if (
            not isinstance(turn, dict)
            or turn.keys() - {"name"} != {"role", "content"}
            or turn["role"] not in _ROLES
            or not isinstance(turn["content"], str)
            or not isinstance(turn.get("name", ""), str)
        ):
            raise DataError(
                f"{where}: chat turn {turn!r} must have a role (one of {', '.join(_ROLES)}) and content."
            )
        turns.append(Message(cast(Role, turn["role"]), turn["content"], turn.get("name")))
    if not turns:
        raise DataError(f"{where}: prompt={value!r} must be text or a list of chat turns.")
    return tuple(turns)


def _usage(value: object, where: str) -> Usage:
    if value is None:
        return Usage()
    names = ("prompt_tokens", "completion_tokens", "cached_tokens")
    if not isinstance(value, dict) or value.keys() - set(names) or not all(map(_is_count, value.values())):
        raise DataError(f"{where}: usage={value!r} must map {', '.join(names)} to counts.")
    return Usage(**value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_logprob(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value <= 0
    )
