"""Cleaning on planted targets: who is suspected, confirmed, looked at again, and which prompts are edge cases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from proxyprompt.attribution import Attribution, WeightedBanzhaf
from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.optimize import Cleaning, clean
from proxyprompt.optimize._harm import harm, harm_coalitions, p_value, set_aside, truncated_holm
from proxyprompt.optimize.clean import suspects
from proxyprompt.sequential import holm
from proxyprompt.value_function import Values

Rows = NDArray[np.bool_]
Truth = Callable[[Rows], NDArray[np.float64]]


class Target:
    """Nats of each query: ``truth(rows)`` plus what differs by query, and a little that differs by query and unit."""

    def __init__(self, truth: Truth, n_queries: int = 60, seed: int = 0, *, discrete: bool = False) -> None:
        self.truth, self.discrete, self.asked = truth, discrete, 0
        self.level = np.random.default_rng(seed).normal(0, 1, n_queries)
        self.seed = seed

    def __call__(self, rows: Rows) -> Values:
        self.asked += len(rows) * len(self.level)
        own = np.random.default_rng([self.seed, 1]).normal(0, 0.02, (rows.shape[1], len(self.level)))
        utility = self.truth(rows)[:, None] + self.level + rows @ own
        right = (utility > 0).astype(float)
        if self.discrete:
            utility = right
        zeros = np.zeros(right.shape, dtype=np.int64)
        return Values(
            rows, utility, right, zeros, None, zeros, "accuracy" if self.discrete else "log-probability"
        )


def explain(target: Target, kept: Rows) -> Attribution:
    """Attribution of the units kept."""
    n = int(kept.sum())
    design = WeightedBanzhaf().design(n, min(2**n, 3 * n + 20), rng=np.random.default_rng(n))
    rows = np.zeros((design.n_coalitions, len(kept)), dtype=bool)
    rows[:, kept] = design.coalitions
    return WeightedBanzhaf().fit(design, target(rows).utility)


def run(truth: Truth, n: int, **settings: object) -> Cleaning:
    """Explain on one set of queries, confirm on another."""
    explaining, confirming = Target(truth, 40, 1), Target(truth, 60, 2)
    return clean(
        explain(explaining, np.ones(n, dtype=bool)),
        confirming,
        reexplain=lambda kept: explain(explaining, kept),
        **settings,  # type: ignore[arg-type]
    )


def additive(weights: NDArray[np.float64]) -> Truth:
    return lambda rows: rows @ weights


def planted(n: int, bad: list[int]) -> Truth:
    weights = np.full(n, 0.05)
    weights[bad] = -0.3
    return additive(weights)


def masked(rows: Rows) -> NDArray[np.float64]:
    """Units 0 and 1 do all the harm there is to do; 2 helps a little beside them, and does harm where neither is left."""
    worst = rows[:, :2].any(axis=1)
    return -2.0 * worst + rows[:, 2] * np.where(worst, 0.4, -1.5) + 0.1 * rows[:, 3:].sum(axis=1)


def test_harmful_units_are_flagged_confirmed_and_removed() -> None:
    result = run(planted(10, [3, 7]), 10)
    assert set(result.removed) == {3, 7}
    assert set(np.flatnonzero(~result.kept)) == {3, 7}
    assert {3, 7} <= set(result.flagged)
    assert all(c.difference == pytest.approx(0.3, abs=0.05) for c in result.confirmations if c.confirmed)
    assert result.n_queries == 60


def test_what_the_target_does_not_confirm_stays() -> None:
    attribution = explain(Target(planted(10, [3, 7]), 40, 1), np.ones(10, dtype=bool))
    harmless = Target(additive(np.full(10, 0.05)), 60, 2)
    result = clean(attribution, harmless)
    assert {3, 7} <= set(result.flagged)
    assert result.removed == ()
    assert result.kept.all()
    unasked = clean(attribution, None)
    assert unasked.kept.all()
    assert unasked.flagged == result.flagged


def test_suspects_that_mask_each_other_are_confirmed() -> None:
    """Either of two poisons alone does all the harm: leaving out one changes nothing."""
    result = run(lambda rows: -1.0 * (rows[:, 0] | rows[:, 1]) + 0.1 * rows[:, 2:].sum(axis=1), 6)
    assert {0, 1} == set(result.removed)


def test_poison_masked_by_other_poison_is_found_in_the_second_round() -> None:
    once = run(masked, 10, rounds=1)
    assert set(once.removed) == {0, 1}
    assert 2 not in once.flagged
    twice = run(masked, 10, rounds=3)
    assert set(twice.removed) == {0, 1, 2}
    first, second = twice.rounds[:2]
    assert first.context.all()
    assert set(np.flatnonzero(~second.context)) == set(first.flagged[:3])
    assert not set(first.flagged) & set(second.flagged)
    assert 2 in second.confirmed
    assert second.level <= first.level


def test_what_is_explained_anew_lacks_the_strongest_suspects_whoever_is_confirmed() -> None:
    """The second round's prompt must not depend on the confirming queries."""
    asked: list[list[int]] = []
    attribution = explain(Target(planted(10, [3, 7]), 40, 1), np.ones(10, dtype=bool))

    def reexplain(kept: Rows) -> None:
        asked.append(np.flatnonzero(~kept).tolist())

    for confirming in (planted(10, [3, 7]), planted(10, [3]), planted(10, [7])):
        result = clean(attribution, Target(confirming, 60, 2), rounds=2, reexplain=reexplain)
        assert result.removed
        assert "limit" in result.stopped
    assert asked == [sorted(result.flagged[:3])] * 3


