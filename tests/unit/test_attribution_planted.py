"""Games where by construction some units matter and the others do not: every technique must rank them on top."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt import pipeline
from proxyprompt.attribution import LIME, ExactShapley, Explainer
from proxyprompt.coalitions import FloatArray
from proxyprompt.settings import Settings

N_QUERIES = 30


class PlantedGame:
    """``planted`` units add 1 on average, the first two of them only 1.6 together; the others 0.02.

    Every query has its own taste, and pairs and triples of any units interact a little.
    """

    def __init__(self, n_units: int, n_planted: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.planted = sorted(rng.choice(n_units, size=n_planted, replace=False).tolist())
        self.effects = 0.02 + 0.1 * rng.normal(size=(n_units, N_QUERIES))
        self.effects[self.planted] += 0.98
        self.terms = [
            (rng.permutation(n_units)[:2], 0.1 * rng.normal(size=N_QUERIES)) for _ in range(n_units)
        ]
        self.terms += [
            (rng.permutation(n_units)[:3], 0.1 * rng.normal(size=N_QUERIES)) for _ in range(n_units)
        ]
        self.terms.append((np.array(self.planted[:2]), np.full(N_QUERIES, -0.4)))

    def __call__(self, rows: np.ndarray) -> FloatArray:
        return rows @ self.effects + sum(rows[:, u].all(axis=1)[:, None] * k for u, k in self.terms)


def of_settings(name: str) -> tuple[Explainer, Settings]:
    return pipeline._EXPLAINERS[name](), Settings(explainer=name)


@pytest.mark.parametrize("name", sorted(pipeline._EXPLAINERS))
@pytest.mark.parametrize(("n_units", "n_planted"), [(8, 2), (24, 4), (60, 6)])
@pytest.mark.parametrize("seed", range(4))
def test_planted_units_are_found_at_the_default_budget(
    name: str, n_units: int, n_planted: int, seed: int
) -> None:
    explainer, chosen = of_settings(name)
    game = PlantedGame(n_units, n_planted, seed)
    budget = chosen.n_fit(n_units)
    found = explainer.attribute(game, n_units, budget=budget, rng=np.random.default_rng(seed))
    assert found.method == name
    assert found.n_coalitions <= budget
    assert sorted(found.ranking()[-n_planted:].tolist()) == game.planted
    if name != "leave_one_out":
        others = np.setdiff1d(np.arange(n_units), game.planted)
        assert found.mean[game.planted].min() > 2 * np.abs(found.mean[others]).max()


@pytest.mark.parametrize(("explainer", "n_units", "budget"), [(ExactShapley(), 8, 256), (LIME(), 24, 500)])
@pytest.mark.parametrize("seed", range(4))
def test_planted_units_are_found_by_the_techniques_outside_the_pipeline(
    explainer: Explainer, n_units: int, budget: int, seed: int
) -> None:
    game = PlantedGame(n_units, 3, seed)
    found = explainer.attribute(game, n_units, budget=budget, rng=np.random.default_rng(seed))
    assert sorted(found.ranking()[-3:].tolist()) == game.planted


@pytest.mark.parametrize("name", sorted(pipeline._EXPLAINERS))
def test_harmful_units_come_last_with_confidence(name: str) -> None:
    explainer, chosen = of_settings(name)
    game = PlantedGame(24, 4, 9)
    budget = chosen.n_proxy(24)
    found = explainer.attribute(lambda z: -game(z), 24, budget=budget, rng=np.random.default_rng(0))
    assert sorted(found.ranking()[:4].tolist()) == game.planted
    assert (found.upper_bound(0.95)[game.planted] < 0).all()
