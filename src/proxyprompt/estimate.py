"""What a run will ask and cost, before anything is sent: calls, tokens and money of each stage, between bounds.

The coalitions of the first two stages follow from the seed, so their requests are written out and looked up in the
ledger one by one. What later stages ask depends on answers; their bounds follow from the settings, and what this run has
already recorded is subtracted. Retries, and several samples of one request, are in no bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import ceil
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._explaining import noise_repeats, oracle_queries, screening_plan, screening_rows
from ._oracle_size import KEPT, later_calls
from ._request_keys import RequestKeys
from ._run import Run, Silent
from ._screening_noise import noise_queries
from ._shrinking import certificate_method
from ._token_bounds import least_tokens, likely_tokens, most_completion, most_tokens, n_bytes
from ._verify_stage import verification_bases
from .attribution.base import Design
from .backends.base import Backend, GenerateRequest, Planner, ScoreRequest
from .data import Splits
from .ledger import CallRole, Ledger
from .metering import Meter
from .money import call_bound
from .optimize.relabel import own_queries
from .pipeline import STAGES, check_run, prepare_run, price_of_calls
from .prices import FREE, Price, Quote, Unpriced
from .prompt import FewShotPrompt, Query
from .settings import Settings
from .task import Task, TextTask
from .value_function import PromptValueFunction

__all__ = ["Bounds", "RunEstimate", "StageEstimate", "estimate_run"]

# Guesses for the expected numbers only; no bound depends on them.
_AGREE = 0.7  # share of queries on which a proxy predicts what the target predicts
_MEASURED = 0.7  # share of the demonstrations that verification measures
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


def estimate_run(
    prompt: FewShotPrompt,
    task: Task,
    splits: Splits,
    *,
    target: Backend,
    proxies: Sequence[Backend] = (),
    settings: Settings | None = None,
    ledger: Ledger | None = None,
) -> RunEstimate:
    """Calls, tokens and money of each stage of :func:`~proxyprompt.optimize_prompt`, before anything is sent.

    Parameters
    ----------
    prompt, task, splits, target, proxies, settings
        As for :func:`~proxyprompt.optimize_prompt`.
    ledger : Ledger, optional
        What is recorded there is not bought again, and subtracted.

    Returns
    -------
    RunEstimate
        No call is made and no weights are loaded; a local model's tokenizer may be.

    Raises
    ------
    DataError, InputError
        As the run itself would.

    Notes
    -----
    Tokens are counted by the model's own tokenizer on a sample of prompts, else by what it reported for prompts that are
    in the ledger, else from bytes: between one sixteenth of them and all. ``counting`` says which.
    """
    settings = settings or Settings()
    check_run(prompt, task, splits, settings)
    # Limits are compared below; the run's key does not depend on them.
    unlimited = replace(settings, budget_calls=None, budget_tokens=None, budget_usd=None, budget_cost=None)
    run, key, pricing = prepare_run(prompt, task, splits, target, proxies, unlimited, ledger, Silent())
    rows = screening_rows(run) if run.proxies else None
    models = [_Model(run, run.target, "target", pricing.target, rows)]
    models += [_Model(run, m, "proxy", pricing.proxies[name], rows) for name, m in run.proxies.items()]
    stages: list[StageEstimate] = []
    for model in models:
        for stage, work in _Plan(run, model, rows).stages().items():
            if work.high.calls:
                stages.append(model.priced(stage, work, _recorded(ledger, key, model, stage)))
    stages.sort(key=lambda s: (STAGES.index(s.stage), s.role != "target"))
    estimate = RunEstimate(
        tuple(stages),
        {m.name: m.price.currency if m.price is not None else "" for m in models},
        {m.name: m.counting for m in models},
        (),
        key,
    )
    return replace(estimate, notes=tuple(_notes(estimate, models, settings, ledger)))


# --- counting -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Load:
    """Calls, and the bytes of their prompts."""

    calls: float = 0
    bytes: float = 0

    def __add__(self, other: _Load) -> _Load:
        return _Load(self.calls + other.calls, self.bytes + other.bytes)

    def times(self, factor: float) -> _Load:
        return _Load(self.calls * factor, self.bytes * factor)


@dataclass(frozen=True)
class _Work:
    low: _Load = _Load()
    expected: _Load = _Load()
    high: _Load = _Load()


class _Model:
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

    def fresh(self, queries: Sequence[Query], rows: NDArray[np.bool_], repeat: int = 0) -> _Load:
        """Distinct requests that are not in the ledger."""
        maker = self._maker if not repeat else RequestKeys(self.backend.identity, self._kind, {}, repeat)
        wanted = {maker.key(r): n_bytes(r.prompt) for r in self.requests(queries, rows)}
        known = self.meter.ledger.lookup(wanted) if self.meter.ledger is not None else {}
        left = [size for key, size in wanted.items() if key not in known]
        return _Load(len(left), sum(left))

    def least_money(self) -> float:
        """What a call with the shortest prompt costs at least."""
        assert self.price is not None
        tokens = self._zero * self._ratios[0]
        return float(tokens * float((self.price.at(tokens) or self.price.rates).input) / 1e6)

    def any_rows(self, split: str, calls: float) -> _Load:
        """So many calls with prompts up to the longest."""
        return _Load(calls, calls * self._sizes[split][0])

    def usual_rows(self, split: str, calls: float) -> _Load:
        """So many calls with prompts of a usual length."""
        return _Load(calls, calls * (KEPT * self._sizes[split][1] + (1 - KEPT) * self._zero))

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

    def priced(self, stage: str, work: _Work, recorded: int) -> StageEstimate:
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


# --- what the stages ask ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Which calls each stage makes of one model; the counts follow the stages' own code."""

    run: Run
    model: _Model
    rows: tuple[Design, NDArray[np.bool_]] | None

    @property
    def of_target(self) -> bool:
        return self.model.role == "target"

    @property
    def screened(self) -> bool:
        """Whether the screen asks this model anything; with few queries some proxies are left out, or all."""
        assert self.rows is not None
        plan, names = screening_plan(self.run, len(self.rows[1])), list(self.run.proxies)
        if self.of_target or plan.n_screened > len(names):  # the ensemble asks all of them
            return plan.n_screened > 0
        return names.index(self.model.name) < plan.n_screened

    def size(self, split: str) -> int:
        return len(self.run.splits[split])

    def stages(self) -> dict[str, _Work]:
        """By stage; what the run has recorded is subtracted."""
        bounds = {
            "screen": self.screen(),
            "attribute": self.attribute(),
            "verify": self.verify(),
            "clean": self.clean(),
            "compress": self.compress(),
            "certify": self.certify(),
        }
        return {stage: work for stage, work in bounds.items() if work is not None}

    def left(self, stage: str, split: str, high: float, expected: float) -> tuple[_Load, _Load]:
        """Highest and expected load of calls that are known by number only, without those of this run so far."""
        meter = self.model.meter
        done = 0
        if meter.ledger is not None:
            done = _recorded(meter.ledger, meter.run, self.model, stage)
        return (
            self.model.any_rows(split, max(0.0, high - done)),
            self.model.usual_rows(split, max(0.0, expected - done)),
        )

    def screen(self) -> _Work | None:
        """All queries, the full prompt first; where proxy and target agree, all coalitions."""
        if self.rows is None or not self.screened:
            return None
        queries, s = self.run.splits["explain"], self.run.settings
        order = [queries[int(i)] for i in self.run.rng(3).permutation(len(queries))]
        everything = np.vstack([self.rows[0].coalitions, self.rows[1], self.model.full])
        full, high = self.model.fresh(queries, self.model.full), self.model.fresh(queries, everything)
        more = _Load(high.calls - full.calls, high.bytes - full.bytes)
        first, again = order[: s.screening_block], _Load()
        repeats = noise_repeats(self.run) if self.of_target else 0
        if repeats:
            repeated = noise_queries(order)
            first += [q for q in repeated if q not in first]
            for repeat in range(1, repeats + 1):
                again += self.model.fresh(repeated, self.model.full, repeat)
        return _Work(
            self.model.fresh(first, self.model.full) + again,
            full + more.times(_AGREE) + again,
            high + again,
        )

    def attribute(self) -> _Work | None:
        run, s, n = self.run, self.run.settings, self.run.prompt.n_units
        queries = run.splits["explain"]
        if s.verify != "off":
            return self.propose()
        if self.rows is None:
            if not self.of_target:
                return None
            design = run.explainer.design(n, s.n_fit(n), rng=run.rng(1))
            exact = self.model.fresh(oracle_queries(queries, [], s.oracle_queries), design.coalitions)
            return _Work(exact, exact, exact)
        fitted = self.rows[0].n_coalitions
        if not screening_plan(run, len(self.rows[1])).n_screened:
            asked_first = oracle_queries(queries, [], s.oracle_queries)
            if not self.of_target and run.wide is None:
                return None
            rows = self.rows[0] if self.of_target or run.wide is None else run.wide
            exact = self.model.fresh(asked_first, rows.coalitions)
            likely, most_more = self.further(len(asked_first), fitted)
            return _Work(
                exact,
                exact + self.model.usual_rows("explain", likely),
                exact + self.model.any_rows("explain", most_more),
            )
        if self.of_target:
            # A proxy explains: the full prompt everywhere. None does: what the screen has not bought of so many queries.
            asked = min(len(queries), s.oracle_queries or 30)
            unbought = max(0.0, asked - _AGREE * len(queries))
            # The screen may have bought more queries than these, and further coalitions are asked for all of them.
            likely, most_more = self.further(s.oracle_queries or max(len(queries), 1), fitted)
            high, expected = self.left(
                "attribute",
                "explain",
                max(asked * fitted, len(queries)) + most_more,
                unbought * fitted + likely,
            )
            rows = run.wide if most_more and run.wide is not None else self.rows[0]
            most = self.model.fresh(queries, np.vstack([rows.coalitions, self.model.full]))
            return _Work(high=min(high, most, key=lambda x: x.calls), expected=expected)
        wide = run.wide.n_coalitions if run.wide is not None else 0
        accepted = len(queries) * (1 + s.n_proxy(n))
        usual = _AGREE * len(queries) * max(0, wide - fitted)
        high, expected = self.left("attribute", "explain", max(accepted, len(queries) * wide), usual)
        return _Work(high=high, expected=expected)

    def further(self, n_queries: int, fitted: int) -> tuple[float, float]:
        """Expected and most target calls for further coalitions, where an error, calls or money were named for them."""
        s, wide = self.run.settings, self.run.wide
        named = (s.attribution_error, s.attribution_calls, s.attribution_money)
        if not self.of_target or wide is None or named == (None, None, None):
            return 0.0, 0.0
        most = float(n_queries * (wide.n_coalitions - fitted))
        if s.attribution_calls is not None:
            most = min(most, s.attribution_calls)
        if s.attribution_money is not None and self.model.price is not None:
            most = min(most, s.attribution_money / max(self.model.least_money(), 1e-12))
        # Limits alone are spent; for an error it is seen after a first fit.
        return (most if s.attribution_error is None else most / 2), most

    @property
    def unscreened(self) -> bool:
        """Whether no screen is held: then all proxies propose what the target verifies."""
        return self.rows is None or not screening_plan(self.run, len(self.rows[1])).n_screened

    def propose(self) -> _Work:
        """The full prompt everywhere; of proxies that propose, their coalitions on the queries that agree."""
        run, queries = self.run, self.run.splits["explain"]
        full = self.model.fresh(queries, self.model.full)
        low = full if self.unscreened else _Load()
        if self.of_target:
            return _Work(low, low, full)
        n = run.prompt.n_units
        design = run.explainer.design(n, run.settings.n_proxy(n), rng=run.rng(4))
        high = self.model.fresh(queries, np.vstack([design.coalitions, self.model.full]))
        return _Work(low, full + _Load(high.calls - full.calls, high.bytes - full.bytes).times(_AGREE), high)

    def verify(self) -> _Work | None:
        """The target measures: the coalition of each query, and then the same without or with each demonstration."""
        run, s, n = self.run, self.run.settings, self.run.prompt.n_units
        if s.verify == "off" or not self.of_target:
            return None
        explain = run.splits["explain"]
        queries = oracle_queries(explain, [], s.oracle_queries)
        size = len(queries)
        if not self.unscreened:  # as many as the screen bought
            size = min(len(explain), max(s.oracle_queries or len(explain), 1))
        most = size * (n + 1) if s.verify_calls is None else min(size * (n + 1), s.verify_calls)
        if most < 2 * min(size, len(queries)):
            return None
        share = 1.0 if s.verify == "all" else _MEASURED
        high, expected = self.left("verify", "explain", most, min(most, size * (1 + share * n)))
        if not self.unscreened:
            return _Work(high=high, expected=expected)
        bases, _ = verification_bases(run, len(queries))
        low = _Load()
        for query, base in zip(queries, bases, strict=True):
            # The full prompt is asked before.
            low += _Load() if base.all() else self.model.fresh([query], base[None, :])
        high, expected = (max(x, low, key=lambda load: load.calls) for x in (high, expected))
        return _Work(low, expected, high)

    def clean(self) -> _Work | None:
        run, s, n = self.run, self.run.settings, self.run.prompt.n_units
        if not s.clean:
            return None
        explain, select, rounds = self.size("explain"), self.size("select"), s.clean_rounds
        if not self.of_target:
            again = (rounds - 1) * s.n_proxy(n) * explain
            return _Work(high=self.left("clean", "explain", again, 0)[0])
        suspects = min(n - len(run.protected), rounds * s.max_suspects)
        high = select * (2 * suspects + 2 * min(rounds, suspects) + 5)
        expected = later_calls(run)["clean"]
        if rounds > 1:
            fitted = self.rows[0].n_coalitions if self.rows is not None else s.n_fit(n)
            high += fitted * explain // 2 if s.reexplain_calls is None else s.reexplain_calls
        own = own_queries(run.prompt, run.task)
        doubts = _Load()
        if own is not None and s.clean_prior == "zero_shot":
            high += n
            doubts = self.model.fresh(own, self.model.empty)
        if own is not None and s.relabel == "propose":
            high += n + explain + select
        longest = (
            "explain"
            if self.model.any_rows("explain", 1).bytes > self.model.any_rows("select", 1).bytes
            else "select"
        )
        most, usual = self.left("clean", longest, high, expected)
        return _Work(doubts, usual, most)

    def compress(self) -> _Work | None:
        s, select, explain = self.run.settings, self.size("select"), self.size("explain")
        orders = 4 + s.orders if s.orders else 0
        if not self.of_target:
            if not orders:
                return None
            return _Work(high=self.left("compress", "explain", orders * explain, 0)[0])
        # Both ends and the empty prompt, the points of the path, the cap, three prompts of two swaps.
        high = select * (3 + s.max_evaluations + 1 + 3)
        if orders:
            high += orders * ceil(select / 4) + 2 * select
        most, usual = self.left("compress", "select", high, later_calls(self.run)["compress"])
        return _Work(self.model.fresh(self.run.splits["select"], self.model.empty), usual, most)

    def certify(self) -> _Work | None:
        s, sealed = self.run.settings, self.run.splits["sealed"]
        if not self.of_target:
            return None
        # The full prompt, at most four nested candidates, and one in another order.
        prompts = 6 if s.orders else 5
        most, usual = self.left("certify", "sealed", prompts * len(sealed), later_calls(self.run)["certify"])
        full = self.model.fresh(sealed, self.model.full)
        if certificate_method(s, self.run.task) == "betting":
            block = s.certificate_block or max(10, ceil(len(sealed) / 4))
            full = full.times(min(1.0, block / len(sealed))) if full.calls == len(sealed) else _Load()
            full = _Load(int(full.calls), full.bytes / 2)  # which queries come first is not looked up
        return _Work(full, usual, most)


