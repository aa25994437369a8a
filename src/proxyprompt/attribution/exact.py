"""Exact Shapley values from all coalitions."""

from __future__ import annotations

from math import factorial
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from proxyprompt.coalitions import MAX_ENUMERATED_UNITS, FloatArray, enumerate_coalitions
from proxyprompt.errors import InputError

from .base import Attribution, Design, Explainer, summarize

__all__ = ["ExactShapley"]


class ExactShapley(Explainer):
    """Shapley values by their definition, from all ``2**n_units`` coalitions.

    Parameters
    ----------
    max_missing : float
        Not used: the definition needs every coalition, and a query with any missing value is dropped.
    max_dropped : float
        Largest share of queries that may be dropped before the answer is refused.

    Notes
    -----
    ``phi_i = sum_S |S|! (n - |S| - 1)! / n! (v(S + i) - v(S))`` over coalitions without ``i`` [1]_. No
    coalition is sampled, so ``se_coalitions`` is zero.

    References
    ----------
    .. [1] Shapley, "A Value for n-Person Games", 1953.

    Examples
    --------
    >>> from proxyprompt.testing import GloveGame
    >>> result = ExactShapley().attribute(GloveGame(2), 3, budget=8, rng=np.random.default_rng(0))
    >>> result.mean.round(4).tolist()
    [0.6667, 0.1667, 0.1667]
    """

    method: ClassVar[str] = "exact_shapley"

    def design(self, n_units: int, budget: int, *, rng: np.random.Generator) -> Design:
        """Return all coalitions; ``rng`` is not used.

        Raises
        ------
        InputError
            When there are more than ``budget`` of them, or more than 20 units.
        """
        if n_units <= MAX_ENUMERATED_UNITS and budget < 2**n_units:
            raise InputError(
                f"budget={budget}: exact Shapley values of {n_units} units take {2**n_units} coalitions.",
                hint="Raise the budget, or use KernelSHAP, which samples.",
            )
        coalitions = enumerate_coalitions(n_units)
        return Design(coalitions, np.ones(len(coalitions)), exact=True)

    def fit(self, design: Design, values: ArrayLike) -> Attribution:
        """Average the marginal contributions.

        Parameters
        ----------
        design : Design
            All coalitions, in any order.
        values : array_like of float, shape (n_coalitions, n_queries)
            NaN is missing.

        Returns
        -------
        Attribution

        Raises
        ------
        InputError
            When the values have a wrong shape, or a coalition is absent.
        InconclusiveError
            When too many queries have missing values.
        """
        n_units = design.n_units
        complete = n_units <= MAX_ENUMERATED_UNITS and design.n_coalitions == 2**n_units
        codes = design.coalitions @ (1 << np.arange(n_units)) if complete else np.zeros(1)
        order = np.argsort(codes, kind="stable")
        if not complete or (codes[order] != np.arange(len(codes))).any():
            raise InputError(
                f"The design holds {design.n_coalitions} rows; all {2**n_units} coalitions are needed once.",
                hint="Make the design with ExactShapley().design.",
            )
        kept, _, dropped = self._complete_enough(design, values, all_rows=True)
        phi = _shapley(kept[order], n_units)
        base, full = kept[design.empty_row], kept[design.full_row]
        mean, se, se_queries, se_coalitions = summarize(phi, np.zeros(n_units))
        return Attribution(
            values=phi,
            mean=mean,
            standard_error=se,
            se_queries=se_queries,
            se_coalitions=se_coalitions,
            base_values=base,
            full_values=full,
            intercept=base,
            n_coalitions=design.n_coalitions,
            exact=True,
            method=self.method,
            settings={"max_dropped": self.max_dropped},
            dropped_queries=dropped,
        )


def _shapley(values: FloatArray, n_units: int) -> FloatArray:
    """Shapley values, shape (n_queries, n_units), of values in binary-counting order."""
    size = np.bitwise_count(np.arange(2**n_units))
    by_size = np.array(
        [factorial(s) * factorial(n_units - s - 1) / factorial(n_units) for s in range(n_units)] + [0.0]
    )
    weight = by_size[size]
    phi = np.empty((values.shape[1], n_units))
    for unit in range(n_units):
        # Bit `unit` becomes the middle axis: index 0 lacks the unit, index 1 holds it.
        pairs = values.reshape(-1, 2, 2**unit, values.shape[1])
        lacking = weight.reshape(-1, 2, 2**unit)[:, 0]
        phi[:, unit] = np.einsum("ab,abq->q", lacking, pairs[:, 1] - pairs[:, 0])
    return phi
