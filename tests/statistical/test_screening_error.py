"""What the screen accepts, by simulation on planted models. Run with -s to read the figures.

The models are logistic in 12 units with a few interactions, answer with noise, and are explained with three coalitions a
unit, as the pipeline does it.
"""

from dataclasses import replace

import numpy as np
import pytest

from proxyprompt._screening_noise import measure_noise
from proxyprompt.agreement import chance_agreement, held_out_agreement, top_mass
from proxyprompt.attribution import WeightedBanzhaf
from proxyprompt.fidelity import label_fidelity
from proxyprompt.prompt import Query
from proxyprompt.screening import plan_screen
from proxyprompt.sequential import betting_rule

N_UNITS, N_FIT, N_JUDGE, PAIRS, RUNS = 12, 50, 16, 60, 40
TAU = 0.8
EXPLAINER = WeightedBanzhaf()
CHANCE = chance_agreement(N_JUDGE)


class Planted:
    """Many queries at once: a level, weights that queries share in part, interactions, fresh noise in every answer."""

    def __init__(self, seed, *, level=0.0, weights=1.0, like=None, own=1.0, noise=0.5):
        rng = np.random.default_rng(seed)
        n = PAIRS * RUNS
        self.rng, self.level, self.noise = rng, level, noise
        self.common = rng.normal(size=N_UNITS)
        self.weights = weights * (self.common + 0.5 * rng.normal(size=(n, N_UNITS)))
        self.pairs = rng.integers(0, N_UNITS, (6, 2))
        self.curve = 0.3 * weights * rng.normal(size=(n, 6))
        if like is not None:
            self.weights = own * self.weights + (1 - own) * like.weights
            self.pairs, self.curve = like.pairs, (1 - own) * like.curve

    def __call__(self, rows):
        both = rows[:, self.pairs[:, 0]] & rows[:, self.pairs[:, 1]]
        values = (rows - 0.8) @ self.weights.T + (both - 0.64) @ self.curve.T + self.level
        return values + self.noise * self.rng.normal(size=values.shape)


def evidence(target, proxy, seed=0):
    """q_proxy and q_oracle per query, of attributions and of labels."""
    rng = np.random.default_rng(seed)
    design = EXPLAINER.design(N_UNITS, N_FIT, rng=rng)
    judge = EXPLAINER.held_out(N_UNITS, N_JUDGE, rng=rng, exclude=design.coalitions)
    on_target, on_proxy, held_out = target(design.coalitions), proxy(design.coalitions), target(judge)

    def attribution(values):
        return held_out_agreement(design, values, judge, held_out, explainer=EXPLAINER)

    def fidelity(values):
        p = 1 / (1 + np.exp(-values))
        probabilities = np.stack([1 - p, p], axis=2)
        return label_fidelity(
            design, probabilities, judge, (held_out > 0).astype(np.int64), explainer=EXPLAINER
        )

    fits = [EXPLAINER.fit(design, v).values for v in (on_proxy, on_target)]
    return {
        "attribution": (attribution(on_proxy), attribution(on_target)),
        "fidelity": (fidelity(on_proxy), fidelity(on_target)),
        "own noise": tuple(top_mass(a, fits[1], 3) for a in fits),
    }


def all_verdicts(found):
    return {k: verdicts(*q, CHANCE if k == "attribution" else 0.0) for k, q in found.items()}


def verdicts(q_proxy, q_oracle, chance=0.0):
    d = ((q_proxy - chance) - TAU * (q_oracle - chance)).reshape(RUNS, PAIRS)
    found = [betting_rule(row, tau=TAU, max_pairs=PAIRS, chance=chance).decision for row in d]
    return {name: found.count(name) / RUNS for name in ("accepted", "rejected")}


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_an_equal_proxy_is_accepted(noise):
    target = Planted(1, noise=noise)
    found = evidence(target, Planted(2, like=target, own=0.0, noise=noise))
    by_kind = all_verdicts(found)
    print("\nequal proxy:", {k: (np.round(np.mean(found[k], axis=1), 2), by_kind[k]) for k in found})
    if noise == 0.5:
        assert by_kind["attribution"]["accepted"] >= by_kind["fidelity"]["accepted"] >= 0.95
    else:
        # Noise of twice a weight: less can be seen. Fidelity accepts, as it accepts anything here (see below); and
        # judged by attributions that share the oracle's noise, a proxy that is right is rejected.
        assert by_kind["attribution"]["accepted"] >= 0.3
        assert by_kind["attribution"]["rejected"] == 0.0
        assert by_kind["own noise"]["rejected"] >= 0.9


def test_same_labels_for_other_reasons_are_accepted_by_fidelity_and_rejected_by_attributions():
    """Both models answer the same whatever is left out, and what moves them a little differs."""
    target, proxy = Planted(3, level=6.0), Planted(4, level=6.0)
    found = evidence(target, proxy)
    by_kind = all_verdicts(found)
    print("\nother reasons:", by_kind)
    assert by_kind["fidelity"]["accepted"] == 1.0
    assert by_kind["attribution"] == {"accepted": 0.0, "rejected": 1.0}


