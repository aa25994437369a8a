"""Fidelity against an independent computation: least squares by scipy, R2 and accuracy by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from proxyprompt.attribution import LIME, Explainer, KernelSHAP, WeightedBanzhaf
from proxyprompt.coalitions import BoolArray, FloatArray, uniform_coalitions
from proxyprompt.fidelity import label_fidelity, score_fidelity

N_UNITS, N_QUERIES, N_LABELS = 6, 4, 3
EXPLAINERS = [KernelSHAP(), LIME(), WeightedBanzhaf()]


def probabilities(rows: BoolArray, seed: int) -> FloatArray:
    """Softmax of scores with pairwise effects, (n_rows, n_queries, n_labels)."""
    rng = np.random.default_rng(seed)
    single, pairs = (rng.normal(size=(N_QUERIES, N_LABELS, size)) for size in (N_UNITS, N_UNITS - 1))
    z = rows.astype(float)
    both = z[:, 1:] * z[:, :-1]
    scores = np.einsum("ru,qlu->rql", z, single) + np.einsum("rp,qlp->rql", both, pairs)
    return np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)


def surrogate(
    explainer: Explainer, rows: BoolArray, weights: FloatArray, values: FloatArray, judge: BoolArray
):
    """The surrogate's prediction on ``judge``, by minimizing the loss that the technique states."""
    z, x = rows.astype(float), judge.astype(float)
    empty, full = values[~rows.any(axis=1)][0], values[rows.all(axis=1)][0]
    if isinstance(explainer, KernelSHAP):
        # The last unit takes what the others leave of v(full) - v(empty).
        free, gap = z[:, :-1] - z[:, -1:], values - empty - z[:, -1] * (full - empty)
        phi = np.linalg.lstsq(free * np.sqrt(weights)[:, None], gap * np.sqrt(weights), rcond=None)[0]
        return empty + x @ np.r_[phi, full - empty - phi.sum()]
    penalty = 1.0 if isinstance(explainer, LIME) else 0.0

    def loss(b: FloatArray) -> float:
        return float(weights @ (values - b[0] - z @ b[1:]) ** 2 + penalty * b[1:] @ b[1:])

    b = minimize(loss, np.zeros(N_UNITS + 1), method="BFGS", options={"gtol": 1e-9}).x
    return b[0] + x @ b[1:]


@pytest.fixture(params=EXPLAINERS, ids=lambda explainer: explainer.method)
def setting(request):
    """An explainer, its design, coalitions to judge on, and the values of two models on both."""
    explainer, rng = request.param, np.random.default_rng(5)
    design = explainer.design(N_UNITS, 34, rng=rng)
    judge = uniform_coalitions(N_UNITS, 20, rng=rng, exclude=design.coalitions)
    models = {
        name: (probabilities(design.coalitions, seed), probabilities(judge, seed))
        for name, seed in (("target", 0), ("proxy", 1))
    }
    return explainer, design, judge, models


@pytest.mark.parametrize("fitted_on", ["target", "proxy"])
@pytest.mark.parametrize("n_labels", [2, 3])
def test_label_fidelity_is_the_accuracy_of_the_surrogates_label(setting, fitted_on, n_labels, peer) -> None:
    """With two labels the surrogate's label is read off one surrogate at one half, with three by argmax."""
    metrics = peer("sklearn.metrics")
    explainer, design, judge, models = setting
    fit, judged = models[fitted_on][0], models["target"][1]
    if n_labels == 2:
        fit, judged = (np.stack([1 - p[:, :, 0], p[:, :, 0]], axis=2) for p in (fit, judged))
    labels = judged.argmax(axis=2)
    ours = label_fidelity(design, fit, judge, labels, explainer=explainer)
    for query in range(N_QUERIES):
        g = [
            surrogate(explainer, design.coalitions, design.weights, fit[:, query, label], judge)
            for label in range(n_labels)
        ]
        predicted = g[1] > 0.5 if n_labels == 2 else np.argmax(g, axis=0)
        assert ours[query] == metrics.accuracy_score(labels[:, query], predicted)
    assert len(set(ours.tolist())) > 1


@pytest.mark.parametrize("fitted_on", ["target", "proxy"])
def test_score_fidelity_is_r2_and_accuracy_at_the_midpoint(setting, fitted_on, peer) -> None:
    metrics = peer("sklearn.metrics")
    explainer, design, judge, models = setting
    fit, (fit_target, judged) = models[fitted_on][0][:, :, 0], (p[:, :, 0] for p in models["target"])
    judged = judged.copy()
    judged[:5, 2] = np.nan
    ends = fit_target[design.empty_row], fit_target[design.full_row]
    ours = score_fidelity(
        design, fit, judge, judged, judged_base=ends[0], judged_full=ends[1], explainer=explainer
    )
    for query in range(N_QUERIES):
        seen = ~np.isnan(judged[:, query])
        g = surrogate(explainer, design.coalitions, design.weights, fit[:, query], judge)[seen]
        f = judged[seen, query]
        assert ours.r2[query] == pytest.approx(metrics.r2_score(f, g), abs=1e-5)
        mine = (fit[design.empty_row, query] + fit[design.full_row, query]) / 2
        theirs = (ends[0][query] + ends[1][query]) / 2
        assert ours.side_agreement[query] == metrics.accuracy_score(f > theirs, g > mine)
    assert ours.n_judged.tolist() == [20, 20, 15, 20]
    if fitted_on == "proxy":
        assert (ours.r2 < 0).any(), "R2 is not clipped"
