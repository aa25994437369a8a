"""Remove demonstrations that do harm on these queries [PE 5.2].

The paper removes every demonstration with a negative attribution. Here a negative attribution makes a *suspect*, and
a suspect goes only if the target model itself, on queries that the attribution did not use, does better without
it. The first stage may be generous: a suspect that is put to the test without need costs two coalitions, one that
is overlooked stays in the prompt. So it also takes a hint from outside, demonstrations whose label the target
contradicts (see :mod:`proxyprompt.optimize.relabel`).

Poison can mask poison. After a round that confirms something, the prompt *without its strongest suspects* is explained
anew, and who then looks harmful for the first time is the next round's business, in that smaller prompt.

What keeps the error rate over all rounds. Each round asks the same queries, and a correction for many tests holds only
for hypotheses that those queries did not choose. They do not: suspects come from the attributions, and what is
explained anew is the prompt without the round's strongest suspects, not without the confirmed ones. Given the
attribution's queries, the sequence of suspects and the prompts they are tested in is therefore fixed before one
confirming query is asked; the answers decide only where the sequence ends. Over such a sequence the correction of
:func:`~proxyprompt.optimize._harm.truncated_holm` keeps the chance of any false confirmation at ``level``. (Had round
two been explained without the confirmed ones only, its hypotheses would depend on the confirming answers, and
adding up the levels of the rounds would prove nothing: a union over rounds is not a union over all the second rounds
that the first could have led to.) Each single test is approximate, as t tests are; its error is measured by
simulation in ``tests/statistical``.

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
from proxyprompt.value_function import Values

from ._harm import harm, harm_coalitions, p_value, set_aside, truncated_holm

__all__ = ["Cleaning", "Confirmation", "Round", "clean", "suspects"]

EvaluateTarget: TypeAlias = Callable[[NDArray[np.bool_]], Values]
"""Ask the target model for coalitions of the whole prompt, on the queries that confirm."""

Reexplain: TypeAlias = Callable[[NDArray[np.bool_]], Attribution | None]
"""Explain the prompt of the kept units alone, on the attribution's queries; ``None``: not affordable."""


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
        After the correction over all suspects of all rounds.
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
class Round:
    """One round of suspects, in one prompt.

    Attributes
    ----------
    context : bool (n_units,)
        The prompt that was explained and in which the suspects were tested: without the strongest suspects of
        earlier rounds.
    flagged : tuple of int
        Suspects, lowest p first.
    confirmations : tuple of Confirmation
        One for each of ``flagged``, in its order; empty when nothing could be asked.
    level : float
        Error level that earlier rounds had left for this one.
    """

    context: NDArray[np.bool_]
    flagged: tuple[int, ...]
    confirmations: tuple[Confirmation, ...]
    level: float

    @property
    def confirmed(self) -> tuple[int, ...]:
        """Confirmed units of this round."""
        return tuple(c.unit for c in self.confirmations if c.confirmed)


@dataclass(frozen=True)
class Cleaning:
    """Outcome of all rounds.

    Attributes
    ----------
    rounds : tuple of Round
    kept : bool (n_units,)
        The cleaned prompt: everything but what was confirmed harmful; and of that, only as much is taken out as
        makes the prompt best on the queries that confirmed.
    level : float
        Largest chance that any harmless demonstration is confirmed, over all rounds.
    n_queries : int
        Queries that confirmed.
    stopped : str
        Why no further round was held.
    """

    rounds: tuple[Round, ...]
    kept: NDArray[np.bool_]
    level: float
    n_queries: int
    stopped: str

    @property
    def flagged(self) -> tuple[int, ...]:
        """Suspects of all rounds; none is a suspect twice."""
        return tuple(unit for r in self.rounds for unit in r.flagged)

    @property
    def confirmations(self) -> tuple[Confirmation, ...]:
        """The target's word on each of ``flagged``, in its order."""
        return tuple(c for r in self.rounds for c in r.confirmations)

    @property
    def removed(self) -> tuple[int, ...]:
        """Confirmed units that are taken out."""
        return tuple(c.unit for c in self.confirmations if c.confirmed and not self.kept[c.unit])

    @property
    def spared(self) -> tuple[int, ...]:
        """Confirmed units that stay: with the others gone, the prompt is better with them."""
        return tuple(c.unit for c in self.confirmations if c.confirmed and self.kept[c.unit])


def suspects(
    attribution: Attribution,
    *,
    level: float = 0.2,
    most: int | None = None,
    doubted: tuple[int, ...] = (),
    doubted_level: float = 0.5,
) -> tuple[int, ...]:
    """Units worth testing on the target: mean attribution below zero at a generous level, lowest p first.

    Parameters
    ----------
    attribution : Attribution
    level : float
        Of each unit's one-sided t test of ``mean >= 0``; not corrected, see the module's text.
    most : int, optional
        At most so many.
    doubted : tuple of int
        Units under suspicion for another reason; they need only be below zero at ``doubted_level``.
    doubted_level : float
        One half: any mean below zero.

    Returns
    -------
    tuple of int
    """
    p = attribution.p_values()
    bar = np.full(attribution.n_units, level)
    bar[list(doubted)] = max(level, doubted_level)
    order = sorted((int(i) for i in np.flatnonzero(p < bar)), key=lambda i: (p[i], i))
    return tuple(order[:most])


