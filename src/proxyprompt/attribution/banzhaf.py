"""Banzhaf values: what a unit adds to a coalition drawn by tossing a fair coin for each other unit."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from numpy.typing import ArrayLike

from .base import Attribution, Design
from .weighted_banzhaf import WeightedBanzhaf

__all__ = ["Banzhaf"]


class Banzhaf(WeightedBanzhaf):
    """Mean marginal contribution over all coalitions of the other units, every coalition counting the same.

    Parameters
    ----------
    max_missing : float
        Largest share of a query's values that may be missing before the query is dropped.
    max_dropped : float
        Largest share of queries that may be dropped before the answer is refused.

    Notes
    -----
    ``phi_i = 2**-(n-1) sum_S (v(S + i) - v(S))`` [1]_: :class:`WeightedBanzhaf` at one half, and among
    the semivalues the one whose ranking bears the most noise in the values [2]_. The values do not add up
    to ``v(full) - v(empty)``.

    **Estimation.** Maximum sample reuse [2]_ uses every coalition for every unit, ``mean of v where i is kept
    - mean of v where i is not``. That is the regression of ``v`` on one unit alone. Here all units are regressed on
    together, which under a fair coin has the same limit (the units are independent) and takes what the others explain
    out of the error: the variance is that of what no additive surrogate explains instead of that of ``v``.
    On additive games it is exact from ``n + 1`` rows on.

    Coalitions and ``se_coalitions`` are those of the parent.

    References
    ----------
    .. [1] Banzhaf, "Weighted Voting Doesn't Work: A Mathematical Analysis", 1965.
    .. [2] Wang & Jia, "Data Banzhaf: A Robust Data Valuation Framework for Machine Learning", 2023, section 4.

    Examples
    --------
    >>> import numpy as np
    >>> from proxyprompt.testing import GloveGame
    >>> result = Banzhaf().attribute(GloveGame(2), 3, budget=8, rng=np.random.default_rng(0))
    >>> result.exact, result.mean.round(6).tolist()
    (True, [0.75, 0.25, 0.25])
    """

    method: ClassVar[str] = "banzhaf"

    def __init__(self, *, max_missing: float = 0.05, max_dropped: float = 0.20) -> None:
        super().__init__(0.5, max_missing=max_missing, max_dropped=max_dropped)

    def fit(self, design: Design, values: ArrayLike) -> Attribution:
        """Regress; see :meth:`WeightedBanzhaf.fit`."""
        fitted = super().fit(design, values)
        return replace(fitted, settings={"max_missing": self.max_missing, "max_dropped": self.max_dropped})
