"""Calibrated attributions: many proxy values and a few target values, unbiased for the target.

A proxy model's attributions say what matters to the proxy. With the target's values on some of the same
coalitions they can be corrected: what the proxy predicts about the target is taken from many cheap
coalitions, what it does not predict is estimated from the few that the target was paid for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxyprompt.coalitions import FloatArray, row_keys
from proxyprompt.errors import InputError

from .base import Attribution, Design, Explainer, check_values, frozen, summarize
from .kernel_shap import KernelSHAP
from .weighted_banzhaf import WeightedBanzhaf

__all__ = ["MIN_INTERVAL_VALUES", "CalibratedAttribution", "calibrate", "choose_measured"]

MIN_INTERVAL_VALUES = 50
"""Target values a query from which on an interval is given; below, its coverage is not to be relied on."""

_LINEAR = (KernelSHAP, WeightedBanzhaf)
_FOLDS = 5
_REDRAWS = 100
# A proxy counts when it explains four times what chance would, an F of 4: for one proxy, a t of 2.
_EVIDENCE = 4.0


@dataclass(frozen=True, eq=False)
class CalibratedAttribution:
    """Attributions of the target model, made with the help of one or more proxy models.

    Attributes
    ----------
    attribution : Attribution
        The target's attributions; ``n_coalitions`` counts what the target was asked.
    lam : ndarray of float64, shape (n_proxies,)
        Weight of each proxy, the mean of the cross-fitted ones; 0 where the proxy says nothing about the target.
    rho2 : float
        Share of the variance *that sampling coalitions adds to the attribution* which the proxies explain,
        cross-validated, in [0, 1). A regression takes the additive part of the values without sampling
        error, so this is a matter of the values' residuals, not of the values.
    rho2_values : float
        Squared correlation of target and proxies (weighted by ``lam``) over coalitions, additive part included:
        the figure that the literature on control variates quotes. 0 when every weight is 0.
    n_target, n_proxy : int
        Coalitions evaluated on the target and on each proxy.
    oracle : Attribution
        What the same target values give without any proxy.
    """

    attribution: Attribution
    lam: FloatArray
    rho2: float
    rho2_values: float
    n_target: int
    n_proxy: int
    oracle: Attribution

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", frozen(np.asarray(self.lam, dtype=np.float64)))

    @property
    def multiplier(self) -> float:
        """How many times as many target coalitions the same precision would take without proxies."""
        return 1.0 / (1.0 - self.rho2)

    @property
    def oracle_share(self) -> float:
        """Target coalitions paid for, as a share of measuring all of the design on the target."""
        return self.n_target / self.n_proxy

    @property
    def has_interval(self) -> bool:
        """Whether there were enough target values for an interval; see :data:`MIN_INTERVAL_VALUES`."""
        return self.n_target >= MIN_INTERVAL_VALUES

    def interval(self, level: float = 0.95) -> tuple[FloatArray, FloatArray] | None:
        """Two-sided interval of each mean attribution, or ``None`` below 50 target values a query.

        Parameters
        ----------
        level : float
            Confidence of each single interval.

        Returns
        -------
        (low, high), each ndarray of float64, shape (n_units,), or None
        """
        if not self.has_interval:
            return None
        one_sided = 1 - (1 - level) / 2
        return self.attribution.lower_bound(one_sided), self.attribution.upper_bound(one_sided)

    def target_coalitions_for(self, standard_error: float) -> int | None:
        """Target coalitions a query that would bring the median coalition error to ``standard_error``.

        The error falls with the square root of the target's coalitions down to what the proxy's own design
        leaves, ``lam * se_N``.

        Parameters
        ----------
        standard_error : float
            Wanted median over units of ``se_coalitions``, above 0, in units of the value function.

        Returns
        -------
        int or None
            ``None`` when no number is enough: the proxies' design itself is too small.

        Raises
        ------
        InputError
            When ``standard_error`` is not positive.
        """
        if not standard_error > 0:
            raise InputError(f"standard_error={standard_error}: above 0 is needed.", hint="0.05 is usual.")
        own = float(np.median(self.attribution.settings["se_target"]))
        floor = float(np.median(self.attribution.settings["se_proxy"]))
        if own == 0:
            return self.n_target if floor <= standard_error else None
        room = standard_error**2 - floor**2
        return ceil(self.n_target * own**2 / room) if room > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "attribution": self.attribution.to_dict(),
            "lam": self.lam.tolist(),
            "rho2": self.rho2,
            "rho2_values": self.rho2_values,
            "multiplier": self.multiplier,
            "n_target": self.n_target,
            "n_proxy": self.n_proxy,
            "oracle_share": self.oracle_share,
            "oracle": self.oracle.to_dict(),
        }


def choose_measured(
    explainer: Explainer, design: Design, n: int, *, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Choose which coalitions of a design the target is asked for.

    Parameters
    ----------
    explainer : KernelSHAP or WeightedBanzhaf
        The technique that will be calibrated.
    design : Design
        What the proxies are asked for.
    n : int
        Coalitions for the target, the empty and the full one among them.
    rng : numpy.random.Generator
        The only source of chance.

    Returns
    -------
    ndarray of int64, shape (at most n,)
        Row indices, ascending. Complement pairs are drawn whole, so that a paired design stays paired, and all with
        the same probability, so that the design's weights remain right up to scale.

    Raises
    ------
    InputError
        When so few coalitions do not determine the units.
    """
    ends = [design.empty_row, design.full_row]
    groups: dict[bytes, list[int]] = {}
    flipped = np.where(design.coalitions[:, :1], design.coalitions, ~design.coalitions)
    for row, key in enumerate(row_keys(flipped)):
        if row not in ends:
            groups.setdefault(key, []).append(row)
    listed = list(groups.values())
    for _ in range(_REDRAWS):
        chosen = list(ends)
        for index in rng.permutation(len(listed)):
            if len(chosen) + len(listed[index]) <= n:
                chosen += listed[index]
        rows = np.sort(np.array(chosen, dtype=np.int64))
        try:
            explainer.fit(_part(design, rows), np.zeros((len(rows), 1)))
        except InputError:
            continue
        return rows
    raise InputError(
        f"n={n}: {_REDRAWS} draws of so few coalitions did not determine {design.n_units} units.",
        hint=f"Use {4 * design.n_units} or more.",
    )


