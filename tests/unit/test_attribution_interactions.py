"""Pairwise interactions against their definitions, and the regression that estimates them."""

from __future__ import annotations

import json
from itertools import combinations
from math import factorial

import numpy as np
import pytest

from proxyprompt.attribution import (
    Banzhaf,
    Design,
    ExactShapley,
    Interactions,
    KernelSHAP,
    Lasso,
    PairwiseInteractions,
    PermutationShapley,
    WeightedBanzhaf,
)
from proxyprompt.coalitions import enumerate_coalitions
from proxyprompt.errors import ArtifactError, InconclusiveError, InputError
from proxyprompt.testing import AdditiveGame, UnanimityGame

INDICES = ("faith-banzhaf", "faith-shap", "sii")


def random_game(n_units: int, seed: int, n_queries: int = 3, largest: int = 5) -> UnanimityGame:
    rng = np.random.default_rng(seed)
    terms = [
        (tuple(rng.permutation(n_units)[: rng.integers(1, largest + 1)]), rng.normal(size=n_queries))
        for _ in range(3 * n_units)
    ]
    return UnanimityGame(n_units, terms, base=rng.normal(size=n_queries))


def copies(z: np.ndarray) -> np.ndarray:
    """Units 0 and 1 are copies, worth 1; unit 2 is worth one half; unit 3 nothing."""
    return ((z[:, 0] | z[:, 1]) + 0.5 * z[:, 2])[:, None]


def second_difference(game: UnanimityGame, i: int, j: int, weight: object) -> np.ndarray:
    """Weighted sum of ``v(S + ij) - v(S + i) - v(S + j) + v(S)``, coalition by coalition."""
    n = game.n_units
    total = np.zeros(game.n_queries)
    others = [u for u in range(n) if u not in (i, j)]
    for size in range(n - 1):
        for members in combinations(others, size):
            rows = np.zeros((4, n), dtype=bool)
            rows[:, list(members)] = True
            rows[[0, 1], i] = True
            rows[[0, 2], j] = True
            v = game(rows)
            total += weight(size, n) * (v[0] - v[1] - v[2] + v[3])
    return total


def best_order_two(game: UnanimityGame, weight: object, *, meet_ends: bool) -> np.ndarray:
    """Constant, singles and pairs of the weighted least squares fit over all coalitions, both ends exact if asked."""
    n = game.n_units
    rows = enumerate_coalitions(n)
    i, j = np.triu_indices(n, 1)
    x = np.column_stack([np.ones(len(rows)), rows, rows[:, i] & rows[:, j]]).astype(float)
    size = rows.sum(axis=1)
    w = np.array([weight(s, n) for s in size])
    if not meet_ends:
        return np.linalg.lstsq(np.sqrt(w)[:, None] * x, np.sqrt(w)[:, None] * game(rows), rcond=None)[0]
    ends = (size == 0) | (size == n)
    kkt = np.block([[(x * w[:, None]).T @ x, x[ends].T], [x[ends], np.zeros((2, 2))]])
    right = np.vstack([(x * w[:, None]).T @ game(rows), game(rows)[ends]])
    return np.linalg.lstsq(kkt, right, rcond=None)[0][: x.shape[1]]


