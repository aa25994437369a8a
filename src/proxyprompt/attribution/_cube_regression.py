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
_FEWEST, _MOST = 8, 60  # evaluations of the likelihood in one search
_SPREADS = (0.5, 1.0)  # standard deviations of the logarithms of the relevances


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


def choose_kernel(rows: BoolArray, values: FloatArray) -> CubeKernel:
    """Parameters of greatest restricted likelihood under a weak prior.

    Parameters
    ----------
    rows : ndarray of bool, shape (n_coalitions, n_units)
    values : ndarray of float64, shape (n_coalitions, n_queries)
        Each query scaled so that what is not additive has mean square one.
    """
    m, n = rows.shape
    rounds = int(np.clip(_WORK / (m**2 * (3 * m + 6 * n + 60)), _FEWEST, _MOST))
    kernel = CubeKernel.start(n)
    if rounds == _FEWEST:  # large: one search, from where it starts
        return _search(kernel, rows, values, 1.0, rounds)
    found = []
    for spread in _SPREADS:  # the second search begins where the first ended
        kernel = _search(kernel, rows, values, spread, rounds)
        found.append((_left_out_loss(CubeRegression.make(kernel, rows), values), kernel))
    return min(found, key=lambda pair: pair[0])[1]


def _left_out_loss(regression: CubeRegression, values: FloatArray) -> float:
    """Minus the mean log predictive density of each value given the others, closed form."""
    projection = regression.projection()
    precision = np.diag(projection)
    gaps = (projection @ values) / precision[:, None]
    return float(0.5 * ((gaps**2 * precision[:, None]).mean() - np.log(precision).mean()))


def _search(begin: CubeKernel, rows: BoolArray, values: FloatArray, spread: float, rounds: int) -> CubeKernel:
    """Maximum a posteriori parameters, as far as ``rounds`` evaluations get."""
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

    found = minimize(
        loss,
        begin.log_parameters,
        jac=True,
        method="L-BFGS-B",
        bounds=[_LIMITS] * (len(centre) - n - 1) + [_EFFECTS] + [_LIMITS] * n,
        options={"maxfun": rounds, "ftol": 1e-6},
    )
    return CubeKernel(found.x)
