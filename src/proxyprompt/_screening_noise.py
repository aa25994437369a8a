"""How far a target's answers vary from call to call: the same whole prompts asked again, before a screen begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .attribution.verified import noise_floor
from .coalitions import BoolArray, FloatArray
from .prompt import Query
from .value_function import Values

__all__ = ["Again", "TargetNoise", "measure_noise", "noise_queries"]

Again: TypeAlias = Callable[[Sequence[Query], NDArray[np.bool_], int], Values]
"""Ask the target for coalitions on some queries, for the ``repeat``-th time (0 is the first)."""

_NOISE_QUERIES = 10
_TIE_LEVEL = 0.05


@dataclass(frozen=True)
class TargetNoise:
    """What asking the same whole prompts again showed.

    Attributes
    ----------
    repeats : int
        Times each of the prompts was asked again.
    query_ids : tuple of str
    spread : float
        Standard deviation of the target's value of one prompt from call to call, pooled within queries; in units of the
        value function.
    freedom : int
        Degrees of freedom of ``spread``.
    flips : float or None
        Share of the repeated answers whose label is not that of the first; ``None`` for generated text.
    residuals : float (n_values,)
        What the values differ from their query's mean, scaled to the spread of one call.
    """

    repeats: int
    query_ids: tuple[str, ...]
    spread: float
    freedom: int
    flips: float | None
    residuals: FloatArray = field(repr=False)

    @property
    def floor(self) -> float:
        """Size below which the difference of two values is a tie: two standard errors of such a difference."""
        return float(2 * np.sqrt(2) * self.spread)

    def distinct(self, values: FloatArray) -> BoolArray:
        """Whether a query's values over coalitions vary more than the target's answers to one prompt do.

        Parameters
        ----------
        values : float (n_coalitions, n_queries)
            NaN is missing.

        Returns
        -------
        bool (n_queries,)
            By an F test of the two variances at the 5 % level; true throughout for a target without noise, and where too
            little is known of the values.
        """
        known = (~np.isnan(values)).sum(axis=0)
        found = np.ones(values.shape[1], dtype=np.bool_)
        if self.spread == 0:
            return found
        from scipy.special import fdtri

        tested = known >= 3
        variance = np.nanvar(values[:, tested], axis=0, ddof=1)
        bar = fdtri(known[tested] - 1, self.freedom, 1 - _TIE_LEVEL)
        found[tested] = variance > self.spread**2 * bar
        return found

    def ceiling(self, values: FloatArray) -> FloatArray:
        """Correlation that a perfect explanation could reach with values this noisy, per query.

        Parameters
        ----------
        values : float (n_coalitions, n_queries)

        Returns
        -------
        float (n_queries,)
            ``sqrt(1 - spread^2 / variance)``, at least 0, the square root of the values' reliability; NaN where they do not
            vary or fewer than three are known.
        """
        found = np.full(values.shape[1], np.nan)
        some = (~np.isnan(values)).sum(axis=0) >= 3
        variance = np.nanvar(values[:, some], axis=0, ddof=1)
        share = np.divide(self.spread**2, variance, out=np.full(len(variance), np.nan), where=variance > 0)
        found[some] = np.sqrt(np.clip(1 - share, 0, 1))
        return found

    @property
    def text(self) -> str:
        """In a sentence or two."""
        times = "once more" if self.repeats == 1 else f"{self.repeats} more times"
        asked = f"Asked {times} for the same {len(self.query_ids)} whole prompts"
        if self.spread == 0:
            return f"{asked}, the target answered the same: its calls have no noise to allow for."
        labels = "" if self.flips is None else f", and {self.flips:.0%} of these answers named another label"
        return (
            f"{asked}, the target gave values that scatter by {self.spread:.2g} from call to call (differences below"
            f" {self.floor:.2g} are ties){labels}. A proxy's agreement is to be read beside what the target reaches with"
            " itself under this noise."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "repeats": self.repeats,
            "query_ids": list(self.query_ids),
            "spread": self.spread,
            "floor": self.floor,
            "freedom": self.freedom,
            "flips": self.flips,
        }


def noise_queries(order: Sequence[Query]) -> list[Query]:
    """Queries that are asked again: the last ones of the screen's order, which it is the least likely to use as pairs."""
    return list(order[::-1][:_NOISE_QUERIES])


def measure_noise(again: Again, order: Sequence[Query], n_units: int, repeats: int) -> TargetNoise | None:
    """Ask the whole prompts of some queries again; ``None`` if too few answers came to tell anything.

    Parameters
    ----------
    again : callable
    order : sequence of Query
        As the screen will use them.
    n_units : int
    repeats : int
        1 or more.
    """
    queries = noise_queries(order)
    full = np.ones((1, n_units), dtype=np.bool_)
    every = [again(queries, full, repeat) for repeat in range(repeats + 1)]
    values = np.stack([v.utility[0] for v in every])
    answered = (~np.isnan(values)).sum(axis=0)
    good = answered >= 2
    if not good.any():
        return None
    spread = noise_floor(values) / (2 * np.sqrt(2))
    scale = np.sqrt(answered[good] / (answered[good] - 1))
    residuals = (values[:, good] - np.nanmean(values[:, good], axis=0)) * scale
    flips = None
    if every[0].probabilities is not None:
        labels = np.stack([v.predictions[0] for v in every])
        both = (labels[1:] >= 0) & (labels[0] >= 0)
        flips = float((labels[1:] != labels[0])[both].mean()) if both.any() else None
    return TargetNoise(
        repeats=repeats,
        query_ids=tuple(q.id for q in queries),
        spread=float(spread),
        freedom=int((answered[good] - 1).sum()),
        flips=flips,
        residuals=residuals[~np.isnan(residuals)],
    )
