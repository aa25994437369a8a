"""What a summary holds. :func:`read` checks it, makes its strings safe to show and fills what is absent.

The rules below are the whole schema, version 1. ``Optional`` marks what may be absent or null. Any number
may be null as well (a standard error of one observation has no value); a number that is not finite, or beyond
1e300, is read as null. Keys that are not named here are dropped, so that nothing reaches a page unchecked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxyprompt.errors import ArtifactError, InputError

from ._text import visible

__all__ = ["SCHEMA_VERSION", "VERDICTS", "read"]

SCHEMA_VERSION = 1
VERDICTS = ("harmful", "redundant", "useful", "unclear")

_MAX_DEPTH = 32
_LARGEST = 1e300  # beyond it a Python integer no longer fits into a float


@dataclass(frozen=True)
class Optional:
    """A rule whose value may be absent or null."""

    rule: Any


@dataclass(frozen=True)
class OneOf:
    """A string out of a closed list."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class ListOf:
    """A list whose items follow one rule."""

    rule: Any


STRING, NUMBER, BOOL, JSON = "string", "number", "boolean", "JSON value"

_ROLE = OneOf(("target", "proxy"))
_PERFORMANCE = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": NUMBER}
_PROMPT = {"n_demonstrations": NUMBER, "tokens": Optional(NUMBER), "performance": _PERFORMANCE}

_DEMONSTRATION = {
    "id": STRING,
    "position": NUMBER,
    "input": Optional(STRING),
    "output": Optional(STRING),
    "attribution": NUMBER,
    "standard_error": NUMBER,
    "source": OneOf(("measured", "estimated")),
    "verdict": OneOf(VERDICTS),
    "kept": BOOL,
    "reason": STRING,
    "confirmation": Optional(
        {"difference": NUMBER, "standard_error": NUMBER, "p_value": NUMBER, "confirmed": BOOL}
    ),
    "tokens": Optional(NUMBER),
}

_CERTIFICATE = {
    "decision": OneOf(("certified", "not_certified")),
    "level": NUMBER,
    "tau": Optional(NUMBER),
    "margin": Optional(NUMBER),
    "n": NUMBER,
    "difference": NUMBER,
    "lower_bound": NUMBER,
    "retained_lower_bound": Optional(NUMBER),
    "bar": Optional(STRING),
    "evidence": {"name": OneOf(("e-value", "p-value")), "value": NUMBER},
    "n_discordant": NUMBER,
    "sequence": ListOf(
        {
            "n_kept": NUMBER,
            "performance": NUMBER,
            "difference": NUMBER,
            "lower_bound": NUMBER,
            "retained_lower_bound": Optional(NUMBER),
            "passed": BOOL,
            "tested": BOOL,
            "n": Optional(NUMBER),
            "new_order": Optional(BOOL),
        }
    ),
    "power_statement": STRING,
    "sealed_digest": STRING,
    "text": STRING,
}

_CURVE_POINT = {
    "n_kept": NUMBER,
    "tokens": Optional(NUMBER),
    "value": NUMBER,
    "low": NUMBER,
    "high": NUMBER,
    "chosen": BOOL,
    "full": BOOL,
    "n": Optional(NUMBER),
}

_PROXY = {
    "name": STRING,
    "decision": OneOf(("accepted", "rejected", "undecided", "not_tested")),
    "n_used": NUMBER,
    "mean_q_proxy": Optional(NUMBER),
    "mean_q_oracle": Optional(NUMBER),
    "decided_by": Optional(OneOf(("attribution", "fidelity"))),
    "mean_agreement_proxy": Optional(NUMBER),
    "mean_agreement_oracle": Optional(NUMBER),
    "beside": Optional(STRING),
    "agreement": NUMBER,
    "members": Optional(ListOf(STRING)),
    "n_seen": Optional(NUMBER),
    "target_pairs": Optional(NUMBER),
    "money": Optional(NUMBER),
    "currency": Optional(STRING),
    "rank_correlation": Optional(NUMBER),
    "own_rank_correlation": Optional(NUMBER),
    "top_mass": Optional(NUMBER),
    "own_top_mass": Optional(NUMBER),
    "n_tied": Optional(NUMBER),
    "ceiling": Optional(NUMBER),
    "path": Optional(ListOf(ListOf(NUMBER))),
    "threshold": Optional(NUMBER),
    "lower_threshold": Optional(NUMBER),
    "path_name": Optional(STRING),
    "paper_rule": Optional({"decision": STRING, "n_used": NUMBER, "note": STRING}),
    "note": STRING,
}