def calibrate(
    explainer: Explainer,
    design: Design,
    proxy_values: ArrayLike,
    measured: ArrayLike,
    target_values: ArrayLike,
    *,
    rng: np.random.Generator,
    measured_design: Design | None = None,
) -> CalibratedAttribution:
    """Correct proxy attributions with a few target values.

    Parameters
    ----------
    explainer : KernelSHAP or WeightedBanzhaf
        A technique whose attributions are linear in the values.
    design : Design
        What the proxies were asked for, ``N`` coalitions.
    proxy_values : array_like of float, shape (N, n_queries) or (n_proxies, N, n_queries)
        Without missing values.
    measured : array_like of int, shape (n_target,)
        Rows of ``design`` that the target was asked for, the empty and the full coalition among them.
    target_values : array_like of float, shape (n_target, n_queries)
        NaN is missing.
    rng : numpy.random.Generator
        Draws the folds.
    measured_design : Design, optional
        Those rows as a design of their own, from :func:`~proxyprompt.attribution.extending.nested_designs`. Default:
        for rows from :func:`choose_measured`.

    Returns
    -------
    CalibratedAttribution

    Raises
    ------
    InputError
        For another explainer, shapes that do not fit, missing proxy values, or too few measured coalitions for the
        explainer.
    InconclusiveError
        When too many target values are missing.

    Notes
    -----
    With ``A`` the explainer's linear map, ``N`` all coalitions and ``n`` the measured ones, this is the difference
    estimator ``phi = lam A_N v_proxy + A_n (v_target - lam v_proxy)`` [1]_: whatever ``lam`` is, as long as it does
    not depend on the values it multiplies, its expectation is the one of ``A_n v_target``. A fit takes the
    additive part of any values without error, so only ``r``, what the fit on ``N`` leaves of the proxy's values, is
    of use; ``A_N r = 0``, and the estimate is computed as ``A_n (v_target - lam r)``.

    ``lam`` is the regression of the target's residuals on the proxies' residuals, both of the fit on the measured
    coalitions (by Frisch, Waugh and Lovell the coefficient of the proxy's value beside the units in one
    regression). Where coalitions come with their complements, as in KernelSHAP, what a pair has in common
    cancels, and the residuals are those of the differences. It is fitted on the mean over queries, which is what
    decisions are made on, and bounded below by 0. With ``p`` proxies and residual variance ``s2`` it is 0 unless
    ``|lam e_proxy|^2 > 4 p s2``, four times what chance would explain, and else shrunk by
    ``1 - p s2 / |lam e_proxy|^2``. Five folds: the values of a fold are multiplied by a ``lam`` that the other
    folds gave [2]_. ``lam = 1``, the naive correction, is never used: with a weak proxy it multiplies the error.

    ``se_coalitions**2`` is that of ``A_n (v_target - lam r)`` plus ``lam**2`` times that of ``A_N v_proxy``.

    References
    ----------
    .. [1] Särndal, Swensson & Wretman, "Model Assisted Survey Sampling", 1992, chapter 6.
    .. [2] Angelopoulos, Duchi & Zrnic, "PPI++: Efficient Prediction-Powered Inference", 2023, arXiv 2311.01453.

    Examples
    --------
    >>> from proxyprompt.testing import UnanimityGame
    >>> game = UnanimityGame(10, [((0, 1), 1.0), ((2, 3), -1.0)])
    >>> rng = np.random.default_rng(0)
    >>> explainer = WeightedBanzhaf(0.5)
    >>> design = explainer.design(10, 400, rng=rng)
    >>> rows = choose_measured(explainer, design, 60, rng=rng)
    >>> values = game(design.coalitions)
    >>> found = calibrate(explainer, design, values, rows, values[rows], rng=rng)
    >>> found.n_target, found.n_proxy, round(float(found.lam[0]), 2)
    (60, 400, 1.0)
    """
    if not isinstance(explainer, _LINEAR):
        raise InputError(
            f"explainer: {explainer.method} cannot be calibrated; its attributions are not linear in the values.",
            hint="Use WeightedBanzhaf or KernelSHAP.",
        )
    rows, small = _measured_design(design, measured, measured_design)
    proxies = _proxy_values(proxy_values, design.n_coalitions)
    target = check_values(target_values, len(rows))
    if target.shape[1] != proxies.shape[2]:
        raise InputError(
            f"target_values has {target.shape[1]} queries, proxy_values {proxies.shape[2]}; they must be the same.",
            hint="Pass the same queries in the same order.",
        )
    oracle = explainer.fit(small, target)
    answered = np.setdiff1d(np.arange(target.shape[1]), oracle.dropped_queries)
    target, proxies = target[:, answered], proxies[:, :, answered]
    curved = proxies - np.array([explainer.fit(design, p).predict(design.coalitions) for p in proxies])
    pairs = _pairs(small)
    root = np.sqrt(small.weights[pairs[:, 0]] / small.weights[pairs[:, 0]].mean())
    # Where the target gave no answer the proxy's is left out too, so that both residuals are of the same pairs.
    same = [np.where(np.isnan(target), np.nan, p[rows]) for p in proxies]
    gap_target = root * _gaps(explainer, small, target, pairs)
    gap_proxies = np.column_stack([root * _gaps(explainer, small, p, pairs) for p in same])
    folds = rng.permutation(np.arange(len(pairs)) % _FOLDS)
    used = design.n_units / len(pairs)
    per_fold = np.array(
        [_weights(gap_proxies[folds != k], gap_target[folds != k], used) for k in range(_FOLDS)]
    )
    lam = per_fold.mean(axis=0)
    by_row = np.tile(lam, (len(rows), 1))
    by_row[pairs] = per_fold[folds][:, None]
    left = gap_target - (gap_proxies * per_fold[folds]).sum(axis=1)
    explained = 1 - float(left @ left) / float(gap_target @ gap_target) if gap_target.any() else 0.0

    own = explainer.fit(small, target - np.einsum("rp,prq->rq", by_row, curved[:, rows]))
    cheap = explainer.fit(design, np.einsum("p,prq->rq", lam, proxies))
    _, se, se_queries, se_coalitions = summarize(own.values, np.hypot(own.se_coalitions, cheap.se_coalitions))
    attribution = replace(
        own,
        standard_error=se,
        se_queries=se_queries,
        se_coalitions=se_coalitions,
        dropped_queries=oracle.dropped_queries,
        base_values=oracle.base_values,
        full_values=oracle.full_values,
        method=f"calibrated_{explainer.method}",
        settings={
            **oracle.settings,
            "n_proxy_coalitions": design.n_coalitions,
            "lam": lam.tolist(),
            "se_target": own.se_coalitions.tolist(),
            "se_proxy": cheap.se_coalitions.tolist(),
        },
    )
    return CalibratedAttribution(
        attribution=attribution,
        lam=lam,
        rho2=min(max(explained, 0.0), 1 - 1e-12),
        rho2_values=_squared_correlation(target, np.einsum("p,prq->rq", lam, proxies[:, rows])),
        n_target=len(rows),
        n_proxy=design.n_coalitions,
        oracle=oracle,
    )


