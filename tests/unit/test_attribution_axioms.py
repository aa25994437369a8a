"""The axioms as properties of random games: which technique keeps which, and counterexamples where one is not kept.

All coalitions are evaluated where a technique can take them all, so that what is tested is the index and not its estimate.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyprompt.attribution import (
    LIME,
    Banzhaf,
    ExactShapley,
    Explainer,
    KernelSHAP,
    Lasso,
    LeaveOneOut,
    PairwiseInteractions,
    PermutationShapley,
    WeightedBanzhaf,
)
from proxyprompt.coalitions import enumerate_coalitions

SHAPLEY = [ExactShapley(), KernelSHAP(), PermutationShapley()]
SEMIVALUES = [*SHAPLEY, Banzhaf(), WeightedBanzhaf(0.8), LeaveOneOut()]

sizes = st.integers(2, 6)
seeds = st.integers(0, 2**32 - 1)


def by_name(explainer: Explainer) -> str:
    return type(explainer).__name__


class TableGame:
    """A value for each coalition, shape (2**n_units, n_queries), in binary counting order."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.n_units = len(table).bit_length() - 1

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.table[rows @ (1 << np.arange(self.n_units))]


def draw(n_units: int, seed: int) -> TableGame:
    return TableGame(np.random.default_rng(seed).normal(size=(2**n_units, 2)))


def credits(explainer: Explainer, game: TableGame) -> np.ndarray:
    budget = max(2**game.n_units, game.n_units + 2)
    rng = np.random.default_rng(0)
    return explainer.attribute(game, game.n_units, budget=budget, rng=rng).values


def with_dummy(game: TableGame, worth: float) -> TableGame:
    """One more unit, the last, that adds ``worth`` to every coalition."""
    return TableGame(np.vstack([game.table, game.table + worth]))


def symmetric(game: TableGame) -> TableGame:
    """Units 0 and 1 made interchangeable."""
    rows = enumerate_coalitions(game.n_units)
    order = np.r_[1, 0, 2 : game.n_units]
    return TableGame(game.table + game(rows[:, order]))


@pytest.mark.parametrize("explainer", SHAPLEY, ids=by_name)
@settings(max_examples=25, deadline=None)
@given(n_units=sizes, seed=seeds)
def test_efficiency(explainer: Explainer, n_units: int, seed: int) -> None:
    game = draw(n_units, seed)
    whole = game.table[-1] - game.table[0]
    np.testing.assert_allclose(credits(explainer, game).sum(axis=1), whole, atol=1e-9)


@pytest.mark.parametrize("explainer", [*SEMIVALUES, Lasso(0.1)], ids=by_name)
@settings(max_examples=25, deadline=None)
@given(n_units=sizes, seed=seeds)
def test_symmetry(explainer: Explainer, n_units: int, seed: int) -> None:
    found = credits(explainer, symmetric(draw(n_units, seed)))
    np.testing.assert_allclose(found[:, 0], found[:, 1], atol=1e-8)


@pytest.mark.parametrize("explainer", SEMIVALUES, ids=by_name)
@settings(max_examples=25, deadline=None)
@given(n_units=sizes, seed=seeds, worth=st.floats(-3, 3))
def test_dummy(explainer: Explainer, n_units: int, seed: int, worth: float) -> None:
    """A unit that always adds the same is credited just that, and the others as if it were not there."""
    game = draw(n_units, seed)
    found = credits(explainer, with_dummy(game, worth))
    np.testing.assert_allclose(found[:, -1], worth, atol=1e-9)
    np.testing.assert_allclose(found[:, :-1], credits(explainer, game), atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(n_units=sizes, seed=seeds)
def test_null_unit_of_the_lasso(n_units: int, seed: int) -> None:
    """With all coalitions its columns are orthogonal: a unit that adds nothing gets nothing."""
    found = credits(Lasso(0.05), with_dummy(draw(n_units, seed), 0.0))
    np.testing.assert_allclose(found[:, -1], 0, atol=1e-8)


@pytest.mark.parametrize("explainer", [*SEMIVALUES, LIME()], ids=by_name)
@settings(max_examples=25, deadline=None)
@given(n_units=sizes, seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_linearity(explainer: Explainer, n_units: int, seed: int, a: float, b: float) -> None:
    one, two = draw(n_units, seed), draw(n_units, seed + 1)
    both = TableGame(a * one.table + b * two.table)
    expected = a * credits(explainer, one) + b * credits(explainer, two)
    np.testing.assert_allclose(credits(explainer, both), expected, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(n_units=sizes, seed=seeds)
def test_two_units_merged_get_the_sum_of_their_banzhaf_values(n_units: int, seed: int) -> None:
    """2-efficiency, which together with the others singles Banzhaf's value out."""
    game = draw(n_units, seed)
    rows = enumerate_coalitions(n_units - 1)
    merged = TableGame(game(np.column_stack([rows[:, 0], rows])))
    whole = credits(Banzhaf(), game)
    np.testing.assert_allclose(credits(Banzhaf(), merged)[:, 0], whole[:, :2].sum(axis=1), atol=1e-9)


@pytest.mark.parametrize("index", ["faith-banzhaf", "faith-shap", "sii"])
@settings(max_examples=20, deadline=None)
@given(n_units=sizes, seed=seeds, a=st.floats(-3, 3))
def test_interactions_are_linear_symmetric_and_none_with_a_dummy(
    index: str, n_units: int, seed: int, a: float
) -> None:
    def of(game: TableGame) -> np.ndarray:
        explainer = PairwiseInteractions(index)
        rng = np.random.default_rng(0)
        return explainer.attribute(game, game.n_units, budget=2**game.n_units, rng=rng).mean

    one, two = draw(n_units, seed), draw(n_units, seed + 1)
    np.testing.assert_allclose(of(TableGame(one.table + a * two.table)), of(one) + a * of(two), atol=1e-8)
    swapped = of(symmetric(one))
    np.testing.assert_allclose(swapped[0, 2:], swapped[1, 2:], atol=1e-9)
    np.testing.assert_allclose(of(with_dummy(one, 2.0))[-1], 0, atol=1e-9)


def test_what_is_not_kept() -> None:
    """Banzhaf values and leave-one-out do not share out the whole, LIME credits dummies, the lasso is not linear."""
    game = draw(5, 0)
    whole = game.table[-1] - game.table[0]
    for explainer in (Banzhaf(), WeightedBanzhaf(0.8), LeaveOneOut(), LIME(), Lasso()):
        assert (np.abs(credits(explainer, game).sum(axis=1) - whole) > 0.01).all()
    assert (np.abs(credits(LIME(), with_dummy(game, 0.0))[:, -1]) > 0.01).all()
    assert (np.abs(credits(Lasso(0.1), with_dummy(game, 1.0))[:, -1] - 1.0) > 0.1).all()
    twice = TableGame(2 * game.table)
    assert (np.abs(credits(Lasso(0.1), twice) - 2 * credits(Lasso(0.1), game)) > 0.1).any()
