"""When the target need measure no further: thresholds learnt from queries that were measured in full. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxyprompt.coalitions import FloatArray
from proxyprompt.errors import InputError

__all__ = ["ProbeThreshold", "StoppingRule", "calibrate_probe", "calibrate_stopping"]

_RATIOS: FloatArray = 2.0 ** np.arange(40, -40.25, -0.25)
"""Fixed, so that the sequence of tests does not depend on what it tests; one is always near a proxy's scale."""


@dataclass(frozen=True)
class ProbeThreshold:
    """From which measured effect of the proxy's first choice on that choice may be named without further calls.

    Attributes
    ----------
    threshold : float
        Smallest accepted effect; infinite when no threshold could be shown to reach the precision.
    precision : float
        Wanted share of accepted first choices that are right.
    level : float
        Largest chance that the true share at ``threshold`` is below ``precision``.
    n_calibration, n_accepted : int
        Fully measured queries behind it, and those among them at or above the threshold.
    """

    threshold: float
    precision: float
    level: float
    n_calibration: int
    n_accepted: int


@dataclass(frozen=True)
class StoppingRule:
    """Measure in the proxy's order until what comes next cannot be expected to matter more.

    Measuring stops when the largest measured effect is at least ``ratio`` times the next unit's estimate.

    Attributes
    ----------
    ratio : float
        In units of the target's effects per unit of the proxy's estimates; infinite: everything is measured.
    precision : float
        Wanted share of queries whose truly largest unit is among the measured ones.
    level : float
        Largest chance that the true share is lower.
    n_calibration : int
        Fully measured queries behind it.
    found, oracle_share : float
        On those queries: the share found, and the target calls as a share of the oracle's. Both are optimistic, for
        the ratio was chosen on them.
    """

    ratio: float
    precision: float
    level: float
    n_calibration: int
    found: float = 1.0
    oracle_share: float = 1.0

    def settles(self, measured: float, following: float) -> bool:
        """Whether the largest measured size makes the next estimate not worth a call."""
        return bool(self.ratio < inf and measured >= self.ratio * abs(following))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; an infinite ratio is None."""
        return {
            "ratio": self.ratio if self.ratio < inf else None,
            "precision": self.precision,
            "level": self.level,
            "n_calibration": self.n_calibration,
            "found": self.found,
            "oracle_share": self.oracle_share,
        }


def calibrate_probe(
    probed: ArrayLike, right: ArrayLike, *, precision: float = 0.9, level: float = 0.1
) -> ProbeThreshold:
    """Learn, from fully measured queries, when one guided probe is enough.

    Parameters
    ----------
    probed : array_like of float, shape (n,)
        Measured effect (by size) of the proxy's first choice.
    right : array_like of bool, shape (n,)
        Whether that choice was the unit with the largest measured effect.
    precision : float
        Wanted share of right names among the accepted.
    level : float
        Largest chance that the threshold's true share is lower.

    Returns
    -------
    ProbeThreshold

    Raises
    ------
    InputError
        When the shapes differ, or precision or level do not lie in (0, 1).

    Notes
    -----
    The thresholds tried are effects of calibration queries at ten fixed shares of acceptance, from strict to
    lenient, without those at which not even a perfect record would be evidence. Each is tested for "the share of
    right names is below ``precision``" by an exact binomial tail at ``level``, and the first that fails ends the
    sequence (learn then test with a fixed sequence: Angelopoulos et al. 2021, arXiv 2110.01052). So the chance
    that the threshold returned does not keep the precision is at most ``level``.
    """
    from scipy.stats import binom

    effect, good = np.abs(np.asarray(probed, dtype=np.float64)), np.asarray(right, dtype=np.bool_)
    if effect.ndim != 1 or good.shape != effect.shape:
        raise InputError(
            f"probed has shape {effect.shape}, right {good.shape}: the same (n,) is needed.",
            hint="One entry a fully measured query.",
        )
    _check_shares(precision, level)
    n = len(effect)
    threshold, accepted = float("inf"), 0
    descending: NDArray[np.float64] = np.sort(effect)[::-1]
    for tenth in range(2, 11):
        place = n * tenth // 10 - 1
        if place < 0:
            continue
        inside = effect >= descending[place]
        hits, tried = int(good[inside].sum()), int(inside.sum())
        if precision**tried > level:
            continue  # too few to show anything, whatever they say
        if binom.sf(hits - 1, tried, precision) > level:
            break
        threshold, accepted = float(descending[place]), tried
    return ProbeThreshold(threshold, precision, level, n, accepted)


def calibrate_stopping(
    estimated: Sequence[ArrayLike],
    measured: Sequence[ArrayLike],
    *,
    precision: float = 0.9,
    level: float = 0.1,
) -> StoppingRule:
    """Learn, from fully measured queries, when measuring in the proxy's order may stop.

    Parameters
    ----------
    estimated : sequence of array_like of float, each of shape (n_units,)
        The proxy's attributions, one array a query.
    measured : sequence of array_like of float
        The target's measured effects of the same units; queries with a missing value (NaN) are left out.
    precision : float
        Wanted share of queries whose largest unit is among the measured ones.
    level : float
        Largest chance that the rule's true share is lower.

    Returns
    -------
    StoppingRule
        Of infinite ratio, which measures everything, where too few queries are given to show anything: 22 are the
        least for the defaults.

    Raises
    ------
    InputError
        When the arrays do not fit, or precision or level do not lie in (0, 1).

    Notes
    -----
    Ratios fall from very large ones, with which everything is measured, in fixed steps of a quarter octave. Each is
    tested for "the share is below ``precision``" by an exact binomial tail at ``level``; the first that fails ends
    the sequence (learn then test: Angelopoulos et al. 2021, arXiv 2110.01052). The promise is for queries like the
    calibration ones.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> truth = [rng.normal(size=8) ** 3 for _ in range(60)]
    >>> rule = calibrate_stopping([t + 0.2 * rng.normal(size=8) for t in truth], truth)
    >>> rule.found >= 0.9, rule.oracle_share < 0.5
    (True, True)
    """
    from scipy.stats import binom

    _check_shares(precision, level)
    if len(estimated) != len(measured):
        raise InputError(
            f"estimated has {len(estimated)} queries, measured {len(measured)}.",
            hint="One array a query each.",
        )
    depths, places, sizes = [], [], []
    for k, (guess, effect) in enumerate(zip(estimated, measured, strict=True)):
        g, t = np.abs(np.asarray(guess, dtype=np.float64)), np.abs(np.asarray(effect, dtype=np.float64))
        if g.ndim != 1 or g.shape != t.shape or not len(g) or not np.isfinite(g).all():
            raise InputError(
                f"query {k}: estimated has shape {g.shape}, measured {t.shape}; finite estimates of the same units are"
                " needed.",
                hint="Pass one query's attributions, and what the target measured of the same units.",
            )
        if np.isnan(t).any():
            continue
        order = np.argsort(-g, kind="stable")
        best = np.maximum.accumulate(t[order])
        # Column j: whether it stops before the (j+1)-th measurement at this ratio.
        stops = best[None, :-1] >= _RATIOS[:, None] * g[order][None, 1:]
        depths.append(np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, len(g)))
        places.append(int(np.flatnonzero(order == int(t.argmax()))[0]))
        sizes.append(len(g))
    n = len(sizes)
    if not n:
        return StoppingRule(inf, precision, level, 0)
    depth = np.array(depths)
    hits = (np.array(places)[:, None] < depth).sum(axis=0)
    cost = ((1 + depth) / (1 + np.array(sizes)[:, None])).mean(axis=0)
    chosen = StoppingRule(inf, precision, level, n)
    for ratio, hit, share in zip(_RATIOS.tolist(), hits.tolist(), cost.tolist(), strict=True):
        if binom.sf(hit - 1, n, precision) > level:
            break
        chosen = StoppingRule(ratio, precision, level, n, hit / n, share)
    return chosen


def _check_shares(precision: float, level: float) -> None:
    for name, value in (("precision", precision), ("level", level)):
        if not 0 < value < 1:
            raise InputError(f"{name}={value}: strictly between 0 and 1.", hint="0.9 and 0.1 are usual.")