@pytest.mark.parametrize("seed", [0, 1])
def test_sii_is_its_definition(seed: int) -> None:
    game = random_game(5, seed)
    found = PairwiseInteractions("sii").attribute(game, 5, budget=32, rng=np.random.default_rng(0))
    for p, (i, j) in enumerate(combinations(range(5), 2)):
        expected = second_difference(
            game, i, j, lambda s, n: factorial(s) * factorial(n - s - 2) / factorial(n - 1)
        )
        np.testing.assert_allclose(found.values[:, p], expected, atol=1e-9)
    assert found.exact
    assert not found.se_coalitions.any()
    np.testing.assert_allclose(found.main_effects, game.shapley_values, atol=1e-9)


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_faith_banzhaf_is_the_best_order_two_fit_under_the_law_of_the_draw(keep: float) -> None:
    game = random_game(5, 2)
    found = PairwiseInteractions(keep=keep).attribute(game, 5, budget=32, rng=np.random.default_rng(0))
    best = best_order_two(game, lambda s, n: keep**s * (1 - keep) ** (n - s), meet_ends=False)
    np.testing.assert_allclose(found.values.T, best[6:], atol=1e-9)
    np.testing.assert_allclose(found.singles.T, best[1:6], atol=1e-9)
    np.testing.assert_allclose(found.intercept, best[0], atol=1e-9)
    for p, (i, j) in enumerate(combinations(range(5), 2)):
        by_definition = second_difference(game, i, j, lambda s, n: keep**s * (1 - keep) ** (n - 2 - s))
        np.testing.assert_allclose(found.values[:, p], by_definition, atol=1e-9)
    banzhaf = WeightedBanzhaf(keep).attribute(game, 5, budget=32, rng=np.random.default_rng(0))
    np.testing.assert_allclose(found.main_effects, banzhaf.values, atol=1e-9)


@pytest.mark.parametrize("n_units", [3, 5, 6])
def test_faith_shap_is_the_best_order_two_fit_under_the_shapley_kernel(n_units: int) -> None:
    game = random_game(n_units, 3)

    def kernel(s: int, n: int) -> float:
        return 0.0 if s in (0, n) else factorial(s - 1) * factorial(n - s - 1) / factorial(n)

    found = PairwiseInteractions("faith-shap").attribute(
        game, n_units, budget=2**n_units, rng=np.random.default_rng(0)
    )
    best = best_order_two(game, kernel, meet_ends=True)
    if n_units > 3:  # with three units the inner coalitions do not determine all pairs
        np.testing.assert_allclose(found.values.T, best[1 + n_units :], atol=1e-8)
        np.testing.assert_allclose(found.singles.T, best[1 : 1 + n_units], atol=1e-8)
    rows = enumerate_coalitions(n_units)
    np.testing.assert_allclose(found.predict(rows)[[0, -1]], game(rows)[[0, -1]], atol=1e-9)
    np.testing.assert_allclose(found.main_effects, game.shapley_values, atol=1e-9)


