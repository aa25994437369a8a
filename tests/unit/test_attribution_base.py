"""Design, Attribution and the rules for missing values."""

import json

import numpy as np
import pytest

from proxyprompt.attribution import Attribution, Design, ExactShapley, KernelSHAP, LeaveOneOut
from proxyprompt.errors import ArtifactError, InconclusiveError, InputError
from proxyprompt.testing import AdditiveGame


def attribution(n_queries=30, budget=40, seed=0):
    rng = np.random.default_rng(seed)
    game = AdditiveGame(rng.normal(size=(n_queries, 8)), base=rng.normal(size=n_queries))
    return KernelSHAP().attribute(game, 8, budget=budget, rng=rng)


def make(mean, se_queries=0.0, se_coalitions=0.0, n_queries=10, df=np.inf):
    mean = np.asarray(mean, dtype=float)
    parts = [np.full(len(mean), float(x)) for x in (se_queries, se_coalitions)]
    zeros = np.zeros(n_queries)
    return Attribution(
        values=np.tile(mean, (n_queries, 1)),
        mean=mean,
        standard_error=np.hypot(*parts),
        se_queries=parts[0],
        se_coalitions=parts[1],
        base_values=zeros,
        full_values=zeros,
        intercept=zeros,
        n_coalitions=4,
        exact=False,
        method="made",
        df_coalitions=df,
    )


def test_ranking_breaks_ties_by_index():
    assert make([0.5, -1.0, 0.5, -1.0, 0.0]).ranking().tolist() == [1, 3, 4, 0, 2]


def test_bounds_are_students_t_with_queries_alone():
    result = make([1.0, 2.0], se_queries=0.5, n_queries=11)
    np.testing.assert_allclose(result.upper_bound(0.95) - result.mean, 0.5 * 1.812461, rtol=1e-6)
    np.testing.assert_allclose(result.mean - result.lower_bound(0.95), 0.5 * 1.812461, rtol=1e-6)


def test_bounds_pool_degrees_of_freedom():
    both = make([0.0], se_queries=1.0, se_coalitions=1.0, n_queries=11, df=10.0)
    # Equal parts on 10 degrees of freedom each make 20: t is 1.724718.
    np.testing.assert_allclose(both.upper_bound(0.95), np.sqrt(2) * 1.724718, rtol=1e-6)
    assert make([3.0]).upper_bound().tolist() == [3.0]


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_level_is_checked(level):
    with pytest.raises(InputError, match=r"level=.*strictly between 0 and 1"):
        make([0.0]).upper_bound(level)


