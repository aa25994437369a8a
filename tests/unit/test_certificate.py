"""The certificate on planted targets: sequence, margins, early stopping, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from proxyprompt._noninferiority import betting_p_value
from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.optimize import Certificate, certify
from proxyprompt.optimize.certificate import Reordered
from proxyprompt.optimize.path import nested_path
from proxyprompt.optimize.power import power_statement, smallest_loss
from proxyprompt.optimize.requirement import Requirement
from proxyprompt.sequential import non_inferiority, smallest_certifiable_loss
from proxyprompt.value_function import Values

Rows = NDArray[np.bool_]
Accuracy = Callable[[Rows], NDArray[np.float64]]


class Planted:
    """A target whose chance of being right is ``accuracy(rows)``; one uniform draw per query decides."""

    def __init__(self, accuracy: Accuracy, n_queries: int, seed: int = 0, *, graded: bool = False) -> None:
        self.accuracy, self.n, self.graded = accuracy, n_queries, graded
        self.draws = np.random.default_rng(seed).random(n_queries)
        self.asked: list[tuple[int, int]] = []

    def __call__(self, rows: Rows, queries: NDArray[np.int64] | None = None) -> Values:
        draws = self.draws if queries is None else self.draws[queries]
        self.asked += [(int(row.sum()), len(draws)) for row in rows]
        p = np.clip(self.accuracy(rows), 0.02, 0.98)
        right = (draws[None, :] < p[:, None]).astype(float)
        if self.graded:
            right = np.clip(p[:, None] + 0.4 * (draws - 0.5)[None, :], 0, 1)
        zero = np.zeros(right.shape, dtype=np.int64)
        return Values(rows, right, right, zero, None, zero + 20, "accuracy")


def whole(n: int) -> Rows:
    return np.ones(n, dtype=np.bool_)


def certified(
    candidates: list[Rows],
    target: Any,
    *,
    n: int,
    tau: float | None = 0.9,
    margin: float | None = None,
    seen: frozenset[str] = frozenset(),
    **more: Any,
) -> Certificate:
    return certify(
        candidates,
        target,
        n_units=len(candidates[0]),
        requirement=Requirement(tau=None if margin is not None else tau, margin=margin),
        level=0.05,
        sealed=[f"q{i}" for i in range(n)],
        seen=seen,
        query_digest="x",
        **more,
    )


EIGHT = nested_path(np.zeros(8), whole(8))


def test_what_fails_ends_the_sequence_and_is_not_shipped() -> None:
    target = Planted(lambda rows: np.where(rows.sum(axis=1) >= 6, 0.9, 0.5), 100, 1)
    certificate = certified([EIGHT[1], EIGHT[4], EIGHT[6]], target, n=100)
    assert [t.passed for t in certificate.tests] == [True, False, False]
    assert [t.tested for t in certificate.tests] == [True, True, False]
    assert certificate.kept.sum() == 7
    assert certificate.order == tuple(range(7))
    # One look, at all queries; the last candidate was never asked.
    assert sorted(target.asked) == [(4, 100), (7, 100), (8, 100)]
    assert certificate.decision == "certified"


@pytest.mark.parametrize("method", ["exact", "betting"])
def test_compression_must_hold_against_the_cleaned_prompt_as_well(method: str) -> None:
    """Full .55, cleaned .90, smaller .70: better than the full prompt, and far below what cleaning had reached."""
    target = Planted(
        lambda rows: np.select([rows.all(axis=1), rows.sum(axis=1) >= 7], [0.55, 0.9], 0.7), 200, 1
    )
    candidates = [EIGHT[1], EIGHT[4]]
    assert certified(candidates, target, n=200, method=method).kept.sum() == 4
    both = certified(candidates, target, n=200, method=method, cleaned_bar=True)
    assert both.kept.sum() == 7
    assert both.tests[1].bar == "cleaned"
    assert not both.tests[1].passed


def test_a_margin_is_an_absolute_loss() -> None:
    """Full .5, smaller .44: within .12 of it, and not within 10 % of it."""
    target = Planted(lambda rows: np.where(rows.all(axis=1), 0.5, 0.44), 200, 1)
    candidate = [EIGHT[4]]
    loose = certified(candidate, target, n=200, margin=0.12)
    assert loose.decision == "certified"
    assert "loses at most 12 points against the full prompt's performance" in loose.text
    assert loose.to_dict()["margin"] == 0.12
    assert loose.to_dict()["tau"] is None
    assert certified(candidate, target, n=200, margin=0.04).decision == "not_certified"
    assert certified(candidate, target, n=200, tau=0.9).decision == "not_certified"


def test_nothing_certified_means_the_original_prompt() -> None:
    target = Planted(lambda rows: np.where(rows.all(axis=1), 0.9, 0.5), 100)
    certificate = certified([EIGHT[2]], target, n=100)
    assert certificate.decision == "not_certified"
    assert certificate.kept.all()
    assert "of no candidate" in certificate.text


def test_nothing_proposed_needs_no_certificate() -> None:
    certificate = certified([whole(4)], Planted(lambda r: np.full(len(r), 0.7), 50), n=50)
    assert certificate.tests == ()
    assert certificate.kept.all()
    assert certificate.full.performance == pytest.approx(0.7, abs=0.15)


def test_a_perfect_target_is_certified_down_to_nothing() -> None:
    perfect = Planted(lambda rows: np.full(len(rows), 2.0), 60)
    assert certified([np.zeros(4, dtype=bool)], perfect, n=60).kept.sum() == 0


# --- looking early


def test_bets_stop_as_soon_as_they_have_decided_and_the_exact_test_looks_once() -> None:
    same = Planted(lambda rows: np.full(len(rows), 0.9), 400)
    early = certified([EIGHT[4]], same, n=400, method="betting", block=25)
    assert early.decision == "certified"
    assert early.tests[0].n_asked < 150
    assert early.tests[0].evidence_name == "e-value"
    assert early.tests[0].evidence >= 20 - 1e-9
    assert early.tests[0].lower_bound >= 0
    # The bets stay those that were laid out for all 400 queries.
    k = early.tests[0].n_asked
    scores = (same.draws[:k] < 0.9).astype(float)
    planned = non_inferiority(scores, scores, tau=0.9, level=0.05, method="betting", horizon=400)
    assert early.tests[0].evidence == pytest.approx(planned.e_value)
    assert sum(n for _, n in same.asked) == 2 * early.tests[0].n_asked
    bad = Planted(lambda rows: np.where(rows.all(axis=1), 0.9, 0.2), 400)
    hopeless = certified([EIGHT[4]], bad, n=400, method="betting", block=25)
    assert not hopeless.tests[0].passed
    assert hopeless.tests[0].n_asked < 400
    assert f"On {k} of 400 queries" in early.text
    with pytest.raises(InputError, match="one look"):
        certified([EIGHT[4]], same, n=400, method="exact", block=25)
    with pytest.raises(InputError, match="horizon"):
        non_inferiority(scores, scores, tau=0.9, method="exact", horizon=400)
    with pytest.raises(InputError, match="method"):
        certified([EIGHT[4]], same, n=400, method="guess")


def losing_one_in_ten(seed: int, n: int) -> NDArray[np.float64]:
    """Scores of the full and the smaller prompt at the edge of the null hypothesis: mean(smaller) = .9 mean(full)."""
    draws = np.random.default_rng(seed)
    full = (draws.random(n) < 0.8).astype(float)
    return np.array([full, full * (draws.random(n) < 0.9)])


def test_looking_after_every_block_decides_as_one_look_at_the_end_and_keeps_the_level() -> None:
    n, decided = 48, []
    for seed in range(30):
        scores = losing_one_in_ten(seed, n)
        if seed % 2:
            scores[1] = scores[0]  # every other pair is exactly as good, so that both verdicts occur

        def target(
            rows: Rows, queries: NDArray[np.int64] | None = None, scores: NDArray[np.float64] = scores
        ) -> Values:
            chosen = scores[[0 if row.all() else 1 for row in rows]]
            part = chosen if queries is None else chosen[:, queries]
            zero = np.zeros(part.shape, dtype=np.int64)
            return Values(rows, part, part, zero, None, zero, "accuracy")

        looks = [
            certified([EIGHT[4]], target, n=n, method="betting", block=b).tests[0].passed for b in (4, n)
        ]
        assert looks[0] == looks[1]
        decided.append(looks[0])
    assert 0 < sum(decided) < 30
    wrong = [
        betting_p_value(*losing_one_in_ten(seed, n), tau=0.9, level=0.05, horizon=n) <= 0.05
        for seed in range(1500)
    ]
    assert np.mean(wrong) <= 0.05


def test_graded_scores_are_certified_by_bets() -> None:
    graded = Planted(lambda rows: np.full(len(rows), 0.6), 300, graded=True)
    assert certified([EIGHT[4]], graded, n=300, method="betting").decision == "certified"
    with pytest.raises(InputError, match="exact"):
        certified([EIGHT[4]], graded, n=300, method="exact")


def test_missing_answers_are_inconclusive_and_few_of_them_count_as_wrong() -> None:
    target = Planted(lambda rows: np.full(len(rows), 0.95), 100)

    def holes(k: int) -> Callable[..., Values]:
        def ask(rows: Rows, queries: NDArray[np.int64] | None = None) -> Values:
            values = target(rows, queries)
            index = np.arange(100) if queries is None else queries
            gone = np.flatnonzero(index < k)
            values.performance[:, gone] = np.nan
            missing = tuple((i, int(j), "timeout") for i in range(len(rows)) for j in gone)
            return Values(rows, values.utility, values.performance, values.predictions, None,
                          values.prompt_tokens, "accuracy", missing)  # fmt: skip

        return ask

    for method in ("exact", "betting"):
        with pytest.raises(InconclusiveError, match=r"timeout|lack a score"):
            certified([EIGHT[4]], holes(10), n=100, method=method)
        few = certified([EIGHT[4]], holes(3), n=100, method=method)
        none = certified([EIGHT[4]], holes(0), n=100, method=method)
        assert few.tests[0].retained_lower_bound < none.tests[0].retained_lower_bound


# --- what is refused


def test_queries_that_an_earlier_step_asked_cannot_certify() -> None:
    target = Planted(lambda rows: np.full(len(rows), 0.9), 50)
    with pytest.raises(InputError, match=r"2 of 50 queries were asked by an earlier step"):
        certified([EIGHT[4]], target, n=50, seen=frozenset({"q3", "q7", "elsewhere"}))
    assert target.asked == []


def test_candidates_must_be_nested_and_answers_complete() -> None:
    target = Planted(lambda r: np.full(len(r), 0.7), 50)
    with pytest.raises(InputError, match="nested"):
        certified([np.array([True, False]), np.array([False, True])], target, n=50)
    with pytest.raises(InputError, match="49 sealed"):
        certified([np.array([True, False])], target, n=49)


def test_earlier_looks_are_said_with_the_claim() -> None:
    target = Planted(lambda rows: np.full(len(rows), 0.9), 100)
    looked = certified([EIGHT[4]], target, n=100, earlier_looks=2)
    assert "2 earlier runs" in looked.text
    assert "up to 0.15 and not 0.05" in looked.text
    assert "earlier run" not in certified([EIGHT[4]], target, n=100).text


# --- the order


def reordering(quality: float, n: int) -> tuple[Reordered, list[tuple[int, ...]]]:
    asked: list[tuple[int, ...]] = []
    target = Planted(lambda rows: np.full(len(rows), quality), n, 1)

    def evaluate(order: tuple[int, ...], queries: NDArray[np.int64] | None = None) -> Values:
        asked.append(order)
        return target(np.ones((1, len(order)), dtype=bool), queries)

    return Reordered((3, 0, 2, 1), evaluate), asked


def test_the_order_is_the_last_step_and_is_certified_like_any_other() -> None:
    target = Planted(lambda rows: np.full(len(rows), 0.9), 100, 1)
    good, asked = reordering(0.9, 100)
    certificate = certified([EIGHT[2], EIGHT[4]], target, n=100, reordered=good)
    assert asked == [(3, 0, 2, 1)]
    assert certificate.order == (3, 0, 2, 1)
    assert "in their new order" in certificate.text
    assert certificate.to_dict()["order"] == [3, 0, 2, 1]
    bad, _ = reordering(0.4, 100)
    stays = certified([EIGHT[2], EIGHT[4]], target, n=100, reordered=bad)
    assert stays.order == (0, 1, 2, 3)
    assert stays.decision == "certified"
    falling = Planted(lambda rows: np.where(rows.sum(axis=1) >= 6, 0.9, 0.4), 100, 1)
    never, asked = reordering(0.9, 100)
    assert certified([EIGHT[2], EIGHT[4]], falling, n=100, reordered=never).order == tuple(range(6))
    assert asked == []
    with pytest.raises(InputError, match="last candidate"):
        certified([EIGHT[2]], target, n=100, reordered=good)


# --- what so many queries can show


@pytest.mark.parametrize("n", [30, 60, 120])
@pytest.mark.parametrize("rule", [{"tau": 0.9}, {"margin": 0.05}])
def test_the_quick_plan_agrees_with_the_exact_one(n: int, rule: dict[str, float]) -> None:
    exact = smallest_certifiable_loss(n, **rule).smallest_allowance
    assert exact is not None
    exact *= 0.8 if "tau" in rule else 1.0
    assert smallest_loss(n, requirement=Requirement(**rule), level=0.05) == pytest.approx(exact, rel=0.15)


def test_the_power_statement_speaks_of_the_sample_and_of_what_is_asked() -> None:
    text = power_statement(60, requirement=Requirement(margin=0.02), level=0.05)
    assert text.startswith(
        "With 60 sealed queries the smallest certifiable loss is about 12 points; 240 would"
    )
    assert "does better than the full one" in text
    enough = power_statement(240, requirement=Requirement(tau=0.9), level=0.05, full_score=0.8)
    assert "enough for a prompt that is exactly as good" in enough
    bets = smallest_loss(60, requirement=Requirement(tau=0.9), level=0.05, method="betting")
    assert bets > smallest_loss(60, requirement=Requirement(tau=0.9), level=0.05)


@pytest.mark.parametrize(("tau", "score"), [(0.9, 0.8), (1.0, 0.5), (0.8, 1.0), (0.95, 0.0)])
def test_the_power_statement_has_words_for_every_score(tau: float, score: float) -> None:
    assert "120 sealed" in power_statement(
        120, requirement=Requirement(tau=tau), level=0.05, full_score=score
    )
