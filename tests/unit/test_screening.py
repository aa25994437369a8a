"""Screening: decisions, shared buffer, rejection sampling, refusals. Planted models, no network."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from proxyprompt.attribution import KernelSHAP
from proxyprompt.coalitions import uniform_coalitions
from proxyprompt.errors import InputError
from proxyprompt.prompt import Query
from proxyprompt.screening import plan_screen, screen
from proxyprompt.sequential import earliest_acceptance
from proxyprompt.value_function import Values

N = 6
QUERIES = [Query(f"q{i}", {"input": str(i)}, "a") for i in range(60)]


class Planted:
    """A two-label model, linear in the coalition with per-query noise; counts what it is asked."""

    def __init__(
        self,
        weights: Sequence[float],
        *,
        seed: int,
        noise: float = 0.3,
        disagree: frozenset[str] = frozenset(),
        level: float = 0.0,
        shaky: float = 0.0,
        dull: frozenset[str] = frozenset(),
    ) -> None:
        self.shaky, self.dull = np.random.default_rng(seed), dull
        self.shake = shaky
        self.weights = np.array(weights)
        self.seed, self.noise, self.disagree, self.level = seed, noise, disagree, level
        self.asked: list[tuple[str, bytes]] = []

    def __call__(self, queries: Sequence[Query], rows: NDArray[np.bool_]) -> Values:
        margin = np.empty((len(rows), len(queries)))
        for j, query in enumerate(queries):
            rng = np.random.default_rng([self.seed, int(query.inputs["input"])])
            w = self.weights + self.noise * rng.normal(size=N)
            margin[:, j] = (rows - 0.5) @ w * (query.id not in self.dull) + self.level
            margin[rows.all(axis=1), j] = -5.0 if query.id in self.disagree else 5.0
            self.asked += [(query.id, row.tobytes()) for row in rows]
        margin += self.shake * self.shaky.normal(size=margin.shape)
        p = 1 / (1 + np.exp(-margin))
        probabilities = np.stack([1 - p, p], axis=2)
        return Values(
            coalitions=rows,
            utility=np.log(p),
            performance=(p > 0.5).astype(float),
            predictions=(p > 0.5).astype(np.int64),
            probabilities=probabilities,
            prompt_tokens=np.ones(p.shape, dtype=np.int64),
            scale="log-probability",
        )


def go(target: Planted, proxies: dict[str, Planted], n: int = 60, **options: object):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(5)
    explainer = KernelSHAP()
    design = explainer.design(N, 32, rng=rng)
    judges = uniform_coalitions(N, 16, rng=rng, exclude=design.coalitions)
    return screen(
        target,
        proxies,
        QUERIES[:n],
        explainer=explainer,
        design=design,
        judge_coalitions=judges,
        rng=np.random.default_rng(1),
        **options,  # type: ignore[arg-type]
    )


GOOD = [2.0, -2.0, 1.5, -1.5, 1.0, -1.0]


def test_a_proxy_with_the_same_reasons_is_accepted_and_an_inverted_one_rejected() -> None:
    target = Planted(GOOD, seed=1)
    result = go(target, {"same": Planted(GOOD, seed=2), "inverted": Planted([-w for w in GOOD], seed=3)})
    same, inverted = result.proxies
    assert same.decision == "accepted"
    assert inverted.decision == "rejected"
    assert result.accepted == ("same",)
    assert (same.rank_correlation or 0) > 0.9
    assert (inverted.rank_correlation or 0) < -0.9
    assert np.mean(same.q_oracle) > 0.8


def test_no_target_call_is_made_twice_for_several_proxies() -> None:
    target = Planted(GOOD, seed=1)
    go(target, {f"p{k}": Planted(GOOD, seed=2 + k) for k in range(3)})
    # The full prompt is asked once to compare predictions and once inside the design; the ledger answers the second.
    full = np.ones(N, dtype=bool).tobytes()
    without_full = [a for a in target.asked if a[1] != full]
    assert len(without_full) == len(set(without_full))


def test_a_proxy_is_not_asked_for_what_judges_it() -> None:
    target, proxy = Planted(GOOD, seed=1), Planted(GOOD, seed=2)
    result = go(target, {"p": proxy})
    held_out = {row.tobytes() for row in result.judge_coalitions}
    assert held_out <= {row for _, row in target.asked}
    assert not held_out & {row for _, row in proxy.asked}


def test_queries_on_which_the_models_disagree_are_rejected_and_not_bought() -> None:
    disagree = frozenset(f"q{i}" for i in range(0, 60, 2))
    target = Planted(GOOD, seed=1)
    asked = Planted(GOOD, seed=2, disagree=disagree)
    result = go(target, {"p": asked})
    (proxy,) = result.proxies
    assert not set(proxy.query_ids) & disagree
    assert not set(result.queries_bought) & disagree
    full = np.ones(N, dtype=bool).tobytes()
    for model in (target, asked):
        assert not {name for name, row in model.asked if row != full} & disagree
    assert 0.3 < proxy.agreement_rate < 0.7


def test_it_stops_buying_once_everything_is_decided() -> None:
    target = Planted(GOOD, seed=1)
    result = go(target, {"p": Planted([-w for w in GOOD], seed=2)}, block=5)
    assert len(result.queries_bought) < len(QUERIES)


def test_undecided_is_not_accepted() -> None:
    result = go(Planted(GOOD, seed=1), {"p": Planted(GOOD, seed=2)}, tau=0.97, max_pairs=60, delta=0.3)
    (proxy,) = result.proxies
    assert proxy.decision != "accepted"
    assert result.accepted == ()


def test_paper_method_is_algorithm_1_and_carries_its_warning() -> None:
    result = go(Planted(GOOD, seed=1), {"p": Planted(GOOD, seed=2)}, method="paper", delta=0.01, max_pairs=50)
    (proxy,) = result.proxies
    assert proxy.rule.method == "paired_t"
    assert "12 %" in proxy.rule.note
    assert proxy.other_rule is not None
    assert proxy.other_rule.method == "betting"


def test_delta_is_shared_among_candidates() -> None:
    one = go(Planted(GOOD, seed=1), {"p": Planted(GOOD, seed=2)})
    two = go(Planted(GOOD, seed=1), {"p": Planted(GOOD, seed=2), "r": Planted(GOOD, seed=3)})
    assert one.proxies[0].rule.settings["delta"] == pytest.approx(0.05)
    assert two.proxies[0].rule.settings["delta"] == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.9, "delta": 0.01, "max_pairs": 30}, "not even a perfect proxy"),
        ({"method": "t"}, "method"),
        ({"tau": 0.0}, "tau"),
        ({"delta": 1.0}, "delta"),
        ({"block": 0}, "block"),
        ({"on": "labels"}, "on: got"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_asked(
    options: dict[str, object], message: str
) -> None:
    target = Planted(GOOD, seed=1)
    with pytest.raises(InputError, match=message):
        go(target, {"p": Planted(GOOD, seed=2)}, **options)
    assert target.asked == []


def test_both_kinds_of_evidence_are_there_whichever_decides() -> None:
    target, proxies = Planted(GOOD, seed=1), {"p": Planted(GOOD, seed=2)}
    by_reasons, by_labels = go(target, proxies), go(target, proxies, on="fidelity")
    assert (by_reasons.on, by_labels.on) == ("attribution", "fidelity")
    (reasons,), (labels,) = by_reasons.proxies, by_labels.proxies
    assert reasons.evidence.keys() == labels.evidence.keys() == {"attribution", "fidelity"}
    assert reasons.decided_by.on == labels.beside.on == "attribution"
    assert reasons.decided_by.chance > 0.0 == labels.decided_by.chance
    n = min(len(reasons.query_ids), len(labels.query_ids))
    assert reasons.beside.q_proxy[:n] == labels.q_proxy[:n]
    assert reasons.beside.rule is not None
    assert reasons.rule.settings["chance"] == by_reasons.plan.chance
    assert json.dumps(by_reasons.to_dict(), allow_nan=False)


def test_same_labels_for_other_reasons_are_rejected() -> None:
    """Two models that answer "a" whatever is left out, and are moved a little by different units."""
    target = Planted([0.2 * w for w in GOOD], seed=1, noise=0.02, level=5.0)
    proxy = Planted([0.2 * w for w in reversed(GOOD)], seed=2, noise=0.02, level=5.0)
    (by_labels,) = go(target, {"p": proxy}, on="fidelity").proxies
    (by_reasons,) = go(target, {"p": proxy}).proxies
    assert by_labels.decision == "accepted"
    assert by_reasons.decision == "rejected"
    assert np.mean(by_reasons.beside.q_proxy) == np.mean(by_reasons.beside.q_oracle) == 1.0


def test_the_ensemble_is_one_more_candidate_and_asks_nothing_new() -> None:
    target = Planted(GOOD, seed=1)
    proxies = {name: Planted(GOOD, seed=k, noise=2.0) for k, name in enumerate("abc", start=2)}
    alone = go(target, proxies, max_pairs=30)
    asked = {k: len(p.asked) for k, p in proxies.items()}
    result = go(target, proxies, ensemble=True, max_pairs=30)
    both = result["a + b + c"]
    assert [p.name for p in result.proxies] == ["a", "b", "c", "a + b + c"]
    assert both.members == ("a", "b", "c")
    assert result.plan.level == pytest.approx(0.05 / 4)
    assert alone.plan.level == pytest.approx(0.05 / 3)
    scores = {p.name: np.mean(p.evidence["attribution"].q_proxy) for p in result.proxies}
    assert scores["a + b + c"] > max(v for k, v in scores.items() if k != "a + b + c") + 0.05
    for k, p in proxies.items():
        new = p.asked[asked[k] :]
        full = np.ones(N, dtype=bool).tobytes()
        rest = [a for a in new if a[1] != full]
        assert len(rest) == len(set(rest))
    with pytest.raises(InputError, match="ensemble=True with 1 proxy"):
        go(target, {"a": proxies["a"]}, ensemble=True)


def test_the_bill_counts_what_the_target_was_asked() -> None:
    target, proxy = (
        Planted(GOOD, seed=1),
        Planted(GOOD, seed=2, disagree=frozenset(f"q{i}" for i in range(30))),
    )
    result = go(target, {"p": proxy})
    assert result.proxies[0].n_agree < result.proxies[0].n_seen
    # The full prompt is in the design too; the ledger answers it the second time.
    assert result.target_pairs == len(set(target.asked))


def test_the_paper_compares_fidelities_only() -> None:
    with pytest.raises(InputError, match="compares fidelities"):
        go(Planted(GOOD, seed=1), {"p": Planted(GOOD, seed=2)}, method="paper", on="attribution")
    result = go(Planted(GOOD, seed=1), {"p": Planted(GOOD, seed=2)}, method="paper")
    assert result.on == "fidelity"
    assert result.plan.earliest == 2


def test_the_plan_says_what_can_be_found_before_anything_is_asked() -> None:
    plan = plan_screen(40, 2)
    assert plan.level == 0.025
    assert plan.max_pairs == 40
    assert plan.earliest == earliest_acceptance(tau=0.8, delta=0.025, max_pairs=40, chance=plan.chance)
    assert f"after {plan.earliest}" in plan.text
    assert plan_screen(40, 2, on="fidelity").earliest <= plan.earliest
    assert plan_screen(400).detectable < plan_screen(40).detectable


class Repeated:
    """What the screen is handed to ask a target again; remembers what for."""

    def __init__(self, target: Planted) -> None:
        self.target = target
        self.asked: list[tuple[str, int]] = []

    def __call__(self, queries: Sequence[Query], rows: NDArray[np.bool_], repeat: int) -> Values:
        assert rows.all()
        self.asked += [(q.id, repeat) for q in queries]
        return self.target(queries, rows)


def test_the_target_s_noise_is_measured_on_the_last_queries_and_shown() -> None:
    target = Planted(GOOD, seed=1, shaky=0.5, level=1.0)
    again = Repeated(target)
    result = go(target, {"p": Planted(GOOD, seed=2)}, again=again, repeats=2)
    noise = result.noise
    assert noise is not None
    order = [QUERIES[int(i)].id for i in np.random.default_rng(1).permutation(60)]
    assert noise.query_ids == tuple(order[::-1][:10])
    assert again.asked == [(q, r) for r in range(3) for q in noise.query_ids]
    assert (noise.repeats, noise.freedom, noise.flips) == (2, 20, 0.0)
    # The full prompt is at a margin of 5, where the log-probability moves by 1 / (1 + e^5) of what the margin does.
    assert noise.spread == pytest.approx(0.5 / (1 + np.exp(5)), rel=0.5)
    assert noise.floor == pytest.approx(2 * np.sqrt(2) * noise.spread)
    assert "2 more times for the same 10 whole prompts" in noise.text
    assert json.dumps(result.to_dict(), allow_nan=False)
    (proxy,) = result.proxies
    assert 0.9 < (proxy.own_rank_correlation or 0) <= 1
    assert 0.9 < (proxy.own_top_mass or 0) <= 1
    # What it cost: the repeats, and the whole prompts of the repeated queries that the screen did not reach.
    seen = set(order[: proxy.n_seen]) | set(noise.query_ids)
    full = len(result.queries_bought) * (len(result.judge_coalitions) + result.design.n_coalitions - 1)
    assert result.target_pairs == 2 * 10 + len(seen) + full


def test_queries_that_are_all_noise_are_counted_and_stay_pairs() -> None:
    dull = frozenset(f"q{i}" for i in range(0, 60, 2))
    target = Planted(GOOD, seed=1, shaky=0.4, dull=dull, level=5.0)
    proxies = {"p": Planted(GOOD, seed=2, dull=dull, level=5.0)}
    (found,) = go(target, proxies, again=Repeated(target), repeats=2).proxies
    n_dull = len(set(found.query_ids) & dull)
    assert n_dull > 10
    assert 0.7 * n_dull <= found.n_tied <= 1.1 * n_dull
    assert len(found.query_ids) == found.n_agree
    # Half of the queries can be predicted, the others not at all.
    assert found.ceiling == pytest.approx(0.5, abs=0.15)
    assert np.mean(found.q_oracle) < found.ceiling + found.decided_by.chance


def test_a_target_without_noise_loses_no_pair() -> None:
    target, proxies = Planted(GOOD, seed=1), {"p": Planted(GOOD, seed=2)}
    plain, found = go(target, proxies), go(target, proxies, again=Repeated(target), repeats=1)
    assert found.noise is not None
    assert (found.noise.spread, found.noise.floor, found.proxies[0].n_tied) == (0.0, 0.0, 0)
    assert found.proxies[0].rule == plain.proxies[0].rule
    assert found.proxies[0].own_rank_correlation == found.proxies[0].ceiling == pytest.approx(1.0)
    assert "answered the same" in found.noise.text
    with pytest.raises(InputError, match="repeats: got 1"):
        go(target, proxies, repeats=1)


def test_with_too_few_queries_all_stay_undecided_and_nothing_is_asked() -> None:
    target, proxy = Planted(GOOD, seed=1), Planted(GOOD, seed=2)
    result = go(target, {"p": proxy}, n=10)
    assert target.asked == proxy.asked == []
    (undecided,) = result.proxies
    assert (undecided.decision, undecided.rule.n_used, undecided.n_seen) == ("undecided", 0, 0)
    assert (result.plan.n_screened, result.plan.earliest, result.accepted) == (0, None, ())
    assert "too few queries" in undecided.rule.note
    assert "with 10 queries to explain not even a perfect one" in result.plan.text
    assert json.dumps(result.to_dict(), allow_nan=False)
    # What it says is needed is what is needed.
    needed = int(result.plan.text.split("that takes ")[1].split()[0])
    assert plan_screen(needed, n_judge=16).n_screened == 1
    assert plan_screen(needed - 1, n_judge=16).n_screened == 0


def test_few_queries_screen_the_first_candidates_only() -> None:
    target = Planted(GOOD, seed=1)
    proxies = {name: Planted(GOOD, seed=k) for k, name in enumerate("abc", start=2)}
    result = go(target, proxies, n=20, ensemble=True)
    n = result.plan.n_screened
    assert 1 <= n < 4
    assert result.plan.level == pytest.approx(0.05 / n)
    assert f"first {n} of 4 candidates" in result.plan.text
    assert [p.n_seen > 0 for p in result.proxies] == [k < n for k in range(4)]
    assert all(bool(proxies[name].asked) == (k < n) for k, name in enumerate("abc"))


def test_no_proxy_is_an_error() -> None:
    with pytest.raises(InputError, match="proxies: none"):
        go(Planted(GOOD, seed=1), {})
