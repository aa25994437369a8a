"""What each fault of a provider becomes: an answer, a bound, an error in the result, or the end of the batch.

The answers are a real model's, through the real SDK; the proxy breaks them. Nothing here ends in a label that nobody
gave, in a zero, in an error of an unknown type, or in a bill that the ledger does not cover.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeAlias

import openai
import pytest

from proxyprompt.backends import _openai_connection
from proxyprompt.backends.base import ScoreResult
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.errors import BackendError, BudgetExceededError, RetryableBackendError
from proxyprompt.ledger import Ledger, Limits
from proxyprompt.metering import Meter
from proxyprompt.prices import Price as OurPrice
from proxyprompt.prices import Rates

from .proxy import FAULTS, PASS, Fault, FaultProxy, Once, Price, Schedule
from .worker import review

Outcome: TypeAlias = Literal["answered", "bounded", "failed", "stopped"]

_LATE = "max_wait|asked to wait"
_LOST = r"no answer within the time limit|broke off|connection|may have been billed"
_UNREAD = "not JSON|holds no choices|no content"

# What becomes of a fault that does not go away, and what the error says. One that comes once and is worth another try
# (TRANSIENT) ends in the right answer.
OUTCOMES: dict[str, tuple[Outcome, str]] = {
    "none": ("answered", ""),
    **{
        f"429, wait {wait}": ("failed", "HTTP 429")
        for wait in ("0", "1", "inf", "nan", "-5", "garbage", "empty")
    },
    "429, wait past date": ("failed", "HTTP 429"),
    **{f"429, wait {wait}": ("failed", _LATE) for wait in ("121", "1e38", "far date")},
    "429, quota gone": ("stopped", "429: You exceeded your quota"),
    **{
        f"{status}": ("failed", f"HTTP {status}")
        for status in (408, 409, 500, 502, 503, 504, 529, 400, 413, 422)
    },
    "500, HTML": ("failed", "HTTP 500"),
    **{f"{status}": ("stopped", f"HTTP {status}") for status in (401, 403, 404)},
    "400, content filter": ("failed", "HTTP 400.*filtered"),
    "400, too long": ("failed", "HTTP 400.*context length"),
    **{f"silence {when}": ("failed", _LOST) for when in ("before", "after", "in the body")},
    **{f"reset {when}": ("failed", _LOST) for when in ("before", "after", "in the body")},
    "closed before": ("failed", _LOST),
    **{f"cut in the {part}": ("failed", _LOST) for part in ("head", "body")},
    "broken chunks": ("failed", _LOST),
    "no HTTP at all": ("failed", _LOST),
    "endless drip": ("failed", _LOST),
    **dict.fromkeys(
        ("malformed JSON", "a list for an object", "empty body", "204", "null", "HTML with 200"),
        ("failed", _UNREAD),
    ),
    "redirect 307": ("stopped", "307.*[Rr]edirect"),
    "redirect 302": ("stopped", "302.*[Rr]edirect"),
    "told twice": ("answered", ""),
    "closed after": ("answered", ""),
    "slow drip": ("answered", ""),
    **{
        f"log-probabilities {value}": ("failed", "no usable log-probability")
        for value in ("NaN", "-inf", "inf", "0.5", "null", "text")
    },
    "log-probabilities -9999": ("bounded", ""),
    "one token listed": ("bounded", ""),
    "no label listed": ("bounded", ""),
    "no log-probabilities": ("failed", "no log-probabilities this time"),
    "empty log-probabilities": ("failed", "no usable log-probability|no log-probabilities"),
    "no choices": ("failed", "holds no choices"),
    "content filter": ("failed", "content_filter|content filter"),
    "another model": ("answered", ""),
    **{name: ("answered", "") for name in FAULTS if "usage" in name},
}
TRANSIENT = {
    name
    for name, (outcome, why) in OUTCOMES.items()
    if outcome == "failed"
    and (why == _LOST or (re.fullmatch(r"(429, wait|408|409|5\d\d).*", name) and why != _LATE))
}


def test_every_fault_has_a_documented_outcome() -> None:
    assert OUTCOMES.keys() == FAULTS.keys()


class Tapped(OpenAIBackend):
    """The backend, remembering what it gave to the meter."""

    raw: list[ScoreResult]

    def score(self, requests: Any, **options: Any) -> Iterator[Any]:
        self.raw = []
        for block in super().score(requests, **options):
            self.raw += [result for _, result in block]
            yield block


PRICE = Price()
OUR_PRICE = OurPrice(Rates(Decimal(3), Decimal(15)), source="these tests")


def _backend(proxy: FaultProxy, **options: Any) -> Tapped:
    patience = {"timeout": 0.7, "max_tries": 3, "max_wait": 2.0, "concurrency": 4}
    return Tapped("smol", base_url=proxy.url, **{**patience, **options})


def _meter(backend: OpenAIBackend, ledger: Ledger, limits: Limits | None = None) -> Meter:
    return Meter(backend, ledger, role="target", run="r", price=OUR_PRICE, limits=limits)


def _settle(proxy: FaultProxy) -> None:
    deadline = time.monotonic() + 20
    while proxy.running:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _spent(ledger: Ledger) -> Fraction:
    """Dollars in the books, those of unknown outcome at what was set aside."""
    return Fraction(ledger.totals().money.get("USD", Decimal(0)))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts a tenth as long; how long they are is tested elsewhere."""
    for name in ("_FIRST_PAUSE", "_FIRST_PAUSE_OF_LOAD"):
        monkeypatch.setattr(_openai_connection, name, getattr(_openai_connection, name) / 10)


