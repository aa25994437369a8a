"""The proxy proposes, the target verifies: what is measured, in which order, and when a probe is enough."""

from __future__ import annotations

import json

import numpy as np
import pytest

from proxyprompt.attribution.verified import (
    ProbeThreshold,
    StoppingRule,
    calibrate_probe,
    calibrate_stopping,
    noise_floor,
    propose,
    verify,
)
from proxyprompt.errors import InputError

EFFECTS = np.array([0.1, -2.0, 3.0, 0.0, -0.2, 0.4])
GUESS = np.array([0.0, 9.0, 7.0, 1.0, -2.0, -0.5])


class Target:
    """Answers like a model that is paid by the call."""

    def __init__(self, effects=EFFECTS):
        self.effects, self.asked = np.asarray(effects, dtype=float), []

    def __call__(self, units):
        self.asked.append(units)
        return self.effects[list(units)]


def test_the_two_strongest_are_measured_and_the_best_measured_one_is_named():
    target = Target()
    found = verify(GUESS, target)
    assert (found.best, found.order, found.outcome) == (2, (1, 2), "verified")
    assert target.asked == [(1, 2)]
    assert found.target_calls == 3
    assert found.oracle_share == pytest.approx(3 / 7)
    assert np.flatnonzero(~np.isnan(found.measured)).tolist() == [1, 2]
    assert found.estimated.tolist() == GUESS.tolist()


def test_where_the_models_disagree_everything_is_measured_or_nothing_is_said():
    target = Target()
    found = verify(-GUESS[::-1], target, agree=False)
    assert (found.best, found.outcome, found.target_calls) == (2, "measured_all", 7)
    target = Target()
    found = verify(GUESS, target, agree=False, on_disagreement="abstain")
    assert (found.best, found.outcome, found.target_calls, target.asked) == (None, "abstained", 1, [])


@pytest.mark.parametrize(("threshold", "calls", "best"), [(1.5, 2, 1), (2.5, 3, 2), (float("inf"), 3, 2)])
def test_a_strong_first_probe_ends_it_and_a_weak_one_does_not(threshold, calls, best):
    probe = ProbeThreshold(threshold, 0.9, 0.1, 100, 50)
    found = verify(GUESS, Target(), probe=probe)
    assert (found.target_calls, found.best) == (calls, best)
    assert found.outcome == ("probe_accepted" if calls == 2 else "verified")


PROBE = ProbeThreshold(1.5, 0.9, 0.1, 100, 50)
STOP = StoppingRule(0.4, 0.9, 0.1, 100)


@pytest.mark.parametrize(
    ("ratio", "order", "outcome"),
    [
        # Effects 2 and 3 are measured for guesses of 9 and 7; the guesses after them are 7, 2, 1.
        (0.25, (1,), "settled"),
        (0.4, (1, 2), "settled"),
        (2.0, (1, 2, 4), "settled"),
        (float("inf"), (1, 2, 4, 3, 5, 0), "measured_all"),
    ],
)
def test_it_stops_when_the_next_estimate_is_small_beside_what_was_measured(ratio, order, outcome):
    target = Target()
    found = verify(GUESS, target, stop=StoppingRule(ratio, 0.9, 0.1, 100))
    assert (found.order, found.outcome, found.target_calls) == (order, outcome, 1 + len(order))
    assert target.asked == [(i,) for i in order]


def test_a_disagreement_is_measured_in_full_or_followed():
    assert verify(GUESS, Target(), agree=False, stop=STOP).outcome == "measured_all"
    assert verify(GUESS, Target(), agree=False, stop=STOP, on_disagreement="follow").order == (1, 2)


def test_units_that_proxies_know_nothing_of_come_first_whatever_the_estimate():
    steps = propose(GUESS, first=(0, 3), stop=STOP)
    assert next(steps) == (0, 3)
    assert steps.send(EFFECTS[[0, 3]]) == (1,)
    assert steps.send(EFFECTS[[1]]) == (2,)
    with pytest.raises(StopIteration) as end:
        steps.send(EFFECTS[[2]])
    assert end.value.value.order == (0, 3, 1, 2)
    assert end.value.value.best == 2


def proposals(rng, n, noise):
    """Targets of 8 units with heavy tails, and proxies that see them through noise."""
    truth = rng.standard_t(3, size=(n, 8))
    return truth + noise * rng.normal(size=(n, 8)), 40 * truth


def test_a_stopping_rule_keeps_its_promise_and_saves_calls():
    """The chance that the rule finds the largest unit less often than promised stays under its level."""
    rng = np.random.default_rng(5)
    guess, truth = proposals(rng, 4000, 1.0)
    broken, shares = 0, []
    for _ in range(100):
        rule = calibrate_stopping(*proposals(rng, 60, 1.0), precision=0.8, level=0.1)
        checks = [
            verify(g, lambda u, t=t: t[list(u)], stop=rule) for g, t in zip(guess[:300], truth, strict=False)
        ]
        broken += np.mean([c.best == np.abs(t).argmax() for c, t in zip(checks, truth, strict=False)]) < 0.8
        shares.append(np.mean([c.oracle_share for c in checks]))
    assert broken <= 0.1 * 100 + 6
    assert np.mean(shares) < 0.75


