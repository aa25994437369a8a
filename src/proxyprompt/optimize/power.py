"""What a certificate on so many sealed queries can show, said before anything is asked."""

from __future__ import annotations

from math import log, sqrt

from proxyprompt.errors import InputError

from .requirement import Requirement

__all__ = ["power_statement", "smallest_loss"]

_POWER = 0.8
_CHANGED = 0.1
_SCORE = 0.8
_MORE = 4


def smallest_loss(
    n: int,
    *,
    requirement: Requirement,
    level: float,
    method: str = "exact",
    full_score: float = _SCORE,
    changed: float = _CHANGED,
) -> float:
    """Smallest allowance, in performance, at which a prompt that is exactly as good is certified with chance 0.8.

    Parameters
    ----------
    n : int
        Sealed queries.
    requirement : Requirement
        Whether the allowance is a share of the full prompt's performance or an absolute margin.
    level : float
    method : {"exact", "betting"}
    full_score : float
        Performance of both prompts; matters for a share only.
    changed : float
        Share of queries on which right and wrong differ between the prompts.

    Returns
    -------
    float
        Capped at ``full_score``.

    Notes
    -----
    Normal approximation: the quantile of ``level`` and one query for the exact test, ``sqrt(2 ln(1 / level))`` for bets;
    from 30 queries on within 15 % of
    :func:`~proxyprompt.sequential.smallest_certifiable_loss`, which sums over all outcomes and takes a minute at 1,000
    queries.

    Examples
    --------
    >>> [round(smallest_loss(n, requirement=Requirement(margin=0.05), level=0.05), 3) for n in (60, 240)]
    [0.118, 0.055]
    """
    from scipy.stats import norm

    if n < 1 or not 0.0 < level < 1.0:
        raise InputError(f"n={n}, level={level}: at least one query, and a level in (0, 1).")
    edge = float(norm.isf(level)) if method == "exact" else sqrt(2 * log(1 / level))
    steps = edge + float(norm.isf(1 - _POWER))
    score = min(max(full_score, 0.05), 1.0)
    half = min(changed / 2, score, 1 - score) if requirement.tau is not None else changed / 2
    allowance = 0.0
    # The spread of "smaller - tau full" depends on tau a little, hence a few rounds.
    for _ in range(20 if requirement.tau is not None else 1):
        share = allowance / score
        square = (score - half) * share**2 + half * (1 - share) ** 2 + half
        spread = 2 * half if requirement.tau is None else square - allowance**2
        allowance = min(steps * sqrt(max(spread, 0.0) / n), score)
    # The exact test moves in steps of one query.
    return min(allowance + (1 / n if method == "exact" else 0.0), score)


def power_statement(
    n: int,
    *,
    requirement: Requirement,
    level: float,
    full_score: float | None = None,
    method: str = "exact",
) -> str:
    """What ``n`` sealed queries can show, in a sentence or two.

    Parameters
    ----------
    n, requirement, level, method
        As for :func:`smallest_loss`.
    full_score : float, optional
        Performance of the full prompt, where other queries have shown it.

    Examples
    --------
    >>> print(power_statement(60, requirement=Requirement(margin=0.02), level=0.05))
    With 60 sealed queries the smallest certifiable loss is about 12 points; 240 would make it 5.5 (80 % chance \
for a prompt that is exactly as good, at an assumed performance of 80 % with 10 % of the answers changed). You allow \
2 points (margin = 0.02): only a prompt that does better than the full one by about 9.8 points is likely to be certified.
    """
    score = _SCORE if full_score is None else full_score

    def points(queries: int) -> float:
        return 100 * smallest_loss(
            queries, requirement=requirement, level=level, method=method, full_score=score
        )

    need, allowed = points(n), 100 * requirement.allowance(score)
    known = "an assumed performance" if full_score is None else "a performance"
    if need <= allowed:
        verdict = "enough for a prompt that is exactly as good."
    else:
        verdict = (
            f"only a prompt that does better than the full one by about {need - allowed:.2g} points is likely to be"
            " certified."
        )
    return (
        f"With {n} sealed queries the smallest certifiable loss is about {need:.2g} points; {_MORE * n} would make it"
        f" {points(_MORE * n):.2g} ({_POWER:.0%} chance for a prompt that is exactly as good, at {known} of"
        f" {score:.0%} with {_CHANGED:.0%} of the answers changed). You allow {allowed:.2g} points"
        f" ({requirement.symbols}): {verdict}"
    ).replace("%", " %")
