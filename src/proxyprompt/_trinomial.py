"""Exact test on wins and losses: does a smaller prompt lose too many queries?

For scores that are right or wrong only the discordant pairs differ: ``wins`` (right without the removed
parts, wrong with them) and ``losses`` (the reverse) out of ``n`` pairs. Both null hypotheses of
:func:`~proxyprompt.sequential.non_inferiority` have the form ``q_loss >= slack + keep * q_win`` for the
two probabilities:

* margin ``M``: ``q_loss - q_win >= M`` over all ``n`` pairs, so ``slack = M``, ``keep = 1``;
* share ``tau``: pairs wrong both times drop out of ``P(pruned) <= tau P(full)``; given the number of
  other pairs, ``1 - q_loss <= tau (1 - q_win)``, so ``slack = 1 - tau``, ``keep = tau``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .coalitions import FloatArray

__all__ = ["critical_score", "p_value", "power"]

_GRID = 200
IntArray = NDArray[np.int64]


def p_value(wins: int, losses: int, n: int, slack: float, keep: float) -> float:
    """Exact p-value: the largest chance, over the boundary of the null, of a score at least as high.

    Parameters
    ----------
    wins, losses, n : int
        Counts, ``wins + losses <= n``.
    slack, keep : float
        The null hypothesis ``q_loss >= slack + keep * q_win``; slack in [0, 1), keep in (0, 1].

    Returns
    -------
    float

    Notes
    -----
    The score statistic with the nuisance ``q_win`` estimated under the null (differences: Liu, Hsueh,
    Hsieh & Chen 2002; ratios: Tang, Tang & Chan 2003) orders the outcomes; the p-value is the supremum
    over ``q_win`` of an exact trinomial probability, found on a grid and refined. The score rises with
    wins and falls with losses, so that turning losses into ties only raises the chance of a high score:
    the supremum over the null lies on its boundary.
    """
    if n == 0:
        return 1.0
    outcomes = _outcomes(n)
    seen = score(np.array([wins]), np.array([losses]), n, slack, keep)[0]
    if seen <= 0:
        return 1.0
    region = score(*outcomes, n, slack, keep) >= seen - 1e-9
    chosen = outcomes[0][region], outcomes[1][region]
    top = (1 - slack) / (1 + keep)
    grid = top * np.linspace(0, 1, _GRID) ** 2
    sizes = _chance(chosen, n, grid, slack + keep * grid)
    best = int(np.argmax(sizes))
    fine = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)], 25)
    return float(min(1.0, max(sizes[best], _chance(chosen, n, fine, slack + keep * fine).max())))


def critical_score(n: int, slack: float, keep: float, level: float) -> float:
    """Smallest score whose exact p-value is at most ``level``; infinite when there is none."""
    wins, losses = _outcomes(n)
    scores = score(wins, losses, n, slack, keep)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > 0]
    top = (1 - slack) / (1 + keep)
    grid = top * np.linspace(0, 1, _GRID // 2) ** 2
    largest = np.zeros(len(order))
    for q_win in grid:
        mass = _pmf((wins[order], losses[order]), n, q_win, slack + keep * q_win)
        np.maximum(largest, np.cumsum(mass), out=largest)
    ordered = scores[order]
    last_of_ties = np.append(ordered[:-1] - ordered[1:] > 1e-9, True)
    valid = last_of_ties & (largest <= level)
    return float(ordered[np.flatnonzero(valid)[-1]]) if valid.any() else float("inf")


def power(n: int, slack: float, keep: float, critical: float, q_win: float, q_loss: float) -> float:
    """Chance that the score reaches ``critical`` when the two probabilities are as given."""
    wins, losses = _outcomes(n)
    region = score(wins, losses, n, slack, keep) >= critical - 1e-9
    chosen = wins[region], losses[region]
    return float(_pmf(chosen, n, q_win, q_loss).sum())


def score(wins: IntArray, losses: IntArray, n: int, slack: float, keep: float) -> FloatArray:
    """Standardized ``n slack - losses + keep wins``; higher is evidence against the null."""
    excess = n * slack - losses + keep * wins
    same = n - wins - losses
    # Likelihood equation for q = q_win on the boundary q_loss = slack + keep q: a quadratic in q, whose
    # larger root is the maximum.
    a = keep * (1 + keep) * n
    b = wins * (slack * (1 + keep) - keep * (1 - slack)) - losses * keep * (1 - slack)
    b = b + same * (1 + keep) * slack
    c = -wins * slack * (1 - slack)
    q = (-b + np.sqrt(np.maximum(b * b - 4 * a * c, 0.0))) / (2 * a)
    q = np.clip(q, 0.0, (1 - slack) / (1 + keep))
    variance = n * (slack * (1 - slack) + keep * (1 + keep) * q)
    result: FloatArray = np.divide(
        excess, np.sqrt(variance), out=np.zeros(np.shape(excess)), where=variance > 1e-12
    )
    return result


def _outcomes(n: int) -> tuple[IntArray, IntArray]:
    wins, losses = np.divmod(np.arange((n + 1) ** 2), n + 1)
    possible = wins + losses <= n
    return wins[possible], losses[possible]


def _chance(outcomes: tuple[IntArray, IntArray], n: int, q_win: FloatArray, q_loss: FloatArray) -> FloatArray:
    return np.array([_pmf(outcomes, n, w, v).sum() for w, v in zip(q_win, q_loss, strict=True)])


def _pmf(outcomes: tuple[IntArray, IntArray], n: int, q_win: float, q_loss: float) -> FloatArray:
    """Trinomial probabilities of (wins, losses)."""
    from scipy.special import gammaln, xlogy

    wins, losses = outcomes
    factorial = gammaln(np.arange(n + 1) + 1.0)
    same = n - wins - losses
    terms = [xlogy(np.arange(n + 1), q) for q in (q_win, q_loss, max(1 - q_win - q_loss, 0.0))]
    logs = factorial[n] + (terms[0] - factorial)[wins] + (terms[1] - factorial)[losses]
    result: FloatArray = np.exp(logs + (terms[2] - factorial)[same])
    return result
