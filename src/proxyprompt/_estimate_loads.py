"""How many calls, tokens and how much money: bounds, and what one model takes for given prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import ceil
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._oracle_size import KEPT
from ._request_keys import RequestKeys
from ._run import Run
from ._token_bounds import least_tokens, likely_tokens, most_completion, most_tokens, n_bytes
from .attribution.base import Design
from .backends.base import GenerateRequest, Planner, ScoreRequest
from .ledger import CallRole, Ledger
from .metering import Meter
from .money import call_bound
from .pipeline import price_of_calls
from .prices import Price, Quote
from .prompt import Query
from .task import TextTask
from .value_function import PromptValueFunction

__all__ = ["Bounds", "Load", "Model", "RunEstimate", "StageEstimate", "Work", "recorded_calls"]

_SAMPLE = 48


@dataclass(frozen=True)
class Bounds:
    """A number between bounds.

    Attributes
    ----------
    low, expected, high : int or Decimal
        ``expected`` rests on guesses, the bounds do not.
    """

    low: Any = 0
    expected: Any = 0
    high: Any = 0

    def __add__(self, other: Bounds) -> Bounds:
        return Bounds(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def to_dict(self) -> dict[str, float | int]:
        """JSON-safe form; money as floats."""
        values = {"low": self.low, "expected": self.expected, "high": self.high}
        return {name: float(v) if isinstance(v, Decimal) else int(v) for name, v in values.items()}


@dataclass(frozen=True)
class StageEstimate:
    """What one stage still asks of one model.

    Attributes
    ----------
    stage, role, model : str
    calls, prompt_tokens, completion_tokens : Bounds
    money : Bounds or None
        In the currency of the price; ``None`` where there is no price.
    recorded : int
        Calls of this stage that the run has already made.
    """

    stage: str
    role: CallRole
    model: str
    calls: Bounds
    prompt_tokens: Bounds
    completion_tokens: Bounds
    money: Bounds | None
    recorded: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "stage": self.stage,
            "role": self.role,
            "model": self.model,
            "calls": self.calls.to_dict(),
            "prompt_tokens": self.prompt_tokens.to_dict(),
            "completion_tokens": self.completion_tokens.to_dict(),
            "money": None if self.money is None else self.money.to_dict(),
            "recorded": self.recorded,
        }


@dataclass(frozen=True)
class RunEstimate:
    """What a run still asks and costs.

    Attributes
    ----------
    stages : tuple of StageEstimate
    currencies : mapping of str to str
        By model; empty where there is no price.
    counting : mapping of str to str
        By model, how tokens were counted.
    notes : tuple of str
        Models without a price, budgets that may be passed, what is in no bound.
    run : str
        Key of the run in the ledger.
    """

    stages: tuple[StageEstimate, ...]
    currencies: Mapping[str, str]
    counting: Mapping[str, str]
    notes: tuple[str, ...]
    run: str

    def calls(self, role: CallRole = "target") -> Bounds:
        """Calls of all stages."""
        return sum((s.calls for s in self.stages if s.role == role), Bounds())

    def tokens(self, role: CallRole = "target") -> Bounds:
        """Prompt and completion tokens of all stages."""
        return sum((s.prompt_tokens + s.completion_tokens for s in self.stages if s.role == role), Bounds())

    def money(self) -> dict[str, Bounds]:
        """Money of all stages and models that have a price, by currency."""
        totals: dict[str, Bounds] = {}
        for one in self.stages:
            if one.money is not None:
                currency = self.currencies[one.model]
                totals[currency] = totals.get(currency, Bounds(*[Decimal(0)] * 3)) + one.money
        return totals

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        roles: tuple[CallRole, ...] = ("target", "proxy")
        return {
            "run": self.run,
            "stages": [s.to_dict() for s in self.stages],
            "calls": {role: self.calls(role).to_dict() for role in roles},
            "tokens": {role: self.tokens(role).to_dict() for role in roles},
            "money": {currency: b.to_dict() for currency, b in self.money().items()},
            "counting": dict(self.counting),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Load:
    """Calls, and the bytes of their prompts."""

    calls: float = 0
    bytes: float = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.calls + other.calls, self.bytes + other.bytes)

    def times(self, factor: float) -> Load:
        return Load(self.calls * factor, self.bytes * factor)


@dataclass(frozen=True)
class Work:
    low: Load = Load()
    expected: Load = Load()
    high: Load = Load()


class Model:
    """One model of the run: which of its requests are new, and what a byte and a call cost."""

    def __init__(
        self,
        run: Run,
        meter: Meter,
        role: CallRole,
        quote: Quote,
        rows: tuple[Design, NDArray[np.bool_]] | None,
    ) -> None:
        self.run, self.meter, self.role, self.quote = run, meter, role, quote
        self.backend, self.name = meter.backend, meter.backend.name
        self.price = price_of_calls(self.backend, quote)
        self._kind: Literal["score", "generate"] = "generate" if isinstance(run.task, TextTask) else "score"
        self._maker = RequestKeys(self.backend.identity, self._kind, {})
        n = run.prompt.n_units
        self.full, self.empty = np.ones((1, n), dtype=np.bool_), np.zeros((1, n), dtype=np.bool_)
        self._sizes: dict[str, tuple[int, int]] = {}
        for name, queries in run.splits.items():
            longest = [n_bytes(r.prompt) for r in self.requests(queries, self.full)]
            self._sizes[name] = max(longest, default=0), round(float(np.mean(longest))) if longest else 0
        empties = [n_bytes(r.prompt) for r in self.requests(run.splits["select"], self.empty)]
        self._zero = round(float(np.mean(empties))) if empties else 0
        self._count_tokens(rows)

    def requests(
        self, queries: Sequence[Query], rows: NDArray[np.bool_]
    ) -> list[ScoreRequest] | list[GenerateRequest]:
        run = self.run
        function = PromptValueFunction(run.prompt, run.task, queries, self.meter)
        if isinstance(run.task, TextTask):
            return function._generate_requests(rows, run.task)
        return function._score_requests(rows, run.task)

    def fresh(self, queries: Sequence[Query], rows: NDArray[np.bool_], repeat: int = 0) -> Load:
        """Distinct requests that are not in the ledger."""
        maker = self._maker if not repeat else RequestKeys(self.backend.identity, self._kind, {}, repeat)
        wanted = {maker.key(r): n_bytes(r.prompt) for r in self.requests(queries, rows)}
        known = self.meter.ledger.lookup(wanted) if self.meter.ledger is not None else {}
        left = [size for key, size in wanted.items() if key not in known]
        return Load(len(left), sum(left))

    def least_money(self) -> float:
        """What a call with the shortest prompt costs at least."""
        assert self.price is not None
        tokens = self._zero * self._ratios[0]
        return float(tokens * float((self.price.at(tokens) or self.price.rates).input) / 1e6)

    def any_rows(self, split: str, calls: float) -> Load:
        """So many calls with prompts up to the longest."""
        return Load(calls, calls * self._sizes[split][0])

    def usual_rows(self, split: str, calls: float) -> Load:
        """So many calls with prompts of a usual length."""
        return Load(calls, calls * (KEPT * self._sizes[split][1] + (1 - KEPT) * self._zero))

    def _count_tokens(self, rows: tuple[Design, NDArray[np.bool_]] | None) -> None:
        """Tokens per byte: low, expected, high; and what a server adds to each prompt at most."""
        queries = self.run.splits["explain"]
        some = rows[0].coalitions if rows is not None else np.vstack([self.full, self.empty])
        sample = self.requests(queries, np.vstack([self.full, self.empty, some]))
        step = max(1, len(sample) // _SAMPLE)
        example = sample[0]
        self._completion = most_completion(example, self.backend)
        for request in sample[1::step]:
            self._completion = max(self._completion, most_completion(request, self.backend))
        if isinstance(self.backend, Planner):
            counts = [(self.backend.count_tokens(r.prompt), n_bytes(r.prompt)) for r in sample[::step]]
            self.counting, slack = "the model's own tokenizer, on a sample", 1.1
        else:
            keys = {self._maker.key(r): n_bytes(r.prompt) for r in sample}
            known = self.meter.ledger.lookup(keys) if self.meter.ledger is not None else {}
            counts = [
                (row.usage.prompt_tokens, keys[k]) for k, row in known.items() if row.usage.prompt_tokens
            ]
            self.counting, slack = "what it reported for prompts in the ledger", 1.25
        ratios = [tokens / size for tokens, size in counts if size]
        self._overhead = 0
        if len(ratios) >= 5:
            self._ratios = min(ratios) / slack, float(np.mean(ratios)), slack * max(ratios)
            return
        self.counting = "an estimate from bytes"
        size = max(1, n_bytes(example.prompt))
        low, likely = least_tokens(example.prompt) / size, likely_tokens(example.prompt) / size
        self._ratios = low, likely, 1.0
        self._overhead = most_tokens(example.prompt) - size

    def priced(self, stage: str, work: Work, recorded: int) -> StageEstimate:
        """Tokens and money of a stage."""
        many = getattr(self.backend, "most_calls", 1)
        loads = (work.low, work.expected, work.high.times(many))
        calls = Bounds(int(loads[0].calls), round(loads[1].calls), ceil(loads[2].calls))
        prompt = Bounds(
            int(loads[0].bytes * self._ratios[0]),
            round(loads[1].bytes * self._ratios[1]),
            ceil(loads[2].bytes * self._ratios[2]) + self._overhead * calls.high,
        )
        generated = isinstance(self.run.task, TextTask)
        likely = self._completion / 2 if generated else 1
        completion = Bounds(0, round(likely * calls.expected), self._completion * calls.high)
        money = None if self.price is None else self._money(calls, prompt, completion, self.price)
        return StageEstimate(stage, self.role, self.name, calls, prompt, completion, money, recorded)

    def _money(self, calls: Bounds, prompt: Bounds, completion: Bounds, price: Price) -> Bounds:
        batch = bool(getattr(self.backend, "batch", False))
        million = Decimal(1_000_000)

        def rates(tokens: int, n: int) -> Any:
            each = tokens / max(n, 1)
            return price.at(each, batch=batch) or price.at(each)

        low, likely = rates(prompt.low, calls.low), rates(prompt.expected, calls.expected)
        cheapest = min(low.input, low.cached_input if low.cached_input is not None else low.input)
        expected = (prompt.expected * likely.input + completion.expected * (likely.output or 0)) / million
        if price.rates.output is None:
            price = replace(price, rates=replace(price.rates, output=Decimal(0)))
        each = (ceil(prompt.high / max(calls.high, 1)), ceil(completion.high / max(calls.high, 1)))
        high = calls.high * call_bound(*each, price, batch=batch)
        return Bounds(prompt.low * cheapest / million, expected, high)


def recorded_calls(ledger: Ledger | None, key: str, model: Model, stage: str) -> int:
    """Answers that a run has recorded of a stage."""
    if ledger is None:
        return 0
    found = ledger.totals(run=key, role=model.role, stage=stage).by_model.get(model.name)
    return found.done if found is not None else 0
