"""Fidelity: how well a surrogate predicts a model on coalitions it was not fitted on.

Always of what to what. ``q_oracle`` is the fidelity to the target of a surrogate fitted on the target;
``q_proxy`` the fidelity to the target of a surrogate fitted on the proxy model ([PE] 4.2, ``E L(f(z), g(z))``
with accuracy as ``L``). Both are the same call here: the values the surrogate is fitted on and the values it
is judged by are separate arguments. Fidelity is per query; a mean over queries is the caller's, so that no
query is hidden in a pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .attribution.base import Design, Explainer, check_values, frozen
from .coalitions import BoolArray, FloatArray, check_coalitions, row_keys
from .errors import InputError

__all__ = ["ScoreFidelity", "label_fidelity", "score_fidelity"]

_TIE = 1e-9
"""Surrogate values this close are equal: what is left of them is the rounding of a regression."""


@dataclass(frozen=True, eq=False)
class ScoreFidelity:
    """Fidelity of a surrogate of real values.

    Parameters
    ----------
    r2 : ndarray of float64, shape (n_queries,)
        ``1 - SSE / SST`` over judge coalitions, at most 1 and not clipped below: negative is worse than
        the judged model's own mean. NaN (missing) for dropped queries and where the judged values do
        not vary. It sees scale: a surrogate of another model may rank well and score badly.
    side_agreement : ndarray of float64, shape (n_queries,)
        Share of judge coalitions, in [0, 1], that surrogate and judged model put on the same side, above
        or not, of the midpoint between v(empty) and v(full); each model has its own midpoint, so that a
        difference of scale or level costs nothing, and a surrogate that points the other way everything.
        NaN (missing) for dropped queries and where either model has v(empty) = v(full).
    n_judged : ndarray of int64, shape (n_queries,)
        Coalitions each query was judged on.
    dropped_queries : ndarray of int64, shape (n_dropped,)
        Queries whose surrogate could not be fitted for missing values.
    method : str
        Explainer of the surrogate.
    n_fit : int
        Coalitions the surrogate was fitted on.
    """

    r2: FloatArray
    side_agreement: FloatArray
    n_judged: NDArray[np.int64]
    dropped_queries: NDArray[np.int64]
    method: str
    n_fit: int


def label_fidelity(
    design: Design,
    probabilities: ArrayLike,
    judge_coalitions: ArrayLike,
    judged_labels: ArrayLike,
    *,
    explainer: Explainer,
) -> FloatArray:
    """Fit one surrogate a label, and compare the label it predicts with the judged model's.

    Parameters
    ----------
    design : Design
        Coalitions the surrogate is fitted on.
    probabilities : array_like of float, shape (n_fit, n_queries, n_labels)
        Probability of each label, of the model the surrogate is fitted on; NaN is missing.
    judge_coalitions : array_like of bool, shape (n_judge, n_units)
        Coalitions to judge on; none may be in ``design``.
    judged_labels : array_like of int, shape (n_judge, n_queries)
        Label the judged model predicts, 0 to n_labels - 1; -1 is missing and left out.
    explainer : Explainer
        Fits the surrogates.

    Returns
    -------
    ndarray of float64, shape (n_queries,)
        Share of the judge coalitions on which surrogate and judged model name the same label, in [0, 1],
        higher is better; NaN (missing) for a query that was dropped for missing probabilities, and for
        one without a judged label.

    Raises
    ------
    InputError
        When a shape is wrong, a label is out of range, or a judge coalition was fitted on.
    InconclusiveError
        When too many queries have missing probabilities.

    Notes
    -----
    [PE] 4.2. The predicted label is the argmax over the surrogates; of values equal up to rounding the
    first label wins. The explainers here give ``1 - g`` for the values ``1 - v`` when they give ``g`` for
    ``v``, so with two labels the rule is the usual one: label 1 where its surrogate is above one half. A
    query that lacks one label's probability on a coalition lacks the coalition.

    Examples
    --------
    >>> from proxyprompt.attribution import KernelSHAP
    >>> from proxyprompt.coalitions import uniform_coalitions
    >>> rng = np.random.default_rng(0)
    >>> design = KernelSHAP().design(6, 30, rng=rng)
    >>> judge = uniform_coalitions(6, 10, rng=rng, exclude=design.coalitions)
    >>> positive = lambda z: z @ np.array([0.4, 0.2, 0.1, 0.1, 0.05, 0.05])
    >>> p = np.stack([1 - positive(design.coalitions), positive(design.coalitions)], axis=-1)[:, None]
    >>> labels = (positive(judge) > 0.5).astype(int)[:, None]
    >>> label_fidelity(design, p, judge, labels, explainer=KernelSHAP()).tolist()
    [1.0]
    """
    fitted = np.array(probabilities, dtype=np.float64)
    if fitted.ndim != 3 or fitted.shape[0] != design.n_coalitions or fitted.shape[2] < 2:
        raise InputError(
            f"probabilities has shape {fitted.shape}: ({design.n_coalitions}, n_queries, n_labels) with at "
            "least 2 labels is needed.",
            hint="Give every label its own column.",
        )
    n_queries, n_labels = fitted.shape[1:]
    judge = _held_out(design, judge_coalitions)
    labels = _check_labels(judged_labels, (len(judge), n_queries), n_labels)
    fitted[np.isnan(fitted).any(axis=2)] = np.nan
    surrogates = [explainer.fit(design, fitted[:, :, label]) for label in range(n_labels)]
    kept = _kept_queries(n_queries, surrogates[0].dropped_queries)
    scores = np.stack([surrogate.predict(judge) for surrogate in surrogates], axis=-1)
    predicted = (scores >= scores.max(axis=2, keepdims=True) - _TIE).argmax(axis=2)
    seen = labels[:, kept] >= 0
    values = np.full(n_queries, np.nan)
    values[kept] = _ratio((predicted == labels[:, kept]).sum(axis=0), seen.sum(axis=0))
    return values


def score_fidelity(
    design: Design,
    values: ArrayLike,
    judge_coalitions: ArrayLike,
    judged_values: ArrayLike,
    *,
    judged_base: ArrayLike,
    judged_full: ArrayLike,
    explainer: Explainer,
) -> ScoreFidelity:
    """Fit a surrogate on real values, and compare its predictions with the judged model's values.

    Parameters
    ----------
    design : Design
        Coalitions the surrogate is fitted on.
    values : array_like of float, shape (n_fit, n_queries)
        Values of the model the surrogate is fitted on; NaN is missing.
    judge_coalitions : array_like of bool, shape (n_judge, n_units)
        Coalitions to judge on; none may be in ``design``.
    judged_values : array_like of float, shape (n_judge, n_queries)
        Values of the judged model; NaN is missing and left out.
    judged_base, judged_full : array_like of float, shape (n_queries,)
        v(empty) and v(full) of the judged model; NaN makes the query's side agreement missing.
    explainer : Explainer
        Fits the surrogate.

    Returns
    -------
    ScoreFidelity

    Raises
    ------
    InputError
        When a shape is wrong, or a judge coalition was fitted on.
    InconclusiveError
        When too many queries have missing values.

    Examples
    --------
    >>> from proxyprompt.attribution import KernelSHAP
    >>> from proxyprompt.coalitions import uniform_coalitions
    >>> from proxyprompt.testing import AdditiveGame
    >>> rng = np.random.default_rng(0)
    >>> game, design = AdditiveGame([[3.0, 2.0, 1.0, 0.5, 0.2, 0.1]]), KernelSHAP().design(6, 30, rng=rng)
    >>> judge = uniform_coalitions(6, 10, rng=rng, exclude=design.coalitions)
    >>> result = score_fidelity(design, game(design.coalitions), judge, game(judge),
    ...     judged_base=[0.0], judged_full=[6.8], explainer=KernelSHAP())
    >>> result.r2.round(6).tolist(), result.side_agreement.tolist()
    ([1.0], [1.0])
    """
    judge = _held_out(design, judge_coalitions)
    surrogate = explainer.fit(design, values)
    dropped = surrogate.dropped_queries
    n_queries = surrogate.n_queries + len(dropped)
    kept = _kept_queries(n_queries, dropped)
    judged = check_values(judged_values, len(judge))
    ends = np.array([_per_query(judged_base, "judged_base"), _per_query(judged_full, "judged_full")])
    if judged.shape[1] != n_queries or ends.shape[1] != n_queries:
        raise InputError(
            f"judged_values has {judged.shape[1]} queries, judged_base and judged_full {ends.shape[1]}, "
            f"values {n_queries}.",
            hint="Judge the queries that were fitted on, in the same order.",
        )
    judged, (base, full) = judged[:, kept], ends[:, kept]
    predicted, seen = surrogate.predict(judge), ~np.isnan(judged)
    r2, side = np.full(n_queries, np.nan), np.full(n_queries, np.nan)
    r2[kept] = _r2(judged, predicted)
    mine, theirs = (surrogate.base_values, surrogate.full_values), (base, full)
    same = _above_midpoint(predicted, *mine) == _above_midpoint(judged, *theirs)
    agreement = _ratio((same & seen).sum(axis=0), seen.sum(axis=0))
    side[kept] = np.where(_apart(*mine) & _apart(*theirs), agreement, np.nan)
    n_judged = np.zeros(n_queries, dtype=np.int64)
    n_judged[kept] = seen.sum(axis=0)
    return ScoreFidelity(
        frozen(r2), frozen(side), frozen(n_judged), frozen(dropped), explainer.method, design.n_coalitions
    )


def _held_out(design: Design, judge_coalitions: ArrayLike) -> BoolArray:
    judge = check_coalitions(judge_coalitions, "judge_coalitions")
    if len(judge) < 1 or judge.shape[1] != design.n_units:
        raise InputError(
            f"judge_coalitions has shape {judge.shape}: one row or more of {design.n_units} units is needed.",
            hint="Draw them with uniform_coalitions.",
        )
    fitted = set(row_keys(design.coalitions))
    overlap = [row for row, key in enumerate(row_keys(judge)) if key in fitted]
    if overlap:
        raise InputError(
            f"judge_coalitions: {len(overlap)} of {len(judge)} rows (first: {overlap[0]}) were fitted on.",
            hint="Draw them with uniform_coalitions(..., exclude=design.coalitions).",
        )
    return judge


def _check_labels(judged_labels: ArrayLike, shape: tuple[int, int], n_labels: int) -> NDArray[np.int64]:
    labels = np.asarray(judged_labels)
    if labels.dtype.kind not in "iu" or labels.shape != shape:
        raise InputError(
            f"judged_labels has dtype {labels.dtype} and shape {labels.shape}: integers of shape {shape} are "
            "needed.",
            hint="One label index a judge coalition and query; -1 is missing.",
        )
    if labels.min() < -1 or labels.max() >= n_labels:
        raise InputError(
            f"judged_labels spans {labels.min()} to {labels.max()}: -1 to {n_labels - 1} is allowed.",
            hint="Use the column index of the label in probabilities.",
        )
    return labels.astype(np.int64)


def _per_query(values: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or np.isinf(array).any():
        raise InputError(
            f"{name} has shape {array.shape}: (n_queries,) of finite or missing numbers is needed.",
            hint="Pass one value a query.",
        )
    return array


def _kept_queries(n_queries: int, dropped: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.setdiff1d(np.arange(n_queries), dropped)


def _ratio(above: NDArray[np.number], below: NDArray[np.number]) -> FloatArray:
    """Divide; NaN (missing) where there is nothing to divide by."""
    empty = np.full(np.shape(below), np.nan)
    result: FloatArray = np.divide(above, below, out=empty, where=np.asarray(below) > 0)
    return result


def _r2(judged: FloatArray, predicted: FloatArray) -> FloatArray:
    seen = ~np.isnan(judged)
    mean = _ratio(np.nansum(judged, axis=0), seen.sum(axis=0))
    errors = np.where(seen, judged - predicted, 0.0)
    spread = np.where(seen, judged - mean, 0.0)
    # Rounding in the mean would give equal values a spread, and any R2.
    varies = np.array([len(np.unique(column[~np.isnan(column)])) > 1 for column in judged.T])
    return np.where(varies, 1.0 - _ratio((errors**2).sum(axis=0), (spread**2).sum(axis=0)), np.nan)


def _above_midpoint(values: FloatArray, base: FloatArray, full: FloatArray) -> BoolArray:
    """Whether a value is above the midpoint between the ends; at the midpoint, up to rounding, it is not."""
    return np.asarray(values - (base + full) / 2 > _TIE * np.abs(full - base))


def _apart(base: FloatArray, full: FloatArray) -> BoolArray:
    """Whether there are two sides to fall on; a missing end has none."""
    return np.asarray(np.abs(full - base) > _TIE)
