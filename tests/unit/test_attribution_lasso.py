"""The lasso surrogate against scikit-learn, its own rules, and its error over fresh draws."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Lasso as Reference
from sklearn.preprocessing import StandardScaler

from proxyprompt.attribution import Banzhaf, Design, Lasso
from proxyprompt.attribution import lasso as module
from proxyprompt.coalitions import enumerate_coalitions
from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.testing import AdditiveGame, UnanimityGame


def random_game(n_units: int, seed: int, n_queries: int = 4) -> UnanimityGame:
    rng = np.random.default_rng(seed)
    terms = [
        (tuple(rng.permutation(n_units)[: rng.integers(1, 5)]), rng.normal(size=n_queries))
        for _ in range(2 * n_units)
    ]
    return UnanimityGame(n_units, terms, base=rng.normal(size=n_queries))


def context_cite(rows: np.ndarray, values: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """The regression of context_cite's LassoRegression, to a tighter tolerance and in double precision."""
    scaler = StandardScaler().fit(rows.astype(float))
    fitted = Reference(alpha=alpha, tol=1e-12, max_iter=100_000).fit(
        scaler.transform(rows.astype(float)), values
    )
    weight = fitted.coef_ / scaler.scale_
    return weight, float(fitted.intercept_ - scaler.mean_ @ weight)


@pytest.mark.parametrize(("n_units", "budget"), [(8, 60), (30, 300), (40, 34)])
@pytest.mark.parametrize("alpha", [0.01, 0.3])
def test_coefficients_and_intercept_are_scikit_learns(n_units: int, budget: int, alpha: float) -> None:
    game = random_game(n_units, 0)
    design = Lasso(alpha).design(n_units, budget, rng=np.random.default_rng(1))
    values = game(design.coalitions)
    result = Lasso(alpha).fit(design, values)
    rows = design.coalitions[2:]
    for query in range(4):
        weight, intercept = context_cite(rows, values[2:, query], alpha)
        np.testing.assert_allclose(result.values[query], weight, atol=1e-6)
        assert result.intercept[query] == pytest.approx(intercept, abs=1e-6)
    assert (result.values == 0).any() or alpha == 0.01
    np.testing.assert_allclose(result.predict(rows), result.intercept + rows @ result.values.T, atol=1e-12)


def test_the_optimality_conditions_hold_for_every_query() -> None:
    """Subgradient: the correlation with the residual is alpha times the sign, at most alpha where the credit is 0."""
    rng = np.random.default_rng(0)
    game = random_game(60, 1, n_queries=50)
    design = Lasso(0.05).design(60, 200, rng=rng)
    values = game(design.coalitions)[2:]
    result = Lasso(0.05).fit(design, game(design.coalitions))
    rows = design.coalitions[2:]
    x = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    pull = x.T @ (values - result.predict(rows)) / len(rows)
    found = result.values.T
    np.testing.assert_allclose(pull[found != 0], 0.05 * np.sign(found[found != 0]), atol=1e-6)
    assert (np.abs(pull) <= 0.05 + 1e-6).all()
    assert 0.05 < (found == 0).mean() < 0.95


