"""The estimators on games with known answers, their budgets, seeds, errors and axioms."""

from itertools import combinations
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyprompt.attribution import LIME, Design, ExactShapley, KernelSHAP, LeaveOneOut
from proxyprompt.coalitions import enumerate_coalitions, shapley_kernel_coalitions
from proxyprompt.errors import InputError
from proxyprompt.testing import AdditiveGame, AirportGame, GloveGame, UnanimityGame

EXPLAINERS = [KernelSHAP(), LIME(), LeaveOneOut(), ExactShapley()]


def random_game(n_units, seed, n_queries=3):
    rng = np.random.default_rng(seed)
    terms = [
        (tuple(rng.permutation(n_units)[: rng.integers(1, min(n_units, 4) + 1)]), rng.normal(size=n_queries))
        for _ in range(3 * n_units)
    ]
    return UnanimityGame(n_units, terms, base=rng.normal(size=n_queries))


def brute_force(game):
    """Shapley values by summing over subsets, one by one."""
    n = game.n_units
    phi = np.zeros((game.n_queries, n))
    for unit in range(n):
        others = [u for u in range(n) if u != unit]
        for size in range(n):
            weight = factorial(size) * factorial(n - size - 1) / factorial(n)
            for members in combinations(others, size):
                row = np.zeros((1, n), dtype=bool)
                row[0, list(members)] = True
                with_unit = row.copy()
                with_unit[0, unit] = True
                phi[:, unit] += weight * (game(with_unit) - game(row))[0]
    return phi


@pytest.mark.parametrize("explainer", [KernelSHAP(), ExactShapley()])
@pytest.mark.parametrize(
    "game",
    [
        AdditiveGame([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]], base=[3.0, -1.0]),
        GloveGame(1),
        GloveGame(5),
        AirportGame([3.0, 1.0, 2.0, 2.0, 10.0]),
        AirportGame([2.0]),
        UnanimityGame(4, [((0, 1), 1.0), ((1, 2, 3), -2.0)]),
        random_game(7, 0),
    ],
)
def test_exact_on_closed_form_games(explainer, game):
    game.evaluations = game.calls = 0
    result = explainer.attribute(game, game.n_units, budget=2**game.n_units, rng=np.random.default_rng(0))
    np.testing.assert_allclose(result.values, game.shapley_values, atol=1e-9)
    assert result.exact
    assert not result.se_coalitions.any()
    assert (game.evaluations, game.calls) == (2**game.n_units, 1)


def test_closed_forms_agree_with_brute_force():
    for game in (GloveGame(3), AirportGame([3.0, 1.0, 2.0, 2.0]), random_game(5, 1)):
        np.testing.assert_allclose(brute_force(game), game.shapley_values, atol=1e-9)


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("budget", [64, 65, 100])
def test_budget_is_counted_and_respected(explainer, budget):
    game = random_game(6, 2)
    result = explainer.attribute(game, 6, budget=budget, rng=np.random.default_rng(0))
    assert game.calls == 1
    assert game.evaluations == result.n_coalitions <= budget


@pytest.mark.parametrize("explainer", [KernelSHAP(), LIME()])
def test_same_rng_same_result(explainer):
    def run(seed):
        return explainer.attribute(random_game(10, 3), 10, budget=60, rng=np.random.default_rng(seed))

    np.testing.assert_array_equal(run(0).values, run(0).values)
    assert (run(0).values != run(1).values).any()


@pytest.mark.parametrize(("n_units", "smallest"), [(1, 2), (2, 4), (3, 8), (4, 14), (8, 22), (24, 54)])
def test_kernel_shap_names_the_smallest_budget(n_units, smallest):
    explainer = KernelSHAP()
    assert explainer.smallest_budget(n_units) == smallest
    with pytest.raises(
        InputError, match=rf"budget={smallest - 1}: .* smallest budget that works is {smallest}"
    ):
        explainer.design(n_units, smallest - 1, rng=np.random.default_rng(0))
    for seed in range(5):
        game = random_game(n_units, seed, n_queries=1)
        result = explainer.attribute(game, n_units, budget=smallest, rng=np.random.default_rng(seed))
        np.testing.assert_allclose(result.values.sum(axis=1), result.full_values - result.base_values)


@pytest.mark.parametrize("n_units", [64, 200])
def test_kernel_shap_is_exact_for_additive_games_of_many_units(n_units):
    rng = np.random.default_rng(0)
    game = AdditiveGame(rng.normal(size=(4, n_units)))
    result = KernelSHAP().attribute(game, n_units, budget=4 * n_units, rng=rng)
    np.testing.assert_allclose(result.values, game.shapley_values, atol=1e-9)
    np.testing.assert_allclose(result.se_coalitions, 0, atol=1e-9)
    assert not result.exact


def test_kernel_shap_refuses_designs_that_do_not_determine_the_units():
    explainer = KernelSHAP()
    rows = enumerate_coalitions(6)[[0, 63, 1, 62, 2, 61, 3, 60]]
    design = Design(rows, np.array([0.0, 0.0, *[1 / 6] * 6]), exact=False)
    with pytest.raises(InputError, match="do not determine 6 units; the smallest budget that works is 18"):
        explainer.fit(design, np.zeros((8, 2)))


