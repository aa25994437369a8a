"""Rules that look after every pair whether a proxy may explain: by betting, and as [PE] printed it. Arrays only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log, log1p, sqrt
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ._bets import CAP, log_wealth
from .coalitions import FloatArray
from .errors import InputError

__all__ = [
    "SequentialDecision",
    "betting_rule",
    "earliest_acceptance",
    "paired_t_rule",
    "smallest_possible_acceptance",
]

PAIRED_T_NOTE = (
    "Looking after every pair lifts this rule's false acceptance from the nominal delta/2 (0.5 % at "
    "delta = 0.01) to a measured 5 to 12 % on LIME-like differences and above 60 % on the worst real ones, "
    "where two equal differences give an interval of zero width."
)


@dataclass(frozen=True)
class SequentialDecision:
    """What a sequential rule decided, and the evidence at every look.

    Parameters
    ----------
    decision : {"accepted", "rejected", "undecided"}
        Undecided is never accepted.
    n_used : int
        Pairs looked at.
    path : tuple of tuples of float
        One entry a look, first its number of pairs. ``"paired_t"``: then lower and upper end of the interval.
        ``"betting"``: then the log wealth against "mean <= 0" and against "mean >= 0".
    method : str
        ``"paired_t"`` or ``"betting"``.
    settings : mapping
        The arguments.
    note : str
        What the reader must know of the rule.
    reason : {"boundary", "futility", "max_pairs", "out_of_data"}
        Why it stopped; after ``"out_of_data"`` more pairs can still decide.
    """

    decision: Literal["accepted", "rejected", "undecided"]
    n_used: int
    path: tuple[tuple[float, ...], ...]
    method: str
    settings: Mapping[str, Any]
    note: str
    reason: Literal["boundary", "futility", "max_pairs", "out_of_data"]

    @property
    def accepted(self) -> bool:
        """True only when the rule accepted."""
        return self.decision == "accepted"


def paired_t_rule(differences: ArrayLike, *, delta: float = 0.01, max_pairs: int = 50) -> SequentialDecision:
    """Look after every pair at a two-sided t interval ([PE] Algorithm 1).

    Parameters
    ----------
    differences : array_like of float, shape (n_pairs,)
        ``q_proxy - tau * q_oracle`` in the order the pairs were drawn; higher is better for the proxy.
    delta : float
        The interval's nominal error, both sides together.
    max_pairs : int
        ``N``: pairs after which the proxy is refused; at least 2.

    Returns
    -------
    SequentialDecision
        ``"undecided"`` where the paper refuses after ``N`` pairs; not accepted either way.

    Raises
    ------
    InputError
        When an argument is out of range or a difference is not finite.

    Notes
    -----
    After each pair from the second on the interval is ``mean +- t_{n-1, 1-delta/2} s / sqrt(n)``: all
    above 0 accepts, all below 0 rejects, else the next pair. Equal differences give an interval of zero
    width, which decides at once unless they are 0; the paper sets no minimum ``n``, so neither does
    this. Offered because the paper is; its error is far above nominal (see ``note``): prefer
    :func:`betting_rule`.

    Examples
    --------
    >>> paired_t_rule([0.1, 0.1]).decision
    'accepted'
    """
    d = _differences(differences)
    _check_share("delta", delta)
    _check_max_pairs(max_pairs, 2)
    from scipy.special import stdtrit

    path: list[tuple[float, ...]] = []
    decision: Literal["accepted", "rejected", "undecided"] = "undecided"
    for n in range(2, min(len(d), max_pairs) + 1):
        mean, spread = d[:n].mean(), _exact_spread(d[:n])
        half = float(stdtrit(n - 1, 1 - delta / 2)) * spread / sqrt(n)
        path.append((float(n), float(mean - half), float(mean + half)))
        if mean - half > 0 or mean + half < 0:
            decision = "accepted" if mean > 0 else "rejected"
            break
    n_used = min(len(d), max_pairs) if decision == "undecided" else int(path[-1][0])
    exhausted: Literal["max_pairs", "out_of_data"] = "max_pairs" if n_used == max_pairs else "out_of_data"
    return SequentialDecision(
        decision=decision,
        n_used=n_used,
        path=tuple(path),
        method="paired_t",
        settings=MappingProxyType({"delta": delta, "max_pairs": max_pairs}),
        note=PAIRED_T_NOTE,
        reason=exhausted if decision == "undecided" else "boundary",
    )


def betting_rule(
    differences: ArrayLike, *, tau: float, delta: float = 0.05, max_pairs: int = 100, chance: float = 0.0
) -> SequentialDecision:
    """Test one-sidedly, by betting, whether the mean difference is above 0; valid at every look.

    Parameters
    ----------
    differences : array_like of float, shape (n_pairs,)
        ``d = q_proxy - tau * q_oracle`` with both fidelities in [0, 1], hence in [-tau, 1]; in the order
        drawn, without selection. Call again with more pairs to continue: the path is the same.
    tau : float
        Share of the oracle's fidelity the proxy must reach, in (0, 1).
    delta : float
        Largest chance of ever accepting when the mean difference is 0 or less, and of ever rejecting
        when it is 0 or more. For ``M`` candidate proxies pass ``delta / M``.
    max_pairs : int
        ``N``, which the bets are tuned to.
    chance : float
        What both fidelities reach by chance, in [0, 1). The differences are then those of the excess over it,
        ``(q_proxy - chance) - tau * (q_oracle - chance)``, in [-tau - (1 - tau) * chance, 1].

    Returns
    -------
    SequentialDecision
        ``"undecided"`` when ``N`` pairs, or the pairs at hand, do not decide, and when acceptance has
        become impossible within ``N`` pairs (``reason="futility"``).

    Raises
    ------
    InputError
        When a difference is outside [-tau, 1], or the settings could not accept within ``max_pairs``
        even a proxy that is always perfect.

    Notes
    -----
    With ``y = (d + tau) / (1 + tau)`` in [0, 1] and ``m = tau / (1 + tau)``, the wealth
    ``prod(1 + lambda_i (y_i - m))`` is a supermartingale while the mean of ``d`` is at most 0, whatever
    ``lambda_i`` in [0, 1/m] depends on the past, and exceeds ``1 / delta`` with chance at most ``delta``
    (Ville; [1]_, hedged capital, one side). The mirrored bet rejects.

    With the mean and variance known, the chance of reaching ``1 / delta`` by the last pair from a wealth of ``W`` with
    ``k`` pairs left is at best ``Phi(Phi^-1(p) + k^(1/2) mean / sd)``, ``p = W delta / 1.1`` [2]_: a bet that pays once,
    at ``N``, where a test of that size would accept, which is how a test of fixed length becomes valid at every look
    without losing its power [3]_. That formula knows no jumps, and differences of recorded models have rare large losses.
    So each bet is the one, of twelve up to 0.99 of the largest that is safe, that makes the *expected* chance after the
    next pair largest, over the law of the past pairs and of a prior of four. Where the past mean is below 3.5 standard
    errors of a mean of ``N``, the law is tilted to that mean: bets are placed as if the proxy were one that can just be
    found. Beside the bets of constant target of the screening study, on the laws of ``benchmarks/screening/``, it
    accepts more often at every mean and ``N``.

    References
    ----------
    .. [1] Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", 2024,
       arXiv 2010.09686.
    .. [2] Browne, "Reaching goals by a deadline: digital options and continuous-time active portfolio
       management", Advances in Applied Probability 31, 1999.
    .. [3] Koning & van Meer, "Anytime validity is free: inducing sequential tests", arXiv 2501.03982.

    Examples
    --------
    >>> result = betting_rule([0.1] * 100, tau=0.9)
    >>> result.decision, result.n_used
    ('accepted', 49)
    """
    d = _differences(differences)
    earliest = earliest_acceptance(tau=tau, delta=delta, max_pairs=max_pairs, chance=chance)
    worst = tau + (1 - tau) * chance
    if earliest is None:
        least = smallest_possible_acceptance(tau, 1.0, delta)
        raise InputError(
            f"max_pairs={max_pairs}: with tau={tau} and delta={delta} not even an always perfect proxy "
            f"would be accepted; no rule at all can accept one before {least} pairs.",
            hint="Raise max_pairs or delta, or lower tau.",
        )
    if len(d) and (d.min() < -worst - 1e-9 or d.max() > 1 + 1e-9):
        raise InputError(
            f"differences span {d.min():.4g} to {d.max():.4g}: with tau={tau} they lie in [{-worst:g}, 1].",
            hint="Pass q_proxy - tau * q_oracle with both fidelities in [0, 1].",
        )
    decision, reason, path = _bet(np.clip(d, -worst, 1.0), worst, delta, max_pairs)
    return SequentialDecision(
        decision=decision,
        n_used=len(path),
        path=path,
        method="betting",
        settings=MappingProxyType({"tau": tau, "delta": delta, "max_pairs": max_pairs, "chance": chance}),
        note=f"Error at most {delta:g} at every look, for any law; acceptance takes {earliest} pairs or more "
        "unless the proxy's fidelity exceeds the oracle's.",
        reason=reason,
    )


def earliest_acceptance(
    *, tau: float, delta: float, max_pairs: int, q_oracle: float = 1.0, chance: float = 0.0
) -> int | None:
    """Pairs after which :func:`betting_rule` accepts a proxy as faithful as the oracle on every pair.

    Parameters
    ----------
    tau, delta, max_pairs, chance
        As for :func:`betting_rule`.
    q_oracle : float
        Fidelity of oracle and proxy on every pair, in (0, 1].

    Returns
    -------
    int or None
        None when it is not accepted within ``max_pairs``.

    Raises
    ------
    InputError
        When an argument is out of range.

    Examples
    --------
    >>> earliest_acceptance(tau=0.9, delta=0.01, max_pairs=40) is None
    True
    """
    _check_share("tau", tau)
    _check_share("delta", delta)
    _check_max_pairs(max_pairs, 1)
    if not 0 < q_oracle <= 1:
        raise InputError(
            f"q_oracle={q_oracle}: a fidelity in (0, 1] is needed.", hint="1 is a perfect oracle."
        )
    if not 0 <= chance < 1:
        raise InputError(
            f"chance={chance}: a number in [0, 1) is needed.", hint="0 unless scores are excesses."
        )
    return _earliest(tau + (1 - tau) * chance, delta, max_pairs, (1 - tau) * (q_oracle - chance))


@lru_cache(maxsize=64)
def _earliest(worst: float, delta: float, max_pairs: int, difference: float) -> int | None:
    decision, _, path = _bet(np.full(max_pairs, difference), worst, delta, max_pairs)
    return len(path) if decision == "accepted" else None


def smallest_possible_acceptance(tau: float, q_oracle: float, delta: float) -> int:
    """Pairs before which no valid rule can accept, even if every pair is perfect.

    Parameters
    ----------
    tau : float
        Share of the oracle's fidelity the proxy must reach, in (0, 1].
    q_oracle : float
        The oracle's fidelity, in (0, 1].
    delta : float
        Level of the rule, in (0, 1).

    Returns
    -------
    int
        ``ln(1/delta) / ln(1/(tau * q_oracle))``, rounded up.

    Raises
    ------
    InputError
        When an argument is out of range, or ``tau * q_oracle`` is 1: then no number of pairs suffices.

    Notes
    -----
    For differences in ``[-tau q_oracle, 1 - tau q_oracle]`` the law with mean 0 that is most often at its
    maximum is there with chance ``tau q_oracle``, and shows ``n`` perfect pairs with chance
    ``(tau q_oracle)**n``, which must not exceed ``delta`` (screening study, section 3).

    Examples
    --------
    >>> smallest_possible_acceptance(0.9, 1.0, 0.01), smallest_possible_acceptance(0.8, 1.0, 0.05)
    (44, 14)
    """
    for name, share in (("tau", tau), ("q_oracle", q_oracle)):
        if not 0 < share <= 1:
            raise InputError(f"{name}={share}: a number in (0, 1] is needed.", hint="0.8 is usual for tau.")
    _check_share("delta", delta)
    if tau * q_oracle >= 1:
        raise InputError(
            "tau * q_oracle = 1: a proxy cannot be shown to be perfect by any number of pairs.",
            hint="Use tau below 1.",
        )
    return ceil(log(1 / delta) / log(1 / (tau * q_oracle)) - 1e-9)


def _bet(
    d: FloatArray, worst: float, delta: float, max_pairs: int
) -> tuple[
    Literal["accepted", "rejected", "undecided"],
    Literal["boundary", "futility", "max_pairs", "out_of_data"],
    tuple[tuple[float, ...], ...],
]:
    """Decision, reason and path of the betting rule for differences in [-worst, 1]."""
    d, goal = d[:max_pairs], log(1 / delta)
    above, below = (w[0] for w in log_wealth(d[None], worst, delta, max_pairs))
    best_step = log1p(CAP / worst)
    path: list[tuple[float, ...]] = []
    for n in range(1, len(d) + 1):
        path.append((float(n), float(above[n - 1]), float(below[n - 1])))
        if above[n - 1] >= goal:
            return "accepted", "boundary", tuple(path)
        if below[n - 1] >= goal:
            return "rejected", "boundary", tuple(path)
        if n < max_pairs and above[n - 1] + (max_pairs - n) * best_step < goal:
            return "undecided", "futility", tuple(path)
    return "undecided", "max_pairs" if len(path) == max_pairs else "out_of_data", tuple(path)


def _exact_spread(d: FloatArray) -> float:
    """Standard deviation; exactly 0 for equal numbers, where rounding would decide by chance."""
    return 0.0 if (d == d[0]).all() else float(d.std(ddof=1))


def _differences(differences: ArrayLike) -> FloatArray:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not np.isfinite(d).all():
        raise InputError(
            f"differences of shape {d.shape}: a list of finite numbers is needed.",
            hint="Leave out pairs whose fidelity is missing before they are drawn, and say how many.",
        )
    return d


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name}={value}: strictly between 0 and 1.", hint="See the default.")


def _check_max_pairs(max_pairs: int, least: int) -> None:
    if max_pairs < least:
        raise InputError(f"max_pairs={max_pairs}: at least {least}.", hint="50 in the paper, 100 by default.")
