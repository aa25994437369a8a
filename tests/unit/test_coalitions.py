"""Coalition matrices: shapes, distinctness, pairing, weights, and every error."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyprompt.coalitions import (
    enumerate_coalitions,
    leave_one_out_coalitions,
    row_keys,
    shapley_kernel_coalitions,
    uniform_coalitions,
)
from proxyprompt.errors import InputError


@pytest.mark.parametrize("n_units", [1, 2, 8])
def test_enumeration_is_complete_and_ordered(n_units):
    rows = enumerate_coalitions(n_units)
    assert rows.shape == (2**n_units, n_units)
    assert rows.dtype == np.bool_
    assert len(set(row_keys(rows))) == 2**n_units
    assert not rows[0].any()
    assert rows[-1].all()


def test_enumeration_is_limited():
    with pytest.raises(InputError, match=r"n_units=21: .* limited to 20 units.*Sample instead"):
        enumerate_coalitions(21)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_n_units_is_checked(bad):
    with pytest.raises(InputError, match="an integer of at least 1"):
        enumerate_coalitions(bad)


@pytest.mark.parametrize("n_units", [1, 2, 8, 64, 200])
def test_leave_one_out(n_units):
    rows = leave_one_out_coalitions(n_units)
    assert len(set(row_keys(rows))) == len(rows) == (2 if n_units == 1 else n_units + 2)
    assert not rows[0].any()
    assert rows[1].all()
    assert (rows[2:].sum(axis=1) == n_units - 1).all()


@pytest.mark.parametrize("n_units", [1, 2, 8, 64, 200])
@pytest.mark.parametrize("budget", [2, 3, 20, 255, 300, 1000])
def test_kernel_sample_invariants(n_units, budget):
    rows, weights = shapley_kernel_coalitions(n_units, budget, rng=np.random.default_rng(1))
    assert len(rows) == min(budget - budget % 2, 2**n_units)
    assert len(set(row_keys(rows))) == len(rows)
    assert not rows[0].any()
    assert rows[1].all()
    assert (rows[0::2] == ~rows[1::2]).all()
    assert weights[0] == weights[1] == 0
    assert (weights[2:] > 0).all()
    assert weights.sum() == pytest.approx(0.0 if len(rows) == 2 else 1.0)


@pytest.mark.parametrize("n_units", [2, 3, 6, 7])
def test_all_coalitions_carry_the_shapley_kernel(n_units):
    rows, weights = shapley_kernel_coalitions(n_units, 2**n_units, rng=np.random.default_rng(0))
    size = rows.sum(axis=1)[2:]
    kernel = np.array([(n_units - 1) / (comb(n_units, s) * s * (n_units - s)) for s in size])
    np.testing.assert_allclose(weights[2:], kernel / kernel.sum(), rtol=1e-12)


def test_outer_sizes_are_listed_completely_and_weigh_their_share():
    n_units = 12
    rows, weights = shapley_kernel_coalitions(n_units, 600, rng=np.random.default_rng(0))
    size = rows.sum(axis=1)
    mass = np.array([1 / (s * (n_units - s)) for s in range(1, n_units)])
    for s in (1, 2, 10, 11):
        assert (size == s).sum() == comb(n_units, s)
        assert weights[size == s].sum() == pytest.approx(mass[s - 1] / mass.sum())
    assert 0 < (size == 6).sum() < comb(n_units, 6)


@pytest.mark.parametrize("budget", [22, 28, 60])
def test_weighted_sums_are_unbiased(budget):
    n_units = 9
    exact_rows, exact_weights = shapley_kernel_coalitions(n_units, 2**n_units, rng=np.random.default_rng(0))
    truth = (exact_rows.T * exact_weights) @ exact_rows
    draws = []
    rng = np.random.default_rng(3)
    for _ in range(600):
        rows, weights = shapley_kernel_coalitions(n_units, budget, rng=rng)
        draws.append((rows.T * weights) @ rows)
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    # 45 entries: four standard errors keep the chance of a false alarm below 1 %.
    assert (np.abs(np.mean(draws, axis=0) - truth) <= 4 * error + 1e-12).all()


def test_same_rng_same_rows_other_rng_other_rows():
    def draw(seed):
        return shapley_kernel_coalitions(20, 60, rng=np.random.default_rng(seed))[0]

    assert (draw(0) == draw(0)).all()
    assert (draw(0) != draw(1)).any()


def test_budget_is_checked():
    with pytest.raises(InputError, match="budget=1: at least 2 coalitions"):
        shapley_kernel_coalitions(4, 1, rng=np.random.default_rng(0))


@pytest.mark.parametrize(("n_units", "n"), [(1, 2), (2, 4), (8, 250), (8, 10), (64, 40), (200, 40)])
def test_uniform_rows_are_distinct_and_not_excluded(n_units, n):
    rng = np.random.default_rng(0)
    exclude = uniform_coalitions(n_units, 6, rng=rng) if n_units >= 8 else None
    rows = uniform_coalitions(n_units, n, rng=rng, exclude=exclude)
    assert rows.shape == (n, n_units)
    assert len(set(row_keys(rows))) == n
    if exclude is not None:
        assert not set(row_keys(rows)) & set(row_keys(exclude))


def test_uniform_keeps_half():
    assert uniform_coalitions(40, 2000, rng=np.random.default_rng(0)).mean() == pytest.approx(0.5, abs=0.01)


def test_uniform_errors():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="n=0: at least 1"):
        uniform_coalitions(4, 0, rng=rng)
    with pytest.raises(InputError, match=r"n=4: only 3 coalitions of 2 units are left, 1 being excluded"):
        uniform_coalitions(2, 4, rng=rng, exclude=[[True, True]])
    with pytest.raises(InputError, match="exclude has 3 units, n_units=2"):
        uniform_coalitions(2, 1, rng=rng, exclude=[[True, True, False]])
    with pytest.raises(InputError, match="exclude has dtype int64"):
        uniform_coalitions(2, 1, rng=rng, exclude=[[1, 0]])
    with pytest.raises(InputError, match=r"exclude has shape \(2,\)"):
        uniform_coalitions(2, 1, rng=rng, exclude=[True, False])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(2, 120), st.integers(0, 2**32 - 1))
def test_budget_is_respected(n_units, budget, seed):
    rows, weights = shapley_kernel_coalitions(n_units, budget, rng=np.random.default_rng(seed))
    assert len(rows) == len(weights) <= budget
    assert len(set(row_keys(rows))) == len(rows)
