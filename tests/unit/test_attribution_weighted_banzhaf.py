"""Weighted Banzhaf values against their definition."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import WeightedBanzhaf
from proxyprompt.coalitions import bernoulli_coalitions, enumerate_coalitions
from proxyprompt.errors import InputError
from proxyprompt.testing import AdditiveGame, GloveGame, UnanimityGame


def by_definition(values: np.ndarray, n: int, keep: float) -> np.ndarray:
    """``E[v(S + i) - v(S)]`` summed over all coalitions of the others."""
    rows = enumerate_coalitions(n)
    index = {row.tobytes(): k for k, row in enumerate(rows)}
    out = np.zeros(n)
    for i in range(n):
        for k, row in enumerate(rows):
            if row[i]:
                continue
            others = row.sum()
            chance = keep**others * (1 - keep) ** (n - 1 - others)
            more = row.copy()
            more[i] = True
            out[i] += chance * (values[index[more.tobytes()]] - values[k])
    return out


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_exact_on_a_game_with_interactions(keep: float) -> None:
    game = UnanimityGame(5, [((0, 1), 1.0), ((2,), -0.5), ((1, 3, 4), 2.0)])
    rows = enumerate_coalitions(5)
    attribution = WeightedBanzhaf(keep).attribute(game, 5, budget=32, rng=np.random.default_rng(0))
    assert attribution.exact
    assert not attribution.se_coalitions.any()
    np.testing.assert_allclose(attribution.mean, by_definition(game(rows)[:, 0], 5, keep), atol=1e-9)


def test_one_half_is_the_banzhaf_value_of_the_glove_game() -> None:
    """One left glove, three right ones: the left one is pivotal unless no right glove is there, 1 - 1/8."""
    attribution = WeightedBanzhaf(0.5).attribute(GloveGame(3), 4, budget=16, rng=np.random.default_rng(0))
    assert attribution.mean.max() == pytest.approx(7 / 8)
    assert attribution.mean.min() == pytest.approx(1 / 8)


@pytest.mark.parametrize("budget", [60, 200, 600, 1000])
def test_the_estimate_stays_consistent_up_to_all_coalitions(budget: int) -> None:
    """Distinct rows of equal weight would be off by a third of this game's largest value at 600 of 1,024."""
    game = UnanimityGame(10, [((0, 1, 2), 3.0), ((2, 3), -2.0), ((4, 5, 6, 7), 4.0)])
    exact = WeightedBanzhaf(0.8).attribute(game, 10, budget=1024, rng=np.random.default_rng(0)).mean
    found = [
        WeightedBanzhaf(0.8).attribute(game, 10, budget=budget, rng=np.random.default_rng(seed)).mean
        for seed in range(60)
    ]
    off, error = np.mean(found, axis=0) - exact, np.std(found, axis=0) / np.sqrt(60)
    assert (np.abs(off) < 4.5 * error + 0.02 * np.abs(exact).max()).all()
    assert (
        np.sqrt(np.mean((np.array(found) - exact) ** 2))
        < 8 / np.sqrt(budget) * np.sqrt(1 - budget / 1025) + 0.02
    )


def test_sampled_is_close_on_average_and_its_error_covers() -> None:
    game = UnanimityGame(14, [((i, (i + 1) % 14), 1.0) for i in range(14)])
    truth = 2 * 0.8  # each unit is in two pairs, its partner kept with probability 0.8
    inside, errors = 0, []
    for seed in range(150):
        a = WeightedBanzhaf(0.8).attribute(game, 14, budget=70, rng=np.random.default_rng(seed))
        errors.append(a.mean - truth)
        inside += int((np.abs(a.mean - truth) <= 1.96 * a.se_coalitions).sum())
    # Least squares on few rows leaves a bias of some per cent.
    assert abs(np.mean(errors)) < 0.04 * truth
    assert 0.90 <= inside / (150 * 14) <= 0.99


def test_budget_is_counted_and_the_same_rng_gives_the_same_rows() -> None:
    game = AdditiveGame(np.linspace(-1, 1, 24))
    a = WeightedBanzhaf().attribute(game, 24, budget=60, rng=np.random.default_rng(3))
    b = WeightedBanzhaf().attribute(game, 24, budget=60, rng=np.random.default_rng(3))
    c = WeightedBanzhaf().design(24, 60, rng=np.random.default_rng(4))
    assert game.evaluations == 2 * 60
    np.testing.assert_array_equal(a.mean, b.mean)
    np.testing.assert_allclose(a.mean, np.linspace(-1, 1, 24), atol=1e-9)
    assert (c.coalitions[2:].mean(axis=1) > 0.5).mean() > 0.95
    assert len({row.tobytes() for row in c.coalitions}) == 60


def test_missing_rows_are_left_out_of_their_query() -> None:
    game = AdditiveGame([0.3, -0.1, 0.2, 0.0, 0.5, 0.1])
    design = WeightedBanzhaf().design(6, 40, rng=np.random.default_rng(0))
    values = np.repeat(game(design.coalitions)[:, :1], 30, axis=1)
    values[5, 2] = np.nan
    attribution = WeightedBanzhaf().fit(design, values)
    np.testing.assert_allclose(attribution.values[2], [0.3, -0.1, 0.2, 0.0, 0.5, 0.1], atol=1e-9)


def test_held_out_rows_come_from_the_same_law_and_are_new() -> None:
    explainer = WeightedBanzhaf(0.8)
    design = explainer.design(20, 60, rng=np.random.default_rng(0))
    rows = explainer.held_out(20, 30, rng=np.random.default_rng(1), exclude=design.coalitions)
    assert 0.7 < rows.mean() < 0.9
    assert not {r.tobytes() for r in rows} & {r.tobytes() for r in design.coalitions}


def test_small_prompts_do_not_run_out_of_distinct_rows() -> None:
    rows = bernoulli_coalitions(4, 15, keep=0.9, rng=np.random.default_rng(0))
    assert len({r.tobytes() for r in rows}) == 15


def test_errors() -> None:
    with pytest.raises(InputError, match="keep=1"):
        WeightedBanzhaf(1.0)
    with pytest.raises(InputError, match=r"keep=0"):
        bernoulli_coalitions(4, 2, keep=0.0, rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="need at least 37"):
        WeightedBanzhaf().design(24, 36, rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="are left"):
        bernoulli_coalitions(3, 9, keep=0.5, rng=np.random.default_rng(0))
