from __future__ import annotations

import math

import pytest

from proxyprompt.backends.base import GenerateRequest, GenerateResult, Message, ScoreRequest, ScoreResult
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.errors import BackendError, InputError, RetryableBackendError

from .contract import GeneratorContract, ScorerContract, check_generate_result, check_score_result, in_order

LABELS = (" yes", " no")


def halves(request: ScoreRequest) -> dict[str, float]:
    return dict.fromkeys(request.candidates, math.log(0.5))


class TestContract(ScorerContract, GeneratorContract):
    @pytest.fixture
    def backend(self) -> ScriptedBackend:
        return ScriptedBackend(halves, lambda request: "fine", block_size=2)

    @pytest.fixture
    def score_requests(self) -> list[ScoreRequest]:
        return [ScoreRequest(f"question {k}", LABELS) for k in range(5)]

    @pytest.fixture
    def generate_requests(self) -> list[GenerateRequest]:
        return [GenerateRequest(f"question {k}", stop=("\n",)) for k in range(5)]


@pytest.mark.parametrize(
    "answer",
    [{" no": -2.0, " yes": -0.5, " else": -9.0}, [-0.5, -2], ScoreResult((-0.5, -2.0), (False, False))],
    ids=["mapping", "sequence", "result"],
)
def test_every_form_of_answer(answer: object) -> None:
    backend = ScriptedBackend(lambda request: answer)  # type: ignore[arg-type, return-value]
    [[(_, result)]] = backend.score([ScoreRequest("q", LABELS)])
    assert result.logprobs == (-0.5, -2.0)
    assert result.censored == (False, False)


def test_absent_and_none_are_missing() -> None:
    backend = ScriptedBackend(lambda request: {" yes": None})
    [[(_, result)]] = backend.score([ScoreRequest("q", LABELS)])
    assert result.logprobs == (None, None)
    assert result.error is None


def test_finished_text_result_is_passed_on() -> None:
    answer = GenerateResult("x", model_returned="m")
    [[(_, result)]] = ScriptedBackend(generate=lambda request: answer).generate([GenerateRequest("q")])
    assert result is answer


def test_calls_are_counted_as_blocks_are_asked_for() -> None:
    backend = ScriptedBackend(halves, lambda request: "t", block_size=3)
    blocks = backend.score([ScoreRequest("q", LABELS)] * 7)
    assert backend.score_calls == 0
    assert [index for index, _ in next(blocks)] == [0, 1, 2]
    assert backend.score_calls == 3
    assert [len(block) for block in blocks] == [3, 1]
    assert backend.score_calls == 7
    list(backend.generate([GenerateRequest("q")] * 2))
    assert (backend.score_calls, backend.generate_calls) == (7, 2)


def test_backend_error_becomes_result_error() -> None:
    def fail(request: object) -> str:
        raise RetryableBackendError("server down.", hint="Try later.")

    backend = ScriptedBackend(fail, fail)  # type: ignore[arg-type]
    score, generate = ScoreRequest("q", LABELS), GenerateRequest("q")
    [[(_, scored)]] = backend.score([score])
    [[(_, text)]] = backend.generate([generate])
    check_score_result(score, scored)
    check_generate_result(generate, text)
    assert scored.error == text.error == "server down. Try later."


def test_other_errors_pass_after_the_results_before_them() -> None:
    def third_fails(request: ScoreRequest) -> dict[str, float]:
        if request.prompt == "2":
            raise ZeroDivisionError("scripted")
        return halves(request)

    backend = ScriptedBackend(third_fails)
    blocks = backend.score([ScoreRequest(str(k), LABELS) for k in range(5)])
    assert [index for index, _ in next(blocks)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match="scripted"):
        next(blocks)
    assert backend.score_calls == 3


def test_an_empty_backend_error_still_has_a_reason() -> None:
    def fail(request: ScoreRequest) -> dict[str, float]:
        raise BackendError("")

    [[(_, result)]] = ScriptedBackend(fail).score([ScoreRequest("q", LABELS)])
    assert result.error == "BackendError"


def test_usage_counts_words_and_reports_them() -> None:
    tokens: list[int] = []
    backend = ScriptedBackend(halves, lambda request: "two words")
    chat = (Message("system", "be brief"), Message("user", "why not now"))
    [result] = in_order(backend.score([ScoreRequest(chat, LABELS)], on_tokens=tokens.append), 1)
    [text] = in_order(backend.generate([GenerateRequest("one")], on_tokens=tokens.append), 1)
    assert result.usage.prompt_tokens == 5
    assert (text.usage.prompt_tokens, text.usage.completion_tokens) == (1, 2)
    assert tokens == [5, 3]


def test_identity_by_name_or_as_given() -> None:
    assert ScriptedBackend(halves, name="a").identity == {"provider": "scripted", "name": "a"}
    assert ScriptedBackend(halves, identity={"provider": "x", "v": 1}).identity == {"provider": "x", "v": 1}
    assert repr(ScriptedBackend(halves, name="a")) == "ScriptedBackend(name='a')"


@pytest.mark.parametrize("value", [0.1, math.nan, math.inf])
def test_values_that_are_no_log_probability(value: float) -> None:
    backend = ScriptedBackend(lambda request: [-1.0, value])
    with pytest.raises(InputError, match="must be at most 0"):
        list(backend.score([ScoreRequest("q", LABELS)]))


def test_wrong_number_of_values() -> None:
    backend = ScriptedBackend(lambda request: [-1.0])
    with pytest.raises(InputError, match="returned 1 values for 2 candidates"):
        list(backend.score([ScoreRequest("q", LABELS)]))


def test_text_that_is_no_text() -> None:
    backend = ScriptedBackend(generate=lambda request: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="returned 3; it must return text"):
        list(backend.generate([GenerateRequest("q")]))


def test_arguments_are_checked() -> None:
    with pytest.raises(InputError, match="block_size=0 must be an integer of at least 1"):
        ScriptedBackend(halves, block_size=0)
    with pytest.raises(InputError, match="score='x' is not callable"):
        ScriptedBackend("x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no score script"):
        ScriptedBackend(generate=lambda request: "t").score([])
    with pytest.raises(InputError, match="no generate script"):
        ScriptedBackend(halves).generate([])
