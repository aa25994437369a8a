"""A line from a proxy's estimates to the target's measurements, with the spread around it; what it says of other units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from proxyprompt.coalitions import FloatArray

__all__ = ["PredictionLine", "fit_line"]

_GRID = 80
_WIDEST = 6.0
_FEWEST = 4


@dataclass(frozen=True, eq=False)
class PredictionLine:
    """``theta ~ Normal(a + b x, tau**2)`` with ``a``, ``b`` and ``tau`` integrated out.

    Attributes
    ----------
    weights : float (n_grid,)
        Posterior of ``tau`` on a grid.
    tau : float (n_grid,)
    beta : float (n_grid, 2)
        Intercept and slope for each ``tau``; of centred estimates.
    covariance : float (n_grid, 2, 2)
    centre : float
    """

    weights: FloatArray
    tau: FloatArray
    beta: FloatArray
    covariance: FloatArray
    centre: float

    @property
    def slope(self) -> float:
        """Posterior mean of ``b``."""
        return float(self.weights @ self.beta[:, 1])

    @property
    def doubt(self) -> float:
        """Chance that ``b`` has the other sign than its mean; one half where there is no slope."""
        from scipy.special import ndtr

        size = np.sqrt(self.covariance[:, 1, 1])
        if not (size > 0).all():
            return 0.5
        below = float(self.weights @ ndtr(-self.beta[:, 1] / size))
        return min(below, 1.0 - below)

    def predict(self, estimates: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of the true effect of units with these estimates."""
        means, variances = self._parts(estimates)
        mean: FloatArray = self.weights @ means
        spread: FloatArray = np.sqrt(self.weights @ (variances + (means - mean) ** 2))
        return mean, spread

    def below(self, estimates: FloatArray, bar: float) -> FloatArray:
        """Chance that the true effect is below ``bar``."""
        from scipy.special import ndtr

        means, variances = self._parts(estimates)
        sizes = np.sqrt(np.maximum(variances, 1e-300))
        found: FloatArray = self.weights @ ndtr((bar - means) / sizes)
        return found

    def above(self, estimates: FloatArray, bar: float) -> FloatArray:
        """Chance that it is above ``bar``."""
        return 1.0 - self.below(estimates, bar)

    def _parts(self, estimates: FloatArray) -> tuple[FloatArray, FloatArray]:
        x = np.column_stack([np.ones(len(estimates)), estimates - self.centre])
        variance = np.einsum("ui,gij,uj->gu", x, self.covariance, x) + self.tau[:, None] ** 2
        return self.beta @ x.T, variance


def fit_line(estimates: FloatArray, measured: FloatArray, errors: FloatArray) -> PredictionLine | None:
    """Fit; ``None`` with fewer than four units, which cannot show a spread around a line.

    Parameters
    ----------
    estimates, measured, errors : float (n_units,)
        Of measured units: the proxy's estimate, the target's mean effect and its standard error.

    Notes
    -----
    Random-effects meta-regression. With a flat prior on ``a`` and ``b`` they integrate out exactly for each ``tau``,
    and what is left is the restricted likelihood, under a flat prior on ``tau`` up to six standard deviations of the
    measurements. With few units that leaves wide tails, which is what keeps a rule built on it from stopping early.
    Estimates that are all alike have no slope; it is then 0.
    """
    m = len(measured)
    if m < _FEWEST:
        return None
    scale = max(float(np.std(measured)), float(np.sqrt(np.mean(errors**2))))
    if scale == 0.0:
        scale = max(float(np.abs(measured).max()), 1e-9)
        widest = 0.0
    else:
        widest = _WIDEST * scale
    variance = np.maximum(errors**2, (1e-4 * scale) ** 2)
    centre = float(estimates.mean())
    offset = estimates - centre
    flat = float(np.abs(offset).max()) <= 1e-12 * max(1.0, float(np.abs(estimates).max()))
    x = np.ones((m, 1)) if flat else np.column_stack([np.ones(m), offset])
    grid = np.linspace(0.0, widest, _GRID) if widest else np.zeros(1)
    k = x.shape[1]
    w = 1.0 / (variance + grid[:, None] ** 2)
    information = np.einsum("gm,mi,mj->gij", w, x, x)
    covariance = np.linalg.inv(information)
    beta = np.einsum("gij,mj,gm->gi", covariance, x, w * measured)
    residual = measured - beta @ x.T
    log_weight = 0.5 * (
        np.log(w).sum(axis=1) - np.linalg.slogdet(information)[1] - (w * residual**2).sum(axis=1)
    )
    betas, covariances = np.zeros((len(grid), 2)), np.zeros((len(grid), 2, 2))
    betas[:, :k], covariances[:, :k, :k] = beta, covariance
    weights = np.exp(log_weight - log_weight.max())
    return PredictionLine(weights / weights.sum(), grid, betas, covariances, centre)
