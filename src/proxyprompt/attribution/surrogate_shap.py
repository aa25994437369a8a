"""SurrogateSHAP: exact Shapley values of a Gaussian-process surrogate that passes through every value."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxyprompt.coalitions import BoolArray, FloatArray, outside_in_coalitions, row_keys
from proxyprompt.errors import InputError

from ._cube_kernel import CubeKernel, shapley_weights
from ._cube_regression import CubeRegression, choose_kernel
from .base import Attribution, Design, Explainer, summarize
from .kernel_shap import Regression

__all__ = ["SurrogateSHAP"]

_LARGEST = 4096
_REDRAWS = 100
_SINGULAR = 1e-10
_TUNING_ROWS = 200
_JUDGED_ROWS = 600
_TUNING_QUERIES = 64


class SurrogateSHAP(Explainer):
    """Shapley values of a random-field surrogate, fitted so that it passes through every evaluated value.

    Parameters
    ----------
    max_missing : float
        Largest share of a query's values that may be missing before the query is dropped.
    max_dropped : float
        Largest share of queries that may be dropped before the answer is refused.

    Notes
    -----
    The value function of each query is modelled as an additive game plus a Gaussian process on coalitions. The
    covariance of the process is a sum of parts that are smooth in every unit, take several units together, take
    any of several units, are of order two and three, or have no structure at all; every unit has its own
    relevance. The additive effects have a free mean and a variance around it. All these parameters maximize the
    restricted likelihood of all queries together under a weak prior: at two strengths of the prior on the
    relevances, and on one coalition of each complement pair only, because in a game where complements say the same
    twice their agreement looks like the absence of noise. Of the three, the one that predicts left-out pairs
    best is kept. The posterior mean passes through every value, and its Shapley values are known in closed form,
    so the answer is one matrix times the values, factored once for all queries. This is Bayesian quadrature [1]_
    of the Shapley value. It is exact when all queries are additive, and on games of order two and three once the
    coalitions determine them.

    Why: KernelSHAP treats all that is not additive as noise. Estimators that subtract a surrogate first
    ([2]_) are left with the part that it does not predict. Here no sampling is left at all, since
    the surrogate's own Shapley values need none, and what is unpredictable is one of the parts of the
    covariance: on a game without structure the estimate becomes a weighted regression like KernelSHAP's. Regression on
    coalitions chosen by more than the Shapley kernel is found in [3]_, kernels on coalitions in [4]_; neither
    estimator is this one. Measured against three packages in ``benchmarks/attribution/``.

    **Design.** See :func:`~proxyprompt.coalitions.outside_in_coalitions`: complement pairs, whole sizes from the
    smallest and largest coalitions inward. Much of it is not random, so the error is that of the model's
    interpolation, not of a draw.

    **Standard error.** ``se_coalitions`` is a jackknife over complement pairs, ``sqrt(sum_p d_p**2)`` with ``d_p``
    the change of the mean attribution when pair ``p`` is left out of the regression, in closed form, parameters
    kept; its degrees of freedom are (pairs) - (n - 1). It tends to be too large: leaving out a pair that nothing
    else can stand in for costs more than the error of having it. The posterior's own standard error is not
    reported, because it trusts the parameters: on games of maxima at four coalitions a unit, mean +- 1.96 of it
    covered under a third. How often the jackknife covers is measured in
    ``benchmarks/attribution/results/variance.md``.

    **Departures.** Parameters are chosen on at most 200 coalitions (2.4 a unit if that is more) and 64 queries,
    evenly spaced, and compared on at most 600. A value that is missing is replaced, for this choice only, by an
    additive fit of its query; the estimate itself leaves it out, exactly as if the query had been regressed on its
    other coalitions. Where the likelihood is costly (about 100 units) a single search is made, of few steps.

    References
    ----------
    .. [1] O'Hagan, "Bayes-Hermite Quadrature", 1991.
    .. [2] Witter et al., "Regression-adjusted Monte Carlo Estimators for Shapley Values and Probabilistic Values",
       2025.
    .. [3] Musco & Witter, "Provably Accurate Shapley Value Estimation via Leverage Score Sampling", 2024.
    .. [4] Chau et al., "RKHS-SHAP: Shapley Values for Kernel Methods", 2022.

    Examples
    --------
    >>> from proxyprompt.testing import UnanimityGame
    >>> game = UnanimityGame(8, [((0, 1), 1.0), ((2, 3, 4), 3.0), ((5,), 0.5)])
    >>> result = SurrogateSHAP().attribute(game, 8, budget=80, rng=np.random.default_rng(0))
    >>> result.exact, (result.mean.round(4) + 0).tolist()
    (False, [0.5, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0])
    """

    method: ClassVar[str] = "surrogate_shap"

    @staticmethod
    def smallest_budget(n_units: int) -> int:
        """Fewest coalitions: ``min(2**n, 2 n + 6)``, both ends, the single units with their complements, two more pairs."""
        return int(min(2**n_units, 2 * n_units + 6))

    def design(self, n_units: int, budget: int, *, rng: np.random.Generator) -> Design:
        """Draw the coalitions of :func:`~proxyprompt.coalitions.outside_in_coalitions`.

        Parameters
        ----------
        n_units : int
            Number of units, at least 1.
        budget : int
            Largest number of coalitions, at least ``smallest_budget(n_units)`` and, unless it reaches all ``2**n_units``,
            at most 4096: the regression takes memory with its square.
        rng : numpy.random.Generator
            The only source of chance.

        Returns
        -------
        Design
            ``exact`` when it holds all coalitions. Weights are 1, and 0 for the two ends.

        Raises
        ------
        InputError
            When the budget is too small or too large, or the draws do not determine the units.
        """
        smallest = self.smallest_budget(n_units)
        if budget < smallest:
            raise InputError(
                f"budget={budget}: {n_units} units are not determined by so few coalitions; the smallest "
                f"budget that works is {smallest}.",
                hint=f"Use {smallest} or more; {4 * n_units} is enough for a useful answer.",
            )
        if _LARGEST < budget < 2**n_units:
            raise InputError(
                f"budget={budget}: the regression takes memory with the square of the coalitions and stops at {_LARGEST}.",
                hint=f"Use {_LARGEST} or fewer, or KernelSHAP.",
            )
        for _ in range(_REDRAWS):
            rows = outside_in_coalitions(n_units, budget, rng=rng)
            weights = np.r_[np.zeros(2), np.ones(len(rows) - 2)]
            exact = len(rows) == 2**n_units
            if exact or Regression.make(rows, weights).has_spare:
                return Design(rows, weights, exact)
        raise InputError(
            f"budget={budget}: {_REDRAWS} draws did not determine {n_units} units with one pair to spare.",
            hint=f"Raise the budget; {4 * n_units} is enough in practice.",
        )

    def fit(self, design: Design, values: ArrayLike) -> Attribution:
        """Choose the kernel, factor once, and apply to every query.

        Parameters
        ----------
        design : Design
            Distinct coalitions, whoever chose them.
        values : array_like of float, shape (n_coalitions, n_queries)
            NaN is missing.

        Returns
        -------
        Attribution
            ``values.sum(axis=1)`` equals v(full) - v(empty) for every query.

        Raises
        ------
        InputError
            When the values have a wrong shape, a coalition is listed twice, or the rows do not determine the units.
        InconclusiveError
            When too many queries have missing values.
        """
        kept, _, dropped = self._complete_enough(design, values)
        rows, n_units = design.coalitions, design.n_units
        base, full = kept[design.empty_row], kept[design.full_row]
        se_coalitions, df = np.zeros(n_units), float("inf")
        if design.exact and not np.isnan(kept).any():
            phi = (shapley_weights(rows) @ kept).T
        else:
            phi, se_coalitions, df = self._regress(design, kept)
        phi += ((full - base - phi.sum(axis=1)) / n_units)[:, None]  # rounding only
        mean, se, se_queries, se_coalitions = summarize(phi, se_coalitions)
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
            exact=design.exact,
            method=self.method,
            settings={"max_missing": self.max_missing, "max_dropped": self.max_dropped},
            dropped_queries=dropped,
            df_coalitions=df,
        )

    def _regress(self, design: Design, kept: FloatArray) -> tuple[FloatArray, FloatArray, float]:
        """Attributions, their standard error over pairs, and its degrees of freedom."""
        rows = design.coalitions
        inner = np.asarray(rows.any(axis=1) & ~rows.all(axis=1), dtype=np.float64)
        additive = Regression.make(rows, inner)
        if not additive.has_spare or len(set(row_keys(rows))) < len(rows):
            raise InputError(
                f"The {design.n_coalitions} coalitions of the design repeat each other, or do not determine "
                f"{design.n_units} units with one pair to spare.",
                hint="Draw a new design, with a larger budget.",
            )
        regression = CubeRegression.make(_tuned_kernel(rows, kept), rows)
        projection = regression.projection()
        filled = _filled(projection, kept)
        estimator = regression.shapley_map()
        level = filled.mean(axis=1)
        gaps = projection @ level
        where = np.argsort(np.where(inner > 0, additive.clusters, -1), kind="stable")[
            int((inner == 0).sum()) :
        ]
        starts = np.flatnonzero(np.diff(additive.clusters[where], prepend=-1))
        change = np.zeros((design.n_units, len(starts)))
        for size in (1, 2):  # a coalition by itself, or with its complement
            groups = np.flatnonzero(np.diff(np.r_[starts, len(where)]) == size)
            pairs = where[starts[groups][:, None] + np.arange(size)]
            blocks = projection[pairs[:, :, None], pairs[:, None, :]]
            left_out = np.linalg.pinv(blocks, rcond=_SINGULAR, hermitian=True) @ gaps[pairs][:, :, None]
            change[:, groups] = np.einsum("upk,pk->up", estimator[:, pairs], left_out[:, :, 0])
        se: FloatArray = np.sqrt((change**2).sum(axis=1))
        return (estimator @ filled).T, se, float(max(len(starts) - (design.n_units - 1), 1))


def _tuned_kernel(rows: BoolArray, values: FloatArray) -> CubeKernel:
    """The kernel that suits an evenly spaced part of the values; scales of the queries do not matter."""
    basis = np.column_stack([np.ones(len(rows)), rows])
    part = _spaced_pairs(len(rows), max(_TUNING_ROWS, int(2.4 * rows.shape[1])))
    if np.linalg.matrix_rank(basis[part]) < basis.shape[1]:
        part = np.arange(len(rows))
    queries = np.unique(np.linspace(0, values.shape[1] - 1, _TUNING_QUERIES).astype(int))
    chosen = values[:, queries]
    for query in np.flatnonzero(np.isnan(chosen).any(axis=0)):
        seen = ~np.isnan(chosen[:, query])
        slopes = np.linalg.lstsq(basis[seen], chosen[seen, query], rcond=None)[0]
        chosen[~seen, query] = basis[~seen] @ slopes
    curved = chosen - basis @ np.linalg.lstsq(basis, chosen, rcond=None)[0]
    size = np.sqrt((curved**2).mean(axis=0))
    useful = size > 1e-9 * np.abs(chosen).max(axis=0)
    if not useful.any():
        return CubeKernel.start(rows.shape[1]).additive()
    scaled = chosen[:, useful] / size[useful]
    judged = _spaced_pairs(len(rows), _JUDGED_ROWS)
    return choose_kernel(rows[part], scaled[part], rows[judged], scaled[judged])


def _spaced_pairs(n_rows: int, wanted: int) -> NDArray[np.int64]:
    """Indices of about ``wanted`` rows, evenly spaced, a row and its complement together."""
    if n_rows <= wanted:
        return np.arange(n_rows)
    some = np.unique(np.linspace(0, n_rows // 2 - 1, wanted // 2).astype(np.int64))
    return np.sort(np.concatenate([2 * some, 2 * some + 1]))


def _filled(projection: FloatArray, values: FloatArray) -> FloatArray:
    """Missing values replaced by their prediction from the query's others, which is as good as leaving them out."""
    filled = values.copy()
    for query in np.flatnonzero(np.isnan(values).any(axis=0)):
        missing = np.isnan(values[:, query])
        among = projection[np.ix_(missing, missing)]
        if np.linalg.eigvalsh(among)[0] < _SINGULAR * np.diag(projection).max():
            raise InputError(
                f"Query {query} of those kept lacks {int(missing.sum())} coalitions, and the others do not "
                "determine the units.",
                hint="Repeat the failed calls, or raise the budget.",
            )
        pull = projection[np.ix_(missing, ~missing)] @ values[~missing, query]
        filled[missing, query] = -np.linalg.solve(among, pull)
    return filled
