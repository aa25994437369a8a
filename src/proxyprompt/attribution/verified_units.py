"""The proxy proposes, the target verifies, for units that all queries share: measured until the rest cannot matter.

A proxy's attributions order the units. The target measures a unit's effect by toggling it in coalitions drawn from the law
of the technique that explained, so that the measured number is an unbiased estimate of the *same* quantity, at one call a
query. A line through (estimate, measurement) of what is measured so far says what the target would make of the others,
and with what spread; measuring stops when the decision can hardly be changed by them. A proxy that knows nothing leaves
a wide spread, so everything is measured; one that is upside down has a falling line, and its other end is measured first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxyprompt.coalitions import BoolArray, FloatArray
from proxyprompt.errors import InconclusiveError, InputError

from ._prediction_line import PredictionLine, fit_line
from .banzhaf import Banzhaf
from .base import Attribution, Explainer, frozen
from .exact import ExactShapley
from .kernel_shap import KernelSHAP
from .lasso import Lasso
from .leave_one_out import LeaveOneOut
from .permutation import PermutationShapley
from .weighted_banzhaf import WeightedBanzhaf

__all__ = ["UnitQuestion", "UnitVerification", "toggle_bases", "verified_attribution", "verify_units"]

UnitQuestion: TypeAlias = Literal["harmful", "top", "all"]
MeasureUnits: TypeAlias = Callable[[tuple[int, ...]], ArrayLike]
"""Effects of these units on the target, float (n_queries, len(units)), higher means the unit helps; NaN is missing."""

_BOUND = 0.95
_FIRST = 4
_AUDIT = 3
_FEWEST_SHARE = 0.8
_DOUBT = 0.005


@dataclass(frozen=True, eq=False)
class UnitVerification:
    """What proxies estimated, what the target measured, and what follows for the units it did not measure.

    Attributes
    ----------
    decision : {"harmful", "top", "all"}
        What had to be decided: which units lower the value, which ``top`` raise it most, or the effect of each.
    estimated, estimated_error : ndarray of float64, shape (n_units,)
        The proxies' attributions with standard errors, in their own scale.
    measured, measured_error : ndarray of float64, shape (n_units,)
        Mean effect on the target and its standard error, in units of the value function; NaN where not measured.
    expected, expected_error : ndarray of float64, shape (n_units,)
        What the line through the measured units expects on the target; NaN where measured, or where no line could be
        drawn.
    chance : ndarray of float64, shape (n_units,)
        Chance, by that line, that the unit would change the decision; 0 where measured, 1 where there is no line.
    effects : ndarray of float64, shape (n_queries, n_units)
        Measured effect by query; NaN where nothing was measured.
    order : tuple of int
        Units in the order in which they were measured.
    audits : tuple of int
        Those among them that were drawn at random and not by the order.
    named : tuple of int
        The answer, strongest first. ``"harmful"``: units whose one-sided 95 % upper bound is below zero (each for
        itself); ``"top"``: the largest measured; ``"all"``: as for ``"harmful"``.
    undecided : tuple of int
        Measured units about which the measurement leaves the decision open: not named, but compatible with a harm
        beyond ``margin``; or, for ``"top"``, not told from the last one named.
    outcome : {"settled", "measured_all", "limit"}
        ``"settled"``: the others can hardly change the decision. ``"limit"``: the calls ran out before that.
    margin : float
        Effects (or differences) up to this size are too small to change the decision: two standard errors of a
        measurement.
    level : float
        Largest sum of ``chance`` at which it stopped.
    top : int
    target_calls, oracle_calls : int
        Calls for the measurements, the coalitions in which units were toggled included, and those of measuring all.
    slope : float
        Of the line, target's units per unit of the proxies'; NaN without a line.
    """

    decision: UnitQuestion
    estimated: FloatArray
    estimated_error: FloatArray
    measured: FloatArray
    measured_error: FloatArray
    expected: FloatArray
    expected_error: FloatArray
    chance: FloatArray
    effects: FloatArray
    order: tuple[int, ...]
    audits: tuple[int, ...]
    named: tuple[int, ...]
    undecided: tuple[int, ...]
    outcome: Literal["settled", "measured_all", "limit"]
    margin: float
    level: float
    top: int
    target_calls: int
    oracle_calls: int
    slope: float

    def __post_init__(self) -> None:
        names = ("estimated", "estimated_error", "measured", "measured_error", "expected", "expected_error")
        for name in (*names, "chance", "effects"):
            object.__setattr__(self, name, frozen(np.asarray(getattr(self, name), dtype=np.float64)))

    @property
    def is_measured(self) -> NDArray[np.bool_]:
        """Bool (n_units,)."""
        known: NDArray[np.bool_] = ~np.isnan(self.measured)
        return known

    @property
    def oracle_share(self) -> float:
        """Target calls as a share of those of measuring every unit."""
        return self.target_calls / self.oracle_calls

    @property
    def chance_left(self) -> float:
        """Expected number of units, among those not measured, that would change the decision."""
        return float(self.chance.sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form, measured and estimated in fields of their own; what is not there is None."""
        arrays = ("estimated", "estimated_error", "measured", "measured_error", "expected", "expected_error")
        return {
            "decision": self.decision,
            **{name: _plain(getattr(self, name)) for name in (*arrays, "chance")},
            "order": list(self.order),
            "audits": list(self.audits),
            "named": list(self.named),
            "undecided": list(self.undecided),
            "outcome": self.outcome,
            "margin": self.margin,
            "level": self.level,
            "top": self.top,
            "target_calls": self.target_calls,
            "oracle_calls": self.oracle_calls,
            "slope": None if np.isnan(self.slope) else self.slope,
        }


