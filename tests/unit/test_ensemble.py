"""Ensembles: scale-free means, signs kept, errors that do not shrink by wishful thinking."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import LeaveOneOut, WeightedBanzhaf
from proxyprompt.attribution.ensemble import ensemble, standardized
from proxyprompt.errors import InputError
from proxyprompt.testing import AdditiveGame


def fit(weights, explainer=None):
    weights = np.atleast_2d(np.asarray(weights, dtype=float))
    explainer = explainer or LeaveOneOut()
    return explainer.attribute(
        AdditiveGame(weights), weights.shape[1], budget=weights.shape[1] + 2, rng=np.random.default_rng(0)
    )


def test_a_loud_model_does_not_drown_the_others():
    quiet, loud = fit([[1.0, 0.0]]), fit([[0.0, 1000.0]])
    found = ensemble([quiet, loud])
    assert found.values[0, 0] == pytest.approx(found.values[0, 1])


def test_a_model_has_one_scale_and_zero_stays_zero():
    one = np.array([[3.0, 0.0, 1.0], [30.0, 0.0, 10.0]])
    found = ensemble([fit(one), fit(7.0 * one)])
    assert found.values == pytest.approx(4.0 * one)
    assert (standardized(fit([[2.0, 3.0, 7.0]])) > 0).all()
    assert standardized(fit([[0.0, 0.0]])).tolist() == [[0.0, 0.0]]


def test_identical_members_give_their_own_attributions_and_no_smaller_error():
    rng = np.random.default_rng(1)
    explainer = WeightedBanzhaf()
    design = explainer.design(6, 30, rng=rng)
    one = explainer.fit(design, rng.normal(size=(30, 1)))
    found = ensemble([one, one, one])
    assert found.values == pytest.approx(one.values)
    assert found.se_coalitions == pytest.approx(one.se_coalitions)
    assert found.df_coalitions == one.df_coalitions
    assert found.settings["ensemble"] == 3


def test_independent_errors_of_the_members_average_out():
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(50, 8))
    members = [fit(s * (truth + 0.8 * rng.normal(size=truth.shape))) for s in (1.0, 5.0, 0.2)]

    def corr(a):
        return np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a.values, truth, strict=True)])

    assert corr(ensemble(members)) > max(map(corr, members)) + 0.05


def test_members_must_belong_together():
    with pytest.raises(InputError, match="at least two"):
        ensemble([fit([[1.0, 2.0]])])
    with pytest.raises(InputError, match="differ"):
        ensemble([fit([[1.0, 2.0]]), fit([[1.0, 2.0, 3.0]])])
