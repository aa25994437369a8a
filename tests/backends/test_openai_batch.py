"""Provider batches against a real HTTP server with files and batches, in front of a real model."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner
from llama import llama_server

from proxyprompt._journal import LedgerJournal, MemoryJournal
from proxyprompt.backends.base import GenerateRequest, Message, ScoreRequest
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.cli import main
from proxyprompt.errors import BackendError, InputError, RetryableBackendError
from proxyprompt.ledger import Ledger, request_key
from proxyprompt.metering import Meter
from proxyprompt.prices import own_price

from .batch_server import BatchServer, batch_server
from .contract import check_score_result, in_order
from .scripted_server import scripted_server

LABELS = (" positive", " negative")
SHOTS = "Review: a dull film\nSentiment: negative\n\nReview: a great film\nSentiment: positive\n\n"
REVIEWS = ["truly wonderful", "a boring waste of time", "I hated it", "a joy", "so slow", "what a gem"]
REQUESTS = [ScoreRequest(f"{SHOTS}Review: {review}\nSentiment:", LABELS) for review in REVIEWS]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary-key-7c1f")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    yield from llama_server(repeatable=True)


@pytest.fixture
def account(llama: str) -> Iterator[BatchServer]:
    with batch_server(llama) as server:
        yield server


def batched(account: BatchServer, **options: Any) -> OpenAIBackend:
    options = {"batch_poll": 0.02, **options}
    return OpenAIBackend("smol", base_url=account.url, batch=True, **options)


def meter(account: BatchServer, ledger: Ledger, **options: Any) -> Meter:
    return Meter(batched(account, **options), ledger, role="target", run="r")


class TestRealModel:
    def test_a_batch_gives_what_single_calls_give(self, account: BatchServer, llama: str) -> None:
        account.looks = 3
        sent: list[int] = []
        results = in_order(batched(account).score(REQUESTS, on_send=sent.extend), len(REQUESTS))
        single = in_order(OpenAIBackend("smol", base_url=llama).score(REQUESTS), len(REQUESTS))
        for request, one, other in zip(REQUESTS, results, single, strict=True):
            check_score_result(request, one)
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-3)
            assert one.model_returned == "smol"
            assert one.usage.prompt_tokens == other.usage.prompt_tokens
        assert sorted(sent) == list(range(len(REQUESTS)))
        assert len(account.live) == 1  # the first question finds out what the server gives
        assert [len(content.splitlines()) for content in list(account.files.values())[:1]] == [5]
        [made] = account.batches.values()
        assert (made["endpoint"], made["completion_window"]) == ("/v1/completions", "24h")

    def test_texts_and_two_endpoints(self, account: BatchServer, llama: str) -> None:
        turns = [
            (Message("user", f"What is the capital of {land}? One word."),)
            for land in ("France", "Italy", "Spain")
        ]
        requests = [
            *(GenerateRequest(t, 8) for t in turns),
            *(GenerateRequest(r.prompt, 3, ("\n",)) for r in REQUESTS),
        ]
        results = in_order(batched(account).generate(requests), len(requests))
        single = in_order(OpenAIBackend("smol", base_url=llama).generate(requests), len(requests))
        assert [r.text for r in results] == [r.text for r in single]
        assert sorted(b["endpoint"] for b in account.batches.values()) == [
            "/v1/chat/completions",
            "/v1/completions",
        ]
        assert len(account.live) == 2

    @pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
    def test_clients_of_the_user(self, account: BatchServer, kind: Any) -> None:
        client = kind(base_url=account.url, api_key="any")
        backend = OpenAIBackend("smol", client=client, batch=True, batch_poll=0.02)
        assert all(r.error is None for r in in_order(backend.score(REQUESTS[:3]), 3))
        if kind is openai.OpenAI:
            client.close()
        else:
            backend._connection.submit(client.close()).result()

    def test_batches_are_no_larger_than_allowed(self, account: BatchServer) -> None:
        results = in_order(batched(account, batch_size=2).score(REQUESTS), len(REQUESTS))
        assert all(r.error is None for r in results)
        assert len(account.batches) == 3  # of 2, 2 and 1, after one question at once

    def test_samples_are_lines_where_the_server_makes_one_at_a_time(self, account: BatchServer) -> None:
        backend = batched(account, evidence="texts", repeats=3)
        results = in_order(backend.score(REQUESTS[:3]), 3)
        for result in results:
            assert (result.evidence, result.error) == ("texts", None)
            assert result.samples == 3
        assert account.lines_run == 6


class TestResuming:
    def test_a_later_process_collects_and_sends_nothing(self, account: BatchServer, tmp_path: Path) -> None:
        account.looks = 10**9
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            first = meter(account, ledger, batch_wait=0.05)
            with pytest.raises(
                RetryableBackendError, match=r"5 requests are still under way in 1 batches \(batch_1\)"
            ):
                first.score(REQUESTS, stage="s")
            files, calls = len(account.files), len(account.live)
            mode = stat.S_IMODE(ledger.path.stat().st_mode)
            assert mode == 0o600
        account.looks = 1
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            results = meter(account, ledger).score(REQUESTS, stage="s")
            assert all(r.error is None for r in results)
            totals = ledger.totals(run="r")
            # Nothing is counted twice: each request was sent once.
            assert (totals.done, totals.unknown, totals.open) == (6, 0, 0)
            assert (totals.taken_over, totals.failed) == (5, 0)
            assert LedgerJournal(ledger, "x", []).read() == {}
        assert (len(account.batches), len(account.live)) == (1, calls)
        assert len(account.files) == files + 1  # the output
        assert account.lines_run == 5

    @pytest.mark.parametrize("mode", ["full", "hash", "encrypted"])
    def test_what_is_under_way_is_private_where_the_ledger_is(
        self, account: BatchServer, tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PROXYPROMPT_LEDGER_KEY", "ab" * 32)
        path = tmp_path / "l.db"
        account.looks = 10**9
        backend = batched(account, batch_wait=0.05)
        keys = [request_key(backend.identity, "score", request, {}) for request in REQUESTS]
        with Ledger(path, store=mode) as ledger:
            with pytest.raises(RetryableBackendError):
                Meter(backend, ledger, role="target", run="r").score(REQUESTS, stage="s")
            content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
            with ledger.transaction() as connection:
                [(entry,)] = connection.execute("SELECT entry FROM journal").fetchall()
        traces = [*(k.encode() for k in keys), *map(bytes.fromhex, keys), *(r.encode() for r in REVIEWS)]
        found = [trace for trace in traces if trace in content]
        assert bool(found) == (mode == "full")
        assert sum(key in entry for key in keys) == (5 if mode == "full" else 0)
        # A later process finds what is under way all the same, and sends nothing.
        account.looks = 1
        with Ledger(path) as ledger:
            assert all(r.error is None for r in meter(account, ledger).score(REQUESTS, stage="s"))
            totals = ledger.totals(run="r")
            assert (totals.done, totals.unknown, totals.open) == (6, 0, 0)
        assert (len(account.batches), account.lines_run, len(account.live)) == (1, 5, 1)

    @pytest.mark.parametrize("mode", ["full", "hash", "encrypted"])
    def test_a_batch_that_an_earlier_version_wrote_down_is_collected(
        self, account: BatchServer, tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second schema named requests by their plain keys, in its journal and to the provider."""
        monkeypatch.setenv("PROXYPROMPT_LEDGER_KEY", "ab" * 32)
        account.looks = 10**9

        class Plain(LedgerJournal):
            def __init__(self, ledger: Ledger, owner: str, keys: Any) -> None:
                super().__init__(ledger, owner, keys)
                self.keys, self.former_keys = list(keys), ()

            def take_over(self, indices: Any) -> None:
                assert not indices

        with Ledger(tmp_path / "l.db", store=mode) as ledger, monkeypatch.context() as patch:
            patch.setattr("proxyprompt.metering.LedgerJournal", Plain)
            with pytest.raises(RetryableBackendError):
                meter(account, ledger, batch_wait=0.05).score(REQUESTS, stage="s")
        account.looks = 1
        with Ledger(tmp_path / "l.db") as ledger:
            # Some now, in another order, and the rest later.
            for some in (REQUESTS[4:2:-1], REQUESTS):
                assert all(r.error is None for r in meter(account, ledger).score(some, stage="s"))
            totals = ledger.totals(run="r")
            assert (totals.done, totals.taken_over, totals.unknown, totals.open) == (6, 5, 0, 0)
            with ledger.transaction() as connection:
                assert connection.execute("SELECT count(*) FROM journal").fetchone() == (0,)
        assert (len(account.batches), account.lines_run, len(account.live)) == (1, 5, 1)

    def test_a_clock_that_was_wrong_loses_no_batch(
        self, account: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Sent by a machine that took the year for 1970; others ask for something else before it is collected."""
        account.looks = 10**9
        with Ledger(tmp_path / "l.db") as ledger:
            with monkeypatch.context() as patch:
                patch.setattr("proxyprompt.backends._openai_batch.time.time", lambda: 5.0)
                with pytest.raises(RetryableBackendError):
                    meter(account, ledger, batch_wait=0.05).score(REQUESTS, stage="s")
            account.looks = 1
            other = [ScoreRequest(f"{SHOTS}Review: {n}\nSentiment:", LABELS) for n in range(2)]
            assert all(r.error is None for r in meter(account, ledger).score(other, stage="s"))
            assert all(r.error is None for r in meter(account, ledger).score(REQUESTS, stage="s"))
        # The second one is for the other requests, of which the first finds out what the server can.
        assert (len(account.batches), account.lines_run) == (2, 5 + 1)

    def test_a_process_that_is_killed_while_it_waits(self, account: BatchServer, tmp_path: Path) -> None:
        account.looks = 10**9
        script = (
            "import sys\nfrom tests.backends.test_openai_batch import *\n"
            "ledger = Ledger(sys.argv[1])\n"
            "b = OpenAIBackend('smol', base_url=sys.argv[2], batch=True, batch_poll=0.05)\n"
            "Meter(b, ledger, role='target', run='r').score(REQUESTS, stage='s')\n"
        )
        root = Path(__file__).parents[2]
        path = os.pathsep.join(map(str, [root / "src", root, root / "tests" / "support"]))
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "l.sqlite"), account.url],
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            deadline = time.monotonic() + 60
            while not any(b["looks"] > 1 for b in list(account.batches.values())):
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        account.looks = 1
        with Ledger(tmp_path / "l.sqlite") as ledger:
            results = meter(account, ledger).score(REQUESTS, stage="s")
            assert all(r.error is None for r in results)
            totals = ledger.totals(run="r")
            assert (totals.done, totals.unknown, totals.open) == (6, 0, 0)
        assert (len(account.batches), account.lines_run, len(account.live)) == (1, 5, 1)

    def test_a_creation_whose_answer_was_lost_is_found(
        self, account: BatchServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("proxyprompt.backends._openai_connection._FIRST_PAUSE", 0.01)
        account.cut_creation = 1
        results = in_order(batched(account).score(REQUESTS), len(REQUESTS))
        assert all(r.error is None for r in results)
        assert (len(account.batches), account.lines_run) == (1, 5)

    def test_so_is_one_whose_sender_died_before_it_could_note_it(self, account: BatchServer) -> None:
        keys = [f"{k:064x}" for k in range(len(REQUESTS))]
        journal = MemoryJournal(keys)
        account.looks = 10**9
        with pytest.raises(RetryableBackendError):
            list(batched(account, batch_wait=0.01).score(REQUESTS, journal=journal))
        [(name, entry)] = journal.read().items()
        journal.write(name, entry.replace('"batch":"batch_1"', '"batch":null'))
        account.looks = 1
        backend = batched(account)
        assert list(backend.under_way(journal)) == [1, 2, 3, 4, 5]
        results = in_order(backend.score(REQUESTS, journal=journal), len(REQUESTS))
        assert all(r.error is None for r in results)
        assert (len(account.batches), journal.read()) == (1, {})

    def test_what_another_call_asked_for_stays_in_the_journal(self, account: BatchServer) -> None:
        keys = [f"{k:064x}" for k in range(len(REQUESTS))]
        journal = MemoryJournal(keys)
        account.looks = 10**9
        with pytest.raises(RetryableBackendError):
            list(batched(account, batch_wait=0.01).score(REQUESTS, journal=journal))
        account.looks = 1
        journal.keys = keys[1:3]
        assert all(
            r.error is None for r in in_order(batched(account).score(REQUESTS[1:3], journal=journal), 2)
        )
        journal.keys = keys[3:]
        assert all(
            r.error is None for r in in_order(batched(account).score(REQUESTS[3:], journal=journal), 3)
        )
        assert (len(account.batches), account.lines_run, journal.read()) == (1, 5, {})

    def test_cancelling_by_the_ledger(self, account: BatchServer, tmp_path: Path) -> None:
        account.looks = 10**9
        with Ledger(tmp_path / "l.sqlite") as ledger:
            asking = meter(account, ledger, batch_wait=0.01)
            with pytest.raises(RetryableBackendError):
                asking.score(REQUESTS, stage="s")
            assert asking.cancel_batches() == ["batch_1"]
            assert all(r.error is None for r in asking.score(REQUESTS, stage="s"))
            assert asking.cancel_batches() == []
        assert len(account.batches) == 1

    def test_money_is_set_aside_at_the_price_that_is_paid(self, account: BatchServer, tmp_path: Path) -> None:
        price = own_price(input=1_000_000, output=0, batch_discount=0.5)
        with Ledger(tmp_path / "l.sqlite") as ledger:
            asking = Meter(batched(account), ledger, role="target", run="r", price=price)
            results = asking.score(REQUESTS, stage="s")
            first, *rest = [r.usage.prompt_tokens for r in results]
            assert ledger.totals(run="r").money["USD"] == first + sum(rest) / 2

    def test_cancelling(self, account: BatchServer) -> None:
        journal = MemoryJournal([f"{k:064x}" for k in range(len(REQUESTS))])
        account.looks = 10**9
        backend = batched(account, batch_wait=0.01)
        with pytest.raises(RetryableBackendError):
            list(backend.score(REQUESTS, journal=journal))
        assert backend.cancel(journal) == ["batch_1"]
        account.outcome = lambda number, line: "lose" if number > 1 else None
        results = dict(pair for block in batched(account).score(REQUESTS, journal=journal) for pair in block)
        assert [results[k].error is None for k in range(1, 6)] == [True, True, False, False, False]
        assert results[5].error == "the batch batch_1 is cancelled without an answer to it"
        assert backend.cancel(journal) == []


class TestFaults:
    def test_what_expired_is_sent_again(self, account: BatchServer, tmp_path: Path) -> None:
        account.outcome = lambda number, line: "expire" if len(account.batches) == 1 and number > 2 else None
        with Ledger(tmp_path / "l.sqlite") as ledger:
            results = meter(account, ledger).score(REQUESTS, stage="s")
            assert all(r.error is None for r in results)
            assert ledger.totals(run="r").done >= 6
        assert [len(f.splitlines()) for f in account.files.values() if b'"method"' in f] == [5, 2]

    def test_but_not_for_ever(self, account: BatchServer) -> None:
        account.outcome = lambda number, line: "expire"
        results = in_order(batched(account).score(REQUESTS[:3]), 3)
        assert [r.error is None for r in results] == [True, False, False]
        assert results[1].error == "This request could not be executed in time."
        assert len(account.batches) == 3

    def test_errors_of_single_requests(self, account: BatchServer) -> None:
        fates: list[int | str | None] = [400, 500, "lose", None, None]
        account.outcome = lambda number, line: fates[number] if len(account.batches) == 1 else None
        results = in_order(batched(account).score(REQUESTS), len(REQUESTS))
        assert [r.error for r in results] == [None, "HTTP 400: no luck with 400", None, None, None, None]
        assert len(account.batches) == 2  # 500 and the lost one again, 400 never

    def test_a_batch_that_is_refused_says_why(self, account: BatchServer) -> None:
        account.refuse = "Enqueued token limit reached"
        journal = MemoryJournal([f"{k:064x}" for k in range(len(REQUESTS))])
        got: list[Any] = []
        with pytest.raises(
            BackendError, match="refused the batch batch_1 of 5 requests: Enqueued token limit"
        ) as caught:
            got.extend(pair for block in batched(account).score(REQUESTS, journal=journal) for pair in block)
        assert "lower batch_size" in caught.value.hint
        answered = {index: result.error is None for index, result in got}
        assert (answered, journal.read()) == ({0: True, **dict.fromkeys(range(1, 6), False)}, {})

    @pytest.mark.parametrize("where", ["upload", "creation", "validation"])
    def test_what_was_refused_is_not_spent(self, account: BatchServer, tmp_path: Path, where: str) -> None:
        price = own_price(input=1_000_000, output=0)
        with Ledger(tmp_path / "l.sqlite") as ledger:
            asking = Meter(batched(account), ledger, role="target", run="r", price=price)
            [first] = asking.score(REQUESTS[:1], stage="s")
            if where == "validation":
                account.refuse = "Enqueued token limit reached"
            else:
                account.answers = {"files" if where == "upload" else "batches": 401}
            with pytest.raises(BackendError, match=r"HTTP 401|refused the batch"):
                asking.score(REQUESTS, stage="s")
            totals = ledger.totals(run="r")
            assert (totals.done, totals.failed, totals.unknown, totals.open) == (1, 5, 0, 0)
            assert totals.money["USD"] == first.usage.prompt_tokens
            # The right key, and the run goes on as if nothing had been.
            account.refuse, account.answers = None, {}
            assert all(r.error is None for r in asking.score(REQUESTS, stage="s"))
            assert ledger.totals(run="r").done == 6

    def test_an_upload_that_fails_for_load_is_not_spent_but_a_creation_may_be(
        self, account: BatchServer, tmp_path: Path
    ) -> None:
        for place, unknown in (("files", 0), ("batches", 5)):
            with Ledger(tmp_path / f"{place}.sqlite") as ledger:
                asking = meter(account, ledger, max_tries=1)
                asking.score(REQUESTS[:1], stage="s")
                account.answers = {place: 503}
                with pytest.raises(RetryableBackendError):
                    asking.score(REQUESTS, stage="s")
                assert ledger.totals(run="r").unknown == unknown
                account.answers = {}
                assert all(r.error is None for r in asking.score(REQUESTS, stage="s"))
                totals = ledger.totals(run="r")
                assert (totals.done, totals.unknown) == (6, 0)

    def test_nothing_is_sent_to_a_server_that_answers_nothing_readable(self) -> None:
        with scripted_server() as server:
            server.replies = [{"choices": []}]
            backend = OpenAIBackend("m", base_url=server.url, batch=True)
            with pytest.raises(
                BackendError, match="gave no usable answer to 3 requests; the batch of 3 was not sent"
            ):
                list(backend.score(REQUESTS))
            assert [path for path, _ in server.requests] == ["/v1/completions"] * 3

    def test_an_entry_of_another_version(self, account: BatchServer) -> None:
        journal = MemoryJournal(["0" * 64])
        journal.write("x", '{"new":1}')
        with pytest.raises(BackendError, match="entry 'x' is not understood"):
            list(batched(account).score(REQUESTS[:1], journal=journal))

    def test_decisions_take_no_batches(self, account: BatchServer) -> None:
        with pytest.raises(InputError, match="the decisions endpoint takes no batches"):
            batched(account, evidence=("decisions", "texts"))


class TestOddResults:
    """Result files as no one would wish them: what is paid is neither lost nor bought again in silence."""

    @pytest.fixture
    def upstream(self) -> Iterator[BatchServer]:
        with scripted_server() as server, batch_server(server.url) as account:
            server.reply = lambda body: {
                "choices": [{"text": body["prompt"] + "!", "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 1},
            }
            yield account

    def collect(self, account: BatchServer, spoil: Any, first_only: bool = False) -> list[Any]:
        work = account.work

        def spoiled(batch: dict[str, Any], status: str) -> None:
            work(batch, status)
            if not first_only or len(account.batches) == 1:
                spoil(batch)

        account.work = spoiled  # type: ignore[method-assign]
        self.journal = MemoryJournal([f"{k:064x}" for k in range(4)])
        requests = [GenerateRequest(f"p{k}", 8) for k in range(4)]
        return in_order(batched(account).generate(requests, journal=self.journal), 4)

    def lines(self, account: BatchServer, batch: dict[str, Any]) -> list[Any]:
        return [json.loads(line) for line in account.files[batch["output_file_id"]].splitlines()]

    def put(self, account: BatchServer, batch: dict[str, Any], lines: list[Any]) -> None:
        account.files[batch["output_file_id"]] = b"\n".join(json.dumps(line).encode() for line in lines)

    def check(self, account: BatchServer, results: list[Any]) -> None:
        assert [r.text for r in results] == ["p0!", "p1!", "p2!", "p3!"]
        assert (len(account.batches), account.lines_run, self.journal.read()) == (1, 3, {})

    def test_a_second_line_takes_nothing_away(self, upstream: BatchServer) -> None:
        def spoil(batch: dict[str, Any]) -> None:
            line = self.lines(upstream, batch)[0]
            line["response"] = {"status_code": 500, "body": {"error": {"message": "late"}}}
            batch["error_file_id"] = upstream.upload(json.dumps(line).encode())["id"]

        self.check(upstream, self.collect(upstream, spoil))

    @pytest.mark.parametrize("code", ["200", None])
    def test_statuses_as_text_or_not_at_all(self, upstream: BatchServer, code: Any) -> None:
        def spoil(batch: dict[str, Any]) -> None:
            lines = self.lines(upstream, batch)
            for line in lines:
                line["response"]["status_code"] = code
            self.put(upstream, batch, lines)

        self.check(upstream, self.collect(upstream, spoil))

    def test_strange_lines(self, upstream: BatchServer) -> None:
        def spoil(batch: dict[str, Any]) -> None:
            lines = [
                {"custom_id": "unknown", "response": {"status_code": 200, "body": {}}},
                None,
                [1],
                {"custom_id": 5},
            ]
            self.put(upstream, batch, self.lines(upstream, batch) + lines)
            upstream.files[batch["output_file_id"]] += b"\n" + b"[" * 100_000

        self.check(upstream, self.collect(upstream, spoil))

    @pytest.mark.parametrize("status", ["failed", "canceled", "cancelled", "expired"])
    def test_answers_of_a_batch_that_did_not_go_through(self, upstream: BatchServer, status: str) -> None:
        self.check(upstream, self.collect(upstream, lambda batch: batch.update(status=status)))

    def test_a_paid_answer_without_a_body_is_not_bought_again(self, upstream: BatchServer) -> None:
        def spoil(batch: dict[str, Any]) -> None:
            lines = self.lines(upstream, batch)
            lines[0]["response"]["body"] = None
            self.put(upstream, batch, lines)

        results = self.collect(upstream, spoil)
        assert [r.error for r in results] == [None, None, None, "HTTP 200: the batch gave no answer to it"]
        assert [r.uncertain for r in results] == [0, 0, 0, 1]
        assert len(upstream.batches) == 1

    @pytest.mark.parametrize("lasting", [False, True])
    def test_what_is_missing_may_have_been_billed(self, upstream: BatchServer, lasting: bool) -> None:
        def spoil(batch: dict[str, Any]) -> None:
            raw = upstream.files[batch["output_file_id"]]
            upstream.files[batch["output_file_id"]] = raw[: len(raw) // 2]

        results = self.collect(upstream, spoil, first_only=not lasting)
        # One more time, as often as paid_retries says, and both times in the books.
        assert len(upstream.batches) == 2
        assert [r.uncertain for r in results] == ([0, 2, 1, 0] if lasting else [0, 1, 1, 0])
        assert [r.error is None for r in results] == [True, not lasting, True, True]

    def test_a_batch_that_this_key_does_not_see_stays_in_the_journal(self, upstream: BatchServer) -> None:
        journal = MemoryJournal([f"{k:064x}" for k in range(5)])
        requests = [GenerateRequest(f"p{k}", 8) for k in range(5)]
        upstream.looks = 10**9
        with pytest.raises(RetryableBackendError):
            list(batched(upstream, batch_wait=0.01, batch_size=2).generate(requests, journal=journal))
        upstream.looks = 1
        hidden = upstream.batches.pop("batch_1")
        got: list[Any] = []
        with pytest.raises(
            BackendError, match=r"batch_1 of \d{4}-\d\d-\d\d, with 2 requests to collect, is gone"
        ) as caught:
            got.extend(p for block in batched(upstream).generate(requests, journal=journal) for p in block)
        assert "the key and the project that sent it" in caught.value.hint
        assert sorted(index for index, _ in got) == [0, 3, 4]  # the other batch was collected first
        # The right key again: nothing is bought twice.
        upstream.batches["batch_1"] = hidden
        assert all(
            r.error is None
            for r in in_order(batched(upstream).generate(requests[1:3], journal=_keyed(journal, 1)), 2)
        )
        assert (len(upstream.batches), upstream.lines_run, journal.read()) == (2, 4, {})

    def test_only_on_request_is_one_forgotten(self, upstream: BatchServer) -> None:
        def spoil(batch: dict[str, Any]) -> None:
            del upstream.files[batch["output_file_id"]]

        with pytest.raises(BackendError, match=r"is gone: .*No such File object: file-2"):
            self.collect(upstream, spoil)
        assert len(self.journal.read()) == 1
        assert batched(upstream).cancel(self.journal) == []
        assert self.journal.read() == {}

    def test_a_lost_creation_is_found_where_no_metadata_are_kept(
        self, upstream: BatchServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("proxyprompt.backends._openai_connection._FIRST_PAUSE", 0.01)
        create = upstream.create
        monkeypatch.setattr(upstream, "create", lambda body: create({**body, "metadata": None}))
        upstream.cut_creation = 1
        self.check(upstream, self.collect(upstream, lambda batch: None))

    def test_an_answer_that_is_no_batch(self, upstream: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(upstream, "look", lambda name: {"html": "sign in"})
        with pytest.raises(RetryableBackendError, match="nothing readable of the batch batch_1"):
            self.collect(upstream, lambda batch: None)
        assert len(self.journal.read()) == 1


def _keyed(journal: MemoryJournal, first: int) -> MemoryJournal:
    journal.keys = journal.keys[first : first + 2]
    return journal


def test_a_token_that_was_drawn_bounds_nothing() -> None:
    """A server that takes no temperature draws: the token it wrote may be far less likely than what it does not list."""
    listed = {" positive": -0.5, "other": -2.0, " zzz": -9.0}
    logprobs = {"tokens": [" zzz"], "token_logprobs": [-9.0], "top_logprobs": [listed]}

    def reply(body: dict[str, Any]) -> Any:
        if "temperature" in body:
            message = "Unsupported parameter: 'temperature' is not supported with this model."
            return 400, {
                "error": {"message": message, "param": "temperature", "code": "unsupported_parameter"}
            }
        choice = {"text": " zzz", "logprobs": logprobs, "finish_reason": "length"}
        return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}

    with scripted_server() as server, batch_server(server.url) as account:
        server.reply = reply
        results = in_order(batched(account).score(REQUESTS[:3]), 3)
    assert account.lines_run == 2
    assert [(r.logprobs, r.censored) for r in results] == [((-0.5, -2.0), (False, True))] * 3


class TestCommand:
    """``proxyprompt batches`` beside ``proxyprompt run``, which does not wait."""

    @pytest.fixture
    def config(self, account: BatchServer, tmp_path: Path) -> Path:
        words = (("superb", "positive"), ("dull", "negative"))

        def rows(first: int, last: int) -> str:
            filled = ((k, *words[k % 2]) for k in range(first, last))
            return "\n".join(
                json.dumps({"id": f"r{k}", "input": f"film {k} is {word}", "label": label})
                for k, word, label in filled
            )

        (tmp_path / "demos.jsonl").write_text(rows(100, 103))
        (tmp_path / "queries.jsonl").write_text(rows(0, 9))
        path = tmp_path / "config.toml"
        path.write_text(
            f"""
            output = "out"
            [prompt]
            demonstrations = "demos.jsonl"
            demonstration_template = "Review: {{input}}\\nSentiment: {{output}}"
            [queries]
            file = "queries.jsonl"
            sizes = {{explain = 2, select = 3, sealed = 4}}
            [task]
            labels = ["positive", "negative"]
            [target]
            model = "openai:smol"
            base_url = "{account.url}"
            batch = true
            batch_poll = 0.02
            batch_wait = 0.05
            """
        )
        return path

    def ask(self, *arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, list(arguments))
        return result.exit_code, result.stdout, result.stderr

    def test_listed_cancelled_and_collected(self, account: BatchServer, config: Path) -> None:
        path = str(config)
        assert self.ask("batches", path) == (0, "no batches to collect\n", "")
        assert not (config.parent / "out" / "ledger.db").exists()
        account.looks = 10**9
        code, _, told = self.ask("run", path)
        assert (code, "still under way" in told) == (4, True), told
        code, told, _ = self.ask("batches", path)
        [line] = told.splitlines()
        assert code == 0
        size = account.size("batch_1")
        assert re.fullmatch(
            rf"openai:smol  batch_1  in_progress, of [-0-9: ]+ UTC: {size} of {size} to collect", line
        )
        code, told, _ = self.ask("batches", path, "--cancel", "--json")
        [row] = json.loads(told)
        assert (row["id"], row["cancelled_now"], row["n_left"]) == ("batch_1", True, size)
        account.looks = 1
        for _ in range(20):  # later stages send batches of their own, and nobody waits
            code, _, told = self.ask("run", path)
            if code == 0:
                break
        assert code == 0, told
        assert self.ask("batches", path)[1] == "no batches to collect\n"
        assert account.lines_run == sum(account.size(name) for name in account.batches)

    def test_forgotten_on_request_only(self, account: BatchServer, config: Path) -> None:
        path = str(config)
        account.looks = 10**9
        self.ask("run", path)
        account.batches.clear()
        code, _, told = self.ask("run", path)
        assert (code, "proxyprompt batches CONFIG --cancel" in told) == (4, True), told
        assert "batch_1  gone, of" in self.ask("batches", path)[1]
        assert self.ask("batches", path, "--cancel")[1] == "no batches to collect\n"