@pytest.mark.parametrize("budget", [54, 72, 96])
def test_planted_importance_is_found_with_two_to_four_times_n(budget):
    n_units, planted = 24, [3, 11, 17]
    rng = np.random.default_rng(0)
    effects = np.where(np.isin(np.arange(n_units), planted), 1.0, 0.02)
    terms = [((unit,), effects[unit] + 0.05 * rng.normal(size=40)) for unit in range(n_units)]
    terms += [(tuple(rng.permutation(n_units)[:2]), 0.05 * rng.normal(size=40)) for _ in range(40)]
    game = UnanimityGame(n_units, terms)
    result = KernelSHAP().attribute(game, n_units, budget=budget, rng=rng)
    assert sorted(result.ranking()[-3:].tolist()) == planted
    assert (result.lower_bound(0.99)[planted] > 0).all()


def test_standard_error_has_both_parts():
    game = random_game(10, 5, n_queries=25)
    result = KernelSHAP().attribute(game, 10, budget=60, rng=np.random.default_rng(0))
    assert (result.se_queries > 0).all()
    assert (result.se_coalitions > 0).all()
    np.testing.assert_allclose(result.se_queries, result.values.std(axis=0, ddof=1) / np.sqrt(25), rtol=1e-12)
    np.testing.assert_allclose(result.standard_error, np.hypot(result.se_queries, result.se_coalitions))
    single = KernelSHAP().attribute(
        random_game(10, 5, n_queries=1), 10, budget=60, rng=np.random.default_rng(0)
    )
    assert not single.se_queries.any()


def test_leave_one_out_by_hand():
    game = UnanimityGame(3, [((0, 1), 2.0), ((2,), -1.0)], base=0.5)
    result = LeaveOneOut().attribute(game, 3, budget=5, rng=np.random.default_rng(0))
    assert result.values.tolist() == [[2.0, 2.0, -1.0]]
    np.testing.assert_allclose(result.predict([[True, True, True], [True, False, True]]), [[1.5], [-0.5]])
    assert result.exact


def test_leave_one_out_errors():
    with pytest.raises(InputError, match="budget=4: leave-one-out of 3 units takes 5 coalitions"):
        LeaveOneOut().design(3, 4, rng=np.random.default_rng(0))
    design = Design(np.array([[False] * 3, [True] * 3, [False, True, True]]), np.ones(3), exact=True)
    with pytest.raises(InputError, match=r"lacks the full coalition without units \[1, 2\]"):
        LeaveOneOut().fit(design, np.zeros((3, 1)))


def test_exact_shapley_errors_and_any_order():
    with pytest.raises(InputError, match="budget=7: exact Shapley values of 3 units take 8"):
        ExactShapley().design(3, 7, rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="limited to 20 units"):
        ExactShapley().design(30, 100, rng=np.random.default_rng(0))
    game = random_game(4, 7)
    rows, weights = shapley_kernel_coalitions(4, 16, rng=np.random.default_rng(0))
    shuffled = Design(rows, weights, exact=True)
    np.testing.assert_allclose(
        ExactShapley().fit(shuffled, game(rows)).values, game.shapley_values, atol=1e-9
    )
    with pytest.raises(InputError, match="all 16 coalitions are needed once"):
        ExactShapley().fit(Design(rows[:10], weights[:10], exact=False), np.zeros((10, 1)))


def test_lime_is_the_reference_regression():
    """Against the textbook normal equations of a weighted ridge with free intercept."""
    rng = np.random.default_rng(0)
    game = random_game(6, 8)
    explainer = LIME()
    design = explainer.design(6, 50, rng=rng)
    values = game(design.coalitions)
    result = explainer.fit(design, values)
    x = np.column_stack([np.ones(design.n_coalitions), design.coalitions])
    penalty = np.diag([0.0, *[1.0] * 6])
    w = design.weights[:, None]
    solution = np.linalg.solve((x * w).T @ x + penalty, (x * w).T @ values)
    np.testing.assert_allclose(result.values.T, solution[1:], atol=1e-9)
    np.testing.assert_allclose(result.intercept, solution[0], atol=1e-9)
    np.testing.assert_allclose(result.predict(design.coalitions), x @ solution, atol=1e-9)


def test_lime_weights_are_kernel_times_draws():
    explainer = LIME()
    design = explainer.design(3, 5000, rng=np.random.default_rng(0))
    kept = design.coalitions.sum(axis=1)
    kernel = np.sqrt(np.exp(-((100 * (1 - np.sqrt(kept / 3)) / 25) ** 2)))
    counts = design.weights / kernel
    assert design.n_coalitions == 8
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    assert counts.sum() == pytest.approx(4999)  # the full prompt, and 4998 draws
    # Uniform on how many are removed: 1, 2 or 3 of 3, a third each.
    for size in (0, 1, 2):
        assert counts[kept == size].sum() / 4998 == pytest.approx(1 / 3, abs=0.03)