def _recorded(ledger: Ledger | None, key: str, model: _Model, stage: str) -> int:
    if ledger is None:
        return 0
    found = ledger.totals(run=key, role=model.role, stage=stage).by_model.get(model.name)
    return found.done if found is not None else 0


def _notes(
    estimate: RunEstimate, models: Iterable[_Model], settings: Settings, ledger: Ledger | None
) -> Iterable[str]:
    name = "max_cost" if settings.budget_usd is None else "max_usd"
    limit = settings.budget_cost if settings.budget_usd is None else settings.budget_usd
    for model in models:
        if model.price is None:
            why = model.quote.reason if isinstance(model.quote, Unpriced) else "it is not known"
            yield f"{model.name} has no price ({why}); its money is not estimated."
            if limit is not None:
                yield f"{name} is set, and {model.name} has no price: the run is refused. Give the price, or limit calls."
        elif model.price is not FREE and model.price.rates.output is None:
            yield f"The price of {model.name} says nothing of completion tokens; they are not in the money."
    totals = ledger.totals(run=estimate.run) if ledger is not None else None
    spent = ledger.totals(run=estimate.run, role="target") if ledger is not None else None
    done = spent.done + spent.unknown if spent is not None else 0
    tokens = spent.prompt_tokens + spent.completion_tokens if spent is not None else 0
    yield from _against("max_calls", settings.budget_calls, estimate.calls(), done)
    yield from _against("max_tokens", settings.budget_tokens, estimate.tokens(), tokens)
    if limit is not None:
        for currency, bounds in estimate.money().items():
            so_far = totals.money.get(currency, Decimal(0)) if totals is not None else Decimal(0)
            if bounds.high:
                yield from _against(f"{name} ({currency})", Decimal(str(limit)), bounds, so_far)
    if any(
        x is not None
        for x in (settings.attribution_error, settings.attribution_calls, settings.attribution_money)
    ):
        yield (
            "Further coalitions for [attribution] error, calls or money are in the upper bound of attribute, as many as"
            " these settings and the proxies' design allow; how many there will be is seen after a first fit."
        )
    yield "Retries, and further samples of the same request, are in no bound."


def _against(name: str, limit: Any, bounds: Bounds, spent: Any) -> Iterable[str]:
    if limit is None:
        return
    left = limit - spent
    if bounds.high <= left:
        yield f"{name} = {limit}: the run stays within it."
    elif bounds.low > left:
        yield f"{name} = {limit}: too little; {spent} is spent and at least {bounds.low} more is needed."
    elif bounds.expected > left:
        yield (
            f"{name} = {limit}: more is expected; screen and explanation are cut to fit where that can do, else the run"
            " stops before its end, and all answers up to then are kept."
        )
    else:
        yield f"{name} = {limit}: expected to do, but the upper bound of {bounds.high} passes it."
