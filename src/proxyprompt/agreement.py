"""Agreement of attributions: do two models have the same reasons, and how much agreement could there be at all?

Two models that answer alike may do so for different reasons, and a comparison of answers cannot see it. The
functions here compare attributions, per query. Two of them take attributions as they are
(:func:`top_mass`, :func:`rank_agreement`). With few coalitions a unit such attributions are noisy, and those of the
target agree with *themselves* for no other reason than that they share their noise. The third,
:func:`held_out_agreement`, therefore compares what a surrogate says with target values that neither surrogate was
fitted on; the target's own surrogate is judged by the same values, which makes the comparison a fair one.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt

import numpy as np
from numpy.typing import ArrayLike

from .attribution.base import Attribution, Design, Explainer, check_values
from .coalitions import FloatArray, check_coalitions, row_keys
from .errors import InputError

__all__ = [
    "chance_agreement",
    "held_out_agreement",
    "predicted_agreement",
    "rank_agreement",
    "self_agreement",
    "top_mass",
]

_FLAT = 1e-12
"""A spread this small beside the values' size is rounding."""


def top_mass(proposed: ArrayLike, reference: ArrayLike, k: int) -> FloatArray:
    """Share of the reference's attribution mass that lies in the other's ``k`` largest units.

    Parameters
    ----------
    proposed, reference : array_like of float, shape (n_queries, n_units)
        Attributions of a proxy and of the target; sizes count, signs do not.
    k : int
        From 1 to ``n_units``; of equal sizes the first unit is taken.

    Returns
    -------
    ndarray of float64, shape (n_queries,)
        In [0, 1], higher is better; at most ``top_mass(reference, reference, k)``. NaN (missing) where the reference is
        zero throughout.

    Raises
    ------
    InputError
        When the shapes differ, a value is not finite, or ``k`` is out of range.

    Notes
    -----
    For attributions that were measured without sampling, such as leave-one-out. A reference with sampling noise has
    mass everywhere, of which any choice of units gets its share, so that a useless proxy looks almost as good as the
    target itself.

    Examples
    --------
    >>> top_mass([[5.0, 0.1, 4.0]], [[3.0, 1.0, 0.0]], k=1).tolist()
    [0.75]
    """
    a, b = _pair(proposed, reference)
    if not 1 <= k <= a.shape[1]:
        raise InputError(f"k={k}: from 1 to the {a.shape[1]} units.", hint="2 is usual.")
    chosen = np.argsort(-np.abs(a), axis=1, kind="stable")[:, :k]
    size = np.abs(b)
    inside, total = np.take_along_axis(size, chosen, axis=1).sum(axis=1), size.sum(axis=1)
    share: FloatArray = np.divide(inside, total, out=np.full(len(a), np.nan), where=total > 0)
    return share


def rank_agreement(proposed: ArrayLike, reference: ArrayLike) -> FloatArray:
    """Spearman correlation over units of two models' attributions.

    Parameters
    ----------
    proposed, reference : array_like of float, shape (n_queries, n_units)

    Returns
    -------
    ndarray of float64, shape (n_queries,)
        In [-1, 1]; equal values share their rank. NaN (missing) where either model gives all units the same.

    Raises
    ------
    InputError
        When the shapes differ or a value is not finite.

    Examples
    --------
    >>> rank_agreement([[1.0, 2.0, 9.0], [3.0, 2.0, 1.0]], [[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]]).round(6).tolist()
    [1.0, -1.0]
    """
    from scipy.stats import rankdata

    a, b = _pair(proposed, reference)
    return _correlation(rankdata(a, axis=1).T, rankdata(b, axis=1).T)


