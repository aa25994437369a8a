"""SurrogateSHAP: closed forms of its kernel, exactness, missing values, standard errors, edge cases."""

import numpy as np
import pytest

from proxyprompt.attribution import Design, ExactShapley, KernelSHAP, SurrogateSHAP
from proxyprompt.attribution._cube_kernel import CubeKernel, shapley_weights
from proxyprompt.coalitions import enumerate_coalitions, outside_in_coalitions
from proxyprompt.errors import InputError
from proxyprompt.testing import AdditiveGame, AirportGame, GloveGame, UnanimityGame


def rng(seed=0):
    return np.random.default_rng(seed)


def kernel(n, seed=0):
    return CubeKernel(np.r_[rng(seed).normal(size=10), 0.7 * rng(seed + 1).normal(size=n)])


def squared_error(explainer, game, budget, seed=0):
    answer = explainer.attribute(game, game.n_units, budget=budget, rng=rng(seed))
    return float(((answer.values - game.shapley_values) ** 2).mean())


def table_game(values):
    n = len(values).bit_length() - 1
    phi = shapley_weights(enumerate_coalitions(n)) @ values
    return lambda rows: values[rows @ (1 << np.arange(n))], phi


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_kernel_shapley_values_are_those_of_its_columns(n):
    rows = enumerate_coalitions(n)
    k = kernel(n)
    columns = ExactShapley().fit(Design(rows, np.ones(len(rows)), True), k.gram(rows)).values
    assert np.allclose(k.shapley(rows), columns.T, atol=1e-12)


def test_kernel_is_positive_definite_on_all_coalitions():
    for seed in range(5):
        assert np.linalg.eigvalsh(kernel(6, seed).gram(enumerate_coalitions(6)))[0] > 0


def test_kernel_gradient_is_the_derivative():
    rows, k = enumerate_coalitions(5)[::2], kernel(5)
    outer = rng(3).normal(size=(16, 16))
    outer += outer.T
    step = 1e-6 * np.eye(len(k.log_parameters))
    centred = rows - rows.mean(axis=1, keepdims=True)

    def total(parameters):
        moved = CubeKernel(parameters)
        return float((outer * (moved.gram(rows) + moved.variances[6] * centred @ centred.T)).sum())

    up, down = [[total(k.log_parameters + sign * s) for s in step] for sign in (1, -1)]
    assert np.allclose(k.gradient(rows, outer), (np.array(up) - down) / 2e-6, atol=1e-6)


def test_design_lists_whole_sizes_first_and_pairs_complements():
    rows = outside_in_coalitions(10, 128, rng=rng())
    sizes = rows.sum(axis=1)
    assert (rows[2::2] == ~rows[3::2]).all()
    assert [int((sizes == s).sum()) for s in (0, 1, 2, 8, 9, 10)] == [1, 10, 45, 45, 10, 1]
    assert len(np.unique(rows, axis=0)) == len(rows) == 128
    assert len(outside_in_coalitions(6, 999, rng=rng())) == 64


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_exact_when_all_coalitions_are_evaluated(n):
    play, phi = table_game(rng().normal(size=(2**n, 2)))
    answer = SurrogateSHAP().attribute(play, n, budget=2**n, rng=rng())
    assert answer.exact
    assert np.allclose(answer.values, phi.T, atol=1e-12)
    assert (answer.se_coalitions == 0).all()


def test_fit_on_all_coalitions_by_regression_is_exact_too():
    # One value is missing, which sends the fit through the surrogate; the second query is complete.
    values = rng().normal(size=(64, 2))
    play, phi = table_game(values)
    design = SurrogateSHAP().design(6, 64, rng=rng())
    asked = play(design.coalitions)
    asked[10, 0] = np.nan
    answer = SurrogateSHAP().fit(design, asked)
    assert np.allclose(answer.values[1], phi[:, 1], atol=1e-6)
    assert 1e-6 < np.abs(answer.values[0] - phi[:, 0]).max() < 0.5


@pytest.mark.parametrize("budget", [26, 40, 100])
def test_additive_games_are_exact_at_every_budget(budget):
    game = AdditiveGame(rng().normal(size=(3, 10)), base=[1.0, 2.0, 3.0])
    assert squared_error(SurrogateSHAP(), game, budget) < 1e-24


@pytest.mark.parametrize("order", [2, 3])
def test_low_order_games_are_exact_once_determined(order):
    draw = rng(order)
    terms = [(draw.choice(9, size=order, replace=False), draw.normal()) for _ in range(40)]
    assert squared_error(SurrogateSHAP(), UnanimityGame(9, terms), 100) < 1e-12


def test_structured_games_are_estimated_far_better_than_by_kernel_shap():
    games = [AirportGame(rng().exponential(size=10)), GloveGame(9)]
    for game in games:
        assert squared_error(SurrogateSHAP(), game, 64) < 0.2 * squared_error(KernelSHAP(), game, 64)


