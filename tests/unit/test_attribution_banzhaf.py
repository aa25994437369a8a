"""Banzhaf values: their definition, and the estimate between few coalitions and all of them."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import Banzhaf, WeightedBanzhaf
from proxyprompt.coalitions import enumerate_coalitions
from proxyprompt.errors import InputError
from proxyprompt.testing import AdditiveGame, UnanimityGame


def random_game(n_units: int, seed: int) -> UnanimityGame:
    rng = np.random.default_rng(seed)
    terms = [
        (tuple(rng.permutation(n_units)[: rng.integers(1, 5)]), rng.normal(size=3))
        for _ in range(3 * n_units)
    ]
    return UnanimityGame(n_units, terms, base=1.0)


def by_sample_reuse(game: UnanimityGame) -> np.ndarray:
    """Mean value of the coalitions with a unit less that of those without it, over all coalitions."""
    rows = enumerate_coalitions(game.n_units)
    values = game(rows)
    return np.array([values[rows[:, u]].mean(0) - values[~rows[:, u]].mean(0) for u in range(game.n_units)]).T


def test_exact_values_are_those_of_maximum_sample_reuse_over_all_coalitions() -> None:
    game = random_game(6, 0)
    found = Banzhaf().attribute(game, 6, budget=64, rng=np.random.default_rng(0))
    np.testing.assert_allclose(found.values, by_sample_reuse(game), atol=1e-9)
    assert found.exact
    assert found.method == "banzhaf"
    assert "keep" not in found.settings


def test_least_squares_errs_less_than_maximum_sample_reuse_on_the_same_coalitions() -> None:
    game = random_game(14, 1)
    truth = by_sample_reuse(game).mean(axis=0)
    ours, reuse, claimed = [], [], []
    for seed in range(100):
        design = Banzhaf().design(14, 100, rng=np.random.default_rng(seed))
        values = game(design.coalitions)
        found = Banzhaf().fit(design, values)
        ours.append(found.mean - truth)
        claimed.append(np.abs(ours[-1]) <= 1.96 * found.se_coalitions)
        rows, mean = design.coalitions[2:], values[2:].mean(axis=1)
        reuse.append(
            np.array([mean[rows[:, u]].mean() - mean[~rows[:, u]].mean() for u in range(14)]) - truth
        )
    assert np.mean(np.square(ours)) < 0.6 * np.mean(np.square(reuse))
    assert 0.92 <= np.mean(claimed) <= 0.99


def test_both_ends_count_for_what_they_are_as_the_budget_nears_all_coalitions() -> None:
    """With all but one coalition the estimate is all but exact; leaving both ends out would bias it."""
    ends = UnanimityGame(5, [((0, 1, 2, 3, 4), 30.0)])
    exact = Banzhaf().attribute(ends, 5, budget=32, rng=np.random.default_rng(0)).mean
    for explainer in (Banzhaf(), WeightedBanzhaf(0.5)):
        ours = []
        for seed in range(40):
            found = explainer.attribute(ends, 5, budget=31, rng=np.random.default_rng(seed))
            ours.append(found.mean)
            assert found.n_coalitions == 31
        np.testing.assert_allclose(np.mean(ours, axis=0), exact, rtol=0.05)


def test_additive_games_are_exact_from_few_coalitions_and_too_few_are_refused() -> None:
    game = AdditiveGame(np.linspace(-1, 1, 30))
    found = Banzhaf().attribute(game, 30, budget=43, rng=np.random.default_rng(0))
    np.testing.assert_allclose(found.mean, np.linspace(-1, 1, 30), atol=1e-9)
    assert game.evaluations == 43
    with pytest.raises(InputError, match=r"budget=42: .* need at least 43"):
        Banzhaf().design(30, 42, rng=np.random.default_rng(0))
