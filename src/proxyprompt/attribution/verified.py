"""The proxy proposes, the target verifies: measure the units that matter, in the proxy's order.

Where one unit decides (which demonstration, document or sentence carries this answer), attributions of a proxy
model are cheap suggestions. The target re-measures the strongest of them by leaving each out, and the largest
*measured* effect is named. Measured and estimated values stay apart all the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxyprompt.coalitions import FloatArray
from proxyprompt.errors import InputError

from .base import frozen

__all__ = ["ProbeThreshold", "Verification", "calibrate_probe", "noise_floor", "verify"]

Measure = Callable[[tuple[int, ...]], ArrayLike]
"""Effects on the target of leaving out each of these units: ``v(full) - v(full without it)``, one number a unit."""


@dataclass(frozen=True, eq=False)
class Verification:
    """What the target confirmed of a proxy's suggestion, for one query.

    Attributes
    ----------
    estimated : ndarray of float64, shape (n_units,)
        The proxy's attributions, in its own scale.
    measured : ndarray of float64, shape (n_units,)
        Effects measured on the target; NaN where nothing was measured.
    order : tuple of int
        Units in the order in which they were measured.
    best : int or None
        Unit with the largest measured effect by size; ``None`` when nothing passes the floor, or on abstention.
    outcome : {"probe_accepted", "verified", "measured_all", "abstained", "below_floor"}
    target_calls : int
        Calls of the target: the whole prompt, and one for each measured unit.
    floor : float
        Effects up to this size are ties with nothing.
    """

    estimated: FloatArray
    measured: FloatArray
    order: tuple[int, ...]
    best: int | None
    outcome: str
    target_calls: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("estimated", "measured"):
            object.__setattr__(self, name, frozen(np.asarray(getattr(self, name), dtype=np.float64)))

    @property
    def oracle_calls(self) -> int:
        """Calls that measuring every unit takes."""
        return len(self.estimated) + 1

    @property
    def oracle_share(self) -> float:
        """Target calls as a share of the oracle's."""
        return self.target_calls / self.oracle_calls

    @property
    def ties(self) -> tuple[int, ...]:
        """Measured units that differ from the best one by no more than the floor, the best one included."""
        if self.best is None:
            return ()
        size = np.abs(self.measured)
        return tuple(int(i) for i in np.flatnonzero(size >= size[self.best] - self.floor))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; what was not measured is None."""
        return {
            "estimated": self.estimated.tolist(),
            "measured": [None if np.isnan(v) else float(v) for v in self.measured],
            "order": list(self.order),
            "best": self.best,
            "ties": list(self.ties),
            "outcome": self.outcome,
            "target_calls": self.target_calls,
            "oracle_calls": self.oracle_calls,
            "floor": self.floor,
        }


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


def noise_floor(repeats: ArrayLike) -> float:
    """Size below which two effects on the target are ties.

    Parameters
    ----------
    repeats : array_like of float, shape (n_repeats, n_queries)
        Values of the *same* full prompt asked again and again, at least twice a query; NaN is missing.

    Returns
    -------
    float
        ``2 sqrt(2) s``, with ``s`` the pooled standard deviation within queries: two standard errors of a
        difference of two values. 0 for a target that always answers the same.

    Raises
    ------
    InputError
        When no query has two values.
    """
    values = np.asarray(repeats, dtype=np.float64)
    if values.ndim != 2:
        raise InputError(
            f"repeats has shape {values.shape}: (n_repeats, n_queries) is needed.", hint="Reshape it."
        )
    answered = (~np.isnan(values)).sum(axis=0)
    good = answered >= 2
    if not good.any():
        raise InputError(
            "repeats: no query has two values; noise cannot be seen in one.",
            hint="Ask the full prompt twice.",
        )
    squares = np.nansum((values[:, good] - np.nanmean(values[:, good], axis=0)) ** 2)
    return float(2 * np.sqrt(2) * np.sqrt(squares / (answered[good] - 1).sum()))


def verify(
    estimated: ArrayLike,
    measure: Measure,
    *,
    agree: bool = True,
    top: int = 2,
    on_disagreement: Literal["measure_all", "abstain"] = "measure_all",
    probe: ProbeThreshold | None = None,
    floor: float = 0.0,
) -> Verification:
    """Measure the proxy's strongest units on the target and name the best measured one.

    Parameters
    ----------
    estimated : array_like of float, shape (n_units,)
        The proxy's attributions for this query; only their order by size is used.
    measure : callable
        ``measure(units) -> effects`` on the target, in the order asked; NaN is missing. Called at most twice.
    agree : bool
        Whether target and proxy predict the same on the whole prompt (the instance-level screen of [PE 3.1]). When they
        do not, the proxy's order is not followed.
    top : int
        Units measured when they agree.
    on_disagreement : {"measure_all", "abstain"}
        What happens when they do not.
    probe : ProbeThreshold, optional
        Name the proxy's first choice after one call when its measured effect reaches the threshold.
    floor : float
        From :func:`noise_floor`. When no measured effect is above it, no unit is named.

    Returns
    -------
    Verification

    Raises
    ------
    InputError
        For estimates that are not finite, a ``top`` below 1, a negative floor, or measurements of another number.

    Notes
    -----
    On recorded outputs of closed models (``benchmarks/screening/``), agreement with the two strongest units verified, and
    all measured where the models disagree, names the right one of eight or more BoolQ segments in 92 of 100 prompts at
    38 % of the oracle's calls; the proxy alone has 72.

    Examples
    --------
    >>> effects = np.array([0.1, 2.0, 3.0, 0.0, -0.2])
    >>> found = verify([0.0, 9.0, 7.0, 1.0, -2.0], lambda units: effects[list(units)])
    >>> found.best, found.target_calls, found.oracle_calls
    (2, 3, 6)
    """
    guess = np.asarray(estimated, dtype=np.float64)
    if guess.ndim != 1 or not len(guess) or not np.isfinite(guess).all():
        raise InputError(
            f"estimated has shape {guess.shape}: finite numbers of shape (n_units,) are needed.",
            hint="Pass one query's attributions.",
        )
    if top < 1:
        raise InputError(f"top={top}: at least 1 unit is measured.", hint="2 is usual.")
    if not floor >= 0:
        raise InputError(f"floor={floor}: 0 or more is needed.", hint="Use noise_floor.")
    if on_disagreement not in ("measure_all", "abstain"):
        raise InputError(
            f"on_disagreement={on_disagreement!r}: measure_all or abstain.",
            hint="measure_all is the default.",
        )
    n = len(guess)
    ranked = tuple(int(i) for i in np.argsort(-np.abs(guess), kind="stable"))
    measured = np.full(n, np.nan)
    asked: list[int] = []

    def ask(units: tuple[int, ...]) -> None:
        new = np.asarray(measure(units), dtype=np.float64)
        if new.shape != (len(units),):
            raise InputError(
                f"measure returned shape {new.shape} for {len(units)} units: one effect a unit is needed.",
                hint="Return them in the order asked.",
            )
        measured[list(units)] = new
        asked.extend(units)

    if not agree and on_disagreement == "abstain":
        return Verification(guess, measured, (), None, "abstained", 1, floor)
    outcome = "verified"
    if not agree:
        ask(ranked)
        outcome = "measured_all"
    else:
        first = ranked[:1] if probe is not None else ranked[:top]
        ask(first)
        if probe is not None and abs(measured[first[0]]) >= probe.threshold:
            outcome = "probe_accepted"
        elif probe is not None and top > 1 and n > 1:
            ask(ranked[1:top])
        if outcome == "verified" and len(asked) == n:
            outcome = "measured_all"
    size = np.where(np.isnan(measured), -1.0, np.abs(measured))
    best: int | None = int(np.argmax(size))
    if size[best] <= floor:
        best, outcome = None, "below_floor"
    return Verification(guess, measured, tuple(asked), best, outcome, 1 + len(asked), floor)


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
    for name, value in (("precision", precision), ("level", level)):
        if not 0 < value < 1:
            raise InputError(f"{name}={value}: strictly between 0 and 1.", hint="0.9 and 0.1 are usual.")
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