def held_out_agreement(
    design: Design,
    values: ArrayLike,
    judge_coalitions: ArrayLike,
    judged_values: ArrayLike,
    *,
    explainer: Explainer,
) -> FloatArray:
    """Fit a surrogate per query, and correlate what it predicts with the judged model's values.

    Parameters
    ----------
    design : Design
        Coalitions the surrogate is fitted on.
    values : array_like of float, shape (n_fit, n_queries)
        Of the model the surrogate is fitted on: a proxy, or the target itself; NaN is missing.
    judge_coalitions : array_like of bool, shape (n_judge, n_units)
        Coalitions to judge on, at least 3; none may be in ``design``.
    judged_values : array_like of float, shape (n_judge, n_queries)
        Of the target; NaN is missing and left out.
    explainer : Explainer

    Returns
    -------
    ndarray of float64, shape (n_queries,)
        Pearson correlation over the judge coalitions, cut off at 0 from below: agreement no better than chance is no
        agreement. In [0, 1], higher is better. 0 where the surrogate predicts the same throughout; NaN (missing) for
        dropped queries and where the judged values do not vary.

    Raises
    ------
    InputError
        When a shape is wrong, or a judge coalition was fitted on.
    InconclusiveError
        When too many queries have missing values.

    Notes
    -----
    Over coalitions whose units are independent, as the judge coalitions of the explainers here are, the covariance of
    what two additive surrogates predict is the inner product of their attributions, and their correlation its cosine:
    this compares attributions, all units at once, without having to estimate the judged model's. The correlation sees
    neither scale nor level.

    Noise in the judged values lowers the agreement of any surrogate with them by the same factor, that of the target's
    own surrogate included, so the ratio of the two is the one without noise. That needs judge coalitions that neither
    was fitted on, and would not hold for :func:`top_mass`.

    Examples
    --------
    >>> from proxyprompt.attribution import KernelSHAP
    >>> from proxyprompt.coalitions import uniform_coalitions
    >>> from proxyprompt.testing import AdditiveGame
    >>> rng = np.random.default_rng(0)
    >>> target, proxy = AdditiveGame([3.0, 0, 0, 0, 0, 4.0]), AdditiveGame([0, 0, 0, 0, 0, 7.0])
    >>> design = KernelSHAP().design(6, 30, rng=rng)
    >>> judge = uniform_coalitions(6, 30, rng=rng, exclude=design.coalitions)
    >>> fitted = proxy(design.coalitions)
    >>> found = held_out_agreement(design, fitted, judge, target(judge), explainer=KernelSHAP())
    >>> 0.7 < float(found[0]) < 0.9
    True
    """
    return predicted_agreement(explainer.fit(design, values), design, judge_coalitions, judged_values)


def chance_agreement(n_judge: int) -> float:
    """Mean of :func:`held_out_agreement` of a surrogate that has nothing to do with the judged values.

    Parameters
    ----------
    n_judge : int
        Judge coalitions, at least 3.

    Returns
    -------
    float
        ``1 / sqrt(2 pi (n_judge - 1))``: the mean of the positive part of a correlation of independent values, whose
        standard deviation is ``1 / sqrt(n_judge - 1)``. A screen that did not take it off would say of two models
        that are all noise that they agree equally well.

    Raises
    ------
    InputError
        For fewer than 3 coalitions.

    Examples
    --------
    >>> round(chance_agreement(25), 3)
    0.081
    """
    if n_judge < 3:
        raise InputError(f"n_judge={n_judge}: at least 3 coalitions.", hint="24 are usual.")
    return 1 / sqrt(2 * pi * (n_judge - 1))


def predicted_agreement(
    attribution: Attribution, design: Design, judge_coalitions: ArrayLike, judged_values: ArrayLike
) -> FloatArray:
    """:func:`held_out_agreement` of an attribution that is at hand, such as that of an ensemble.

    Parameters
    ----------
    attribution : Attribution
        Fitted on ``design``; its dropped queries are missing in the answer.
    design, judge_coalitions, judged_values
        As for :func:`held_out_agreement`.

    Returns
    -------
    ndarray of float64, shape (n_queries,)

    Raises
    ------
    InputError
        When a shape is wrong, or a judge coalition was fitted on.
    """
    judge = check_coalitions(judge_coalitions, "judge_coalitions")
    if len(judge) < 3 or judge.shape[1] != design.n_units:
        raise InputError(
            f"judge_coalitions has shape {judge.shape}: 3 rows or more of {design.n_units} units are needed.",
            hint="Draw them with the explainer's held_out.",
        )
    if set(row_keys(design.coalitions)) & set(row_keys(judge)):
        raise InputError(
            "judge_coalitions: some rows were fitted on.", hint="Draw them with exclude=design.coalitions."
        )
    judged = check_values(judged_values, len(judge))
    n_queries = attribution.n_queries + len(attribution.dropped_queries)
    if judged.shape[1] != n_queries:
        raise InputError(
            f"judged_values has {judged.shape[1]} queries, values {n_queries}.",
            hint="Judge the queries that were fitted on, in the same order.",
        )
    kept = np.setdiff1d(np.arange(n_queries), attribution.dropped_queries)
    predicted = attribution.predict(judge)
    found = np.full(n_queries, np.nan)
    for column, query in enumerate(kept):
        seen = ~np.isnan(judged[:, query])
        theirs, mine = judged[seen, query], predicted[seen, column]
        if len(theirs) < 3 or _flat(theirs):
            continue
        found[query] = 0.0 if _flat(mine) else max(float(np.corrcoef(mine, theirs)[0, 1]), 0.0)
    return found


