"""An example selector that leaves out the examples which a measured result removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.example_selectors import BaseExampleSelector

__all__ = ["PrunedExampleSelector", "example_key"]


def example_key(example: Mapping[str, Any]) -> str:
    """SHA-256 of an example's content, whatever the order of its fields.

    Examples
    --------
    >>> example_key({"a": "1", "b": "2"}) == example_key({"b": "2", "a": "1"})
    True
    """
    text = json.dumps(dict(example), sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class PrunedExampleSelector(BaseExampleSelector):
    """Another selector's choice, or a fixed list, without the examples known to be removed.

    Parameters
    ----------
    inner : BaseExampleSelector or sequence of dict
        What would be shown.
    removed : iterable of dict
        Examples to leave out, recognised by their whole content. An example that is not known stays.

    Attributes
    ----------
    unmeasured : list of dict
        Examples added since: shown, but nothing is known about them.

    Notes
    -----
    Nothing is filled up: where the inner selector would have shown a removed example, one fewer is shown, which is what
    was measured.
    """

    def __init__(
        self, inner: BaseExampleSelector | Sequence[Mapping[str, Any]], removed: Iterable[Mapping[str, Any]]
    ) -> None:
        self.inner = inner if isinstance(inner, BaseExampleSelector) else [dict(e) for e in inner]
        self._removed = frozenset(example_key(e) for e in removed)
        self.unmeasured: list[dict[str, Any]] = []

    def add_example(self, example: dict[str, str]) -> Any:
        """Pass an example on to the inner selector, and remember that it was never measured."""
        self.unmeasured.append(dict(example))
        if isinstance(self.inner, BaseExampleSelector):
            return self.inner.add_example(example)
        self.inner.append(dict(example))
        return None

    def select_examples(self, input_variables: dict[str, str]) -> list[dict[str, Any]]:
        """The inner choice without removed examples."""
        if isinstance(self.inner, BaseExampleSelector):
            return self._left(self.inner.select_examples(input_variables))
        return self._left(self.inner)

    async def aselect_examples(self, input_variables: dict[str, str]) -> list[dict[str, Any]]:
        """The same, asynchronously."""
        if isinstance(self.inner, BaseExampleSelector):
            return self._left(await self.inner.aselect_examples(input_variables))
        return self._left(self.inner)

    def _left(self, examples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [e for e in examples if example_key(e) not in self._removed]
