"""Pairwise interactions against shapiq, and order-2 surrogates against scikit-learn's regression."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import Interactions, PairwiseInteractions
from proxyprompt.coalitions import FloatArray

from .games import TableGame


def ours(game: TableGame, index: str, keep: float | None = None) -> Interactions:
    explainer = PairwiseInteractions(index, keep=keep)
    return explainer.attribute(game, game.n_units, budget=2**game.n_units, rng=np.random.default_rng(0))


def theirs(shapiq, game: TableGame, query: int, index: str) -> tuple[float, FloatArray, FloatArray]:
    """Constant, singles and pairs of shapiq's exact index of order 2."""
    found = shapiq.ExactComputer(game.of(query), n_players=game.n_units)(index, 2)
    pairs = zip(*np.triu_indices(game.n_units, 1), strict=True)
    # Looked up through the result, which gives 0 for what it does not hold: shapiq keeps no zeros.
    return (
        found[()],
        np.array([found[i,] for i in range(game.n_units)]),
        np.array([found[int(i), int(j)] for i, j in pairs]),
    )


def test_shapley_interactions_are_those_of_shapiq(game, peer) -> None:
    """Pairs and Shapley values of SII; the surrogate's singles are shapiq's aggregation k-SII."""
    shapiq = peer("shapiq")
    found = ours(game, "sii")
    for query in range(game.n_queries):
        _, values, pairs = theirs(shapiq, game, query, "SII")
        np.testing.assert_allclose(found.values[query], pairs, atol=1e-10)
        np.testing.assert_allclose(found.main_effects[query], values, atol=1e-10)
        _, singles, _ = theirs(shapiq, game, query, "k-SII")
        np.testing.assert_allclose(found.singles[query], singles, atol=1e-10)


def test_faithful_shapley_interactions_are_those_of_shapiq(game, peer) -> None:
    """Tolerance 1e-5: shapiq weighs both ends with 1e8, where ours are met exactly."""
    shapiq = peer("shapiq")
    found = ours(game, "faith-shap")
    for query in range(game.n_queries):
        constant, singles, pairs = theirs(shapiq, game, query, "FSII")
        np.testing.assert_allclose(found.values[query], pairs, atol=1e-5)
        np.testing.assert_allclose(found.singles[query], singles, atol=1e-5)
        np.testing.assert_allclose(found.intercept[query], constant, atol=1e-5)


def test_faithful_banzhaf_interactions_are_those_of_shapiq(game, peer) -> None:
    shapiq = peer("shapiq")
    found = ours(game, "faith-banzhaf", 0.5)
    for query in range(game.n_queries):
        constant, singles, pairs = theirs(shapiq, game, query, "FBII")
        np.testing.assert_allclose(found.values[query], pairs, atol=1e-8)
        np.testing.assert_allclose(found.singles[query], singles, atol=1e-8)
        np.testing.assert_allclose(found.intercept[query], constant, atol=1e-8)


@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_weighted_banzhaf_interactions_are_the_best_order_two_fit(keep: float, game, peer) -> None:
    """By scikit-learn's weighted least squares on units and products of units."""
    linear_model = peer("sklearn.linear_model")
    found = ours(game, "faith-banzhaf", keep)
    i, j = np.triu_indices(game.n_units, 1)
    z = game.all.astype(float)
    size = game.all.sum(axis=1)
    fit = linear_model.LinearRegression().fit(
        np.hstack([z, z[:, i] * z[:, j]]),
        game.values,
        sample_weight=keep**size * (1 - keep) ** (game.n_units - size),
    )
    np.testing.assert_allclose(np.hstack([found.singles, found.values]), fit.coef_, atol=1e-8)
    np.testing.assert_allclose(found.intercept, fit.intercept_, atol=1e-8)
