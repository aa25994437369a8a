"""Remove demonstrations that do harm on these queries [PE 5.2].

The paper removes every demonstration with a negative attribution. Here a negative attribution makes a *suspect*, and
a suspect goes only if the target model itself, on queries that the attribution did not use, does better without
it, with Holm's correction over the suspects. The error rate of a removal is that of this second, independent
test alone, so the first may be generous: a suspect that is put to the test without need costs two
coalitions, one that is overlooked stays in the prompt.

What a removed demonstration is called is "harmful on these queries": it may be honest and merely unhelpful.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxyprompt.attribution.base import Attribution
from proxyprompt.errors import InputError
from proxyprompt.sequential import holm
from proxyprompt.value_function import Values

__all__ = ["Cleaning", "Confirmation", "clean", "suspects"]

EvaluateTarget: TypeAlias = Callable[[NDArray[np.bool_]], Values]
"""Ask the target model for coalitions of the whole prompt, on the queries that confirm."""


@dataclass(frozen=True)
class Confirmation:
    """The target's own word on one suspect.

    Attributes
    ----------
    unit : int
        Index of the demonstration.
    difference : float
        Mean gain in utility when it is removed (nats, or share of right answers); positive: harmful.
    standard_error : float
    p_value : float
        One-sided, of "removing it does not help"; before correction.
    confirmed : bool
        After Holm's correction over the suspects.
    """

    unit: int
    difference: float
    standard_error: float
    p_value: float
    confirmed: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "difference": self.difference,
            "standard_error": self.standard_error,
            "p_value": self.p_value,
            "confirmed": self.confirmed,
        }


@dataclass(frozen=True)
class Cleaning:
    """Outcome of one round.

    Attributes
    ----------
    flagged : tuple of int
        Suspects: units whose attribution is negative at a generous level, lowest p first.
    confirmations : tuple of Confirmation
        One for each flagged unit, in the order of ``flagged``.
    kept : bool (n_units,)
        The cleaned prompt.
    level : float
    n_queries : int
        Queries that confirmed.
    """

    flagged: tuple[int, ...]
    confirmations: tuple[Confirmation, ...]
    kept: NDArray[np.bool_]
    level: float
    n_queries: int

    @property
    def removed(self) -> tuple[int, ...]:
        """Confirmed units."""
        return tuple(c.unit for c in self.confirmations if c.confirmed)


def suspects(attribution: Attribution, *, level: float = 0.2, most: int | None = None) -> tuple[int, ...]:
    """Units worth testing on the target: mean attribution below zero at a generous level, lowest p first.

    Parameters
    ----------
    attribution : Attribution
    level : float
        Of each unit's one-sided t test of ``mean >= 0``; not corrected, see the module's text.
    most : int, optional
        At most so many.

    Returns
    -------
    tuple of int
    """
    p = attribution.p_values()
    order = sorted((int(i) for i in np.flatnonzero(p < level)), key=lambda i: (p[i], i))
    return tuple(order[:most])


def clean(
    attribution: Attribution,
    evaluate: EvaluateTarget | None,
    *,
    level: float = 0.05,
    suspect_level: float = 0.2,
    max_suspects: int = 12,
    protected: tuple[int, ...] = (),
) -> Cleaning:
    """Flag suspects by attribution and confirm each on the target model.

    Parameters
    ----------
    attribution : Attribution
    evaluate : callable or None
        Target values of coalitions of the *whole* prompt, on queries not used for the attribution. ``None``:
        nothing can be confirmed, so nothing is removed.
    level : float
        Largest chance that any harmless suspect is confirmed (family-wise).
    suspect_level, max_suspects
        Who is put to the test; see :func:`suspects`.
    protected : tuple of int
        Units that must stay.

    Returns
    -------
    Cleaning

    Notes
    -----
    Suspects can mask each other: with several demonstrations mislabelled alike, leaving out one changes
    little while the others remain. The statistic of suspect ``d`` among suspects ``F`` of the prompt ``N`` is
    therefore the mean, per query, of its two extreme marginal harms::

        1/2 [ v(N - d) - v(N) ]  +  1/2 [ v(N - F) - v((N - F) + d) ]

    which costs ``2 |F| + 2`` coalitions. Its mean over queries is tested with a one-sided t test; for values
    that are only right or wrong, the same statistic is tested by sign flips (exact in distribution under
    symmetry).
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"level: got {level!r}; it lies in (0, 1).")
    n = attribution.n_units
    found = suspects(attribution, level=suspect_level)
    flagged = tuple(i for i in found if i not in protected)[:max_suspects]
    if not flagged or evaluate is None:
        return Cleaning(flagged, (), np.ones(n, dtype=np.bool_), level, 0)
    values = evaluate(_plan(n, flagged))
    values.require_complete("confirming suspects on the target")
    harm = _harm(values.utility, len(flagged))
    tests = [_one_sided(column, discrete=values.scale == "accuracy") for column in harm.T]
    confirmed = holm(np.array([p for *_, p in tests]), level)
    confirmations = tuple(
        Confirmation(unit, mean, se, p, bool(yes))
        for unit, (mean, se, p), yes in zip(flagged, tests, confirmed, strict=True)
    )
    kept = np.ones(n, dtype=np.bool_)
    kept[[c.unit for c in confirmations if c.confirmed]] = False
    return Cleaning(flagged, confirmations, kept, level, values.utility.shape[1])


def _plan(n: int, flagged: tuple[int, ...]) -> NDArray[np.bool_]:
    """Rows: all; all without the suspects; then for each suspect all but it, and none of the others but it."""
    rows = np.ones((2 + 2 * len(flagged), n), dtype=np.bool_)
    rows[1, list(flagged)] = False
    for k, unit in enumerate(flagged):
        rows[2 + 2 * k, unit] = False
        rows[3 + 2 * k, [u for u in flagged if u != unit]] = False
    return rows


def _harm(v: NDArray[np.float64], n_flagged: int) -> NDArray[np.float64]:
    """Per query and suspect: mean gain from removing it; shape (n_queries, n_flagged)."""
    out = np.empty((v.shape[1], n_flagged))
    for k in range(n_flagged):
        out[:, k] = 0.5 * (v[2 + 2 * k] - v[0]) + 0.5 * (v[1] - v[3 + 2 * k])
    return out


def _one_sided(x: NDArray[np.float64], *, discrete: bool) -> tuple[float, float, float]:
    """Mean, standard error and one-sided p value of "mean <= 0", missing values left out."""
    from scipy.stats import t

    x = x[~np.isnan(x)]
    if len(x) < 2:
        return float("nan"), float("nan"), 1.0
    mean, se = float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))
    if se == 0.0:
        return mean, se, 1.0 if mean <= 0 else 0.5 ** len(x)
    if discrete:
        return mean, se, _sign_flip(x)
    return mean, se, float(t.sf(mean / se, len(x) - 1))


def _sign_flip(x: NDArray[np.float64]) -> float:
    """Exact one-sided p value of a sum of quarter-valued differences when each sign is a fair coin.

    The values are multiples of 1/2, so the distribution of the sum is a convolution on integers.
    """
    steps = np.rint(np.abs(x[x != 0]) * 2).astype(int)
    observed = int(np.rint(x.sum() * 2))
    total = int(steps.sum())
    law = np.zeros(2 * total + 1)
    law[total] = 1.0
    for step in steps:
        law = 0.5 * (np.roll(law, step) + np.roll(law, -step))
    return float(min(1.0, law[observed + total :].sum()))
