"""Reading answers of OpenAI-compatible servers: no network, no SDK."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyprompt.backends._openai_wire import (
    Endpoint,
    ListedToken,
    UnreadableAnswerError,
    classify,
    label_tokens,
    match_label,
    public_url,
    read_answer,
    read_labels,
    redact,
    retry_after,
)
from proxyprompt.errors import InputError


def listed(**tokens: float | None) -> list[ListedToken]:
    return [ListedToken(token.encode(), value) for token, value in tokens.items()]


def answer(logprobs: object, endpoint: Endpoint = "completions") -> dict[bytes, float | None] | None:
    choice = {"text": " a", "logprobs": logprobs, "message": {"content": " a"}}
    tokens = read_answer(json.dumps({"choices": [choice]}), endpoint).listed
    return None if tokens is None else {token.core: token.logprob for token in tokens}


def entry(token: str, logprob: object, **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, **more}


TOP = [entry(" a", -0.5), entry("b", -2)]


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{**TOP[0], "top_logprobs": TOP}]},
        {"tokens": [" a"], "token_logprobs": [-0.5], "top_logprobs": [{" a": -0.5, "b": -2}]},
    ],
    ids=["objects", "dict"],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_every_dialect_reads_alike(logprobs: object, endpoint: Endpoint) -> None:
    assert answer(logprobs, endpoint) == {b"a": -0.5, b"b": -2.0}


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [entry(" a", -0.5, top_logprobs=[])]},
        {"tokens": [" a"], "token_logprobs": [-0.5], "top_logprobs": None},
    ],
    ids=["objects", "dict"],
)
def test_the_chosen_token_alone_is_a_list_of_one(logprobs: object) -> None:
    assert answer(logprobs) == {b"a": -0.5}


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, [], "no"])
def test_no_log_probabilities(logprobs: object) -> None:
    assert answer(logprobs) is None


@pytest.mark.parametrize(
    "logprobs", [{"content": []}, {"content": [3]}, {"top_logprobs": []}, {"top_logprobs": [None]}]
)
def test_an_empty_list_is_not_the_same_as_none(logprobs: object) -> None:
    assert answer(logprobs) == {}


def test_odd_entries() -> None:
    top = [
        entry("sentinel", -9999.0),
        entry("rounding", 3e-7),
        entry("positive", 0.7),
        entry("nan", math.nan),
        entry("minus", -math.inf),
        entry("null", None),
        entry("true", True),
        entry("\n", -1.0),
        entry("", -1.0),
        entry("\ufffd", -3.0, bytes=[32, 0xE5, 0xA5]),
        entry("odd bytes", -4.0, bytes=[999]),
        {"logprob": -1.0},
        "nonsense",
    ]
    assert answer({"content": [{"top_logprobs": top}]}) == {
        b"rounding": 0.0,
        b"positive": None,
        b"nan": None,
        b"minus": None,
        b"null": None,
        b"true": None,
        b"\xe5\xa5": -3.0,
        b"odd bytes": -4.0,
    }


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": None}, {"choices": [None]}, [], 3])
def test_no_choices(body: object) -> None:
    with pytest.raises(UnreadableAnswerError, match="holds no choices"):
        read_answer(json.dumps(body), "chat")


@pytest.mark.parametrize("raw", [b"", b"{", b"<html>", b"\xff"])
def test_no_json(raw: bytes) -> None:
    with pytest.raises(UnreadableAnswerError, match="not JSON"):
        read_answer(raw, "chat")


def test_usage_and_model() -> None:
    details = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
    read = read_answer(
        json.dumps({"choices": [{"text": "x"}], "usage": details, "model": "m", "id": 1}), "completions"
    )
    assert (read.usage.prompt_tokens, read.usage.completion_tokens, read.usage.cached_tokens) == (9, 1, 4)
    assert (read.text, read.model, read.listed) == ("x", "m", None)
    odd = {"prompt_tokens": "9", "completion_tokens": None, "prompt_tokens_details": None}
    read = read_answer(json.dumps({"choices": [{"message": None}], "usage": odd, "model": 3}), "chat")
    assert read.usage.prompt_tokens == read.usage.completion_tokens == 0
    assert (read.text, read.model) == (None, None)


def test_listed_labels_get_their_log_probability_and_spacings_add_up() -> None:
    tokens = [*listed(yes=-1.0, no=-2.0, No=-0.7), ListedToken(b"yes", -3.0)]
    values, censored = read_labels(tokens, (" yes", "no"))
    assert values == (pytest.approx(math.log(math.exp(-1) + math.exp(-3))), -2.0)
    assert censored == (False, False)


def test_unlisted_labels_get_the_smallest_listed_value_as_bound() -> None:
    assert read_labels(listed(yes=-0.1, maybe=-4.0), ("yes", "no")) == ((-0.1, -4.0), (False, True))
    assert read_labels(listed(The=-0.1, A=-4.0), ("yes", "no")) == ((-4.0, -4.0), (True, True))


def test_labels_of_several_tokens_get_the_sum_of_their_beginnings_as_bound() -> None:
    values, censored = read_labels(listed(b=-1.0, bill=-2.0, bug=-3.0), ("billing", "bug"))
    assert values == (pytest.approx(math.log(math.exp(-1) + math.exp(-2))), -3.0)
    assert censored == (True, False)


def test_characters_of_several_tokens() -> None:
    half = "好".encode()[:2]
    assert read_labels([ListedToken(half, -0.5), ListedToken(b"x", -6.0)], ("好", "坏")) == (
        (-0.5, -6.0),
        (True, True),
    )


def test_shared_beginnings_of_labels_that_may_have_won_are_an_error() -> None:
    message = "labels 'very good', 'very bad' begin with the same token"
    with pytest.raises(UnreadableAnswerError, match=message):
        read_labels(listed(very=-0.1, neutral=-3.0), ("very good", "neutral", "very bad"))
    with pytest.raises(UnreadableAnswerError, match="labels '1', '10' begin"):
        read_labels([ListedToken(b"1", -0.1), ListedToken(b"2", -3.0)], ("1", "2", "10"))


def test_shared_beginnings_of_labels_that_cannot_win_are_bounds() -> None:
    values, censored = read_labels(listed(very=-3.0, neutral=-0.1), ("very good", "neutral", "very bad"))
    assert values == (-3.0, -0.1, -3.0)
    assert censored == (True, False, True)
    tokens = [ListedToken(b"1", -0.1), ListedToken(b"10", -3.0)]
    assert read_labels(tokens, ("1", "10")) == ((-0.1, -3.0), (False, False))


def test_labels_without_a_usable_number_are_an_error() -> None:
    with pytest.raises(UnreadableAnswerError, match="no usable log-probability for 'no'"):
        read_labels(listed(yes=-1.0, no=None), ("yes", "no"))
    with pytest.raises(UnreadableAnswerError, match="listed no usable log-probability"):
        read_labels(listed(no=None), ("yes", "no"))
    assert read_labels(listed(yes=-1.0, no=-2.0, other=None), ("yes", "no"))[0] == (-1.0, -2.0)


@given(
    table=st.dictionaries(st.text("ab", min_size=1, max_size=3), st.floats(-30, 0), min_size=1, max_size=8),
    labels=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=5, unique=True),
)
def test_the_label_that_is_whole_and_alone_is_never_beaten_by_its_own_bound(
    table: dict[str, float], labels: list[str]
) -> None:
    try:
        values, censored = read_labels(listed(**table), labels)
    except UnreadableAnswerError:
        return
    for label, value, bound in zip(labels, values, censored, strict=True):
        assert min(table.values()) <= value <= 0
        if not bound:
            assert value == table[label]
        elif label not in table and not any(label.startswith(token) for token in table):
            assert value == min(table.values())


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (" positive", 0),
        ("Positive.", 0),
        ("NEGATIVE\nReview:", 1),
        ("very positive!", 2),
        ("positively", None),
        ("the answer is positive", None),
        ("", None),
        ("positive2", None),
        ("正面的评价", 3),
    ],
)
def test_text_is_matched_to_labels(text: str, chosen: int | None) -> None:
    assert match_label(text, (" positive", " negative", " very positive", "正面")) == chosen


def test_labels_that_differ_by_case() -> None:
    assert match_label("us", ("US", "us")) == 1
    assert match_label("Us", ("US", "us")) is None


def test_room_for_a_label() -> None:
    assert label_tokens(("a", "bc")) == 8
    assert label_tokens(("a" * 20,)) == 22
    assert label_tokens(("好" * 50,)) == 64


@pytest.mark.parametrize(
    ("status", "code", "param", "message", "fault"),
    [
        (401, None, None, "no", "fatal"),
        (404, None, None, "no such model", "fatal"),
        (429, "insufficient_quota", None, "", "fatal"),
        (400, "model_not_found", None, "", "fatal"),
        (429, "rate_limit_exceeded", None, "", "retry"),
        (503, None, None, "Loading model", "retry"),
        (504, None, None, "", "failed"),
        (400, "unsupported_parameter", "logprobs", "Unsupported parameter", "no-logprobs"),
        (400, None, None, "logprobs is not supported with this model", "no-logprobs"),
        (
            400,
            None,
            None,
            "Requested sample logprobs of 20, which is greater than max allowed: 5",
            "too-many-logprobs",
        ),
        (400, "integer_above_max_value", "logprobs", "Expected a value <= 5", "too-many-logprobs"),
        (
            400,
            "unsupported_parameter",
            "max_tokens",
            "Use 'max_completion_tokens' instead.",
            "max-tokens-name",
        ),
        (400, "invalid_value", "max_tokens", "max_tokens is too large", "failed"),
        (422, None, None, "bad", "failed"),
    ],
)
def test_errors_are_told_apart(
    status: int, code: str | None, param: str | None, message: str, fault: str
) -> None:
    assert classify(status, code, param, message) == fault


def test_waiting_time() -> None:
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after-ms": "250", "retry-after": "3"}) == 0.25
    for odd in (
        {},
        {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"},
        {"retry-after": "-1"},
        {"retry-after": "nan"},
    ):
        assert retry_after(odd) is None


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://api.example.com/v1/", "https://api.example.com/v1"),
        ("http://me:secret@Host:8080/v1?key=abc#x", "http://host:8080/v1"),
        ("http://[::1]:1/v1", "http://[::1]:1/v1"),
    ],
)
def test_public_url(url: str, public: str) -> None:
    assert public_url(url) == public


@pytest.mark.parametrize(
    "url", ["localhost:8080", "ftp://x/v1", "http://", "http://me:secret@/v1", "http://[x"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="base_url is not an http") as caught:
        public_url(url)
    assert "secret" not in str(caught.value)


def test_credentials_are_redacted() -> None:
    text = "key CANARY, sk-abc_DEF-123, Bearer abc.def, http://me:pw@host/x; task-force stays"
    assert redact(text, ["CANARY", ""]) == "key ***, sk-***, Bearer ***, http://***@host/x; task-force stays"
