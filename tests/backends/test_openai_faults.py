"""The OpenAI backend against servers that speak in dialects, refuse, stall and fail."""

from __future__ import annotations

import math
import re
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from proxyprompt.backends.base import GenerateRequest, Message, ScoreRequest, ScoreResult, Usage
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.errors import BackendError, RetryableBackendError
from proxyprompt.ledger import Ledger
from proxyprompt.metering import Meter

from .contract import check_generate_result, check_score_result, in_order
from .scripted_server import Reply, Scripted, scripted_server

KEY = "canary-key-7c1f"
LABELS = (" positive", " negative")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as script:
        yield script


def scores(yes: object = -0.25, no: object = -1.5, **more: object) -> dict[str, Any]:
    tokens = {" positive": yes, " negative": no, **more}
    return {
        "model": "m-2",
        "choices": [{"text": " positive", "logprobs": {"top_logprobs": [tokens]}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1},
    }


def text(content: str | None, finish: str = "stop") -> dict[str, Any]:
    choice = {"text": content, "message": {"content": content}, "logprobs": None, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}


def fault(status: int, message: str = "no", **more: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, **more}}


def backend(server: Scripted, **options: Any) -> OpenAIBackend:
    return OpenAIBackend("m", base_url=server.url, **options)


def ask(server: Scripted, *replies: Reply, **options: Any) -> ScoreResult:
    server.replies = list(replies)
    request = ScoreRequest("p", LABELS)
    [result] = in_order(backend(server, **options).score([request]), 1)
    check_score_result(request, result)
    return result  # type: ignore[no-any-return]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting times between tries, not waited for."""
    waited: list[float] = []

    async def sleep(seconds: float, stopped: threading.Event) -> None:
        waited.append(seconds)

    monkeypatch.setattr("proxyprompt.backends._openai_connection._sleep", sleep)
    return waited


