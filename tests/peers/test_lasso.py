"""The lasso against scikit-learn's, on standardised columns as ContextCite sets it up."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import Lasso

from .games import random_table


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.4])
@pytest.mark.parametrize(("n_units", "budget"), [(8, 40), (8, 256), (16, 20)])
def test_coefficients_are_scikit_learns(n_units: int, budget: int, alpha: float, peer) -> None:
    linear_model, preprocessing = peer("sklearn.linear_model"), peer("sklearn.preprocessing")
    game = random_table(n_units, 4)
    explainer = Lasso(alpha)
    design = explainer.design(n_units, budget, rng=np.random.default_rng(3))
    ours = explainer.fit(design, game(design.coalitions))
    rows = design.coalitions[design.weights > 0]
    scaler = preprocessing.StandardScaler().fit(rows.astype(float))
    for query in range(4):
        theirs = linear_model.Lasso(alpha=alpha, tol=1e-12, max_iter=200_000)
        theirs.fit(scaler.transform(rows.astype(float)), game(rows)[:, query])
        slopes = theirs.coef_ / scaler.scale_
        np.testing.assert_allclose(ours.values[query], slopes, atol=1e-6)
        np.testing.assert_allclose(
            ours.intercept[query], theirs.intercept_ - slopes @ scaler.mean_, atol=1e-6
        )
    if alpha == 0.4:
        assert (ours.values == 0).any(), "a strong penalty leaves units without credit"