@pytest.fixture(scope="module")
def truths() -> dict[int, ScoreResult]:
    return {}


def _truth(number: int, proxy: FaultProxy, truths: dict[int, ScoreResult]) -> ScoreResult:
    """The undisturbed answer, from a meter without a ledger."""
    if number not in truths:
        proxy.plan = Once()
        meter = Meter(OpenAIBackend("smol", base_url=proxy.url), None, role="target", run="t")
        [_, truths[number]] = meter.score([review(0), review(number)], stage="s")
    return truths[number]


def _check(result: ScoreResult, outcome: Outcome, why: str, truth: ScoreResult) -> None:
    if outcome == "failed":
        assert result.error is not None
        assert re.search(why, result.error), result.error
        assert "\n" not in result.error
        assert "canary" not in result.error
        assert set(result.logprobs) == {None}
        return
    assert result.error is None
    if outcome == "answered":
        assert (result.logprobs, result.censored) == (truth.logprobs, truth.censored)
        return
    assert True in result.censored
    for value, bound, right in zip(result.logprobs, result.censored, truth.logprobs, strict=True):
        assert value is not None
        assert right is not None
        # What is no bound is the answer; a list of strange tokens bounds nothing, it is all one number.
        assert bound or value == right
    uncensored = [v for v, c in zip(result.logprobs, result.censored, strict=True) if not c]
    assert uncensored or len(set(result.logprobs)) == 1


def _met(
    name: str,
    plan: Callable[[str, int], Fault],
    proxy: FaultProxy,
    path: Path,
    truth: ScoreResult,
    expected: Outcome,
) -> Tapped:
    """One call that meets the fault; then the same again without it."""
    why = OUTCOMES[name][1]
    backend = _backend(proxy)
    with Ledger(path) as ledger:
        meter = _meter(backend, ledger)
        proxy.plan = Once()
        meter.score([review(0)], stage="s")  # what the server can do is known from here on
        proxy.plan = plan
        proxy.bill.clear()
        before = _spent(ledger)
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            if expected == "stopped":
                with pytest.raises(BackendError, match=why) as caught:
                    meter.score([review(1)], stage="s")
                assert "canary" not in str(caught.value)
            else:
                [result] = meter.score([review(1)], stage="s")
                _check(result, expected, why, truth)
        assert time.monotonic() - started < 8
        _settle(proxy)
        assert not proxy.strays, "a request followed the redirect"
        totals = ledger.totals()
        assert totals.open == 0
        told = proxy.owed(PRICE, told=True)
        assert _spent(ledger) - before >= proxy.owed(PRICE), "the books do not cover the bill"
        if expected == "stopped":
            # Refused, and so neither spent nor of unknown outcome.
            assert (totals.done, totals.failed, totals.unknown) == (1, 1, 0)
            assert _spent(ledger) == before
        elif all(line.told for line in proxy.bill) and not any(raw.uncertain for raw in backend.raw):
            assert _spent(ledger) - before == told or "usage" in name
        # A failure is never served later, and an answer is not bought again.
        proxy.plan = Once()
        answered = expected in ("answered", "bounded")
        asked = sum(proxy.met.values())
        if why == _LATE:  # the backend now holds everything back, as it was asked to
            meter = _meter(_backend(proxy), ledger)
            meter.score([review(2)], stage="s")
        [again] = meter.score([review(1)], stage="s")
        if answered:
            assert sum(proxy.met.values()) == asked
            assert again.logprobs == result.logprobs
        else:
            _check(again, "answered", "", truth)
    return backend