def test_nothing_is_explained_anew_after_a_round_that_confirms_nothing() -> None:
    def never(kept: Rows) -> None:
        raise AssertionError("asked")

    attribution = explain(Target(planted(10, [3]), 40, 1), np.ones(10, dtype=bool))
    result = clean(attribution, Target(additive(np.zeros(10)), 60, 2), rounds=3, reexplain=never)
    assert len(result.rounds) == 1
    assert result.stopped == "the last round confirmed nothing"


def test_one_round_alone_is_holm() -> None:
    result = run(planted(10, [1, 4, 8]), 10, rounds=1, suspect_level=0.4)
    p = np.array([c.p_value for c in result.confirmations])
    assert [c.confirmed for c in result.confirmations] == holm(p, 0.05).tolist()


@pytest.mark.parametrize("discrete", [False, True])
def test_right_or_wrong_answers_are_enough_for_a_strong_effect(discrete: bool) -> None:
    truth = planted(8, [2])
    attribution = explain(Target(truth, 40, 1), np.ones(8, dtype=bool))
    strong = lambda rows: -1.2 * rows[:, 2]  # noqa: E731
    assert clean(attribution, Target(strong, 80, 2, discrete=discrete)).removed == (2,)


def test_protected_units_are_never_suspected() -> None:
    assert set(run(planted(10, [3, 7]), 10, protected=(3,)).removed) == {7}
    every = run(planted(4, [0, 1, 2, 3]), 4, protected=(0, 1, 2, 3), rounds=3)
    assert every.rounds == ()


def test_a_doubted_unit_needs_only_to_be_below_zero() -> None:
    attribution = explain(Target(additive(np.zeros(10)), 40, 1), np.ones(10, dtype=bool))
    p, low = attribution.p_values(), np.flatnonzero(attribution.mean < 0)
    high = np.flatnonzero(attribution.mean > 0)
    assert len(low) > 1
    assert len(high) > 1
    strict = float(p.min()) / 2
    assert suspects(attribution, level=strict) == ()
    assert suspects(attribution, level=strict, doubted=(int(low[0]), int(high[0]))) == (int(low[0]),)


def test_doubts_name_units_of_the_whole_prompt_in_every_round() -> None:
    result = run(masked, 10, rounds=3, suspect_level=1e-6, doubted=(0, 1, 2))
    assert set(result.removed) == {0, 1, 2}


