"""The proxy proposes, the target verifies: measure the units that matter, in the proxy's order.

Where one unit decides (which demonstration, document or sentence carries this answer), attributions of a proxy
model are cheap suggestions. The target re-measures the strongest of them by leaving each out, and the largest
*measured* effect is named. Measured and estimated values stay apart all the way.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from proxyprompt.coalitions import FloatArray
from proxyprompt.errors import InputError

from ._probing import ProbeThreshold, StoppingRule, calibrate_probe, calibrate_stopping
from .base import frozen

__all__ = [
    "ProbeThreshold",
    "StoppingRule",
    "Verification",
    "calibrate_probe",
    "calibrate_stopping",
    "noise_floor",
    "propose",
    "verify",
]

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
    outcome : {"probe_accepted", "settled", "verified", "measured_all", "abstained", "below_floor"}
        ``"settled"``: a stopping rule found that the next unit was not worth a call.
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
    on_disagreement: Literal["measure_all", "follow", "abstain"] = "measure_all",
    probe: ProbeThreshold | None = None,
    stop: StoppingRule | None = None,
    floor: float = 0.0,
) -> Verification:
    """Measure the proxy's strongest units on the target and name the best measured one.

    Parameters
    ----------
    estimated : array_like of float, shape (n_units,)
        The proxy's attributions for this query; their order by size is used, and with ``stop`` their sizes.
    measure : callable
        ``measure(units) -> effects`` on the target, in the order asked; NaN is missing.
    agree : bool
        Whether target and proxy predict the same on the whole prompt (the instance-level screen of [PE 3.1]). When they
        do not, the proxy's order is not followed.
    top : int
        Units measured when they agree.
    on_disagreement : {"measure_all", "follow", "abstain"}
        What happens when they do not; ``"follow"``: the same as when they agree.
    probe : ProbeThreshold, optional
        Name the proxy's first choice after one call when its measured effect reaches the threshold.
    stop : StoppingRule, optional
        Measure one by one until it says that the next is not worth a call; in place of ``top``.
    floor : float
        From :func:`noise_floor`. When no measured effect is above it, no unit is named.

    Returns
    -------
    Verification

    Raises
    ------
    InputError
        For estimates that are not finite, a ``top`` below 1, a negative floor, both ``probe`` and ``stop``, or
        measurements of another number.

    Notes
    -----
    On recorded outputs of closed models (``benchmarks/screening/``), of eight or more BoolQ segments, a stopping rule
    learnt on shorter prompts names the right one in 95 of 100 prompts at 30 % of the oracle's calls; the proxy alone
    has 72, its two strongest verified, all where the models disagree, 92 at 38 %.

    Examples
    --------
    >>> effects = np.array([0.1, 2.0, 3.0, 0.0, -0.2])
    >>> found = verify([0.0, 9.0, 7.0, 1.0, -2.0], lambda units: effects[list(units)])
    >>> found.best, found.target_calls, found.oracle_calls
    (2, 3, 6)
    """
    steps = propose(
        estimated, agree=agree, top=top, on_disagreement=on_disagreement, probe=probe, stop=stop, floor=floor
    )
    answer: ArrayLike | None = None
    try:
        while True:
            units = steps.send(answer)
            answer = measure(units)
    except StopIteration as end:
        found: Verification = end.value
        return found


def propose(
    estimated: ArrayLike,
    *,
    agree: bool = True,
    top: int = 2,
    on_disagreement: Literal["measure_all", "follow", "abstain"] = "measure_all",
    probe: ProbeThreshold | None = None,
    stop: StoppingRule | None = None,
    floor: float = 0.0,
    first: Sequence[int] = (),
) -> Generator[tuple[int, ...], ArrayLike | None, Verification]:
    """:func:`verify` step by step: yields units to measure, is sent their effects, returns the verification.

    Many queries can so be measured together, one step of each in a batch.

    Parameters
    ----------
    first : sequence of int
        Units that are measured in any case and before all others, such as sentences of the instruction, of which
        proxies know nothing.
    """
    guess = np.asarray(estimated, dtype=np.float64)
    _check(guess, top, floor, on_disagreement, probe, stop, first)
    ranked = tuple(int(i) for i in np.argsort(-np.abs(guess), kind="stable") if i not in set(first))
    measured, asked = np.full(len(guess), np.nan), list(first)
    if not agree and on_disagreement == "abstain":
        return Verification(guess, measured, (), None, "abstained", 1, floor)
    if first:
        measured[asked] = _effects((yield tuple(first)), len(first))
    outcome = "verified"
    follow = agree or on_disagreement == "follow"
    if not follow:
        ahead = [ranked]
    elif stop is not None:
        ahead = [(unit,) for unit in ranked]
    elif probe is not None:
        ahead = [ranked[:1], ranked[1:top]]
    else:
        ahead = [ranked[:top]]
    for units in ahead:
        largest = np.nanmax(np.abs(measured), initial=-1.0)
        if follow and stop is not None and asked and stop.settles(largest, guess[units[0]]):
            outcome = "settled"
            break
        if probe is not None and follow and len(asked) > len(first) and largest >= probe.threshold:
            outcome = "probe_accepted"
            break
        if units:
            measured[list(units)] = _effects((yield units), len(units))
            asked.extend(units)
    if outcome == "verified" and len(asked) == len(guess):
        outcome = "measured_all"
    size = np.where(np.isnan(measured), -1.0, np.abs(measured))
    best: int | None = int(np.argmax(size))
    if size[best] <= floor:
        best, outcome = None, "below_floor"
    return Verification(guess, measured, tuple(asked), best, outcome, 1 + len(asked), floor)


def _effects(answer: ArrayLike | None, n: int) -> FloatArray:
    new = np.asarray(answer, dtype=np.float64)
    if new.shape != (n,):
        raise InputError(
            f"measure returned shape {new.shape} for {n} units: one effect a unit is needed.",
            hint="Return them in the order asked.",
        )
    return new


def _check(
    guess: FloatArray,
    top: int,
    floor: float,
    on_disagreement: str,
    probe: ProbeThreshold | None,
    stop: StoppingRule | None,
    first: Sequence[int],
) -> None:
    if guess.ndim != 1 or not len(guess) or not np.isfinite(guess).all():
        raise InputError(
            f"estimated has shape {guess.shape}: finite numbers of shape (n_units,) are needed.",
            hint="Pass one query's attributions.",
        )
    if top < 1:
        raise InputError(f"top={top}: at least 1 unit is measured.", hint="2 is usual.")
    if not floor >= 0:
        raise InputError(f"floor={floor}: 0 or more is needed.", hint="Use noise_floor.")
    if on_disagreement not in ("measure_all", "follow", "abstain"):
        raise InputError(
            f"on_disagreement={on_disagreement!r}: measure_all, follow or abstain.",
            hint="measure_all is the default.",
        )
    if probe is not None and stop is not None:
        raise InputError(
            "probe and stop are both given; each says when to stop.",
            hint="stop does what probe does, and more.",
        )
    if len(set(first)) < len(first) or any(not 0 <= i < len(guess) for i in first):
        raise InputError(
            f"first={list(first)}: distinct units from 0 to {len(guess) - 1}.", hint="Leave it out."
        )
