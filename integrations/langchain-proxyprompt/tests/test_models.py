"""Any LangChain chat model as a model of ProxyPrompt, on a real server."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from langchain_core.messages import SystemMessage
from langchain_openai import ChatOpenAI
from langchain_proxyprompt import ChatModelBackend
from langchain_proxyprompt.models import model_identity, to_messages
from planted_chain import chat_prompt, planted

from proxyprompt.backends.base import GenerateRequest, Message, ScoreRequest
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.errors import BackendError, InputError

PROMPT = (
    Message("system", "Answer with one word: positive or negative."),
    Message("user", "A superb film."),
    Message("assistant", "positive"),
    Message("user", "What a waste of two hours."),
)
LABELS = ("positive", "negative")


def one(blocks: Any) -> Any:
    return dict(pair for block in blocks for pair in block)


def chat(base_url: str, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="smollm2", base_url=base_url, api_key="sk-canary-0123456789", temperature=0, **fields
    )


def test_log_probabilities_are_those_of_the_openai_backend(base_url: str) -> None:
    request = ScoreRequest(PROMPT, LABELS)
    ours = one(ChatModelBackend(chat(base_url)).score([request]))[0]
    theirs = one(OpenAIBackend("smollm2", base_url=base_url).score([request]))[0]
    assert ours.error is None
    assert ours.evidence == "logprobs"
    assert ours.censored == theirs.censored
    for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert math.isclose(a, b, abs_tol=0.02)
    assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens > 20
    assert ours.model_returned == theirs.model_returned


def test_text_is_generated_and_stopped(base_url: str) -> None:
    result = one(ChatModelBackend(chat(base_url)).generate([GenerateRequest(PROMPT, max_tokens=4)]))[0]
    assert result.error is None
    assert result.text
    assert 1 <= result.usage.completion_tokens <= 4


def test_a_model_without_log_probabilities_is_asked_for_its_answer() -> None:
    model = planted()
    prompt = (*PROMPT[:-1], Message("user", "query 1"))
    backend = ChatModelBackend(model)
    announced: list[int] = []
    found = one(backend.score([ScoreRequest(prompt, ("pos", "neg"))] * 3, on_send=announced.extend))
    assert [found[i].logprobs for i in range(3)] == [(0.0, None)] * 3
    assert found[0].evidence == "texts"
    assert len(model.calls) == 3, "the parameters were refused before the model counted a call"


def test_a_lost_connection_says_nothing_about_log_probabilities() -> None:
    model = planted()
    backend = ChatModelBackend(
        ChatOpenAI(model="x", base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0)
    )
    result = one(backend.score([ScoreRequest(PROMPT, LABELS)]))[0]
    assert result.logprobs == (None, None)
    assert result.error is not None
    assert "Connection" in result.error
    assert backend._known == {}
    assert model.calls == []


def test_a_wrong_model_name_stops_the_run() -> None:
    class RefusedError(Exception):
        status_code = 401

    model = planted()
    model.failing["query 1"] = RefusedError("sk-secret")
    with pytest.raises(BackendError, match="refuses every request: RefusedError") as caught:
        list(ChatModelBackend(model).score([ScoreRequest((Message("user", "query 1"),), LABELS)]))
    assert "sk-secret" not in str(caught.value)


def test_the_identity_holds_no_secret(base_url: str) -> None:
    model = ChatOpenAI(
        model="m",
        base_url=base_url.replace("http://", "http://user:hunter2@"),
        api_key="sk-canary-0123456789",
        default_headers={"x-auth": "canary-header"},
        temperature=0.5,
    )
    text = json.dumps(model_identity(model))
    assert "canary" not in text
    assert "hunter2" not in text
    assert model_identity(model)["parameters"]["temperature"] == 0.5
    assert model_identity(model) != model_identity(ChatOpenAI(model="m", base_url=base_url, api_key="x"))


def test_developer_turns_and_names_are_kept() -> None:
    turns = to_messages(
        (Message("developer", "d"), Message("user", "u", "example_user"), Message("assistant", "a"))
    )
    assert isinstance(turns[0], SystemMessage)
    assert turns[0].additional_kwargs == {"__openai_role__": "developer"}
    assert [t.name for t in turns] == [None, "example_user", None]
    assert to_messages("text")[0].content == "text"


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="model: got a ChatPromptTemplate"):
        ChatModelBackend(chat_prompt())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="concurrency: got 0"):
        ChatModelBackend(planted(), concurrency=0)
