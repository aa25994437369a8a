"""How often cleaning removes anything from a prompt in which nothing is harmful."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import WeightedBanzhaf
from proxyprompt.optimize import clean
from proxyprompt.value_function import Values

N, N_QUERIES, RUNS = 12, 60, 300


def values(rows: np.ndarray, rng: np.random.Generator, *, right_or_wrong: bool) -> Values:
    """Every demonstration's effect differs by query and is zero on average: nothing is harmful."""
    effects = 0.3 * rng.standard_normal((N, N_QUERIES))
    effects -= effects.mean(axis=1, keepdims=True) - 0.3 / np.sqrt(N_QUERIES) * rng.standard_normal((N, 1))
    utility = rows @ effects + 0.1 * rng.standard_normal((len(rows), N_QUERIES))
    if right_or_wrong:
        utility = (utility > 0).astype(float)
    zeros = np.zeros(utility.shape, dtype=np.int64)
    return Values(
        rows, utility, utility, zeros, None, zeros, "accuracy" if right_or_wrong else "log-probability"
    )


@pytest.mark.parametrize("right_or_wrong", [False, True])
def test_false_removals_are_at_most_their_level(right_or_wrong: bool) -> None:
    removed = suspected = 0
    for seed in range(RUNS):
        rng = np.random.default_rng([seed, right_or_wrong])
        design = WeightedBanzhaf().design(N, 48, rng=rng)
        attribution = WeightedBanzhaf().fit(
            design, values(design.coalitions, rng, right_or_wrong=right_or_wrong).utility
        )
        result = clean(
            attribution, lambda rows, rng=rng: values(rows, rng, right_or_wrong=right_or_wrong), level=0.05
        )
        removed += bool(result.removed)
        suspected += bool(result.flagged)
    # The first stage is generous on purpose, so that this test is about the second one.
    assert suspected > 0.5 * RUNS
    # 5 % of 300 is 15; a binomial(300, 0.05) exceeds 25 with probability 0.005.
    assert removed <= 25
