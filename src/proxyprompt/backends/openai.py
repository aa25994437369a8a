"""Scores and texts from any server that speaks the OpenAI HTTP interface, through the official SDK.

Works with versions 2 and 3 of the ``openai`` package and with llama.cpp's server, vLLM and the like. What a
server can do is found out by asking it, never by the model's name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, Literal, TypeAlias, TypeVar

from proxyprompt.errors import InputError

from ._openai_connection import CallFailedError, Connection, NoLogprobsError
from ._openai_wire import (
    Answer,
    Endpoint,
    UnreadableAnswerError,
    label_tokens,
    match_label,
    prompt_fields,
    read_labels,
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

_Result = TypeVar("_Result", ScoreResult, GenerateResult)


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
        self._model = model
        self._connection = Connection(model, client, base_url, timeout, top_logprobs)
        self._api = api
        self._top_logprobs = top_logprobs
        self._concurrency = concurrency
        self._name = f"openai:{model}" if name is None else name
        self._capabilities: dict[Endpoint, Capability] = {}

    def __repr__(self) -> str:
        return f"OpenAIBackend({self._model!r}, base_url={self._connection.public_url!r}, api={self._api!r})"

    @property
    def name(self) -> str:
        """Name shown to people."""
        return self._name

    @property
    def identity(self) -> Mapping[str, Any]:
        """Provider, endpoint (without credentials or query), model, api and ``top_logprobs``."""
        return {
            "provider": "openai-compatible",
            "base_url": self._connection.public_url,
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
                    f"requests[{index}]: candidates={list(request.candidates)!r} must be one or more labels "
                    "that differ by more than the white space around them."
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
        """Keep calls in flight, yield what has finished; nothing is sent while the caller holds a block."""
        if not count:
            return
        self._connection.open()
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
        candidates, count = request.candidates, len(request.candidates)
        usage, model = Usage(), None
        try:
            answer = self._ask(request, self._endpoint(request.prompt))
            usage, model = answer.usage, answer.model
            if answer.listed is not None:
                values, censored = read_labels(answer.listed, candidates)
                return ScoreResult(values, censored, usage, model_returned=model)
            chosen = match_label(answer.text or "", candidates)
            if chosen is None:
                raise UnreadableAnswerError(
                    f"unparsable answer {(answer.text or '')[:80]!r} (finish_reason {answer.finish!r}): "
                    "it does not begin with one of the labels"
                )
            labels = tuple(0.0 if k == chosen else None for k in range(count))
            return ScoreResult(labels, (True,) * count, usage, model_returned=model)
        except (CallFailedError, UnreadableAnswerError) as error:
            reason = self._connection.clean(str(error))
            paid = getattr(error, "usage", None) or usage
            return ScoreResult((None,) * count, (False,) * count, paid, reason, model)

    def _ask(self, request: ScoreRequest, endpoint: Endpoint) -> Answer:
        """An answer with ``listed`` from a server that gives log-probabilities; finds out whether it does."""
        known = self._capabilities.get(endpoint, "unknown")
        if known == "label":
            return self._ask_label(request, endpoint)
        extra: dict[str, Any] = {"logprobs": True, "top_logprobs": self._top_logprobs}
        if endpoint == "completions":
            extra = {"logprobs": self._top_logprobs}
        # Room for a whole label until it is known, so that finding out costs no call of its own.
        limit = 1 if known == "logprobs" else label_tokens(request.candidates)
        try:
            answer = self._connection.send(request.prompt, endpoint, limit, **extra)
        except NoLogprobsError:
            if known == "logprobs":
                raise
            self._capabilities[endpoint] = "label"
            return self._ask_label(request, endpoint)
        if answer.listed is not None:
            self._capabilities[endpoint] = "logprobs"
            return answer
        if known == "logprobs":
            # Its text is not used: values on two scales must not be mixed in one experiment.
            raise UnreadableAnswerError("no log-probabilities this time, unlike before", answer.usage)
        if not answer.text and answer.finish == "stop":
            # The model ended at once, so there was no token to give a log-probability of.
            raise UnreadableAnswerError("the answer is empty", answer.usage)
        self._capabilities[endpoint] = "label"
        return answer

    def _ask_label(self, request: ScoreRequest, endpoint: Endpoint) -> Answer:
        answer = self._connection.send(request.prompt, endpoint, label_tokens(request.candidates))
        return replace(answer, listed=None)

    def _generate_one(self, request: GenerateRequest) -> GenerateResult:
        endpoint = self._endpoint(request.prompt)
        stop = {"stop": list(request.stop)} if request.stop else {}
        try:
            answer = self._connection.send(request.prompt, endpoint, request.max_tokens, **stop)
        except (CallFailedError, UnreadableAnswerError) as error:
            usage = getattr(error, "usage", None) or Usage()
            return GenerateResult(None, usage, self._connection.clean(str(error)))
        text = answer.text
        if text is None:
            reason = f"the answer holds no text (finish_reason {answer.finish!r})"
            return GenerateResult(None, answer.usage, reason, answer.model)
        for mark in filter(None, request.stop):
            text = text.split(mark, 1)[0]  # some servers leave the stop text in
        return GenerateResult(text, answer.usage, model_returned=answer.model)


def _check_range(parameter: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{parameter}={value!r} must be an integer from {low} to {high}.")
