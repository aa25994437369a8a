"""Leave-one-out: what the full prompt loses with each unit."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from proxyprompt.coalitions import leave_one_out_coalitions
from proxyprompt.errors import InputError

from .base import Attribution, Design, Explainer, summarize

__all__ = ["LeaveOneOut"]


class LeaveOneOut(Explainer):
    """Credit ``v(full) - v(full without the unit)``.

    Parameters
    ----------
    max_missing : float
        Not used: with ``n_units + 2`` values a query every value matters, and a query with any missing
        value is dropped.
    max_dropped : float
        Largest share of queries that may be dropped before the answer is refused.

    Notes
    -----
    No coalition is sampled, so ``se_coalitions`` is zero. Two near-copies are each worthless given the
    other, and both get no credit; KernelSHAP shares it between them. The credits do not add up to
    v(full) - v(empty). :meth:`Attribution.predict` extrapolates from the full prompt:
    ``v(full) - sum of the credits removed``.

    Examples
    --------
    >>> from proxyprompt.testing import UnanimityGame
    >>> game = UnanimityGame(3, [((0, 1), 1.0)])
    >>> LeaveOneOut().attribute(game, 3, budget=5, rng=np.random.default_rng(0)).mean.tolist()
    [1.0, 1.0, 0.0]
    """

    method: ClassVar[str] = "leave_one_out"

    def design(self, n_units: int, budget: int, *, rng: np.random.Generator) -> Design:
        """Return the ``n_units + 2`` coalitions of leave-one-out; ``rng`` is not used.

        Raises
        ------
        InputError
            When the budget is smaller than that.
        """
        coalitions = leave_one_out_coalitions(n_units)
        if budget < len(coalitions):
            raise InputError(
                f"budget={budget}: leave-one-out of {n_units} units takes {len(coalitions)} coalitions.",
                hint=f"Use {len(coalitions)} or more, or KernelSHAP, which samples.",
            )
        return Design(coalitions, np.ones(len(coalitions)), exact=True)

    def fit(self, design: Design, values: ArrayLike) -> Attribution:
        """Subtract.

        Parameters
        ----------
        design : Design
            Must hold the full coalition without each single unit.
        values : array_like of float, shape (n_coalitions, n_queries)
            NaN is missing.

        Returns
        -------
        Attribution

        Raises
        ------
        InputError
            When the values have a wrong shape, or a leave-one-out coalition is absent.
        InconclusiveError
            When too many queries have missing values.
        """
        rows = _rows_without_each(design)
        kept, _, dropped = self._complete_enough(design, values, all_rows=True)
        base, full = kept[design.empty_row], kept[design.full_row]
        credits = (full - kept[rows]).T
        mean, se, se_queries, se_coalitions = summarize(credits, np.zeros(design.n_units))
        return Attribution(
            values=credits,
            mean=mean,
            standard_error=se,
            se_queries=se_queries,
            se_coalitions=se_coalitions,
            base_values=base,
            full_values=full,
            intercept=full - credits.sum(axis=1),
            n_coalitions=design.n_coalitions,
            exact=True,
            method=self.method,
            settings={"max_dropped": self.max_dropped},
            dropped_queries=dropped,
        )


def _rows_without_each(design: Design) -> list[int]:
    """Index of the row that lacks exactly unit 0, 1, ..."""
    found = np.full(design.n_units, -1)
    one_gone = design.coalitions.sum(axis=1) == design.n_units - 1
    found[np.argmin(design.coalitions[one_gone], axis=1)] = np.flatnonzero(one_gone)
    if (found < 0).any():
        raise InputError(
            f"The design lacks the full coalition without units {np.flatnonzero(found < 0).tolist()}.",
            hint="Make the design with LeaveOneOut().design.",
        )
    return [int(row) for row in found]
