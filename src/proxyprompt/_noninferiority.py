"""Is the smaller prompt still good enough? Paired non-inferiority of bounded scores, valid at finite n.

Public through :mod:`proxyprompt.sequential`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, log
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._trinomial import p_value
from .coalitions import FloatArray
from .errors import InconclusiveError, InputError

__all__ = [
    "NonInferiority",
    "betting_p_value",
    "non_inferiority",
]

_CAP = 0.9
_PRIOR_VARIANCE = 0.03
_PRIOR_PAIRS = 5.0
_STEPS = 400
MAX_MISSING = 0.05


@dataclass(frozen=True)
class NonInferiority:
    """Outcome of a paired non-inferiority test.

    Parameters
    ----------
    certified : bool
        Whether the null hypothesis, that the smaller prompt is too much worse, was rejected.
    p_value : float
        Valid at the given ``n`` (``"exact"``), or at every look (``"betting"``).
    e_value : float or None
        Final wealth of the bets, 1 at the start; None for ``"exact"``.
    difference : float
        mean(pruned) - mean(full), in units of the score; higher is better for the smaller prompt.
    estimate : float
        The quantity tested against 0: mean(pruned) - tau mean(full), or difference + margin.
    lower_bound : float
        One-sided lower confidence bound of the same quantity at ``1 - level``.
    retained : float or None
        mean(pruned) / mean(full); None when mean(full) is 0.
    retained_lower_bound : float or None
        One-sided lower confidence bound of that ratio, at most 1; None for a margin.
    n, n_missing : int
        Pairs tested; those among them with a missing side, counted as the worst case.
    level : float
    method : {"exact", "betting"}
    settings : mapping
        ``tau``, ``margin`` and, for ``"exact"``, the counts of wins and losses.
    """

    certified: bool
    p_value: float
    e_value: float | None
    difference: float
    estimate: float
    lower_bound: float
    retained: float | None
    retained_lower_bound: float | None
    n: int
    n_missing: int
    level: float
    method: Literal["exact", "betting"]
    settings: Mapping[str, Any]

    @property
    def decision(self) -> Literal["certified", "not certified"]:
        """The same in words."""
        return "certified" if self.certified else "not certified"


def non_inferiority(
    full: ArrayLike,
    pruned: ArrayLike,
    *,
    tau: float | None = None,
    margin: float | None = None,
    level: float = 0.05,
    method: Literal["auto", "exact", "betting"] = "auto",
    horizon: int | None = None,
) -> NonInferiority:
    """Test whether a smaller prompt keeps enough of the full prompt's score.

    Parameters
    ----------
    full, pruned : array_like of float, shape (n_queries,)
        Scores in [0, 1], higher is better, of both prompts on the same queries, which chose nothing
        earlier. NaN is missing: such a pair counts as the worst case for the smaller prompt
        (pruned 0, full 1).
    tau : float, optional
        Null hypothesis ``mean(pruned) <= tau * mean(full)``; in (0, 1].
    margin : float, optional
        Null hypothesis ``mean(pruned) <= mean(full) - margin``; in [0, 1). Give this or ``tau``.
    level : float
        Largest chance of certifying when the null hypothesis is true.
    method : {"auto", "exact", "betting"}
        ``"exact"`` for scores that are 0 or 1, ``"betting"`` for any scores. ``"auto"`` takes the first
        when all scores are 0 or 1; name it when the metric knows better than the sample.
    horizon : int, optional
        These are the first of so many pairs, fixed before, and more may follow: for ``"betting"`` only, whose
        bets are laid out for all of them. Called again with more pairs, the same bets go on.

    Returns
    -------
    NonInferiority

    Raises
    ------
    InputError
        When an argument is out of range, or ``"exact"`` is asked for with other scores.
    InconclusiveError
        When more than 5 % of the pairs have a missing side.

    Notes
    -----
    Queries are taken as independent draws; nothing else is assumed. ``"betting"`` reads them in the order
    given, which must not depend on the scores: shuffle a set that is sorted by topic or difficulty before
    it is split.

    ``"exact"``: only wins (right with the smaller prompt alone) and losses matter. The p-value is the
    supremum over the unknown win rate of an exact trinomial tail of the score statistic; with ``tau`` it
    is conditional on the number of queries that either prompt got right, which removes the second
    unknown. Valid once, at the ``n`` chosen before.

    ``"betting"``: ``y = (d + tau) / (1 + tau)`` with ``d = pruned - tau full`` (margin: ``tau = 1``, null
    mean ``-margin``). Wealth ``prod(1 + lambda_i (y_i - m))`` is a supermartingale under the null for any
    predictable bet ([1]_), hence the test is valid at every look at the queries in their given order. The
    bets recalculate their target [2]_:
    ``lambda_i = sqrt(2 (ln(1/level) - ln wealth) / ((n - i + 1) var_{i-1}))``, capped at ``0.9 / m``, and
    stop at ``1 / level``.

    Power by simulation (level .05, tau .95, mean score .8, no true loss; 0/1 scores with 5 / 10 / 20 %
    discordant pairs): n = 180: exact .69 / .46 / .31, these bets .57 / .40 / .27, bets tuned to n (as in
    screening) .47 / .30 / .19, wealth averaged over permutations .25 / .16 / .10; n = 60: exact
    .24 / .20 / .13, these bets .16 / .14 / .11.

    The lower bounds are the ends of the nulls that the same test rejects. With ``"exact"`` and ``tau``
    that gives the ratio's bound ``r``, and ``(r - tau) mean(full)`` is bounded by ``r - tau`` below 0 and
    by 0 above.

    References
    ----------
    .. [1] Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", 2024.
    .. [2] Voracek & Orabona, "STaR-Bets: Sequential Target-Recalculating Bets for Tighter Confidence
       Intervals", 2025, arXiv 2505.22422.

    Examples
    --------
    >>> full, pruned = np.ones(100), np.ones(100)
    >>> pruned[:2] = 0
    >>> result = non_inferiority(full, pruned, tau=0.9)
    >>> result.certified, round(result.retained, 2), round(result.retained_lower_bound, 2)
    (True, 0.98, 0.94)
    """
    check_rule(tau, margin, level)
    full, pruned, n_missing = _paired_scores(full, pruned, horizon)
    binary = bool(np.isin(full, (0.0, 1.0)).all() and np.isin(pruned, (0.0, 1.0)).all())
    if method not in ("auto", "exact", "betting") or (method == "exact" and not binary):
        raise InputError(
            f"method={method!r}: 'exact' takes scores of 0 and 1 only; 'auto' and 'betting' take any.",
            hint="Use 'betting'.",
        )
    if horizon is not None and (method != "betting" or horizon < len(full)):
        raise InputError(
            f"horizon={horizon} with {len(full)} pairs and method={method!r}: only 'betting' may look before all pairs"
            " are there, and they are no more than planned.",
            hint="The exact test is valid for one look, at all queries.",
        )
    chosen: Literal["exact", "betting"] = "exact" if binary and method != "betting" else "betting"
    if chosen == "exact":
        p, e, lower, ratio, counts = _exact(full, pruned, tau, margin, level)
    else:
        p, e, lower, ratio, counts = _betting(full, pruned, tau, margin, level, horizon or len(full))
    difference = float(pruned.mean() - full.mean())
    allowed = margin if tau is None else (1 - tau) * float(full.mean())
    return NonInferiority(
        certified=p <= level,
        p_value=p,
        e_value=e,
        difference=difference,
        estimate=difference + float(allowed or 0.0),
        lower_bound=lower,
        retained=float(pruned.mean() / full.mean()) if full.any() else None,
        retained_lower_bound=ratio,
        n=len(full),
        n_missing=n_missing,
        level=level,
        method=chosen,
        settings=MappingProxyType({"tau": tau, "margin": margin, **counts}),
    )


_Outcome = tuple[float, float | None, float, float | None, dict[str, int]]


def _exact(
    full: FloatArray, pruned: FloatArray, tau: float | None, margin: float | None, level: float
) -> _Outcome:
    """p-value, e-value, lower bound of the tested quantity, of the ratio, and the counts."""
    wins, losses = int((pruned > full).sum()), int((pruned < full).sum())
    counts = {"wins": wins, "losses": losses}
    if tau is not None:
        used = int(((full > 0) | (pruned > 0)).sum())

        def of_ratio(share: float) -> float:
            return p_value(wins, losses, used, 1 - share, share)

        ratio = _last_rejected(of_ratio, level, tau)
        bound = ratio - tau
        return of_ratio(tau), None, bound if bound < 0 else 0.0, ratio, counts

    allowed = float(margin or 0.0)

    def of_share(kept: float) -> float:
        return p_value(wins, losses, len(full), 1 - kept, 1.0)

    lower = _last_rejected(of_share, level, 1 - allowed) - (1 - allowed)
    return of_share(1 - allowed), None, lower, None, counts


def _last_rejected(p_of: Callable[[float], float], level: float, tested: float) -> float:
    """Largest share such that it and every smaller one on the grid is rejected, refined by bisection."""
    low, high = 0.0, 1.0
    # The null under test is on the grid, so that bound and decision agree.
    for share in np.union1d([0.25, 0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 1.0], [tested]):
        if p_of(float(share)) > level:
            high = float(share)
            break
        low = float(share)
    else:
        return 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if p_of(middle) <= level else (low, middle)
    return low


def _betting(
    full: FloatArray, pruned: FloatArray, tau: float | None, margin: float | None, level: float, horizon: int
) -> _Outcome:
    """The same by betting; each bound inverts the test on a grid of null hypotheses."""
    share, null = (1.0, -float(margin or 0.0)) if tau is None else (tau, 0.0)
    d = pruned - share * full
    wealth, peak = _wealth(d[:, None], np.array([share]), np.array([null]), level, horizon)
    # The null under test is on the grid, so that bound and decision agree.
    nulls = np.union1d(np.linspace(-share, max(d.mean(), null), _STEPS), [null])
    _, peaks = _wealth(np.tile(d[:, None], len(nulls)), np.full(len(nulls), share), nulls, level, horizon)
    lower = _last_leading(nulls, peaks >= log(1 / level), -share) - null
    ratio = None
    if tau is not None:
        shares = np.union1d(np.linspace(0.0, 1.0, _STEPS + 1)[1:], [tau])
        each = pruned[:, None] - shares * full[:, None]
        _, peaks = _wealth(each, shares, np.zeros(len(shares)), level, horizon)
        ratio = _last_leading(shares, peaks >= log(1 / level), 0.0)
    return min(1.0, exp(-float(peak[0]))), exp(float(wealth[0])), lower, ratio, {}


def betting_p_value(
    full: ArrayLike,
    pruned: ArrayLike,
    *,
    tau: float | None = None,
    margin: float | None = None,
    level: float = 0.05,
    horizon: int,
) -> float:
    """The p-value of :func:`non_inferiority` with ``method="betting"``, without its bounds: quick, for interim looks."""
    check_rule(tau, margin, level)
    full, pruned, _ = _paired_scores(full, pruned, horizon)
    share, null = (1.0, -float(margin or 0.0)) if tau is None else (tau, 0.0)
    _, peak = _wealth((pruned - share * full)[:, None], np.array([share]), np.array([null]), level, horizon)
    return min(1.0, exp(-float(peak[0])))


def _last_leading(nulls: FloatArray, rejected: NDArray[np.bool_], trivial: float) -> float:
    """Last of the leading nulls that are all rejected."""
    count = int(np.logical_and.accumulate(rejected).sum())
    return float(nulls[count - 1]) if count else trivial


def _wealth(
    d: FloatArray, share: FloatArray, null: FloatArray, level: float, horizon: int | None = None
) -> tuple[FloatArray, FloatArray]:
    """Latest and largest log wealth of each column's bets against ``mean(d) <= null``; ``horizon`` pairs are planned."""
    n, goal = horizon or len(d), log(1 / level)
    y, m = (d + share) / (1 + share), (null + share) / (1 + share)
    cap = np.divide(_CAP, m, out=np.full(m.shape, np.inf), where=m > 0)
    total, squares = m * _PRIOR_PAIRS, np.full(m.shape, _PRIOR_VARIANCE * _PRIOR_PAIRS)
    wealth, peak = np.zeros(m.shape), np.zeros(m.shape)
    for i in range(len(d)):
        variance = squares / (i + _PRIOR_PAIRS)
        bet = np.sqrt(2 * np.maximum(goal - wealth, 0.0) / ((n - i) * variance))
        # Nothing is staked once 1/level is reached: the evidence asked for is there.
        wealth = wealth + np.log1p(np.where(peak < goal, np.minimum(bet, cap), 0.0) * (y[i] - m))
        peak = np.maximum(peak, wealth)
        total = total + y[i]
        squares = squares + (y[i] - total / (i + 1 + _PRIOR_PAIRS)) ** 2
    return wealth, peak