def _measured_design(
    design: Design, measured: ArrayLike, given: Design | None
) -> tuple[NDArray[np.int64], Design]:
    rows = np.asarray(measured)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(np.unique(rows)) != len(rows):
        raise InputError(
            "measured: distinct row numbers of the design are needed.", hint="Use choose_measured."
        )
    if len(rows) and (rows.min() < 0 or rows.max() >= design.n_coalitions):
        raise InputError(
            f"measured: rows from 0 to {design.n_coalitions - 1} exist; got {rows.min()} to {rows.max()}.",
            hint="Use choose_measured.",
        )
    if not {design.empty_row, design.full_row} <= set(rows.tolist()):
        raise InputError(
            "measured lacks the empty or the full coalition; the target is always asked for both.",
            hint="Use choose_measured.",
        )
    rows = rows.astype(np.int64)
    if given is None:
        return rows, _part(design, rows)
    if not np.array_equal(given.coalitions, design.coalitions[rows]):
        raise InputError(
            "measured_design: its rows are not those of design that measured names, in that order.",
            hint="Use nested_designs.",
        )
    return rows, given


def _part(design: Design, rows: NDArray[np.int64]) -> Design:
    """The design of some of the rows, both ends among them; the others stand for those that are left out."""
    weights = design.weights[rows].copy()
    inner = ~np.isin(rows, (design.empty_row, design.full_row))
    if inner.any():
        weights[inner] *= (design.n_coalitions - 2) / inner.sum()
    return Design(design.coalitions[rows], weights, exact=design.exact and len(rows) == design.n_coalitions)


