"""Proxies order the units, the target measures until the rest cannot matter: planted games, useless proxies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from proxyprompt.attribution import (
    Banzhaf,
    KernelSHAP,
    Lasso,
    LeaveOneOut,
    PermutationShapley,
    WeightedBanzhaf,
)
from proxyprompt.attribution._prediction_line import fit_line
from proxyprompt.attribution.base import Explainer
from proxyprompt.attribution.lime import LIME
from proxyprompt.attribution.verified_units import (
    UnitVerification,
    toggle_bases,
    verified_attribution,
    verify_units,
)
from proxyprompt.coalitions import enumerate_coalitions
from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.testing import UnanimityGame

TRUTH = np.array([0.3, -0.5, 0.4, 0.2, 0.35, -0.3, 0.25, 0.45, 0.3, 0.2, 0.4, 0.3, 0.35, 0.3, 0.25, 0.3])
N_QUERIES = 40


class Target:
    """Planted effects with noise; counts what it is asked."""

    def __init__(self, truth: np.ndarray, seed: int = 0, noise: float = 0.2) -> None:
        self.truth, self.noise, self.rng = truth, noise, np.random.default_rng(seed)
        self.asked: list[int] = []

    def __call__(self, units: tuple[int, ...]) -> np.ndarray:
        self.asked.extend(units)
        effects = self.truth[list(units)] + self.noise * self.rng.normal(size=(N_QUERIES, len(units)))
        return np.asarray(effects)


def run(estimated: np.ndarray, target: Target, seed: int = 0, **more: object) -> UnitVerification:
    return verify_units(estimated, target, rng=np.random.default_rng(seed), n_rows=N_QUERIES, **more)  # type: ignore[arg-type]


def test_a_good_proxy_is_followed_and_the_rest_is_not_measured() -> None:
    target = Target(TRUTH)
    found = run(3 * TRUTH + 0.1, target)
    assert set(found.named) == {1, 5}
    assert found.outcome == "settled"
    assert found.order[:3] == (1, 5, 7)  # both ends first
    assert tuple(target.asked) == found.order
    assert found.target_calls == N_QUERIES * (len(found.order) + 1) < 0.75 * found.oracle_calls
    assert found.oracle_calls == N_QUERIES * (len(TRUTH) + 1)
    assert found.chance_left <= found.level
    unseen = ~found.is_measured
    assert unseen.any()
    # Apart: nothing estimated stands where something measured could, and the other way round.
    assert np.isnan(found.measured[unseen]).all()
    assert np.isnan(found.measured_error[unseen]).all()
    assert np.isnan(found.expected[~unseen]).all()
    assert np.allclose(found.expected[unseen], TRUTH[unseen], atol=0.15)
    assert found.slope == pytest.approx(1 / 3, abs=0.05)
    body = found.to_dict()
    assert all((m is None) != (e is None) for m, e in zip(body["measured"], body["expected"], strict=True))


@pytest.mark.parametrize("kind", ["useless", "inverted"])
def test_a_useless_or_inverted_proxy_is_never_worse_than_measuring_all(kind: str) -> None:
    missed = measured = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        guess = (
            rng.normal(size=len(TRUTH)) if kind == "useless" else -TRUTH + 0.05 * rng.normal(size=len(TRUTH))
        )
        found = run(guess, Target(TRUTH, seed), seed)
        missed += sum(i not in found.named for i in (1, 5))
        measured += len(found.order)
        assert set(found.named) <= {1, 5}
    assert missed <= 2
    if kind == "useless":
        assert measured >= 0.95 * 40 * len(TRUTH)
    else:
        # Its falling line leads to the other end, and it stops just as a good proxy would let it.
        assert measured <= 0.85 * 40 * len(TRUTH)


def test_an_unscreened_proxy_must_show_its_worth_on_the_measured_units() -> None:
    """All units alike: nothing shows that the order means anything, so only a screened one may stop early."""
    flat = np.full(16, 0.3)
    guess = np.linspace(-1, 1, 16)
    assert run(guess, Target(flat)).outcome == "measured_all"
    trusted = run(guess, Target(flat), trusted=True)
    assert trusted.outcome == "settled"
    assert trusted.named == ()


def test_the_most_useful_are_found_at_the_other_end_and_ties_are_said() -> None:
    truth = np.linspace(0, 1.5, 20)
    target = Target(truth)
    found = run(2 * truth, target, decision="top", top=3)
    assert set(found.named) == {17, 18, 19}
    assert found.outcome == "settled"
    assert found.order[:3] == (19, 18, 17)
    tied = np.r_[np.zeros(6), 1.0, 1.0]
    found = run(tied + 1e-3 * np.arange(8), Target(tied), decision="top", top=1)
    assert set(found.named) | set(found.undecided) == {6, 7}


def test_all_measures_every_unit_in_one_go_and_a_limit_on_calls_is_kept_and_said() -> None:
    target = Target(TRUTH)
    found = run(TRUTH, target, decision="all")
    assert (found.outcome, set(found.named), found.chance_left) == ("measured_all", {1, 5}, 0.0)
    assert found.target_calls == found.oracle_calls
    noise = np.random.default_rng(2).normal(size=len(TRUTH))
    found = run(noise, Target(TRUTH), calls=6 * N_QUERIES)
    assert (found.outcome, len(found.order), found.target_calls) == ("limit", 5, 6 * N_QUERIES)
    assert found.chance_left > found.level
    nothing = run(TRUTH, Target(TRUTH), calls=N_QUERIES)
    assert (nothing.outcome, nothing.order, nothing.target_calls, nothing.named) == ("limit", (), 0, ())
    assert nothing.chance.tolist() == [1.0] * len(TRUTH)


def test_every_third_unit_is_an_audit_drawn_at_random() -> None:
    noise = np.random.default_rng(5).normal(size=30)
    found = run(noise, Target(np.random.default_rng(6).normal(size=30)))
    assert len(found.audits) >= 7
    assert set(found.audits) <= set(found.order)
    again = run(noise, Target(np.random.default_rng(6).normal(size=30)))
    assert again.order == found.order


@pytest.mark.parametrize(
    "explainer",
    [
        WeightedBanzhaf(0.8),
        WeightedBanzhaf(0.3),
        Banzhaf(),
        KernelSHAP(),
        PermutationShapley(),
        LeaveOneOut(),
    ],
    ids=lambda e: e.method,
)
def test_toggling_is_unbiased_for_what_the_explainer_estimates(explainer: Explainer) -> None:
    """A game of pairs and triples, where the techniques differ: means of toggles against the exact values."""
    n = 5
    game = UnanimityGame(n, [((0,), 0.4), ((0, 1), 1.0), ((1, 2, 3), -2.0), ((3, 4), 0.7)])
    exact = explainer.attribute(game, n, budget=200, rng=np.random.default_rng(0)).mean
    bases, what = toggle_bases(explainer, n, 40_000, rng=np.random.default_rng(1))
    assert what
    every = np.asarray(game(enumerate_coalitions(n)))[:, 0]
    place = {tuple(row): value for row, value in zip(enumerate_coalitions(n).tolist(), every, strict=True)}
    for unit in range(n):
        there, gone = bases.copy(), bases.copy()
        there[:, unit], gone[:, unit] = True, False
        effect = np.array(
            [place[tuple(a)] - place[tuple(b)] for a, b in zip(there.tolist(), gone.tolist(), strict=True)]
        )
        error = effect.std() / np.sqrt(len(effect))
        assert abs(effect.mean() - exact[unit]) <= 4.5 * error + 1e-9


def test_techniques_without_such_a_law_are_refused() -> None:
    assert toggle_bases(Lasso(), 4, 3, rng=np.random.default_rng(0))[1] == "Banzhaf value"
    with pytest.raises(InputError, match="no coalitions in which a single unit"):
        toggle_bases(LIME(), 4, 3, rng=np.random.default_rng(0))


def test_one_attribution_for_later_stages_has_measured_values_where_there_are() -> None:
    rng = np.random.default_rng(0)
    bases = WeightedBanzhaf(0.8)
    proposal = bases.attribute(
        lambda rows: rows @ (3 * TRUTH)[:, None] + 0.01 * rng.normal(size=(len(rows), 5)),
        len(TRUTH),
        budget=60,
        rng=rng,
    )
    found = run(proposal.mean, Target(TRUTH))
    joined = verified_attribution(proposal, found, np.full(N_QUERIES, 2.0))
    known = found.is_measured
    assert np.array_equal(joined.mean[known], found.measured[known])
    assert np.array_equal(joined.standard_error[known], found.measured_error[known])
    assert np.array_equal(joined.mean[~known], found.expected[~known])
    assert np.array_equal(joined.standard_error[~known], found.expected_error[~known])
    assert np.allclose(joined.values.mean(axis=0), joined.mean)
    assert set(np.flatnonzero(joined.p_values() < 0.01)) == {1, 5}
    nothing = run(proposal.mean, Target(TRUTH), calls=0)
    assert verified_attribution(proposal, nothing, np.full(N_QUERIES, 2.0)) is proposal
    few = run(proposal.mean, Target(TRUTH), calls=3 * N_QUERIES)
    assert np.isfinite(verified_attribution(proposal, few, np.full(N_QUERIES, 2.0)).standard_error).all()


def test_the_line_covers_what_it_has_not_seen() -> None:
    """Frequency with which the 90 % band of the line holds the true effect of a unit left out."""
    rng, inside, tried = np.random.default_rng(3), 0, 0
    for _ in range(300):
        x = rng.normal(size=9)
        theta = 0.2 + 0.3 * x + 0.15 * rng.normal(size=9)
        line = fit_line(x[:8], theta[:8] + 0.1 * rng.normal(size=8), np.full(8, 0.1))
        assert line is not None
        inside += 0.05 <= 1 - line.below(x[8:], float(theta[8]))[0] <= 0.95
        tried += 1
    assert 0.87 <= inside / tried <= 0.985
    assert fit_line(np.ones(3), np.ones(3), np.ones(3)) is None


def test_degenerate_units_end_quietly() -> None:
    same = verify_units(np.zeros(12), lambda u: np.zeros((5, len(u))), rng=np.random.default_rng(0), n_rows=5)
    assert (same.named, same.outcome, same.margin) == ((), "measured_all", 0.0)
    one = verify_units([1.0], lambda u: np.full((5, 1), -1.0), rng=np.random.default_rng(0), n_rows=5)
    assert (one.named, one.outcome) == ((0,), "measured_all")
    exact = verify_units(
        TRUTH, lambda u: np.tile(TRUTH[list(u)], (4, 1)), rng=np.random.default_rng(0), n_rows=4
    )
    assert exact.named == (1, 5)


def test_missing_answers_are_left_out_and_too_many_are_refused() -> None:
    def some(units: tuple[int, ...], share: int) -> np.ndarray:
        effects = np.tile(TRUTH[list(units)], (20, 1)) + np.linspace(-0.1, 0.1, 20)[:, None]
        effects[:share] = np.nan
        return np.asarray(effects)

    found = verify_units(TRUTH, lambda u: some(u, 3), rng=np.random.default_rng(0), n_rows=20)
    assert set(found.named) == {1, 5}
    with pytest.raises(InconclusiveError, match="answered 15 of 20"):
        verify_units(TRUTH, lambda u: some(u, 5), rng=np.random.default_rng(0), n_rows=20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(np.array([np.nan]), Target(TRUTH)), "finite numbers"),
        (lambda: run(TRUTH, Target(TRUTH), decision="best"), "harmful, top or all"),
        (lambda: run(TRUTH, Target(TRUTH), decision="top", top=0), "at least 1"),
        (lambda: run(TRUTH, Target(TRUTH), level=1.0), "strictly between"),
        (lambda: run(TRUTH, Target(TRUTH), calls=-1), "0 or more"),
        (
            lambda: verify_units(TRUTH, lambda u: np.zeros(3), rng=np.random.default_rng(0), n_rows=3),
            "one column a unit",
        ),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
