"""se_coalitions means what it says: coverage over repeated draws of the coalitions."""

import numpy as np
import pytest

from proxyprompt.attribution import LIME, KernelSHAP
from proxyprompt.testing import UnanimityGame

REPLICATIONS = 300


def game(n_units, n_queries=4):
    rng = np.random.default_rng(11)
    terms = [((unit,), rng.normal(size=n_queries)) for unit in range(n_units)]
    terms += [(tuple(rng.permutation(n_units)[:2]), rng.normal(size=n_queries)) for _ in range(2 * n_units)]
    terms += [(tuple(rng.permutation(n_units)[:4]), rng.normal(size=n_queries)) for _ in range(n_units)]
    return UnanimityGame(n_units, terms)


@pytest.mark.parametrize(("n_units", "budget"), [(8, 40), (10, 60), (10, 200), (16, 100), (24, 240)])
def test_kernel_shap_coverage(n_units, budget):
    played, rng = game(n_units), np.random.default_rng(0)
    truth = played.shapley_values.mean(axis=0)
    errors, stated = [], []
    for _ in range(REPLICATIONS):
        result = KernelSHAP().attribute(played, n_units, budget=budget, rng=rng)
        errors.append(result.mean - truth)
        stated.append(result.se_coalitions)
    coverage = (np.abs(errors) <= 1.96 * np.array(stated)).mean()
    print(f"\nKernelSHAP n={n_units} budget={budget}: coverage {coverage:.3f}")
    assert 0.90 <= coverage <= 0.99
    # Weighted least squares is a ratio, biased at small samples; well inside one standard error here.
    assert np.abs(np.mean(errors, axis=0)).max() < 0.6 * np.std(errors, axis=0).max()


@pytest.mark.parametrize(("n_units", "budget"), [(12, 30), (24, 54), (24, 72)])
def test_kernel_shap_is_conservative_where_coalitions_are_scarce(n_units, budget):
    played, rng = game(n_units), np.random.default_rng(0)
    truth = played.shapley_values.mean(axis=0)
    hits = []
    for _ in range(REPLICATIONS):
        result = KernelSHAP().attribute(played, n_units, budget=budget, rng=rng)
        hits.append(np.abs(result.mean - truth) <= 1.96 * result.se_coalitions)
    print(f"\nKernelSHAP n={n_units} budget={budget}: coverage {np.mean(hits):.3f}")
    assert np.mean(hits) >= 0.93


def test_lime_coverage_of_the_same_regression():
    n_units, budget = 10, 120
    played, rng = game(n_units), np.random.default_rng(0)
    fits = [LIME().attribute(played, n_units, budget=budget, rng=rng) for _ in range(REPLICATIONS)]
    means = np.array([fit.mean for fit in fits])
    coverage = (np.abs(means - means.mean(axis=0)) <= 1.96 * np.array([f.se_coalitions for f in fits])).mean()
    print(f"\nLIME coverage {coverage:.3f}")
    assert 0.90 <= coverage <= 0.99


def test_both_parts_cover_the_population_mean():
    """Queries and coalitions drawn anew each time: the combined error covers the population's credit."""
    n_units, n_queries, rng = 8, 30, np.random.default_rng(5)
    pairs = [tuple(rng.permutation(n_units)[:2]) for _ in range(2 * n_units)]
    centres = rng.normal(size=n_units + len(pairs))
    units = [(unit,) for unit in range(n_units)] + pairs
    truth = UnanimityGame(n_units, list(zip(units, centres, strict=True))).shapley_values[0]
    hits = []
    for _ in range(REPLICATIONS):
        pay = centres + rng.normal(size=(n_queries, len(centres)))
        played = UnanimityGame(n_units, list(zip(units, pay.T, strict=True)))
        result = KernelSHAP().attribute(played, n_units, budget=60, rng=rng)
        hits.append((result.lower_bound(0.975) <= truth) & (truth <= result.upper_bound(0.975)))
    print(f"\nboth parts: coverage {np.mean(hits):.3f}")
    assert 0.92 <= np.mean(hits) <= 0.99
