"""A backend that answers by calling functions: for arithmetic, failure paths and users' own tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from proxyprompt.errors import BackendError, InputError

from .base import (
    GenerateRequest,
    GenerateResult,
    OnSend,
    OnTokens,
    Rendered,
    ScoreRequest,
    ScoreResult,
    Usage,
)

__all__ = ["ScriptedBackend"]

Scores: TypeAlias = ScoreResult | Mapping[str, float | None] | Sequence[float | None]
_Request = TypeVar("_Request", ScoreRequest, GenerateRequest)
_Result = TypeVar("_Result", ScoreResult, GenerateResult)


class ScriptedBackend:
    """Answer every request with a Python function; no model, no network.

    Parameters
    ----------
    score : callable, optional
        ``(ScoreRequest) -> answer``. The answer is a mapping from candidate to natural-log probability, a
        sequence of log-probabilities in the order of ``request.candidates``, or a finished
        :class:`~proxyprompt.backends.base.ScoreResult`. ``None``, or a candidate absent from the mapping, is
        a missing value.
    generate : callable, optional
        ``(GenerateRequest) -> str`` or a finished :class:`~proxyprompt.backends.base.GenerateResult`.
    name : str
        Name shown to people.
    block_size : int
        Requests answered per block.
    identity : mapping, optional
        What a ledger tells two scripts apart by; ``{"provider": "scripted", "name": name}`` by default. Two
        scripts with different answers need different identities (or names).

    Attributes
    ----------
    score_calls, generate_calls : int
        How often each script was called.

    Raises
    ------
    InputError
        If an argument, or an answer of a script, breaks a rule.

    Notes
    -----
    A script that raises :class:`~proxyprompt.errors.BackendError` scripts a failed call: its text becomes
    ``result.error``. Any other exception is passed on after the results of that block are yielded. ``usage``
    counts words separated by white space.

    Examples
    --------
    >>> from math import log
    >>> backend = ScriptedBackend(score=lambda request: {" yes": log(0.75), " no": log(0.25)})
    >>> [[(index, result)]] = list(backend.score([ScoreRequest("Sky blue?", (" no", " yes"))]))
    >>> index, [round(value, 3) for value in result.logprobs]
    (0, [-1.386, -0.288])
    """

    deterministic = True

    def __init__(
        self,
        score: Callable[[ScoreRequest], Scores] | None = None,
        generate: Callable[[GenerateRequest], str | GenerateResult] | None = None,
        *,
        name: str = "scripted",
        block_size: int = 16,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise InputError(f"block_size={block_size!r} must be an integer of at least 1.")
        for argument, script in (("score", score), ("generate", generate)):
            if script is not None and not callable(script):
                raise InputError(
                    f"{argument}={script!r} is not callable.", hint="Pass a function of one request, or None."
                )
        self._score = score
        self._generate = generate
        self._name = name
        self._block_size = block_size
        self._identity = {"provider": "scripted", "name": name} if identity is None else dict(identity)
        self.score_calls = 0
        self.generate_calls = 0

    def __repr__(self) -> str:
        return f"ScriptedBackend(name={self._name!r})"

    @property
    def name(self) -> str:
        """Name shown to people."""
        return self._name

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a ledger tells two scripts apart by."""
        return dict(self._identity)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, ScoreResult]]]:
        """Yield blocks of ``(index, ScoreResult)`` in order; the script runs when a block is asked for.

        Raises
        ------
        InputError
            If the backend was made without ``score=``, or the script's answer breaks a rule.
        """
        script = self._score
        if script is None:
            raise InputError("This ScriptedBackend has no score script.", hint="Pass score=FUNCTION.")
        return self._blocks(requests, lambda request: self._score_one(script, request), on_send, on_tokens)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, GenerateResult]]]:
        """Yield blocks of ``(index, GenerateResult)`` in order; see :meth:`score`.

        Raises
        ------
        InputError
            If the backend was made without ``generate=``, or the script's answer is not text.
        """
        script = self._generate
        if script is None:
            raise InputError("This ScriptedBackend has no generate script.", hint="Pass generate=FUNCTION.")
        return self._blocks(requests, lambda request: self._generate_one(script, request), on_send, on_tokens)

    def _blocks(
        self,
        requests: Sequence[_Request],
        answer: Callable[[_Request], _Result],
        on_send: OnSend | None,
        on_tokens: OnTokens | None,
    ) -> Iterator[Sequence[tuple[int, _Result]]]:
        for start in range(0, len(requests), self._block_size):
            indices = range(start, min(start + self._block_size, len(requests)))
            if on_send is not None:
                on_send(tuple(indices))
            block: list[tuple[int, _Result]] = []
            failure: Exception | None = None
            for index in indices:
                try:
                    block.append((index, answer(requests[index])))
                except Exception as error:  # re-raised below, once the answers before it are delivered
                    failure = error
                    break
            if on_tokens is not None:
                on_tokens(sum(r.usage.prompt_tokens + r.usage.completion_tokens for _, r in block))
            if block:
                yield block
            if failure is not None:
                raise failure

    def _score_one(self, script: Callable[[ScoreRequest], Scores], request: ScoreRequest) -> ScoreResult:
        self.score_calls += 1
        missing = (None,) * len(request.candidates)
        try:
            answer = script(request)
        except BackendError as error:
            return ScoreResult(missing, (False,) * len(missing), error=str(error) or type(error).__name__)
        if isinstance(answer, ScoreResult):
            return answer
        if isinstance(answer, Mapping):
            values = [answer.get(candidate) for candidate in request.candidates]
        else:
            values = list(answer)
        if len(values) != len(request.candidates):
            raise InputError(
                f"The score script returned {len(values)} values for {len(request.candidates)} candidates.",
                hint="Return one log-probability per candidate, or a mapping from candidates to them.",
            )
        logprobs = tuple(_checked(value) for value in values)
        return ScoreResult(logprobs, (False,) * len(logprobs), Usage(prompt_tokens=_words(request.prompt)))

    def _generate_one(
        self, script: Callable[[GenerateRequest], str | GenerateResult], request: GenerateRequest
    ) -> GenerateResult:
        self.generate_calls += 1
        try:
            answer = script(request)
        except BackendError as error:
            return GenerateResult(None, error=str(error) or type(error).__name__)
        if isinstance(answer, GenerateResult):
            return answer
        if not isinstance(answer, str):
            raise InputError(f"The generate script returned {answer!r}; it must return text.")
        return GenerateResult(answer, Usage(_words(request.prompt), _words(answer)))


def _checked(value: float | None) -> float | None:
    if value is None:
        return None
    number = float(value)
    if math.isnan(number) or number > 0:
        raise InputError(
            f"The score script returned {value!r} as a log-probability; it must be at most 0.",
            hint="Use None for a missing value.",
        )
    return number


def _words(prompt: Rendered) -> int:
    text = prompt if isinstance(prompt, str) else " ".join(message.content for message in prompt)
    return len(text.split())
