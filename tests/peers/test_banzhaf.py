"""(Weighted) Banzhaf values against shapiq, and their regression against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import Banzhaf, WeightedBanzhaf

from .games import random_table


@pytest.mark.parametrize("explainer", [Banzhaf(), WeightedBanzhaf(keep=0.5)], ids=lambda e: e.method)
def test_banzhaf_values_are_those_of_shapiq(explainer, game, peer) -> None:
    shapiq = peer("shapiq")
    ours = explainer.attribute(game, game.n_units, budget=2**game.n_units, rng=np.random.default_rng(0))
    assert ours.exact
    for query in range(game.n_queries):
        theirs = shapiq.ExactComputer(game.of(query), n_players=game.n_units)("BV").get_n_order_values(1)
        np.testing.assert_allclose(ours.values[query], theirs, atol=1e-10)


@pytest.mark.parametrize("keep", [0.2, 0.8, 0.95])
def test_weighted_banzhaf_values_follow_from_shapiqs_moebius_transform(keep: float, game, peer) -> None:
    """A unit collects each dividend it takes part in when all the others do: with probability keep ** (size - 1)."""
    shapiq = peer("shapiq")
    ours = WeightedBanzhaf(keep=keep).attribute(
        game, game.n_units, budget=2**game.n_units, rng=np.random.default_rng(0)
    )
    for query in range(game.n_queries):
        dividends = shapiq.ExactComputer(game.of(query), n_players=game.n_units)("Moebius")
        theirs = np.zeros(game.n_units)
        for units, place in dividends.interaction_lookup.items():
            for unit in units:
                theirs[unit] += dividends.values[place] * keep ** (len(units) - 1)
        np.testing.assert_allclose(ours.values[query], theirs, atol=1e-10)


def test_the_regression_on_drawn_coalitions_is_scikit_learns(peer) -> None:
    linear_model = peer("sklearn.linear_model")
    game = random_table(9)
    explainer = WeightedBanzhaf(keep=0.7)
    design = explainer.design(9, 80, rng=np.random.default_rng(0))
    ours = explainer.fit(design, game(design.coalitions))
    used = design.weights > 0
    theirs = linear_model.LinearRegression().fit(
        design.coalitions[used], game(design.coalitions[used]), sample_weight=design.weights[used]
    )
    np.testing.assert_allclose(ours.values, theirs.coef_, atol=1e-10)
    np.testing.assert_allclose(ours.intercept, theirs.intercept_, atol=1e-10)
