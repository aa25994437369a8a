"""The surrogate that compression walks along: additive, or with pairs where the coalitions carry them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxyprompt.attribution import PairwiseInteractions, WeightedBanzhaf
from proxyprompt.attribution.base import Attribution, Design
from proxyprompt.errors import InconclusiveError, InputError

from .path import Predict

__all__ = ["Surrogate", "additive_surrogate", "choose_surrogate", "corrected_surrogate"]

_FOLDS = 8
_MAX_UNITS = 64
_FEWEST = 24
_TINY = 1e-9


@dataclass(frozen=True)
class Surrogate:
    """Predicts the mean value of a coalition; whoever explained supplied the values.

    Attributes
    ----------
    predict : callable
    kind : {"additive", "pairwise"}
    why : str
    additive_error, pairwise_error : float or None
        Cross-validated root mean squared error on coalitions left out; ``None`` where pairs could not be tried.
    copies : tuple of (int, int)
        Pairs that stand in for each other with confidence (Bonferroni over all pairs), strongest first.
    """

    predict: Predict = field(repr=False)
    kind: str
    why: str
    additive_error: float | None = None
    pairwise_error: float | None = None
    copies: tuple[tuple[int, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "kind": self.kind,
            "why": self.why,
            "additive_error": self.additive_error,
            "pairwise_error": self.pairwise_error,
            "copies": [list(pair) for pair in self.copies],
        }


def additive_surrogate(attribution: Attribution, why: str) -> Surrogate:
    """The attributions themselves: ``mean intercept + sum of mean attributions``."""
    mean, intercept = attribution.mean, float(attribution.intercept.mean())
    return Surrogate(lambda rows: intercept + rows @ mean, "additive", why)


def corrected_surrogate(
    theirs: Surrogate, proposal: Attribution, verified: Attribution, *, slope: float
) -> Surrogate:
    """A surrogate of proxies with the target's effects in place of theirs; what bends stays the proxies', in its scale.

    Parameters
    ----------
    theirs : Surrogate
        Of the proxies' values.
    proposal : Attribution
        The proxies' attribution.
    verified : Attribution
        Measured on the target where it was measured; the effects that the result has.
    slope : float
        Target's units per unit of the proposal. Not above 0, or NaN: nothing of the proxies' surrogate is used.
    """
    if not slope > 0:
        return additive_surrogate(
            verified, "the target's measurements do not follow what the proxies estimate"
        )
    correction = verified.mean - slope * proposal.mean

    def predict(rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        value: NDArray[np.float64] = slope * theirs.predict(rows) + rows @ correction
        return value

    errors = [None if e is None else slope * e for e in (theirs.additive_error, theirs.pairwise_error)]
    why = f"of the proxies: {theirs.why}; effects are the target's where it measured them"
    return Surrogate(predict, theirs.kind, why, errors[0], errors[1], theirs.copies)


def choose_surrogate(
    attribution: Attribution,
    design: Design,
    values: NDArray[np.float64],
    *,
    rng: np.random.Generator,
) -> Surrogate:
    """Additive, unless a surrogate with all pairs predicts coalitions that were left out better.

    Parameters
    ----------
    attribution : Attribution
        Fitted on ``design`` and ``values``.
    design : Design
    values : float (n_coalitions, n_queries)
        NaN is missing.
    rng : numpy.random.Generator
        Draws the folds.

    Returns
    -------
    Surrogate

    Notes
    -----
    What is predicted is the mean over queries, each query's own mean taken out first, so that a missing answer
    does not shift it. With all ``2**n`` coalitions asked nothing has to be judged: the pairs are exact.
    """
    n, keep = design.n_units, float(attribution.settings.get("keep", 0.5))
    if not 2 <= n <= _MAX_UNITS:
        return additive_surrogate(attribution, f"pairs are tried for 2 to {_MAX_UNITS} demonstrations")
    ends = [design.empty_row, design.full_row]
    inner = np.setdiff1d(np.flatnonzero(design.weights > 0), ends)
    errors: tuple[float, float] | None = None
    if not design.exact and len(inner) < max(_FEWEST, 2 * n):
        return additive_surrogate(attribution, f"{len(inner)} coalitions are too few for pairs of {n}")
    try:
        interactions = PairwiseInteractions(keep=keep).fit(design, values)
        if not design.exact:
            errors = _held_out_errors(design, values, inner, ends, keep, rng)
    except (InputError, InconclusiveError) as error:
        return additive_surrogate(
            attribution, f"pairs cannot be told from the coalitions of {attribution.method} ({error})"
        )
    if errors is not None and errors[1] >= errors[0] - _TINY:
        found = additive_surrogate(
            attribution,
            "pairs do not predict coalitions that were left out better than single demonstrations do"
            f" (error {errors[1]:.3g}, without {errors[0]:.3g})",
        )
        return replace(found, additive_error=errors[0], pairwise_error=errors[1])
    why = (
        "all coalitions were asked"
        if errors is None
        else "pairs predict coalitions that were left out better than single demonstrations do"
        f" (error {errors[1]:.3g}, without {errors[0]:.3g})"
    )
    singles, pairs = interactions.singles.mean(axis=0), interactions.mean
    base = float(interactions.intercept.mean())

    def predict(rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        z = rows.astype(np.float64)
        value: NDArray[np.float64] = base + z @ singles + 0.5 * ((z @ pairs) * z).sum(axis=1)
        return value

    copies = tuple(interactions.redundant())
    additive, pairwise = errors or (None, None)
    return Surrogate(predict, "pairwise", why, additive, pairwise, copies)


def _held_out_errors(
    design: Design,
    values: NDArray[np.float64],
    inner: NDArray[np.int64],
    ends: list[int],
    keep: float,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Root mean squared error, additive and with pairs, on each coalition when its fold is left out."""
    target = np.nanmean(values - np.nanmean(values, axis=0, keepdims=True), axis=1)
    squares = np.zeros(2)
    for fold in np.array_split(rng.permutation(inner), _FOLDS):
        rows = np.r_[ends, np.setdiff1d(inner, fold)]
        part = Design(design.coalitions[rows], design.weights[rows], exact=False)
        own, judged, weight = target[rows, None], design.coalitions[fold], design.weights[fold]
        predicted = (
            WeightedBanzhaf(keep).fit(part, own).predict(judged)[:, 0],
            PairwiseInteractions(keep=keep).fit(part, own).predict(judged)[:, 0],
        )
        squares += [float(np.nansum(weight * (p - target[fold]) ** 2)) for p in predicted]
    additive, pairwise = np.sqrt(squares / design.weights[inner].sum())
    return float(additive), float(pairwise)