def self_agreement(
    measure: Callable[[FloatArray, FloatArray], FloatArray],
    attribute: Callable[[FloatArray], FloatArray],
    values: ArrayLike,
    noise: ArrayLike,
    *,
    rng: np.random.Generator,
    draws: int = 20,
) -> FloatArray:
    """What a noisy target reaches when its attributions are compared with those of another run of itself.

    No proxy can be expected to do better, so the agreement of a proxy is read beside this.

    Parameters
    ----------
    measure : callable
        ``measure(proposed, reference)`` per query, e.g. :func:`rank_agreement`.
    attribute : callable
        Values, shape ``(n_coalitions, n_queries)``, to attributions ``(n_queries, n_units)``.
    values : array_like of float, shape (n_coalitions, n_queries)
        The target's, of one run.
    noise : array_like of float, shape (n_noise,)
        Differences between repeated values and their mean, as a sample to draw from; centred here. For two runs of
        the same prompts, ``(first - second) / sqrt(2)``.
    rng : numpy.random.Generator
    draws : int
        Simulated runs.

    Returns
    -------
    ndarray of float64, shape (n_queries,)
        Mean of the measure over the runs: attributions of values with fresh noise against those of ``values``. NaN where
        the measure always is. It errs on the low side, because ``values`` hold noise already.

    Raises
    ------
    InputError
        When there is no noise to draw from, or no draw.

    Examples
    --------
    >>> one_out = lambda v: (v[0] - v[1:]).T
    >>> values = np.array([[1.0], [0.0], [0.9], [0.5]])
    >>> self_agreement(rank_agreement, one_out, values, [0.0], rng=np.random.default_rng(0)).tolist()
    [1.0]
    """
    v, e = np.asarray(values, dtype=np.float64), np.asarray(noise, dtype=np.float64).ravel()
    if not len(e) or not np.isfinite(e).all() or draws < 1:
        raise InputError(
            f"noise has {len(e)} entries and draws={draws}: finite numbers, and at least one of each.",
            hint="Ask some prompts twice.",
        )
    e, reference = e - e.mean(), attribute(v)
    found = np.array([measure(attribute(v + rng.choice(e, size=v.shape)), reference) for _ in range(draws)])
    seen = (~np.isnan(found)).sum(axis=0)
    total: FloatArray = np.nansum(found, axis=0)
    mean: FloatArray = np.divide(total, seen, out=np.full(len(total), np.nan), where=seen > 0)
    return mean


def _pair(proposed: ArrayLike, reference: ArrayLike) -> tuple[FloatArray, FloatArray]:
    a, b = np.asarray(proposed, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(
            f"proposed has shape {a.shape}, reference {b.shape}: finite numbers of one shape (n_queries, n_units)"
            " are needed.",
            hint="Pass the values of two attributions of the same queries and units.",
        )
    return a, b


def _flat(values: FloatArray) -> bool:
    return bool(np.ptp(values) <= _FLAT * (1 + np.abs(values).max()))


def _correlation(a: FloatArray, b: FloatArray) -> FloatArray:
    """Pearson correlation of columns; NaN where a column does not vary."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    r: FloatArray = np.divide((a * b).sum(axis=0), scale, out=np.full(a.shape[1], np.nan), where=scale > 0)
    return r