@pytest.mark.parametrize("name", FAULTS)
def test_once(
    name: str, proxy: FaultProxy, tmp_path: Path, truths: dict[int, ScoreResult], tally: Counter[str]
) -> None:
    truth = _truth(1, proxy, truths)
    expected = "answered" if name in TRANSIENT else OUTCOMES[name][0]
    backend = _met(name, Once(name), proxy, tmp_path / "l.db", truth, expected)
    tally["faulty answers"] += 1
    tally[expected] += 1
    if name in TRANSIENT and OUTCOMES[name][1] == _LOST:
        assert backend.raw[0].uncertain == 1, "it may have been billed"


@pytest.mark.parametrize("name", ["401", "429, quota gone"])
@pytest.mark.parametrize("others", ["none", "silence after"])
def test_a_stop_in_the_midst_of_many_calls_leaves_only_possible_charges(
    name: str, others: str, proxy: FaultProxy, tmp_path: Path, tally: Counter[str]
) -> None:
    """Several calls in flight: one is refused for good, as are those after it; some were billed without an answer."""
    with Ledger(tmp_path / "l.db") as ledger:
        backend = _backend(proxy, concurrency=6, max_tries=1, paid_retries=0, timeout=30)
        meter = _meter(backend, ledger)
        proxy.plan = Once()
        meter.score([review(number) for number in range(8)], stage="s")  # so many may be in flight now
        if others != "none":
            backend._connection._timeout = 0.5
        settled = ledger.totals()
        seen: set[str] = set()

        def plan(request: str, arrival: int) -> Fault:
            seen.add(request)
            return FAULTS[name if len(seen) > 3 else others]

        proxy.plan = plan
        proxy.bill.clear()
        before = _spent(ledger)
        with pytest.raises(BackendError):
            meter.score([review(number) for number in range(20, 50)], stage="s")
        _settle(proxy)
        totals = ledger.totals()
        billed = len(proxy.bill)
        assert totals.open == 0
        assert totals.done - settled.done == (billed if others == "none" else 0)
        assert totals.unknown == (0 if others == "none" else billed)
        assert totals.failed == len(seen) - billed
        assert _spent(ledger) - before >= proxy.owed(PRICE)
        if others == "none":
            assert _spent(ledger) - before == proxy.owed(PRICE, told=True)
    tally["faulty answers"] += len(seen)


FEW = (
    "408",
    "429, wait 0",
    "500",
    "closed before",
    "cut in the body",
    "endless drip",
    "reset after",
    "silence after",
)


def test_for_good(
    proxy: FaultProxy, tmp_path: Path, truths: dict[int, ScoreResult], tally: Counter[str], long: bool
) -> None:
    """Faults that would pass but do not."""
    truth = _truth(1, proxy, truths)
    for number, name in enumerate(sorted(TRANSIENT) if long else FEW):
        fault = FAULTS[name]
        _met(name, lambda *_, fault=fault: fault, proxy, tmp_path / f"{number}.db", truth, "failed")  # type: ignore[misc]
        tally["faulty answers"] += proxy.met[name]
        tally["failed"] += 1


def test_connection_refused(proxy: FaultProxy, tmp_path: Path, tally: Counter[str]) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        meter = _meter(_backend(proxy), ledger)
        meter.score([review(0)], stage="s")
        spent = _spent(ledger)
        proxy.hang_up()
        [result] = meter.score([review(1)], stage="s")
        assert result.error is not None
        assert "connection" in result.error
        assert _spent(ledger) == spent, "a call that never left was counted as spent"
        proxy.listen()
        [result] = meter.score([review(1)], stage="s")
        assert result.error is None
    tally["faulty answers"] += 1


