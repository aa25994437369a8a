"""Ensembles: the mean of several proxies' attributions, each model on its own scale.

Models differ in the scale of their log-probabilities by a factor of three and more, so a plain mean is the
attribution of the loudest model. Proxies of different families err differently; their mean agrees better with a
target than the best of them does, at no cost to the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from proxyprompt.coalitions import FloatArray
from proxyprompt.errors import InputError

from .base import Attribution, summarize

__all__ = ["ensemble", "ensemble_weights", "standardized"]


def standardized(attribution: Attribution) -> FloatArray:
    """Per-query attributions in units of the model's typical size.

    Parameters
    ----------
    attribution : Attribution

    Returns
    -------
    ndarray of float64, shape (n_queries, n_units)
        Divided by their root mean square over all queries and units; zeros stay.

    Notes
    -----
    A z-score about zero and not about a mean: zero says "no effect", and moving it would make a unit that helps
    look harmful where the others help more. One scale a model and not one a query: on recorded closed models
    a scale for every query loses a tenth of rho2, since proxies know something about which queries
    the units matter for most (``benchmarks/screening/``).

    Examples
    --------
    >>> from proxyprompt.attribution import LeaveOneOut
    >>> game = lambda rows: rows @ np.array([[3.0], [4.0]])
    >>> found = LeaveOneOut().attribute(game, 2, budget=4, rng=np.random.default_rng(0))
    >>> (standardized(found) * np.sqrt(12.5)).round(6).tolist()
    [[3.0, 4.0]]
    """
    size = _size(attribution)
    return attribution.values / size if size > 0 else np.zeros(attribution.values.shape)


def ensemble(members: Sequence[Attribution]) -> Attribution:
    """Mean over models of their standardised attributions.

    Parameters
    ----------
    members : sequence of Attribution
        At least two, by one explainer on one design, of the same units and queries with none dropped.

    Returns
    -------
    Attribution
        ``values`` are the mean of :func:`standardized`, times the members' mean size, so that they read in units of
        the value function while every model counts the same. ``base_values``, ``full_values`` and ``intercept``
        are the members' means. ``se_coalitions`` adds up the members' errors as if they were fully
        correlated, which is the most they can be: the members share their coalitions.

    Raises
    ------
    InputError
        When the members do not belong together.

    Examples
    --------
    >>> from proxyprompt.attribution import LeaveOneOut
    >>> def attribution(weights):
    ...     game = lambda rows: rows @ np.array(weights)[:, None]
    ...     return LeaveOneOut().attribute(game, 2, budget=4, rng=np.random.default_rng(0))
    >>> ensemble([attribution([1.0, 0.0]), attribution([30.0, 40.0])]).ranking().tolist()
    [1, 0]
    """
    if len(members) < 2:
        raise InputError(f"members: {len(members)} given; an ensemble has at least two.")
    first = members[0]
    if any(
        m.values.shape != first.values.shape
        or m.method != first.method
        or m.n_coalitions != first.n_coalitions
        or len(m.dropped_queries)
        for m in members
    ):
        raise InputError(
            "members: they differ in queries, units, explainer or coalitions, or some queries were dropped.",
            hint="Explain the same queries with every model, on one design.",
        )
    scale = float(np.mean([_size(m) for m in members]))
    values = scale * np.mean([standardized(m) for m in members], axis=0)
    se = np.zeros(first.n_units)
    for m in members:
        size = _size(m)
        se += (scale / size if size > 0 else 0.0) * m.se_coalitions / len(members)
    mean, standard_error, se_queries, se_coalitions = summarize(values, se)
    return Attribution(
        values=values,
        mean=mean,
        standard_error=standard_error,
        se_queries=se_queries,
        se_coalitions=se_coalitions,
        base_values=np.mean([m.base_values for m in members], axis=0),
        full_values=np.mean([m.full_values for m in members], axis=0),
        intercept=np.mean([m.intercept for m in members], axis=0),
        n_coalitions=first.n_coalitions,
        exact=all(m.exact for m in members),
        method=first.method,
        settings={**first.settings, "ensemble": len(members)},
        df_coalitions=min(m.df_coalitions for m in members),
    )


def ensemble_weights(members: Sequence[Attribution]) -> FloatArray:
    """What each member's values count for in :func:`ensemble`.

    Parameters
    ----------
    members : sequence of Attribution
        As for :func:`ensemble`.

    Returns
    -------
    ndarray of float64, shape (n_members,)
        With an explainer that is linear in the values, the attribution of the members' values, added up with
        these weights, is the ensemble's.

    Examples
    --------
    >>> from proxyprompt.attribution import LeaveOneOut
    >>> fit = lambda w: LeaveOneOut().attribute(lambda r: r @ np.array([[w], [w]]), 2, budget=4,
    ...     rng=np.random.default_rng(0))
    >>> ensemble_weights([fit(1.0), fit(3.0)]).round(6).tolist()
    [1.0, 0.333333]
    """
    sizes = np.array([_size(m) for m in members])
    weights: FloatArray = np.divide(
        sizes.mean() / len(members), sizes, out=np.zeros(len(sizes)), where=sizes > 0
    )
    return weights


def _size(attribution: Attribution) -> float:
    return float(np.sqrt((attribution.values**2).mean()))
