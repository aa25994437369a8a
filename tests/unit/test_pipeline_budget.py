"""The last fall-back within a budget: fewer queries, then fewer coalitions, else a refusal before anything is paid for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxyprompt.backends.base import ScoreRequest, ScoreResult, Usage
from proxyprompt.data import Splits
from proxyprompt.errors import BudgetExceededError
from proxyprompt.ledger import Ledger
from proxyprompt.pipeline import Result, optimize_prompt
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.report import render_html
from proxyprompt.settings import Settings
from proxyprompt.summary import build_artifact
from proxyprompt.task import LabelTask

LABELS = ("left", "right")
N = 10
PRICED = {"price_input_per_million": 2.0, "price_output_per_million": 8.0}


class Server:
    """A billed model: three demonstrations help, two harm; the sign turns reasons around."""

    deterministic = True

    def __init__(self, name: str, sign: float = 1.0) -> None:
        self.name, self.sign, self.calls = name, sign, 0
        self.identity = {"provider": "p", "base_url": "https://example.org/v1", "model": name}

    def score(
        self, requests: Sequence[ScoreRequest], *, on_send: Any = None, on_tokens: Any = None
    ) -> Iterator[list[tuple[int, ScoreResult]]]:
        for start in range(0, len(requests), 40):
            part = range(start, min(start + 40, len(requests)))
            on_send(part)
            self.calls += len(part)
            yield [(index, self.answer(str(requests[index].prompt))) for index in part]

    def answer(self, text: str) -> ScoreResult:
        head, _, query = text.rpartition("\n\n")
        truth = int(re.findall(r"\d+", query)[0]) % 2
        own = np.random.default_rng([len(self.name), *query.encode()]).normal(0.8, 0.5)
        effects = {0: 0.5, 1: 0.5, 5: 0.5, 3: -0.9, 8: -0.9}
        margin = own + sum(self.sign * e for i, e in effects.items() if f"demo {i};" in head)
        values = -math.log1p(math.exp(-margin)), -math.log1p(math.exp(margin))
        return ScoreResult(values if truth == 0 else values[::-1], (), Usage(len(text) // 4, 1))


def run(folder: Path, target: Server, *proxies: Server, **settings: Any) -> Result:
    demos = [Demonstration(f"d{i}", {"input": f"demo {i};"}, LABELS[i % 2]) for i in range(N)]
    sizes = {"explain": 40, "select": 20, "sealed": 30}
    return optimize_prompt(
        FewShotPrompt(tuple(demos), "Pick.", "Q {input}\nA: {output}"),
        LabelTask(LABELS),
        Splits(
            {
                s: [Query(f"{s}{i}", {"input": f"{s} {i}"}, LABELS[i % 2]) for i in range(n)]
                for s, n in sizes.items()
            }
        ),
        target=target,
        proxies=proxies,
        settings=Settings(fit_coalitions=64, proxy_coalitions=96, **{**PRICED, **settings}),
        ledger=folder / "ledger.db",
    )


@pytest.mark.parametrize("proxies", [0, 1])
@pytest.mark.parametrize(
    "budget", [{"budget_calls": 2200}, {"budget_calls": 900}, {"budget_tokens": 60_000}, {"budget_usd": 0.11}]
)
def test_the_target_explains_itself_as_far_as_the_budget_goes(
    tmp_path: Path, proxies: int, budget: dict[str, Any]
) -> None:
    target, others = Server("target"), [Server("contrary", -1.0)] * proxies
    if others and "budget_usd" in budget:
        others[0].identity = {"provider": "local", "model": "contrary"}
    result = run(tmp_path, target, *others, **budget)
    explanation = result.explanation
    assert explanation.role == "target"
    assert explanation.design is not None
    size = len(explanation.query_ids), explanation.design.n_coalitions
    assert size >= (10, 22)
    assert size[0] * size[1] < 30 * 64
    said = next(note for note in result.notes if "explains itself on" in note)
    assert f"on {size[0]} queries and {size[1]} coalitions instead of 30 and 64" in said
    assert said.split(",")[0].replace("&", "&amp;") in render_html(build_artifact(result).summary)
    with Ledger(tmp_path / "ledger.db") as ledger:
        spent = ledger.totals(role="target")
    assert spent.done <= budget.get("budget_calls", spent.done)
    assert spent.prompt_tokens + spent.completion_tokens <= budget.get("budget_tokens", math.inf)
    assert sum(spent.money.values()) <= Decimal(str(budget.get("budget_usd", 1e9)))
    # What harms is found all the same, and the same run chooses the same again.
    assert int(np.argmin(explanation.attribution.mean)) in (3, 8)
    asked = target.calls
    again = run(tmp_path, target, *others, **budget)
    assert target.calls == asked
    assert again.explanation.query_ids == explanation.query_ids
    # More money later buys more; nothing is lost.
    whole = run(tmp_path, target, *others)
    assert (len(whole.explanation.query_ids), whole.explanation.design.n_coalitions) == (30, 64)  # type: ignore[union-attr]
    assert set(explanation.query_ids) <= {f"explain{i}" for i in range(40)}


def test_a_run_that_was_stopped_within_a_budget_goes_on_with_the_same_choice(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Server("target"), budget_calls=1500)

    class Stopping(Server):
        def score(self, requests: Any, **more: Any) -> Any:
            for block in super().score(requests, **more):
                yield block
                if self.calls >= 333:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", Stopping("target"), budget_calls=1500)
    second = run(tmp_path / "stopped", Server("target"), budget_calls=1500)
    assert second.explanation.query_ids == whole.explanation.query_ids
    assert np.array_equal(second.explanation.attribution.mean, whole.explanation.attribution.mean)


def test_too_little_for_any_explanation_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    target = Server("target")
    with pytest.raises(
        BudgetExceededError, match=r"max_calls = 300: .* take \d+ calls or more \(10 queries"
    ) as caught:
        run(tmp_path, target, budget_calls=300)
    assert target.calls == 0
    more = re.search(r"Raise the limit by (\d+)", str(caught.value))
    assert more is not None
    with pytest.raises(BudgetExceededError, match="has spent or reserved"):
        run(tmp_path, target, budget_calls=300 + int(more.group(1)))
    assert target.calls > 0


def test_enough_changes_nothing(tmp_path: Path) -> None:
    rich = run(tmp_path / "a", Server("target"), Server("contrary", -1.0), budget_calls=100_000)
    free = run(tmp_path / "b", Server("target"), Server("contrary", -1.0))
    assert rich.explanation.query_ids == free.explanation.query_ids
    assert rich.notes == free.notes


def test_further_coalitions_keep_within_the_budget_and_say_so(tmp_path: Path) -> None:
    given = {"attribution_error": 1e-6, "budget_calls": 4200}
    target, proxy = Server("target"), Server("contrary", -1.0)
    result = run(tmp_path, target, proxy, **given)
    assert any("no more than" in note and "coalitions a query" in note for note in result.notes)
    assert result.explanation.design is not None
    assert 64 <= result.explanation.design.n_coalitions < 96
    assert target.calls <= 4200
    asked = target.calls
    assert (
        run(tmp_path, target, proxy, **given).explanation.design.n_coalitions
        == result.explanation.design.n_coalitions
    )  # type: ignore[union-attr]
    assert target.calls == asked


def test_billed_proxies_are_not_asked_for_more_than_the_money_allows(tmp_path: Path) -> None:
    proxy = Server("gpt-4o", -1.0)
    proxy.identity = {"provider": "openai", "base_url": "https://api.openai.com/v1", "model": "gpt-4o"}
    result = run(tmp_path, Server("target"), proxy, budget_usd=0.32)
    assert result.explanation.role == "target"
    assert any("too little to ask the proxies" in note for note in result.notes)
    assert result.explanation.calibration is None
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert sum(ledger.totals().money.values()) <= Decimal("0.32")