def test_json_round_trip():
    before = attribution()
    after = Attribution.from_dict(json.loads(json.dumps(before.to_dict(), allow_nan=False)))
    for name in ("values", "mean", "standard_error", "se_queries", "se_coalitions", "intercept"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    assert (after.method, after.exact, dict(after.settings)) == (
        before.method,
        before.exact,
        dict(before.settings),
    )
    exact = ExactShapley().attribute(AdditiveGame([[1.0, 2.0]]), 2, budget=4, rng=np.random.default_rng(0))
    assert Attribution.from_dict(json.loads(json.dumps(exact.to_dict()))).df_coalitions == np.inf


def test_from_dict_names_odd_fields():
    with pytest.raises(ArtifactError, match="'mean'"):
        Attribution.from_dict({k: v for k, v in attribution().to_dict().items() if k != "mean"})


def test_attribution_rejects_nan_and_shapes():
    with pytest.raises(InputError, match="values holds NaN"):
        make([np.nan])
    with pytest.raises(InputError, match=r"mean has shape \(1,\), \(2,\)"):
        Attribution(**{**_fields(make([0.0, 1.0])), "mean": np.zeros(1)})
    with pytest.raises(InputError, match=r"values has shape \(2,\)"):
        Attribution(**{**_fields(make([0.0, 1.0])), "values": np.zeros(2)})


def _fields(a):
    return {**a.to_dict(), "df_coalitions": np.inf}


def test_results_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        attribution().mean[0] = 1.0


def test_predict_is_the_surrogate():
    rng = np.random.default_rng(0)
    game = AdditiveGame(rng.normal(size=(5, 8)), base=rng.normal(size=5))
    result = KernelSHAP().attribute(game, 8, budget=40, rng=rng)
    rows = rng.random((9, 8)) < 0.5
    np.testing.assert_allclose(result.predict(rows), game(rows), atol=1e-9)
    with pytest.raises(InputError, match="coalitions has 3 units, the attribution 8"):
        result.predict(rows[:, :3])
    with pytest.raises(InputError, match="coalitions has dtype float64"):
        result.predict(rows.astype(float))


def test_design_errors():
    rows = np.array([[False, False], [True, True]])
    with pytest.raises(InputError, match="lack the empty or the full"):
        Design(rows[:1], np.zeros(1), exact=False)
    with pytest.raises(InputError, match="lack the empty or the full"):
        Design(rows[1:], np.zeros(1), exact=False)
    with pytest.raises(InputError, match=r"weights of shape \(1,\) for 2"):
        Design(rows, np.zeros(1), exact=False)
    with pytest.raises(InputError, match="non-negative weight"):
        Design(rows, np.array([-1.0, 0.0]), exact=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(40), r"values has shape \(40,\): \(40, n_queries\)"),
        (np.zeros((39, 2)), r"values has shape \(39, 2\)"),
        (np.zeros((40, 0)), r"values has shape \(40, 0\)"),
        (np.full((40, 2), np.inf), "values holds 80 infinite entries"),
        (np.full((40, 2), None), "values has dtype object"),
    ],
)
def test_values_are_checked(values, message):
    explainer = KernelSHAP()
    design = explainer.design(8, 40, rng=np.random.default_rng(0))
    with pytest.raises(InputError, match=message):
        explainer.fit(design, values)


def test_missing_values_are_never_zero():
    rng = np.random.default_rng(0)
    game = AdditiveGame(rng.normal(size=(30, 8)), base=1.0)
    explainer = KernelSHAP()
    design = explainer.design(8, 60, rng=rng)
    values = game(design.coalitions)
    values[design.full_row, 3] = np.nan
    values[design.empty_row, 5] = np.nan
    values[10:14, 7] = np.nan  # 4 of 60 is more than 5 %
    values[[20, 31], 9] = np.nan  # fewer: only the rows are left out
    result = explainer.fit(design, values)
    assert result.dropped_queries.tolist() == [3, 5, 7]
    kept = np.setdiff1d(np.arange(30), [3, 5, 7])
    np.testing.assert_allclose(result.values, game.shapley_values[kept], atol=1e-9)


def test_too_many_dropped_queries_are_inconclusive():
    explainer = KernelSHAP()
    design = explainer.design(8, 60, rng=np.random.default_rng(0))
    values = np.zeros((60, 10))
    values[design.full_row, :2] = np.nan
    assert explainer.fit(design, values).dropped_queries.tolist() == [0, 1]
    values[design.full_row, :3] = np.nan
    with pytest.raises(InconclusiveError, match="3 of 10 queries were dropped"):
        explainer.fit(design, values)


def test_missing_rows_that_leave_units_undetermined():
    explainer = KernelSHAP(max_missing=0.9)
    design = explainer.design(8, 22, rng=np.random.default_rng(0))
    values = np.zeros((22, 2))
    values[4:, 0] = np.nan
    with pytest.raises(InputError, match="Query 0 of those kept lacks 18 coalitions"):
        explainer.fit(design, values)


@pytest.mark.parametrize("explainer", [LeaveOneOut(), ExactShapley()])
def test_formulas_that_need_every_value_drop_the_query(explainer):
    game = AdditiveGame(np.arange(30.0).reshape(10, 3))
    design = explainer.design(3, 8, rng=np.random.default_rng(0))
    values = game(design.coalitions)
    values[3, 4] = np.nan
    result = explainer.fit(design, values)
    assert result.dropped_queries.tolist() == [4]
    np.testing.assert_allclose(result.values, np.delete(game.shapley_values, 4, axis=0))


@pytest.mark.parametrize("name", ["max_missing", "max_dropped"])
def test_shares_are_checked(name):
    with pytest.raises(InputError, match=rf"{name}=1.5: a share in \[0, 1\)"):
        KernelSHAP(**{name: 1.5})