def test_a_second_copy_of_an_answer_is_never_taken_for_the_next_one(
    proxy: FaultProxy, truths: dict[int, ScoreResult]
) -> None:
    right = [_truth(number, proxy, truths) for number in range(1, 9)]
    proxy.plan = lambda request, arrival: FAULTS["told twice"]
    meter = Meter(_backend(proxy, concurrency=1), None, role="target", run="r")
    results = meter.score([review(number) for number in range(9)], stage="s")[1:]
    assert [result.logprobs for result in results] == [result.logprobs for result in right]


MIXED = [
    name
    for name, (outcome, _) in OUTCOMES.items()
    if outcome != "stopped" and name not in ("none", "429, wait 1", "endless drip")
]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_bill_under_every_fault_at_once(
    proxy: FaultProxy, tmp_path: Path, seed: int, tally: Counter[str], long: bool
) -> None:
    """Many calls, most of them disturbed, under a limit on money; asked again until all are answered.

    Charges that the client was told of are in the books to the last digit. Those it could not know of are covered by
    what was set aside for them.
    """
    _one_bill(proxy, tmp_path / f"{seed}.db", seed, 150 if long else 25, tally)


def _one_bill(proxy: FaultProxy, path: Path, seed: int, n: int, tally: Counter[str]) -> None:
    proxy.plan = Once()
    proxy.bill.clear()
    proxy.met.clear()
    requests = [review(number) for number in range(n)]
    with Ledger(path) as ledger:
        limits = Limits(max_money=Decimal(5))
        meter = _meter(_backend(proxy, concurrency=16, max_tries=4), ledger, limits)
        meter.score(requests[:1], stage="s")
        proxy.plan = Schedule(seed, MIXED, 0.6)
        answers: list[ScoreResult] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for _ in range(12):
                try:
                    answers = meter.score(requests, stage="s")
                except RetryableBackendError:
                    continue  # many calls in a row failed: to the backend the server is down
                _settle(proxy)
                if all(answer.error is None for answer in answers):
                    break
        _settle(proxy)
        totals = ledger.totals()
        bill, known, books = proxy.owed(PRICE), proxy.owed(PRICE, told=True), _spent(ledger)
    assert answers
    assert totals.open == 0
    assert bill <= books <= 5
    assert known <= books
    tally["faulty answers"] += sum(count for name, count in proxy.met.items() if name != PASS.name)
    tally["calls"] += sum(proxy.met.values())
    tally["cents on the bill x 1000"] += round(bill * 100_000)
    tally["cents in the books x 1000"] += round(books * 100_000)
    tally["overspent"] += max(0, round((bill - 5) * 100))


def test_a_limit_on_money_is_never_passed(
    proxy: FaultProxy, tmp_path: Path, tally: Counter[str], long: bool
) -> None:
    """One limit after another, under faults; the provider's bill stays below each."""
    with Ledger(tmp_path / "probe.db") as ledger:
        _meter(_backend(proxy), ledger).score([review(0)], stage="s")
        one = _spent(ledger)
    for trial in range(10 if long else 3):
        proxy.plan = Schedule(100 + trial, MIXED, 0.4)
        proxy.bill.clear()
        cap = (1 + (6 if long else 12) * trial) * one
        limits = Limits(max_money=Decimal(cap.numerator) / Decimal(cap.denominator))
        with Ledger(tmp_path / f"{trial}.db") as ledger, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            meter = _meter(_backend(proxy, concurrency=16), ledger, limits)
            for number in range(0, 60, 15):
                try:
                    meter.score([review(k) for k in range(number, number + 15)], stage="s")
                except (BudgetExceededError, RetryableBackendError):
                    continue
            _settle(proxy)
            assert proxy.owed(PRICE) <= _spent(ledger) <= cap
        tally["limits"] += 1


def test_a_second_copy_ends_a_run_on_connections_that_are_the_users(proxy: FaultProxy) -> None:
    with openai.OpenAI(base_url=proxy.url, api_key="any") as client:
        backend = OpenAIBackend("smol", client=client, concurrency=1)
        proxy.plan = lambda request, arrival: FAULTS["told twice"]
        meter = Meter(backend, None, role="target", run="r")
        with pytest.raises(BackendError, match="an answer to another request was delivered again"):
            meter.score([review(number) for number in range(4)], stage="s")