def test_lime_missing_rows_are_left_out():
    rng = np.random.default_rng(0)
    game = AdditiveGame(rng.normal(size=(6, 5)))
    explainer = LIME(alpha=0.0)
    design = explainer.design(5, 60, rng=rng)
    values = game(design.coalitions)
    values[4, 2] = np.nan
    np.testing.assert_allclose(explainer.fit(design, values).values, game.shapley_values, atol=1e-8)


def test_lime_errors():
    with pytest.raises(InputError, match="kernel_width=0: above 0"):
        LIME(kernel_width=0)
    with pytest.raises(InputError, match="alpha=-1: 0 or more"):
        LIME(alpha=-1)
    with pytest.raises(InputError, match="budget=9: LIME needs at least 10 coalitions for 8 units"):
        LIME().design(8, 9, rng=np.random.default_rng(0))
    rows = enumerate_coalitions(4)[[0, 15, 1]]
    with pytest.raises(InputError, match=r"alpha=0.0: without a penalty 3 coalitions do not determine 4"):
        LIME(alpha=0.0).fit(Design(rows, np.ones(3), exact=False), np.zeros((3, 1)))


def test_value_function_shape_is_checked():
    with pytest.raises(InputError, match=r"values has shape \(22, 2, 1\)"):
        KernelSHAP().attribute(lambda z: np.zeros((len(z), 2, 1)), 8, budget=22, rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="coalitions has 3 units, the game 2"):
        GloveGame(1)(np.zeros((1, 3), dtype=bool))


def test_game_errors():
    with pytest.raises(InputError, match="a term without units"):
        UnanimityGame(3, [((), 1.0)])
    with pytest.raises(InputError, match="n_right=0"):
        GloveGame(0)
    with pytest.raises(InputError, match="non-negative"):
        AirportGame([-1.0])


@settings(max_examples=30, deadline=None)
@given(n_units=st.integers(4, 9), seed=st.integers(0, 2**32 - 1), budget=st.integers(24, 80))
def test_efficiency_holds_for_every_query(n_units, seed, budget):
    game = random_game(n_units, seed)
    result = KernelSHAP().attribute(game, n_units, budget=budget, rng=np.random.default_rng(seed))
    gap = result.values.sum(axis=1) - (result.full_values - result.base_values)
    np.testing.assert_allclose(gap, 0, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(n_units=st.integers(2, 7), seed=st.integers(0, 2**32 - 1))
def test_symmetry_dummy_and_linearity(n_units, seed):
    rng = np.random.default_rng(seed)
    rows = enumerate_coalitions(n_units)
    swap = np.arange(n_units)
    swap[[0, 1]] = [1, 0]
    free = rng.normal(size=(len(rows), 1))
    codes = rows @ (1 << np.arange(n_units))
    lookup = np.argsort(codes)
    swapped = free[lookup[rows[:, swap] @ (1 << np.arange(n_units))]]
    symmetric = free + swapped
    without_last = free[
        lookup[np.where(np.arange(n_units) == n_units - 1, False, rows) @ (1 << np.arange(n_units))]
    ]
    other = rng.normal(size=(len(rows), 1))
    design, exact = Design(rows, np.ones(len(rows)), exact=True), ExactShapley()
    kernel_rows, weights = shapley_kernel_coalitions(n_units, 2**n_units, rng=rng)
    order = lookup[kernel_rows @ (1 << np.arange(n_units))]
    for solve in (
        lambda v: exact.fit(design, v).values,
        lambda v: KernelSHAP().fit(Design(kernel_rows, weights, exact=True), v[order]).values,
    ):
        assert np.ptp(solve(symmetric)[0, :2]) == pytest.approx(0, abs=1e-9)
        assert solve(without_last)[0, -1] == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(solve(free + 2 * other), solve(free) + 2 * solve(other), atol=1e-9)


def test_lime_is_judged_in_its_own_neighbourhood() -> None:
    """The number removed is uniform on 1..n, as in its design; nothing fitted on is judged on [PE 4.2]."""
    fitted = LIME().design(12, 60, rng=np.random.default_rng(0)).coalitions
    drawn = LIME().held_out(12, 2000, rng=np.random.default_rng(1), exclude=fitted)
    keys = {row.tobytes() for row in drawn}
    assert len(keys) == len(drawn) == 2000
    assert not keys & {row.tobytes() for row in fitted}
    many = LIME().held_out(30, 3000, rng=np.random.default_rng(2), exclude=np.zeros((0, 30), dtype=bool))
    removed = 30 - many.sum(axis=1)
    inner = np.bincount(removed, minlength=31)[4:27]  # few distinct rows exist near the ends
    assert inner.min() > 60
    assert inner.max() < 170
    last = LIME().held_out(
        4,
        9,
        rng=np.random.default_rng(3),
        exclude=LIME().design(4, 8, rng=np.random.default_rng(4)).coalitions,
    )
    assert len({row.tobytes() for row in last}) == 9