def test_suspects_come_lowest_p_first_and_not_more_than_asked() -> None:
    attribution = explain(Target(planted(10, [3, 7]), 40, 1), np.ones(10, dtype=bool))
    assert set(suspects(attribution)[:2]) == {3, 7}
    assert len(suspects(attribution, most=1)) == 1
    assert len(run(planted(10, [3, 7]), 10, max_suspects=1, rounds=1).flagged) == 1


def test_harm_is_the_mean_in_both_prompts() -> None:
    context = np.array([True, True, True, False, True])
    assert set_aside(context, (2, 0)) == (2,)
    rows = harm_coalitions(context, (2, 0))
    assert rows.astype(int).tolist() == [
        [1, 1, 1, 0, 1], [1, 1, 0, 0, 1],
        [1, 1, 0, 0, 1], [1, 1, 1, 0, 1],
        [0, 1, 1, 0, 1], [0, 1, 0, 0, 1],
    ]  # fmt: skip
    v = np.array([[0.0], [1.0], [0.3], [0.2], [0.5], [0.9]])
    assert harm(v, 1) == pytest.approx(np.array([[0.5 * 0.3 + 0.5 * 0.8, 0.5 * 0.5 - 0.5 * 0.1]]))


@pytest.mark.parametrize(("n", "most"), [(1, 1), (2, 1), (8, 2), (9, 3), (64, 16)])
def test_at_most_a_quarter_is_set_aside(n: int, most: int) -> None:
    assert len(set_aside(np.ones(n, dtype=bool), tuple(range(n)))) == most
    assert set_aside(np.ones(64, dtype=bool), (5, 1)) == (5, 1)


def test_p_values_by_hand() -> None:
    symmetric = np.array([-1.0, 1.0, 1.0, 3.0, 0.0, 2.0])
    mean, se, p = p_value(symmetric, discrete=False)
    assert (mean, se) == (pytest.approx(1.0), pytest.approx(np.sqrt(2 / 6)))
    from scipy.stats import ttest_1samp

    assert p == pytest.approx(ttest_1samp(symmetric, 0, alternative="greater").pvalue)
    # Ten queries gain, none loses: 2 ** -10 by signs; the t test alone would say less than 1e-8.
    almost = np.array([1.0] * 9 + [0.5])
    assert p_value(almost, discrete=True)[2] == pytest.approx(2**-10)
    assert p_value(np.full(5, 0.5), discrete=True)[2] == pytest.approx(2**-5)
    assert p_value(np.zeros(5), discrete=True)[2] == 1.0
    assert p_value(np.array([np.nan, 1.0]), discrete=False)[2] == 1.0


def test_a_tail_of_losses_makes_the_test_more_careful() -> None:
    gains = np.r_[np.full(57, 0.1) + np.linspace(0, 0.02, 57), [-0.8, -0.9, -0.7]]
    from scipy.stats import ttest_1samp

    plain = ttest_1samp(gains, 0, alternative="greater").pvalue
    assert p_value(gains, discrete=False)[2] > 1.5 * plain
    mirrored = (
        2 * gains.mean() - gains
    )  # the same mean and spread, a tail of gains: no less careful than the t test
    assert p_value(mirrored, discrete=False)[2] == pytest.approx(plain)


def test_truncated_holm_by_hand() -> None:
    p = np.array([0.04, 0.001, 0.019, 0.9])
    # Bars at level 0.06: 0.06 (1/8 + 1/8), then 0.06 (1/6 + 1/8) = 0.0175.
    confirmed, left = truncated_holm(p, 0.06, last=False)
    assert confirmed.tolist() == [False, True, False, False]
    assert left == pytest.approx(0.06 * 0.5 / 4)
    assert truncated_holm(p, 0.06, last=True)[0].tolist() == [False, True, True, False]  # 0.06 / 3 = 0.02
    assert truncated_holm(np.array([0.001, 0.002]), 0.06, last=False)[1] == 0.06
    assert truncated_holm(np.array([0.9]), 0.06, last=False)[1] == 0.0


