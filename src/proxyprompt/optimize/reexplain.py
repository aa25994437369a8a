"""Explain what is left of a prompt: the same technique and queries, new coalitions of the units that remain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxyprompt.attribution.base import Attribution, Explainer
from proxyprompt.prompt import Query
from proxyprompt.value_function import Values

__all__ = ["Reexplainer"]

Ask: TypeAlias = Callable[[Sequence[Query], NDArray[np.bool_]], Values]
"""Ask the model that explains for coalitions of the whole prompt, on the queries given."""

_FEWEST_QUERIES = 8


@dataclass
class Reexplainer:
    """Attributions of the prompt without some of its units.

    Coalitions are drawn anew: those that are already paid for and lack all of the units set aside are next to none
    (with weighted Banzhaf's law and eight units, one in 400,000). Any that recur are found in the ledger.

    Parameters
    ----------
    explainer : Explainer
    ask : callable
    queries : sequence of Query
        Those of the first explanation.
    budget : callable
        Number of coalitions for so many units.
    rng : numpy.random.Generator
    calls : int or None
        Most calls over all rounds; fewer queries are used to stay within, but not fewer than eight (or all,
        where there are fewer). ``None``: no limit.
    """

    explainer: Explainer
    ask: Ask
    queries: Sequence[Query]
    budget: Callable[[int], int]
    rng: np.random.Generator
    calls: int | None = None

    def __call__(self, kept: NDArray[np.bool_]) -> Attribution | None:
        """Attribution of the units kept, one column each in their order; ``None`` when the calls left do not suffice.

        Raises
        ------
        InconclusiveError
            Too many answers missing.
        """
        design = self.explainer.design(int(kept.sum()), self.budget(int(kept.sum())), rng=self.rng)
        queries = self.queries
        if self.calls is not None:
            queries = queries[: self.calls // design.n_coalitions]
            if len(queries) < min(_FEWEST_QUERIES, len(self.queries)):
                return None
            self.calls -= design.n_coalitions * len(queries)
        rows = np.zeros((design.n_coalitions, len(kept)), dtype=np.bool_)
        rows[:, kept] = design.coalitions
        values = self.ask(queries, rows)
        values.require_complete("explaining the prompt without its strongest suspects")
        return self.explainer.fit(design, values.utility)
