"""Scores and texts from any server that speaks the OpenAI HTTP interface, through the official SDK.

Works with versions 2 and 3 of the ``openai`` package and with llama.cpp's server, vLLM and the like. What a
server can do is found out by asking it, never by the model's name.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Literal, TypeAlias, TypeVar

from .._require import require
from ..errors import BackendError, InputError
from ._openai_wire import (
    Answer,
    Endpoint,
    UnreadableAnswerError,
    classify,
    label_tokens,
    match_label,
    prompt_fields,
    public_url,
    read_answer,
    read_labels,
    redact,
    retry_after,
)
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

__all__ = ["OpenAIBackend"]

Capability: TypeAlias = Literal["unknown", "logprobs", "label"]

_TRIES = 3
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 20.0
_DEFAULT_URL = "https://api.openai.com/v1"
_HINTS = {
    401: "Check OPENAI_API_KEY (or the client's key) and base_url.",
    403: "Check that this key may use this model.",
    404: "Check the model's name, base_url (it usually ends in /v1) and api ('chat' or 'completions').",
    429: "Check the account's plan and limits.",
}
_Result = TypeVar("_Result", ScoreResult, GenerateResult)


class _CallFailedError(Exception):
    """One call failed for good; becomes ``result.error``."""


class _NoLogprobsError(Exception):
    """The server refuses to give log-probabilities."""


class OpenAIBackend:
    """Ask an OpenAI-compatible server for label log-probabilities, labels, or text.

    Parameters
    ----------
    model : str
        Model name as the server knows it.
    client : openai.OpenAI, optional
        A synchronous client of the ``openai`` package, used as it is: its own key, timeout and retries
        apply, and retries happen on top of the ones here. Without it one is made, at the first call, from
        ``base_url``, ``OPENAI_API_KEY`` and ``OPENAI_BASE_URL``.
    base_url : str, optional
        Server to use; ``OPENAI_BASE_URL`` or OpenAI's own by default. Not together with ``client``.
    api : {"auto", "chat", "completions"}
        Endpoint. ``"auto"`` sends text to ``/completions`` and chat turns to ``/chat/completions``.
        ``"chat"`` sends text as one user message. ``"completions"`` refuses chat turns.
    top_logprobs : int
        How many of the most likely first tokens to ask for, 1 to 100; OpenAI's chat allows 20.
    concurrency : int
        Most calls in flight at a time.
    timeout : float
        Seconds until a call that gives no answer fails; it is then not repeated, as it may have been billed.
        Not used with ``client``.
    name : str, optional
        Name shown to people; ``openai:MODEL`` by default.

    Attributes
    ----------
    capability : {"unknown", "logprobs", "label"}
        What the server was found to give; the first successful :meth:`score` call finds out, alone.

    Raises
    ------
    InputError
        If an argument breaks a rule.
    MissingDependencyError
        If the ``openai`` package is not installed, at the first call.

    Notes
    -----
    **Labels from log-probabilities.** One token is generated and the list of its most likely alternatives
    read. White space around tokens and labels is set aside, so ``"good"`` and ``" good"`` count for the same
    label and their probabilities are added; case is kept apart. This departs from the exact continuation
    that a local engine scores, by the mass of the unusual spacing.

    * A label listed whole gets its log-probability.
    * A label not listed gets the smallest listed log-probability, ``censored`` (an upper bound).
    * A label of several tokens whose beginning is listed gets the log-probability of that beginning,
      ``censored``. Where several beginnings are listed (``b``, ``bill`` of ``billing``), they are added.
    * A beginning shared by several labels (``very`` of ``very good`` and ``very bad``; or ``1`` of ``10``
      when ``1`` is a label too and ``10`` is not listed) gives each of them that upper bound, ``censored``,
      if a label listed whole is at least as likely. Otherwise the call is an error: the labels that may
      have won cannot be told apart.
    * A NaN, infinite, absent or positive log-probability of a label makes the call an error. ``-9999``
      means "not listed". So a result without error has a value for every label, except a label-only one.

    If *all* entries are censored and equal, the answer began with something that is no label.

    **Label-only answers.** Where the server gives no log-probabilities (status 400, or 200 without any), the
    labels are asked for as text, and the label that the text begins with wins: the longest, any case, whole
    words. Its entry is ``0.0``, every other ``None``, and *all* are ``censored``: as upper bounds these say
    nothing about probability, and the largest is the answer. No other result combines ``None`` with
    ``censored``. Text that begins with no label is an error.

    **Failures.** Statuses 429, 500, 502, 503 and failed connections are tried three times in all, waiting as
    ``Retry-After`` asks up to 20 s. What fails then is ``result.error``. A wrong key, an unknown model or an
    exhausted quota stop the batch: the results at hand are yielded, then
    :class:`~proxyprompt.errors.BackendError` is raised.

    References
    ----------
    .. [1] OpenAI API reference, "Create chat completion" and "Create completion".

    Examples
    --------
    >>> backend = OpenAIBackend("smollm2", base_url="http://127.0.0.1:8080/v1")
    >>> backend.name, backend.capability
    ('openai:smollm2', 'unknown')
    """

    def __init__(
        self,
        model: str,
        *,
        client: Any = None,
        base_url: str | None = None,
        api: Literal["auto", "chat", "completions"] = "auto",
        top_logprobs: int = 20,
        concurrency: int = 4,
        timeout: float = 60,
        name: str | None = None,
    ) -> None:
        if not isinstance(model, str) or not model.strip():
            raise InputError(f"model={model!r} must be a model name.")
        if api not in ("auto", "chat", "completions"):
            raise InputError(f"api={api!r} must be 'auto', 'chat' or 'completions'.")
        _check_range("top_logprobs", top_logprobs, 1, 100)
        _check_range("concurrency", concurrency, 1, 256)
        if (
            isinstance(timeout, bool)
            or not isinstance(timeout, int | float)
            or not 0 < timeout < float("inf")
        ):
            raise InputError(f"timeout={timeout!r} must be a positive number of seconds.")
        if client is not None:
            if base_url is not None:
                raise InputError(
                    "client and base_url were both given; the client has its own.", hint="Leave base_url out."
                )
            _check_client(client)
            url = str(client.base_url)
        else:
            url = base_url or os.environ.get("OPENAI_BASE_URL") or _DEFAULT_URL
        self._model = model
        self._public_url = public_url(url)
        self._url = url
        self._given_client = client
        self._api = api
        self._top_logprobs = top_logprobs
        self._concurrency = concurrency
        self._timeout = timeout
        self._name = f"openai:{model}" if name is None else name
        self._capabilities: dict[Endpoint, Capability] = {}
        self._limit_name = "max_tokens"
        self._lock = threading.Lock()
        self._sdk: Any = None
        self._client: Any = None

    def __repr__(self) -> str:
        return f"OpenAIBackend({self._model!r}, base_url={self._public_url!r}, api={self._api!r})"

    @property
    def name(self) -> str:
        """Name shown to people."""
        return self._name

    @property
    def identity(self) -> Mapping[str, Any]:
        """Provider, endpoint (without credentials or query), model, api and ``top_logprobs``."""
        return {
            "provider": "openai-compatible",
            "base_url": self._public_url,
            "model": self._model,
            "api": self._api,
            "top_logprobs": self._top_logprobs,
        }

    @property
    def capability(self) -> Capability:
        """What the server was found to give; ``"label"`` as soon as one of two endpoints gives no more."""
        found = set(self._capabilities.values())
        if "label" in found:
            return "label"
        return "logprobs" if found else "unknown"

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, ScoreResult]]]:
        """Yield blocks of ``(index, ScoreResult)`` as calls finish; see the class's Notes.

        Raises
        ------
        InputError
            If a request cannot be sent: no labels, or labels equal but for white space around them.
        BackendError
            If no request can succeed: wrong key, unknown model, exhausted quota.
        """
        for index, request in enumerate(requests):
            cores = [candidate.strip() for candidate in request.candidates]
            if not cores or not all(cores) or len(set(cores)) < len(cores):
                raise InputError(
                    f"requests[{index}]: candidates {list(request.candidates)!r} must be one or more labels that "
                    "differ by more than the white space around them."
                )
            prompt_fields(request.prompt, self._endpoint(request.prompt))

        def width(index: int) -> int:
            # Until it is known what the server gives, one call at a time: it would be asked twice for each.
            known = self._endpoint(requests[index].prompt) in self._capabilities
            return self._concurrency if known else 1

        return self._blocks(len(requests), lambda i: self._score_one(requests[i]), width, on_send, on_tokens)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, GenerateResult]]]:
        """Yield blocks of ``(index, GenerateResult)`` as calls finish.

        Raises
        ------
        InputError
            If a request cannot be sent: ``max_tokens`` below 1, or chat turns with ``api="completions"``.
        BackendError
            If no request can succeed: wrong key, unknown model, exhausted quota.
        """
        for index, request in enumerate(requests):
            if request.max_tokens < 1:
                raise InputError(f"requests[{index}]: max_tokens={request.max_tokens} must be at least 1.")
            prompt_fields(request.prompt, self._endpoint(request.prompt))
        return self._blocks(
            len(requests),
            lambda i: self._generate_one(requests[i]),
            lambda index: self._concurrency,
            on_send,
            on_tokens,
        )

    def _endpoint(self, prompt: Rendered) -> Endpoint:
        if self._api == "auto":
            return "completions" if isinstance(prompt, str) else "chat"
        return self._api

    def _blocks(
        self,
        count: int,
        call: Callable[[int], _Result],
        width: Callable[[int], int],
        on_send: OnSend | None,
        on_tokens: OnTokens | None,
    ) -> Iterator[Sequence[tuple[int, _Result]]]:
        """Keep calls in flight; a block is whatever has finished. Nothing is sent while the caller holds a block."""
        if not count:
            return
        self._connect()
        waiting = deque(range(count))
        flying: dict[Future[_Result], int] = {}
        stop: Exception | None = None
        pool = ThreadPoolExecutor(min(self._concurrency, count), thread_name_prefix="proxyprompt-openai")
        try:
            while (waiting and stop is None) or flying:
                while waiting and stop is None and len(flying) < width(waiting[0]):
                    index = waiting.popleft()
                    try:
                        if on_send is not None:
                            on_send((index,))
                    except Exception as error:  # what is in flight is paid: deliver it, then raise
                        stop = error
                        break
                    flying[pool.submit(call, index)] = index
                if not flying:
                    break
                block: list[tuple[int, _Result]] = []
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    index = flying.pop(future)
                    try:
                        block.append((index, future.result()))
                    except Exception as error:
                        stop = stop or error
                if block:
                    if on_tokens is not None:
                        on_tokens(sum(r.usage.prompt_tokens + r.usage.completion_tokens for _, r in block))
                    yield sorted(block, key=lambda pair: pair[0])
            if stop is not None:
                raise stop
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _score_one(self, request: ScoreRequest) -> ScoreResult:
        usage, missing = Usage(), (None,) * len(request.candidates)
        model: str | None = None
        try:
            first = self._ask_logprobs(request.prompt)
            if first is not None:
                usage, model = first.usage, first.model
                if first.listed is not None:
                    values, censored = read_labels(first.listed, request.candidates)
                    return ScoreResult(values, censored, usage, model_returned=model)
            answer = self._send(request.prompt, label_tokens(request.candidates))
            usage, model = _sum(usage, answer.usage), answer.model
            chosen = match_label(answer.text or "", request.candidates)
            if chosen is None:
                raise UnreadableAnswerError(
                    f"unparsable answer {(answer.text or '')[:80]!r} (finish_reason {answer.finish!r}): it does "
                    "not begin with one of the labels"
                )
            labels = tuple(0.0 if k == chosen else None for k in range(len(missing)))
            return ScoreResult(labels, (True,) * len(missing), usage, model_returned=model)
        except (_CallFailedError, UnreadableAnswerError) as error:
            return ScoreResult(missing, (False,) * len(missing), usage, self._clean(str(error)), model)

    def _ask_logprobs(self, prompt: Rendered) -> Answer | None:
        """An answer with log-probabilities; else note that labels must be asked for as text, and say what came."""
        endpoint = self._endpoint(prompt)
        known = self._capabilities.get(endpoint, "unknown")
        if known == "label":
            return None
        extra = {"logprobs": True, "top_logprobs": self._top_logprobs}
        if endpoint == "completions":
            extra = {"logprobs": self._top_logprobs}
        answer: Answer | None = None
        try:
            answer = self._send(prompt, 1, **extra)
            if answer.listed is None and not answer.text and answer.finish == "stop":
                raise UnreadableAnswerError("the answer is empty")
        except _NoLogprobsError as error:
            if known == "logprobs":
                raise _CallFailedError(
                    f"the server refused log-probabilities for this call: {error}"
                ) from error
        found = answer is not None and answer.listed is not None
        if known == "logprobs" and not found:
            # Not asked for as text: values on two scales must not be mixed in one experiment.
            raise UnreadableAnswerError("the server gave no log-probabilities for this call, unlike before")
        self._capabilities[endpoint] = "logprobs" if found else "label"
        return answer

    def _generate_one(self, request: GenerateRequest) -> GenerateResult:
        stop = {"stop": list(request.stop)} if request.stop else {}
        usage, model = Usage(), None
        try:
            answer = self._send(request.prompt, request.max_tokens, **stop)
            usage, model = answer.usage, answer.model
            if answer.text is None:
                raise UnreadableAnswerError(f"the answer holds no text (finish_reason {answer.finish!r})")
        except (_CallFailedError, _NoLogprobsError, UnreadableAnswerError) as error:
            return GenerateResult(None, usage, self._clean(str(error)), model)
        text = answer.text
        for mark in request.stop:  # some servers leave the stop text in
            text = text.split(mark, 1)[0] if mark else text
        return GenerateResult(text, usage, model_returned=model)

    def _send(self, prompt: Rendered, limit: int, **extra: Any) -> Answer:
        """One answer, tried at most three times; raises what the class's Notes say about failures."""
        endpoint = self._endpoint(prompt)
        resource = self._client.chat.completions if endpoint == "chat" else self._client.completions
        fields = {"model": self._model, "temperature": 0, **prompt_fields(prompt, endpoint), **extra}
        tries = 0
        while True:
            tries += 1
            limit_name = self._limit_name if endpoint == "chat" else "max_tokens"
            try:
                raw = resource.with_raw_response.create(**fields, **{limit_name: limit})
            except self._sdk.APIStatusError as error:
                pause = self._after_status(error, tries, limit_name)
            except self._sdk.APIConnectionError as error:
                pause = self._after_connection(error, tries)
            except self._sdk.OpenAIError as error:
                raise _CallFailedError(f"{type(error).__name__}: {error}") from error
            else:
                return read_answer(raw.http_response.content, endpoint)
            time.sleep(pause)

    def _after_status(self, error: Any, tries: int, limit_name: str) -> float:
        """Seconds to wait before the next try; raises if there is none."""
        status, message = error.status_code, self._clean(error.message)
        fault = classify(status, error.code, error.param, error.message)
        if fault == "max-tokens-name" and limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
            return 0.0
        if fault in ("fatal", "too-many-logprobs"):
            hint = _HINTS.get(status, "")
            if fault == "too-many-logprobs":
                hint = f"The server may allow fewer than top_logprobs={self._top_logprobs}; lower it."
            fatal = BackendError(
                f"{self._model!r} at {self._public_url}: HTTP {status}: {message}", hint=hint
            )
            # Some servers repeat the key in their message; a chained error would print it.
            raise fatal from (error if message == " ".join(error.message.split()) else None)
        if fault == "no-logprobs":
            raise _NoLogprobsError(message) from None
        pause = retry_after(error.response.headers)
        if fault != "retry" or tries >= _TRIES:
            raise _CallFailedError(f"HTTP {status} after {_times(tries)}: {message}") from None
        if pause is not None and pause > _LONGEST_PAUSE:
            raise _CallFailedError(f"HTTP {status}, asked to wait {pause:g} s: {message}") from None
        return _FIRST_PAUSE * 2 ** (tries - 1) if pause is None else pause

    def _after_connection(self, error: Any, tries: int) -> float:
        """Seconds to wait before the next try; raises unless the request certainly never arrived."""
        cause = type(error.__cause__).__name__
        if tries < _TRIES and cause in ("ConnectError", "ConnectTimeout"):
            return _FIRST_PAUSE * 2.0 ** (tries - 1)
        if isinstance(error, self._sdk.APITimeoutError):
            raise _CallFailedError(f"no answer within the time limit, after {_times(tries)}") from None
        raise _CallFailedError(
            f"no connection to {self._public_url} ({cause}), after {_times(tries)}"
        ) from None

    def _connect(self) -> None:
        with self._lock:
            if self._client is not None:
                return
            self._sdk = require("openai", "openai")
            if self._given_client is not None:
                self._client = self._given_client
                return
            key = os.environ.get("OPENAI_API_KEY")
            if not key:
                raise BackendError(
                    "OPENAI_API_KEY is not set.",
                    hint="Set it; for a server without keys any text will do. Or pass client=openai.OpenAI(...).",
                )
            self._client = self._sdk.OpenAI(
                api_key=key, base_url=self._url, timeout=self._timeout, max_retries=0
            )

    def _clean(self, text: str) -> str:
        key = getattr(self._client, "api_key", None)
        return redact(text, [key] if isinstance(key, str) else [])


def _check_range(parameter: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{parameter}={value!r} must be an integer from {low} to {high}.")


def _check_client(client: Any) -> None:
    if isinstance(client, require("openai", "openai").AsyncOpenAI):
        raise InputError(
            f"client is a {type(client).__name__}; a synchronous one is needed.",
            hint="Pass openai.OpenAI(...).",
        )
    if not hasattr(client, "chat") or not hasattr(client, "base_url"):
        raise InputError(f"client is a {type(client).__name__}; an openai.OpenAI client is needed.")


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        one.cached_tokens + other.cached_tokens,
    )


def _times(tries: int) -> str:
    return "1 try" if tries == 1 else f"{tries} tries"
