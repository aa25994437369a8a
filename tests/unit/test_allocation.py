"""How much to buy of the target: the square-root law, the limits, and whether the promise is kept."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import WeightedBanzhaf
from proxyprompt.attribution.allocation import allocate
from proxyprompt.attribution.calibrated import calibrate
from proxyprompt.attribution.extending import nested_designs
from proxyprompt.errors import InputError
from proxyprompt.testing import UnanimityGame

EXPLAINER = WeightedBanzhaf(0.5)
GAME = UnanimityGame(12, [((0, 1), 1.0), ((2, 3), -1.0), ((4, 5, 6), 0.7), ((7, 8), 0.5)])


def median_error(attribution):
    return float(np.median(attribution.se_coalitions))


def first(budget=80, seed=0):
    return EXPLAINER.attribute(GAME, 12, budget=budget, rng=np.random.default_rng(seed))


def test_half_the_error_takes_four_times_the_coalitions():
    found = first()
    wanted = median_error(found) / 2
    plan = allocate(found, n_queries=10, largest=1000, standard_error=wanted)
    assert plan.n_target == 4 * found.n_coalitions
    assert plan.calls == 3 * found.n_coalitions * 10
    assert plan.standard_error == pytest.approx(wanted)
    assert plan.limited_by == "nothing"


def test_what_was_planned_is_what_comes_out():
    ratios = []
    for seed in range(20):
        found = first(seed=seed)
        wanted = 0.6 * median_error(found)
        plan = allocate(found, n_queries=1, largest=4000, standard_error=wanted)
        _, more = nested_designs(EXPLAINER, 12, (80, plan.n_target), rng=np.random.default_rng(seed))
        assert more.n_coalitions <= plan.n_target
        ratios.append(median_error(EXPLAINER.fit(more, GAME(more.coalitions))) / wanted)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(
    ("limits", "n_target", "by"),
    [
        ({"calls": 400}, 120, "calls"),
        ({"calls": 409}, 120, "calls"),
        ({"money": 2.0, "call_price": 0.005}, 120, "money"),
        ({"calls": 10**6}, 200, "design"),
        ({"calls": 400, "money": 1.0, "call_price": 0.01}, 90, "money"),
        ({"money": 1.0, "call_price": 0.0}, 200, "design"),
        ({"calls": 0}, 80, "calls"),
    ],
)
def test_limits(limits, n_target, by):
    for wanted in (None, 1e-6):
        plan = allocate(first(), n_queries=10, largest=200, standard_error=wanted, **limits)
        assert (plan.n_target, plan.limited_by) == (n_target, by)
        assert plan.calls == (n_target - 80) * 10
        assert plan.to_dict()["calls"] == plan.calls


def test_a_proxy_saves_target_calls_for_the_same_error():
    few, many = nested_designs(EXPLAINER, 12, (80, 2000), rng=np.random.default_rng(1))
    proxy, target = GAME(many.coalitions), GAME(few.coalitions)
    target = target + 0.05 * np.random.default_rng(2).normal(size=target.shape)
    helped = calibrate(
        EXPLAINER, many, proxy, np.arange(80), target, rng=np.random.default_rng(3), measured_design=few
    )
    wanted = 0.4 * median_error(helped.oracle)
    with_proxy, alone = (
        allocate(f, n_queries=5, largest=2000, standard_error=wanted) for f in (helped, helped.oracle)
    )
    assert with_proxy.n_target < 0.6 * alone.n_target
    unreachable = allocate(helped, n_queries=5, largest=2000, standard_error=1e-9)
    assert (unreachable.n_target, unreachable.limited_by) == (2000, "design")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither a standard error nor a limit"),
        ({"standard_error": 0.0}, "above 0"),
        ({"calls": -1}, "0 or more"),
        ({"money": 1.0}, "without call_price"),
        ({"calls": 1, "n_queries": 0}, "at least 1 query"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(InputError, match=message):
        allocate(first(), **{"n_queries": 1, "largest": 100, **given})
