"""Sequential rules, all replications at once. Each returns the look at which a run was accepted, 0 for never."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri, stdtrit

from proxyprompt import _sequential_rules


def betting(d: np.ndarray, tau: float, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """The library's rule, vectorised; ``check`` in run.py holds it against the library's own."""
    runs, n_max = d.shape
    m, goal = tau / (1 + tau), np.log(1 / delta)
    above, below = np.zeros(runs), np.zeros(runs)
    total, squares = np.zeros(runs), np.zeros(runs)
    accepted, stopped = np.zeros(runs, int), np.zeros(runs, int)
    best = np.log1p(_sequential_rules._CAP / m * (1 - m))
    y_all = (d + tau) / (1 + tau)
    prior, pairs, aim, cap = (
        _sequential_rules._PRIOR_VARIANCE,
        _sequential_rules._PRIOR_PAIRS,
        _sequential_rules._AIM,
        _sequential_rules._CAP,
    )
    for n in range(1, n_max + 1):
        mean = (total + pairs * m) / (n - 1 + pairs)
        var = (squares - 2 * mean * total + (n - 1) * mean**2 + pairs * prior) / (n - 1 + pairs)
        scale = 1 / np.sqrt(var * (n_max - n + 1))

        def urgency(log_wealth: np.ndarray) -> np.ndarray:
            p = np.exp(np.clip(log_wealth - goal, -600, 0)) / aim
            return np.exp(-(ndtri(p) ** 2) / 2) / np.sqrt(2 * np.pi) / p

        up, down = (
            np.minimum(scale * urgency(above), cap / m),
            np.minimum(scale * urgency(below), cap / (1 - m)),
        )
        y = y_all[:, n - 1]
        above += np.log1p(up * (y - m))
        below += np.log1p(-down * (y - m))
        total += y
        squares += y * y
        going = stopped == 0
        accepted[going & (above >= goal)] = n
        hopeless = above + (n_max - n) * best < goal if n < n_max else np.zeros(runs, bool)
        stopped[going & ((above >= goal) | (below >= goal) | hopeless)] = n
    return accepted, np.where(stopped == 0, n_max, stopped)


def study_bets(d: np.ndarray, tau: float, delta: float, cap: float = 0.9, prior: float = 0.05):
    """The screening study's recommended bets, tuned to N once and not to the wealth."""
    runs, n_max = d.shape
    m, goal = tau / (1 + tau), np.log(1 / delta)
    above, total, squares = np.zeros(runs), np.full(runs, 0.5), np.full(runs, prior)
    var, accepted = squares.copy(), np.zeros(runs, int)
    below, stopped = np.zeros(runs), np.zeros(runs, int)
    best = np.log1p(cap / m * (1 - m))
    for n, y in enumerate(((d + tau) / (1 + tau)).T, start=1):
        bet = np.sqrt(2 * goal / (n_max * var))
        above += np.log1p(np.minimum(bet, cap / m) * (y - m))
        below += np.log1p(-np.minimum(bet, cap / (1 - m)) * (y - m))
        total += y
        squares += (y - total / (n + 1)) ** 2
        var = squares / (n + 1)
        going = stopped == 0
        accepted[going & (above >= goal)] = n
        hopeless = above + (n_max - n) * best < goal
        stopped[going & ((above >= goal) | (below >= goal) | hopeless)] = n
    return accepted, np.where(stopped == 0, n_max, stopped)


def paired_t(d: np.ndarray, tau: float, delta: float, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of [PE]: a two-sided t interval after every pair, from the ``least``-th on."""
    runs, n_max = d.shape
    n = np.arange(1, n_max + 1)
    mean = np.cumsum(d, axis=1) / n
    with np.errstate(invalid="ignore", divide="ignore"):
        var = np.maximum(np.cumsum(d**2, axis=1) - n * mean**2, 0) / (n - 1)
        equal = np.cumsum(d != d[:, :1], axis=1) == 0
        half = np.where(equal, 0.0, stdtrit(n - 1, 1 - delta / 2) * np.sqrt(var / n))
    decided = ((mean - half > 0) | (mean + half < 0)) & (n >= least)
    first = np.where(decided.any(axis=1), decided.argmax(axis=1), n_max - 1)
    accepted = decided.any(axis=1) & (mean[np.arange(runs), first] > 0)
    return np.where(accepted, first + 1, 0), first + 1


def fixed_t(d: np.ndarray, tau: float, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """One look, after all pairs; one-sided."""
    n = d.shape[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        t = d.mean(axis=1) / (d.std(axis=1, ddof=1) / np.sqrt(n))
    return np.where(t > stdtrit(n - 1, 1 - delta), n, 0), np.full(len(d), n)