@pytest.mark.parametrize(("n_units", "budget"), [(24, 26), (64, 66), (100, 34)])
def test_settles_where_coalitions_are_fewer_than_units_and_some_columns_are_copies(
    n_units: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here coordinate descent alone crawls; the path of penalties is followed instead, and is right at once."""
    monkeypatch.setattr(module, "_MAX_SWEEPS", module._PATIENCE + 2)
    rng = np.random.default_rng(0)
    design = Lasso(0.001).design(n_units, budget, rng=rng)
    rows = design.coalitions.copy()
    rows[:, 5], rows[:, 6] = rows[:, 4], rows[:, 3]
    design = Design(rows, design.weights, exact=False)
    values = rows @ rng.normal(size=(n_units, 12)) + 0.5 * rng.normal(size=(budget, 12))
    found = Lasso(0.001).fit(design, values)
    x = (rows[2:] - rows[2:].mean(axis=0)) / rows[2:].std(axis=0)
    pull = x.T @ (values[2:] - found.predict(rows[2:])) / len(x)
    credits = found.values.T
    np.testing.assert_allclose(pull[credits != 0], 0.001 * np.sign(credits[credits != 0]), atol=1e-7)
    assert (np.abs(pull) <= 0.001 + 1e-7).all()


def test_descent_alone_settles_where_coalitions_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_SWEEPS", module._PATIENCE)
    game = random_game(20, 7)
    design = Lasso().design(20, 400, rng=np.random.default_rng(0))
    values = game(design.coalitions)
    weight, _ = context_cite(design.coalitions[2:], values[2:, 1], 0.01)
    np.testing.assert_allclose(Lasso().fit(design, values).values[1], weight, atol=1e-6)


def test_on_all_coalitions_the_credits_are_banzhaf_values_moved_towards_zero() -> None:
    game = random_game(7, 2)
    lasso = Lasso(0.1).attribute(game, 7, budget=128, rng=np.random.default_rng(0))
    banzhaf = Banzhaf().attribute(game, 7, budget=128, rng=np.random.default_rng(0)).values
    expected = np.sign(banzhaf) * np.maximum(np.abs(banzhaf) - 0.2, 0)
    np.testing.assert_allclose(lasso.values, expected, atol=1e-6)
    assert lasso.exact
    assert not lasso.se_coalitions.any()


def test_cross_validation_is_the_one_standard_error_rule_of_the_textbook() -> None:
    game = random_game(12, 3, n_queries=3)
    explainer = Lasso("cv")
    design = explainer.design(12, 90, rng=np.random.default_rng(0))
    values = game(design.coalitions)
    result = explainer.fit(design, values)
    rows, fold = design.coalitions[2:], np.arange(88) % 5
    for query in range(3):
        y = values[2:, query]
        x = (rows - rows.mean(axis=0)) / rows.std(axis=0)
        path = np.abs(x.T @ (y - y.mean())).max() / 88 * np.logspace(0, -3, 25)
        errors = np.empty((25, 5))
        for step, alpha in enumerate(path):
            for k in range(5):
                weight, intercept = context_cite(rows[fold != k], y[fold != k], alpha)
                errors[step, k] = ((y - intercept - rows @ weight)[fold == k] ** 2).mean()
        best = errors.mean(axis=1).argmin()
        limit = errors[best].mean() + errors[best].std(ddof=1) / np.sqrt(5)
        alpha = path[np.flatnonzero(errors.mean(axis=1) <= limit)[0]]
        np.testing.assert_allclose(result.values[query], context_cite(rows, y, alpha)[0], atol=1e-5)


def test_cross_validation_keeps_few_units_when_few_matter() -> None:
    effects = np.zeros(40)
    effects[[3, 17, 29]] = [1.0, -0.7, 0.5]
    rng = np.random.default_rng(0)
    design = Lasso("cv").design(40, 66, rng=rng)
    noise = rng.normal(size=(66, 2)) * 0.2
    found = Lasso("cv").fit(design, design.coalitions @ effects[:, None] + noise)
    assert set(np.argsort(np.abs(found.mean))[-3:].tolist()) == {3, 17, 29}
    assert (found.values != 0).sum(axis=1).max() < 25


def test_standard_errors_are_the_spread_over_fresh_draws_of_credits_away_from_zero() -> None:
    game = random_game(12, 4)
    found, claimed = [], []
    for seed in range(150):
        a = Lasso(0.05).attribute(game, 12, budget=100, rng=np.random.default_rng(seed))
        found.append(a.mean)
        claimed.append(a.se_coalitions)
    spread, error = np.std(found, axis=0), np.sqrt(np.mean(np.square(claimed), axis=0))
    away = np.abs(np.mean(found, axis=0)) > 0.3
    assert away.sum() >= 3
    assert np.median((error / spread)[away]) == pytest.approx(1.1, abs=0.2)
    inside = np.abs(found - np.mean(found, axis=0)) <= 1.96 * np.array(claimed)
    assert 0.93 <= inside.mean() <= 0.995


def test_missing_rows_are_left_out_of_their_query() -> None:
    game = random_game(10, 5, n_queries=20)
    explainer = Lasso(0.02)
    design = explainer.design(10, 80, rng=np.random.default_rng(0))
    values = game(design.coalitions)
    holes = values.copy()
    holes[[5, 30], 2] = np.nan
    holes[[5, 30], 9] = np.nan
    holes[11, 4] = np.nan
    result = explainer.fit(design, holes)
    for query, lacking in ((2, [5, 30]), (9, [5, 30]), (4, [11])):
        rest = np.setdiff1d(np.arange(2, 80), lacking)
        weight, intercept = context_cite(design.coalitions[rest], values[rest, query], 0.02)
        np.testing.assert_allclose(result.values[query], weight, atol=1e-6)
        assert result.intercept[query] == pytest.approx(intercept, abs=1e-6)
    untouched = np.setdiff1d(np.arange(20), [2, 4, 9])
    np.testing.assert_allclose(
        result.values[untouched], explainer.fit(design, values).values[untouched], atol=1e-9
    )


def test_constant_values_give_no_credit_and_a_penalty_above_all_gives_none() -> None:
    design = Lasso().design(9, 50, rng=np.random.default_rng(0))
    assert not Lasso().fit(design, np.full((50, 2), 0.3)).values.any()
    assert not Lasso("cv").fit(design, np.full((50, 2), 0.3)).values.any()
    assert not Lasso(100.0).fit(design, random_game(9, 0)(design.coalitions)).values.any()


def test_the_design_draws_distinct_coalitions_and_may_have_fewer_than_units() -> None:
    game = AdditiveGame(np.linspace(-1, 1, 100))
    result = Lasso().attribute(game, 100, budget=64, rng=np.random.default_rng(0))
    design = Lasso().design(100, 64, rng=np.random.default_rng(0))
    assert game.evaluations == result.n_coalitions == 64
    assert len(np.unique(design.coalitions, axis=0)) == 64
    assert design.weights[:2].tolist() == [0.0, 0.0]
    assert abs(design.coalitions[2:].mean() - 0.5) < 0.02
    varied = design.coalitions[2:].sum(axis=0)
    assert ((varied > 0) & (varied < 62)).all()
    assert Lasso().design(4, 18, rng=np.random.default_rng(0)).exact


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for alpha in (0, -1.0, float("nan"), float("inf"), "best"):
        with pytest.raises(InputError, match=r"alpha=.*: a number above 0, or \"cv\", is needed"):
            Lasso(alpha)
    with pytest.raises(InputError, match="budget=17: the lasso needs at least 18 coalitions for 30 units"):
        Lasso().design(30, 17, rng=np.random.default_rng(0))
    rows = enumerate_coalitions(5)
    rows = rows[~rows[:, 2] | rows.all(axis=1)]
    design = Design(rows, (~rows.all(axis=1)).astype(float), exact=False)
    with pytest.raises(InputError, match="some unit is always or never kept"):
        Lasso().fit(design, np.zeros((len(rows), 1)))
    monkeypatch.setattr(module, "_MAX_SWEEPS", 2)
    design = Lasso().design(40, 34, rng=np.random.default_rng(0))
    with pytest.raises(InconclusiveError, match="lasso of 4 queries has not settled after 2 sweeps"):
        Lasso(1e-4).fit(design, random_game(40, 0)(design.coalitions))
