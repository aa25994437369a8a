"""How much to bet on a mean above 0 after each pair; what makes it valid is only that a bet depends on the past.

Many runs at once, so that the rule that is simulated is the one that decides.
"""

from __future__ import annotations

from math import log, sqrt

import numpy as np

from .coalitions import FloatArray

__all__ = ["CAP", "log_wealth"]

# Share of the largest safe bet ever placed: all but one hundredth of the wealth.
CAP = 0.99
# The wealth that the bets aim at by the last pair, as a multiple of the 1 / delta that decides.
_AIM = 1.1
# What is believed of a difference before any is seen, and how many pairs that belief is worth: the worst one, or one
# step down or up.
_PRIOR_PAIRS = 4.0
_PRIOR_SHARES = np.array([0.015, 0.4925, 0.4925])
_PRIOR_STEP = 0.3
# The mean that is hoped for, in standard errors after all pairs, where the past shows a smaller one; and the largest mean
# that the past is believed to show, in standard deviations.
_HOPE = 3.5
_MOST_DRIFT = 0.5
# The past is kept in bins, and bets are tried as shares of the largest one: both only for speed.
_BINS = 24
_BETS = np.concatenate([[0.02, 0.05], np.linspace(0.1, 1.0, 10)])


def log_wealth(d: FloatArray, worst: float, delta: float, max_pairs: int) -> tuple[FloatArray, FloatArray]:
    """Log wealth against "mean <= 0" and against "mean >= 0" after every pair, for many runs at once.

    Parameters
    ----------
    d : ndarray of float64, shape (n_runs, n_pairs)
        Differences in [-worst, 1].
    worst, delta, max_pairs
        As in :func:`betting_rule`; ``worst`` is the largest loss.

    Returns
    -------
    above, below : ndarray of float64, shape (n_runs, n_pairs)
        A wealth that has reached ``1 / delta`` bets no more.
    """
    return _wealth(d, worst, 1.0, delta, max_pairs), _wealth(-d, 1.0, worst, delta, max_pairs)


def _wealth(d: FloatArray, worst: float, top: float, delta: float, max_pairs: int) -> FloatArray:
    """Log wealth of bets on a mean above 0, for differences in [-worst, top]."""
    runs, n_pairs = d.shape
    goal = log(1 / delta)
    bets = CAP / worst * _BETS
    place = np.clip((d + worst) / (worst + top) * _BINS, 0, _BINS - 1).astype(np.int64)
    # Weights and mean differences of the atoms of each run's law: what was believed before, then the bins.
    weight = np.concatenate(
        [np.tile(_PRIOR_PAIRS * _PRIOR_SHARES, (runs, 1)), np.zeros((runs, _BINS))], axis=1
    )
    value = np.concatenate(
        [np.tile([-worst, -_PRIOR_STEP, _PRIOR_STEP], (runs, 1)), np.zeros((runs, _BINS))], axis=1
    )
    wealth, path = np.zeros(runs), np.empty((runs, n_pairs))
    for n in range(n_pairs):
        live = np.flatnonzero(wealth < goal)
        if n >= max_pairs or not len(live):
            path[:, n] = wealth
            continue
        x = d[live, n]
        wealth[live] += np.log1p(
            _choose(weight[live], value[live], wealth[live] - goal, max_pairs - n, max_pairs, bets) * x
        )
        # After the bet, so that the next one depends on the past only.
        at = len(_PRIOR_SHARES) + place[live, n]
        weight[live, at] += 1
        value[live, at] += (x - value[live, at]) / weight[live, at]
        path[:, n] = wealth
    return path


def _choose(
    weight: FloatArray, value: FloatArray, log_share: FloatArray, left: int, max_pairs: int, bets: FloatArray
) -> FloatArray:
    """The bet of each run that makes it likeliest to reach the goal within the pairs left."""
    from scipy.special import ndtr, ndtri

    share = weight / weight.sum(axis=1, keepdims=True)
    mean = (share * value).sum(axis=1)
    spread = value - mean[:, None]
    variance = (share * spread**2).sum(axis=1)
    deviation = np.sqrt(variance)
    hoped = np.maximum(mean, _HOPE * deviation / sqrt(max_pairs))
    share = np.maximum(share * (1 + ((hoped - mean) / variance)[:, None] * spread), 0.0)
    share /= share.sum(axis=1, keepdims=True)
    drift = np.minimum(hoped / deviation, _MOST_DRIFT) * sqrt(left - 1)
    used = (weight > 0).any(axis=0)
    share, value = share[:, None, used], value[:, None, used]
    p = np.exp(np.maximum(log_share, -25.0))[:, None, None] / _AIM
    after = np.clip(p * (1 + bets[None, :, None] * value), 1e-15, 1 - 1e-9)
    chance = (share * ndtr(ndtri(after) + drift[:, None, None])).sum(axis=2)
    best: FloatArray = bets[chance.argmax(axis=1)]
    return best
