"""On which side of a line would the mean over the whole split fall? Often a part of it tells."""

from __future__ import annotations

from math import log, log1p, sqrt
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Side", "side_of_line"]

Side: TypeAlias = Literal["holds", "falls"]

# No bet takes more than this share of the largest that cannot bankrupt; variance assumed before any query is seen.
_CAP = 0.9
_PRIOR_PAIRS = 5.0
_PRIOR_VARIANCE = 0.03


def side_of_line(
    differences: NDArray[np.float64], n: int, line: float, *, level: float
) -> tuple[Side | None, int]:
    """Decide from the first of ``n`` differences whether the mean of all ``n`` is at least ``line``.

    Parameters
    ----------
    differences : float (n_seen,)
        In [-1, 1]: those seen so far, in the random order in which all ``n`` are gone through.
    n : int
        Size of the whole split.
    line : float
    level : float
        Largest chance, over the order, of "falls" where the whole split holds, and the same the other way round.
        0: decide only what no further query can change.

    Returns
    -------
    side : {"holds", "falls"} or None
        ``None``: not clear yet. Never ``None`` when all are seen.
    n_used : int
        Differences after which it was clear.

    Notes
    -----
    Betting without replacement [1]_: with ``y = (d + 1) / 2``, ``t`` of ``n`` seen and ``m`` the line on that scale, the
    next one has mean ``(n m - sum y) / (n - t)`` if the whole split lies exactly on the line, so that the wealth
    ``prod(1 + lambda (y - that))`` of any bet that looks only back is a supermartingale if it lies below, and exceeds
    ``1 / level`` with chance at most ``level``, at any look. A second bettor bets the other way. A conditional
    mean outside [0, 1] decides with certainty. Bets are recalculated as in
    :func:`~proxyprompt.sequential.non_inferiority`.

    References
    ----------
    .. [1] Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", 2024, section 5.

    Examples
    --------
    >>> side_of_line(np.full(40, -0.4), 60, -0.1, level=0.1)
    ('falls', 13)
    >>> side_of_line(np.zeros(10), 60, -0.1, level=0.1)
    (None, 10)
    """
    y = (np.asarray(differences, dtype=np.float64) + 1.0) / 2.0
    total = n * (line + 1.0) / 2.0
    goal = -log(level) if level > 0 else float("inf")
    above = below = 0.0
    mean, spread = total / n * _PRIOR_PAIRS, _PRIOR_VARIANCE * _PRIOR_PAIRS
    tiny = 1e-9
    for t, value in enumerate(y.tolist()):
        left = n - t
        expected = total / left
        if total <= tiny:
            return "holds", t
        if expected > 1.0 + tiny / left:
            return "falls", t
        if level > 0:
            variance = spread / (t + _PRIOR_PAIRS)
            bet = [sqrt(2.0 * max(goal - wealth, 0.0) / (left * variance)) for wealth in (above, below)]
            above += log1p(min(bet[0], _CAP / expected) * (value - expected))
            if expected < 1.0:
                below += log1p(-min(bet[1], _CAP / (1.0 - expected)) * (value - expected))
        mean += value
        spread += (value - mean / (t + 1 + _PRIOR_PAIRS)) ** 2
        total -= value
        if above >= goal:
            return "holds", t + 1
        if below >= goal:
            return "falls", t + 1
    if total <= tiny:
        return "holds", len(y)
    if len(y) >= n or total > n - len(y) + tiny:
        return "falls", len(y)
    return None, len(y)