_SCREENING = {
    "rule": STRING,
    "tau": NUMBER,
    "delta": NUMBER,
    "queries": NUMBER,
    "units": NUMBER,
    "fit_coalitions": NUMBER,
    "judge_coalitions": NUMBER,
    "text": STRING,
    "power": Optional(STRING),
    "noise": Optional(STRING),
    "target_pairs": Optional(NUMBER),
    "money": Optional(NUMBER),
    "currency": Optional(STRING),
    "proxies": ListOf(_PROXY),
}

_TERM = {"name": STRING, "tokens": NUMBER, "rate": NUMBER, "cost": NUMBER}

_COST = {
    "stages": ListOf(
        {
            "name": STRING,
            "role": _ROLE,
            "calls_bought": NUMBER,
            "calls_reused": NUMBER,
            "tokens_bought": NUMBER,
            "tokens_reused": NUMBER,
            "seconds": Optional(NUMBER),
        }
    ),
    "target_tokens_total": NUMBER,
    "proxy_tokens_total": NUMBER,
    "saved_tokens_per_call": Optional(NUMBER),
    "saved_share": Optional(NUMBER),
    "break_even_calls": Optional(NUMBER),
    "money": Optional(
        {
            "currency": STRING,
            "price_input_per_million": NUMBER,
            "source": STRING,
            "run_cost": NUMBER,
            "saved_per_thousand_calls": NUMBER,
            "date": Optional(STRING),
            "model": Optional(STRING),
            "stable_tokens": Optional(ListOf(NUMBER)),
            "scenarios": Optional(
                ListOf(
                    {
                        "name": STRING,
                        "before": NUMBER,
                        "after": NUMBER,
                        "saved_per_thousand_calls": NUMBER,
                        "break_even_calls": Optional(NUMBER),
                        "terms_before": ListOf(_TERM),
                        "terms_after": ListOf(_TERM),
                    }
                )
            ),
            "warnings": Optional(ListOf(STRING)),
            "notes": Optional(ListOf(STRING)),
        }
    ),
    "unpriced": Optional(STRING),
    "crr": Optional(
        {
            "calls": Optional(NUMBER),
            "tokens": Optional(NUMBER),
            "money": Optional(NUMBER),
            "currency": Optional(STRING),
            "terms": Optional(
                ListOf({"name": STRING, "calls": NUMBER, "tokens": NUMBER, "money": Optional(NUMBER)})
            ),
            "oracle_tokens": NUMBER,
            "proxy_tokens_priced": NUMBER,
            "screen_tokens": NUMBER,
            "fallback_tokens": NUMBER,
            "text": STRING,
        }
    ),
}

_CLEANING = {
    "rounds": ListOf(
        {
            "flagged": ListOf(STRING),
            "confirmed": ListOf(STRING),
            "not_confirmed": ListOf(STRING),
            "text": STRING,
        }
    ),
    "text": STRING,
    "relabels": Optional(
        ListOf(
            {
                "id": STRING,
                "label": Optional(STRING),
                "answer": Optional(STRING),
                "probability": NUMBER,
                "p_value": NUMBER,
            }
        )
    ),
    "relabel_text": Optional(STRING),
}

_NUMBERS = ListOf(NUMBER)

_VERIFICATION = {
    "unit_ids": ListOf(STRING),
    "proposed_by": STRING,
    "measured_by": STRING,
    "estimand": STRING,
    "n_queries": NUMBER,
    "text": STRING,
    "decision": OneOf(("harmful", "top", "all")),
    **dict.fromkeys(("estimated", "estimated_error", "measured", "measured_error"), _NUMBERS),
    **dict.fromkeys(("expected", "expected_error", "chance"), _NUMBERS),
    **dict.fromkeys(("order", "audits", "named", "undecided"), _NUMBERS),
    "outcome": OneOf(("settled", "measured_all", "limit")),
    "margin": NUMBER,
    "level": NUMBER,
    "top": NUMBER,
    "target_calls": NUMBER,
    "oracle_calls": NUMBER,
    "slope": Optional(NUMBER),
}