def test_nothing_is_accepted_when_the_target_does_not_agree_with_itself():
    """All noise: surrogates of it agree with new noise by chance alone, the target's own included."""
    target, proxy = Planted(5, weights=0.0), Planted(6)
    found = evidence(target, proxy)
    by_kind = all_verdicts(found)
    print("\nnoise:", by_kind, "agreement", [round(float(q.mean()), 3) for q in found["attribution"]])
    assert by_kind["attribution"]["accepted"] <= 0.05 < by_kind["fidelity"]["accepted"]
    assert found["attribution"][0].mean() == pytest.approx(CHANCE, abs=0.01)


@pytest.mark.parametrize("own", [0.35, 0.5])
def test_half_right_reasons_are_not_accepted(own):
    target = Planted(7)
    found = evidence(target, Planted(8, like=target, own=own))
    q_proxy, q_oracle = found["attribution"]
    ratio = (q_proxy.mean() - CHANCE) / (q_oracle.mean() - CHANCE)
    print(f"\nown={own}: ratio {ratio:.2f}", all_verdicts(found))
    assert ratio < TAU
    assert all_verdicts(found)["attribution"]["accepted"] <= 0.05


@pytest.mark.parametrize(("n", "tau"), [(40, 0.8), (100, 0.8), (100, 0.9)])
def test_the_power_line_keeps_its_word(n, tau):
    plan = plan_screen(n, tau=tau, max_pairs=n)
    rng = np.random.default_rng(9)
    d = np.clip(rng.normal(plan.detectable, 0.15, (300, n)), -tau, 1.0)
    found = np.mean([betting_rule(row, tau=tau, max_pairs=n).accepted for row in d])
    print(f"\nN={n}, tau={tau}: detectable {plan.detectable:.3f}, power {found:.2f}")
    assert 0.7 <= found <= 0.95


@pytest.mark.parametrize("noise", [0.7, 1.5])
def test_the_error_holds_for_a_noisy_target_and_the_floor_knows_its_noise(noise):
    """Half of the queries do not react to what is in the prompt; each call is answered with noise.

    The proxy has the target's reasons on a share of the queries and none of them on the others. At the share where the mean
    difference is 0, acceptance is an error.
    """
    rng = np.random.default_rng(11)
    runs = 150
    n = PAIRS * runs
    reacts = rng.random(n) < 0.5
    weights = np.resize([1.0, -1.0, 0.5, -0.5], N_UNITS) + 0.5 * rng.normal(size=(n, N_UNITS))
    design = EXPLAINER.design(N_UNITS, N_FIT, rng=rng)
    judge = EXPLAINER.held_out(N_UNITS, N_JUDGE, rng=rng, exclude=design.coalitions)

    def target(rows):
        values = reacts * ((rows - 0.8) @ weights.T)
        return values + noise * rng.normal(size=values.shape)

    held_out, fitted = target(judge), target(design.coalitions)
    same, other = ((design.coalitions - 0.8) @ w.T for w in (weights, rng.normal(size=(n, N_UNITS))))
    own, like, unlike = (
        held_out_agreement(design, v, judge, held_out, explainer=EXPLAINER) - CHANCE
        for v in (fitted, same, other)
    )
    like, unlike = ((d - TAU * own).reshape(runs, PAIRS) for d in (like, unlike))
    share = -unlike.mean() / (like.mean() - unlike.mean())

    def accepted(share, worth=1.0):
        d = np.where(rng.random(like.shape) < share, like, unlike) * worth
        return np.mean([betting_rule(r, tau=TAU, max_pairs=PAIRS, chance=CHANCE).accepted for r in d])

    found = accepted(share)
    # What the screen finds out of the noise, by the code that it uses.
    repeated = iter(rng.normal(size=(3, 1, 10)) * noise)
    floor = measure_noise(lambda q, rows, r: Said(next(repeated)), QUERIES, N_UNITS, 2)
    assert floor.spread == pytest.approx(noise, rel=0.45)
    distinct = replace(floor, spread=noise).distinct(held_out)
    draws = accepted(1.0, worth=distinct.reshape(runs, PAIRS))
    print(f"\nnoise {noise}: floor {floor.floor:.2f}; at mean 0 (share {share:.2f}) accepted {found:.3f};")
    print(
        f"a right proxy {accepted(1.0):.2f}, with noise as draws {draws:.2f}; dull left {distinct[~reacts].mean():.2f}"
    )
    assert found <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    assert distinct[~reacts].mean() < 0.1
    if noise == 0.7:
        assert distinct[reacts].mean() > 0.7
    else:
        # Why such pairs are not left out: what reacts is then among them, and a right proxy is found less often.
        assert accepted(1.0) > draws + 0.3


class Said:
    """Values of whole prompts."""

    probabilities = None

    def __init__(self, utility):
        self.utility = utility


QUERIES = [Query(f"q{i}", {"input": str(i)}, "a") for i in range(10)]