def toggle_bases(
    explainer: Explainer, n_units: int, n_rows: int, *, rng: np.random.Generator
) -> tuple[BoolArray, str]:
    """Coalitions in which single units are toggled to measure what an explainer estimates.

    Parameters
    ----------
    explainer : Explainer
    n_units, n_rows : int
    rng : numpy.random.Generator
        The only source of chance.

    Returns
    -------
    bases : ndarray of bool, shape (n_rows, n_units)
        Independent draws. With unit ``i`` put in and taken out, ``v(S + i) - v(S - i)`` has the technique's value of ``i``
        as its expectation, for every ``i`` at once.
    estimand : str
        What that is, in words.

    Raises
    ------
    InputError
        For a technique that has no such law.

    Notes
    -----
    (Weighted) Banzhaf values are expectations over coalitions that keep each *other* unit by independent coins, so a base
    drawn by coins for all units serves each of them. Shapley values are the same with the coin's probability drawn
    uniformly from (0, 1) first (the multilinear extension, Owen 1972). Leave-one-out has the full prompt as its only base.

    Examples
    --------
    >>> rows, what = toggle_bases(LeaveOneOut(), 3, 2, rng=np.random.default_rng(0))
    >>> bool(rows.all()), what
    (True, 'what leaving it out of the full prompt takes away')
    """
    if isinstance(explainer, LeaveOneOut):
        return np.ones((n_rows, n_units), dtype=np.bool_), "what leaving it out of the full prompt takes away"
    if isinstance(explainer, WeightedBanzhaf):
        keep, what = np.full(n_rows, explainer.keep), f"weighted Banzhaf value (keep {explainer.keep:g})"
    elif isinstance(explainer, Banzhaf | Lasso):
        keep, what = np.full(n_rows, 0.5), "Banzhaf value"
    elif isinstance(explainer, KernelSHAP | PermutationShapley | ExactShapley):
        # One stratum a row keeps the sizes spread out; in expectation it is the uniform law.
        keep, what = (rng.permutation(n_rows) + rng.random(n_rows)) / n_rows, "Shapley value"
    else:
        raise InputError(
            f"explainer: {explainer.method} has no coalitions in which a single unit could be toggled.",
            hint="Use weighted Banzhaf, Banzhaf, Shapley values or leave-one-out.",
        )
    rows: BoolArray = rng.random((n_rows, n_units)) < keep[:, None]
    return rows, what