def _proxy_values(proxy_values: ArrayLike, n_coalitions: int) -> FloatArray:
    raw = np.asarray(proxy_values, dtype=np.float64)
    if raw.ndim == 2:
        raw = raw[None]
    if raw.ndim != 3 or raw.shape[1] != n_coalitions or not raw.shape[0] or not np.isfinite(raw).all():
        raise InputError(
            f"proxy_values has shape {raw.shape}: (n_proxies, {n_coalitions}, n_queries) without missing values is"
            " needed.",
            hint="Ask the proxy again for what is missing; it is cheap.",
        )
    return raw


def _pairs(design: Design) -> NDArray[np.int64]:
    """Rows that a regression sees, shape (n, 2): a coalition and its complement, or (n, 1) when not all have one."""
    seen = np.flatnonzero(design.weights > 0)
    place = dict(zip(row_keys(design.coalitions[seen]), seen.tolist(), strict=True))
    partner = [place.get(key, -1) for key in row_keys(~design.coalitions[seen])]
    if min(partner, default=-1) < 0:
        return seen[:, None]
    return np.array([(a, b) for a, b in zip(seen.tolist(), partner, strict=True) if a < b], dtype=np.int64)


def _gaps(explainer: Explainer, design: Design, values: FloatArray, pairs: NDArray[np.int64]) -> FloatArray:
    """What the additive fit leaves, mean over queries; of a pair the difference, the rest cancels in the fit."""
    left = values - explainer.fit(design, values).predict(design.coalitions)
    answered = ~np.isnan(left)
    mean = np.divide(
        np.where(answered, left, 0.0).sum(axis=1),
        answered.sum(axis=1),
        out=np.zeros(len(left)),
        where=answered.any(axis=1),
    )
    gap: FloatArray = mean[pairs[:, 0]] - mean[pairs[:, 1]] if pairs.shape[1] == 2 else mean[pairs[:, 0]]
    return np.where(np.abs(gap) > 1e-9 * np.abs(np.nan_to_num(values)).max(initial=0.0), gap, 0.0)


def _weights(x: FloatArray, y: FloatArray, used: float) -> FloatArray:
    """Non-negative weights of the proxies' residuals, shrunk towards 0; ``used``: share of the freedom that is gone."""
    from scipy.optimize import nnls

    n, p = x.shape
    size = np.sqrt((x**2).mean(axis=0))
    free = n * (1 - used) - p
    if free < 1 or not size.any():
        return np.zeros(p)
    scaled = x / np.where(size > 0, size, 1.0)
    # A unit of ridge per proxy and ten rows keeps near-equal proxies from being played against each other.
    ridge = np.sqrt(0.1) * np.eye(p) if p > 1 else np.zeros((0, p))
    found, _ = nnls(np.vstack([scaled, ridge]), np.concatenate([y, np.zeros(len(ridge))]))
    fitted = scaled @ found
    noise = float(((y - fitted) ** 2).sum()) / free
    signal = float(fitted @ fitted)
    if signal <= _EVIDENCE * p * noise:
        return np.zeros(p)
    shrunk: FloatArray = found * (1 - p * noise / signal) / np.where(size > 0, size, inf)
    return shrunk


def _squared_correlation(target: FloatArray, combined: FloatArray) -> float:
    a, b = np.nanmean(target, axis=1), combined.mean(axis=1)
    good = np.isfinite(a)
    a, b = a[good] - a[good].mean(), b[good] - b[good].mean()
    scale = float(a @ a) * float(b @ b)
    return float(a @ b) ** 2 / scale if scale > 0 else 0.0