# --- edge cases: every number of demonstrations, and prompts that are all of a kind


@pytest.mark.parametrize("n", [1, 2, 8, 64, 200])
def test_prompts_of_every_size(n: int) -> None:
    bad = [0] if n < 8 else [1, n // 2, n - 1]
    result = run(planted(n, bad), n, rounds=3)
    assert set(result.removed) == set(bad)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_everything_is_poison(n: int) -> None:
    result = run(additive(np.full(n, -0.3)), n, rounds=6)
    assert result.kept.sum() == 0


def test_everything_is_poison_beyond_what_the_rounds_can_test() -> None:
    result = run(additive(np.full(200, -0.3)), 200, rounds=3, max_suspects=12)
    assert len(result.removed) == 36
    assert result.stopped == "3 of 3 rounds were held"


@pytest.mark.parametrize("n", [1, 2, 8, 64, 200])
def test_a_target_that_ignores_demonstrations_confirms_nothing(n: int) -> None:
    """Values equal to the last digit: differences are exactly 0, and so is every statistic."""

    class Ignoring(Target):
        def __call__(self, rows: Rows) -> Values:
            values = super().__call__(np.zeros_like(rows))
            return values

    ignoring = Ignoring(lambda rows: np.zeros(len(rows)), 60, 2)
    for weights in (np.zeros(n), np.full(n, -0.3)):
        attribution = explain(Target(additive(weights), 40, 1), np.ones(n, dtype=bool))
        assert clean(attribution, ignoring, rounds=3).kept.all()
    own = explain(ignoring, np.ones(n, dtype=bool))
    assert clean(own, ignoring, rounds=3, doubted=tuple(range(n))).kept.all()


def test_identical_demonstrations_are_not_all_taken_out_for_being_too_many() -> None:
    assert run(lambda rows: np.log1p(rows.sum(axis=1)), 8, rounds=3).kept.all()
    # Best with four of them: each is harmful among eight, and none at all is as bad as eight.
    result = run(lambda rows: -0.1 * (rows.sum(axis=1) - 4.0) ** 2, 8, rounds=3)
    assert result.kept.sum() == 4
    assert len(result.removed) == 4
    assert set(result.removed) | set(result.spared) == {c.unit for c in result.confirmations if c.confirmed}
    assert result.spared
    crowd = lambda rows: -0.5 * np.maximum(rows.sum(axis=1) - 4.0, 0)  # noqa: E731
    kept = run(crowd, 8, rounds=3).kept[None, :]
    assert crowd(kept)[0] == 0.0


def test_a_perfect_target_has_nothing_to_clean() -> None:
    perfect = Target(lambda rows: np.full(len(rows), 50.0), 60, 2, discrete=True)
    attribution = explain(perfect, np.ones(12, dtype=bool))
    result = clean(attribution, perfect, rounds=3, doubted=(0, 1))
    assert result.kept.all()
    assert result.removed == ()


def test_missing_answers_are_inconclusive() -> None:
    attribution = explain(Target(planted(6, [2]), 40, 1), np.ones(6, dtype=bool))

    def holes(rows: Rows) -> Values:
        v = Target(planted(6, [2]), 20, 2)(rows)
        v.utility[:, :5] = np.nan
        lost = tuple((i, j, "timeout") for i in range(len(rows)) for j in range(5))
        return Values(rows, v.utility, v.performance, v.predictions, None, v.prompt_tokens, v.scale, lost)

    with pytest.raises(InconclusiveError, match="timeout"):
        clean(attribution, holes)


def test_bad_settings() -> None:
    attribution = explain(Target(planted(4, [0]), 10, 1), np.ones(4, dtype=bool))
    for wrong in ({"level": 0.0}, {"suspect_level": 1.0}, {"rounds": 0}, {"max_suspects": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            clean(attribution, None, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="level"):
        truncated_holm(np.array([0.5]), 1.0, last=True)
