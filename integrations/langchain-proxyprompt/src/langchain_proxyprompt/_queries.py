"""The user's pairs of inputs and references, as queries in three parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from proxyprompt import Query, Settings, Splits, split_queries
from proxyprompt.errors import InputError

from ._site import Site

__all__ = ["Queries", "as_text", "own_inputs", "references", "split_rows"]

Queries: TypeAlias = Sequence[tuple[Any, Any]] | Mapping[str, Sequence[tuple[Any, Any]]]
_SPLITS = ("explain", "select", "sealed")


def as_text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    )


def split_rows(
    given: Queries, sizes: Mapping[str, int] | None, settings: Settings
) -> tuple[dict[str, Any], Splits]:
    """Inputs of the chain by query, and the queries in three disjoint parts."""
    rows: list[tuple[Any, Any, str | None]] = []
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(_SPLITS))
        if unknown:
            raise InputError(f"queries: unknown splits {unknown}; allowed: {', '.join(_SPLITS)}.")
        rows = [(*_pair(row), name) for name in _SPLITS for row in given.get(name, ())]
    else:
        rows = [(*_pair(row), None) for row in given]
    inputs = {f"q{i}": row[0] for i, row in enumerate(rows)}
    queries = [
        (Query(f"q{i}", {"input": as_text(value)}, as_text(reference)), split)
        for i, (value, reference, split) in enumerate(rows)
    ]
    rng = np.random.default_rng([settings.seed, 101])
    return dict(inputs), split_queries(queries, sizes=sizes, rng=rng)


def _pair(row: Any) -> tuple[Any, Any]:
    if not isinstance(row, tuple | list) or len(row) != 2:
        raise InputError(f"queries: got {str(row)[:60]!r}; each is a pair (inputs of the chain, reference).")
    return row[0], row[1]


def own_inputs(site: Site, asked: Mapping[str, Any], output_key: str | None) -> dict[str, Any] | None:
    """What to invoke the chain with for the examples' own inputs; None where the examples lack a field of the queries."""
    fields = {name for value in asked.values() if isinstance(value, Mapping) for name in value}
    if site.pool is None or not fields or not all(isinstance(v, Mapping) for v in asked.values()):
        return None
    if not all(fields <= set(example) for example in site.pool.examples.values()):
        return None
    return {f"own:{i}": {name: example[name] for name in fields} for i, example in site.pool.examples.items()}


def references(queries: Queries) -> list[Any]:
    """What the queries name as right, in order."""
    rows = [r for part in queries.values() for r in part] if isinstance(queries, Mapping) else list(queries)
    return [_pair(row)[1] for row in rows]