def test_efficiency_holds_for_every_query():
    play, _ = table_game(rng().normal(size=(256, 4)))
    answer = SurrogateSHAP().attribute(play, 8, budget=60, rng=rng())
    assert np.allclose(answer.values.sum(axis=1), answer.full_values - answer.base_values, atol=1e-12)


def test_linear_in_the_values_of_queries_that_share_a_kernel():
    play, _ = table_game(rng().normal(size=(128, 2)))
    design = SurrogateSHAP().design(7, 40, rng=rng())
    values = play(design.coalitions)
    answer = SurrogateSHAP().fit(design, np.column_stack([values, 2 * values[:, 0] - values[:, 1]])).values
    assert np.allclose(answer[2], 2 * answer[0] - answer[1], atol=1e-9)


def test_a_missing_value_is_left_out_and_nothing_else_changes(monkeypatch):
    play, _ = table_game(rng().normal(size=(128, 3)))
    design = SurrogateSHAP().design(7, 60, rng=rng())
    values = play(design.coalitions)
    values[5, 1] = values[20, 1] = np.nan
    fixed = kernel(7)
    monkeypatch.setattr("proxyprompt.attribution.surrogate_shap._tuned_kernel", lambda rows, values: fixed)
    answer = SurrogateSHAP().fit(design, values)
    seen = ~np.isnan(values[:, 1])
    alone = SurrogateSHAP().fit(
        Design(design.coalitions[seen], design.weights[seen], False), values[seen][:, [1]]
    )
    assert np.allclose(answer.values[1], alone.values[0], atol=1e-7)
    whole = SurrogateSHAP().fit(design, values[:, [0, 2]])
    assert np.allclose(answer.values[[0, 2]], whole.values, atol=1e-12)
    monkeypatch.undo()
    assert np.isfinite(SurrogateSHAP().fit(design, values).values).all()


def test_rough_games_no_worse_than_kernel_shap_and_unbiased_over_games():
    ours, theirs, errors = [], [], []
    for seed in range(25):
        play, phi = table_game(rng(seed).normal(size=(256, 1)))
        answer = SurrogateSHAP().attribute(play, 8, budget=40, rng=rng(seed))
        ours.append(((answer.values[0] - phi[:, 0]) ** 2).mean())
        theirs.append(
            ((KernelSHAP().attribute(play, 8, budget=40, rng=rng(seed)).values[0] - phi[:, 0]) ** 2).mean()
        )
        errors.append(answer.values[0] - phi[:, 0])
    assert np.mean(ours) < np.mean(theirs)
    spread = np.std(errors, axis=0, ddof=1) / 5
    assert (np.abs(np.mean(errors, axis=0)) < 4 * spread).all()


def test_standard_error_covers():
    covered = []
    for seed in range(12):
        draw = rng(seed)
        terms = [(draw.choice(10, size=draw.integers(1, 6), replace=False), draw.normal()) for _ in range(14)]
        games = [UnanimityGame(10, terms), AirportGame(draw.exponential(size=10))]
        for game in games:
            answer = SurrogateSHAP().attribute(game, 10, budget=40, rng=draw)
            covered.append(np.abs(answer.mean - game.shapley_values[0]) <= 1.96 * answer.se_coalitions)
    assert np.mean(covered) > 0.85


def test_budgets_out_of_range_are_refused_with_a_remedy():
    for budget in (25, 4097):
        with pytest.raises(InputError, match="budget") as caught:
            SurrogateSHAP().design(10 if budget < 100 else 20, budget, rng=rng())
        assert caught.value.hint
    assert SurrogateSHAP().design(10, 26, rng=rng()).n_coalitions == 26


def test_designs_that_do_not_determine_the_units_are_refused():
    ends = np.array([[False] * 5, [True] * 5])
    rows = np.vstack([ends, enumerate_coalitions(5)[[1, 30, 2, 29]]])
    with pytest.raises(InputError, match="determine"):
        SurrogateSHAP().fit(Design(rows, np.ones(6), False), rng().normal(size=(6, 1)))
    design = SurrogateSHAP().design(5, 20, rng=rng())
    twice = np.vstack([design.coalitions, design.coalitions[2:4]])
    with pytest.raises(InputError, match="repeat"):
        SurrogateSHAP().fit(Design(twice, np.ones(22), False), rng().normal(size=(22, 1)))


def test_constant_and_partly_constant_queries_get_zero_credit():
    play, _ = table_game(np.column_stack([np.full(64, 3.0), rng().normal(size=64)]))
    answer = SurrogateSHAP().attribute(play, 6, budget=30, rng=rng())
    assert np.abs(answer.values[0]).max() < 1e-12
