"""Weighted Banzhaf values: what a unit adds to coalitions that keep most of the others."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from proxyprompt.coalitions import BoolArray, FloatArray, bernoulli_coalitions
from proxyprompt.errors import InputError

from ._nested import banzhaf_law, draw_nested
from .base import Attribution, Design, Explainer, summarize

_REDRAWS = 100


class WeightedBanzhaf(Explainer):
    """Mean marginal contribution to random coalitions that keep each other unit with probability ``keep``.

    Parameters
    ----------
    keep : float
        In (0, 1). One half gives the Banzhaf value; near 1 the coalitions stay near the full prompt, which is where
        the decision to drop a demonstration is made.
    max_missing, max_dropped : float
        As for :class:`Explainer`.

    Notes
    -----
    ``phi_i = E[v(S + i) - v(S)]`` over ``S`` that holds each other unit with probability ``keep`` [1]_. Under that
    law of the coalitions it is also the slope of the best linear approximation of ``v``, because the units
    are independent: ``Cov(v, z_i) / Var(z_i) = E[v | z_i = 1] - E[v | z_i = 0]``. So least squares with an
    intercept on drawn coalitions estimates all units at once, ``values`` being its slopes and ``intercept``
    its constant. The values do not add up to ``v(full) - v(empty)``.

    Rows are distinct, so that none is paid for twice, and drawn by priority sampling: those likely under the law come
    first, and weigh more once they are certain to be drawn, so that the estimate stays consistent up to all ``2**n``
    (of equally weighted distinct rows it would not be).

    Why beside KernelSHAP: Shapley values give every size of coalition the same weight. A language model with
    one or two demonstrations mostly repeats their label, so the smallest coalitions move the value by nats
    where the ones near the full prompt move it by tenths, and with a few coalitions a unit that is what
    the regression sees (``benchmarks/attribution/``).

    ``se_coalitions`` is the heteroskedasticity-consistent error HC3 of the regression of the mean value [2]_, which
    takes no credit for drawing without replacement and is therefore large when most of the ``2**n`` coalitions are
    evaluated; 0 when all are.

    References
    ----------
    .. [1] Li & Yu, "Robust Data Valuation with Weighted Banzhaf Values", 2023.
    .. [2] MacKinnon & White, "Some heteroskedasticity-consistent covariance matrix estimators with improved finite
       sample properties", 1985.

    Examples
    --------
    >>> from proxyprompt.testing import AdditiveGame
    >>> game = AdditiveGame([0.5, -0.2, 0.1])
    >>> WeightedBanzhaf().attribute(game, 3, budget=8, rng=np.random.default_rng(0)).mean.round(6).tolist()
    [0.5, -0.2, 0.1]
    """

    method: ClassVar[str] = "weighted_banzhaf"

    def __init__(self, keep: float = 0.8, *, max_missing: float = 0.05, max_dropped: float = 0.20) -> None:
        super().__init__(max_missing=max_missing, max_dropped=max_dropped)
        if not 0 < keep < 1:
            raise InputError(
                f"keep={keep}: a probability strictly between 0 and 1 is needed.", hint="0.8 is usual."
            )
        self.keep = keep

    @staticmethod
    def smallest_budget(n_units: int) -> int:
        """Fewest coalitions: both ends, one for each slope and the constant, and ten to judge the error by."""
        return int(min(2**n_units, n_units + 13))

    def design(self, n_units: int, budget: int, *, rng: np.random.Generator) -> Design:
        """Draw ``budget - 2`` distinct coalitions beside the empty and the full one; all of them if there are no more.

        Raises
        ------
        InputError
            When the budget cannot determine the units.
        """
        smallest = self.smallest_budget(n_units)
        if budget < smallest:
            raise InputError(
                f"budget={budget}: weighted Banzhaf values of {n_units} units need at least {smallest} coalitions.",
                hint=f"Use {smallest} or more; {3 * n_units} gives tighter standard errors.",
            )
        for _ in range(_REDRAWS):
            drawn = draw_nested(banzhaf_law(self.keep, n_units), budget - 2, rng=rng)
            prefix = drawn.prefix(len(drawn.mass))
            if prefix.sound:
                return prefix.design
        raise InputError(
            f"budget={budget}: {_REDRAWS} draws did not determine {n_units} units.",
            hint="Raise the budget, or lower keep.",
        )

    def held_out(self, n_units: int, n: int, *, rng: np.random.Generator, exclude: BoolArray) -> BoolArray:
        """Draw from the same law; see :meth:`Explainer.held_out`."""
        return bernoulli_coalitions(n_units, n, keep=self.keep, rng=rng, exclude=exclude)

    def fit(self, design: Design, values: ArrayLike) -> Attribution:
        """Regress.

        Parameters
        ----------
        design : Design
            As :meth:`design` makes it.
        values : array_like of float, shape (n_coalitions, n_queries)
            NaN is missing.

        Returns
        -------
        Attribution

        Raises
        ------
        InputError
            When the values have a wrong shape, or what is not missing does not determine the units.
        InconclusiveError
            When too many queries have missing values.
        """
        kept, _, dropped = self._complete_enough(design, values)
        used = design.weights > 0
        x = np.column_stack([np.ones(int(used.sum())), design.coalitions[used]])
        root = np.sqrt(design.weights[used])
        # What is smaller than rounding could make it is nothing, or ties would become tiny differences with tiny errors.
        rounding = 1e-12 * np.nanmax(np.abs(kept), initial=0.0)
        beta = _least_squares(x, root, kept[used])
        beta[np.abs(beta) < rounding] = 0.0
        se_coalitions, df = np.zeros(design.n_units), float("inf")
        if not design.exact:
            residual = np.nanmean(kept[used] - x @ beta, axis=1)
            se_coalitions, df = _hc3(x, root, np.where(np.abs(residual) < rounding, 0.0, residual))
        slopes = beta[1:].T
        mean, se, se_queries, se_coalitions = summarize(slopes, se_coalitions)
        return Attribution(
            values=slopes,
            mean=mean,
            standard_error=se,
            se_queries=se_queries,
            se_coalitions=se_coalitions,
            base_values=kept[design.empty_row],
            full_values=kept[design.full_row],
            intercept=beta[0],
            n_coalitions=design.n_coalitions,
            exact=design.exact,
            method=self.method,
            settings={"keep": self.keep, "max_missing": self.max_missing, "max_dropped": self.max_dropped},
            dropped_queries=dropped,
            df_coalitions=df,
        )


def _least_squares(x: FloatArray, root: FloatArray, values: FloatArray) -> FloatArray:
    """Coefficients, shape (1 + n_units, n_queries); missing rows are left out query by query."""
    missing = np.isnan(values)
    beta, _, rank, _ = np.linalg.lstsq(
        root[:, None] * x, root[:, None] * np.where(missing, 0.0, values), rcond=None
    )
    if rank < x.shape[1]:
        raise InputError(
            f"{len(x)} coalitions of the design do not determine {x.shape[1] - 1} units.",
            hint="Draw a new design with a larger budget.",
        )
    for query in np.flatnonzero(missing.any(axis=0)):
        seen = ~missing[:, query]
        own, _, rank, _ = np.linalg.lstsq(
            root[seen, None] * x[seen], root[seen] * values[seen, query], rcond=None
        )
        if rank < x.shape[1]:
            raise InputError(
                f"Query {query} of those kept lacks {int((~seen).sum())} coalitions, and the others do not "
                "determine the units.",
                hint="Repeat the failed calls, or raise the budget.",
            )
        beta[:, query] = own
    return np.asarray(beta, dtype=np.float64)


def _hc3(x: FloatArray, root: FloatArray, residual: FloatArray) -> tuple[FloatArray, float]:
    """HC3 standard errors of the slopes, and their degrees of freedom."""
    inverse = np.linalg.pinv(root[:, None] * x)
    hat = np.einsum("ij,ji->i", root[:, None] * x, inverse)
    if (hat > 1 - 1e-9).any():
        raise InputError(
            "Some unit rests on a single coalition of the design; its error cannot be judged.",
            hint="Draw a new design with a larger budget.",
        )
    scaled = inverse * (root * np.nan_to_num(residual) / (1 - hat))
    se: FloatArray = np.sqrt((scaled**2).sum(axis=1))[1:]
    return se, float(max(len(x) - x.shape[1], 1))
