"""The meter: what is recorded is not bought again, and what is bought is recorded before anything else."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyprompt._purchase import GENERATE, SCORE
from proxyprompt.backends.base import (
    GenerateRequest,
    GenerateResult,
    Message,
    OnSend,
    OnTokens,
    ScoreRequest,
    ScoreResult,
    Usage,
    announce_soon,
)
from proxyprompt.errors import BackendError, BudgetExceededError, InputError, LedgerCorruptError, LedgerError
from proxyprompt.ledger import Answer, Ledger, Limits, request_key
from proxyprompt.metering import Meter
from proxyprompt.prices import FREE, own_price

IDENTITY = {"model": "fake"}
PRICE = own_price(input=1_000, output=10_000, cached_input=100)
Block = Sequence[tuple[Any, ScoreResult]]


def answer_to(request: ScoreRequest) -> ScoreResult:
    values = tuple(-(len(request.prompt) + len(candidate)) / 7 for candidate in request.candidates)
    return ScoreResult(values, (False,) * len(values), Usage(10, 1, 2), None, "fake-1")


class FakeScorer:
    """Answers in blocks; ``before`` runs when a block is asked for, ``change`` may spoil a block."""

    name = "fake"
    identity: Mapping[str, Any] = IDENTITY

    def __init__(
        self,
        block: int = 2,
        before: Callable[[int], None] | None = None,
        change: Callable[[int, Block], Block] | None = None,
    ) -> None:
        self.block, self.before, self.change = block, before, change
        self.sent: list[ScoreRequest] = []
        self.closed = 0
        self.on_send: OnSend | None = None

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Block]:
        assert on_send is not None
        self.on_send = on_send
        # Backwards: the order of the answers is the backend's own business.
        order = np.arange(len(requests))[::-1]
        try:
            for number, start in enumerate(range(0, len(order), self.block)):
                chunk = order[start : start + self.block]
                if self.before is not None:
                    self.before(number)
                on_send(chunk)
                self.sent += [requests[index] for index in chunk]
                if on_tokens is not None:
                    on_tokens(10 * len(chunk))
                block: Block = [(index, answer_to(requests[index])) for index in chunk]
                yield block if self.change is None else self.change(number, block)
        finally:
            self.closed += 1


class FakeGenerator:
    name = "writer"
    identity: Mapping[str, Any] = IDENTITY

    def __init__(self) -> None:
        self.calls = 0

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, GenerateResult]]]:
        assert on_send is not None
        on_send(range(len(requests)))
        self.calls += len(requests)
        yield [(i, GenerateResult(f"text {one.prompt}", Usage(3, 4))) for i, one in enumerate(requests)]


def requests_of(*numbers: int) -> list[ScoreRequest]:
    return [ScoreRequest("x" * number, (" a", " bc")) for number in numbers]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "l.db") as opened:
        yield opened


def target(backend: Any, ledger: Ledger | None, **more: Any) -> Meter:
    return Meter(backend, ledger, role="target", run="r", **more)


def test_the_second_run_buys_nothing_and_gives_the_same(tmp_path: Path) -> None:
    requests = requests_of(5, 3, 3, 1, 4, 5, 5)
    tokens: list[int] = []
    steps: list[tuple[int, int]] = []
    with Ledger(tmp_path / "l.db") as ledger:
        backend = FakeScorer()
        meter = target(backend, ledger, on_tokens=tokens.append)
        first = meter.score(requests, stage="a", progress=lambda *step: steps.append(step))
        assert first == [answer_to(request) for request in requests]
        assert len(backend.sent) == 4
        assert sum(tokens) == 40
        assert steps == [(0, 7), (2, 7), (7, 7)]
        stats = meter.stats
        assert (stats.requested, stats.deduplicated, stats.reused, stats.bought) == (7, 3, 0, 4)
        assert (stats.prompt_tokens_bought, stats.completion_tokens_bought) == (40, 4)
        assert stats.by_stage["a"].bought == 4
        assert stats.seconds > 0
    with Ledger(tmp_path / "l.db") as ledger:
        backend = FakeScorer()
        meter = target(backend, ledger, limits=Limits(max_calls=0))
        assert meter.score(requests, stage="b", progress=lambda *step: steps.append(step)) == first
        assert backend.sent == []
        assert steps[3:] == [(7, 7)]
        stats = meter.stats
        assert (stats.requested, stats.deduplicated, stats.reused, stats.bought) == (7, 3, 4, 0)
        assert (stats.prompt_tokens_reused, stats.prompt_tokens_bought) == (40, 0)
        assert ledger.totals(role="target").done == 4


def test_repeat_and_identity_ask_anew(ledger: Ledger) -> None:
    backend = FakeScorer()
    meter = target(backend, ledger)
    meter.score(requests_of(1), stage="a")
    meter.score(requests_of(1), stage="a", repeat=1)
    meter.score(requests_of(1), stage="a", repeat=1)
    assert len(backend.sent) == 2
    backend.identity = {"model": "other"}
    meter.score(requests_of(1), stage="a")
    assert len(backend.sent) == 3


def test_every_block_is_durable_before_the_next_one_is_asked_for(ledger: Ledger) -> None:
    seen: list[tuple[int, int, int]] = []

    def before(number: int) -> None:
        # A second connection sees committed rows only.
        with Ledger(ledger.path, create=False) as other:
            totals = other.totals()
            stored = other.lookup([request_key(IDENTITY, "score", one, {}) for one in backend.sent])
            seen.append((number, totals.done, totals.open))
            assert len(stored) == totals.done == len(backend.sent)

    backend = FakeScorer(block=3, before=before)
    target(backend, ledger).score(requests_of(*range(10)), stage="a")
    assert seen == [(0, 0, 10), (1, 3, 7), (2, 6, 4), (3, 9, 1)]


def test_requests_are_marked_sent_before_they_leave(ledger: Ledger) -> None:
    def change(number: int, block: Block) -> Block:
        with Ledger(ledger.path, create=False) as other, other._file.use("read") as connection:
            rows = connection.execute("SELECT state, count(*) FROM attempt GROUP BY state").fetchall()
        assert dict(rows).get("sent") == len(block)
        return block

    target(FakeScorer(change=change), ledger).score(requests_of(1, 2, 3), stage="a")


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["before", "after"])
def test_after_an_interruption_only_the_rest_is_bought(
    ledger: Ledger, error: BaseException, where: str
) -> None:
    def fail(number: int, block: Block = ()) -> Block:
        if number == 2:
            raise error
        return block

    backend = FakeScorer(before=fail) if where == "before" else FakeScorer(change=fail)  # type: ignore[arg-type]
    requests = requests_of(*range(10))
    with pytest.raises(type(error)):
        target(backend, ledger).score(requests, stage="a")
    assert backend.closed == 1
    totals = ledger.totals()
    # Sent but unanswered: unknown. Not sent: as if never asked.
    assert (totals.done, totals.unknown, totals.open) == (4, 0 if where == "before" else 2, 0)
    again = FakeScorer()
    assert target(again, ledger).score(requests, stage="a") == [answer_to(one) for one in requests]
    assert len(again.sent) == 6
    kept = backend.sent[:4]
    assert not set(kept) & set(again.sent)


def test_an_interruption_with_an_answer_in_hand_does_not_lose_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Ledger.write, []

    def interrupted(self: Ledger, *args: Any, **more: Any) -> tuple[int, int]:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, *args, **more)

    monkeypatch.setattr(Ledger, "write", interrupted)
    backend = FakeScorer()
    with pytest.raises(KeyboardInterrupt):
        target(backend, ledger).score(requests_of(1, 2, 3, 4, 5), stage="a")
    assert (len(backend.sent), ledger.totals().done, ledger.totals().unknown) == (4, 4, 0)


def test_a_progress_bar_may_stop_the_batch(ledger: Ledger) -> None:
    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    backend = FakeScorer()
    with pytest.raises(KeyboardInterrupt):
        target(backend, ledger).score(requests_of(*range(9)), stage="a", progress=stop)
    assert (ledger.totals().done, ledger.totals().open, backend.closed) == (4, 0, 1)


def test_a_ledger_that_cannot_store_stops_the_spending(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Ledger, *args: Any, **more: Any) -> None:
        raise LedgerError("disk full")

    monkeypatch.setattr(Ledger, "write", full)
    backend = FakeScorer()
    with pytest.raises(LedgerError, match="disk full"):
        target(backend, ledger).score(requests_of(*range(9)), stage="a")
    assert len(backend.sent) == 2


def test_failed_results_are_returned_counted_and_asked_again(ledger: Ledger) -> None:
    def spoil(number: int, block: Block) -> Block:
        return [(index, ScoreResult((None, None), (), Usage(5), "refused")) for index, _ in block]

    meter = target(FakeScorer(change=spoil), ledger)
    results = meter.score(requests_of(1, 2, 2), stage="a")
    assert [one.error for one in results] == ["refused"] * 3
    assert (meter.stats.failed, meter.stats.bought, meter.stats.deduplicated) == (2, 0, 1)
    assert (ledger.totals().failed, ledger.totals().prompt_tokens) == (2, 10)
    again = FakeScorer()
    results = target(again, ledger).score(requests_of(1, 2, 2), stage="a")
    assert [one.error for one in results] == [None] * 3
    assert len(again.sent) == 2


# --- a backend that breaks its contract -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message", "kept"),
    [
        (lambda n, block: [*block, block[0]], "answered request 4 twice", 2),
        (lambda n, block: block if n == 0 else [(4, block[0][1])], "answered request 4 twice", 2),
        (lambda n, block: [block[0], (5, block[1][1])], "named request 5 of a batch of 5", 1),
        (lambda n, block: [(-1, block[0][1])], "named request -1", 0),
        (lambda n, block: [("0", block[0][1])], "named request '0'", 0),
        (lambda n, block: block[:1], "answered 3 of 5 requests; the first one missing is number 1", 3),
        (lambda n, block: [(i, ScoreResult((-1.0,))) for i, _ in block], "1 logprobs and 0 marks for 2", 0),
        (lambda n, block: [(i, ScoreResult((-1.0, math.nan))) for i, _ in block], "must be None", 0),
        (lambda n, block: [(i, ScoreResult(("x", None))) for i, _ in block], "invalid answer", 0),
    ],
)
def test_a_broken_contract_is_loud_and_loses_nothing(
    ledger: Ledger, change: Callable[[int, Block], Block], message: str, kept: int
) -> None:
    with pytest.raises(BackendError, match=message):
        target(FakeScorer(change=change), ledger).score(requests_of(*range(5)), stage="a")
    totals = ledger.totals()
    assert (totals.done, totals.open) == (kept, 0)


def test_sending_what_was_not_asked_is_refused(ledger: Ledger) -> None:
    class Eager(FakeScorer):
        def score(self, requests: Any, *, on_send: Any = None, on_tokens: Any = None) -> Iterator[Block]:
            on_send([1])
            yield []

    with pytest.raises(BackendError, match="named request 1 of a batch of 1"):
        target(Eager(), ledger).score(requests_of(1), stage="a")


def test_a_thread_that_outlives_its_batch_cannot_send(ledger: Ledger) -> None:
    backend = FakeScorer()
    target(backend, ledger).score(requests_of(1), stage="a")
    assert backend.on_send is not None
    with pytest.raises(BackendError, match="batch is over"):
        backend.on_send([0])


class Announcing(FakeScorer):
    """Announces request 0 so many times, and says so many of these calls may have been billed without an answer."""

    def __init__(
        self, times: int, uncertain: int, error: str | None = None, usage: Usage | None = None
    ) -> None:
        super().__init__()
        self.times, self.uncertain, self.error = times, uncertain, error
        self.usage = Usage(10, 5, 3) if usage is None else usage

    def score(self, requests: Any, *, on_send: Any = None, on_tokens: Any = None) -> Iterator[Block]:
        for _ in range(self.times):
            on_send([0])
        values = (None, None) if self.error else (-1.0, -2.0)
        yield [(0, ScoreResult(values, (), self.usage, self.error, uncertain=self.uncertain))]


@pytest.mark.parametrize(
    ("times", "uncertain", "error", "usage", "done", "failed", "unknown"),
    [
        (1, 0, None, Usage(10, 5, 3), 1, 0, 0),
        (3, 0, None, Usage(10, 5, 3), 3, 0, 0),  # three samples, their usage summed up
        (3, 2, None, Usage(10, 5, 3), 1, 0, 2),  # two retries after a time limit
        (1, 1, "no answer", Usage(), 0, 0, 1),
        (2, 1, "cut short", Usage(10, 5, 3), 0, 1, 1),  # one lost, one billed and unreadable
        (1, 0, "refused", Usage(), 0, 1, 0),
    ],
)
def test_every_announced_call_is_counted_once(
    ledger: Ledger,
    times: int,
    uncertain: int,
    error: str | None,
    usage: Usage,
    done: int,
    failed: int,
    unknown: int,
) -> None:
    meter = target(Announcing(times, uncertain, error, usage), ledger, price=PRICE)
    meter.score(requests_of(4), stage="a")
    totals = ledger.totals()
    assert (totals.done, totals.failed, totals.unknown, totals.open) == (done, failed, unknown, 0)
    assert (totals.prompt_tokens, totals.completion_tokens, totals.cached_tokens) == (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
    )
    # 7 plain tokens, 3 cached ones, 5 of the answer; an unknown call costs what was set aside: 20 bytes and overhead.
    billed = Decimal(7 * 1_000 + 3 * 100 + 5 * 10_000) / 10**6 if usage.prompt_tokens else Decimal(0)
    aside = Decimal((4 + 16) * 1_000 + 8 * 10_000) / 10**6
    assert sum(totals.money.values()) == billed + unknown * aside


def test_a_limit_stops_the_retry_that_would_pass_it(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceededError, match="max_calls=2"):
        target(Announcing(3, 2), ledger, limits=Limits(max_calls=2)).score(requests_of(1), stage="a")
    totals = ledger.totals()
    assert (totals.done, totals.unknown, totals.open) == (0, 2, 0)


def test_more_lost_calls_than_announced_ones_are_a_defect(ledger: Ledger) -> None:
    with pytest.raises(BackendError, match="says that 2 of 1 announced calls"):
        target(Announcing(1, 2, "lost"), ledger).score(requests_of(1), stage="a")


@pytest.mark.parametrize("usage", [Usage(10**30, 1), Usage(10**12, 1), Usage(-1, 1), Usage(1.5, 1), Usage()])  # type: ignore[arg-type]
def test_an_impossible_usage_loses_no_answer_and_costs_what_was_set_aside(
    ledger: Ledger, usage: Usage
) -> None:
    meter = target(Announcing(1, 0, usage=usage), ledger, price=PRICE)
    assert meter.score(requests_of(4), stage="a")[0].usage == Usage()
    totals = ledger.totals()
    assert (totals.done, totals.prompt_tokens) == (1, 0)
    assert totals.money == {"USD": Decimal("0.1")}


# --- texts, roles, limits -------------------------------------------------------------------------------


def test_a_limit_that_comes_later_counts_answers_without_a_usage(ledger: Ledger) -> None:
    target(Announcing(1, 0), ledger).score(requests_of(1), stage="a")
    target(Announcing(1, 0, usage=Usage()), ledger).score(requests_of(2), stage="a")
    target(Announcing(1, 1, "lost", usage=Usage()), ledger).score(requests_of(3), stage="a")
    target(Announcing(1, 0, "refused", usage=Usage()), ledger).score(requests_of(4), stage="a")
    target(FakeScorer(), ledger, price=PRICE, limits=Limits(max_money=1))
    one = Decimal(7 * 1_000 + 3 * 100 + 5 * 10_000) / 10**6
    assert ledger.totals().money == {"USD": 3 * one}


def test_a_price_beyond_all_limits_loses_no_answer(ledger: Ledger) -> None:
    meter = target(
        Announcing(1, 0, usage=Usage(10**8, 1)), ledger, price=own_price(input=10**6, output=10**6)
    )
    assert meter.score(requests_of(4), stage="a")[0].usage == Usage(10**8, 1)
    assert ledger.totals().money == {"USD": 10**6}


def test_texts_are_recorded_too(ledger: Ledger) -> None:
    backend = FakeGenerator()
    requests = [GenerateRequest("a"), GenerateRequest("a", 10), GenerateRequest("b"), GenerateRequest("a")]
    first = target(backend, ledger).generate(requests, stage="a")
    assert [one.text for one in first] == ["text a", "text a", "text b", "text a"]
    assert target(backend, ledger).generate(requests, stage="a") == first
    assert backend.calls == 3


def test_the_text_of_requests_is_kept_for_targets_only(ledger: Ledger) -> None:
    (request,) = requests_of(3)
    key = request_key(IDENTITY, "score", request, {})
    Meter(FakeScorer(), ledger, role="proxy", run="r").score([request], stage="a")
    assert ledger.lookup([key])[key].request is None
    target(FakeScorer(), ledger).score([request], stage="a", repeat=1)
    key = request_key(IDENTITY, "score", request, {}, 1)
    assert '"prompt":{"text":"xxx"}' in (ledger.lookup([key])[key].request or "")
    assert [ledger.totals(role=role).done for role in ("target", "proxy")] == [1, 1]


def test_a_passed_limit_sends_nothing(ledger: Ledger) -> None:
    backend = FakeScorer()
    meter = target(backend, ledger, limits=Limits(max_calls=3))
    meter.score(requests_of(1, 2), stage="a")
    with pytest.raises(BudgetExceededError, match="spent or reserved 2 and asks for 2 more"):
        meter.score(requests_of(1, 2, 3, 4), stage="a")
    assert (len(backend.sent), ledger.totals().open) == (2, 0)
    meter.score(requests_of(1, 2, 3), stage="a")
    assert len(backend.sent) == 3


def test_token_limits_use_the_backends_count_or_an_estimate(ledger: Ledger) -> None:
    class Counting(FakeScorer):
        def plan(self, requests: Any) -> None: ...

        def count_tokens(self, prompt: Any) -> int:
            return 50

    with pytest.raises(BudgetExceededError, match="asks for 104 more"):
        target(Counting(), ledger, limits=Limits(max_tokens=103)).score(requests_of(1, 2), stage="a")
    chat = ScoreRequest((Message("system", "x" * 30), Message("user", "é" * 15)), (" a",))
    with pytest.raises(BudgetExceededError, match="asks for 23 more"):
        target(FakeScorer(), ledger, limits=Limits(max_tokens=22)).score([chat], stage="a")
    with pytest.raises(BudgetExceededError, match="asks for 41 more"):
        target(FakeGenerator(), ledger, limits=Limits(max_tokens=40)).generate(
            [GenerateRequest("x", 40)], stage="a"
        )
    # The plan fits, but the call itself is sent only if it fits at one token a byte: 60, the answer, and overhead.
    most = 60 + 256 + 2 * 16 + 8
    with pytest.raises(BudgetExceededError, match=f"asks for {most} more"):
        target(FakeScorer(), ledger, limits=Limits(max_tokens=most - 1)).score([chat], stage="a")
    backend = FakeScorer()
    target(backend, ledger, limits=Limits(max_tokens=most)).score([chat], stage="a")
    assert (len(backend.sent), ledger.totals().open) == (1, 0)


def test_a_free_model_s_tokenizer_is_left_alone(ledger: Ledger) -> None:
    class Counting(FakeScorer):
        counted = 0

        def plan(self, requests: Any) -> None: ...

        def count_tokens(self, prompt: Any) -> int:
            self.counted += 1
            return 5

    backend = Counting()
    target(backend, ledger, limits=Limits(max_calls=9), price=FREE).score(requests_of(1, 2), stage="a")
    assert backend.counted == 0
    target(backend, ledger, limits=Limits(max_tokens=99), price=FREE).score(requests_of(3), stage="a")
    assert backend.counted > 0


def test_eight_threads_never_overspend(ledger: Ledger) -> None:
    backends = [FakeScorer(block=1) for _ in range(8)]

    def work(me: int) -> None:
        meter = target(backends[me], ledger, limits=Limits(max_calls=25))
        for number in range(8):
            try:
                meter.score(requests_of(me * 100 + number), stage="a")
            except BudgetExceededError:
                break

    threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(one.sent) for one in backends) == ledger.totals().done == 25


def test_without_a_ledger_everything_is_asked_and_nothing_kept() -> None:
    backend = FakeScorer()
    meter = target(backend, None)
    for _ in range(2):
        assert meter.score(requests_of(1, 1, 2), stage="a")[2] == answer_to(requests_of(2)[0])
    assert (len(backend.sent), meter.stats.bought, meter.stats.deduplicated) == (4, 4, 2)
    assert meter.score([], stage="a") == []


def test_wrong_arguments_are_named(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="role='judge'"):
        Meter(FakeScorer(), ledger, role="judge", run="r")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="and a ledger"):
        target(FakeScorer(), None, limits=Limits(max_calls=1))
    with pytest.raises(InputError, match="gives text only"):
        target(FakeGenerator(), ledger).score(requests_of(1), stage="a")
    with pytest.raises(InputError, match="gives no text"):
        target(FakeScorer(), ledger).generate([GenerateRequest("a")], stage="a")


def test_a_body_of_another_version_is_not_guessed_at(ledger: Ledger) -> None:
    (request,) = requests_of(1)
    key = request_key(IDENTITY, "score", request, {})
    (attempt,) = ledger.reserve([key], run="r", stage="a", role="target", model="m")
    ledger.record([Answer(attempt, key, '{"values":[1]}')])
    with pytest.raises(LedgerCorruptError, match="intact but not understood"):
        target(FakeScorer(), ledger).score([request], stage="a")


# --- results as JSON ----------------------------------------------------------------------------------

LOGPROB = st.one_of(st.none(), st.floats(max_value=1e300, allow_nan=False, exclude_max=True))
USAGE = st.builds(Usage, *[st.integers(0, 2**40)] * 3)
ANY_TEXT = st.one_of(st.text(), st.text(alphabet=list('a"\\\x00😀\ud83d\ude00'), max_size=4))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(LOGPROB, st.booleans()), max_size=5), st.booleans(), USAGE, st.none() | ANY_TEXT)
def test_scores_come_back_exactly(
    pairs: list[tuple[float | None, bool]], marked: bool, usage: Usage, model: str | None
) -> None:
    marks = tuple(mark for _, mark in pairs) if marked else ()
    result = ScoreResult(tuple(value for value, _ in pairs), marks, usage, None, model)
    body = SCORE.encode(ScoreRequest("", ("",) * len(pairs)), result)
    back = SCORE.decode(body, usage, model)
    assert back == result
    assert str(back.logprobs) == str(result.logprobs)  # tells -0.0 from 0.0


@settings(max_examples=200, deadline=None)
@given(st.none() | ANY_TEXT, USAGE)
def test_texts_come_back_exactly(text: str | None, usage: Usage) -> None:
    result = GenerateResult(text, usage)
    assert GENERATE.decode(GENERATE.encode(GenerateRequest(""), result), usage, None) == result


# --- what leaves next, marked together with what has come back ----------------------------------------------


class Foresighted(FakeScorer):
    """Says before each block what leaves after it; ``stop_at`` ends the batch there."""

    def __init__(self, ledger: Ledger, stop_at: int | None = None) -> None:
        super().__init__()
        self.ledger, self.stop_at = ledger, stop_at
        self.states: list[dict[str, int]] = []

    def look(self) -> None:
        with Ledger(self.ledger.path, create=False) as other, other._file.use("read") as connection:
            rows = connection.execute("SELECT state, count(*) FROM attempt GROUP BY state").fetchall()
        self.states.append(dict(rows))

    def score(self, requests: Any, *, on_send: Any = None, on_tokens: Any = None) -> Iterator[Block]:
        for start in range(0, len(requests), 2):
            self.look()
            if start == self.stop_at:
                raise RuntimeError("stopped")
            on_send([start, start + 1])
            self.look()
            block = [(i, answer_to(requests[i])) for i in (start, start + 1)]
            announce_soon(on_send, range(start + 2, min(start + 4, len(requests))))
            yield block


def test_what_leaves_next_is_marked_in_the_commit_of_what_came_back(ledger: Ledger) -> None:
    seen: list[str] = []
    with ledger._file.use("read") as connection:
        connection.set_trace_callback(lambda s: seen.append(s) if s == "COMMIT" else None)
    backend = Foresighted(ledger)
    requests = requests_of(*range(8))
    assert target(backend, ledger, price=PRICE).score(requests, stage="a") == [answer_to(r) for r in requests]
    # Reserved, sent; then each block with the next one's mark; nothing is done later than before.
    assert backend.states[2] == {"done": 2, "sent": 2, "reserved": 4}
    assert backend.states[3] == backend.states[2]
    assert len(seen) == 2 + 4
    assert (ledger.totals().done, ledger.totals().unknown) == (8, 0)


def test_what_was_marked_and_never_left_is_not_spent(ledger: Ledger) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        target(Foresighted(ledger, stop_at=4), ledger).score(requests_of(*range(8)), stage="a")
    totals = ledger.totals()
    assert (totals.done, totals.unknown, totals.open) == (4, 0, 0)


def test_what_does_not_fit_is_not_marked_ahead_and_the_answer_is_kept(ledger: Ledger) -> None:
    # A call takes at most 24 tokens and one for each byte, and 11 in the end: 22 + 26 + 27 is one too many.
    backend = Foresighted(ledger)
    with pytest.raises(BudgetExceededError, match="max_tokens"):
        target(backend, ledger, limits=Limits(max_tokens=74)).score(requests_of(*range(6)), stage="a")
    totals = ledger.totals()
    assert (totals.done, totals.unknown, totals.open) == (2, 0, 0)
    assert backend.states[2] == {"done": 2, "reserved": 4}