def test_too_few_queries_measure_everything():
    rng = np.random.default_rng(6)
    guess, truth = proposals(rng, 21, 0.0)
    assert calibrate_stopping(guess, truth).ratio == float("inf")
    assert calibrate_stopping([], []).ratio == float("inf")
    assert calibrate_stopping([], []).to_dict()["ratio"] is None
    guess, truth = proposals(rng, 22, 0.0)
    perfect = calibrate_stopping(guess, truth)
    assert np.isfinite(perfect.ratio)
    assert (perfect.found, perfect.n_calibration) == (1.0, 22)
    truth[0, 0] = np.nan
    assert calibrate_stopping(guess, truth).n_calibration == 21


def test_effects_below_the_noise_floor_name_nothing_and_close_ones_are_ties():
    assert verify(GUESS, Target(EFFECTS / 100), floor=0.05).outcome == "below_floor"
    assert verify(GUESS, Target(EFFECTS / 100), floor=0.05).best is None
    assert verify(GUESS, Target(), floor=1.2).ties == (1, 2)
    assert verify(GUESS, Target(), floor=0.5).ties == (2,)


def test_a_failed_measurement_is_never_the_best_and_never_zero():
    effects = EFFECTS.copy()
    effects[2] = np.nan
    found = verify(GUESS, Target(effects))
    assert found.best == 1
    assert np.isnan(found.measured[2])
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["measured"][2] is None
    assert verify(GUESS, Target(np.full(6, np.nan))).best is None


def test_one_unit_and_more_wanted_than_there_are():
    assert verify([3.0], Target([1.0])).best == 0
    found = verify(GUESS, Target(), top=50)
    assert (found.outcome, found.target_calls) == ("measured_all", 7)


def test_the_noise_floor_is_two_standard_errors_of_a_difference():
    rng = np.random.default_rng(0)
    repeats = rng.normal(size=(3, 4000)) * 0.5 + rng.normal(size=4000)
    assert noise_floor(repeats) == pytest.approx(2 * np.sqrt(2) * 0.5, rel=0.03)
    repeats[1:, 0] = np.nan  # one value says nothing about noise
    assert noise_floor(repeats) == pytest.approx(2 * np.sqrt(2) * 0.5, rel=0.03)
    assert noise_floor(np.ones((2, 5))) == 0.0
    with pytest.raises(InputError, match="no query has two values"):
        noise_floor([[1.0, 2.0]])


def test_a_probe_s_threshold_keeps_its_promise():
    """The chance that the true precision at the threshold is below the wanted one stays under its level."""
    rng = np.random.default_rng(1)
    fine = np.linspace(0, 4, 4001)
    chance = 1 / (
        1 + np.exp(-3 * (fine - 1.4))
    )  # of a right first choice, by effect; mean over the tail falls short of .9
    broken = found_any = 0
    for _ in range(400):
        effect = rng.uniform(0, 4, 120)
        right = rng.random(120) < 1 / (1 + np.exp(-3 * (effect - 1.4)))
        got = calibrate_probe(effect, right, precision=0.9, level=0.1)
        if np.isfinite(got.threshold):
            found_any += 1
            broken += chance[fine >= got.threshold].mean() < 0.9
    assert found_any > 300
    assert broken <= 0.1 * 400


def test_too_little_evidence_gives_no_threshold():
    assert calibrate_probe(np.arange(10.0), np.ones(10, dtype=bool)).threshold == float("inf")
    assert calibrate_probe(np.arange(200.0), np.zeros(200, dtype=bool)).threshold == float("inf")
    always = calibrate_probe(np.arange(1.0, 201.0), np.ones(200, dtype=bool))
    assert (always.threshold, always.n_accepted) == (1.0, 200)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: verify([], Target()), "finite numbers"),
        (lambda: verify([np.nan, 1.0], Target()), "finite numbers"),
        (lambda: verify(GUESS, Target(), top=0), "at least 1"),
        (lambda: verify(GUESS, Target(), floor=-1.0), "0 or more"),
        (lambda: verify(GUESS, Target(), on_disagreement="guess"), "measure_all, follow or abstain"),
        (lambda: verify(GUESS, lambda units: [1.0]), "one effect a unit"),
        (lambda: verify(GUESS, Target(), probe=PROBE, stop=STOP), "both given"),
        (lambda: next(propose(GUESS, first=(1, 1))), "distinct units"),
        (lambda: next(propose(GUESS, first=(6,))), "distinct units"),
        (lambda: calibrate_stopping([GUESS], []), "One array a query"),
        (lambda: calibrate_stopping([GUESS], [EFFECTS[:3]]), "finite estimates of the same units"),
        (lambda: calibrate_stopping([GUESS], [EFFECTS], level=0.0), "strictly between"),
        (lambda: calibrate_probe([1.0], [True, False]), "the same"),
        (lambda: calibrate_probe([1.0], [True], precision=1.0), "strictly between"),
        (lambda: noise_floor([1.0, 2.0]), "n_repeats"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
