"""The proxies propose, the target measures: whole queries through meters, all in step. Scripted models, real ledger."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxyprompt.attribution import LeaveOneOut
from proxyprompt.backends.base import GenerateRequest, ScoreRequest
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.errors import InputError
from proxyprompt.ledger import Ledger
from proxyprompt.metering import Meter
from proxyprompt.prompt import FewShotPrompt, Query
from proxyprompt.task import LabelTask, TextTask
from proxyprompt.units import QueryWords
from proxyprompt.verifying import VerifiedQueries, verify_queries

TASK = LabelTask(("bad", "good"))
WORDS = [f"w{i}" for i in range(9)]


def text_of(request: ScoreRequest | GenerateRequest) -> list[str]:
    return str(request.prompt).rpartition("Text: ")[2].removesuffix("\nMood:").split()


def weight(query: str, word: str, seed: int, noise: float) -> float:
    """What a word does to a query: heavy-tailed, the same for all models but for a model's own noise."""
    own = np.random.default_rng([int(query[1:]), int(word[1:])])
    shared = float(own.standard_t(2)) / 8
    return shared + noise * float(np.random.default_rng([seed, int(query[1:]), int(word[1:])]).normal())


class Model:
    """Log-odds are a sum over the words; the first word names the query and is always there."""

    def __init__(
        self, seed: int, noise: float = 0.02, *, flips: frozenset[str] = frozenset(), jitter: float = 0.0
    ) -> None:
        self.seed, self.noise, self.flips, self.jitter = seed, noise, flips, jitter
        self.rng, self.asked = np.random.default_rng(seed), Counter[str]()
        self.backend = ScriptedBackend(self.score, name=f"model{seed}")

    def score(self, request: ScoreRequest) -> list[float]:
        query, *words = text_of(request)
        self.asked[query] += 1
        x = (-3.0 if query in self.flips else 1.0) + sum(
            weight(query, w, self.seed, self.noise) for w in words
        )
        x += self.jitter * float(self.rng.normal())
        return [-math.log1p(math.exp(x)), -math.log1p(math.exp(-x))]

    def meter(self, ledger: Ledger | None = None, role: Any = "target") -> Meter:
        return Meter(self.backend, ledger, role=role, run="r")


def queries(n: int) -> list[QueryWords]:
    prompt = FewShotPrompt((), "Rate it.", "Text: {name} {input}\nMood: {output}")
    text = " ".join(WORDS)
    return [
        QueryWords(prompt, Query(f"q{i}", {"name": f"q{i}", "input": text}, "good"), field="input")
        for i in range(n)
    ]


def go(n: int, target: Model, *proxies: Model, **more: Any) -> VerifiedQueries:
    settings = {"explainer": LeaveOneOut(), "budget": 11, "rng": np.random.default_rng(1)} | more
    meters = [p.meter(role="proxy") for p in proxies]
    return verify_queries(queries(n), TASK, target.meter(), meters, **settings)


def effects(model: Model, i: int) -> np.ndarray:
    """What leaving each word out takes from the probability of the predicted label, computed by hand."""
    w = np.array([weight(f"q{i}", word, model.seed, model.noise) for word in WORDS])
    x = 1.0 + w.sum()
    p = 1 / (1 + np.exp(-np.append(x, x - w)))
    return (p[0] - p[1:]) * (1 if p[0] > 0.5 else -1)


def right(found: VerifiedQueries, model: Model, *, taught: bool) -> float:
    """Share of queries, taught or not, for which the word with the largest effect is named."""
    hits = [
        q.best is q.units[int(np.abs(effects(model, i)).argmax())]
        for i, q in enumerate(found.queries)
        if q.taught == taught
    ]
    return float(np.mean(hits))


def test_the_two_strongest_words_are_measured_and_nothing_else_is_asked() -> None:
    target = Model(1)
    found = go(20, target, Model(2), repeats=0)
    same = [q for q in found.queries if q.agree]
    assert len(same) >= 15
    for q in same:
        assert int(np.isfinite(q.result.measured).sum()) == 2
        assert target.asked[q.query.id] == q.result.target_calls == 3
        stored = json.loads(json.dumps(q.to_dict(), allow_nan=False))
        assert sum(v is not None for v in stored["measured"]) == 2
        assert len(stored["estimated"]) == 9
    assert found.target_calls == sum(target.asked.values())
    assert right(found, target, taught=False) >= 0.8


