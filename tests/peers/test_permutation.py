"""Permutation Shapley values against captum, along the same orders."""

from __future__ import annotations

import numpy as np

from proxyprompt.attribution import PermutationShapley

from .games import random_table


def test_values_along_given_orders_are_captums(peer) -> None:
    """Tolerance 1e-6: captum adds up in single precision."""
    torch, captum = peer("torch"), peer("captum.attr")
    game = random_table(8)
    explainer = PermutationShapley()
    design = explainer.design(8, 120, rng=np.random.default_rng(0))
    ours = explainer.fit(design, game(design.coalitions)).values
    orders = [order for pair in design.permutations.tolist() for order in (pair, pair[::-1])]
    assert len(orders) > 10
    for query in range(game.n_queries):
        sampling = captum.ShapleyValueSampling(
            lambda rows, query=query: torch.from_numpy(game.of(query)(rows.numpy() > 0.5))
        )
        sampling.permutation_generator = lambda n_features, n_samples: iter(orders[:n_samples])
        theirs = sampling.attribute(torch.ones(1, 8, dtype=torch.float64), n_samples=len(orders))
        np.testing.assert_allclose(ours[query], theirs[0].numpy(), atol=1e-6)
