"""Does the target do better without a suspect? The statistic, its test, and the correction over suspects and rounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from proxyprompt.errors import InputError

__all__ = ["PASSED_ON", "harm", "harm_coalitions", "p_value", "set_aside", "truncated_holm"]

PASSED_ON = 0.5
"""Share of a confirmed suspect's error level that goes to the next round, if there is one; the rest stays."""


_CAUTION = 1.5


def set_aside(context: NDArray[np.bool_], flagged: tuple[int, ...]) -> tuple[int, ...]:
    """The strongest suspects, at most a quarter of the prompt (rounded up): what a second look is taken without.

    Not all of them: where half of a prompt is under suspicion, what a demonstration does to the few others says
    little about what it does to the prompt (``benchmarks/cleaning/``).
    """
    return flagged[: -(-int(context.sum()) // 4)]


def harm_coalitions(context: NDArray[np.bool_], flagged: tuple[int, ...]) -> NDArray[np.bool_]:
    """Coalitions that show the harm of each suspect, shape ``(2 + 2 * len(flagged), n_units)``.

    Parameters
    ----------
    context : bool (n_units,)
        The prompt in which the suspects are tested.
    flagged : tuple of int
        Strongest first.

    Returns
    -------
    bool array
        The context; the context without those of :func:`set_aside`; then for each suspect the same two without it,
        or, where it is among those set aside, the second with it.
    """
    rows = np.repeat(context[None, :], 2 + 2 * len(flagged), axis=0)
    rows[1::2, list(set_aside(context, flagged))] = False
    for k, unit in enumerate(flagged):
        rows[2 + 2 * k, unit] = False
        rows[3 + 2 * k, unit] = not rows[1, unit]
    return rows


def harm(values: NDArray[np.float64], n_aside: int) -> NDArray[np.float64]:
    """Mean gain per query from removing each suspect, from the values of :func:`harm_coalitions`.

    Parameters
    ----------
    values : float (2 + 2 * n_suspects, n_queries)
    n_aside : int
        How many of the suspects, the first, are set aside in the second prompt.

    Returns
    -------
    float (n_queries, n_suspects)
        ``1/2 [v(C - d) - v(C)] + 1/2 [v(A - d) - v(A + d)]`` for suspect ``d`` in the context ``C``, ``A`` being
        the context without those set aside.
    """
    second = values[3::2] - values[1]
    second[:n_aside] *= -1.0
    gain: NDArray[np.float64] = 0.5 * (values[2::2] - values[0]) + 0.5 * second
    return gain.T


def p_value(x: NDArray[np.float64], *, discrete: bool) -> tuple[float, float, float]:
    """Mean, standard error and one-sided p value of "the mean is 0 or less"; NaN entries are left out.

    Parameters
    ----------
    x : float (n_queries,)
        Harm by query, independent draws.
    discrete : bool
        The values come from right-or-wrong scores: multiples of one half.

    Returns
    -------
    tuple of three floats
        The p value is 1 with fewer than two values.

    Notes
    -----
    Student's t test errs where the values are skewed to the left: many queries gain a little, a rare one loses much,
    and a sample that has missed the rare one looks certain. The p value is the larger of the t test's and that of
    Hall's transformation of it [1]_, which removes the first-order effect of skewness. Samples show too little of a
    skewness that is there, so half of the estimate is added to it. At 60 queries and the level .006, a t test rejects
    a true null hypothesis with chance .022 (exponential tail) to .05 (log-normal), this one with .003 to .007, and
    with .005 where the values are normal. A loss so rare that most samples hold none of it is beyond any such test.
    For discrete values the p value is also at least the exact one of the sum under random signs.

    References
    ----------
    .. [1] P. Hall (1992), "On the Removal of Skewness by Transformation", Journal of the Royal Statistical Society B 54,
       221-228.
    """
    from scipy.stats import t

    x = x[~np.isnan(x)]
    n = len(x)
    if n < 2:
        return float("nan"), float("nan"), 1.0
    mean, spread = float(x.mean()), float(x.std(ddof=1))
    if spread == 0.0:
        return mean, 0.0, 1.0 if mean <= 0 else 0.5**n
    skewness = _CAUTION * float(((x - mean) ** 3).sum()) / spread**3 * n / ((n - 1) * max(n - 2, 1))
    s = mean / spread
    unskewed = s + skewness * s**2 / 3 + skewness**2 * s**3 / 27 + skewness / (6 * n)
    p = float(t.sf(np.sqrt(n) * min(s, unskewed), n - 1))
    return mean, spread / float(np.sqrt(n)), max(p, _sign_flip(x)) if discrete else p


def _sign_flip(x: NDArray[np.float64]) -> float:
    """Exact one-sided p value of a sum of half-valued differences when each sign is a fair coin.

    The distribution of the sum is a convolution on integers.
    """
    steps = np.rint(np.abs(x[x != 0]) * 2).astype(int)
    observed = int(np.rint(x.sum() * 2))
    total = int(steps.sum())
    law = np.zeros(2 * total + 1)
    law[total] = 1.0
    for step in steps:
        law = 0.5 * (np.roll(law, step) + np.roll(law, -step))
    return float(min(1.0, law[observed + total :].sum()))


def truncated_holm(
    p_values: NDArray[np.float64], level: float, *, last: bool
) -> tuple[NDArray[np.bool_], float]:
    """Which suspects of a round are confirmed, and what error level is left for the rounds after it.

    Parameters
    ----------
    p_values : float (m,)
    level : float
        What the rounds before have left.
    last : bool
        No round follows, whatever happens in this one: Holm's procedure at the whole level.

    Returns
    -------
    confirmed : bool (m,)
    left : float
        0 when nothing is confirmed; ``level`` when everything is.

    Notes
    -----
    The ``i``-th smallest p value is compared with ``level * (g / (m - i + 1) + (1 - g) / m)``, ``g = 1/2``, up to the
    first that fails, and ``level * (1 - g) * confirmed / m`` is left: the truncated Holm procedure and the error level
    that it does not use [1]_. Over all rounds the chance of any false confirmation is at most ``level``, whatever
    the dependence of the tests, if the families do not depend on the data that test them. Proof: suppose it for the
    rounds that follow. Of ``m`` suspects let ``t > 0`` be harmless. One of them is confirmed with chance at most
    ``level * (g + (1 - g) t / m)``, by Bonferroni's inequality at the threshold after all others; if none is, at least
    ``t`` are not confirmed, what is left is at most ``level * (1 - g) (1 - t / m)``, and so is the chance of an
    error later. The two add up to ``level``. With ``t = 0`` all of ``level`` may be left.

    References
    ----------
    .. [1] Dmitrienko, Tamhane & Wiens (2008), "General Multistage Gatekeeping Procedures", Biometrical Journal 50,
       667-677.

    Examples
    --------
    >>> truncated_holm(np.array([0.001, 0.9]), 0.04, last=False)
    (array([ True, False]), 0.01)
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"level: got {level!r}; it lies in (0, 1).")
    m = len(p_values)
    kept = 1.0 if last else 1.0 - PASSED_ON
    bar = level * (kept / np.arange(m, 0, -1) + (1.0 - kept) / m)
    order = np.argsort(p_values, kind="stable")
    confirmed = np.zeros(m, dtype=np.bool_)
    confirmed[order] = np.logical_and.accumulate(p_values[order] <= bar)
    share = float(confirmed.mean()) if m else 0.0
    return confirmed, level if share == 1.0 else level * (1.0 - kept) * share