def test_measured_effects_are_the_target_s_own() -> None:
    target = Model(1)
    (q,) = go(1, target, Model(2), repeats=0, top=9).queries
    np.testing.assert_allclose(q.result.measured, effects(target, 0), atol=1e-9)


def test_a_rule_learnt_on_some_queries_saves_calls_on_the_others() -> None:
    target = Model(1)
    found = go(120, target, Model(2), Model(3), learn=60, on_disagreement="follow", repeats=0)
    assert found.rule is not None
    assert np.isfinite(found.rule.ratio)
    assert found.rule.n_calibration == sum(q.taught for q in found.queries) == 60
    assert all(q.result.outcome == "measured_all" for q in found.queries if q.taught)
    assert right(found, target, taught=True) == 1.0
    assert right(found, target, taught=False) >= 0.85
    assert np.mean([q.result.oracle_share for q in found.queries if not q.taught]) < 0.6
    assert found.oracle_share == pytest.approx(sum(target.asked.values()) / (120 * 10))


@pytest.mark.parametrize(("how", "calls"), [("measure_all", 10), ("abstain", 1), ("follow", 3)])
def test_where_they_disagree_everything_is_measured_or_nothing_is_said(how: str, calls: int) -> None:
    flips = frozenset({"q0", "q3"})
    target = Model(1)
    found = go(5, target, Model(2, flips=flips), on_disagreement=how, repeats=0)
    assert {q.query.id for q in found.queries if not q.agree} >= flips
    assert target.asked["q0"] == calls


def test_noise_of_repeated_baselines_makes_small_effects_ties() -> None:
    quiet = go(10, Model(1), Model(2), repeats=2)
    assert quiet.floor == pytest.approx(0.0, abs=1e-12)
    loud = go(10, Model(1, jitter=3.0), Model(2), repeats=2)
    assert loud.floor > 0.5
    assert any(q.best is None and q.result.outcome == "below_floor" for q in loud.queries)
    assert loud.target_calls == sum(q.result.target_calls for q in loud.queries) + 20


def test_a_second_run_buys_nothing(tmp_path: Path) -> None:
    target, proxy = Model(1), Model(2)
    with Ledger(tmp_path / "ledger.db") as ledger:
        counts = []
        for _ in range(2):
            verify_queries(
                queries(6),
                TASK,
                target.meter(ledger),
                [proxy.meter(ledger, "proxy")],
                explainer=LeaveOneOut(),
                budget=11,
                rng=np.random.default_rng(0),
                learn=2,
            )
            counts.append((sum(target.asked.values()), sum(proxy.asked.values())))
    assert counts[0] == counts[1]
    assert max(target.asked.values()) == 11


def test_generated_texts_are_judged_by_their_likeness_to_the_whole_query_s() -> None:
    def write(request: GenerateRequest) -> str:
        return "left right" if "w3" in text_of(request) else "neither"

    target, proxy = (
        Meter(ScriptedBackend(generate=write, name=name), None, role=name, run="r")  # type: ignore[arg-type]
        for name in ("target", "proxy")
    )
    found = verify_queries(
        queries(2),
        TextTask(metric="token_f1"),
        target,
        [proxy],
        explainer=LeaveOneOut(),
        budget=11,
        rng=np.random.default_rng(0),
    )
    for q in found.queries:
        assert q.predicted is None
        assert q.best is q.units[3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"proxies": []}, "proxies: none given"),
        ({"units": []}, "units: none given"),
        ({"learn": 3}, "from 0 to the 2 queries"),
        ({"repeats": -1}, "0 or more"),
    ],
)
def test_refusals(more: dict[str, Any], message: str) -> None:
    model = Model(1)
    given: dict[str, Any] = {"units": queries(2), "proxies": [model.meter()], "learn": 0, "repeats": 0} | more
    units, proxies = given.pop("units"), given.pop("proxies")
    with pytest.raises(InputError, match=message):
        verify_queries(
            units,
            TASK,
            model.meter(),
            proxies,
            explainer=LeaveOneOut(),
            budget=11,
            rng=np.random.default_rng(0),
            **given,
        )
