"""What every backend keeps, as tests to inherit.

Subclass :class:`ScorerContract` or :class:`GeneratorContract` in a test module and give two fixtures:
``backend`` (a fresh one) and ``score_requests`` / ``generate_requests`` (at least two, all answerable; those
to score with at least two candidates each). Override ``tolerance`` where repeated calls may differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import pytest

from proxyprompt.backends.base import (
    Backend,
    GenerateRequest,
    GenerateResult,
    Generator,
    Scorer,
    ScoreRequest,
    ScoreResult,
    Usage,
)


def check_score_result(request: ScoreRequest, result: ScoreResult) -> None:
    """One value and one flag per candidate; log-probabilities at most 0; errors without values."""
    assert len(result.logprobs) == len(request.candidates)
    assert len(result.censored) == len(request.candidates)
    assert all(isinstance(flag, bool) for flag in result.censored)
    for value in result.logprobs:
        assert value is None or (isinstance(value, float) and not math.isnan(value) and value <= 0)
    if result.error is not None:
        check_error(result.error)
        assert set(result.logprobs) == {None}
        assert not any(result.censored)
    check_usage(result.usage)


def check_generate_result(request: GenerateRequest, result: GenerateResult) -> None:
    """Text or an error, never both; cut before every stop."""
    assert (result.text is None) == (result.error is not None)
    if result.text is None:
        check_error(result.error)
    else:
        assert not any(stop in result.text for stop in request.stop)
    check_usage(result.usage)


def check_error(error: str | None) -> None:
    """A reason a person can read, on one line."""
    assert error
    assert error == error.strip()
    assert "\n" not in error


def check_usage(usage: Usage) -> None:
    """Counts, and no more cached tokens than there are."""
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
    assert all(isinstance(count, int) and count >= 0 for count in counts)
    assert usage.cached_tokens <= usage.prompt_tokens


def in_order(blocks: Iterator[Sequence[tuple[int, Any]]], count: int) -> list[Any]:
    """All results by index, each index exactly once, no empty block."""
    found: dict[int, Any] = {}
    for block in blocks:
        assert len(block) > 0
        for index, result in block:
            assert index not in found
            found[index] = result
    assert sorted(found) == list(range(count))
    return [found[index] for index in range(count)]


Ask: TypeAlias = Callable[..., Iterator[Sequence[tuple[int, Any]]]]
"""``backend.score`` or ``backend.generate``."""


def check_identity(backend: Any) -> None:
    """A name, and an identity that JSON carries unchanged."""
    assert isinstance(backend, Backend)
    assert isinstance(backend.name, str)
    assert backend.name
    assert backend.identity["provider"]
    assert json.loads(json.dumps(dict(backend.identity), allow_nan=False)) == dict(backend.identity)


def check_announced_first(ask: Ask, requests: Sequence[Any]) -> None:
    """``on_send`` names each index once, before its result is there."""
    announced: list[int] = []
    for block in ask(requests, on_send=announced.extend):
        assert {index for index, _ in block} <= set(announced)
    assert sorted(announced) == list(range(len(requests)))


def check_lazy(ask: Ask, requests: Sequence[Any]) -> None:
    """Nothing is sent before the first block is asked for, nor after the last one that was."""
    announced: list[int] = []
    blocks = ask(requests, on_send=announced.extend)
    assert announced == []
    next(blocks)
    before = list(announced)
    assert before
    blocks.close()  # type: ignore[attr-defined]
    assert announced == before


def check_refusal(ask: Ask, requests: Sequence[Any]) -> None:
    """An exception of ``on_send`` (a spent budget) reaches the caller unchanged."""

    def refuse(indices: Sequence[int]) -> None:
        raise KeyError("no budget")

    with pytest.raises(KeyError, match="no budget"):
        list(ask(requests, on_send=refuse))


def check_tokens(ask: Ask, requests: Sequence[Any]) -> None:
    """``on_tokens`` gets counts."""
    tokens: list[int] = []
    list(ask(requests, on_tokens=tokens.append))
    assert all(isinstance(count, int) and count >= 0 for count in tokens)


class ScorerContract:
    """Tests of :class:`~proxyprompt.backends.base.Scorer`."""

    tolerance = 0.0

    def test_scorer_identity(self, backend: Scorer) -> None:
        check_identity(backend)
        assert isinstance(backend, Scorer)

    def test_scores_every_index_once(self, backend: Scorer, score_requests: Sequence[ScoreRequest]) -> None:
        results = in_order(backend.score(score_requests), len(score_requests))
        for request, result in zip(score_requests, results, strict=True):
            check_score_result(request, result)
            assert result.error is None

    def test_scores_announced_first(self, backend: Scorer, score_requests: Sequence[ScoreRequest]) -> None:
        check_announced_first(backend.score, score_requests)

    def test_scores_lazily(self, backend: Scorer, score_requests: Sequence[ScoreRequest]) -> None:
        check_lazy(backend.score, score_requests)

    def test_score_callback_error(self, backend: Scorer, score_requests: Sequence[ScoreRequest]) -> None:
        check_refusal(backend.score, score_requests)

    def test_score_tokens(self, backend: Scorer, score_requests: Sequence[ScoreRequest]) -> None:
        check_tokens(backend.score, score_requests)

    def test_scores_nothing(self, backend: Scorer) -> None:
        assert list(backend.score([])) == []

    def test_candidate_order(self, backend: Scorer, score_requests: Sequence[ScoreRequest]) -> None:
        request = score_requests[0]
        backwards = ScoreRequest(request.prompt, request.candidates[::-1])
        there, back = in_order(backend.score([request, backwards]), 2)
        for one, other in zip(there.logprobs, back.logprobs[::-1], strict=True):
            assert one == other or one == pytest.approx(other, abs=self.tolerance)
        assert there.censored == back.censored[::-1]

    def test_scores_repeat(self, backend: Scorer, score_requests: Sequence[ScoreRequest]) -> None:
        first = in_order(backend.score(score_requests), len(score_requests))
        again = in_order(backend.score(score_requests), len(score_requests))
        for one, other in zip(first, again, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=self.tolerance)


class GeneratorContract:
    """Tests of :class:`~proxyprompt.backends.base.Generator`."""

    def test_generator_identity(self, backend: Generator) -> None:
        check_identity(backend)
        assert isinstance(backend, Generator)

    def test_texts_every_index_once(
        self, backend: Generator, generate_requests: Sequence[GenerateRequest]
    ) -> None:
        results = in_order(backend.generate(generate_requests), len(generate_requests))
        for request, result in zip(generate_requests, results, strict=True):
            check_generate_result(request, result)
            assert result.error is None

    def test_texts_announced_first(
        self, backend: Generator, generate_requests: Sequence[GenerateRequest]
    ) -> None:
        check_announced_first(backend.generate, generate_requests)

    def test_texts_lazily(self, backend: Generator, generate_requests: Sequence[GenerateRequest]) -> None:
        check_lazy(backend.generate, generate_requests)

    def test_text_callback_error(
        self, backend: Generator, generate_requests: Sequence[GenerateRequest]
    ) -> None:
        check_refusal(backend.generate, generate_requests)

    def test_text_tokens(self, backend: Generator, generate_requests: Sequence[GenerateRequest]) -> None:
        check_tokens(backend.generate, generate_requests)

    def test_texts_nothing(self, backend: Generator) -> None:
        assert list(backend.generate([])) == []

    def test_texts_repeat(self, backend: Generator, generate_requests: Sequence[GenerateRequest]) -> None:
        first = in_order(backend.generate(generate_requests), len(generate_requests))
        again = in_order(backend.generate(generate_requests), len(generate_requests))
        assert [result.text for result in first] == [result.text for result in again]