def verify_units(
    estimated: ArrayLike,
    measure: MeasureUnits,
    *,
    rng: np.random.Generator,
    n_rows: int,
    decision: UnitQuestion = "harmful",
    top: int = 3,
    level: float = 0.1,
    calls: int | None = None,
    trusted: bool = False,
    estimated_error: ArrayLike | None = None,
) -> UnitVerification:
    """Measure units on the target, in the order the proxies propose, until the others can hardly change the decision.

    Parameters
    ----------
    estimated : array_like of float, shape (n_units,)
        The proxies' attributions, mean over queries.
    measure : callable
        ``measure(units) -> effects``, float (n_queries, len(units)), e.g. by toggling in :func:`toggle_bases`.
    rng : numpy.random.Generator
        Draws the audits.
    n_rows : int
        Target calls that one unit takes; as many more are counted once, for the coalitions it is toggled in.
    decision : {"harmful", "top", "all"}
        Which units lower the value, which ``top`` raise it most, or no decision: every unit is measured.
    top : int
        For ``"top"``.
    level : float
        In (0, 1): it stops when the expected number of units that would change the decision is at most this.
    calls : int, optional
        Most target calls.
    trusted : bool
        Whether the proxies' attributions passed a screen. If not, measuring stops only once the measured units
        themselves show that the estimates are worth something: that the line's slope has its sign with 99.5 %.
    estimated_error : array_like of float, shape (n_units,), optional
        Carried along for the result.

    Returns
    -------
    UnitVerification

    Raises
    ------
    InputError
        For estimates that are not finite, a decision or number out of range, or measurements of another shape.
    InconclusiveError
        When the target gave too few answers for a unit (fewer than 80 % of the queries, or than two).

    Notes
    -----
    First the two units that the estimates put first, the one they put last, and one at random. Then, unit by unit, the one
    most likely to change the decision; every third is drawn at random, so that a proxy that is wrong about some
    stratum of units can be found out. After each, a line ``measured = a + b * estimated`` with normal spread ``tau`` around
    it and known errors of measurement is fitted, ``a``, ``b`` and ``tau`` integrated out under a flat prior (``tau``:
    Gelman 2006, "Prior distributions for variance parameters in hierarchical models"). ``chance`` is what that gives for
    "lower than ``-margin``" or "higher than the last of the top by more than ``margin``, times the root of two".

    The promise is the line's: a single unit that is unlike all others *and* that the proxies misjudge can be missed as long
    as the proxies' order fits the rest (``benchmarks/verify`` has its frequency). What is not measured is never named.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> truth = np.array([0.5, -0.6, 0.4, 0.45, 0.5, 0.55, 0.4, 0.5, 0.6, 0.5])
    >>> found = verify_units(2 * truth, lambda units: truth[list(units)] + 0.1 * rng.normal(size=(40, len(units))),
    ...     rng=rng, n_rows=40)
    >>> found.named, found.outcome, found.target_calls < found.oracle_calls
    ((1,), 'settled', True)
    """
    guess = np.asarray(estimated, dtype=np.float64)
    _check(guess, n_rows, decision, top, level, calls)
    n, top = len(guess), min(top, len(guess))
    error = np.full(n, np.nan) if estimated_error is None else np.asarray(estimated_error, dtype=np.float64)
    state = _State(n, decision, top, guess)
    most = n if calls is None else min(n, max(0, calls // n_rows - 1))
    ahead = state.start(rng)[:most]
    outcome: Literal["settled", "measured_all", "limit"] = "limit"
    while ahead:
        state.add(ahead, measure(ahead))
        if len(state.order) == n:
            outcome = "measured_all"
            break
        if decision != "all" and state.settled(level, trusted):
            outcome = "settled"
            break
        ahead = state.following(rng) if len(state.order) < most else ()
    line, chance = state.line(), state.chance()
    unseen = np.isnan(state.measured)
    expected, spread = np.full(n, np.nan), np.full(n, np.nan)
    if line is not None and unseen.any():
        expected[unseen], spread[unseen] = line.predict(guess[unseen])
    named, undecided = state.verdict()
    return UnitVerification(
        decision=decision,
        estimated=guess,
        estimated_error=error,
        measured=state.measured,
        measured_error=state.error,
        expected=expected,
        expected_error=spread,
        chance=chance,
        effects=state.effects if state.effects is not None else np.zeros((0, n)),
        order=tuple(state.order),
        audits=tuple(state.audits),
        named=named,
        undecided=undecided,
        outcome=outcome,
        margin=state.margin(),
        level=level,
        top=top,
        target_calls=n_rows * (len(state.order) + 1) if state.order else 0,
        oracle_calls=n_rows * (n + 1),
        slope=line.slope if line is not None else float("nan"),
    )


def verified_attribution(
    proposal: Attribution, found: UnitVerification, full_values: ArrayLike
) -> Attribution:
    """One attribution for later stages: measured where there is a measurement, else what the line expects.

    Parameters
    ----------
    proposal : Attribution
        The proxies'.
    found : UnitVerification
    full_values : array_like of float, shape (n_queries,)
        The target's values of the full prompt, on the queries of the measurements.

    Returns
    -------
    Attribution
        In the target's scale. ``values`` of a unit that was not measured is its expected value for every query, and its
        standard error the line's; ``base_values`` is the additive extrapolation (the empty prompt was not asked). Where no
        line could be drawn, the mean of the measured with their whole spread; where nothing was measured, the proposal.
    """
    if not found.order:
        return proposal
    known, full = found.is_measured, np.asarray(full_values, dtype=np.float64)
    mean = np.where(known, found.measured, found.expected)
    error = np.where(known, found.measured_error, found.expected_error)
    blank = ~known & np.isnan(mean)
    size = float(np.sqrt(np.nanmean(found.measured**2 + found.measured_error**2)))
    mean[blank], error[blank] = float(np.nanmean(found.measured)), 2 * size
    values = np.where(np.isnan(found.effects), mean, found.effects)
    intercept = full - values.sum(axis=1)
    return Attribution(
        values=values,
        mean=mean,
        standard_error=error,
        se_queries=np.where(known, error, 0.0),
        se_coalitions=np.where(known, 0.0, error),
        base_values=intercept,
        full_values=full,
        intercept=intercept,
        n_coalitions=proposal.n_coalitions,
        exact=False,
        method=proposal.method,
        settings={**proposal.settings, "verified": [int(i) for i in found.order]},
    )


class _State:
    """What is measured so far, and what it says of the rest."""

    def __init__(self, n: int, decision: UnitQuestion, top: int, guess: FloatArray) -> None:
        self.n, self.decision, self.top, self.guess = n, decision, top, guess
        # Ascending: harm is looked for at the low end, the most useful at the high end.
        self.sign = -1.0 if decision == "top" else 1.0
        self.ranked = [int(i) for i in np.argsort(self.sign * guess, kind="stable")]
        self.measured, self.error = np.full(n, np.nan), np.full(n, np.nan)
        self.effects: FloatArray | None = None
        self.order: list[int] = []
        self.audits: list[int] = []

    def start(self, rng: np.random.Generator) -> tuple[int, ...]:
        if self.decision == "all" or self.n <= _FIRST:
            return tuple(self.ranked)
        lead = max(2, self.top) if self.decision == "top" else 2
        first = list(dict.fromkeys([*self.ranked[:lead], self.ranked[-1]]))
        rest = [i for i in self.ranked if i not in first]
        if rest:
            self.audits.append(rest[int(rng.integers(len(rest)))])
            first.append(self.audits[-1])
        return tuple(first)

    def add(self, units: tuple[int, ...], answer: ArrayLike) -> None:
        new = np.asarray(answer, dtype=np.float64)
        if (
            new.ndim != 2
            or new.shape[1] != len(units)
            or (self.effects is not None and len(new) != len(self.effects))
        ):
            raise InputError(
                f"measure returned shape {new.shape} for {len(units)} units: (n_queries, {len(units)}) is needed.",
                hint="Return one column a unit, the same queries each time.",
            )
        if self.effects is None:
            self.effects = np.full((len(new), self.n), np.nan)
        self.effects[:, list(units)] = new
        answered = (~np.isnan(new)).sum(axis=0)
        if (answered < max(2, _FEWEST_SHARE * len(new))).any():
            raise InconclusiveError(
                f"The target answered {int(answered.min())} of {len(new)} queries for a unit; at least 80 %, and two, are"
                " needed.",
                hint="Run again, which asks only for what is missing.",
            )
        self.order.extend(units)
        seen = self.effects[:, self.order]
        counts = (~np.isnan(seen)).sum(axis=0)
        own = np.nanvar(seen, axis=0, ddof=1)
        self.measured[self.order] = np.nanmean(seen, axis=0)
        # Few queries may agree on a unit by chance; each variance is drawn towards the mean of all by two queries.
        self.error[self.order] = np.sqrt((2 * own.mean() + (counts - 1) * own) / (counts + 1) / counts)

    def margin(self) -> float:
        known = self.error[self.order]
        return float(2 * np.sqrt(np.mean(known**2))) if len(known) else 0.0

    def line(self) -> PredictionLine | None:
        return fit_line(self.guess[self.order], self.measured[self.order], self.error[self.order])

    def chance(self) -> FloatArray:
        """That each unit which is not measured would change the decision."""
        unseen = np.isnan(self.measured)
        line = self.line() if self.order else None
        if line is None:
            unknown: FloatArray = unseen.astype(np.float64)
            return unknown
        found = np.zeros(self.n)
        if self.decision == "top":
            # A difference of two measurements, so its two standard errors are larger by the root of two.
            bar = float(np.sort(self.measured[self.order])[::-1][min(self.top, len(self.order)) - 1])
            found[unseen] = line.above(self.guess[unseen], bar + np.sqrt(2) * self.margin())
            if len(self.order) < self.top:
                found[unseen] = 1.0
        else:
            found[unseen] = line.below(self.guess[unseen], -self.margin())
        return found

    def settled(self, level: float, trusted: bool) -> bool:
        line = self.line()
        return line is not None and (trusted or line.doubt <= _DOUBT) and bool(self.chance().sum() <= level)

    def following(self, rng: np.random.Generator) -> tuple[int, ...]:
        rest = [i for i in self.ranked if np.isnan(self.measured[i])]
        if len(self.order) % _AUDIT == 0:
            self.audits.append(rest[int(rng.integers(len(rest)))])
            return (self.audits[-1],)
        chance = self.chance()
        return (max(rest, key=lambda i: (chance[i], -rest.index(i))),)

    def verdict(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Units named, and measured ones that are left open."""
        from scipy.special import stdtrit

        if not self.order or self.effects is None:
            return (), ()
        known = sorted(self.order, key=lambda i: (self.measured[i], i))
        width = float(stdtrit(max(len(self.effects) - 1, 1), _BOUND))
        if self.decision == "top":
            named = known[::-1][: self.top]
            last = self.effects[:, named[-1]]
            open_ = []
            for i in known[::-1][self.top :]:
                gap = last - self.effects[:, i]
                gap = gap[~np.isnan(gap)]
                if np.mean(gap) <= width * np.std(gap, ddof=1) / np.sqrt(len(gap)):
                    open_.append(i)
            return tuple(named), tuple(open_)
        harmful = [i for i in known if self.measured[i] + width * self.error[i] < 0]
        floor = -self.margin()
        return tuple(harmful), tuple(
            i
            for i in known
            if i not in harmful and self.measured[i] - width * self.error[i] < min(floor, 0.0)
        )


def _plain(values: FloatArray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


def _check(guess: FloatArray, n_rows: int, decision: str, top: int, level: float, calls: int | None) -> None:
    if guess.ndim != 1 or not len(guess) or not np.isfinite(guess).all():
        raise InputError(
            f"estimated has shape {guess.shape}: finite numbers of shape (n_units,) are needed.",
            hint="Pass the mean attributions.",
        )
    if decision not in ("harmful", "top", "all"):
        raise InputError(f"decision={decision!r}: harmful, top or all.", hint="harmful is the default.")
    if top < 1 or n_rows < 1:
        raise InputError(
            f"top={top}, n_rows={n_rows}: at least 1 of each.", hint="3 and one a query are usual."
        )
    if not 0 < level < 1:
        raise InputError(f"level={level}: strictly between 0 and 1.", hint="0.1 is usual.")
    if calls is not None and calls < 0:
        raise InputError(f"calls={calls}: 0 or more.", hint="Leave it out for no limit.")