def clean(
    attribution: Attribution,
    evaluate: EvaluateTarget | None,
    *,
    level: float = 0.05,
    suspect_level: float = 0.2,
    max_suspects: int = 12,
    protected: tuple[int, ...] = (),
    doubted: tuple[int, ...] = (),
    rounds: int = 1,
    reexplain: Reexplain | None = None,
) -> Cleaning:
    """Flag suspects by attribution, confirm each on the target model, and look again without them.

    Parameters
    ----------
    attribution : Attribution
        Of the whole prompt.
    evaluate : callable or None
        Target values of coalitions of the *whole* prompt, on queries that no attribution has used. ``None``:
        nothing can be confirmed, so nothing is removed.
    level : float
        Largest chance that any harmless suspect is confirmed (family-wise, over all rounds).
    suspect_level, max_suspects
        Who is put to the test in a round; see :func:`suspects`.
    protected : tuple of int
        Units that must stay.
    doubted : tuple of int
        Units that become suspects with any mean attribution below zero. They must not come from the
        answers on the confirming queries.
    rounds : int
        At most so many.
    reexplain : callable, optional
        ``reexplain(kept) -> Attribution or None`` of the prompt that holds only the units kept, one column for
        each, without use of the confirming queries. Asked only when a round confirms something.

    Returns
    -------
    Cleaning

    Raises
    ------
    InputError
        When a level or the number of rounds is out of range.
    InconclusiveError
        Too many of the target's answers missing.

    Notes
    -----
    Suspects can mask each other: with several demonstrations mislabelled alike, leaving out one changes
    little while the others remain. The statistic of suspect ``d`` of the prompt ``C`` is therefore the mean, per
    query, of its harm in ``C`` and in ``A``, which is ``C`` without its strongest suspects, a quarter of it at most::

        1/2 [ v(C - d) - v(C) ]  +  1/2 [ v(A - d) - v(A + d) ]

    It costs two coalitions a suspect and two more. ``A`` is also what the next round explains and tests in.

    Demonstrations that are each harmful need not be so together: of eight identical ones perhaps four are too many,
    and none is to blame. So the prompts without all confirmed ones, without the three, two and one quarters of them that
    do most harm, and the whole prompt are compared on the same queries, and the best is kept. This can only take less
    out, so that the error level holds.
    """
    for name, value in (("level", level), ("suspect_level", suspect_level)):
        if not 0.0 < value < 1.0:
            raise InputError(f"{name}: got {value!r}; it lies in (0, 1).")
    if rounds < 1 or max_suspects < 1:
        raise InputError(f"rounds={rounds}, max_suspects={max_suspects}: at least 1 of each.")

    known = set(protected)

    def flag(found: Attribution, context: NDArray[np.bool_]) -> tuple[int, ...]:
        units = np.flatnonzero(context)
        own = tuple(k for k, unit in enumerate(units) if unit in doubted)
        named = (int(units[k]) for k in suspects(found, level=suspect_level, doubted=own))
        return tuple(unit for unit in named if unit not in known)[:max_suspects]

    context = np.ones(attribution.n_units, dtype=np.bool_)
    left, n_queries = level, 0
    flagged = flag(attribution, context)
    held: list[Round] = []
    stopped = "no further demonstration has an attribution clearly below zero"
    while flagged:
        known |= set(flagged)
        if evaluate is None:
            held.append(Round(context, flagged, (), left))
            stopped = "nothing could be asked of the target"
            break
        values = evaluate(harm_coalitions(context, flagged))
        values.require_complete("confirming suspects on the target")
        n_queries = values.utility.shape[1]
        aside = set_aside(context, flagged)
        gains = harm(values.utility, len(aside))
        tests = [p_value(x, discrete=values.scale == "accuracy") for x in gains.T]
        p = np.array([t[2] for t in tests])
        rest = context.copy()
        rest[list(aside)] = False
        following: tuple[int, ...] = ()
        if not p.min() <= left / len(p):
            why = "the last round confirmed nothing"
        elif len(held) + 1 >= rounds or reexplain is None:
            why = f"{len(held) + 1} of {rounds} rounds were held"
        elif not set(np.flatnonzero(rest).tolist()) - known:
            why = "no demonstration was left to suspect"
        else:
            again = reexplain(rest)
            why = (
                "another explanation would have passed its limit of target calls"
                if again is None
                else stopped
            )
            following = flag(again, rest) if again is not None else ()
        confirmed, after = truncated_holm(p, left, last=not following)
        held.append(
            Round(
                context,
                flagged,
                tuple(
                    Confirmation(u, *t, bool(yes))
                    for u, t, yes in zip(flagged, tests, confirmed, strict=True)
                ),
                left,
            )
        )
        context, flagged, left = rest, following, after
        if not flagged:
            stopped = why
    guilty = sorted((c for r in held for c in r.confirmations if c.confirmed), key=lambda c: -c.difference)
    kept = _together([c.unit for c in guilty], attribution.n_units, evaluate)
    return Cleaning(tuple(held), kept, level, n_queries, stopped)


def _together(worst: list[int], n: int, evaluate: EvaluateTarget | None) -> NDArray[np.bool_]:
    """The best prompt without some of the confirmed units, the most harmful first; of equals, the smallest."""
    sizes = sorted({-(-len(worst) * k // 4) for k in range(5)}, reverse=True)
    rows = np.ones((len(sizes), n), dtype=np.bool_)
    for row, size in zip(rows, sizes, strict=True):
        row[worst[:size]] = False
    best = 0
    if len(worst) >= 2 and evaluate is not None:
        values = evaluate(rows)
        values.require_complete("comparing the cleaned prompts on the target")
        best = int(np.argmax(np.nanmean(values.utility, axis=1)))
    kept: NDArray[np.bool_] = rows[best]
    return kept
