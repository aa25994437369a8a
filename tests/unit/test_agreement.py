"""Agreement of attributions: answers worked by hand, and what noise does to them."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.agreement import held_out_agreement, rank_agreement, self_agreement, top_mass
from proxyprompt.attribution import KernelSHAP, WeightedBanzhaf
from proxyprompt.coalitions import enumerate_coalitions
from proxyprompt.errors import InputError
from proxyprompt.testing import AdditiveGame


def test_top_mass_counts_sizes_in_the_other_s_order():
    reference = [[3.0, -1.0, 0.0, 4.0]]
    assert top_mass([[0.0, -9.0, 5.0, 1.0]], reference, 1) == pytest.approx([1 / 8])
    assert top_mass([[0.0, -9.0, 5.0, 1.0]], reference, 3) == pytest.approx([5 / 8])
    assert top_mass(reference, reference, 2) == pytest.approx([7 / 8])
    assert top_mass([[0.0, 0.0, 0.0, 0.0]], reference, 1) == pytest.approx([3 / 8])
    assert np.isnan(top_mass(reference, [[0.0] * 4], 2)).all()


def test_rank_agreement_is_spearman():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (5, 7)).astype(float), rng.normal(size=(5, 7))
    assert rank_agreement(a, b) == pytest.approx(
        [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    )
    assert np.isnan(rank_agreement([[1.0, 1.0]], [[1.0, 2.0]])).all()


def everything_but(design, n):
    rows = enumerate_coalitions(n)
    fitted = {row.tobytes() for row in design.coalitions}
    return rows[[row.tobytes() not in fitted for row in rows]]


def test_held_out_agreement_is_the_cosine_of_attributions():
    """Over (nearly) all coalitions of ten independent units; also of two parallel queries with other scales."""
    n, rng = 10, np.random.default_rng(1)
    a, b = rng.normal(size=(3, n)), rng.normal(size=(3, n))
    b[0], b[1] = 7.0 * a[0], -a[1]
    explainer = KernelSHAP()
    design = explainer.design(n, 40, rng=rng)
    judge = everything_but(design, n)
    found = held_out_agreement(
        design, AdditiveGame(a)(design.coalitions), judge, AdditiveGame(b)(judge), explainer=explainer
    )
    cosine = (a[2] @ b[2]) / np.sqrt(a[2] @ a[2] * (b[2] @ b[2]))
    assert found == pytest.approx([1.0, 0.0, max(cosine, 0.0)], abs=0.05)


def test_agreement_with_values_that_do_not_vary_is_missing_and_a_flat_surrogate_agrees_with_nothing():
    explainer, rng = WeightedBanzhaf(), np.random.default_rng(2)
    design = explainer.design(6, 30, rng=rng)
    judge = explainer.held_out(6, 8, rng=rng, exclude=design.coalitions)
    game = AdditiveGame([[1.0, 0, 0, 0, 0, 2.0]] * 3)
    judged = game(judge)
    judged[:, 1] = 0.3
    judged[:6, 2] = np.nan
    fitted = game(design.coalitions)
    fitted[:, 0] = 0.1
    found = held_out_agreement(design, fitted, judge, judged, explainer=explainer)
    assert found[0] == 0.0
    assert np.isnan(found[1:]).all()
    with pytest.raises(InputError, match="fitted on"):
        held_out_agreement(design, fitted, design.coalitions, fitted, explainer=explainer)
    with pytest.raises(InputError, match="3 rows"):
        held_out_agreement(design, fitted, judge[:2], judged[:2], explainer=explainer)
    with pytest.raises(InputError, match="queries"):
        held_out_agreement(design, fitted, judge, judged[:, :2], explainer=explainer)


def test_a_surrogate_of_noise_agrees_with_held_out_noise_by_chance_only():
    """The reason for judging by other coalitions: on its own ones the same surrogate explains half of its noise."""
    explainer, rng = WeightedBanzhaf(), np.random.default_rng(3)
    design = explainer.design(12, 36, rng=rng)
    judge = explainer.held_out(12, 24, rng=rng, exclude=design.coalitions)
    noise = rng.normal(size=(36, 400))
    found = held_out_agreement(design, noise, judge, rng.normal(size=(24, 400)), explainer=explainer)
    assert found.mean() == pytest.approx(0.083, abs=0.015)  # E max(0, r) = sd / sqrt(2 pi), sd = 1 / sqrt(23)
    fit = explainer.fit(design, noise)
    assert np.corrcoef(fit.predict(design.coalitions)[2:, 0], noise[2:, 0])[0, 1] > 0.4


def one_out(values):
    return (values[0] - values[1:]).T


def test_self_agreement_falls_with_the_noise():
    rng = np.random.default_rng(4)
    values = np.vstack([np.zeros(200), -rng.normal(size=(8, 200))])
    means = [
        self_agreement(rank_agreement, one_out, values, s * rng.normal(size=500), rng=rng).mean()
        for s in (0.0, 0.5, 2.0, 50.0)
    ]
    assert means[0] == 1.0
    assert sorted(means, reverse=True) == means
    # Noise of half the spread: Pearson 1 / sqrt(1 + 0.25) = .89, Spearman of eight units a little less.
    assert means[1] == pytest.approx(0.86, abs=0.03)
    assert means[3] == pytest.approx(0.0, abs=0.06)


def test_refusals():
    with pytest.raises(InputError, match="one shape"):
        top_mass([[1.0, 2.0]], [[1.0]], 1)
    with pytest.raises(InputError, match="k=3"):
        top_mass([[1.0, 2.0]], [[1.0, 2.0]], 3)
    with pytest.raises(InputError, match="noise has 0"):
        self_agreement(rank_agreement, one_out, np.zeros((3, 1)), [], rng=np.random.default_rng(0))
