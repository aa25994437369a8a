"""Error rates under the null and power, by simulation. Run with -s to read the figures."""

from functools import cache

import numpy as np
import pytest

from proxyprompt import _noninferiority, _trinomial
from proxyprompt._bets import log_wealth
from proxyprompt.sequential import (
    fixed_sequence,
    non_inferiority,
    paired_t_rule,
    smallest_certifiable_loss,
)

REPLICATIONS = 2000
TAU = 0.9
SUPPORT = np.array([-0.9, -0.5, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1])
SHAPE = np.array([0.01, 0.02, 0.04, 0.08, 0.15, 0.15, 0.15, 0.2, 0.2])


def tilt(mean):
    """Exponential tilt of an empirical-like law on SUPPORT to the given mean."""
    from scipy.optimize import brentq

    def law(slope):
        weights = SHAPE * np.exp(slope * SUPPORT)
        return weights / weights.sum()

    return law(brentq(lambda slope: law(slope) @ SUPPORT - mean, -200, 200))


def draws(law, mean, size, rng):
    """Differences in [-.9, .1] with the given mean, 0 or .06."""
    if law == "two points":
        return np.where(rng.random(size) < 0.9 + mean, 0.1, -0.9)
    if law == "tilted lattice":
        return rng.choice(SUPPORT, p=tilt(mean), size=size)
    if law == "skewed":
        return 0.1 - 0.6 * rng.beta(1, 5 if mean == 0 else 14, size=size)
    if law == "atom at the maximum":
        low, share = (-0.525, 0.32) if mean == 0 else (-0.3, 0.2)
        return np.where(rng.random(size) < share, rng.uniform(low, 0.1, size=size), 0.1)
    assert law == "LIME-like"
    spread = 0.1 if mean == 0 else 0.04
    return rng.uniform(mean - spread, mean + spread, size=size)


LAWS = ["two points", "tilted lattice", "skewed", "atom at the maximum", "LIME-like"]


@pytest.mark.parametrize("n", [50, 100])
@pytest.mark.parametrize("law", LAWS)
def test_betting_rule_keeps_its_level(law, n):
    d = draws(law, 0.0, (REPLICATIONS, n), np.random.default_rng(1))
    # The wealth that betting_rule looks at (tests/unit/test_sequential.py holds the two together), at every look.
    above, below = (wealth.max(axis=1) >= np.log(20) for wealth in log_wealth(d, TAU, 0.05, n))
    accepted, rejected = int(above.sum()), int(below.sum())
    print(f"\nbetting, {law}, N={n}: accepts {accepted}, rejects {rejected} of {REPLICATIONS}")
    assert accepted / REPLICATIONS <= 0.05
    assert rejected / REPLICATIONS <= 0.05


def test_betting_rule_power():
    rng = np.random.default_rng(2)
    power = {
        law: np.mean(
            log_wealth(draws(law, 0.06, (400, 100), rng), TAU, 0.05, 100)[0].max(axis=1) >= np.log(20)
        )
        for law in LAWS
    }
    print("\nbetting, mu=.06, N=100:", {law: round(float(p), 3) for law, p in power.items()})
    assert np.mean([p for law, p in power.items() if law != "two points"]) >= 0.85


def test_paired_t_rule_passes_its_nominal_error():
    """The reason for its note: nominal one-sided error is .005 at delta = .01."""
    rng = np.random.default_rng(3)
    error = {
        law: np.mean([paired_t_rule(row).accepted for row in draws(law, 0.0, (500, 50), rng)]) for law in LAWS
    }
    print("\npaired t, mu=0, N=50, nominal .005:", {law: round(float(e), 3) for law, e in error.items()})
    assert error["LIME-like"] > 0.05
    assert error["atom at the maximum"] > 0.3
    assert error["two points"] > 0.6


def outcomes(n, size, rng, *, wins, losses, full_score):
    """0/1 scores of both prompts with the given chances of a win and of a loss."""
    cells = [full_score - losses, wins, losses, 1 - full_score - wins]
    drawn = rng.choice(4, p=cells, size=(size, n))
    return np.isin(drawn, (0, 2)).astype(float), np.isin(drawn, (0, 1)).astype(float)


@cache
def critical(n, slack, keep):
    return _trinomial.critical_score(n, slack, keep, 0.05)


def exact_certifies(full, pruned, *, tau=None, margin=None):
    """What non_inferiority decides, by the critical score: its confidence bounds take longer."""
    certified = []
    for f, p in zip(full, pruned, strict=True):
        wins, losses = np.array([(p > f).sum()]), np.array([(p < f).sum()])
        n, slack, keep = (len(f), margin, 1.0) if tau is None else (int(((f + p) > 0).sum()), 1 - tau, tau)
        reached = _trinomial.score(wins, losses, n, slack, keep)[0]
        certified.append(reached >= critical(n, slack, keep) - 1e-9)
    return np.array(certified)


def betting_certifies(full, pruned, *, tau=None, margin=None):
    share, null = (1.0, -margin) if tau is None else (tau, 0.0)
    columns = (pruned - share * full).T
    ones = np.ones(columns.shape[1])
    _, peak = _noninferiority._wealth(columns, share * ones, null * ones, 0.05)
    return peak >= np.log(20)


