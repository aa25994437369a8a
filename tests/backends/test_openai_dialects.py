"""What servers that call themselves compatible do differently: reasoning in view, odd errors, drawn tokens, poor ids."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from proxyprompt.backends._openai_faults import classify, error_words, read_allowance
from proxyprompt.backends._openai_wire import read_usage
from proxyprompt.backends.base import GenerateRequest, Message, ScoreRequest
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.errors import BackendError, InputError

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


def turns(k: int) -> GenerateRequest:
    return GenerateRequest((Message("user", f"u{k}"),), 8)


def reply(message: dict[str, Any], *tokens: tuple[str, float], finish: str = "stop", **usage: Any) -> Reply:
    listed = [{"token": token, "logprob": value} for token, value in tokens]
    content = [{**listed[0], "top_logprobs": listed}] if listed else None
    choice = {"message": message, "logprobs": {"content": content}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3, **usage}}


class TestReasoningInView:
    """The log-probabilities that vLLM and llama.cpp send are then those of the reasoning, not of the answer."""

    @pytest.mark.parametrize(
        ("cut", "whole"),
        [
            (
                {"content": None, "reasoning_content": "Okay"},
                {"content": "positive", "reasoning_content": "Okay"},
            ),
            ({"content": "", "reasoning": "Okay"}, {"content": "positive", "reasoning": "Okay"}),
            (
                {"content": "<think>\nOkay"},
                {"content": "<think>\nOkay, positive or negative?</think>\n\npositive"},
            ),
            (
                {"content": [{"type": "thinking", "thinking": []}]},
                {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "positive"}]},
            ),
        ],
    )
    def test_labels_are_read_from_the_text_behind_it(
        self, server: Scripted, cut: dict[str, Any], whole: dict[str, Any]
    ) -> None:
        first = ("Okay", -0.1), (" positive", -3.0), (" negative", -3.5)
        server.replies = [reply(cut, *first, finish="length"), reply(whole, *first)]
        sent: list[int] = []
        [result] = in_order(backend(server).score([CHAT], on_send=sent.extend), 1)
        assert (result.logprobs, result.evidence, result.error) == ((0.0, None), "texts", None)
        assert (result.usage.prompt_tokens, sent) == (18, [0, 0])
        assert [body["max_tokens"] for _, body in server.requests] == [11, 11 + 4096]

    def test_log_probabilities_of_the_answer_alone_are_used(self, server: Scripted) -> None:
        message = {"content": "positive", "reasoning_content": "Okay"}
        server.replies = [reply(message, ("positive", -0.1), ("negative", -2.5))]
        [result] = in_order(backend(server).score([CHAT]), 1)
        assert (result.logprobs, result.evidence) == ((-0.1, -2.5), "logprobs")

    def test_texts_are_given_without_it(self, server: Scripted) -> None:
        server.replies = [reply({"content": "so I think</think>\n\nParis"})]
        assert in_order(backend(server).generate([turns(0)]), 1)[0].text == "Paris"


class TestManyAtOnce:
    """What one call finds out does not fail those that were sent before."""

    def test_a_field_that_is_refused(self, server: Scripted) -> None:
        both = threading.Barrier(3, timeout=5)

        def answer(body: dict[str, Any]) -> Reply:
            if "max_tokens" in body and body["messages"][0]["content"] != "u0":
                both.wait()
                message = "Use 'max_completion_tokens' instead."
                return 400, {
                    "error": {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}
                }
            return reply({"content": "ok"})

        server.reply = answer
        results = in_order(backend(server).generate([turns(k) for k in range(4)]), 4)
        assert [r.text for r in results] == ["ok"] * 4
        assert len(server.requests) == 7

    def test_room_for_reasoning(self, server: Scripted) -> None:
        both = threading.Barrier(3, timeout=5)

        def answer(body: dict[str, Any]) -> Reply:
            if body["messages"][0]["content"] != "u0" and body["max_tokens"] == 8:
                both.wait()
                return reply({"content": ""}, finish="length")
            return reply({"content": "ok"})

        server.reply = answer
        results = in_order(backend(server).generate([turns(k) for k in range(4)]), 4)
        assert [r.text for r in results] == ["ok"] * 4
        assert [r.usage.prompt_tokens for r in results] == [9, 18, 18, 18]

    def test_the_first_call_for_text_finds_out_alone(self, server: Scripted) -> None:
        def answer(body: dict[str, Any]) -> Reply:
            details = {"completion_tokens_details": {"reasoning_tokens": 8}}
            cut = body["max_tokens"] == 8
            return reply({"content": "" if cut else "ok"}, finish="length" if cut else "stop", **details)

        server.reply = answer
        results = in_order(backend(server).generate([turns(k) for k in range(4)]), 4)
        assert [r.text for r in results] == ["ok"] * 4
        assert len(server.requests) == 5  # one of them in vain, not four

    def test_no_call_asks_for_more_than_was_set_aside_when_it_was_marked(self, server: Scripted) -> None:
        model = backend(server, concurrency=2)
        requests = [turns(k) for k in range(12)]
        aside: dict[int, list[int]] = {}

        class Books:
            """Sets money aside as the ledger does: once a request is marked ahead, not again when it leaves."""

            def __init__(self) -> None:
                self.marked: set[int] = set()

            def __call__(self, indices: Sequence[int]) -> None:
                for index in indices:
                    if index in self.marked:
                        self.marked.remove(index)
                    else:
                        aside.setdefault(index, []).append(model.most_completion_tokens(requests[index]))

            def soon(self, indices: Sequence[int]) -> None:
                for index in set(indices) - set(aside):
                    self.marked.add(index)
                    aside[index] = [model.most_completion_tokens(requests[index])]

            def ready(self, index: int) -> bool:
                return index in self.marked

        def answer(body: dict[str, Any]) -> Reply:
            cut = body["messages"][0]["content"] != "u0" and body["max_tokens"] == 8
            return reply({"content": "" if cut else "ok"}, finish="length" if cut else "stop")

        server.reply = answer
        assert [r.text for r in in_order(model.generate(requests, on_send=Books()), 12)] == ["ok"] * 12
        asked: dict[int, list[int]] = {}
        for _, body in server.requests:
            asked.setdefault(int(body["messages"][0]["content"][1:]), []).append(body["max_tokens"])
        assert all(
            most <= set_aside for k in asked for most, set_aside in zip(asked[k], aside[k], strict=True)
        )
        assert [8 + 4096] in aside.values()  # later ones know


class TestErrors:
    @pytest.mark.parametrize(
        "error",
        [
            {"code": 400, "message": "logprobs is not supported", "param": 7},
            {"code": {"a": 1}, "message": ["logprobs is not supported"], "param": ["x"]},
            "logprobs is not supported",
        ],
    )
    def test_bodies_of_other_shapes_are_understood(self, server: Scripted, error: Any) -> None:
        server.replies = [(400, {"error": error}), reply({"content": "positive"})]
        [result] = in_order(backend(server).score([CHAT]), 1)
        assert (result.evidence, result.error) == ("texts", None)

    def test_those_of_pydantic_too(self, server: Scripted) -> None:
        detail = [
            {
                "type": "extra_forbidden",
                "loc": ["body", "top_logprobs"],
                "msg": "Extra inputs are not permitted",
            }
        ]
        server.replies = [(422, {"detail": detail}), reply({"content": "positive"})]
        assert in_order(backend(server).score([CHAT]), 1)[0].error is None

    def test_a_request_that_is_repeated_in_an_error_says_nothing_of_its_fields(
        self, server: Scripted
    ) -> None:
        body = {"logprobs": True, "messages": []}
        detail = [{"loc": ["body", "messages", 0], "msg": "Input should be shorter", "input": body}]
        server.replies = [
            (422, {"detail": detail}),
            reply({"content": "positive"}, ("positive", -0.1), ("negative", -3.0)),
        ]
        first, second = in_order(backend(server).score([CHAT, CHAT]), 2)
        assert first.error == "HTTP 422: body.messages.0: Input should be shorter"
        assert (second.logprobs, second.evidence) == ((-0.1, -3.0), "logprobs")

    def test_a_refusal_that_was_read_wrongly_decides_nothing(self, server: Scripted) -> None:
        server.replies = [
            (400, {"error": {"message": "bad request {'logprobs': True, 'messages': [...]}"}}),
            (400, {"error": {"message": "bad request {'messages': [...]}"}}),
            reply({"content": "positive"}, ("positive", -0.1), ("negative", -3.0)),
        ]
        model = backend(server)
        first, second = in_order(model.score([CHAT, CHAT]), 2)
        assert first.error is not None
        assert (second.logprobs, model.capability) == ((-0.1, -3.0), "logprobs")

    def test_words(self) -> None:
        assert error_words({"message": "a", "detail": "b"}, "c") == "a"
        assert error_words([1], "c") == error_words(None, "c") == error_words({}, "c") == "c"

    def test_a_model_that_may_be_used_without_log_probabilities(self, server: Scripted) -> None:
        message = "You are not allowed to request logprobs from this model"
        server.replies = [(403, {"error": {"message": message}}), reply({"content": "negative"})]
        assert in_order(backend(server).score([CHAT]), 1)[0].logprobs == (None, 0.0)
        assert classify(403, None, None, message, {"temperature"}).fault == "fatal"

    def test_an_error_with_status_200_is_repeated(self, server: Scripted) -> None:
        server.replies = [{"error": {"message": "overloaded", "code": 529}}]
        [result] = in_order(backend(server).score([CHAT]), 1)
        assert (result.error, result.uncertain) == ("the answer holds no choices: overloaded", 1)

    def test_a_prompt_that_cannot_be_sent_fails_alone(self, server: Scripted) -> None:
        server.replies = [reply({"content": "ok"})]
        bad, good = GenerateRequest((Message("user", "\ud800"),), 8), turns(1)
        results = in_order(backend(server).generate([bad, good]), 2)
        assert results[0].error == "the prompt holds half a surrogate pair, which cannot be sent"
        assert (results[1].text, results[0].uncertain, len(server.requests)) == ("ok", 0, 1)


class TestPauses:
    @pytest.mark.parametrize(
        "headers", [{"retry-after": "0"}, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}]
    )
    def test_none_asked_for_is_the_usual_one(
        self, server: Scripted, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
    ) -> None:
        pauses: list[float] = []

        async def sleep(seconds: float, stopped: object) -> None:
            pauses.append(seconds)

        monkeypatch.setattr("proxyprompt.backends._openai_connection._sleep", sleep)
        server.replies = [(429, {"error": {"message": "slow down"}}, headers)]
        assert in_order(backend(server, max_tries=4).score([CHAT]), 1)[0].error is not None
        assert [low <= pause <= 2 * low for low, pause in zip((1, 2, 4), pauses, strict=True)] == [True] * 3

    @pytest.mark.parametrize("reset", ["1764100030", "1764100030.0", "1764100030000"])
    def test_resets_given_as_moments(self, reset: str) -> None:
        headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": reset}
        assert read_allowance(headers, now=1764100000.0).until_refilled == pytest.approx(30)
        assert read_allowance(headers, now=1764200000.0).until_refilled is None
        assert read_allowance({**headers, "x-ratelimit-reset-requests": "9" * 400}).until_refilled is None

    def test_an_exhausted_quota_named_as_type_stops_the_run(self, server: Scripted) -> None:
        error = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": 429}
        server.replies = [(429, {"error": error})]
        with pytest.raises(BackendError, match="exceeded your current quota"):
            list(backend(server).score([CHAT]))
        assert len(server.requests) == 1


class TestWithheld:
    def test_the_beginning_of_a_filtered_answer_is_no_answer(self, server: Scripted) -> None:
        server.replies = [reply({"content": "half an ans"}, finish="content_filter")]
        [result] = in_order(backend(server).generate([turns(0)]), 1)
        assert (result.text, result.error) == (
            None,
            "the answer holds no text (finish_reason 'content_filter')",
        )

    def test_a_refusal_is_repeated(self, server: Scripted) -> None:
        server.replies = [reply({"content": None, "refusal": "I cannot"})]
        assert in_order(backend(server).generate([turns(0)]), 1)[0].error == "the model refused: 'I cannot'"


class TestDrawnTokens:
    """A first answer whose text may be used as a sample has temperature 1: the token drawn may be an unlikely one."""

    def test_it_bounds_nothing(self, server: Scripted) -> None:
        table = {" positive": -0.5, "other": -2.0, " zzz": -9.0}
        logprobs = {"tokens": [" zzz"], "token_logprobs": [-9.0], "top_logprobs": [table]}
        choice = {"text": " zzz", "logprobs": logprobs, "finish_reason": "length"}
        server.replies = [{"choices": [choice], "usage": {"prompt_tokens": 9}}]
        [drawn] = in_order(backend(server, repeats=3).score([ASK]), 1)
        assert (drawn.logprobs, drawn.censored) == ((-0.5, -2.0), (False, True))

    def test_listed_alone_it_leaves_the_rest(self, server: Scripted) -> None:
        logprobs = {"tokens": [" negative"], "token_logprobs": [-3.0], "top_logprobs": None}
        choice = {"text": " negative", "logprobs": logprobs, "finish_reason": "length"}
        server.replies = [{"choices": [choice], "usage": {"prompt_tokens": 9}}]
        [drawn] = in_order(backend(server, repeats=3).score([ASK]), 1)
        assert drawn.logprobs == pytest.approx((math.log(1 - math.exp(-3)), -3.0))
        assert drawn.censored == (True, False)


def test_a_server_with_one_id_for_all_its_answers(server: Scripted) -> None:
    server.reply = lambda body: {"id": "cmpl-1", **reply({"content": "ok"})}  # type: ignore[dict-item]
    results = in_order(backend(server, concurrency=1).generate([turns(k) for k in range(5)]), 5)
    assert [r.text for r in results] == ["ok"] * 5
    assert [r.uncertain for r in results] == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_cache_hit_tokens": 5}, (5, 0)),
        ({"cached_tokens": 5, "prompt_tokens_details": None}, (5, 0)),
        ({"cache_read_input_tokens": 5, "cache_creation_input_tokens": 3}, (5, 3)),
        ({"prompt_tokens_details": {"cached_tokens": 4}, "cached_tokens": 5}, (4, 0)),
        ({"prompt_tokens_details": None, "input_tokens_details": {"cached_tokens": "4"}}, (4, 0)),
        ({"prompt_tokens_details": {"cached_tokens": 4.0, "cache_write_tokens": 2}}, (4, 2)),
        ({"prompt_tokens_details": {"cached_tokens": 4.5}}, (0, 0)),
    ],
)
def test_cached_tokens_by_their_other_names(usage: dict[str, Any], expected: tuple[int, int]) -> None:
    for prompt in (9, "9", 9.0):
        read = read_usage({"prompt_tokens": prompt, "completion_tokens": "2", **usage})
        assert (read.cached_tokens, read.cache_write_tokens) == expected
        assert (read.prompt_tokens, read.completion_tokens) == (9, 2)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"stop": {1, 2}}, "parameters cannot be sent as JSON"),
        ({"seed": math.nan}, "parameters cannot be sent as JSON"),
        (["seed"], "parameters is a list"),
        ({"best_of": 5, "echo": True}, "parameters: best_of, echo are set by the backend"),
    ],
)
def test_parameters_that_cannot_be_given(parameters: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        OpenAIBackend("m", parameters=parameters)


def test_parameters_are_what_they_were_when_the_backend_was_made() -> None:
    nested = {"logit_bias": {"5": 1}}
    model = OpenAIBackend("m", parameters=nested)
    nested["logit_bias"]["5"] = 2
    assert model.identity["parameters"] == {"logit_bias": {"5": 1}}
