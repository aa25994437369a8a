"""Sequential rules, non-inferiority, fixed sequence and Holm on cases worked by hand."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyprompt import _trinomial
from proxyprompt._bets import log_wealth
from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.sequential import (
    betting_rule,
    earliest_acceptance,
    fixed_sequence,
    holm,
    non_inferiority,
    paired_t_rule,
    smallest_certifiable_loss,
    smallest_possible_acceptance,
)


@pytest.mark.parametrize(("tau", "delta", "n"), [(0.9, 0.4, 10), (0.8, 0.3, 9), (0.5, 0.1, 8)])
def test_wealth_is_a_fair_game_when_the_mean_difference_is_zero(tau, delta, n):
    """Every path of a two-point law with mean 0: expected wealth 1, acceptance within delta. Both by counting."""
    expected, accepted, rejected = [0.0, 0.0], 0.0, 0.0
    for wins in itertools.product([True, False], repeat=n):
        d = np.where(wins, 1 - tau, -tau)
        chance = float(np.prod(np.where(wins, tau, 1 - tau)))
        result = betting_rule(d, tau=tau, delta=delta, max_pairs=n)
        expected[0] += chance * math.exp(result.path[-1][1])
        expected[1] += chance * math.exp(result.path[-1][2])
        accepted += chance * (result.decision == "accepted")
        rejected += chance * (result.decision == "rejected")
    assert expected == pytest.approx([1.0, 1.0], abs=1e-9)
    assert accepted <= delta
    assert rejected <= delta
    assert accepted > 0.5 * delta


def test_bets_follow_the_printed_formula():
    """One by one and with other means: what the docstring says, for pairs that share no bin."""
    d, tau, n = [0.1, -0.3, 0.2, 0.0], 0.8, 40
    normal, bets = NormalDist(), [0.99 / tau * share for share in (0.02, 0.05, *np.linspace(0.1, 1, 10))]
    wealth = 1.0
    for i, new in enumerate(d):
        law = [(-tau, 4 * 0.015), (-0.3, 4 * 0.4925), (0.3, 4 * 0.4925), *((x, 1.0) for x in d[:i])]
        total = 4 + i
        mean = sum(w * x for x, w in law) / total
        sd = math.sqrt(sum(w * (x - mean) ** 2 for x, w in law) / total)
        hoped = max(mean, 3.5 * sd / math.sqrt(n))
        law = [(x, max(w * (1 + (hoped - mean) * (x - mean) / sd**2), 0.0)) for x, w in law]
        drift = min(hoped / sd, 0.5) * math.sqrt(n - i - 1)

        def chance(bet, wealth=wealth, law=law, drift=drift):
            after = [(min(wealth / 20 / 1.1 * (1 + bet * x), 1 - 1e-9), w) for x, w in law]
            return sum(w * normal.cdf(normal.inv_cdf(p) + drift) for p, w in after)

        wealth *= 1 + max(bets, key=chance) * new
    result = betting_rule(d, tau=tau, delta=0.05, max_pairs=n)
    assert math.exp(result.path[-1][1]) == pytest.approx(wealth, rel=1e-9)


def test_many_runs_at_once_are_each_run_alone():
    d = np.random.default_rng(3).normal(0.03, 0.2, size=(5, 60)).clip(-0.8, 0.5)
    above, below = log_wealth(d, 0.8, 0.05, 60)
    for row, up, down in zip(d, above, below, strict=True):
        path = np.array(betting_rule(row, tau=0.8, max_pairs=60).path)
        assert path[:, 1] == pytest.approx(up[: len(path)], abs=1e-12)
        assert path[:, 2] == pytest.approx(down[: len(path)], abs=1e-12)


def test_betting_rule_reasons():
    rng = np.random.default_rng(0)
    assert betting_rule(np.full(100, 0.2), tau=0.8).reason == "boundary"
    assert betting_rule(np.full(10, 0.2), tau=0.8).reason == "out_of_data"
    assert betting_rule([], tau=0.8).n_used == 0
    reasons = [betting_rule(rng.normal(mean, 0.06, 100).clip(-0.8, 0.2), tau=0.8) for mean in [0, 0.04] * 30]
    assert {r.reason for r in reasons if r.decision == "undecided"} == {"futility", "max_pairs"}
    assert all(r.n_used < 100 for r in reasons if r.reason == "futility")


def test_betting_rule_continues_on_the_same_path():
    d = np.random.default_rng(0).normal(0.05, 0.1, size=80).clip(-0.8, 0.2)
    part, whole = betting_rule(d[:20], tau=0.8), betting_rule(d, tau=0.8)
    assert whole.path[:20] == part.path


def test_betting_rule_errors():
    with pytest.raises(InputError, match=r"max_pairs=40: with tau=0.9 and delta=0.01 .* before 44 pairs"):
        betting_rule([0.1], tau=0.9, delta=0.01, max_pairs=40)
    with pytest.raises(InputError, match=r"span -0.9 to 0.2: with tau=0.8 they lie in \[-0.8, 1\]"):
        betting_rule([-0.9, 0.2], tau=0.8)
    with pytest.raises(InputError, match="a list of finite numbers"):
        betting_rule([np.nan], tau=0.8)
    with pytest.raises(InputError, match="tau=1: strictly between 0 and 1"):
        betting_rule([0.0], tau=1)
    with pytest.raises(InputError, match="delta=0: strictly"):
        betting_rule([0.0], tau=0.8, delta=0)
    with pytest.raises(InputError, match="max_pairs=0: at least 1"):
        betting_rule([0.0], tau=0.8, max_pairs=0)


def test_smallest_possible_acceptance_is_the_study_s():
    table = {(0.9, 1.0, 0.01): 44, (0.9, 1.0, 0.05): 29, (0.9, 0.92, 0.01): 25, (0.8, 1.0, 0.05): 14}
    for arguments, n in table.items():
        assert smallest_possible_acceptance(*arguments) == n
    with pytest.raises(InputError, match=r"tau \* q_oracle = 1"):
        smallest_possible_acceptance(1.0, 1.0, 0.05)
    with pytest.raises(InputError, match=r"q_oracle=1.5: a number in \(0, 1\]"):
        smallest_possible_acceptance(0.8, 1.5, 0.05)


def test_earliest_acceptance():
    """29, 44 and 14 pairs are the fewest after which any valid rule may accept."""
    assert earliest_acceptance(tau=0.9, delta=0.05, max_pairs=100) == 49
    assert earliest_acceptance(tau=0.9, delta=0.05, max_pairs=50) == 35
    assert earliest_acceptance(tau=0.9, delta=0.01, max_pairs=100) == 59
    assert earliest_acceptance(tau=0.8, delta=0.05, max_pairs=32) == 17
    assert earliest_acceptance(tau=0.8, delta=0.05, max_pairs=14) == 14
    assert earliest_acceptance(tau=0.9, delta=0.05, max_pairs=28) is None
    with pytest.raises(InputError, match=r"q_oracle=0: a fidelity in \(0, 1\]"):
        earliest_acceptance(tau=0.9, delta=0.05, max_pairs=100, q_oracle=0)


def test_paired_t_rule_by_hand():
    # n=3: mean .2, s .1, t_{2,.975} = 4.302653: .2 -+ .248414
    result = paired_t_rule([0.1, 0.2, 0.3], delta=0.05, max_pairs=50)
    assert result.decision == "undecided"
    assert result.reason == "out_of_data"
    np.testing.assert_allclose(result.path[-1], (3, 0.2 - 0.248414, 0.2 + 0.248414), atol=1e-6)


@pytest.mark.parametrize(("value", "decision"), [(0.1, "accepted"), (-0.3, "rejected"), (0.0, "undecided")])
def test_paired_t_rule_zero_width(value, decision):
    result = paired_t_rule([value] * 60)
    assert result.decision == decision
    assert result.n_used == (50 if decision == "undecided" else 2)
    assert result.reason == ("max_pairs" if decision == "undecided" else "boundary")
    assert "12 %" in result.note
    assert "above 60 %" in result.note


def test_paired_t_rule_errors_and_short_input():
    assert paired_t_rule([]).n_used == 0
    assert paired_t_rule([0.5]).decision == "undecided"
    with pytest.raises(InputError, match="max_pairs=1: at least 2"):
        paired_t_rule([0.1], max_pairs=1)
    with pytest.raises(InputError, match="a list of finite numbers"):
        paired_t_rule([[0.1]])


def binary(wins, losses, both, neither):
    full = np.repeat([0.0, 1.0, 1.0, 0.0], [wins, losses, both, neither])
    pruned = np.repeat([1.0, 0.0, 1.0, 0.0], [wins, losses, both, neither])
    return full, pruned


def test_non_inferiority_reports_what_it_saw():
    full, pruned = binary(4, 6, 150, 20)
    result = non_inferiority(full, pruned, tau=0.9)
    assert (result.method, result.decision, result.n) == ("exact", "certified", 180)
    assert result.e_value is None
    assert result.difference == pytest.approx(-2 / 180)
    assert result.estimate == pytest.approx(154 / 180 - 0.9 * 156 / 180)
    assert result.retained == pytest.approx(154 / 156)
    assert 0.9 < result.retained_lower_bound < 154 / 156
    assert result.lower_bound == 0.0
    assert dict(result.settings) == {"tau": 0.9, "margin": None, "wins": 4, "losses": 6}
    margin = non_inferiority(full, pruned, margin=0.1)
    assert 0 < margin.lower_bound < margin.estimate == pytest.approx(0.1 - 2 / 180)
    assert margin.retained_lower_bound is None


def test_exact_p_value_without_discordance_is_a_binomial_tail():
    # No losses among n pairs at slack s: the score is highest, and its chance under q_win = 0 is (1-s)^n;
    # other boundary points make wins likelier and this outcome with no wins and no losses rarer, but
    # outcomes with wins and no losses score higher still: their chance together is (1 - q_loss)^n.
    assert _trinomial.p_value(0, 0, 60, 0.05, 0.95) == pytest.approx(0.95**60, rel=1e-6)
    assert non_inferiority(*binary(0, 0, 60, 40), tau=0.95).p_value == pytest.approx(0.95**60, rel=1e-6)
    assert non_inferiority(*binary(0, 0, 40, 20), margin=0.05).p_value == pytest.approx(0.95**60, rel=1e-6)


@pytest.mark.parametrize("n", [1, 5, 23, 40])
@pytest.mark.parametrize(("slack", "keep"), [(0.0, 1.0), (0.05, 1.0), (0.05, 0.95), (0.2, 0.8), (0.5, 0.5)])
def test_score_is_monotone(n, slack, keep):
    """More wins or fewer losses never lower the score: the supremum over the null is on its boundary."""
    wins, losses = _trinomial._outcomes(n)
    table = np.full((n + 1, n + 1), np.nan)
    table[wins, losses] = _trinomial.score(wins, losses, n, slack, keep)
    for axis, sign in ((0, 1), (1, -1)):
        steps = np.diff(table, axis=axis) * sign
        assert (steps[~np.isnan(steps)] >= -1e-9).all()


@pytest.mark.parametrize(("slack", "keep"), [(0.05, 1.0), (0.1, 0.9)])
def test_exact_test_keeps_its_level_all_over_the_null(slack, keep):
    n, level = 30, 0.05
    wins, losses = _trinomial._outcomes(n)
    p = np.array(
        [_trinomial.p_value(int(w), int(v), n, slack, keep) for w, v in zip(wins, losses, strict=True)]
    )
    region = wins[p <= level], losses[p <= level]
    for q_win in np.linspace(0, (1 - slack) / (1 + keep), 301):
        for extra in (0.0, 0.02, 0.1):
            q_loss = slack + keep * q_win + extra
            if q_win + q_loss <= 1:
                assert _trinomial._pmf(region, n, q_win, q_loss).sum() <= level + 1e-6


def test_ratio_only_sees_queries_either_prompt_got_right():
    first = non_inferiority(*binary(3, 5, 100, 0), tau=0.9)
    second = non_inferiority(*binary(3, 5, 100, 80), tau=0.9)
    assert first.p_value == second.p_value
    assert non_inferiority(*binary(0, 0, 0, 20), tau=0.9).p_value == 1.0
    assert non_inferiority(*binary(0, 0, 0, 20), tau=0.9).retained is None


@pytest.mark.parametrize("method", ["exact", "betting"])
@pytest.mark.parametrize("rule", [{"tau": 0.9}, {"margin": 0.1}, {"tau": 1.0}, {"margin": 0.0}])
@pytest.mark.parametrize(
    "counts", [(0, 0, 150, 30), (5, 6, 140, 29), (5, 16, 130, 29), (0, 180, 0, 0), (60, 0, 60, 60)]
)
def test_bound_and_decision_agree(method, rule, counts):
    shuffle = np.random.default_rng(0).permutation(180)
    full, pruned = (scores[shuffle] for scores in binary(*counts))
    result = non_inferiority(full, pruned, method=method, **rule)
    assert result.certified == (result.p_value <= 0.05)
    if method == "exact":
        assert result.certified == (result.lower_bound >= 0)
    else:
        assert result.certified or result.lower_bound < 0
    assert result.lower_bound <= result.estimate + 1e-9
    if result.retained_lower_bound is not None:
        assert 0 <= result.retained_lower_bound <= max(result.retained, 0) + 1e-9


def test_betting_takes_any_score_and_keeps_evidence():
    rng = np.random.default_rng(0)
    full = rng.beta(3, 1, size=200)
    result = non_inferiority(full, np.where(rng.random(200) < 0.9, full, 0.9 * full), tau=0.9)
    assert result.method == "betting"
    assert result.certified
    assert result.e_value >= 20
    assert result.p_value == pytest.approx(1 / result.e_value)


def test_missing_pairs_count_as_the_worst_case():
    full, pruned = binary(0, 0, 100, 0)
    with_gap = pruned.copy()
    with_gap[:4] = np.nan
    worst = pruned.copy()
    worst[:4] = 0.0
    result, expected = non_inferiority(full, with_gap, tau=0.9), non_inferiority(full, worst, tau=0.9)
    assert (result.p_value, result.n, result.n_missing) == (expected.p_value, 100, 4)
    zeros = np.zeros(100)
    zeros[:3] = np.nan
    assert non_inferiority(zeros, np.zeros(100), margin=0.1).difference == pytest.approx(-0.03)
    with_gap[:6] = np.nan
    with pytest.raises(InconclusiveError, match="6 of 100 pairs lack a score; at most 5% may"):
        non_inferiority(full, with_gap, tau=0.9)


def test_non_inferiority_errors():
    ones = np.ones(20)
    for arguments, message in [
        ({}, "tau=None, margin=None: exactly one"),
        ({"tau": 0.9, "margin": 0.1}, "tau=0.9, margin=0.1: exactly one"),
        ({"tau": 0.0}, r"tau=0.0: a number in \(0, 1\]"),
        ({"margin": 1.0}, r"margin=1.0: a number in \[0, 1\)"),
        ({"tau": 0.9, "level": 5}, "level=5: strictly between 0 and 1"),
        ({"tau": 0.9, "method": "t"}, "method='t'"),
    ]:
        with pytest.raises(InputError, match=message):
            non_inferiority(ones, ones, **arguments)
    with pytest.raises(InputError, match="'exact' takes scores of 0 and 1 only"):
        non_inferiority(ones, ones / 2, tau=0.9, method="exact")
    with pytest.raises(InputError, match=r"full has shape \(20,\), pruned \(19,\)"):
        non_inferiority(ones, ones[1:], tau=0.9)
    with pytest.raises(InputError, match=r"pruned spans 2 to 2: scores lie in \[0, 1\]"):
        non_inferiority(ones, 2 * ones, tau=0.9)


def test_fixed_sequence_stops_and_does_not_call_the_rest():
    called = []

    def test(index, passed):
        return lambda: called.append(index) or passed

    result = fixed_sequence([test(0, True), test(1, True), test(2, False), test(3, True)])
    assert (result.last_passed, result.n_run, called) == (1, 3, [0, 1, 2])
    assert fixed_sequence([lambda: False]).last_passed is None
    kept = non_inferiority(np.ones(100), np.ones(100), tau=0.9)
    assert fixed_sequence([lambda: kept]).results == (kept,)
    with pytest.raises(InputError, match="tests is empty"):
        fixed_sequence([])
    with pytest.raises(InputError, match=r"tests\[0\] returned float"):
        fixed_sequence([lambda: 0.01])


def test_holm():
    # Textbook case: .005 <= .05/4, .011 <= .05/3, .02 <= .05/2, .06 > .05
    assert holm([0.02, 0.005, 0.06, 0.011], 0.05).tolist() == [True, True, False, True]
    assert holm([0.04, 0.03], 0.05).tolist() == [False, False]
    assert holm([], 0.05).tolist() == []
    with pytest.raises(InputError, match="p_values of shape"):
        holm([np.nan], 0.05)
    with pytest.raises(InputError, match="level=1: strictly"):
        holm([0.5], 1)


def test_power_statement():
    small, large = (smallest_certifiable_loss(n, tau=0.9) for n in (60, 300))
    assert large.power_at_no_loss > small.power_at_no_loss
    assert large.loss > small.loss
    assert large.smallest_allowance < small.smallest_allowance
    assert smallest_certifiable_loss(180, tau=0.9, method="betting").power_at_no_loss < (
        smallest_certifiable_loss(180, tau=0.9).power_at_no_loss
    )
    assert smallest_certifiable_loss(5, margin=0.01).loss is None
    for arguments, message in [
        ({"n": 0, "tau": 0.9}, "n=0"),
        ({"n": 10, "tau": 0.9, "power": 1.0}, "power=1.0: a share"),
        ({"n": 10}, "exactly one"),
        ({"n": 10, "tau": 0.9, "full_score": 0.99}, "equally good prompts cannot differ so often"),
    ]:
        with pytest.raises(InputError, match=message):
            smallest_certifiable_loss(**arguments)


@settings(max_examples=50, deadline=None)
@given(
    wins=st.integers(0, 30),
    losses=st.integers(0, 30),
    same=st.integers(0, 60),
    tau=st.floats(0.5, 1.0),
)
def test_p_values_fall_with_wins_and_rise_with_losses(wins, losses, same, tau):
    n = wins + losses + same + 1
    p = _trinomial.p_value(wins, losses, n, 1 - tau, tau)
    assert 0 <= p <= 1
    assert _trinomial.p_value(wins + 1, losses, n, 1 - tau, tau) <= p + 1e-9
    assert _trinomial.p_value(wins, losses + 1, n, 1 - tau, tau) >= p - 1e-9