@pytest.mark.parametrize("n", [60, 180])
@pytest.mark.parametrize("full_score", [0.6, 0.9])
@pytest.mark.parametrize("wins", [0.0, 0.02, 0.08])
def test_false_certification_of_binary_scores(n, full_score, wins):
    rng = np.random.default_rng(4)
    for rule, losses in (
        ({"tau": 0.95}, wins + 0.05 * full_score),
        ({"margin": 0.05}, wins + 0.05),
    ):
        full, pruned = outcomes(n, REPLICATIONS, rng, wins=wins, losses=losses, full_score=full_score)
        exact = exact_certifies(full, pruned, **rule).mean()
        betting = betting_certifies(full, pruned, **rule).mean()
        print(f"\nfalse certificates, n={n} {rule} full={full_score} wins={wins}: {exact:.3f} {betting:.3f}")
        # The level is .05 by proof; three standard errors of the simulation are .015.
        assert exact <= 0.065
        assert betting <= 0.065


@pytest.mark.parametrize("n", [60, 180])
@pytest.mark.parametrize("law", ["rare collapse", "small shift", "noisy"])
def test_false_certification_of_bounded_scores(n, law):
    rng = np.random.default_rng(5)
    size = (REPLICATIONS, n)
    full = rng.beta(3, 1, size=size)  # mean .75
    if law == "rare collapse":
        pruned = np.where(rng.random(size) < 0.05, 0.0, full)
    elif law == "small shift":
        pruned = 0.95 * full
    else:
        pruned = np.where(rng.random(size) < 0.95, rng.beta(3, 1, size=size), 0.0)
    rate = betting_certifies(full, pruned, tau=0.95).mean()
    print(f"\nfalse certificates of bounded scores, n={n}, {law}: {rate:.3f}")
    assert rate <= 0.065


def test_helpers_decide_as_the_public_function():
    rng = np.random.default_rng(6)
    full, pruned = outcomes(80, 12, rng, wins=0.03, losses=0.05, full_score=0.8)
    for rule in ({"tau": 0.9}, {"margin": 0.1}):
        for method, certifies in (("exact", exact_certifies), ("betting", betting_certifies)):
            public = [
                non_inferiority(f, p, method=method, **rule).certified
                for f, p in zip(full, pruned, strict=True)
            ]
            assert certifies(full, pruned, **rule).tolist() == public


def test_power_without_true_loss():
    rng = np.random.default_rng(7)
    lines = []
    for n in (60, 120, 180, 300):
        for discordance in (0.05, 0.1, 0.2):
            full, pruned = outcomes(
                n, 1000, rng, wins=discordance / 2, losses=discordance / 2, full_score=0.8
            )
            for tau in (0.95, 0.9):
                exact = exact_certifies(full, pruned, tau=tau).mean()
                betting = betting_certifies(full, pruned, tau=tau).mean()
                lines.append(
                    f"n={n} tau={tau} discordance={discordance}: exact {exact:.2f} betting {betting:.2f}"
                )
                assert exact >= betting - 0.04
    print("\n" + "\n".join(lines))


@pytest.mark.parametrize("rule", [{"tau": 0.95}, {"margin": 0.05}])
def test_power_statement_agrees_with_simulation(rule):
    plan = smallest_certifiable_loss(180, discordance=0.1, full_score=0.8, **rule)
    rng = np.random.default_rng(8)
    full, pruned = outcomes(180, REPLICATIONS, rng, wins=0.05, losses=0.05, full_score=0.8)
    assert exact_certifies(full, pruned, **rule).mean() == pytest.approx(plan.power_at_no_loss, abs=0.05)
    wins, losses = (0.1 - plan.loss) / 2, (0.1 + plan.loss) / 2
    full, pruned = outcomes(180, REPLICATIONS, rng, wins=wins, losses=losses, full_score=0.8)
    print(f"\n{rule}: largest certifiable loss {plan.loss:.3f}, allowance {plan.smallest_allowance:.3f}")
    assert exact_certifies(full, pruned, **rule).mean() == pytest.approx(0.8, abs=0.05)


def test_bounds_cover():
    rng = np.random.default_rng(9)
    full, pruned = outcomes(60, 100, rng, wins=0.03, losses=0.07, full_score=0.8)
    misses = {"ratio": 0, "difference": 0, "bets": 0}
    for f, p in zip(full, pruned, strict=True):
        misses["ratio"] += non_inferiority(f, p, tau=0.9).retained_lower_bound > 0.76 / 0.8
        misses["difference"] += non_inferiority(f, p, margin=0.1).lower_bound > 0.1 - 0.04
        misses["bets"] += non_inferiority(f, p, margin=0.1, method="betting").lower_bound > 0.1 - 0.04
    print("\nbounds above the truth, of 100:", misses)
    # 5 expected at the level; 11 or fewer has a chance of .996 there.
    assert max(misses.values()) <= 11


def test_fixed_sequence_keeps_the_family_wise_level():
    """Six nested cuts; from the third on the loss is at the boundary of the null or beyond."""
    rng, n, tau, full_score = np.random.default_rng(10), 120, 0.9, 0.8
    losses = [0.02, 0.05, 0.1, 0.1, 0.14, 0.2]
    false = 0
    for _ in range(REPLICATIONS):
        full = rng.random(n) < full_score
        fate = rng.random(n)  # nested: a query lost by a small cut is lost by the larger ones
        tests = []
        for loss in losses:
            pruned = full & (fate >= loss)
            certified = exact_certifies(full[None].astype(float), pruned[None].astype(float), tau=tau)[0]
            tests.append(lambda certified=certified: bool(certified))
        last = fixed_sequence(tests).last_passed
        false += last is not None and last >= 2
    print(f"\nfixed sequence: any false certificate {false / REPLICATIONS:.3f}")
    assert false / REPLICATIONS <= 0.065
