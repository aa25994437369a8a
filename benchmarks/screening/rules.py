"""Sequential rules, all replications at once. Each returns the look at which a run was accepted, 0 for never."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri, stdtrit

from proxyprompt._bets import CAP, log_wealth


def betting(d: np.ndarray, tau: float, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """The library's rule on its own bets; ``check`` in run.py holds it against the library's decisions."""
    runs, n_max = d.shape
    goal, best = np.log(1 / delta), np.log1p(CAP / tau)
    above, below = log_wealth(d, tau, delta, n_max)
    left = np.arange(n_max - 1, -1, -1)
    won, lost = above >= goal, below >= goal
    over = won | lost | ((above + left * best < goal) & (left > 0))
    first = np.where(over.any(axis=1), over.argmax(axis=1), n_max - 1)
    return np.where(won[np.arange(runs), first], first + 1, 0), first + 1


def earlier_bets(d: np.ndarray, tau: float, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """The bets of ProxyPrompt before: the hedge of a digital option for a normal law (one formula, no look ahead)."""
    runs, n_max = d.shape
    m, goal = tau / (1 + tau), np.log(1 / delta)
    above, total, squares = np.zeros(runs), np.zeros(runs), np.zeros(runs)
    accepted = np.zeros(runs, int)
    y_all = (d + tau) / (1 + tau)
    for n in range(1, n_max + 1):
        mean = (total + 5 * m) / (n + 4)
        var = (squares - 2 * mean * total + (n - 1) * mean**2 + 5 * 0.03) / (n + 4)
        p = np.exp(np.clip(above - goal, -600, 0)) / 1.25
        urgency = np.exp(-(ndtri(p) ** 2) / 2) / np.sqrt(2 * np.pi) / p
        y = y_all[:, n - 1]
        above += np.where(
            accepted, 0, np.log1p(np.minimum(urgency / np.sqrt(var * (n_max - n + 1)), 0.99 / m) * (y - m))
        )
        total += y
        squares += y * y
        accepted[(accepted == 0) & (above >= goal)] = n
    return accepted, np.where(accepted == 0, n_max, accepted)


def best_possible(support: np.ndarray, weights: np.ndarray, tau: float, delta: float, n_max: int) -> float:
    """Power of the best bets of all for a law that is *known*: dynamic programming over wealth and pairs left.

    A valid test of a bounded mean, against laws whose mean may change with the past, is a product of such bets, so no
    rule of this kind does better, however it learns. Wealth on a grid of 400 steps, 41 bets, at most 60 atoms.
    """
    goal = np.log(1 / delta)
    edges = np.linspace(support.min(), support.max(), 61)
    place = np.clip(np.digitize(support, edges) - 1, 0, 59)
    mass, total = np.bincount(place, weights, 60), np.bincount(place, weights * support, 60)
    law, atoms = mass[mass > 0], (total[mass > 0] / mass[mass > 0])
    steps = np.log1p(np.concatenate([[0], np.geomspace(0.02, 1, 40)])[:, None] * 0.999 / tau * atoms)
    grid = np.linspace(goal - 8, goal, 400)
    value = (grid >= goal).astype(float)
    for _ in range(n_max):
        following = [np.interp(grid[:, None] + step, grid, value, left=0, right=1) @ law for step in steps]
        value = np.max(following, axis=0)
        value[-1] = 1.0
    return float(np.interp(0.0, grid, value))


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
