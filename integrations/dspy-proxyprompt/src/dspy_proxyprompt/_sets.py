"""From DSPy's train and validation sets to disjoint splits of queries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
import numpy as np

from proxyprompt import Query, Splits
from proxyprompt.errors import DataError

from ._program import plain

__all__ = ["Sets", "make_sets"]


@dataclass(frozen=True)
class Sets:
    """The splits, and the examples behind them.

    Attributes
    ----------
    splits : Splits
    by_query : mapping of str to Example
        By query id.
    by_reference : mapping of str to Example
        By the query's reference, a text of the whole example.
    notes : tuple of str
    """

    splits: Splits
    by_query: Mapping[str, Any]
    by_reference: Mapping[str, Any]
    notes: tuple[str, ...]


def make_sets(
    trainset: Sequence[Any] | None,
    valset: Sequence[Any] | None,
    demos: Iterable[Any],
    *,
    explain_share: float,
    seed: int,
) -> Sets:
    """*explain* and *select* from the train set, *sealed* from the validation set.

    Parameters
    ----------
    trainset, valset : sequence of Example
        With their inputs marked.
    demos : iterable
        All demos of the program. A train example that is one of them is left out: a demo answers its own question.
    explain_share : float
        Share of the usable train examples that explain; the others select.
    seed : int

    Raises
    ------
    DataError
        If a set is missing or too small, or a validation example is in the train set or among the demos.
    """
    train = _keyed("trainset", trainset)
    val = _keyed("valset", valset)
    shown = [plain(d) for d in demos]
    both = [k for k in val if k in train]
    if both:
        raise DataError(
            f"valset: {len(both)} of {len(val)} examples have the inputs of an example of trainset; first: {both[0][:80]}.",
            hint="The validation set certifies the result, so nothing before may have seen it; split the data anew.",
        )
    leaked = [k for k, e in val.items() if _is_shown(e, shown)]
    if leaked:
        raise DataError(
            f"valset: {len(leaked)} of {len(val)} examples are demos of the program; first: {leaked[0][:80]}.",
            hint="A demo that answers its own question makes every prompt with it look good; compile the program"
            " from trainset only, or take these examples out of valset.",
        )
    usable = {k: e for k, e in train.items() if not _is_shown(e, shown)}
    notes = []
    for name, given, kept in (("trainset", trainset, train), ("valset", valset, val)):
        if given is not None and len(given) > len(kept):
            notes.append(
                f"{len(given) - len(kept)} examples of {name} repeat the inputs of another and were left out."
            )
    if len(usable) < len(train):
        notes.append(
            f"{len(train) - len(usable)} examples of trainset are demos of the program and were not used as queries."
        )
    order = np.random.default_rng([seed, 8]).permutation(len(usable)).tolist()
    n_explain = round(len(usable) * explain_share)
    if n_explain < 2 or len(usable) - n_explain < 2:
        raise DataError(
            f"trainset: {len(usable)} examples that are no demos; with explain_share={explain_share} that makes"
            f" {n_explain} to explain and {len(usable) - n_explain} to select, and each needs at least 2.",
            hint="Give more examples; some dozens of each are needed for a verdict.",
        )
    chosen = [list(usable.items())[i] for i in order]
    parts = {"explain": chosen[:n_explain], "select": chosen[n_explain:], "sealed": list(val.items())}
    by_query, by_reference, queries = {}, {}, {}
    for split, rows in parts.items():
        kind, first = ("val", 0) if split == "sealed" else ("train", 0 if split == "explain" else n_explain)
        queries[split] = [_query(f"{kind}:{first + i}", e) for i, (_, e) in enumerate(rows)]
        for query, (_, example) in zip(queries[split], rows, strict=True):
            by_query[query.id] = example
            by_reference[query.reference] = example
    return Sets(Splits(queries), by_query, by_reference, tuple(notes))


def _keyed(name: str, examples: Sequence[Any] | None) -> dict[str, Any]:
    """Examples by their inputs; repetitions are dropped."""
    if not examples:
        why = (
            "It seals the certificate, and taking it from trainset would certify what was chosen on it."
            if name == "valset"
            else "It explains the demos and chooses among them."
        )
        raise DataError(f"{name}: got {examples!r}; a list of dspy.Example is needed. {why}")
    found: dict[str, Any] = {}
    for i, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            raise DataError(f"{name}[{i}]: got {type(example).__name__}; a dspy.Example is needed.")
        try:
            inputs = dict(example.inputs())
        except ValueError as error:
            raise DataError(
                f"{name}[{i}]: the example does not say which of its fields are inputs.",
                hint="Write dspy.Example(...).with_inputs('question').",
            ) from error
        found.setdefault(_text(inputs), example)
    return found


def _is_shown(example: Any, demos: Sequence[Mapping[str, Any]]) -> bool:
    inputs = plain(dict(example.inputs()))
    return any(all(name in demo and demo[name] == value for name, value in inputs.items()) for demo in demos)


def _query(name: str, example: Any) -> Query:
    inputs = {k: v if isinstance(v, str) else _text(v) for k, v in dict(example.inputs()).items()}
    return Query(name, inputs, _text(example))


def _text(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False, sort_keys=True)
