"""The search for the smallest prompt: planted targets with known accuracy, edge cases included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.optimize import compress
from proxyprompt.optimize._early import side_of_line
from proxyprompt.optimize.compress import interval
from proxyprompt.optimize.order import candidate_orders, try_orders
from proxyprompt.optimize.path import nested_path
from proxyprompt.optimize.requirement import Requirement
from proxyprompt.optimize.swap import try_swaps
from proxyprompt.value_function import Values

Rows = NDArray[np.bool_]
Accuracy = Callable[[Rows], NDArray[np.float64]]


class Planted:
    """A target whose chance of being right is ``accuracy(rows)``; one uniform draw per query decides."""

    def __init__(self, accuracy: Accuracy, n_queries: int, seed: int = 0) -> None:
        self.accuracy, self.n = accuracy, n_queries
        self.draws = np.random.default_rng(seed).random(n_queries)
        self.asked: list[tuple[int, int]] = []

    def __call__(self, rows: Rows, queries: NDArray[np.int64] | None = None) -> Values:
        draws = self.draws if queries is None else self.draws[queries]
        self.asked += [(int(row.sum()), len(draws)) for row in rows]
        p = np.clip(self.accuracy(rows), 0.02, 0.98)
        right = (draws[None, :] < p[:, None]).astype(float)
        return Values(
            coalitions=rows,
            utility=np.log(p)[:, None] + 0.1 * (draws - 0.5)[None, :],
            performance=right,
            predictions=right.astype(np.int64),
            probabilities=None,
            prompt_tokens=np.repeat((20 + 10 * rows.sum(axis=1))[:, None], len(draws), axis=1),
            scale="log-probability",
        )


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def whole(n: int) -> Rows:
    return np.ones(n, dtype=np.bool_)


def first_five(rows: Rows) -> NDArray[np.float64]:
    return 0.4 + 0.1 * rows[:, :5].sum(axis=1)


FIVE = nested_path(np.array([5, 4.5, 4, 3.5, 3] + [0.1] * 15), whole(20))


@pytest.mark.parametrize("level", [0.0, 0.1])
def test_compress_finds_the_smallest_prompt_above_the_line(level: float) -> None:
    target = Planted(first_five, 200, 3)
    result = compress(
        FIVE, target, requirement=Requirement(tau=0.95), rng=rng(), max_evaluations=14, level=level
    )
    assert result.chosen.n_kept == 5
    assert result.chosen.holds
    assert result.compression_ratio == pytest.approx(0.75)
    kept = [c.n_kept for c in result.candidates]
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (20, 5)
    assert len(result.points) <= 14
    assert result.zero_shot.n_kept == 0
    assert result.calls + result.calls_saved == 200 * len(result.points)


def test_points_far_below_the_line_are_left_after_a_block_and_larger_prompts_are_not_asked() -> None:
    target = Planted(first_five, 200, 3)
    result = compress(FIVE, target, requirement=Requirement(tau=0.95), rng=rng(), max_evaluations=14)
    small = [p for p in result.points if 0 < p.n_kept <= 3]
    assert small
    assert all(p.n_queries <= 100 and not p.holds for p in small)
    # Above the choice only the start and what goes between it and the choice.
    assert sum(p.n_kept > 5 for p in result.points) <= 3
    # Everything on every query would be 14 x 200 beside the full prompt.
    assert sum(n for _, n in target.asked) < 0.6 * 15 * 200


def test_a_margin_is_counted_in_points() -> None:
    target = Planted(first_five, 2000, 3)  # full .9; four of the five .8
    by = {
        m: compress(FIVE, target, requirement=Requirement(margin=m), rng=rng(), max_evaluations=21)
        for m in (0.02, 0.15)
    }
    assert by[0.02].chosen.n_kept == 5
    assert by[0.15].chosen.n_kept == 4
    assert by[0.15].line == pytest.approx(by[0.15].reference - 0.15)


def test_compression_does_not_spend_what_cleaning_gained() -> None:
    weights = np.full(10, 0.02)
    weights[[8, 9]] = -0.08  # full .60, cleaned .76, empty .60
    start = whole(10)
    start[[8, 9]] = False
    path = nested_path(np.linspace(1, 0.1, 10), start)
    target = Planted(lambda rows: 0.6 + rows @ weights, 2000, 3)
    result = compress(path, target, requirement=Requirement(tau=0.95), rng=rng(), max_evaluations=11)
    assert result.reference == pytest.approx(0.76, abs=0.03)
    assert result.full.performance == pytest.approx(0.60, abs=0.03)
    assert result.cleaned_is_better
    assert result.chosen.n_kept >= 6


def test_a_cap_is_measured_on_the_whole_split_even_where_it_clearly_fails() -> None:
    target = Planted(first_five, 200, 3)
    cap = int(np.argmax(FIVE.sum(axis=1) <= 2))
    result = compress(FIVE, target, requirement=Requirement(tau=0.95), rng=rng(), cap=cap)
    assert result.cap is not None
    assert (result.cap.n_kept, result.cap.n_queries, result.cap.holds) == (2, 200, False)
    assert result.cap.difference < -0.1
    assert result.chosen.n_kept == 5


@pytest.mark.parametrize("n", [1, 2, 8, 64, 200])
def test_a_target_that_ignores_demonstrations_ends_with_the_empty_prompt(n: int) -> None:
    ignoring = Planted(lambda rows: np.full(len(rows), 0.7), 100, 4)
    path = nested_path(np.zeros(n), whole(n))
    result = compress(path, ignoring, requirement=Requirement(tau=0.9), rng=rng())
    assert result.chosen.n_kept == 0
    assert result.candidates[-1].n_kept == 0


def test_missing_answers_are_inconclusive() -> None:
    target = Planted(lambda rows: np.full(len(rows), 0.7), 50)

    def holes(rows: Rows, queries: NDArray[np.int64] | None = None) -> Values:
        values = target(rows, queries)
        values.performance[:, :10] = np.nan
        gone = tuple((i, j, "timeout") for i in range(len(rows)) for j in range(10))
        return replace(values, missing=gone)

    with pytest.raises(InconclusiveError, match="timeout"):
        compress(nested_path(np.zeros(2), whole(2)), holes, requirement=Requirement(tau=0.9), rng=rng())


def test_wilson_interval() -> None:
    """scipy.stats.binomtest(8, 10).proportion_ci(0.95, method="wilson") = (0.4902, 0.9433)."""
    low, high = interval(np.array([1.0] * 8 + [0.0] * 2))
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert interval(np.array([np.nan])) == (0.0, 1.0)


def test_bad_settings() -> None:
    target, path = Planted(lambda r: np.full(len(r), 0.5), 5), np.ones((1, 2), dtype=bool)
    for tau, margin in ((0.0, None), (None, 1.0), (0.9, 0.1), (None, None)):
        with pytest.raises(InputError, match=r"tau|margin"):
            Requirement(tau=tau, margin=margin)
    for wrong in ({"max_evaluations": 1}, {"level": 1.0}, {"block": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            compress(path, target, requirement=Requirement(tau=0.9), rng=rng(), **wrong)


# --- on which side of the line


@pytest.mark.parametrize("line", [-0.1, 0.0, 0.05])
@pytest.mark.parametrize(("loss", "win"), [(0.1, 0.0), (0.15, 0.05), (0.05, 0.1), (0.3, 0.2)])
def test_leaving_early_seldom_changes_the_side(line: float, loss: float, win: float) -> None:
    """The chance is over the order; at the nominal 0.1 for each side, 400 orders of one split."""
    draws = rng(1)
    n = 60
    d = np.r_[np.full(round(loss * n), -1.0), np.full(round(win * n), 1.0)]
    d = np.r_[d, np.zeros(n - len(d))]
    truth = "holds" if d.mean() >= line - 1e-12 else "falls"
    sides = [side_of_line(draws.permutation(d), n, line, level=0.1) for _ in range(400)]
    assert np.mean([side != truth for side, _ in sides]) <= 0.1 + 2 * np.sqrt(0.09 / 400)
    # All queries seen, it is always the side of the whole; certainty alone is never wrong.
    assert all(side_of_line(draws.permutation(d), n, line, level=0.0)[0] == truth for _ in range(50))


def test_a_side_that_no_answer_can_change_is_known_early() -> None:
    """After 27 losses of 60 queries the mean of all is at most (33 - 27) / 60 = .1; after 28 it is below."""
    losses = np.full(40, -1.0)
    assert side_of_line(losses, 60, 0.1, level=0.0) == ("falls", 28)
    assert side_of_line(losses[:27], 60, 0.1, level=0.0) == (None, 27)
    assert side_of_line(-losses, 60, 0.1, level=0.0) == ("holds", 33)
    assert side_of_line(np.zeros(10), 60, 0.0, level=0.0) == (None, 10)


# --- swaps


def copies(rows: Rows) -> NDArray[np.float64]:
    """0 and 1 are copies, 2 is worth as much as one of them; 3 is worth nothing."""
    return 0.4 + 0.2 * (rows[:, 0] | rows[:, 1]) + 0.25 * rows[:, 2]


def both_copies_kept(n_queries: int) -> tuple[Planted, object]:
    target = Planted(copies, n_queries, 1)
    path = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 0, 0]], dtype=bool)
    return target, compress(path, target, requirement=Requirement(tau=0.6), rng=rng())


def test_a_swap_that_the_target_confirms_replaces_the_choice() -> None:
    target, found = both_copies_kept(200)
    assert found.chosen.kept.tolist() == [True, True, False, False]
    swapped, tried = try_swaps(found, copies, target, whole(4))
    assert [(s.accepted, s.into) for s in tried] == [(True, 2)]
    assert swapped.chosen.kept[2]
    assert swapped.chosen.n_kept == 2
    assert swapped.candidates[-1] is swapped.chosen
    assert all(c.kept[swapped.chosen.kept].all() for c in swapped.candidates)


def test_a_swap_that_the_target_does_not_confirm_changes_nothing() -> None:
    target, found = both_copies_kept(200)
    same, tried = try_swaps(found, lambda rows: rows[:, 3].astype(float), target, whole(4))
    assert same is found
    assert len(tried) == 2
    assert not any(s.accepted for s in tried)


def test_swaps_respect_what_must_stay_what_is_harmful_and_length() -> None:
    target, found = both_copies_kept(60)
    tokens = np.array([5.0, 5.0, 9.0, 5.0])
    harmful = np.array([True, True, False, True])
    for wrong in (
        {"protected": (0, 1)},
        {"labels": ["a", "b", "c", "c"]},
        {"tokens": tokens},
        {"smallest_gain": 0.5},
    ):
        assert try_swaps(found, copies, target, whole(4), **wrong)[1] == ()
    assert try_swaps(found, copies, target, harmful)[1] == ()


# --- orders


def in_order(gain: float, n: int, seed: int = 0):
    """Utility is higher by ``gain`` the later unit 0 stands."""
    draws = rng(seed).random(n)
    asked: list[int] = []

    def evaluate(order: tuple[int, ...], queries: NDArray[np.int64] | None = None) -> Values:
        index = np.arange(n) if queries is None else queries
        asked.append(len(index))
        place = order.index(0) / (len(order) - 1)
        noise = rng(hash(order) % 2**32).normal(0, 0.1, n)[index]
        right = (draws[index] < 0.6 + gain * place).astype(float)[None, :]
        row = np.ones((1, len(order)), dtype=bool)
        zero = np.zeros((1, len(index)), dtype=np.int64)
        return Values(row, (gain * place + noise)[None, :], right, zero, None, zero, "log-probability")

    return evaluate, asked


def test_an_order_is_proposed_only_when_the_target_confirms_it_on_other_queries() -> None:
    orders = candidate_orders(whole(4), np.array([0.4, 0.3, 0.2, 0.1]), 2, rng=rng())
    assert orders["original"] == (0, 1, 2, 3)
    assert len(set(orders.values())) == len(orders)
    target, asked = in_order(0.3, 80)
    found = try_orders(orders, target, 80, rng=rng())
    assert found is not None
    assert found.order is not None
    assert found.order[-1] == 0
    assert found.scout == "target"
    assert asked == [20] * len(orders) + [60, 60]
    proxy, by_proxy = in_order(0.3, 30, 5)
    indifferent, _ = in_order(0.0, 80)
    refused = try_orders(orders, indifferent, 80, on_proxy=proxy, rng=rng())
    assert refused is not None
    assert refused.scout == "proxy"
    assert refused.best != "original"
    assert refused.order is None
    assert by_proxy == [30] * len(orders)


def test_one_demonstration_has_one_order() -> None:
    orders = candidate_orders(np.array([False, True]), np.zeros(2), 3, rng=rng())
    assert orders == {"original": (1,)}
    assert try_orders(orders, in_order(0.0, 8)[0], 8, rng=rng()) is None
