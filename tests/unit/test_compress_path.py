"""Which demonstration leaves next, and which surrogate says so."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from proxyprompt.attribution import KernelSHAP, WeightedBanzhaf
from proxyprompt.errors import InputError
from proxyprompt.optimize.path import first_within, nested_path, surrogate_path
from proxyprompt.optimize.surrogate import choose_surrogate


def whole(n: int) -> np.ndarray:
    return np.ones(n, dtype=bool)


def leaving(path: np.ndarray) -> list[int]:
    return [int(np.flatnonzero(a & ~b)[0]) for a, b in itertools.pairwise(path)]


def test_lowest_attribution_leaves_first_ties_from_the_end_and_protected_stay() -> None:
    scores = np.array([0.3, -0.1, 0.2, 0.0])
    assert leaving(nested_path(scores, whole(4), protected=(1,))) == [3, 2, 0]
    assert leaving(nested_path(np.full(4, 0.1), whole(4))) == [3, 2, 1, 0]
    start = np.array([True, False, True, True])
    assert nested_path(scores, start).sum(axis=1).tolist() == [3, 2, 1, 0]


def test_per_token_a_long_demonstration_leaves_before_a_short_one_worth_less() -> None:
    scores, tokens = np.array([0.10, 0.08, 0.5]), np.array([100.0, 10.0, 20.0])
    assert leaving(nested_path(scores, whole(3))) == [1, 0, 2]
    assert leaving(nested_path(scores, whole(3), tokens=tokens)) == [0, 1, 2]
    with pytest.raises(InputError, match="tokens"):
        nested_path(scores, whole(3), tokens=np.array([1.0, 0.0, 1.0]))


def test_no_label_loses_its_last_demonstration() -> None:
    path = nested_path(np.array([0.1, 0.2, 0.3, 0.4]), whole(4), labels=["a", "a", "b", "a"])
    assert path[-1].tolist() == [False, False, True, True]
    assert leaving(path) == [0, 1]


def test_of_two_copies_one_stays() -> None:
    """Additive scores put both copies behind the middling one; the surrogate that knows pairs parts them."""

    def worth(rows: np.ndarray) -> np.ndarray:
        return 1.0 * (rows[:, 0] | rows[:, 1]) + 0.5 * rows[:, 2] + 0.1 * rows[:, 3]

    additive = np.array([0.2, 0.2, 0.5, 0.1])
    assert leaving(nested_path(additive, whole(4)))[:3] == [3, 1, 0]
    assert leaving(surrogate_path(worth, whole(4))) == [1, 3, 2, 0]


def test_first_within_the_caps() -> None:
    path = nested_path(np.arange(4.0), whole(4))
    tokens = np.array([50.0, 40.0, 30.0, 20.0, 10.0])
    assert first_within(path, max_demonstrations=2) == 2
    assert first_within(path, max_tokens=30, tokens=tokens) == 2
    assert first_within(path, max_demonstrations=3, max_tokens=15, tokens=tokens) == 4
    assert first_within(path[:2], max_demonstrations=1) is None
    with pytest.raises(InputError, match="max_tokens"):
        first_within(path, max_tokens=30)


# --- which surrogate

N = 16


def copies_game(rng: np.random.Generator):
    """Units i and i + 4 are copies for i < 4; the others add up; queries scale it."""
    weights = rng.uniform(0.1, 0.4, N)

    def values(rows: np.ndarray) -> np.ndarray:
        pairs = (rows[:, :4] | rows[:, 4:8]) @ np.array([1.0, 0.8, 0.9, 0.7])
        mean = pairs + rows[:, 8:] @ weights[8:]
        return mean[:, None] * np.linspace(0.8, 1.2, 12) + rng.normal(0, 0.05, (len(rows), 12))

    return values


def test_pairs_are_used_where_they_predict_better_and_name_the_copies() -> None:
    rng = np.random.default_rng(0)
    game = copies_game(rng)
    design = WeightedBanzhaf().design(N, 200, rng=rng)
    values = game(design.coalitions)
    attribution = WeightedBanzhaf().fit(design, values)
    found = choose_surrogate(attribution, design, values, rng=rng)
    assert found.kind == "pairwise"
    assert found.pairwise_error < found.additive_error
    assert {(0, 4), (1, 5), (2, 6), (3, 7)} >= set(found.copies)
    assert found.copies
    last = surrogate_path(found.predict, whole(N))[-5]
    assert all(last[i] != last[i + 4] for i in range(4))
    # Along the attributions both copies of a pair are gone while worthless units are still there.
    additive = nested_path(attribution.mean, whole(N))[-5]
    assert any(not additive[i] and not additive[i + 4] for i in range(4))


def test_pairs_are_not_used_where_they_do_not_help_or_cannot_be_told() -> None:
    rng = np.random.default_rng(1)
    weights = rng.uniform(-0.2, 0.5, N)

    def additive(rows: np.ndarray) -> np.ndarray:
        return (rows @ weights)[:, None] + rng.normal(0, 0.2, (len(rows), 8))

    design = WeightedBanzhaf().design(N, 60, rng=rng)
    values = additive(design.coalitions)
    found = choose_surrogate(WeightedBanzhaf().fit(design, values), design, values, rng=rng)
    assert found.kind == "additive"
    assert found.pairwise_error >= found.additive_error
    assert "do not predict" in found.why
    assert found.predict(whole(N)[None])[0] == pytest.approx(weights.sum(), abs=0.3)
    few = WeightedBanzhaf().design(N, 30, rng=rng)
    thin = additive(few.coalitions)
    assert "too few" in choose_surrogate(WeightedBanzhaf().fit(few, thin), few, thin, rng=rng).why
    shapley = KernelSHAP().design(N, 100, rng=rng)
    own = additive(shapley.coalitions)
    assert "kernel_shap (" in choose_surrogate(KernelSHAP().fit(shapley, own), shapley, own, rng=rng).why


def test_all_coalitions_give_exact_pairs() -> None:
    rng = np.random.default_rng(2)
    design = WeightedBanzhaf().design(4, 16, rng=rng)
    values = (design.coalitions[:, 0] | design.coalitions[:, 1]).astype(float)[:, None] * np.ones(3)
    found = choose_surrogate(WeightedBanzhaf().fit(design, values), design, values, rng=rng)
    assert found.kind == "pairwise"
    assert found.predict(design.coalitions) == pytest.approx(values[:, 0])
