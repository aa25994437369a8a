"""Gaussian-process regression on coalitions: an additive game, plus a process with a ``CubeKernel``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, lapack
from scipy.optimize import minimize

from proxyprompt.coalitions import BoolArray, FloatArray

from ._cube_kernel import CubeKernel

__all__ = ["CubeRegression", "choose_kernel"]

_PRIOR = 4.0  # standard deviation of the logarithms of variances and slopes
_LIMITS, _EFFECTS = (-20.0, 6.0), (-10.0, 25.0)
_WORK = 2.5e9  # multiplications that one search for parameters may cost, roughly
_FEWEST, _MOST = 6, 60  # evaluations of the likelihood in one search
_HANDICAP = 3.0  # nats by which the search on one of each pair must be better


@dataclass(frozen=True, eq=False)
class CubeRegression:
    """The factored regression of one set of coalitions under one kernel.

    Attributes
    ----------
    kernel : CubeKernel
    basis : ndarray, shape (n_coalitions, n_units + 1)
        A constant and the units.
    chol : tuple
        Cholesky factor of the covariance ``K``.
    solved : ndarray, shape (n_coalitions, n_units + 1)
        ``K**-1 basis``.
    precision : ndarray, shape (n_units + 1, n_units + 1)
        ``basis' K**-1 basis`` plus the prior precision of the effects.
    """

    kernel: CubeKernel
    rows: BoolArray
    basis: FloatArray
    chol: tuple[FloatArray, bool]
    solved: FloatArray
    precision: FloatArray

    @classmethod
    def make(cls, kernel: CubeKernel, rows: BoolArray) -> CubeRegression:
        """Factor; raises LinAlgError when the rows do not determine the units or K is singular."""
        basis = np.column_stack([np.ones(len(rows)), rows.astype(np.float64)])
        chol = cho_factor(kernel.gram(rows), lower=True, overwrite_a=True, check_finite=False)
        solved = cho_solve(chol, basis, check_finite=False)
        return cls(kernel, rows, basis, chol, solved, basis.T @ solved + kernel.effects_precision())

    def projection(self) -> FloatArray:
        """``P`` itself, shape (n_coalitions, n_coalitions)."""
        half, _ = lapack.dpotri(self.chol[0], lower=1)  # the lower triangle of the inverse
        inverse: FloatArray = np.tril(half)
        inverse += np.tril(half, -1).T
        inverse -= self.solved @ np.linalg.solve(self.precision, self.solved.T)
        return inverse

    def log_determinants(self) -> float:
        """``(log det K + log det precision - log det of its prior) / 2``, up to a constant."""
        prior = (self.kernel.n_units - 1) * np.log(self.kernel.variances[6])
        basis = np.linalg.slogdet(self.precision).logabsdet
        return float(np.log(np.diag(self.chol[0])).sum() + 0.5 * (basis + prior))

    def shapley_map(self) -> FloatArray:
        """Matrix that turns values into the Shapley values of the posterior mean, shape (n_units, n_coalitions)."""
        reach = self.kernel.shapley(self.rows)
        slopes = np.eye(self.basis.shape[1])[1:] - reach @ self.solved  # what is left to the additive part
        answer: FloatArray = cho_solve(self.chol, reach.T, check_finite=False).T
        answer += np.linalg.solve(self.precision, slopes.T).T @ self.solved.T
        return answer


def choose_kernel(
    rows: BoolArray, values: FloatArray, judged: BoolArray, judged_values: FloatArray
) -> CubeKernel:
    """Parameters of greatest restricted likelihood under a weak prior, the best of three by left-out loss.

    Parameters
    ----------
    rows : ndarray of bool, shape (n_coalitions, n_units)
        Searched on.
    values : ndarray of float64, shape (n_coalitions, n_queries)
        Each query scaled so that what is not additive has mean square one.
    judged, judged_values
        The same for the rows that the three are compared on.
    """
    m, n = rows.shape
    rounds = int(np.clip(_WORK / (m**2 * (3 * m + 6 * n + 60)), _FEWEST, _MOST))
    kernel = CubeKernel.start(n)
    if rounds == _FEWEST:  # large: one search, from where it starts
        return _search(kernel, rows, values, 1.0, rounds)
    smooth = _search(kernel, rows, values, 0.5, rounds, free=True)
    found = [(_left_out_loss(smooth, judged, judged_values), smooth)]
    kernel = _search(smooth, rows, values, 1.0, rounds)
    found.append((_left_out_loss(kernel, judged, judged_values), kernel))
    if complement_pairs(rows):
        some = np.isin(np.arange(m) % 4, (0, 3))  # one of each pair, by turns
        some[[0, 1]] = True
        kernel = _search(CubeKernel.start(n), rows[some], values[some], 1.0, rounds)
        found.append((_left_out_loss(kernel, judged, judged_values) + _HANDICAP, kernel))
    return min(found, key=lambda pair: pair[0])[1]


def complement_pairs(rows: BoolArray) -> bool:
    """Whether rows ``2k`` and ``2k + 1`` are complements."""
    return len(rows) % 2 == 0 and bool((rows[0::2] == ~rows[1::2]).all())


def _left_out_loss(kernel: CubeKernel, rows: BoolArray, values: FloatArray) -> float:
    """Minus the log predictive density of what is left out given the rest, mean over queries, closed form.

    Left out are complement pairs, of which the half difference is predicted, all that Shapley values depend on in a
    paired design; or single rows where the rows do not come in pairs.
    """
    projection = CubeRegression.make(kernel, rows).projection()
    gaps = projection @ values
    if not complement_pairs(rows):
        variance = 1 / np.diag(projection)
        errors = variance[:, None] * gaps
    else:
        pairs = np.arange(2, len(rows)).reshape(-1, 2)
        blocks = np.linalg.pinv(projection[pairs[:, :, None], pairs[:, None, :]], rcond=1e-12, hermitian=True)
        half = blocks[:, 0] - blocks[:, 1]  # of a unit difference
        variance = np.maximum((half[:, 0] - half[:, 1]) / 4, 1e-12)
        errors = np.einsum("pd,pdq->pq", half, gaps[pairs]) / 2
    return float(0.5 * ((errors**2).mean(axis=1) / variance + np.log(variance)).sum())


def _search(
    begin: CubeKernel, rows: BoolArray, values: FloatArray, spread: float, rounds: int, *, free: bool = False
) -> CubeKernel:
    """Parameters of greatest posterior density, as far as ``rounds`` evaluations get; ``free``: effects not shrunk."""
    m, n_queries = values.shape
    n = begin.n_units
    centre = CubeKernel.start(n).log_parameters
    tightness = np.r_[np.full(len(centre) - n, _PRIOR**-2), np.full(n, spread**-2)]
    if n_queries > m:  # only values @ values.T matters
        left, sizes, _ = np.linalg.svd(values, full_matrices=False)
        values = left * sizes

    def loss(point: FloatArray) -> tuple[float, FloatArray]:
        kernel = CubeKernel(point)
        try:
            regression = CubeRegression.make(kernel, rows)
        except LinAlgError:
            return 1e10, np.zeros_like(point)
        projection = regression.projection()
        weighted = projection @ values
        value = 0.5 * float((values * weighted).sum()) / n_queries + regression.log_determinants()
        outer = projection - weighted @ weighted.T / n_queries
        away = point - centre
        return (
            value + 0.5 * float(tightness @ away**2),
            0.5 * kernel.gradient(rows, outer) + tightness * away,
        )

    effects = len(centre) - n - 1
    bounds = [_LIMITS] * effects + [(_EFFECTS[1], _EFFECTS[1]) if free else _EFFECTS] + [_LIMITS] * n
    first = begin.log_parameters.copy()
    first[effects] = _EFFECTS[1] if free else centre[effects]
    found = minimize(
        loss,
        first,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxfun": rounds, "ftol": 1e-6},
    )
    return CubeKernel(found.x)