class TestDialects:
    def test_legacy_dict(self, server: Scripted) -> None:
        result = ask(server, scores())
        assert (result.logprobs, result.censored) == ((-0.25, -1.5), (False, False))
        assert (result.model_returned, result.usage.prompt_tokens) == ("m-2", 9)
        path, body = server.requests[0]
        assert path == "/v1/completions"
        assert (body["logprobs"], body["temperature"], body["prompt"]) == (20, 0, "p")

    def test_chat(self, server: Scripted) -> None:
        top = [{"token": "positive", "logprob": -0.5}, {"token": "negative", "logprob": -2}]
        server.replies = [{"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}]
        request = ScoreRequest((Message("system", "s"), Message("user", "u")), LABELS)
        [result] = in_order(backend(server, top_logprobs=5).score([request]), 1)
        assert result.logprobs == (-0.5, -2.0)
        path, body = server.requests[0]
        assert path == "/v1/chat/completions"
        assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
        assert body["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]

    def test_once_known_one_token_is_asked_for(self, server: Scripted) -> None:
        server.replies = [scores()]
        in_order(backend(server).score([ScoreRequest("p", LABELS)] * 3), 3)
        assert [body["max_tokens"] for _, body in server.requests] == [11, 1, 1]

    def test_sentinel_means_not_listed(self, server: Scripted) -> None:
        result = ask(server, scores(no=-9999.0, other=-4.0))
        assert (result.logprobs, result.censored) == ((-0.25, -4.0), (False, True))

    @pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf, None, 0.5, "x"])
    def test_values_that_are_no_log_probability(self, server: Scripted, value: object) -> None:
        result = ask(server, scores(no=value))
        assert result.error == "the server sent no usable log-probability for ' negative'"
        assert result.usage.prompt_tokens == 9

    def test_max_completion_tokens_where_the_server_insists(self, server: Scripted) -> None:
        refusal = fault(
            400, "Use 'max_completion_tokens' instead.", code="unsupported_parameter", param="max_tokens"
        )
        server.replies = [refusal, text("hello"), text("again")]
        model = backend(server, api="chat")
        texts = in_order(model.generate([GenerateRequest("p", 5)]), 1)
        texts += in_order(model.generate([GenerateRequest("p", 5)]), 1)
        assert [each.text for each in texts] == ["hello", "again"]
        limits = [{k: v for k, v in body.items() if k.startswith("max_")} for _, body in server.requests]
        assert limits == [{"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_completion_tokens": 5}]


class TestLabelOnly:
    @pytest.mark.parametrize(
        "refusal",
        [
            fault(400, "Unsupported parameter", code="unsupported_parameter", param="logprobs"),
            fault(400, "logprobs are not available for this model"),
        ],
    )
    def test_after_a_refusal(self, server: Scripted, refusal: Reply) -> None:
        server.replies = [refusal, text("Negative."), text("positive")]
        model = backend(server, concurrency=1)
        first, second = in_order(model.score([ScoreRequest("p", LABELS)] * 2), 2)
        assert (first.logprobs, first.censored) == ((None, 0.0), (True, True))
        assert (second.logprobs, second.censored) == ((0.0, None), (True, True))
        assert model.capability == "texts"
        assert ["logprobs" in body for _, body in server.requests] == [True, False, False]

    def test_a_server_that_ignores_the_question_is_not_asked_twice(self, server: Scripted) -> None:
        result = ask(server, text(" negative\nReview: more"))
        assert result.logprobs == (None, 0.0)
        assert result.usage.prompt_tokens == 9
        assert len(server.requests) == 1
        assert server.requests[0][1]["max_tokens"] == 11

    def test_stays_so_even_if_log_probabilities_come_unasked(self, server: Scripted) -> None:
        server.replies = [text("negative"), scores()]
        _, second = in_order(backend(server).score([ScoreRequest("p", LABELS)] * 2), 2)
        assert (second.logprobs, second.censored) == ((0.0, None), (True, True))

    def test_unparsable(self, server: Scripted) -> None:
        result = ask(server, text("I think it is positive", "length"))
        assert result.error == (
            "unparsable answer 'I think it is positive': it does not begin with one of the labels"
        )

    def test_an_empty_answer_decides_nothing(self, server: Scripted) -> None:
        server.replies = [text(""), scores()]
        model = backend(server)
        empty, good = in_order(model.score([ScoreRequest("p", LABELS)] * 2), 2)
        assert empty.error == "the answer is empty"
        assert good.logprobs == (-0.25, -1.5)
        assert model.capability == "logprobs"

    @pytest.mark.parametrize("later", [text("positive"), fault(400, "logprobs unsupported")])
    def test_the_two_scales_are_never_mixed(self, server: Scripted, later: Reply) -> None:
        server.replies = [scores(), later]
        model = backend(server)
        good, bad = in_order(model.score([ScoreRequest("p", LABELS)] * 2), 2)
        assert good.error is None
        assert bad.error in (
            "no log-probabilities this time, unlike before",
            "HTTP 400: logprobs unsupported",
        )
        assert model.capability == "logprobs"


class TestFaults:
    @pytest.mark.parametrize(
        ("reply", "reason"),
        [
            ({"choices": []}, "the answer holds no choices"),
            (b"{broken", "the answer is not JSON"),
            (b"<html>proxy</html>", "the answer is not JSON"),
            (fault(400, "prompt is\n too long"), "HTTP 400: .*prompt is.*too long.*"),
            (fault(422, "context length exceeded, lower max_tokens"), "HTTP 422: .*context length.*"),
        ],
    )
    def test_one_bad_answer_is_one_error(self, server: Scripted, reply: Reply, reason: str) -> None:
        result = ask(server, reply)
        assert result.error is not None
        assert re.fullmatch(reason, result.error)
        assert len(server.requests) == 1

    def test_texts_fail_in_the_same_way(self, server: Scripted) -> None:
        server.replies = [{"choices": []}, text(None, "content_filter"), (400, b"no"), text("a;b")]
        requests = [GenerateRequest("p", 4, (";",))] * 4
        results = in_order(backend(server, concurrency=1).generate(requests), 4)
        for request, result in zip(requests, results, strict=True):
            check_generate_result(request, result)
        assert results[1].error == "the answer holds no text (finish_reason 'content_filter')"
        assert results[1].usage.prompt_tokens == 9
        assert results[3].text == "a"

    @pytest.mark.parametrize("status", [409, 429, 500, 502, 503, 529])
    def test_a_passing_fault_is_tried_again(self, server: Scripted, pauses: list[float], status: int) -> None:
        result = ask(server, fault(status), fault(status), scores())
        assert (result.logprobs, result.uncertain) == ((-0.25, -1.5), 0)
        first = 2.0 if status in (429, 529) else 0.5
        assert first / 2 <= pauses[0] <= first <= pauses[1] <= 2 * first
        assert len(pauses) == 2

    def test_tries_are_bounded(self, server: Scripted, pauses: list[float]) -> None:
        result = ask(server, fault(500, "boom"), max_tries=3)
        assert result.error is not None
        assert result.error.startswith("HTTP 500 (")
        assert result.error.endswith(") after 3 tries")
        assert "boom" in result.error
        assert len(server.requests) == 3

    @pytest.mark.parametrize(
        "header",
        [
            {"retry-after": "2"},
            {"retry-after-ms": "2000", "retry-after": "9"},
            {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2s"},
        ],
    )
    def test_the_server_says_how_long_to_wait(
        self, server: Scripted, pauses: list[float], header: dict[str, str]
    ) -> None:
        ask(server, (*fault(429), header), scores())
        assert pauses[0] == 2.0

    def test_a_longer_wait_than_ones_patience_is_not_waited_for(
        self, server: Scripted, pauses: list[float]
    ) -> None:
        result = ask(server, (*fault(429), {"retry-after": "90"}), max_wait=60)
        assert "after 1 try, asked to wait 90 s; max_wait=60 s" in (result.error or "")
        assert (len(server.requests), pauses) == (1, [])

    @pytest.mark.parametrize("status", [408, 504, 524])
    def test_a_gateway_that_gave_up_may_have_billed(
        self, server: Scripted, pauses: list[float], status: int
    ) -> None:
        server.replies = [fault(status), scores()]
        sent: list[int] = []
        [result] = in_order(backend(server).score([ScoreRequest("p", LABELS)], on_send=sent.extend), 1)
        assert (result.logprobs, result.uncertain, sent) == ((-0.25, -1.5), 1, [0, 0])
        server.replies = [fault(status)]
        [result] = in_order(backend(server).score([ScoreRequest("p", LABELS)], on_send=sent.extend), 1)
        assert result.error is not None
        assert (result.uncertain, sent) == (2, [0, 0, 0, 0])

    def test_a_refused_announcement_stops_the_second_attempt(
        self, server: Scripted, pauses: list[float]
    ) -> None:
        server.replies = [fault(504), scores()]
        seen: list[int] = []

        def once(indices: Any) -> None:
            seen.extend(indices)
            if len(seen) > 1:
                raise KeyError("budget")

        with pytest.raises(KeyError, match="budget"):
            list(backend(server).score([ScoreRequest("p", LABELS)], on_send=once))
        assert len(server.requests) == 1

    def test_a_server_that_is_down_stops_the_batch(self, server: Scripted, pauses: list[float]) -> None:
        server.replies = [fault(503)]
        got: list[Any] = []
        with pytest.raises(
            RetryableBackendError, match="5 requests in a row got no answer; the last: HTTP 503"
        ):
            got.extend(
                pair
                for block in backend(server, max_tries=2).score([ScoreRequest("p", LABELS)] * 40)
                for pair in block
            )
        assert len(got) == 5
        assert all(result.uncertain == 0 for _, result in got)
        assert len(server.requests) == 10

    def test_no_answer_in_time_is_lost_and_counted(self, server: Scripted) -> None:
        def slow(body: dict[str, Any]) -> Reply:
            time.sleep(0.6)
            return scores()

        server.reply = slow
        started = time.perf_counter()
        result = ask(server, timeout=0.2, paid_retries=0)
        assert result.error == "no answer within the time limit after 1 try"
        assert (len(server.requests), result.uncertain) == (1, 1)
        assert time.perf_counter() - started < 0.6

    def test_no_server(self, pauses: list[float]) -> None:
        with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http:
            url = f"http://127.0.0.1:{http.server_port}/v1"
        [result] = in_order(OpenAIBackend("m", base_url=url).score([ScoreRequest("p", LABELS)]), 1)
        assert result.error == f"no connection to {url} (ConnectError) after 6 tries"
        assert (len(pauses), result.uncertain) == (5, 0)

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            (fault(401, "bad key"), "401: .*bad key.* Check OPENAI_API_KEY"),
            (fault(403, "not yours"), "403: .*Check that this key"),
            (fault(404, "unknown"), "404: .*Check the model's name, base_url"),
            (fault(429, "pay", code="insufficient_quota"), "429: .*Check the account's plan"),
            (fault(400, "logprobs must be at most 5"), "may allow fewer than top_logprobs=20; lower it"),
        ],
    )
    def test_what_no_call_can_survive_stops_the_batch(
        self, server: Scripted, reply: Reply, message: str
    ) -> None:
        server.replies = [reply]
        blocks = backend(server).score([ScoreRequest("p", LABELS)] * 9)
        # The refused request is one without an answer, so that its call is not held for billed.
        [(index, refused)] = next(blocks)
        assert (index, refused.uncertain, refused.usage) == (0, 0, Usage())
        assert "HTTP" in (refused.error or "")
        with pytest.raises(BackendError, match=f"'m' at {server.url}: HTTP .*{message}") as caught:
            next(blocks)
        assert isinstance(caught.value.__cause__, openai.APIStatusError)
        assert len(server.requests) == 1

    def test_what_was_answered_before_the_stop_is_delivered(self, server: Scripted) -> None:
        gate = threading.Event()

        def reply(body: dict[str, Any]) -> Reply:
            if body["prompt"] == "2":
                gate.set()
                return fault(401)
            if body["prompt"] == "1":
                gate.wait(5)
                time.sleep(0.1)
            return scores()

        server.reply = reply
        sent: list[int] = []
        blocks = backend(server, concurrency=2).score(
            [ScoreRequest(str(k), LABELS) for k in range(9)], on_send=sent.extend
        )
        got: list[Any] = []
        with pytest.raises(BackendError, match="HTTP 401"):
            got.extend(pair for block in blocks for pair in block)
        answered = {index: result.error is None for index, result in got}
        assert (answered, sorted(sent)) == ({0: True, 1: True, 2: False}, [0, 1, 2])

    def test_what_was_announced_and_did_not_leave_vanishes_from_the_books(
        self, server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C after calls were announced together and two handed over, which may or may not have left."""
        server.replies = [scores()]
        asking = backend(server, concurrency=8)
        submit, handed = asking._connection.submit, 0

        def cut(work: Any) -> Any:
            nonlocal handed
            handed += 1
            if handed == 3:
                work.close()
                raise KeyboardInterrupt
            return submit(work)

        with Ledger(tmp_path / "l.db") as ledger:
            meter = Meter(asking, ledger, role="target", run="r")
            meter.score([ScoreRequest("known", LABELS)], stage="s")
            monkeypatch.setattr(asking._connection, "submit", cut)
            with pytest.raises(KeyboardInterrupt):
                meter.score([ScoreRequest(str(k), LABELS) for k in range(9)], stage="s")
            totals = ledger.totals()
            # The one that was being handed over may have left, for all that anybody knows.
            assert (totals.failed, totals.unknown, totals.open) == (0, 1, 0)
            assert totals.done == len(server.requests) <= 3

    def test_a_stopped_run_sends_no_call_that_has_not_left(self, server: Scripted, tmp_path: Path) -> None:
        """Calls that wait for a thread when another one is refused for good."""
        server.reply = lambda body: fault(401) if body["prompt"] != "known" else scores()
        with openai.OpenAI(base_url=server.url, api_key="any") as client, Ledger(tmp_path / "l.db") as ledger:
            meter = Meter(OpenAIBackend("m", client=client), ledger, role="target", run="r")
            meter.score([ScoreRequest("known", LABELS)], stage="s")
            with pytest.raises(BackendError, match="HTTP 401"):
                meter.score([ScoreRequest(str(k), LABELS) for k in range(9)], stage="s")
            totals = ledger.totals()
            assert (totals.done, totals.unknown, totals.open) == (1, 0, 0)
            assert totals.failed == len(server.requests) - 1

    def test_a_spent_budget_delivers_what_is_in_flight(self, server: Scripted) -> None:
        server.replies = [scores()]

        def two_only(indices: Any) -> None:
            if max(indices) > 1:
                raise KeyError("budget")

        blocks = backend(server).score([ScoreRequest("p", LABELS)] * 5, on_send=two_only)
        got: list[int] = []
        with pytest.raises(KeyError, match="budget"):
            got.extend(index for block in blocks for index, _ in block)
        assert got == [0]  # those announced together are refused together
        assert len(server.requests) == 1


class TestOrder:
    def test_no_more_than_allowed_in_flight_and_nothing_while_a_block_is_held(self, server: Scripted) -> None:
        def reply(body: dict[str, Any]) -> Reply:
            time.sleep(0.02)
            return scores()

        server.reply = reply
        sent: list[int] = []
        blocks = backend(server, concurrency=3).score([ScoreRequest("p", LABELS)] * 12, on_send=sent.extend)
        next(blocks)
        assert sent == [0]  # alone, to find out what the server gives
        got = 1
        for block in blocks:
            got += len(block)
            held = list(sent)
            time.sleep(0.05)
            assert sent == held
            assert len(sent) - got <= 2
        assert server.most_running <= 3
        assert sent == list(range(12))

    def test_texts_are_asked_for_at_once_after_the_first(self, server: Scripted) -> None:
        barrier = threading.Barrier(4, timeout=5)

        def reply(body: dict[str, Any]) -> Reply:
            if body["prompt"] != "0":
                barrier.wait()
            return text(body["prompt"])

        server.reply = reply
        requests = [GenerateRequest(str(k)) for k in range(9)]
        assert [r.text for r in in_order(backend(server).generate(requests), 9)] == list("012345678")


class TestSecrets:
    def test_the_key_is_nowhere(self, server: Scripted) -> None:
        model = OpenAIBackend("m", base_url=server.url.replace("//", f"//me:{KEY}@") + f"?k={KEY}")
        assert model.identity["base_url"] == server.url
        assert KEY not in repr(model) + str(dict(model.identity)) + model.name

    @pytest.mark.parametrize("status", [400, 401])
    def test_nor_where_the_server_repeats_it(self, server: Scripted, status: int) -> None:
        server.replies = [fault(status, f"Incorrect API key: {KEY}; header 'Bearer {KEY}'")]
        try:
            [result] = in_order(backend(server).score([ScoreRequest("p", LABELS)]), 1)
            shown = str(result)
        except BackendError as error:
            shown = "".join(traceback.format_exception(error))
        assert KEY not in shown
        assert "***" in shown

    def test_it_is_sent(self, server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        server.replies = [scores()]
        model = OpenAIBackend("m")
        assert model.identity["base_url"] == server.url
        in_order(model.score([ScoreRequest("p", LABELS)]), 1)
        assert len(server.requests) == 1

    def test_a_server_of_ones_own_needs_none(self, server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OPENAI_API_KEY")
        assert ask(server, scores()).error is None


def test_a_server_that_names_all_its_answers_alike_is_believed() -> None:
    from proxyprompt.backends._openai_mixups import Answered

    told = Answered()
    assert not told.is_foreign("x", {"prompt": "a"}, {"id": "x", "text": "1"})
    assert not told.is_foreign("x", {"prompt": "b"}, {"id": "x", "text": "2"})
    assert not told.is_foreign("x", {"prompt": "c"}, {"id": "x", "text": "2"})
    other = Answered()
    assert not other.is_foreign("x", {"prompt": "a"}, {"id": "x", "text": "1"})
    assert other.is_foreign("x", {"prompt": "b"}, {"id": "x", "text": "1"})
