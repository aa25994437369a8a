"""Clean, compress and certify on planted targets, edge cases included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from proxyprompt.attribution import Attribution, KernelSHAP
from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.optimize import certify, clean, compress
from proxyprompt.optimize.certificate import power_statement
from proxyprompt.optimize.clean import suspects
from proxyprompt.optimize.compress import interval, nested_path
from proxyprompt.value_function import Values

Rows = NDArray[np.bool_]


def planted(
    accuracy: Callable[[Rows], NDArray[np.float64]], n_queries: int, seed: int = 0, *, log: bool = False
) -> Callable[[Rows], Values]:
    """A target whose chance of being right is ``accuracy(rows)``; one uniform draw per query decides."""
    draws = np.random.default_rng(seed).random(n_queries)

    def evaluate(rows: Rows) -> Values:
        p = np.clip(accuracy(rows), 0.02, 0.98)
        right = (draws[None, :] < p[:, None]).astype(float)
        utility = np.log(p)[:, None] + 0.3 * (draws - 0.5)[None, :] + np.zeros_like(right) if log else right
        return Values(
            coalitions=rows,
            utility=utility,
            performance=right,
            predictions=right.astype(np.int64),
            probabilities=None,
            prompt_tokens=np.repeat((20 + 10 * rows.sum(axis=1))[:, None], n_queries, axis=1),
            scale="log-probability" if log else "accuracy",
        )

    return evaluate


def explain(evaluate: Callable[[Rows], Values], n: int, budget: int = 64) -> Attribution:
    design = KernelSHAP().design(n, budget, rng=np.random.default_rng(0))
    return KernelSHAP().fit(design, evaluate(design.coalitions).utility)


def harmful_last(n: int, bad: list[int]) -> Callable[[Rows], NDArray[np.float64]]:
    weights = np.full(n, 0.02)
    weights[bad] = -0.08
    return lambda rows: 0.6 + rows @ weights


def test_harmful_units_are_flagged_confirmed_and_removed() -> None:
    truth = harmful_last(10, [3, 7])
    attribution = explain(planted(truth, 40, 1, log=True), 10)
    result = clean(attribution, planted(truth, 80, 2, log=True))
    assert set(result.removed) == {3, 7}
    assert set(result.flagged) == {3, 7}
    assert result.kept.sum() == 8
    assert all(c.difference > 0 for c in result.confirmations)


def test_what_the_target_does_not_confirm_stays() -> None:
    attribution = explain(planted(harmful_last(10, [3, 7]), 40, 1, log=True), 10)
    harmless = planted(lambda rows: np.full(len(rows), 0.7), 80, 2, log=True)
    result = clean(attribution, harmless)
    assert set(result.flagged) == {3, 7}
    assert result.removed == ()
    assert result.kept.all()
    assert clean(attribution, None).kept.all()


def test_masking_suspects_are_confirmed_from_both_ends() -> None:
    """Two poisons, either of which alone does all the harm: leaving out one changes nothing."""

    def accuracy(rows: Rows) -> NDArray[np.float64]:
        return 0.9 - 0.4 * (rows[:, 0] | rows[:, 1]) + 0.001 * rows[:, 2:].sum(axis=1)

    attribution = explain(planted(accuracy, 60, 1, log=True), 6)
    result = clean(attribution, planted(accuracy, 80, 2, log=True))
    assert {0, 1} <= set(result.removed)


def test_protected_units_are_never_suspected() -> None:
    truth = harmful_last(10, [3, 7])
    attribution = explain(planted(truth, 40, 1, log=True), 10)
    assert set(clean(attribution, planted(truth, 80, 2, log=True), protected=(3,)).removed) == {7}


def test_suspects_come_lowest_p_first_and_not_more_than_asked() -> None:
    attribution = explain(planted(harmful_last(10, [3, 7]), 40, 1, log=True), 10)
    assert set(suspects(attribution)[:2]) == {3, 7}
    assert len(suspects(attribution, most=1)) == 1


def test_nested_path_removes_lowest_first_and_respects_protected() -> None:
    scores = np.array([0.3, -0.1, 0.2, 0.0])
    path = nested_path(scores, np.array([True, True, True, True]), protected=(1,))
    assert path.sum(axis=1).tolist() == [4, 3, 2, 1]
    assert path[1].tolist() == [True, True, True, False]
    assert path[-1].tolist() == [False, True, False, False]


def test_compress_finds_the_smallest_prompt_above_tau() -> None:
    def accuracy(rows: Rows) -> NDArray[np.float64]:
        return 0.4 + 0.1 * np.minimum(rows[:, :5].sum(axis=1), 5)  # only the first five matter

    path = nested_path(np.array([5, 4.5, 4, 3.5, 3] + [0.1] * 15), np.ones(20, dtype=bool))
    result = compress(path, planted(accuracy, 200, 3), tau=0.95, max_evaluations=14)
    assert result.chosen.n_kept == 5
    assert result.compression_ratio == pytest.approx(0.75)
    assert result.full.performance == pytest.approx(result.chosen.performance)
    kept = [c.n_kept for c in result.candidates]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 5
    assert len(result.points) <= 14


def test_compression_does_not_spend_what_cleaning_gained() -> None:
    truth = harmful_last(10, [8, 9])  # full .60, cleaned .76, empty .60
    start = np.ones(10, dtype=bool)
    start[[8, 9]] = False
    path = nested_path(np.linspace(1, 0.1, 10), start)
    result = compress(path, planted(truth, 2000, 3), tau=0.95, max_evaluations=11)
    assert result.reference == pytest.approx(0.76, abs=0.03)
    assert result.full.performance == pytest.approx(0.60, abs=0.03)
    assert result.chosen.n_kept >= 6


@pytest.mark.parametrize("n", [1, 2, 8, 64, 200])
def test_a_target_that_ignores_demonstrations_ends_with_the_empty_prompt(n: int) -> None:
    ignoring = planted(lambda rows: np.full(len(rows), 0.7), 100, 4)
    path = nested_path(np.zeros(n), np.ones(n, dtype=bool))
    result = compress(path, ignoring, tau=0.9)
    assert result.chosen.n_kept == 0
    certificate = certify(
        [c.kept for c in result.candidates],
        planted(lambda rows: np.full(len(rows), 0.7), 150, 5),
        n_units=n, tau=0.9, level=0.05, n_sealed=150, query_digest="x",
    )  # fmt: skip
    assert certificate.decision == "certified"
    assert certificate.kept.sum() == 0


def test_a_perfect_target_is_certified_down_to_nothing() -> None:
    perfect = planted(lambda rows: np.full(len(rows), 2.0), 60, 4)
    path = nested_path(np.zeros(4), np.ones(4, dtype=bool))
    result = compress(path, perfect, tau=0.95)
    assert result.chosen.n_kept == 0
    assert (
        certify(
            [result.chosen.kept], perfect, n_units=4, tau=0.9, level=0.05, n_sealed=60, query_digest="x"
        ).kept.sum()
        == 0
    )


def test_what_fails_ends_the_sequence_and_is_not_shipped() -> None:
    asked: list[int] = []

    def accuracy(rows: Rows) -> NDArray[np.float64]:
        asked.extend(rows.sum(axis=1).tolist())
        return np.where(rows.sum(axis=1) >= 6, 0.9, 0.5)

    rows = nested_path(np.zeros(8), np.ones(8, dtype=bool))
    certificate = certify(
        [rows[1], rows[4], rows[6]],
        planted(accuracy, 150, 1),
        n_units=8,
        tau=0.9,
        level=0.05,
        n_sealed=150,
        query_digest="x",
    )
    assert [t.passed for t in certificate.tests] == [True, False, False]
    assert [t.tested for t in certificate.tests] == [True, True, False]
    assert certificate.kept.sum() == 7
    assert asked == [8, 7, 4]  # the last candidate was never asked
    assert certificate.decision == "certified"


def test_compression_must_hold_against_the_cleaned_prompt_as_well() -> None:
    """Full .55, cleaned .90, smaller .70: better than the full prompt, and far below what cleaning had reached."""

    def accuracy(rows: Rows) -> NDArray[np.float64]:
        return np.select([rows.all(axis=1), rows.sum(axis=1) >= 7], [0.55, 0.9], 0.7)

    rows = nested_path(np.zeros(8), np.ones(8, dtype=bool))
    settings = {"n_units": 8, "tau": 0.9, "level": 0.05, "n_sealed": 200, "query_digest": "x"}
    alone = certify([rows[1], rows[4]], planted(accuracy, 200, 1), **settings)
    assert alone.kept.sum() == 4
    both = certify([rows[1], rows[4]], planted(accuracy, 200, 1), cleaned_bar=True, **settings)
    assert both.kept.sum() == 7
    assert both.tests[1].bar == "cleaned"
    assert not both.tests[1].passed


def test_nothing_certified_means_the_original_prompt() -> None:
    accuracy = lambda rows: np.where(rows.all(axis=1), 0.9, 0.5)  # noqa: E731
    rows = nested_path(np.zeros(4), np.ones(4, dtype=bool))
    certificate = certify(
        [rows[2]], planted(accuracy, 100), n_units=4, tau=0.9, level=0.05, n_sealed=100, query_digest="x"
    )
    assert certificate.decision == "not_certified"
    assert certificate.kept.all()
    assert "no candidate" in certificate.text


def test_nothing_proposed_needs_no_certificate() -> None:
    certificate = certify(
        [np.ones(4, dtype=bool)], planted(lambda r: np.full(len(r), 0.7), 50), n_units=4, tau=0.9, level=0.05,
        n_sealed=50, query_digest="x",
    )  # fmt: skip
    assert certificate.tests == ()
    assert certificate.kept.all()


def test_candidates_must_be_nested() -> None:
    with pytest.raises(InputError, match="nested"):
        certify(
            [np.array([True, False]), np.array([False, True])], planted(lambda r: np.full(len(r), 0.7), 50),
            n_units=2, tau=0.9, level=0.05, n_sealed=50, query_digest="x",
        )  # fmt: skip


def test_missing_answers_are_inconclusive() -> None:
    whole = planted(lambda rows: np.full(len(rows), 0.7), 50)

    def holes(rows: Rows) -> Values:
        values = whole(rows)
        values.performance[:, :10] = np.nan
        values.utility[:, :10] = np.nan
        missing = tuple((i, j, "timeout") for i in range(len(rows)) for j in range(10))
        return Values(
            rows,
            values.utility,
            values.performance,
            values.predictions,
            None,
            values.prompt_tokens,
            "accuracy",
            missing,
        )

    with pytest.raises(InconclusiveError, match="timeout"):
        certify(
            [np.array([True, False])], holes, n_units=2, tau=0.9, level=0.05, n_sealed=50, query_digest="x"
        )
    with pytest.raises(InconclusiveError, match="timeout"):
        compress(nested_path(np.zeros(2), np.ones(2, dtype=bool)), holes)


def test_wilson_interval() -> None:
    """scipy.stats.binomtest(8, 10).proportion_ci(0.95, method="wilson") = (0.4902, 0.9433)."""
    low, high = interval(np.array([1.0] * 8 + [0.0] * 2))
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert interval(np.array([np.nan])) == (0.0, 1.0)


@pytest.mark.parametrize(("tau", "score"), [(0.9, 0.8), (1.0, 0.5), (0.8, 1.0), (0.95, 0.0)])
def test_power_statement_speaks_of_the_sample(tau: float, score: float) -> None:
    text = power_statement(120, tau=tau, level=0.05, full_score=score)
    assert "120 sealed queries" in text
    assert "240 would" in text


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="tau"):
        compress(np.ones((1, 2), dtype=bool), planted(lambda r: np.full(len(r), 0.5), 5), tau=0)
    with pytest.raises(InputError, match="max_evaluations"):
        compress(
            np.ones((1, 2), dtype=bool),
            planted(lambda r: np.full(len(r), 0.5), 5),
            max_evaluations=1,
        )
    with pytest.raises(InputError, match="level"):
        clean(explain(planted(harmful_last(4, [0]), 10), 4), None, level=0.0)
