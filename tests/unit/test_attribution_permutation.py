"""Permutation Shapley: unbiased, paid for once, honest about its error and about missing values."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.special import stdtrit

from proxyprompt.attribution import Design, PermutationDesign, PermutationShapley
from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.testing import AdditiveGame, AirportGame, GloveGame, UnanimityGame


def random_game(n_units: int, seed: int, n_queries: int = 3) -> UnanimityGame:
    rng = np.random.default_rng(seed)
    terms = [
        (tuple(rng.permutation(n_units)[: rng.integers(1, 6)]), rng.normal(size=n_queries))
        for _ in range(3 * n_units)
    ]
    return UnanimityGame(n_units, terms, base=rng.normal(size=n_queries))


def by_hand(game: UnanimityGame, orders: np.ndarray) -> np.ndarray:
    """Marginal contributions along each order and its reverse, one call at a time."""
    total = np.zeros((game.n_queries, game.n_units))
    for order in [*orders.tolist(), *orders[:, ::-1].tolist()]:
        kept = np.zeros((1, game.n_units), dtype=bool)
        before = game(kept)
        for unit in order:
            kept[0, unit] = True
            after = game(kept)
            total[:, unit] += (after - before)[0]
            before = after
    return total / (2 * len(orders))


@pytest.mark.parametrize("game", [GloveGame(3), AirportGame([3.0, 1.0, 2.0, 2.0, 10.0]), random_game(7, 0)])
def test_exact_when_all_coalitions_fit(game: UnanimityGame) -> None:
    n = game.n_units
    result = PermutationShapley().attribute(game, n, budget=2**n, rng=np.random.default_rng(0))
    np.testing.assert_allclose(result.values, game.shapley_values, atol=1e-9)
    assert result.exact
    assert result.method == "permutation_shapley"
    assert not result.se_coalitions.any()


def test_the_fit_is_the_mean_over_the_orders_of_the_design() -> None:
    game = random_game(9, 1)
    design = PermutationShapley().design(9, 120, rng=np.random.default_rng(0))
    result = PermutationShapley().fit(design, game(design.coalitions))
    np.testing.assert_allclose(result.values, by_hand(game, design.permutations), atol=1e-9)
    np.testing.assert_allclose(result.values.sum(axis=1), result.full_values - result.base_values, atol=1e-9)
    assert result.df_coalitions == len(design.permutations) - 1


@pytest.mark.parametrize(("n_units", "budget"), [(5, 18), (5, 31), (10, 90), (24, 94), (24, 300)])
def test_coalitions_are_paid_for_once_and_the_budget_is_used(n_units: int, budget: int) -> None:
    design = PermutationShapley().design(n_units, budget, rng=np.random.default_rng(2))
    assert len(np.unique(design.coalitions, axis=0)) == design.n_coalitions <= budget
    pairs = len(design.permutations)
    assert pairs >= (budget - 2) // (2 * (n_units - 1))
    assert budget - design.n_coalitions < 2 * (n_units - 1)
    both = np.vstack([design.permutations, design.permutations[:, ::-1]])
    assert len(np.unique(both, axis=0)) == 2 * pairs
    again = PermutationShapley().design(n_units, budget, rng=np.random.default_rng(2))
    np.testing.assert_array_equal(design.coalitions, again.coalitions)


@pytest.mark.parametrize(("n_units", "budget"), [(4, 15), (5, 28)])
def test_unbiased_in_spite_of_the_stopping_rule_and_of_sharing_coalitions(n_units: int, budget: int) -> None:
    """With few units pairs share most of their coalitions, and which pairs fit depends on what they share."""
    game = random_game(n_units, 1)
    means = []
    for seed in range(500):
        result = PermutationShapley().attribute(game, n_units, budget=budget, rng=np.random.default_rng(seed))
        means.append(result.mean)
    gap = np.mean(means, axis=0) - game.shapley_values.mean(axis=0)
    assert (np.abs(gap) < 4 * np.std(means, axis=0) / np.sqrt(500)).all()


@pytest.mark.parametrize(("n_units", "budget"), [(5, 18), (10, 74), (24, 400)])
def test_intervals_cover_and_the_standard_error_is_the_spread(n_units: int, budget: int) -> None:
    game = random_game(n_units, 1)
    truth = game.shapley_values.mean(axis=0)
    errors, claimed, inside = [], [], 0.0
    for seed in range(150):
        a = PermutationShapley().attribute(game, n_units, budget=budget, rng=np.random.default_rng(seed))
        errors.append(a.mean - truth)
        claimed.append(a.se_coalitions)
        width = stdtrit(a.df_coalitions, 0.975) * a.se_coalitions
        inside += float((np.abs(a.mean - truth) <= width).mean()) / 150
    assert np.sqrt(np.mean(np.square(claimed)) / np.mean(np.square(errors))) == pytest.approx(1, abs=0.15)
    assert inside >= 0.94


def test_antithetic_pairs_are_exact_on_games_of_pairs() -> None:
    game = UnanimityGame(12, [((i, j), 0.1 * i - 0.3 * j) for i in range(12) for j in range(i)])
    result = PermutationShapley().attribute(game, 12, budget=46, rng=np.random.default_rng(0))
    np.testing.assert_allclose(result.values, game.shapley_values, atol=1e-9)
    np.testing.assert_allclose(result.se_coalitions, 0, atol=1e-9)


def test_a_pair_with_a_missing_value_is_left_out_for_that_query_only() -> None:
    game = random_game(8, 2, n_queries=10)
    explainer = PermutationShapley()
    design = explainer.design(8, 100, rng=np.random.default_rng(0))
    values = game(design.coalitions)
    complete = explainer.fit(design, values)
    prefix = np.zeros(8, dtype=bool)
    prefix[design.permutations[1][:4]] = True
    row = int(np.flatnonzero((design.coalitions == prefix).all(axis=1))[0])
    values[row, 3] = np.nan
    hit = [
        order
        for order in design.permutations
        if any((np.isin(np.arange(8), walk[:4]) == prefix).all() for walk in (order, order[::-1]))
    ]
    others = np.array([o for o in design.permutations if not any((o == h).all() for h in hit)])
    result = explainer.fit(design, values)
    assert 1 <= len(hit) < len(design.permutations) - 1
    np.testing.assert_allclose(result.values[3], by_hand(game, others)[3], atol=1e-9)
    np.testing.assert_allclose(np.delete(result.values, 3, 0), np.delete(complete.values, 3, 0), atol=1e-12)
    np.testing.assert_allclose(result.values.sum(axis=1), result.full_values - result.base_values, atol=1e-9)
    assert (result.se_coalitions > 0).all()


def test_the_standard_error_with_missing_values_is_that_of_the_influence_of_each_pair() -> None:
    """Against a jackknife: leave each pair out of every query, refit."""
    game = random_game(8, 2, n_queries=4)
    explainer = PermutationShapley(max_missing=0.5)
    design = explainer.design(8, 160, rng=np.random.default_rng(0))
    values = game(design.coalitions)
    values[[20, 51], [1, 2]] = np.nan
    pairs = len(design.permutations)
    left_out = []
    for k in range(pairs):
        rest = PermutationDesign(
            design.coalitions, design.weights, False, permutations=np.delete(design.permutations, k, axis=0)
        )
        left_out.append(explainer.fit(rest, values).mean)
    own = (pairs - 1) * np.var(left_out, axis=0)  # variance over pairs, divided by their number, squared
    expected = (2 * own.mean() + (pairs - 1) * own) / (pairs + 1)
    np.testing.assert_allclose(explainer.fit(design, values).se_coalitions ** 2, expected, rtol=0.1)


def test_the_standard_error_knows_that_pairs_are_drawn_without_replacement() -> None:
    """Four units have twelve pairs of orders: by hand, with the share that is not in the design."""
    game = random_game(4, 5)
    design = PermutationShapley().design(4, 15, rng=np.random.default_rng(0))
    m = len(design.permutations)
    each = np.array([by_hand(game, order[None]).mean(axis=0) for order in design.permutations])
    own = each.var(axis=0, ddof=1)
    pooled = (2 * own.mean() + (m - 1) * own) / (m + 1)
    expected = np.sqrt((1 - m / 12) * pooled / m)
    assert 2 <= m < 12
    np.testing.assert_allclose(
        PermutationShapley().fit(design, game(design.coalitions)).se_coalitions, expected, rtol=1e-9
    )


def test_a_query_with_fewer_than_two_whole_pairs_is_dropped_or_refused() -> None:
    game = random_game(10, 3, n_queries=10)
    explainer = PermutationShapley()
    design = explainer.design(10, 60, rng=np.random.default_rng(0))
    values = game(design.coalitions)
    values[[5, 45], 7] = np.nan  # of the first and of the last of three pairs
    assert len(design.permutations) == 3
    result = explainer.fit(design, values)
    assert result.dropped_queries.tolist() == [7]
    np.testing.assert_allclose(
        result.values, np.delete(by_hand(game, design.permutations), 7, axis=0), atol=1e-9
    )
    values[[5, 45], :3] = np.nan
    with pytest.raises(InconclusiveError, match="4 of 10 queries were dropped"):
        explainer.fit(design, values)


def test_errors() -> None:
    explainer = PermutationShapley()
    with pytest.raises(InputError, match="budget=37: two orders of 10 units and their reverses take 38"):
        explainer.design(10, 37, rng=np.random.default_rng(0))
    design = explainer.design(6, 30, rng=np.random.default_rng(0))
    plain = Design(design.coalitions, design.weights, exact=False)
    with pytest.raises(InputError, match="does not say which orders"):
        explainer.fit(plain, np.zeros((plain.n_coalitions, 1)))
    with pytest.raises(InputError, match="two or more orders of 6 units"):
        PermutationDesign(design.coalitions, design.weights, False, permutations=design.permutations[:1])
    with pytest.raises(InputError, match="two or more orders of 6 units"):
        PermutationDesign(design.coalitions, design.weights, False, permutations=np.zeros((2, 6)))
    have = {tuple(order) for order in design.permutations.tolist()}
    absent = next(o for o in permutations(range(6)) if o not in have and o[::-1] not in have)
    odd = np.vstack([design.permutations, absent])
    with pytest.raises(InputError, match=f"lack a prefix of order {len(odd) - 1}"):
        explainer.fit(
            PermutationDesign(design.coalitions, design.weights, False, permutations=odd),
            np.zeros((design.n_coalitions, 1)),
        )


@pytest.mark.parametrize("n_units", [1, 2, 3])
def test_few_units_are_exact_from_the_smallest_budget_on(n_units: int) -> None:
    game = AdditiveGame(np.arange(1.0, n_units + 1))
    smallest = PermutationShapley.smallest_budget(n_units)
    result = PermutationShapley().attribute(game, n_units, budget=smallest, rng=np.random.default_rng(0))
    assert (result.exact, result.n_coalitions) == (True, 2**n_units)
    np.testing.assert_allclose(result.values, game.shapley_values, atol=1e-12)
