"""What a screen of given settings can find, said before anything is asked."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np

from ._screening_pairs import KINDS
from ._screening_result import ScreeningPlan
from .agreement import chance_agreement
from .errors import InputError
from .sequential import earliest_acceptance, smallest_possible_acceptance

__all__ = ["Method", "On", "plan_screen"]

Method: TypeAlias = Literal["betting", "paper"]
On: TypeAlias = Literal["attribution", "fidelity"]

_TYPICAL_SPREAD = 0.15
"""Standard deviation of differences that the power line speaks of; on recorded closed models .1 to .3."""


def plan_screen(
    n_queries: int,
    n_candidates: int = 1,
    *,
    method: Method = "betting",
    on: On | None = None,
    tau: float = 0.8,
    delta: float = 0.05,
    max_pairs: int = 100,
    n_judge: int = 24,
) -> ScreeningPlan:
    """What a screen of these settings can find; asks nothing.

    Parameters
    ----------
    n_queries, n_candidates : int
        An ensemble is a candidate too.
    method, on, tau, delta, max_pairs
        As for :func:`~proxyprompt.screening.screen`.
    n_judge : int
        Held-out coalitions.

    Returns
    -------
    ScreeningPlan

    Raises
    ------
    InputError
        If the settings could not accept even a perfect proxy with any number of queries, or contradict each other.

    Notes
    -----
    Too few queries are no error: then as many candidates are screened, the first ones, as can share ``delta`` and still be
    accepted; none, if not even one can (``n_screened = 0``, ``earliest = None``). That is settled before any data are seen,
    so the chance that any candidate is wrongly accepted stays ``delta``.

    Examples
    --------
    >>> plan = plan_screen(200)
    >>> plan.earliest, round(plan.detectable, 2)
    (29, 0.05)
    >>> plan_screen(20, 3).n_screened, plan_screen(10).n_screened
    (2, 0)
    """
    decides = _check_rule(method, on, tau, delta)
    chance = chance_agreement(n_judge) if decides == "attribution" else 0.0

    def earliest_of(candidates: int, pairs: int) -> int | None:
        if method == "paper":
            return 2 if pairs >= 2 else None
        return earliest_acceptance(tau=tau, delta=delta / candidates, max_pairs=pairs, chance=chance)

    if earliest_of(n_candidates, max_pairs) is None:
        level = delta / n_candidates
        raise InputError(
            f"screening: with tau={tau:g} and delta={level:g} not even a perfect proxy would be accepted within"
            f" max_pairs={max_pairs}; no rule at all can accept one before"
            f" {smallest_possible_acceptance(tau, 1.0, level)}.",
            hint="Raise max_pairs or delta, or lower tau.",
        )
    n_max = min(max_pairs, n_queries)
    n_screened = next((m for m in range(n_candidates, 0, -1) if earliest_of(m, n_max) is not None), 0)
    level = delta / max(n_screened, 1) if method == "betting" else delta
    if not n_screened:
        needed = next(n for n in range(n_max + 1, max_pairs + 1) if earliest_of(1, n) is not None)
        text = (
            f"No proxy was screened: with {n_queries} queries to explain not even a perfect one could be accepted"
            f" (tau {tau:g}, delta {delta:g}); that takes {needed} or more. Nothing was asked for it."
        )
        return ScreeningPlan(decides, level, n_max, None, float("inf"), chance, text, 0)
    earliest = earliest_of(n_screened, n_max)
    normal = NormalDist()
    by_noise = (normal.inv_cdf(1 - level) + normal.inv_cdf(0.8)) * _TYPICAL_SPREAD / sqrt(n_max)
    by_range = tau * (level ** (-1 / n_max) - 1)
    # A tenth on top for what the bets lose before they know the spread.
    detectable = 1.1 * float(np.hypot(by_noise, by_range))
    what = (
        "attributions agree with the target"
        if decides == "attribution"
        else "explanations predict the target"
    )
    text = (
        f"The screen uses up to {n_max} queries. A proxy whose {what} on every query just as well as the target's own"
        f" is accepted after {earliest} of them."
    )
    if method == "betting":
        text += (
            f" One that is better than {tau:g} of the target's own by {detectable:.2f} on average is found in about four"
            f" screens of five (for differences that scatter by {_TYPICAL_SPREAD:g})."
        )
    if n_screened < n_candidates:
        text += (
            f" Only the first {n_screened} of {n_candidates} candidates {'is' if n_screened == 1 else 'are'} screened: with"
            f" {n_queries} queries to explain, none could be accepted if all of them shared delta."
        )
    return ScreeningPlan(decides, level, n_max, earliest, detectable, chance, text, n_screened)


def _check_rule(method: str, on: str | None, tau: float, delta: float) -> str:
    """What decides."""
    if method not in ("betting", "paper"):
        raise InputError(f"method: got {method!r}; allowed: betting, paper.")
    if on not in (None, *KINDS):
        raise InputError(f"on: got {on!r}; allowed: {', '.join(KINDS)}.")
    if method == "paper" and on == "attribution":
        raise InputError(
            "method='paper' with on='attribution': Algorithm 1 compares fidelities.",
            hint="Leave on out, or use method='betting'.",
        )
    if not 0.0 < tau <= 1.0:
        raise InputError(f"tau: got {tau!r}; it lies in (0, 1].")
    if not 0.0 < delta < 1.0:
        raise InputError(f"delta: got {delta!r}; it lies in (0, 1).")
    return on or ("fidelity" if method == "paper" else "attribution")
