"""Conformal checks of new outputs: exact false-alarm rate, power on planted anomalies, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.artifact import Artifact
from proxyprompt.attribution import KernelSHAP, WeightedBanzhaf
from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.explains import OutputCheck, calibrate_check, explains

N_UNITS = 8
WEIGHTS = np.array([2.0, -1.0, 0.5, 0.0, 1.0, 0.3, 0.0, -0.5])
PROBES = np.array([[True] * N_UNITS, *(~np.eye(N_UNITS, dtype=bool)[[0, 1, 4]])])


class Queries:
    """Curved values, heavy-tailed differences between queries; the surrogate is never right."""

    def __init__(self, n, rng, spread=1.0):
        self.weights = WEIGHTS + 0.3 * spread * rng.standard_t(3, size=(n, N_UNITS))
        self.level, self.curve = rng.standard_t(3, size=n), spread * rng.normal(size=n)

    def __call__(self, rows):
        return rows @ self.weights.T + self.level + self.curve * (rows[:, :1] & rows[:, 4:5])


def explained(n, rng, explainer, spread=1.0):
    queries = Queries(n, rng, spread)
    return queries, explainer.attribute(queries, N_UNITS, budget=40, rng=rng)


@pytest.mark.parametrize("explainer", [WeightedBanzhaf(), KernelSHAP()], ids=lambda e: e.method)
@pytest.mark.parametrize("rows", [PROBES[:1], PROBES], ids=["value", "probes"])
@pytest.mark.parametrize("others", [False, True])
def test_false_alarm_rate(explainer, rows, others):
    """Exact where it can be: with 19 to calibrate, p <= .05 has chance .05; elsewhere not above."""
    rng, level, alarms, drawn = np.random.default_rng(1), 0.05, [], 0
    for _ in range(60):
        queries, attribution = explained(38, rng, explainer)
        source = Queries(38, rng) if others else queries
        check = calibrate_check(attribution, rows, source(rows), rng=rng, level=level, others=others)
        assert len(check.scores) == 19
        fresh = Queries(40, rng)(rows)
        alarms.append(np.mean([not check.explains("q", fresh[:, k]).explained for k in range(40)]))
        drawn += 40
    error = np.std(alarms) / np.sqrt(len(alarms))
    assert np.mean(alarms) == pytest.approx(level, abs=3 * error)


@pytest.mark.parametrize("others", [False, True])
def test_a_query_makes_the_expectation_or_the_scores_and_never_both(others):
    rng = np.random.default_rng(6)
    queries, attribution = explained(40, rng, WeightedBanzhaf())
    values = queries(PROBES)

    def check(changed):
        return calibrate_check(
            attribution, PROBES, changed, rng=np.random.default_rng(7), others=others, level=0.05
        )

    usual, roles = check(values), {"expectation": 0, "scores": 0}
    for query in range(40):
        changed = values.copy()
        changed[1, query] += 50.0
        found = check(changed)
        moved = not np.array_equal(found.expected, usual.expected)
        roles["expectation" if moved else "scores"] += 1
        assert moved or not np.array_equal(found.scores, usual.scores)
    assert roles == {"expectation": 20, "scores": 20}
    assert len(usual.scores) == roles["scores"]


def test_planted_anomalies_are_found_by_probes_and_not_by_the_value_alone():
    """An output that does not depend on the demonstrations: its value is ordinary, how it came about is not."""
    rng = np.random.default_rng(2)
    queries, attribution = explained(100, rng, WeightedBanzhaf(), 0.3)
    probes = calibrate_check(attribution, PROBES, queries(PROBES), rng=rng)
    value = calibrate_check(attribution, PROBES[:1], queries(PROBES[:1]), rng=rng)
    ordinary = Queries(200, rng, 0.3)(PROBES)
    ignoring = np.repeat(ordinary[:1], len(PROBES), axis=0)
    found = np.mean([not probes.explains("q", column).explained for column in ignoring.T])
    blind = np.mean([not value.explains("q", column[0]).explained for column in ignoring.T])
    usual = np.mean([not probes.explains("q", column).explained for column in ordinary.T])
    assert found > 0.9
    assert blind < 0.15
    assert usual < 0.15


def test_a_verdict_shows_what_was_compared():
    rng = np.random.default_rng(3)
    queries, attribution = explained(60, rng, WeightedBanzhaf())
    check = calibrate_check(attribution, PROBES, queries(PROBES), rng=rng)
    verdict = check.explains("q7", [1.0, -1.0, 2.0, 0.0])
    assert verdict.observed == (0.0, -2.0, 1.0, -1.0)
    assert verdict.query == "q7"
    assert verdict.expected[1] == pytest.approx(-2.0, abs=1.0)
    assert (verdict.score > verdict.threshold) == (not verdict.explained)
    odd = check.explains("q8", [1.0, 99.0, 2.0, 0.0])
    assert odd.p_value == 1 / (len(check.scores) + 1)
    assert odd.score > odd.threshold


def stored(attribution, role="target"):
    return Artifact(
        {
            "attribution": {
                "unit_ids": [],
                "query_ids": [],
                "role": role,
                "model": "m",
                "why": "",
                **attribution.to_dict(),
            }
        }
    )


def test_a_stored_artifact_is_enough():
    rng = np.random.default_rng(4)
    _, attribution = explained(80, rng, WeightedBanzhaf())
    check = OutputCheck.from_artifact(stored(attribution), rng=rng)
    assert check.rows.tolist() == [[True] * N_UNITS, [False] * N_UNITS]
    new = Queries(100, rng)(check.rows)
    assert np.mean([check.explains("q", column).explained for column in new.T]) > 0.8
    assert not check.explains("q", [0.0, 40.0]).explained
    with pytest.raises(InputError, match="by the proxy 'm'"):
        OutputCheck.from_artifact(stored(attribution, "proxy"), rng=rng)


def test_refusals():
    rng = np.random.default_rng(5)
    queries, attribution = explained(30, rng, WeightedBanzhaf())
    values = queries(PROBES)
    check = calibrate_check(attribution, PROBES, values, rng=rng)
    with pytest.raises(InputError, match="4 values"):
        check.explains("q", [1.0])
    with pytest.raises(InconclusiveError, match="missing"):
        check.explains("q", [1.0, np.nan, 0.0, 0.0])
    with pytest.raises(InputError, match="whole prompt"):
        calibrate_check(attribution, PROBES[1:], values[1:], rng=rng)
    with pytest.raises(InputError, match="99 to calibrate"):
        calibrate_check(attribution, PROBES, values, rng=rng, level=0.01)
    with pytest.raises(InputError, match="29 queries"):
        calibrate_check(attribution, PROBES, values[:, 1:], rng=rng)
    values[2, :6] = np.nan
    with pytest.raises(InputError, match="24 complete"):
        calibrate_check(attribution, PROBES, values, rng=rng)


def test_a_plain_question_of_an_artifact():
    """One value judges the output alone; a second, without demonstrations, what they change."""
    rng = np.random.default_rng(4)
    _, attribution = explained(80, rng, WeightedBanzhaf())
    artifact = stored(attribution)
    new = Queries(60, rng)(np.array([[True] * N_UNITS, [False] * N_UNITS]))
    pairs = [explains(artifact, "q", column) for column in new.T]
    assert np.mean([v.explained for v in pairs]) > 0.8
    assert explains(artifact, "q", new[0, 0]).observed == (new[0, 0],)
    assert explains(artifact, "odd", [0.0, 40.0]).verdict == "anomaly"
    assert pairs[0] == explains(artifact, "q", new[:, 0])
    with pytest.raises(InputError, match="one value, or the values"):
        explains(artifact, "q", [1.0, 2.0, 3.0])