_SUMMARY = {
    "schema": NUMBER,
    "title": STRING,
    "created": STRING,
    "version": STRING,
    "verdict": {
        "status": OneOf(("certified", "not_certified", "unchanged")),
        "headline": STRING,
        "sentences": ListOf(STRING),
    },
    "target": {"name": STRING},
    "performance_name": STRING,
    "explained_by": {"role": _ROLE, "name": STRING, "why": STRING},
    "verification": Optional(_VERIFICATION),
    "demonstrations": ListOf(_DEMONSTRATION),
    "attribution_unit": STRING,
    "before": _PROMPT,
    "after": _PROMPT,
    "zero_shot": Optional(_PERFORMANCE),
    "certificate": Optional(_CERTIFICATE),
    "curve": {
        "split": STRING,
        "tau_line": NUMBER,
        "line_text": Optional(STRING),
        "points": ListOf(_CURVE_POINT),
        "choice": Optional(ListOf(STRING)),
    },
    "cleaning": Optional(_CLEANING),
    "screening": Optional(_SCREENING),
    "cost": _COST,
    "limits": ListOf(STRING),
    "settings": JSON,
    "versions": JSON,
}


def read(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Check a summary against the schema and return a copy that is safe to render.

    Parameters
    ----------
    summary : mapping
        The summary, as loaded from JSON.

    Returns
    -------
    dict
        Every key of the schema, absent optional ones as ``None``; every string made visible.

    Raises
    ------
    ArtifactError
        If ``summary["schema"]`` is not the version that this package renders.
    InputError
        If a value is missing or of the wrong kind; the message names its path.
    """
    if not isinstance(summary, Mapping):
        raise InputError(
            f"summary is a {type(summary).__name__}; it must be a mapping.",
            hint="Pass the 'summary' of a saved result.",
        )
    if summary.get("schema") != SCHEMA_VERSION:
        raise ArtifactError(
            f"summary['schema'] is {summary.get('schema')!r}; this version renders schema {SCHEMA_VERSION}.",
            hint="Render the report with the version of proxyprompt-core that wrote the result.",
        )
    checked: dict[str, Any] = _check(summary, _SUMMARY, "summary")
    return checked


def _check(value: Any, rule: Any, path: str) -> Any:
    if isinstance(rule, Optional):
        return None if value is None else _check(value, rule.rule, path)
    if isinstance(rule, dict):
        if not isinstance(value, Mapping):
            raise _wrong(value, "an object", path)
        for key, inner in rule.items():
            if key not in value and not isinstance(inner, Optional):
                raise InputError(
                    f"{path}.{key} is missing; it is required.", hint="Fill it, or null a number."
                )
        return {key: _check(value.get(key), inner, f"{path}.{key}") for key, inner in rule.items()}
    if isinstance(rule, ListOf):
        if not isinstance(value, (list, tuple)):
            raise _wrong(value, "a list", path)
        return [_check(item, rule.rule, f"{path}[{i}]") for i, item in enumerate(value)]
    return _check_scalar(value, rule, path)


def _check_scalar(value: Any, rule: Any, path: str) -> Any:
    if rule == NUMBER:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(value, "a number or null", path)
        return value if abs(value) < _LARGEST and math.isfinite(value) else None
    if rule == BOOL:
        if not isinstance(value, bool):
            raise _wrong(value, "true or false", path)
        return value
    if rule == JSON:
        return _visible_json(value, path, 0)
    if not isinstance(value, str):
        raise _wrong(value, "a string", path)
    if isinstance(rule, OneOf) and value not in rule.values:
        raise _wrong(value, "one of " + ", ".join(rule.values), path)
    return visible(value)


def _visible_json(value: Any, path: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise InputError(f"{path} is nested deeper than {_MAX_DEPTH} levels.", hint="Flatten it.")
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {visible(str(k)): _visible_json(v, path, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_visible_json(item, path, depth + 1) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise _wrong(value, "JSON", path)


def _wrong(value: Any, expected: str, path: str) -> InputError:
    shown = visible(repr(value))[:80]
    return InputError(f"{path} is {shown}; it must be {expected}.", hint="See proxyprompt.report._schema.")
