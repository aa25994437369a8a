"""Estimates against what runs really ask: within the bounds, nothing twice, nothing sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxyprompt.backends.base import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult, Usage
from proxyprompt.data import Splits
from proxyprompt.errors import BackendError, DataError
from proxyprompt.estimate import Bounds, RunEstimate, estimate_run
from proxyprompt.ledger import Ledger
from proxyprompt.pipeline import optimize_prompt
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.settings import Settings
from proxyprompt.task import LabelTask, Task, TextTask

LABELS = ("left", "right")


def prompt(n: int, same: bool = False) -> FewShotPrompt:
    demos = [
        Demonstration(f"d{i}", {"input": "same" if same else f"demo {i};"}, LABELS[i % 2]) for i in range(n)
    ]
    return FewShotPrompt(tuple(demos), "Pick one.", "Q {input}\nA: {output}")


def splits(explain: int, select: int, sealed: int) -> Splits:
    sizes = {"explain": explain, "select": select, "sealed": sealed}
    return Splits(
        {
            name: [
                Query(f"{name}{i}", {"input": f"{name} {i} " + "word " * (i % 7)}, LABELS[i % 2])
                for i in range(n)
            ]
            for name, n in sizes.items()
        }
    )


class Server:
    """A model at a provider: four bytes and a half make a token; what helps and harms differs by seed."""

    def __init__(self, name: str, seed: int, noise: float = 0.4) -> None:
        self.name = name
        self.identity = {"provider": "p", "base_url": "https://example.org/v1", "model": name}
        self.effects = np.random.default_rng(seed).normal(0.1, 0.5, 64)
        self.noise, self.name_seed, self.calls = noise, sum(map(ord, name)), 0
        self.limit: float = inf

    def keep_within_limit(self, more: int) -> None:
        """Break down where the next calls would pass the limit."""
        if self.calls + more > self.limit:
            raise BackendError("the server went away")

    def margin(self, text: str) -> float:
        head, _, query = text.rpartition("\n\n")
        own = np.random.default_rng([self.name_seed, *query.encode()]).normal(0.5, self.noise)
        return float(own + sum(e for i, e in enumerate(self.effects) if f"demo {i};" in head))

    def usage(self, text: str) -> Usage:
        return Usage(round(len(text.encode()) / 4.5) + 3, 1)

    def score(self, requests: Sequence[ScoreRequest], *, on_send: Any = None, on_tokens: Any = None) -> Any:
        self.keep_within_limit(len(requests))
        on_send(range(len(requests)))
        answers = []
        for index, request in enumerate(requests):
            self.calls += 1
            text = str(request.prompt)
            # Even queries are "left"; the number stands after the split's name.
            truth = (
                int(text.rpartition("Q ")[2].split()[1].rstrip(";")) % 2
                if "same" not in text.rpartition("Q ")[2]
                else 0
            )
            values = [0.0, 0.0]
            values[truth] = self.margin(text)
            scale = np.logaddexp(*values)
            answers.append(
                (index, ScoreResult(tuple(float(v - scale) for v in values), (), self.usage(text)))
            )
        yield answers

    def generate(
        self, requests: Sequence[GenerateRequest], *, on_send: Any = None, on_tokens: Any = None
    ) -> Any:
        self.keep_within_limit(len(requests))
        on_send(range(len(requests)))
        answers = []
        for index, request in enumerate(requests):
            self.calls += 1
            text = str(request.prompt)
            truth = LABELS[int(text.rpartition("Q ")[2].split()[1]) % 2]
            said = truth if self.margin(text) > 0.4 else "unsure"
            answers.append((index, GenerateResult(said, replace(self.usage(text), completion_tokens=7))))
        yield answers


def check(
    estimate: RunEstimate, ledger: Ledger, before: dict[tuple[str, str, str], Any] | None = None
) -> None:
    """Every stage of the run is within its bounds, and no stage is missing from them."""
    seen = {(s.stage, s.role, s.model): s for s in estimate.stages}
    for (stage, role, model), now in spent(ledger, estimate.run).items():
        was = (before or {}).get((stage, role, model), (0, 0, 0, Decimal(0)))
        calls, prompt_tokens, completion, money = (a - b for a, b in zip(now, was, strict=True))
        if not calls:
            continue
        bounds = seen[stage, role, model]
        for name, value, b in (
            ("calls", calls, bounds.calls),
            ("prompt tokens", prompt_tokens, bounds.prompt_tokens),
            ("completion tokens", completion, bounds.completion_tokens),
            ("money", money, bounds.money),
        ):
            if b is not None:
                assert b.low <= value <= b.high, (stage, model, name, value, b)
                assert b.low <= b.expected <= b.high, (stage, model, name, b)
    for key, bounds in seen.items():
        if key not in spent(ledger, estimate.run):
            assert bounds.calls.low == 0, (key, bounds)


def spent(ledger: Ledger, run: str) -> dict[tuple[str, str, str], Any]:
    found = {}
    for stage in ("screen", "attribute", "verify", "clean", "compress", "certify"):
        for role in ("target", "proxy"):
            for model, t in ledger.totals(run=run, role=role, stage=stage).by_model.items():  # type: ignore[arg-type]
                found[stage, role, model] = (
                    t.done,
                    t.prompt_tokens,
                    t.completion_tokens,
                    t.money.get("USD", Decimal(0)),
                )
    return found


PRICED = {
    "price_input_per_million": 2.0,
    "price_output_per_million": 8.0,
    "price_cached_input_per_million": 0.2,
}
CASES: list[dict[str, Any]] = [
    {},
    {"n": 10, "proxies": 0},
    {"n": 10, "proxies": 2, "orders": 3},
    {"n": 4},  # every coalition is asked; nothing is screened
    {"n": 1, "proxies": 0},
    {"n": 12, "fit": 48, "explainer": "kernel_shap", "relabel": "off"},
    {"n": 10, "explainer": "leave_one_out", "clean": False},
    {"n": 10, "certificate_method": "betting", "tau": 0.7, "search_level": 0.0},
    {"n": 10, "max_demonstrations": 3, "clean_rounds": 1, "calibrate": False},
    {"n": 8, "noise": 3.0, "screening_method": "paper", "max_pairs": 12},
    {"n": 9, "same": True, "proxies": 0},
    {"n": 8, "text": True},
    {"n": 8, "explain": 14, "attribution_error": 0.01},  # not screened; as many coalitions as there are
    {"n": 8, "noise": 3.0, "attribution_calls": 300},
    {"n": 8, "noise": 3.0, "attribution_money": 0.02, "attribution_error": 0.02},
    {"n": 8, "proxies": 2, "explain": 10},  # too few queries to screen any proxy
    {"n": 8, "proxies": 2, "explain": 10, "budget_tokens": 10**6},  # nor is the target asked what would fit
    {"n": 8, "proxies": 0, "budget_usd": 100.0},
    {"n": 10, "verify": "harmful", "screening_method": "off"},
    {"n": 10, "verify": "all", "proxies": 2},  # screened too
    {"n": 9, "verify": "top", "screening_method": "off", "explainer": "leave_one_out", "verify_calls": 150},
    {"n": 8, "verify": "harmful", "screening_method": "off", "text": True, "explainer": "kernel_shap"},
    {"n": 8, "proxies": 3, "explain": 20, "screening_repeats": 0},  # to screen all of them
    {"n": 8, "explain": 12, "screening_tau": 0.5, "screening_repeats": 3},
]


@pytest.mark.parametrize(
    ("case", "seed"),
    [(case, seed) for seed in (0, 1) for case in (CASES if seed == 0 else CASES[2:3])],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "default" if isinstance(c, dict) else str(c),
)
def test_what_a_run_asks_lies_within_the_bounds_and_what_is_recorded_is_subtracted(
    tmp_path: Path, case: dict[str, Any], seed: int
) -> None:
    given = dict(case)
    n, n_proxies, noise = given.pop("n", 8), given.pop("proxies", 1), given.pop("noise", 0.4)
    few_shot, parts = prompt(n, given.pop("same", False)), splits(given.pop("explain", 24), 20, 30)
    task: Task = TextTask(max_tokens=16) if given.pop("text", False) else LabelTask(LABELS)
    settings = Settings(
        seed=seed,
        fit_coalitions=given.pop("fit", None if n < 6 else 24),
        judge_coalitions=8,
        **PRICED,
        **given,
    )
    target = Server("target", seed, noise)
    proxies = [Server(f"proxy{i}", seed + i, noise) for i in range(n_proxies)]
    common: dict[str, Any] = {"target": target, "proxies": proxies, "settings": settings}
    first = estimate_run(few_shot, task, parts, **common)
    assert target.calls == sum(p.calls for p in proxies) == 0
    with Ledger(tmp_path / "l.db") as ledger:
        assert estimate_run(few_shot, task, parts, **common, ledger=ledger) == first
        # Stopped in the middle, estimated anew, and finished.
        target.limit, stopped = max(1, first.calls().expected // 3), False
        try:
            optimize_prompt(few_shot, task, parts, **common, ledger=ledger)
        except BackendError:
            stopped = True
        target.limit = inf
        before = spent(ledger, first.run)
        rest = estimate_run(few_shot, task, parts, **common, ledger=ledger)
        optimize_prompt(few_shot, task, parts, **common, ledger=ledger)
        check(first, ledger)
        check(rest, ledger, before)
        assert rest.calls().high < first.calls().high or not before
        assert stopped or first.calls().expected <= 3 * ledger.totals(role="target").done * 3
        totals = ledger.totals(role="target")
        assert first.calls().low <= totals.done <= first.calls().high
        # The bounds say something: they are not the whole line.
        assert first.calls().high <= 60 * totals.done
        after = estimate_run(few_shot, task, parts, **common, ledger=ledger)
        asked = target.calls
        optimize_prompt(few_shot, task, parts, **common, ledger=ledger)
        assert target.calls == asked
        assert after.calls().low == 0


def test_prices_and_budgets_are_compared(tmp_path: Path) -> None:
    few_shot, parts, task = prompt(8), splits(24, 20, 30), LabelTask(LABELS)
    target = Server("target", 0)

    def notes(**more: Any) -> str:
        return "\n".join(estimate_run(few_shot, task, parts, target=target, settings=Settings(**more)).notes)

    bounds = estimate_run(few_shot, task, parts, target=target, settings=Settings(**PRICED))
    money, calls = bounds.money()["USD"], bounds.calls()
    assert 0 < money.low < money.expected < money.high
    assert "target has no price" in notes()
    assert "the run is refused" not in notes()
    assert "max_usd is set, and target has no price: the run is refused" in notes(budget_usd=1.0)
    assert f"max_calls = {calls.high}: the run stays within it" in notes(budget_calls=calls.high)
    assert "too little; 0 is spent" in notes(budget_calls=1)
    assert "more is expected; screen and explanation are cut" in notes(budget_calls=calls.expected - 1)
    assert "expected to do, but the upper bound" in notes(budget_calls=calls.expected + 1)
    assert "max_usd (USD) = 1000.0: the run stays within it" in notes(**PRICED, budget_usd=1000.0)
    euros = {**PRICED, "price_currency": "EUR", "budget_cost": 0.0001}
    assert "max_cost (EUR) = 0.0001: too little" in notes(**euros)
    plain = json.loads(json.dumps(bounds.to_dict(), allow_nan=False))
    assert plain["calls"]["target"] == {"low": calls.low, "expected": calls.expected, "high": calls.high}


def test_local_models_are_free_and_the_ledger_s_counts_are_used(tmp_path: Path) -> None:
    few_shot, parts, task = prompt(8), splits(24, 20, 30), LabelTask(LABELS)
    target = Server("target", 0)
    settings = Settings(fit_coalitions=24, **PRICED)
    before = estimate_run(few_shot, task, parts, target=target, settings=settings)
    assert before.counting == {"target": "an estimate from bytes"}
    with Ledger(tmp_path / "l.db") as ledger:
        within = Settings(**{**settings.to_dict(), "budget_calls": 900})
        optimize_prompt(few_shot, task, parts, target=target, settings=within, ledger=ledger)
        more = splits(24, 20, 31)
        after = estimate_run(few_shot, task, more, target=target, settings=settings, ledger=ledger)
    assert after.counting == {"target": "what it reported for prompts in the ledger"}
    tokens = {s.stage: s.prompt_tokens for s in after.stages}
    wide = {s.stage: s.prompt_tokens for s in before.stages}
    assert tokens["certify"].high < wide["certify"].high / 2
    target.identity = {"provider": "local", "model": "target"}
    free = estimate_run(few_shot, task, parts, target=target, settings=settings)
    assert free.money() == {"USD": Bounds(*[Decimal(0)] * 3)}


def test_an_estimate_refuses_what_the_run_would_refuse() -> None:
    bad = replace(prompt(3).demonstrations[0], output="up")
    with pytest.raises(DataError, match="up"):
        estimate_run(
            FewShotPrompt((bad,), "", "{input} {output}"),
            LabelTask(LABELS),
            splits(4, 4, 4),
            target=Server("t", 0),
        )
