"""LIME against the reference implementation: its neighbourhood, its kernel, and its ridge regression."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from scipy import stats

from proxyprompt.attribution import LIME, Design
from proxyprompt.coalitions import BoolArray, FloatArray

from .games import TableGame, random_table


def explain(peer, game: TableGame, n_samples: int, seed: int) -> tuple[dict[str, Any], Any]:
    """Explain a sentence of as many words as units with LIME; return what its regression was given, and said."""
    lime_text = peer("lime.lime_text")
    words = [f"w{i}" for i in range(game.n_units)]

    def values(texts: list[str]) -> FloatArray:
        return game(np.array([[word in text.split() for word in words] for text in texts]))

    explainer = lime_text.LimeTextExplainer(
        feature_selection="none", random_state=seed, class_names=list(map(str, range(game.n_queries)))
    )
    given: dict[str, Any] = {}
    solve = explainer.base.explain_instance_with_data

    def recorded(data, labels, distances, *args, **kwargs):
        given.update(data=data > 0.5, labels=labels, distances=distances)
        given["kernel"] = explainer.base.kernel_fn(distances)
        return solve(data, labels, distances, *args, **kwargs)

    explainer.base.explain_instance_with_data = recorded
    said = explainer.explain_instance(
        " ".join(words), values, labels=range(game.n_queries), num_samples=n_samples
    )
    return given, said


def design_of(drawn: BoolArray, kernel: FloatArray) -> Design:
    """Equal rows once, weighted by kernel times count; the empty coalition has no weight unless it was drawn."""
    empty = np.zeros((1, drawn.shape[1]), dtype=bool)
    rows, where = np.unique(np.vstack([empty, drawn]), axis=0, return_inverse=True)
    return Design(rows, np.bincount(where, weights=np.r_[0.0, kernel]), exact=False)


@pytest.mark.parametrize(("n_units", "n_samples"), [(5, 40), (8, 60), (8, 2000), (11, 300)])
def test_the_regression_on_limes_own_neighbourhood(n_units: int, n_samples: int, peer) -> None:
    game = random_table(n_units)
    given, said = explain(peer, game, n_samples, seed=n_units)
    design = design_of(given["data"], given["kernel"])
    ours = LIME().fit(design, game(design.coalitions))
    for query in range(game.n_queries):
        theirs = dict(said.local_exp[query])
        np.testing.assert_allclose(ours.values[query], [theirs[i] for i in range(n_units)], atol=1e-8)
        np.testing.assert_allclose(ours.intercept[query], said.intercept[query], atol=1e-8)
    np.testing.assert_allclose(ours.predict(np.ones((1, n_units), dtype=bool))[0, -1], said.local_pred[0])


@pytest.mark.parametrize("n_units", [5, 9])
def test_our_weights_are_limes_kernel_times_the_number_of_draws(n_units: int, peer) -> None:
    """So distance (100 times cosine), kernel form and width are its own; no number of ours is repeated here."""
    given, _ = explain(peer, random_table(n_units), 4000, seed=0)
    kernel = {tuple(row): weight for row, weight in zip(given["data"].tolist(), given["kernel"], strict=True)}
    assert len(kernel) > 20
    design = LIME().design(n_units, 500, rng=np.random.default_rng(0))
    draws = np.array(
        [
            weight / kernel[tuple(row)]
            for row, weight in zip(design.coalitions.tolist(), design.weights, strict=True)
            if weight > 0 and tuple(row) in kernel
        ]
    )
    np.testing.assert_allclose(draws, np.round(draws), atol=1e-9)
    assert (draws > 0.5).all()
    assert 400 < draws.sum().round() <= 499


def test_our_draws_follow_the_law_of_limes(peer) -> None:
    """How many units are kept, by a contingency test on draws of both, and how often each unit is."""
    n_units, n = 6, 6000
    given, _ = explain(peer, random_table(n_units), n, seed=1)
    design = LIME().design(n_units, n + 1, rng=np.random.default_rng(1))
    kernel = {tuple(row): weight for row, weight in zip(given["data"].tolist(), given["kernel"], strict=True)}
    counts = np.array(
        [w / kernel[tuple(r)] for r, w in zip(design.coalitions.tolist(), design.weights, strict=True)]
    ).round()
    assert counts.sum() == n
    sizes = np.array(
        [
            np.bincount(given["data"].sum(axis=1), minlength=n_units + 1),
            np.bincount(design.coalitions.sum(axis=1), weights=counts, minlength=n_units + 1),
        ]
    )
    assert sizes[:, -1].tolist() == [1, 1], "the full prompt is never drawn; it stands there once"
    assert stats.chi2_contingency(sizes[:, :-1]).pvalue > 1e-3
    ours, theirs = counts @ design.coalitions / n, given["data"].mean(axis=0)
    # Shares of two samples of 6000; 4.5 standard errors have probability 1e-5 a unit.
    assert (np.abs(ours - theirs) < 4.5 * np.sqrt(0.5 / n)).all()


def test_our_defaults_are_limes(peer) -> None:
    signature = inspect.signature(peer("lime.lime_text").LimeTextExplainer).parameters
    assert signature["kernel_width"].default == LIME().kernel_width
    assert inspect.signature(LIME).parameters["alpha"].default == 1.0
