"""Calling a comparison settled: how often any such call, at any look, is wrong, and what stopping early saves.

Games of 9 units with all 512 values at random; the exact attributions are then taken out, so that all units are exactly
tied (or exactly as far apart as a test wants them) and still interact.
"""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import (
    Banzhaf,
    Below,
    FullRanking,
    KernelSHAP,
    TopK,
    WeightedBanzhaf,
    attribute_until_settled,
)
from proxyprompt.coalitions import enumerate_coalitions

N, RUNS, GAMES = 9, 400, 40
ROWS = enumerate_coalitions(N)
CODES = 1 << np.arange(N)


def residuals(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Values of all coalitions, shape (512,)."""
    if kind == "normal":
        return rng.normal(size=len(ROWS))
    if kind == "heavy tails":
        return rng.standard_t(3, size=len(ROWS))
    if kind == "rare":
        return 5.0 * (rng.random(len(ROWS)) < 0.03)
    if kind == "cliff":  # very different with one or two units, as a model without demonstrations is
        return -3.0 * (ROWS.sum(axis=1) <= 2) * (1 + rng.random(len(ROWS))) + 0.2 * rng.normal(size=len(ROWS))
    values = np.zeros(len(ROWS))  # "triples"
    for _ in range(3 * N):
        values += rng.normal() * ROWS[:, rng.choice(N, 3, replace=False)].all(axis=1)
    return values


def game(explainer, kind, credit, rng):
    """Value function whose attributions under ``explainer`` are exactly ``credit``."""
    values = residuals(kind, rng)

    def look_up(rows):
        return values[rows @ CODES][:, None]

    found = explainer.attribute(look_up, N, budget=2**N, rng=rng).mean
    values = values - ROWS @ (found - credit)
    return look_up


def runs(explainer, kind, decision, credit, *, rng, budget=150):
    for number in range(RUNS):
        if number % (RUNS // GAMES) == 0:
            played = game(explainer, kind, credit, rng)
        yield attribute_until_settled(
            explainer, played, N, decision=decision, budget=budget, rng=rng, growth=2.0
        )


@pytest.mark.parametrize(
    ("explainer", "kind", "decision"),
    [
        (WeightedBanzhaf(), "normal", FullRanking()),
        (WeightedBanzhaf(), "heavy tails", Below()),
        (WeightedBanzhaf(), "rare", FullRanking()),
        (Banzhaf(), "triples", FullRanking()),
        (KernelSHAP(), "normal", Below()),
        (KernelSHAP(), "cliff", FullRanking()),
    ],
    ids=lambda value: getattr(value, "method", str(value)),
)
def test_units_that_are_exactly_tied_are_seldom_told_apart(explainer, kind, decision):
    wrong = [
        any(len(look.undecided) < look.n_comparisons for look in result.looks)
        for result in runs(explainer, kind, decision, np.zeros(N), rng=np.random.default_rng(7))
    ]
    print(f"\n{explainer.method}, {kind}, {decision}: {np.mean(wrong):.3f} of {RUNS} wrong at some look")
    assert np.mean(wrong) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / RUNS)


@pytest.mark.parametrize(("explainer", "tie"), [(WeightedBanzhaf(), 0.08), (KernelSHAP(), 0.2)])
def test_units_just_past_the_tolerance_are_seldom_called_tied(explainer, tie):
    """Five units are better than four by a little more than ``tie``: no call may put one of the four above."""
    better = np.arange(N) < 5
    credit = np.where(better, 1.001 * tie, 0.0)
    wrong = claims = 0
    for result in runs(
        explainer, "normal", FullRanking(tie=tie), credit, rng=np.random.default_rng(8), budget=250
    ):
        bad = False
        for look in result.looks:
            order, open_ = look.answer, set(look.undecided)
            called = [(a, b) for i, b in enumerate(order) for a in order[i + 1 :] if (a, b) not in open_]
            claims += len(called)
            bad |= any(better[b] and not better[a] for a, b in called)
        wrong += bad
    print(f"\n{explainer.method}: {wrong / RUNS:.3f} of {RUNS} wrong, {claims / RUNS:.1f} calls a run")
    assert claims > RUNS
    assert wrong / RUNS <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / RUNS)


@pytest.mark.parametrize("explainer", [WeightedBanzhaf(), KernelSHAP()], ids=lambda e: e.method)
def test_planted_units_are_found_with_part_of_the_budget(explainer):
    credit = np.array([1.5, 1.5, *[0.0] * (N - 2)])
    rng, spent = np.random.default_rng(9), []
    for _ in range(60):
        played = game(explainer, "normal", credit, rng)
        result = attribute_until_settled(explainer, played, N, decision=TopK(2), budget=400, rng=rng)
        assert result.settled
        assert set(result.answer) == {0, 1}
        spent.append(result.share_spent)
    print(f"\n{explainer.method}: {1 - np.mean(spent):.2f} of the budget saved")
    assert np.mean(spent) < 0.5


@pytest.mark.parametrize("explainer", [WeightedBanzhaf(), KernelSHAP()], ids=lambda e: e.method)
def test_queries_as_a_sample_are_not_mistaken_for_all_queries(explainer):
    """Each query has credits of its own around 0: the sign for all queries is nobody's to call."""
    rng, wrong, for_these = np.random.default_rng(10), [], []
    for number in range(RUNS):
        values = rng.normal(size=(len(ROWS), 10))
        found = explainer.attribute(lambda rows, v=values: v[rows @ CODES], N, budget=2**N, rng=rng).values
        values = values + ROWS @ (rng.normal(size=(10, N)) - found).T
        for over, calls in (("queries", wrong), ("coalitions", for_these))[: 2 if number < 20 else 1]:
            result = attribute_until_settled(
                explainer,
                lambda rows, v=values: v[rows @ CODES],
                N,
                decision=Below(),
                budget=150,
                rng=rng,
                growth=2.0,
                over=over,
            )
            calls.append(any(len(look.undecided) < look.n_comparisons for look in result.looks))
    print(
        f"\n{explainer.method}: {np.mean(wrong):.3f} of {RUNS} wrong, {np.mean(for_these):.2f} were it not said"
    )
    assert np.mean(wrong) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / RUNS)
    assert np.mean(for_these) > 0.5
