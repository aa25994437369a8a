"""Reading answers of OpenAI-compatible servers: no network, no SDK."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyprompt.backends._openai_address import check_address, public_url, redact
from proxyprompt.backends._openai_faults import classify, read_allowance, retry_after
from proxyprompt.backends._openai_labels import (
    ListedToken,
    Position,
    SharedBeginningError,
    UnreadableAnswerError,
    label_tokens,
    match_label,
    positions_needed,
    read_decision,
    read_labels,
    read_texts,
)
from proxyprompt.backends._openai_wire import Endpoint, read_answer, read_body, read_decision_answer
from proxyprompt.errors import InputError


def position(chosen: str | None, *extra: ListedToken, **tokens: float | None) -> Position:
    listed = [ListedToken(token.encode(), value) for token, value in tokens.items()]
    return Position((*listed, *extra), None if chosen is None else chosen.encode())


def listed(*extra: ListedToken, **tokens: float | None) -> list[Position]:
    return [position(None, *extra, **tokens)]


def answer(logprobs: object, endpoint: Endpoint = "completions") -> dict[bytes, float | None] | None:
    choice = {"text": " a", "logprobs": logprobs, "message": {"content": " a"}}
    path = read_answer({"choices": [choice]}, endpoint).first.path
    return None if path is None else {token.raw.strip(): token.logprob for token in path[0].listed}


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
        b"": -1.0,
    }


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": None}, {"choices": [None]}, [], 3])
def test_no_choices(body: object) -> None:
    with pytest.raises(UnreadableAnswerError, match="holds no choices"):
        read_answer(read_body(json.dumps(body)), "chat")


@pytest.mark.parametrize("raw", [b"", b"{", b"<html>", b"\xff"])
def test_no_json(raw: bytes) -> None:
    with pytest.raises(UnreadableAnswerError, match="not JSON"):
        read_body(raw)


def test_usage_and_model() -> None:
    details = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
    read = read_answer({"choices": [{"text": "x"}], "usage": details, "model": "m", "id": 1}, "completions")
    assert (read.usage.prompt_tokens, read.usage.completion_tokens, read.usage.cached_tokens) == (9, 1, 4)
    assert (read.first.text, read.model, read.first.path) == ("x", "m", None)
    odd = {"prompt_tokens": "nine", "completion_tokens": None, "prompt_tokens_details": None}
    read = read_answer({"choices": [{"message": None}], "usage": odd, "model": 3}, "chat")
    assert read.usage.prompt_tokens == read.usage.completion_tokens == 0
    assert (read.first.text, read.model) == (None, None)


def test_listed_labels_get_their_log_probability_and_spacings_add_up() -> None:
    tokens = listed(ListedToken(b" yes", -3.0), yes=-1.0, no=-2.0, No=-0.7)
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
    assert read_labels(listed(ListedToken(half, -0.5), x=-6.0), ("好", "坏")) == (
        (-0.5, -6.0),
        (True, True),
    )


def test_shared_beginnings_of_labels_that_may_have_won_are_an_error() -> None:
    message = "labels 'very good', 'very bad' begin with the same token"
    with pytest.raises(UnreadableAnswerError, match=message):
        read_labels(listed(very=-0.1, neutral=-3.0), ("very good", "neutral", "very bad"))
    with pytest.raises(UnreadableAnswerError, match="labels '1', '10' begin"):
        read_labels(listed(ListedToken(b"1", -0.1), ListedToken(b"2", -3.0)), ("1", "2", "10"))


def test_shared_beginnings_of_labels_that_cannot_win_are_bounds() -> None:
    values, censored = read_labels(listed(very=-3.0, neutral=-0.1), ("very good", "neutral", "very bad"))
    assert values == (-3.0, -0.1, -3.0)
    assert censored == (True, False, True)
    tokens = listed(ListedToken(b"1", -0.1), ListedToken(b"10", -3.0))
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


ALL = ("logprobs", "temperature", "max_tokens", "n", "prompt_cache_key")


@pytest.mark.parametrize(
    ("status", "code", "param", "message", "fault"),
    [
        (401, None, None, "no", "fatal"),
        (404, None, None, "no such model", "fatal"),
        (302, None, None, "", "fatal"),
        (429, "insufficient_quota", None, "", "fatal"),
        (400, "model_not_found", None, "", "fatal"),
        (429, "rate_limit_exceeded", None, "", "retry"),
        (503, None, None, "Loading model", "retry"),
        (504, None, None, "", "maybe-billed"),
        (400, "unsupported_parameter", "logprobs", "Unsupported parameter", "logprobs"),
        (400, None, None, "logprobs is not supported with this model", "logprobs"),
        (400, None, None, "logprobs of 20, which is greater than max allowed: 5", "too-many-logprobs"),
        (400, "integer_above_max_value", "logprobs", "Expected a value <= 5", "too-many-logprobs"),
        (400, "unsupported_parameter", "max_tokens", "Use 'max_completion_tokens' instead.", "max_tokens"),
        (400, "invalid_value", "max_tokens", "max_tokens is too large", "failed"),
        (
            400,
            None,
            None,
            "'max_tokens' or 'max_completion_tokens' is too large; context length is 9",
            "failed",
        ),
        (400, "context_length_exceeded", "messages", "reduce max_tokens instead", "failed"),
        (400, "unsupported_value", "temperature", "'temperature' does not support 0", "temperature"),
        (400, None, None, "Only one completion choice is allowed, 'n' is not supported", "n"),
        (400, None, None, "Field 'n': Value must be between 1 <= value <= 1, but got 3", "n"),
        (400, None, None, "no support for images", "failed"),
        (
            422,
            None,
            None,
            "[{'type': 'extra_forbidden', 'loc': ['body', 'prompt_cache_key']}]",
            "prompt_cache_key",
        ),
        (422, None, None, "bad", "failed"),
    ],
)
def test_errors_are_told_apart(
    status: int, code: str | None, param: str | None, message: str, fault: str
) -> None:
    verdict = classify(status, code, param, message, ALL)
    assert (verdict.field or verdict.fault) == fault
    assert (verdict.field is not None) == (verdict.fault == "unsupported")


def test_waiting_time() -> None:
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after-ms": "250", "retry-after": "3"}) == 0.25
    date = {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}
    noon = datetime(2026, 10, 21, 7, 27, tzinfo=UTC).timestamp()
    assert retry_after(date, now=noon) == 60
    assert retry_after(date, now=noon + 600) == 0
    for odd in (
        {},
        {"retry-after": "soon"},
        {"retry-after": "-1"},
        {"retry-after": "nan"},
        {"retry-after": "inf"},
    ):
        assert retry_after(odd) is None


def test_what_is_left() -> None:
    headers = {
        "x-ratelimit-remaining-requests": "7",
        "x-ratelimit-reset-requests": "6m0.5s",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "120ms",
    }
    left = read_allowance(headers)
    assert (left.requests, left.requests_reset, left.tokens, left.tokens_reset) == (7, 360.5, 0, 0.12)
    odd = read_allowance({"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-requests": "soon"})
    assert (odd.requests, odd.requests_reset) == (None, None)


# --- labels of several tokens --------------------------------------------------------------------------


VERY = position(" very", **{" very": -0.1, " neutral": -3.0})


def test_a_label_is_followed_along_the_tokens_that_were_chosen() -> None:
    path = [VERY, position(" good", **{" good": -0.2, " bad": -2.0})]
    labels = ("very good", "neutral", " very bad")
    values, censored = read_labels(path, labels)
    assert values == pytest.approx((-0.3, -3.0, -2.1))
    assert censored == (False, False, False)
    assert positions_needed(path, labels) == 2
    assert positions_needed([position(" neutral"), position("\n")], labels) == 1
    with pytest.raises(SharedBeginningError):
        read_labels([VERY], labels)


def test_beyond_the_list_a_follower_is_bounded() -> None:
    path = [VERY, position(" good", **{" good": -0.2, " poor": -4.0})]
    values, censored = read_labels(path, ("very good", "neutral", "very bad"))
    assert values == pytest.approx((-0.3, -3.0, -4.1))
    assert censored == (False, False, True)


def test_white_space_first_is_read_behind() -> None:
    path = [position(" ", **{" ": -0.5, "no": -2.0}), position("yes", yes=-0.1, no=-3.0)]
    values, censored = read_labels(path, ("yes", "no"))
    assert values[0] == pytest.approx(-0.6)
    assert values[1] == pytest.approx(math.log(math.exp(-2.0) + math.exp(-3.5)))
    assert censored == (False, False)
    with pytest.raises(SharedBeginningError, match="white space only"):
        read_labels(path[:1], ("yes", "no"))


def test_a_label_that_another_one_goes_on_from_gives_up_its_share() -> None:
    path = [position("1", **{"1": -0.1, "2": -3.0}), position("0", **{"0": -0.2, "\n": -1.8})]
    values, censored = read_labels(path, ("1", "2", "10"))
    assert values[2] == pytest.approx(-0.3)
    assert values[0] == pytest.approx(math.log(math.exp(-0.1) - math.exp(-0.3)))
    assert censored == (False, False, False)
    assert positions_needed(path, ("1", "2", "10")) == 2


def test_texts_are_counted() -> None:
    (logs, censored), samples = read_texts(["yes", "no.", "Yes", "perhaps"], ("yes", "no", "never"))
    assert logs == (math.log(0.5), math.log(0.25), None)
    assert (censored, samples) == ((True, True, True), 4)
    with pytest.raises(UnreadableAnswerError, match="unparsable answer 'perhaps'"):
        read_texts(["perhaps", None], ("yes", "no"))


def test_decisions_are_as_fine_as_they_are_rounded() -> None:
    assert read_decision({"a": 0.73, "b": 0.27, "c": 0.0}, ("a", " b", "c")) == (
        (math.log(0.73), math.log(0.27), math.log(0.005)),
        (False, False, True),
    )
    assert read_decision({"a": 1.0, "b": 0.0}, ("a", "b"))[0] == (math.log(0.995), math.log(0.005))
    assert read_decision({"a": 0.9991, "b": 0.0009}, ("a", "b"))[0][1] == math.log(0.0009)
    for odd in ({"a": 0.5}, {"a": 0.5, "b": None}, {"a": 0.5, "b": 1.5}, {"a": 0.5, "b": math.nan}):
        with pytest.raises(UnreadableAnswerError, match="states no probability for 'b'"):
            read_decision(odd, ("a", "b"))
    with pytest.raises(UnreadableAnswerError, match="declined to decide") as caught:
        read_decision_answer({"answers": [{"type": "refusal"}], "usage": {"input_tokens": 4}})
    assert caught.value.usage is not None
    assert caught.value.usage.prompt_tokens == 4


@pytest.mark.parametrize(
    "url",
    ["https://api.example.com/v1", "http://127.0.0.1:8080/v1", "http://localhost/v1", "http://[::1]:1/v1"],
)
def test_addresses_that_are_safe(url: str) -> None:
    check_address(url)


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