@pytest.mark.parametrize("index", INDICES)
def test_closed_forms(index: str) -> None:
    explainer = PairwiseInteractions(index, keep=0.5 if index == "faith-banzhaf" else None)

    def of(game: object, n: int) -> Interactions:
        return explainer.attribute(game, n, budget=2**n, rng=np.random.default_rng(0))

    np.testing.assert_allclose(of(AdditiveGame([[1.0, -2.0, 0.5, 3.0]]), 4).mean, 0, atol=1e-9)
    pair = of(UnanimityGame(4, [((0, 2), 1.5)]), 4).mean
    expected = np.zeros((4, 4))
    expected[0, 2] = expected[2, 0] = 1.5
    np.testing.assert_allclose(pair, expected, atol=1e-9)
    twins = of(copies, 4)
    np.testing.assert_allclose(twins.mean[0], [0, -1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(twins.main_effects[0], [0.5, 0.5, 0.5, 0], atol=1e-9)
    assert twins.redundant() == [(0, 1)]
    assert of(AdditiveGame([[1.0, 2.0, 0.1]]), 3).redundant() == []
    # A pair that harms as one is not redundant, though its interaction is negative.
    assert of(UnanimityGame(3, [((0, 1), -1.0)]), 3).redundant() == []


@pytest.mark.parametrize("index", INDICES)
def test_a_compressor_learns_that_one_of_two_copies_may_go_but_not_both(index: str) -> None:
    found = PairwiseInteractions(index).attribute(copies, 4, budget=16, rng=np.random.default_rng(0))
    np.testing.assert_allclose(found.marginal([True, True, True, True]), [0, 0, 0.5, 0], atol=1e-9)
    np.testing.assert_allclose(found.marginal([False, True, True, True]), [0, 1, 0.5, 0], atol=1e-9)
    rows = enumerate_coalitions(4)
    np.testing.assert_allclose(found.predict(rows), copies(rows), atol=1e-9)
    for row in rows[[3, 5, 14]]:
        for unit in range(4):
            both = np.array([row, row])
            both[:, unit] = [True, False]
            gap = -np.diff(found.predict(both).mean(axis=1))[0]
            assert found.marginal(row)[unit] == pytest.approx(gap, abs=1e-9)


def test_the_estimate_is_ordinary_least_squares_on_games_of_pairs() -> None:
    game = random_game(9, 4, largest=2)
    found = PairwiseInteractions(keep=0.6).attribute(game, 9, budget=120, rng=np.random.default_rng(0))
    exact = PairwiseInteractions(keep=0.6).attribute(game, 9, budget=512, rng=np.random.default_rng(0))
    assert not found.exact
    assert found.shrinkage == pytest.approx(1)
    np.testing.assert_allclose(found.values, exact.values, atol=1e-7)
    np.testing.assert_allclose(found.singles, exact.singles, atol=1e-7)
    np.testing.assert_allclose(found.intercept, exact.intercept, atol=1e-7)
    np.testing.assert_allclose(found.se_pairs, 0, atol=1e-7)


@pytest.mark.parametrize("budget", [60, 150])
def test_the_estimate_is_the_textbook_ridge_of_its_penalty(budget: int) -> None:
    """Fewer coalitions than pairs (91) and more: the normal equations, at the penalty that fits ``shrinkage``."""
    game = random_game(14, 5, n_queries=2)
    design = PairwiseInteractions(keep=0.5).design(14, budget, rng=np.random.default_rng(0))
    found = PairwiseInteractions(keep=0.5).fit(design, game(design.coalitions))
    root = np.sqrt(design.weights / design.weights.mean())[:, None]  # rows count by their weight
    features = root * _features(design.coalitions)
    units, pairs = features[:, :15], features[:, 15:]
    power = np.linalg.svd(pairs - units @ np.linalg.lstsq(units, pairs, rcond=None)[0], compute_uv=False) ** 2
    values = root * game(design.coalitions)

    def shares(log_penalty: float) -> float:
        return float((power / (power + np.exp(log_penalty))).sum() / 91)

    low, high = -20.0, 30.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle) > found.shrinkage else (low, middle)
    x = np.column_stack([units, pairs])
    penalty = np.diag([0.0] * 15 + [np.exp(low)] * 91)
    solution = np.linalg.solve(x.T @ x + penalty, x.T @ values)
    np.testing.assert_allclose(found.values.T, 4 * solution[15:], atol=1e-6)
    np.testing.assert_allclose(found.main_effects.T, 2 * solution[1:15], atol=1e-6)
    np.testing.assert_allclose(root * found.predict(design.coalitions), x @ solution, atol=1e-6)
    assert 0.02 < found.shrinkage < 0.99
    # Its standard error: HC3 with leave-one-out residuals of the mean value, by refitting without each row.
    mean = values.mean(axis=1)
    gaps = np.empty(len(x))
    for row in range(len(x)):
        rest = np.arange(len(x)) != row
        beta = np.linalg.solve(x[rest].T @ x[rest] + penalty, x[rest].T @ mean[rest])
        gaps[row] = mean[row] - x[row] @ beta
    linear = np.linalg.solve(x.T @ x + penalty, x.T)[15:]
    np.testing.assert_allclose(found.se_pairs, 4 * np.sqrt(linear**2 @ gaps**2), rtol=1e-4)


def test_the_penalty_is_the_one_of_least_leave_one_out_error() -> None:
    """Parities of three units are nothing to pairs: they are shrunk away. Strong pairs are kept."""
    rng = np.random.default_rng(0)
    rows = PairwiseInteractions(keep=0.5).design(16, 400, rng=rng)
    z = 2.0 * rows.coalitions - 1
    noise = sum(rng.normal() * z[:, rng.permutation(16)[:3]].prod(axis=1) for _ in range(40))
    none = PairwiseInteractions(keep=0.5).fit(rows, noise[:, None])
    strong = sum(rng.normal() * z[:, rng.permutation(16)[:2]].prod(axis=1) for _ in range(60))
    plenty = PairwiseInteractions(keep=0.5).fit(rows, (5 * strong + noise)[:, None])
    assert none.shrinkage < 0.3 < 0.9 < plenty.shrinkage


@pytest.mark.parametrize("budget", [98, 320])
def test_pairs_that_do_not_interact_are_rarely_called_redundant(budget: int) -> None:
    n = 24
    far, called = [], 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        worth = np.abs(rng.normal(size=n))
        triples = [(rng.permutation(n)[:3], 0.2 * rng.normal()) for _ in range(60)]

        def game(z: np.ndarray, worth: np.ndarray = worth, triples: list = triples) -> np.ndarray:
            s = 2.0 * z - 1
            return (z @ worth + sum(k * s[:, t].prod(axis=1) for t, k in triples))[:, None]

        found = PairwiseInteractions(keep=0.5).attribute(game, n, budget=budget, rng=rng)
        far.append(np.abs(found.values[0]) > 1.96 * found.se_pairs)
        called += bool(found.redundant(0.95))
    assert 0.005 <= np.mean(far) <= 0.06
    assert called <= 3


@pytest.mark.parametrize(("budget", "among"), [(98, 5), (300, 1)])
def test_planted_copies_are_found(budget: int, among: int) -> None:
    n, found_it = 24, 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        worth = 0.3 * np.abs(rng.normal(size=n))
        worth[[4, 9]] = 0.8
        triples = [(rng.permutation(n)[:3], 0.3 * rng.normal()) for _ in range(n)]

        def game(z: np.ndarray, worth: np.ndarray = worth, triples: list = triples) -> np.ndarray:
            v = z @ worth - 0.8 * (z[:, 4] & z[:, 9])
            return (v + sum(k * z[:, t].prod(axis=1) for t, k in triples))[:, None]

        found = PairwiseInteractions(keep=0.5).attribute(game, n, budget=budget, rng=rng)
        order = np.argsort(found.mean[np.triu_indices(n, 1)])[:among]
        pairs = list(zip(*(side[order].tolist() for side in np.triu_indices(n, 1)), strict=True))
        found_it += (4, 9) in pairs
        if budget == 300:
            assert (4, 9) in found.redundant()
    assert found_it >= 8


def test_missing_rows_are_left_out_of_their_query() -> None:
    """At the common penalty: the normal equations of the rows that are there."""
    game = random_game(10, 6, n_queries=20, largest=2)
    explainer = PairwiseInteractions(keep=0.5)
    design = explainer.design(10, 200, rng=np.random.default_rng(0))
    values = game(design.coalitions)
    holes = values.copy()
    holes[[5, 30, 31], 2] = np.nan
    holes[7] = np.nan
    found = explainer.fit(design, holes)
    np.testing.assert_allclose(found.values, explainer.fit(design, values).values, atol=1e-7)
    assert not len(found.dropped_queries)
    noisy = holes + np.random.default_rng(1).normal(size=holes.shape)
    all_there = explainer.fit(design, np.where(np.isnan(noisy), 0.0, noisy))
    shrunken = explainer.fit(design, noisy)
    assert shrunken.shrinkage < 0.99
    assert not np.allclose(shrunken.values[2], all_there.values[2])
    x = _features(design.coalitions)
    rest = np.flatnonzero(~np.isnan(noisy[:, 2]) & (design.weights > 0))
    residual = design.weights[rest] * (noisy[rest, 2] - shrunken.predict(design.coalitions[rest])[:, 2])
    # Stationary: the unpenalised columns see no residual, the pairs see their penalty times the coefficient.
    np.testing.assert_allclose(x[rest, :11].T @ residual, 0, atol=1e-8)
    ratio = (x[rest, 11:].T @ residual) / (shrunken.values[2] / 4)
    assert np.ptp(ratio) < 1e-6 * abs(ratio.mean())


def _features(rows: np.ndarray) -> np.ndarray:
    psi = 2.0 * rows - 1
    i, j = np.triu_indices(rows.shape[1], 1)
    return np.column_stack([np.ones(len(psi)), psi, psi[:, i] * psi[:, j]])


def test_too_many_missing_values_are_refused_and_exact_ones_drop_the_query() -> None:
    game = random_game(4, 7, n_queries=10)
    explainer = PairwiseInteractions("sii")
    design = explainer.design(4, 16, rng=np.random.default_rng(0))
    values = game(design.coalitions)
    values[3, 4] = np.nan
    assert explainer.fit(design, values).dropped_queries.tolist() == [4]
    values[3, :4] = np.nan
    with pytest.raises(InconclusiveError, match="5 of 10 queries were dropped"):
        explainer.fit(design, values)
    explainer = PairwiseInteractions(max_missing=0.9)
    design = explainer.design(10, 60, rng=np.random.default_rng(0))
    values = np.random.default_rng(0).normal(size=(60, 8))
    values[2:52, 0] = np.nan
    with pytest.raises(InputError, match="Query 0 of those kept lacks 50 coalitions"):
        explainer.fit(design, values)


def test_a_design_already_paid_for_gives_interactions_too() -> None:
    design = WeightedBanzhaf(0.8).design(10, 200, rng=np.random.default_rng(0))
    game = random_game(10, 8, largest=2)
    found = PairwiseInteractions(keep=0.8).fit(design, game(design.coalitions))
    exact = PairwiseInteractions(keep=0.8).attribute(game, 10, budget=1024, rng=np.random.default_rng(0))
    np.testing.assert_allclose(found.values, exact.values, atol=1e-6)
    for half in (Banzhaf(), Lasso()):
        design = half.design(10, 200, rng=np.random.default_rng(0))
        found = PairwiseInteractions(keep=0.5).fit(design, game(design.coalitions))
        exact = PairwiseInteractions(keep=0.5).attribute(game, 10, budget=1024, rng=np.random.default_rng(0))
        np.testing.assert_allclose(found.values, exact.values, atol=1e-6)
    assert PairwiseInteractions().centre == WeightedBanzhaf().keep
    # All coalitions, in any order and from any technique.
    design = ExactShapley().design(5, 32, rng=np.random.default_rng(0))
    order = np.random.default_rng(1).permutation(32)
    shuffled = Design(design.coalitions[order], design.weights, exact=True)
    game = random_game(5, 9)
    np.testing.assert_allclose(
        PairwiseInteractions("sii").fit(shuffled, game(shuffled.coalitions)).values,
        PairwiseInteractions("sii").fit(design, game(design.coalitions)).values,
        atol=1e-9,
    )


def test_both_parts_of_the_standard_error() -> None:
    game = random_game(9, 10, n_queries=25)
    found = PairwiseInteractions(keep=0.5).attribute(game, 9, budget=100, rng=np.random.default_rng(0))
    i, j = np.triu_indices(9, 1)
    np.testing.assert_allclose(found.se_queries[i, j], found.values.std(axis=0, ddof=1) / 5, rtol=1e-12)
    np.testing.assert_allclose(found.se_coalitions[j, i], found.se_pairs)
    np.testing.assert_allclose(found.standard_error, np.hypot(found.se_queries, found.se_coalitions))
    np.testing.assert_allclose(found.mean, found.mean.T)
    np.testing.assert_allclose(found.mean[i, j], found.values.mean(axis=0))
    assert not np.diag(found.mean).any()
    assert (found.n_queries, found.n_units, found.n_coalitions) == (25, 9, 100)


def test_json_round_trip_and_its_errors() -> None:
    for budget in (60, 512):
        found = PairwiseInteractions(keep=0.5).attribute(
            random_game(9, 11), 9, budget=budget, rng=np.random.default_rng(0)
        )
        data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        again = Interactions.from_dict(data)
        assert again.to_dict() == found.to_dict()
        assert again.df_coalitions == found.df_coalitions
        np.testing.assert_array_equal(again.singles, found.singles)
    with pytest.raises(ArtifactError, match=r"fields \['values'\] are absent or unknown"):
        Interactions.from_dict({k: v for k, v in data.items() if k != "values"})
    with pytest.raises(InputError, match=r"values has shape \(3, 35\), \(3, 36\) is needed"):
        Interactions.from_dict(data | {"values": found.values[:, 1:].tolist()})
    with pytest.raises(InputError, match="intercept holds NaN"):
        Interactions.from_dict(data | {"intercept": [float("nan")] * 3})
    with pytest.raises(InputError, match="main_effects has shape"):
        Interactions.from_dict(data | {"main_effects": [1.0]})
    with pytest.raises(ValueError, match="read-only"):
        found.values[0, 0] = 1.0


def test_errors() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="index='stii': one of faith-banzhaf, faith-shap, sii"):
        PairwiseInteractions("stii")
    with pytest.raises(InputError, match=r"keep=0.8: sii has no such parameter"):
        PairwiseInteractions("sii", keep=0.8)
    with pytest.raises(InputError, match=r"keep=1.0: a probability"):
        PairwiseInteractions(keep=1.0)
    with pytest.raises(InputError, match=r"n_units=200: .* 200 have 19900 pairs"):
        PairwiseInteractions(keep=0.5).design(200, 2000, rng=rng)
    with pytest.raises(InputError, match="n_units=1: interactions are computed for 2 to 64"):
        PairwiseInteractions(keep=0.5).design(1, 2000, rng=rng)
    with pytest.raises(
        InputError, match="budget=97: faith-banzhaf interactions of 24 units need at least 98"
    ):
        PairwiseInteractions(keep=0.5).design(24, 97, rng=rng)
    with pytest.raises(InputError, match="budget=1000: sii interactions of 10 units need at least 1024"):
        PairwiseInteractions("sii").design(10, 1000, rng=rng)
    kernel = KernelSHAP().design(10, 100, rng=rng)
    with pytest.raises(InputError, match="cannot be estimated from this design"):
        PairwiseInteractions(keep=0.5).fit(kernel, np.zeros((100, 1)))
    orders = PermutationShapley().design(10, 100, rng=rng)
    with pytest.raises(InputError, match="cannot be estimated from this design"):
        PairwiseInteractions().fit(orders, np.zeros((orders.n_coalitions, 1)))
    drawn = Banzhaf().design(10, 100, rng=rng)
    with pytest.raises(InputError, match="sii interactions cannot be estimated"):
        PairwiseInteractions("sii").fit(drawn, np.zeros((100, 1)))
    rows = enumerate_coalitions(4)
    twice = np.vstack([rows[:15], rows[:1]])
    with pytest.raises(InputError, match=r"all 16 coalitions are needed once"):
        PairwiseInteractions(keep=0.5).fit(
            Design(np.vstack([twice[:14], rows[[15, 15]]]), np.ones(16), True), np.zeros((16, 1))
        )
    few = Design(np.vstack([rows[[0, 15]], rows[1:5]]), np.r_[0.0, 0.0, np.ones(4)], exact=False)
    with pytest.raises(InputError, match="4 coalitions do not determine the main effects of 4 units"):
        PairwiseInteractions(keep=0.5).fit(few, np.zeros((6, 1)))
    found = PairwiseInteractions(keep=0.5).attribute(copies, 4, budget=16, rng=rng)
    with pytest.raises(InputError, match="coalitions has 3 units, the interactions 4"):
        found.marginal([True, True, False])
    with pytest.raises(InputError, match="level=1: strictly between"):
        found.redundant(1)