def check_rule(tau: float | None, margin: float | None, level: float) -> None:
    if (tau is None) == (margin is None):
        raise InputError(f"tau={tau}, margin={margin}: exactly one of the two is needed.", hint="Give one.")
    if tau is not None and not 0 < tau <= 1:
        raise InputError(f"tau={tau}: a number in (0, 1] is needed.", hint="0.95 keeps 95 % of the score.")
    if margin is not None and not 0 <= margin < 1:
        raise InputError(f"margin={margin}: a number in [0, 1) is needed.", hint="0.05 allows 5 points.")
    if not 0 < level < 1:
        raise InputError(f"level={level}: strictly between 0 and 1.", hint="0.05 is usual.")


def _paired_scores(
    full: ArrayLike, pruned: ArrayLike, horizon: int | None = None
) -> tuple[FloatArray, FloatArray, int]:
    """Both score arrays with the worst case in place of missing pairs, and how many those are."""
    pair = [np.array(scores, dtype=np.float64) for scores in (full, pruned)]
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape or len(pair[0]) < 1:
        raise InputError(
            f"full has shape {pair[0].shape}, pruned {pair[1].shape}: two lists of equal length are needed.",
            hint="One score a query and prompt, NaN where missing.",
        )
    for name, scores in zip(("full", "pruned"), pair, strict=True):
        known = scores[~np.isnan(scores)]
        if ((known < 0) | (known > 1)).any():
            raise InputError(
                f"{name} spans {known.min():.4g} to {known.max():.4g}: scores lie in [0, 1].",
                hint="Rescale the metric by its known range, not by the range of the sample.",
            )
    missing = np.isnan(pair[0]) | np.isnan(pair[1])
    planned = horizon or len(missing)
    if missing.sum() > MAX_MISSING * planned:
        raise InconclusiveError(
            f"{int(missing.sum())} of {planned} pairs lack a score; at most {MAX_MISSING:.0%} may.",
            hint="Repeat the failed calls.",
        )
    pair[0][missing], pair[1][missing] = 1.0, 0.0
    return pair[0], pair[1], int(missing.sum())
