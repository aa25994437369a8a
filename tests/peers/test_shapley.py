"""Shapley values against shap, shapiq and captum: exact, by regression, and on the coalitions that they draw."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import Design, ExactShapley, KernelSHAP, LeaveOneOut
from proxyprompt.coalitions import BoolArray, FloatArray

from .games import TableGame, random_table


def exact(game: TableGame) -> FloatArray:
    """Ours, shape (n_queries, n_units)."""
    rng = np.random.default_rng(0)
    return ExactShapley().attribute(game, game.n_units, budget=2**game.n_units, rng=rng).values


def counted(drawn: BoolArray, weights: FloatArray | None = None) -> Design:
    """A design of what a library drew: equal rows once, their weights added; both ends, which weigh nothing here."""
    weights = np.ones(len(drawn)) if weights is None else weights
    ends = np.array([np.zeros(drawn.shape[1]), np.ones(drawn.shape[1])], dtype=bool)
    rows, where = np.unique(np.vstack([ends, drawn]), axis=0, return_inverse=True)
    total = np.bincount(where, weights=np.r_[0.0, 0.0, weights])
    total[~rows.any(axis=1) | rows.all(axis=1)] = 0.0
    return Design(rows, total, exact=False)


def as_sentences(game: TableGame, query: int):
    """A function of (rows of zeros and ones), for libraries that explain rows of data."""
    return lambda rows: game.of(query)(np.asarray(rows) > 0.5)


def as_tensors(torch, game: TableGame, query: int):
    def forward(rows):
        return torch.from_numpy(game.of(query)(rows.numpy() > 0.5))

    return forward


def test_exact_values_are_those_of_shap_and_shapiq(game, peer) -> None:
    shap, shapiq = peer("shap"), peer("shapiq")
    ours = exact(game)
    masker = shap.maskers.Independent(np.zeros((1, game.n_units)))
    for query in range(game.n_queries):
        theirs = shap.explainers.Exact(as_sentences(game, query), masker)(np.ones((1, game.n_units))).values[
            0
        ]
        np.testing.assert_allclose(ours[query], theirs, atol=1e-10)
        values = shapiq.ExactComputer(game.of(query), n_players=game.n_units)("SV")
        np.testing.assert_allclose(ours[query], values.get_n_order_values(1), atol=1e-10)


def test_exact_values_are_those_of_captum_over_all_orders(peer) -> None:
    torch, captum = peer("torch"), peer("captum.attr")
    game = random_table(5)
    ours = exact(game)
    for query in range(game.n_queries):
        theirs = captum.ShapleyValues(as_tensors(torch, game, query)).attribute(
            torch.ones(1, 5, dtype=torch.float64), perturbations_per_eval=120
        )
        assert theirs.dtype == torch.float32, "captum adds up in single precision, hence the tolerance"
        np.testing.assert_allclose(ours[query], theirs[0].numpy(), atol=1e-6)


def test_the_regression_on_all_coalitions_is_that_of_shap_and_shapiq(game, peer) -> None:
    shap, shapiq = peer("shap"), peer("shapiq")
    budget = 2**game.n_units
    ours = KernelSHAP().attribute(game, game.n_units, budget=budget, rng=np.random.default_rng(0)).values
    for query in range(game.n_queries):
        explainer = shap.KernelExplainer(as_sentences(game, query), np.zeros((1, game.n_units)))
        theirs = explainer.shap_values(
            np.ones(game.n_units), nsamples=budget, l1_reg=f"num_features({game.n_units})", silent=True
        )
        np.testing.assert_allclose(ours[query], theirs, atol=1e-8)
        # shapiq's weight of 1e6 on the ends, where ours is a constraint, shows in the sixth digit.
        values = shapiq.KernelSHAP(n=game.n_units, random_state=0).approximate(budget, game.of(query))
        np.testing.assert_allclose(ours[query], values.get_n_order_values(1), atol=1e-5)


@pytest.mark.parametrize(("n_units", "n_samples"), [(8, 100), (10, 120), (12, 400)])
def test_the_regression_on_the_coalitions_that_shap_drew(n_units: int, n_samples: int, peer) -> None:
    """Away from all coalitions, on masks and weights that are not ours."""
    shap = peer("shap")
    game = random_table(n_units)
    for query in range(game.n_queries):
        np.random.seed(query)  # shap draws from numpy's global generator
        explainer = shap.KernelExplainer(as_sentences(game, query), np.zeros((1, n_units)))
        theirs = explainer.shap_values(np.ones(n_units), nsamples=n_samples, l1_reg=False, silent=True)
        used = explainer.nsamplesAdded
        assert n_samples // 2 < used < 2**n_units - 2
        design = counted(explainer.maskMatrix[:used] > 0.5, explainer.kernelWeights[:used])
        ours = KernelSHAP().fit(design, game(design.coalitions)[:, [query]]).values[0]
        np.testing.assert_allclose(ours, theirs, atol=1e-8)
        assert np.abs(ours - exact(game)[query]).max() > 1e-3


@pytest.mark.parametrize("n_units", [6, 9])
def test_the_regression_on_the_coalitions_that_captum_drew(n_units: int, peer) -> None:
    """Tolerance 1e-4: captum gives both ends a weight of a million instead of a constraint, in single precision."""
    torch, captum = peer("torch"), peer("captum.attr")
    game = random_table(n_units)
    for query in range(game.n_queries):
        asked: list[FloatArray] = []
        forward = as_tensors(torch, game, query)

        def recorded(rows, forward=forward, asked=asked):
            asked.extend(rows.numpy() > 0.5)
            return forward(rows)

        torch.manual_seed(query)
        theirs = captum.KernelShap(recorded).attribute(
            torch.ones(1, n_units, dtype=torch.float64), n_samples=200
        )
        # captum asks for the whole input once beforehand; both ends have no weight in our regression.
        design = counted(np.array(asked))
        ours = KernelSHAP().fit(design, game(design.coalitions)[:, [query]]).values[0]
        np.testing.assert_allclose(ours, theirs[0].numpy(), atol=1e-4)
        assert np.abs(ours - exact(game)[query]).max() > 1e-3


def test_exact_values_lie_within_the_error_of_captums_sampling(game, peer) -> None:
    """ShapleyValueSampling is a mean over random orders; ten runs of it give their own standard error.

    Ten runs leave 9 degrees of freedom: |t| above 6 has probability 2e-4 a unit, for 35 units here. Where no
    order matters (the additive game) the error is rounding, and any factor on our side is seen.
    """
    torch, captum = peer("torch"), peer("captum.attr")
    ours = exact(game)[-1]
    torch.manual_seed(0)
    sampling = captum.ShapleyValueSampling(as_tensors(torch, game, game.n_queries - 1))
    whole = torch.ones(1, game.n_units, dtype=torch.float64)
    runs = np.array(
        [sampling.attribute(whole, n_samples=20, perturbations_per_eval=8)[0].numpy() for _ in range(10)]
    )
    error = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    assert (error < 0.1 * np.ptp(game.values[:, -1])).all()
    assert (np.abs(runs.mean(axis=0) - ours) < 6 * error + 1e-6).all()


def test_our_sampled_values_lie_within_our_own_error(peer) -> None:
    """The other way round: shapiq's exact values, our standard error; t with few degrees of freedom."""
    shapiq = peer("shapiq")
    game = random_table(10, 1)
    truth = shapiq.ExactComputer(game.of(0), n_players=10)("SV").get_n_order_values(1)
    apart = []
    for seed in range(20):
        result = KernelSHAP().attribute(game, 10, budget=200, rng=np.random.default_rng(seed))
        apart.append((result.values[0] - truth) / result.standard_error)
    assert 0.6 < np.sqrt(np.mean(np.square(apart))) < 1.3


def test_leave_one_out_is_captums_ablation(game, peer) -> None:
    torch, captum = peer("torch"), peer("captum.attr")
    ours = LeaveOneOut().attribute(game, game.n_units, budget=game.n_units + 2, rng=np.random.default_rng(0))
    for query in range(game.n_queries):
        theirs = captum.FeatureAblation(as_tensors(torch, game, query)).attribute(
            torch.ones(1, game.n_units, dtype=torch.float64)
        )
        np.testing.assert_allclose(ours.values[query], theirs[0].numpy(), atol=1e-10)
