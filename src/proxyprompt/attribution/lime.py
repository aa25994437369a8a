"""LIME: a local ridge regression on which units are kept."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from proxyprompt.coalitions import BoolArray, FloatArray, row_keys, uniform_coalitions
from proxyprompt.errors import InputError

from .base import Attribution, Design, Explainer, summarize

__all__ = ["LIME"]

_DRAWS = 50


class LIME(Explainer):
    """Ridge regression of the value on the units kept, weighted by nearness to the full prompt.

    Parameters
    ----------
    kernel_width : float
        Width of the exponential kernel, on distances from 0 to 100.
    alpha : float
        Ridge penalty on the coefficients; the intercept is free.
    max_missing : float
        Largest share of a query's values that may be missing before the query is dropped.
    max_dropped : float
        Largest share of queries that may be dropped before the answer is refused.

    Notes
    -----
    The defaults are those of the reference implementation's text explainer [1]_: the number of units
    removed is uniform on 1..n, which ones is uniform given the number; distance is 100 times the cosine
    distance to the full prompt, ``100 (1 - sqrt(kept / n))``; the kernel is
    ``sqrt(exp(-(distance / 25)**2))``; ridge with penalty 1 and intercept. The credits do not add up to
    v(full) - v(empty), and the penalty shrinks them, the more so the smaller the budget.

    **Departures.** A coalition drawn again is not evaluated again but counts again (its weight is
    kernel times count), so fewer than ``budget`` coalitions may be evaluated. The empty coalition is
    always evaluated, and has weight 0 in the regression unless it was drawn. There is no
    selection of the ten strongest features: every unit gets a coefficient.

    ``se_coalitions`` is the sandwich ``A (sum_i k_i**2 z_i z_i' e_i**2 / (1 - h_i)**2) A`` over the draws,
    ``A = (Z'KZ + alpha I)**-1``, ``z`` centred by the weighted mean, ``e`` the residuals of the mean over
    queries, ``h`` the leverages. It speaks of the same regression with fresh draws, not of Shapley values.

    References
    ----------
    .. [1] Ribeiro, Singh & Guestrin, "'Why Should I Trust You?': Explaining the Predictions of Any
       Classifier", 2016; package ``lime``, modules ``lime_text`` and ``lime_base``.

    Examples
    --------
    >>> from proxyprompt.testing import AdditiveGame
    >>> game = AdditiveGame([[1.0, 0.0, -1.0]])
    >>> result = LIME(alpha=0.0).attribute(game, 3, budget=50, rng=np.random.default_rng(0))
    >>> result.mean.round(6).tolist()
    [1.0, 0.0, -1.0]
    """

    method: ClassVar[str] = "lime"

    def __init__(
        self,
        *,
        kernel_width: float = 25.0,
        alpha: float = 1.0,
        max_missing: float = 0.05,
        max_dropped: float = 0.20,
    ) -> None:
        super().__init__(max_missing=max_missing, max_dropped=max_dropped)
        if not kernel_width > 0:
            raise InputError(f"kernel_width={kernel_width}: above 0 is needed.", hint="The default is 25.")
        if not alpha >= 0:
            raise InputError(f"alpha={alpha}: 0 or more is needed.", hint="The default is 1.")
        self.kernel_width = kernel_width
        self.alpha = alpha

    def design(self, n_units: int, budget: int, *, rng: np.random.Generator) -> Design:
        """Draw ``budget - 2`` coalitions as the reference does, beside the empty and the full one.

        Parameters
        ----------
        n_units : int
            Number of units, at least 1.
        budget : int
            Largest number of coalitions, at least ``n_units + 2``.
        rng : numpy.random.Generator
            The only source of chance.

        Returns
        -------
        Design
            Distinct rows, the empty and the full coalition first; weight = kernel times number of draws.

        Raises
        ------
        InputError
            When the budget is too small.
        """
        if budget < n_units + 2:
            raise InputError(
                f"budget={budget}: LIME needs at least {n_units + 2} coalitions for {n_units} units.",
                hint="The reference draws 5000; a few times the number of units is the least that is useful.",
            )
        removed = rng.integers(1, n_units + 1, size=budget - 2)
        order = np.argsort(rng.random((budget - 2, n_units)), axis=1)
        drawn = order >= removed[:, None]
        ends = np.vstack([np.zeros(n_units, dtype=bool), np.ones(n_units, dtype=bool)])
        rows, counts = _collapse(np.vstack([ends, drawn]))
        counts[0] -= 1.0  # the empty coalition was added for v(empty), not drawn
        return Design(rows, counts * self._kernel(rows), exact=False)

    def held_out(self, n_units: int, n: int, *, rng: np.random.Generator, exclude: BoolArray) -> BoolArray:
        """Draw distinct coalitions as :meth:`design` does; see :meth:`Explainer.held_out`.

        Where so many are excluded that drawing anew finds too few, the rest is uniform over what is left.
        """
        check = uniform_coalitions(n_units, n, rng=rng, exclude=exclude)  # raises what is wrong
        seen = set(row_keys(np.asarray(exclude, dtype=bool)))
        found: dict[bytes, BoolArray] = {}
        for _ in range(_DRAWS):
            removed = rng.integers(1, n_units + 1, size=2 * n)
            rows = np.argsort(rng.random((2 * n, n_units)), axis=1) >= removed[:, None]
            found |= {k: r for k, r in zip(row_keys(rows), rows, strict=True) if k not in seen}
            if len(found) >= n:
                break
        found |= {k: r for k, r in zip(row_keys(check), check, strict=True) if k not in found}
        return np.array(list(found.values())[:n])

    def fit(self, design: Design, values: ArrayLike) -> Attribution:
        """Solve the ridge regression for every query.

        Parameters
        ----------
        design : Design
        values : array_like of float, shape (n_coalitions, n_queries)
            NaN is missing.

        Returns
        -------
        Attribution

        Raises
        ------
        InputError
            When the values have a wrong shape.
        InconclusiveError
            When too many queries have missing values.
        """
        kept, _, dropped = self._complete_enough(design, values)
        missing = np.isnan(kept)
        coefficients, intercept = self._ridge(design.coalitions, design.weights, np.where(missing, 0.0, kept))
        for query in np.flatnonzero(missing.any(axis=0)):
            seen = ~missing[:, query]
            own = self._ridge(design.coalitions[seen], design.weights[seen], kept[seen][:, [query]])
            coefficients[[query]], intercept[[query]] = own
        gaps = np.nanmean(kept - intercept - design.coalitions @ coefficients.T, axis=1)
        se_coalitions = self._sampling_error(design, gaps)
        mean, se, se_queries, se_coalitions = summarize(coefficients, se_coalitions)
        return Attribution(
            values=coefficients,
            mean=mean,
            standard_error=se,
            se_queries=se_queries,
            se_coalitions=se_coalitions,
            base_values=kept[design.empty_row],
            full_values=kept[design.full_row],
            intercept=intercept,
            n_coalitions=design.n_coalitions,
            exact=False,
            method=self.method,
            settings={
                "kernel_width": self.kernel_width,
                "alpha": self.alpha,
                "max_missing": self.max_missing,
                "max_dropped": self.max_dropped,
            },
            dropped_queries=dropped,
            df_coalitions=float(max(int((design.weights > 0).sum()) - design.n_units - 1, 1)),
        )

    def _kernel(self, rows: BoolArray) -> FloatArray:
        distance = 100.0 * (1.0 - np.sqrt(rows.mean(axis=1)))
        kernel: FloatArray = np.sqrt(np.exp(-((distance / self.kernel_width) ** 2)))
        return kernel

    def _ridge(
        self, rows: BoolArray, weights: FloatArray, values: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return coefficients (n_queries, n_units) and intercepts (n_queries,)."""
        share = weights / weights.sum()
        centre, level = share @ rows, share @ values
        z = rows - centre
        gram = (z * weights[:, None]).T @ z + self.alpha * np.eye(rows.shape[1])
        if np.linalg.matrix_rank(gram) < len(gram):
            raise InputError(
                f"alpha={self.alpha}: without a penalty {len(rows)} coalitions do not determine "
                f"{rows.shape[1]} units.",
                hint="Raise the budget, or use alpha above 0.",
            )
        coefficients = np.linalg.solve(gram, (z * weights[:, None]).T @ (values - level)).T
        return coefficients, level - coefficients @ centre

    def _sampling_error(self, design: Design, gaps: FloatArray) -> FloatArray:
        used = design.weights > 0
        rows, weights, gaps = design.coalitions[used], design.weights[used], gaps[used]
        kernel = self._kernel(rows)
        z = rows - (weights / weights.sum()) @ rows
        gram = (z * weights[:, None]).T @ z + self.alpha * np.eye(design.n_units)
        reach = np.linalg.solve(gram, z.T).T
        leverage = kernel * (np.einsum("iu,iu->i", reach, z) + 1 / weights.sum())
        # A row drawn c times is c draws of the same score, hence kernel * weight = c * kernel**2.
        draws = kernel * weights * (gaps / np.maximum(1 - leverage, 1e-3)) ** 2
        se: FloatArray = np.sqrt(draws @ reach**2)
        return se


def _collapse(rows: BoolArray) -> tuple[BoolArray, FloatArray]:
    """Distinct rows in the order of their first appearance, and how often each appears."""
    numbers: dict[bytes, int] = {}
    index = np.array([numbers.setdefault(key, len(numbers)) for key in row_keys(rows)])
    _, first, counts = np.unique(index, return_index=True, return_counts=True)
    return rows[first], counts.astype(np.float64)
