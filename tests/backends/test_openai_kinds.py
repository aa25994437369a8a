"""Servers of other kinds: label-only, reasoning, deciding; clients of the user's; overload and interruption."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from proxyprompt.backends._openai_order import SHARED
from proxyprompt.backends.base import GenerateRequest, Message, ScoreRequest
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.errors import BackendError

from .contract import in_order
from .scripted_server import Reply, Scripted, scripted_server

LABELS = (" positive", " negative")
ASK = ScoreRequest("p", LABELS)
CHAT = ScoreRequest((Message("user", "u"),), LABELS)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary-key-7c1f")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as script:
        yield script


def backend(server: Scripted, **options: Any) -> OpenAIBackend:
    return OpenAIBackend("m", base_url=server.url, **options)


def scores(model: str = "m-1", **tokens: float) -> dict[str, Any]:
    table = tokens or {" positive": -0.25, " negative": -1.5}
    choice = {"text": next(iter(table)), "logprobs": {"top_logprobs": [table]}, "finish_reason": "length"}
    return {"model": model, "choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}


def said(*texts: str | None, finish: str = "stop", **usage: Any) -> dict[str, Any]:
    choices = [
        {"text": text, "message": {"content": text}, "logprobs": None, "finish_reason": finish}
        for text in texts
    ]
    return {"choices": choices, "usage": {"prompt_tokens": 9, "completion_tokens": 3, **usage}}


def refusal(param: str, code: str = "unsupported_parameter") -> Reply:
    return 400, {"error": {"message": f"Unsupported: '{param}'", "code": code, "param": param}}


class TestSampling:
    def test_shares_of_texts_by_one_call_where_the_server_samples(self, server: Scripted) -> None:
        server.replies = [refusal("logprobs"), said("positive", "negative", "Positive.", "well")]
        sent: list[int] = []
        [result] = in_order(backend(server, repeats=4).score([ASK], on_send=sent.extend), 1)
        assert result.logprobs == (math.log(0.5), math.log(0.25))
        assert (result.censored, result.evidence, result.samples) == ((True, True), "texts", 4)
        assert sent == [0]
        body = server.requests[1][1]
        assert (body["n"], body["temperature"]) == (4, 1)

    def test_by_several_announced_calls_where_it_does_not(self, server: Scripted) -> None:
        server.replies = [refusal("n"), said("positive"), said("negative"), said("positive")]
        sent: list[int] = []
        model = backend(server, repeats=3, evidence="texts")
        [result] = in_order(model.score([ASK], on_send=sent.extend), 1)
        assert result.logprobs == (math.log(2 / 3), math.log(1 / 3))
        assert (result.samples, result.usage.prompt_tokens, sent) == (3, 27, [0, 0, 0])
        assert ["n" in body for _, body in server.requests] == [True, False, False, False]

    def test_and_where_it_ignores_the_number(self, server: Scripted) -> None:
        server.replies = [said("positive")]
        model = backend(server, repeats=3, evidence="texts")
        first, second = in_order(model.score([ASK, ASK]), 2)
        assert (first.samples, second.samples) == (3, 3)
        assert sum("n" in body for _, body in server.requests) == 1

    def test_the_first_answer_is_one_of_the_samples(self, server: Scripted) -> None:
        server.replies = [said("positive"), said("negative", "positive")]
        sent: list[int] = []
        [result] = in_order(backend(server, repeats=3).score([ASK], on_send=sent.extend), 1)
        assert (result.samples, len(server.requests), sent) == (3, 2, [0, 0])
        assert server.requests[0][1]["temperature"] == 1
        assert result.logprobs[0] == math.log(2 / 3)

    def test_a_sample_that_fails_leaves_the_others(
        self, server: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.replies = [said("positive"), said("positive"), (400, b"no"), said("negative")]
        model = backend(server, repeats=4, evidence="texts")
        [result] = in_order(model.score([ASK]), 1)
        assert (result.samples, result.error) == (3, None)

    def test_identity_says_what_decides(self, server: Scripted) -> None:
        model = backend(server, repeats=3, evidence=("texts",), parameters={"reasoning_effort": "none"})
        assert model.identity["repeats"] == 3
        assert model.identity["evidence"] == ["texts"]
        assert model.identity["parameters"] == {"reasoning_effort": "none"}
        server.replies = [said("positive")]
        in_order(model.score([ASK]), 1)
        assert server.requests[0][1]["reasoning_effort"] == "none"


class TestReasoning:
    def test_every_refusal_is_learned_once(self, server: Scripted) -> None:
        def reply(body: dict[str, Any]) -> Reply:
            for field in ("logprobs", "max_tokens", "temperature"):
                if field in body:
                    code = "unsupported_value" if field == "temperature" else "unsupported_parameter"
                    return refusal(field, code)
            if body["max_completion_tokens"] < 100:
                details = {"completion_tokens_details": {"reasoning_tokens": 11}}
                return said("", finish="length", completion_tokens=11, **details)
            return said("negative", completion_tokens=300)

        server.reply = reply
        sent: list[int] = []
        model = backend(server, api="chat", reasoning_tokens=500)
        assert model.most_completion_tokens(ASK) == 11
        first, second = in_order(model.score([ASK, ASK], on_send=sent.extend), 2)
        assert first.logprobs == second.logprobs == (None, 0.0)
        # The call whose tokens went into reasoning was paid, and the second one announced.
        assert sent == [0, 0, 1]
        assert (first.usage.completion_tokens, first.usage.reasoning_tokens) == (311, 11)
        assert len(server.requests) == 3 + 2 + 1
        assert model.most_completion_tokens(ASK) == 511
        assert model.capability == "texts"

    def test_too_little_room_is_said(self, server: Scripted) -> None:
        server.replies = [said("", finish="length")]
        [result] = in_order(
            backend(server, api="chat", evidence="texts", reasoning_tokens=50).score([ASK]), 1
        )
        assert result.error == "no text within the limit (reasoning_tokens=50); raise reasoning_tokens"
        assert [body["max_tokens"] for _, body in server.requests] == [11, 61]
        assert result.usage.prompt_tokens == 18

    def test_texts_get_room_too(self, server: Scripted) -> None:
        server.replies = [said(None, finish="length"), said("Paris")]
        [result] = in_order(
            backend(server, api="chat", reasoning_tokens=99).generate([GenerateRequest("p", 5)]), 1
        )
        assert result.text == "Paris"
        assert [body["max_tokens"] for _, body in server.requests] == [5, 104]


def decision(**probabilities: float) -> dict[str, Any]:
    listed = [{"value": value, "probability": p} for value, p in probabilities.items()]
    return {
        "model": "d-1",
        "answers": [{"type": "choice", "choice": "x", "confidence": 0.9, "probabilities": listed}],
        "usage": {"input_tokens": 7, "output_tokens": 0, "input_tokens_details": {"cached_tokens": 2}},
    }


HAS_DECISIONS = hasattr(openai.OpenAI, "decisions")


class TestDecisions:
    def test_stated_probabilities(self, server: Scripted) -> None:
        server.replies = [decision(positive=0.97, negative=0.0)]
        model = backend(server, evidence="decisions")
        if not HAS_DECISIONS:
            with pytest.raises(BackendError, match=r"knows no decisions endpoint \(3\.26 does\)"):
                list(model.score([ASK]))
            return
        text, chat = in_order(model.score([ASK, CHAT]), 2)
        assert text.logprobs == chat.logprobs == (math.log(0.97), math.log(0.005))
        assert (text.censored, text.evidence, text.model_returned) == ((False, True), "decisions", "d-1")
        assert (text.usage.prompt_tokens, text.usage.cached_tokens) == (7, 2)
        path, body = server.requests[0]
        assert path == "/v1/decisions"
        assert body["input"] == "p"
        assert body["questions"][0]["choices"] == [{"value": "positive"}, {"value": "negative"}]
        assert server.requests[1][1]["input"] == [{"type": "message", "role": "user", "content": "u"}]

    def test_a_server_without_them_falls_through(self, server: Scripted) -> None:
        def reply(body: dict[str, Any]) -> Reply:
            if "questions" in body:
                return 404, {"error": {"message": "no such page"}}
            return refusal("logprobs") if "logprobs" in body else said("positive")

        server.reply = reply
        model = backend(server, evidence=("logprobs", "decisions", "texts"))
        first, _ = in_order(model.score([ASK, ASK]), 2)
        assert (first.logprobs, first.evidence, model.capability) == ((0.0, None), "texts", "texts")
        assert sum(path == "/v1/decisions" for path, _ in server.requests) == int(HAS_DECISIONS)

    def test_nothing_else_is_put_in_their_place(self, server: Scripted) -> None:
        server.replies = [(404, {"error": {"message": "no such page"}})]
        with pytest.raises(BackendError, match=r"gives none of evidence=\('decisions',\)"):
            list(backend(server, evidence="decisions").score([ASK]))
        server.replies = [said("positive")]
        with pytest.raises(BackendError, match=r"status 200, but no log-probabilities.*Add 'texts'"):
            list(backend(server, evidence="logprobs").score([ASK]))


class TestLabelsOfSeveralTokens:
    def test_as_many_tokens_as_it_takes(self, server: Scripted) -> None:
        labels = ("very good", "very bad", "fine")

        def reply(body: dict[str, Any]) -> Reply:
            path = [{" very": -0.1, " fine": -3.0}, {" good": -0.2, " bad": -2.0}, {"\n": -0.1}]
            chosen = [" very", " good", "\n"]
            count = min(body["max_tokens"], 3)
            logprobs = {"tokens": chosen[:count], "top_logprobs": path[:count]}
            choice = {"text": "".join(chosen[:count]), "logprobs": logprobs, "finish_reason": "length"}
            return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": count}}

        server.reply = reply
        results = in_order(backend(server).score([ScoreRequest(str(k), labels) for k in range(3)]), 3)
        for result in results:
            assert result.logprobs == pytest.approx((-0.3, -2.1, -3.0))
            assert result.censored == (False, False, False)
        assert [body["max_tokens"] for _, body in server.requests] == [11, 2, 2]

    def test_a_later_answer_may_need_more(self, server: Scripted) -> None:
        labels = ("very good", "very bad", "fine")
        short = {"tokens": [" fine"], "top_logprobs": [{" fine": -0.1, " very": -3.0}]}
        cut = {"tokens": [" very"], "top_logprobs": [{" very": -0.1, " fine": -3.0}]}
        whole = {
            "tokens": [" very", " bad"],
            "top_logprobs": [cut["top_logprobs"][0], {" bad": -0.5, " good": -1.0}],
        }
        server.replies = [
            {"choices": [{"text": "x", "logprobs": logprobs}], "usage": {"prompt_tokens": 2}}
            for logprobs in (short, cut, whole, cut)
        ]
        sent: list[int] = []
        requests = [ScoreRequest(str(k), labels) for k in range(2)]
        one, two = in_order(backend(server).score(requests, on_send=sent.extend), 2)
        assert one.censored == (True, True, False)
        assert two.logprobs == pytest.approx((-1.1, -0.6, -3.0))
        assert [body["max_tokens"] for _, body in server.requests] == [11, 1, 11]
        assert (sent, two.usage.prompt_tokens) == ([0, 1, 1], 4)


class TestClients:
    @pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
    def test_their_retries_are_ours(self, server: Scripted, kind: Any) -> None:
        server.replies = [(500, {"error": {"message": "boom"}})]
        client = kind(base_url=server.url, api_key="mine", max_retries=5)
        model = OpenAIBackend("m", client=client, max_tries=1)
        [result] = in_order(model.score([ASK]), 1)
        assert "HTTP 500 (" in (result.error or "")
        assert len(server.requests) == 1
        server.replies = [scores()]
        assert in_order(model.score([ASK] * 20), 20)[19].logprobs == (-0.25, -1.5)
        assert client.max_retries == 5  # the user's own object is left alone
        if kind is openai.OpenAI:
            client.close()
        else:
            model._connection.submit(client.close()).result()

    def test_azure(self, server: Scripted) -> None:
        server.replies = [scores()]
        client = openai.AzureOpenAI(
            azure_endpoint=server.url.removesuffix("/v1"), api_key="mine", api_version="2024-10-21"
        )
        model = OpenAIBackend("deployed", client=client)
        [result] = in_order(model.score([ASK]), 1)
        assert result.logprobs == (-0.25, -1.5)
        assert server.requests[0][0] == "/openai/deployments/deployed/completions?api-version=2024-10-21"
        client.close()

    def test_one_backend_serves_many_batches_and_threads(self, server: Scripted) -> None:

        def reply(body: dict[str, Any]) -> Reply:
            time.sleep(0.01)
            return scores()

        server.reply = reply
        model = backend(server, concurrency=3)
        in_order(model.score([ASK]), 1)
        counts: list[int] = []
        threads = [
            threading.Thread(target=lambda: counts.append(len(in_order(model.score([ASK] * 9), 9))))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counts == [9] * 4
        assert server.most_running <= 3

    def test_inside_a_running_event_loop(self, server: Scripted) -> None:
        server.replies = [scores()]

        async def inside() -> int:
            return len(in_order(backend(server).score([ASK] * 3), 3))

        assert asyncio.run(inside()) == 3
        assert asyncio.run(inside()) == 3

    def test_a_client_of_another_loop_is_named(self, server: Scripted) -> None:
        class Used(openai.AsyncOpenAI):
            """Behaves as a client whose connections belong to a loop that is closed."""

            async def post(self, *arguments: Any, **named: Any) -> Any:
                raise RuntimeError("Event loop is closed")

        model = OpenAIBackend("m", client=Used(base_url=server.url, api_key="k"))
        with pytest.raises(BackendError, match=r"'Event loop is closed'.*hand over a fresh one"):
            list(model.score([ASK]))


class TestPaceAndOrder:
    def test_overload_cuts_what_is_in_flight(self, server: Scripted) -> None:
        limits: list[int] = []
        refused = threading.Event()

        def reply(body: dict[str, Any]) -> Reply:
            time.sleep(0.01)
            if len(server.requests) > 30 and not refused.is_set():
                refused.set()
                return 429, {"error": {"message": "slow down"}}, {"retry-after-ms": "50"}
            return scores()

        server.reply = reply
        model = backend(server, concurrency=16)
        for _ in model.score([ASK] * 80):
            limits.append(model.in_flight_limit)
        assert max(limits) > 6
        cut = next(k for k in range(1, len(limits)) if limits[k] < limits[k - 1])
        assert limits[cut] <= 0.75 * limits[cut - 1] + 1
        assert limits[-1] > min(limits[cut:])  # and grew again
        assert len(server.requests) == 81

    def test_requests_a_minute(self, server: Scripted) -> None:
        server.replies = [scores()]
        started = time.perf_counter()
        in_order(backend(server, rpm=1200).score([ASK] * 11), 11)
        assert time.perf_counter() - started >= 0.5

    def test_long_beginnings_are_asked_once_first(self, server: Scripted) -> None:
        running: list[int] = []

        def reply(body: dict[str, Any]) -> Reply:
            running.append(server.running)
            time.sleep(0.02)
            return scores()

        server.reply = reply
        model = backend(server)
        in_order(model.score([ASK]), 1)
        running.clear()
        in_order(model.score([ScoreRequest("x" * SHARED + str(k), LABELS) for k in range(5)]), 5)
        assert running[0] == 1
        assert max(running[1:]) > 1

    def test_the_cache_key_is_sent_where_it_is_taken(self, server: Scripted) -> None:
        turns = [(Message("user", "x" * SHARED), Message("user", str(k))) for k in range(4)]
        server.reply = lambda body: (
            refusal("prompt_cache_key", "unknown_parameter") if "prompt_cache_key" in body else said("a")
        )
        model = backend(server, concurrency=1)
        in_order(model.generate([GenerateRequest(turn, 4) for turn in turns]), 4)
        assert sum("prompt_cache_key" in body for _, body in server.requests) == 1
        server.requests.clear()
        server.reply = lambda body: said("a")
        in_order(backend(server).generate([GenerateRequest(turn, 4) for turn in turns]), 4)
        assert len({body["prompt_cache_key"] for _, body in server.requests}) == 1


class TestModels:
    def test_two_models_under_one_name(self, server: Scripted) -> None:
        server.replies = [scores("m-1"), scores("m-1"), scores("m-2")]
        model = backend(server, concurrency=1)
        with pytest.warns(RuntimeWarning, match=r"'m' was answered by \['m-1', 'm-2'\] in one run"):
            in_order(model.score([ASK] * 4), 4)
        assert model.models_returned == {"m-1": 2, "m-2": 2}
        server.requests.clear()
        got: list[int] = []
        with pytest.raises(BackendError, match="was answered by"):
            got.extend(
                i for b in backend(server, concurrency=1, model_change="error").score([ASK] * 9) for i, _ in b
            )
        assert got == [0, 1, 2]
        server.requests.clear()
        in_order(backend(server, model_change="ignore").score([ASK] * 4), 4)

    def test_fingerprints(self, server: Scripted) -> None:
        server.replies = [{**scores(), "system_fingerprint": "fp_1"}]
        model = backend(server)
        [result] = in_order(model.score([ASK]), 1)
        assert (result.fingerprint, model.fingerprints) == ("fp_1", {"fp_1": 1})


class TestSafety:
    def test_redirections_are_not_followed(self, server: Scripted) -> None:
        with scripted_server() as elsewhere:
            elsewhere.replies = [scores()]
            server.replies = [(307, {}, {"location": f"{elsewhere.url}/completions"})]
            for client in (None, openai.OpenAI(base_url=server.url, api_key="k")):
                base = {"client": client} if client else {"base_url": server.url}
                with pytest.raises(BackendError, match="Redirections are not followed"):
                    list(OpenAIBackend("m", **base).score([ASK]))
                if client:
                    client.close()
            assert elsewhere.requests == []

    def test_a_name_that_leads_to_a_metadata_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lookup(*arguments: Any, **named: Any) -> Any:
            return [(2, 1, 6, "", ("169.254.169.254", 0))]

        monkeypatch.setattr("socket.getaddrinfo", lookup)
        with pytest.raises(BackendError, match=r"'models\.example' leads to 169\.254\.169\.254"):
            list(OpenAIBackend("m", base_url="https://models.example/v1").score([ASK]))

    def test_an_interruption_delivers_what_is_in_flight(
        self, server: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arrived = threading.Semaphore(0)

        def reply(body: dict[str, Any]) -> Reply:
            arrived.release()
            time.sleep(0.1)
            return scores()

        server.reply = reply
        model = backend(server, concurrency=4)
        in_order(model.score([ASK]), 1)
        assert arrived.acquire(timeout=10)
        sent: list[int] = []
        got: list[int] = []
        interrupted = False
        real = model._flow._finished

        def finished(*arguments: Any) -> Any:
            nonlocal interrupted
            if not interrupted and len(sent) == 4:
                interrupted = True
                assert all(
                    arrived.acquire(timeout=10) for _ in range(4)
                )  # what has not left is not in flight
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(model._flow, "_finished", finished)
        with pytest.raises(KeyboardInterrupt):
            got.extend(i for block in model.score([ASK] * 40, on_send=sent.extend) for i, _ in block)
        assert sorted(got) == sorted(sent) == [0, 1, 2, 3]
