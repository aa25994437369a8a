"""Scores and texts from any server that speaks the OpenAI HTTP interface, through the official SDK.

Works with versions 2 and 3 of the ``openai`` package, with OpenAI, Azure, llama.cpp's server, vLLM, Ollama and the
like. What a server can do is found out by asking it, never by the model's name.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

from proxyprompt.errors import BackendError, InputError

from ._openai_account import cancel, states
from ._openai_asking import Asker, Manner, checked_evidence, failed
from ._openai_batch import Batches, BatchTerms
from ._openai_connection import Call, CallFailedError, Connection, Patience
from ._openai_flow import Flow
from ._openai_jobs import Forgetful, under_way
from ._openai_labels import UnreadableAnswerError, label_tokens
from ._openai_options import check_options, checked_fields
from ._openai_pace import Pace
from ._openai_wire import Endpoint, prompt_fields
from .base import (
    BatchStatus,
    GenerateRequest,
    GenerateResult,
    Journal,
    OnSend,
    OnTokens,
    Rendered,
    ScoreRequest,
    ScoreResult,
)

__all__ = ["OpenAIBackend"]

Capability: TypeAlias = Literal["unknown", "logprobs", "decisions", "texts"]

_Request = TypeVar("_Request", ScoreRequest, GenerateRequest)


class OpenAIBackend:
    """Ask an OpenAI-compatible server for label log-probabilities, labels, or text.

    Parameters
    ----------
    model : str
        Model name as the server knows it (Azure: the deployment).
    client : openai.OpenAI or openai.AsyncOpenAI or their Azure forms, optional
        Used with its own key, address, transport and timeout; its retries are switched off, as every attempt is
        counted here. A synchronous client is driven from threads, an asynchronous one on the backend's own event loop:
        hand over one that was not used on another loop. Without a client one is made, at the first call, from
        ``base_url``, ``OPENAI_API_KEY`` and ``OPENAI_BASE_URL``.
    base_url : str, optional
        Server to use; ``OPENAI_BASE_URL`` or OpenAI's own by default. Not together with ``client``.
    api : {"auto", "chat", "completions"}
        Endpoint. ``"auto"`` sends text to ``/completions`` and chat turns to ``/chat/completions``.
        ``"chat"`` sends text as one user message. ``"completions"`` refuses chat turns.
    top_logprobs : int
        How many of the most likely tokens to ask for, 1 to 100; OpenAI's chat allows 20.
    evidence : str or sequence of {"logprobs", "decisions", "texts"}
        Where values of labels may come from, in order of preference; the first kind that the server gives is used for
        all requests. ``"decisions"`` is not in the default: that endpoint answers a question *about* the prompt, which
        is not what the deployed model writes after it.
    repeats : int
        How many texts to sample (temperature 1) for each request where values come from texts, 1 to 100. With 1 the
        text is that of temperature 0.
    reasoning_tokens : int
        Room that a model which reasons before it answers gets on top of the answer; given only to models that are seen to
        reason.
    parameters : mapping, optional
        Further fields of every request (``{"reasoning_effort": "none"}``); part of the identity.
    concurrency : int
        Most calls in flight at a time, 1 to 256. Starts at 4 at most, falls when the server is overloaded, and grows again.
    rpm, tpm : float, optional
        Requests and tokens a minute that are not passed; calls are spread evenly.
    timeout : float
        Seconds until a call that gives no answer counts as lost. Not used with ``client``.
    max_tries : int
        Attempts for one request, 1 to 20.
    max_wait : float
        Seconds from the first attempt to the last; a server that asks for a longer pause is not waited for.
    paid_retries : int
        Of the attempts, how many may follow on one that brought nothing back but may have been billed.
    model_change : {"warn", "error", "ignore"}
        What to do when one name is answered by two models in one run.
    batch : bool
        Whether to send requests as batches of the provider: half the price, answers within a day. One request per
        endpoint is asked at once, to find out what the server takes. See Notes.
    batch_size : int
        Most requests in one batch, 1 to 50,000.
    batch_poll : float
        Seconds between two looks at a batch.
    batch_wait : float, optional
        Seconds after which this process stops waiting and says so; the next run collects.
    allow_http : bool
        Whether plain HTTP may leave this machine.
    name : str, optional
        Name shown to people; ``openai:MODEL`` by default.

    Attributes
    ----------
    capability : {"unknown", "logprobs", "decisions", "texts"}
        What the server was found to give; the first successful :meth:`score` call finds out, alone.
    models_returned : Mapping of str to int
        Models that answered, as the server names them, and how often.
    fingerprints : Mapping of str to int
        ``system_fingerprint`` of the answers, and how often.

    Raises
    ------
    InputError
        If an argument breaks a rule.
    MissingDependencyError
        If the ``openai`` package is not installed, at the first call.

    Notes
    -----
    **Labels from log-probabilities.** The list of the most likely alternatives to the first token of the answer is read.
    White space around tokens and labels is set aside, so ``"good"`` and ``" good"`` count for the same
    label and their probabilities are added; case is kept apart. This departs from the exact continuation
    that a local engine scores, by the mass of the unusual spacing.

    * A label listed whole gets its log-probability.
    * A label of several tokens that the model itself spelled, or that differs from that spelling in its last token, gets
      the sum over its tokens. As many tokens are asked for as it takes to tell the labels apart, learned from the answers.
    * Any other label of several tokens gets the log-probability of its listed beginning, ``censored`` (an upper
      bound). Where several beginnings are listed (``b``, ``bill`` of ``billing``), they are added.
    * A label not listed gets the smallest listed log-probability, ``censored``.
    * A beginning shared by several labels that the answer does not go on from gives each of them that upper bound,
      ``censored``, if a label listed whole is at least as likely. Otherwise the call is an error: the labels that
      may have won cannot be told apart.
    * A NaN, infinite, absent or positive log-probability of a label makes the call an error. ``-9999``
      means "not listed". So a result without error has a value for every label.

    If *all* entries are censored and equal, the answer began with something that is no label.

    **Decisions.** Probabilities as the provider's ``/v1/decisions`` states them, ``result.evidence == "decisions"``.
    It rounds to two decimals: 0 becomes the upper bound ``log(0.005)``, ``censored``, and 1 ``log(0.995)``.

    **Labels from texts.** Where the server gives no log-probabilities (status 400, or 200 without any), the labels are
    asked for as text, and the label that the text begins with wins: the longest, any case, whole
    words. ``result.evidence == "texts"``; each label seen has the logarithm of its share of ``result.samples`` texts,
    every other ``None``, and *all* are ``censored``. An answer without any label is an error.

    **Reasoning in view.** What servers send as ``reasoning_content`` or ``reasoning``, in a part of its own, or in the text
    up to ``</think>``, is no part of a text. Log-probabilities that belong to it are not used: labels are read from texts.

    **Failures.** A refusal for load (429, 500, 502, 503, 529) and a failed connection are tried again, with pauses that
    double from 0.5 s (2 s after 429) to 60 s or as ``Retry-After`` asks. A time limit, a connection that breaks and
    statuses 408, 504 and 524 may have been billed: at most ``paid_retries`` follow, each announced, and
    ``result.uncertain`` counts them. Any other error is final. What fails for good is ``result.error``. A wrong key, an
    unknown model or an exhausted quota stop the batch, and so do five requests in a row without any answer: the
    results at hand are yielded, those of the refused requests with ``error`` set, then
    :class:`~proxyprompt.errors.BackendError` is raised.

    **Prompt caches.** Prompts that share a long beginning are sent one after the other, the first of them alone, with
    ``prompt_cache_key`` where the server takes it.

    **Batches.** What is sent is written down first, in the ledger where there is one, so a run that is stopped (by Ctrl-C,
    ``kill -9``, ``batch_wait``) goes on where it was, in any process, and sends nothing again. Requests that expire or meet
    an overloaded server are sent three times at most. Without a ledger nothing survives the process.

    References
    ----------
    .. [1] OpenAI API reference, "Create chat completion", "Create completion", "Create decision", "Create batch".

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
        evidence: str | Sequence[str] = ("logprobs", "texts"),
        repeats: int = 1,
        reasoning_tokens: int = 4096,
        parameters: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        rpm: float | None = None,
        tpm: float | None = None,
        timeout: float = 60,
        max_tries: int = 6,
        max_wait: float = 900,
        paid_retries: int = 1,
        model_change: Literal["warn", "error", "ignore"] = "warn",
        batch: bool = False,
        batch_size: int = 50_000,
        batch_poll: float = 30,
        batch_wait: float | None = None,
        allow_http: bool = False,
        name: str | None = None,
    ) -> None:
        check_options(
            model=model,
            api=api,
            top_logprobs=top_logprobs,
            repeats=repeats,
            reasoning_tokens=reasoning_tokens,
            concurrency=concurrency,
            rpm=rpm,
            tpm=tpm,
            timeout=timeout,
            max_tries=max_tries,
            max_wait=max_wait,
            paid_retries=paid_retries,
            model_change=model_change,
            batch=batch,
            batch_size=batch_size,
            batch_poll=batch_poll,
            batch_wait=batch_wait,
            allow_http=allow_http,
        )
        self._manner = Manner(
            model,
            top_logprobs,
            checked_evidence(evidence),
            repeats,
            reasoning_tokens,
            checked_fields(parameters, repeats),
        )
        if batch and "decisions" in self._manner.evidence:
            raise InputError(
                f"evidence={evidence!r} with batch=True: the decisions endpoint takes no batches.",
                hint="Leave one of them out.",
            )
        self._batch = BatchTerms(batch_size, batch_poll, batch_wait) if batch else None
        self._pace = Pace(concurrency, rpm=rpm, tpm=tpm)
        self._connection = Connection(
            model,
            client,
            base_url,
            timeout=timeout,
            concurrency=concurrency,
            patience=Patience(max_tries, max_wait, paid_retries),
            pace=self._pace,
            allow_http=allow_http,
        )
        self._asker = Asker(self._connection, self._manner)
        self._flow = Flow(
            self._connection,
            self._note,
            lambda request: self._asker.traits(self._endpoint(request.prompt)).reasons,
        )
        self._model = model
        self._api = api
        self._model_change = model_change
        self._name = f"openai:{model}" if name is None else name
        self._models: Counter[str] = Counter()
        self._fingerprints: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"OpenAIBackend({self._model!r}, base_url={self._connection.public_url!r}, api={self._api!r})"

    @property
    def name(self) -> str:
        """Name shown to people."""
        return self._name

    @property
    def identity(self) -> Mapping[str, Any]:
        """Provider, endpoint (without credentials or query), model, api and whatever else decides answers."""
        manner = self._manner
        identity: dict[str, Any] = {
            "provider": "openai-compatible",
            "base_url": self._connection.public_url,
            "model": self._model,
            "api": self._api,
            "top_logprobs": manner.top_logprobs,
        }
        # Only what departs from the default, so that answers recorded by earlier versions are found.
        if manner.evidence != ("logprobs", "texts"):
            identity["evidence"] = list(manner.evidence)
        if manner.repeats > 1:
            identity["repeats"] = manner.repeats
        if manner.parameters:
            identity["parameters"] = dict(manner.parameters)
        return identity

    @property
    def capability(self) -> Capability:
        """What the server was found to give; the weaker of two endpoints that were asked."""
        found = {self._asker.traits(endpoint).evidence for endpoint in ("chat", "completions")}
        for kind in ("texts", "decisions", "logprobs"):
            if kind in found:
                return kind
        return "unknown"

    @property
    def models_returned(self) -> Mapping[str, int]:
        """Models that answered, as the server names them, and how often."""
        return dict(self._models)

    @property
    def fingerprints(self) -> Mapping[str, int]:
        """Server configurations that answered, and how often."""
        return dict(self._fingerprints)

    @property
    def in_flight_limit(self) -> int:
        """How many calls may be in flight now; between 1 and ``concurrency``, as the server bears it."""
        return self._pace.limit

    @property
    def keeps_journal(self) -> bool:
        """Whether calls outlive the process: with ``batch=True``."""
        return self._batch is not None

    @property
    def batch(self) -> bool:
        """Whether what is sent now goes in a batch, at batch prices; the first request of an endpoint does not."""
        return self._batch is not None and not self._flow.at_once

    def under_way(self, journal: Journal) -> Sequence[int]:
        """Indices of ``journal.keys`` that an earlier process has sent and nobody has collected."""
        return under_way(journal)

    def cancel(self, journal: Journal) -> list[str]:
        """Ask the provider to stop the batches of a journal; what they have answered is collected by the next run.

        Batches that the provider does not know, or whose results it has deleted, are forgotten;
        their requests are sent again when they are asked for.

        Returns
        -------
        list of str
            Ids of the batches that were still at work.
        """
        self._connection.open()
        return cancel(self._connection, journal)

    def batches(self, journal: Journal) -> list[BatchStatus]:
        """Where the batches of a journal stand that are not wholly collected; costs nothing."""
        self._connection.open()
        return states(self._connection, journal)

    def most_completion_tokens(self, request: ScoreRequest | GenerateRequest) -> int:
        """Upper bound of completion tokens for each announced call, reasoning tokens included."""
        endpoint = self._endpoint(request.prompt)
        traits = self._asker.traits(endpoint)
        many = 1
        if isinstance(request, GenerateRequest):
            limit = request.max_tokens
        else:
            limit = label_tokens(request.candidates)
            if "n" not in traits.refused and traits.evidence != "logprobs":
                many = self._manner.repeats
        # A call that was announced before the model was seen to reason is sent without the room.
        return many * (limit + (self._manner.reasoning_tokens if traits.reasons else 0))

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
        journal: Journal | None = None,
    ) -> Iterator[Sequence[tuple[int, ScoreResult]]]:
        """Yield blocks of ``(index, ScoreResult)`` as calls finish; see the class's Notes.

        ``journal`` is where batches are written down; without one they are lost with the process.

        Raises
        ------
        InputError
            If a request cannot be sent: no labels, or labels equal but for white space around them.
        BackendError
            If no request can succeed: wrong key, unknown model, exhausted quota.
        """
        self._check_labels(requests)

        def known(request: ScoreRequest) -> bool:
            # Until it is known what the server gives, one call at a time: it would be asked twice for each.
            return self._asker.traits(self._endpoint(request.prompt)).evidence is not None

        if self._batch is not None:
            make = partial(self._batches, requests, journal)
            return self._flow.batched(
                requests, self._score_one, known, on_send, on_tokens, make, self._endpoint_of
            )
        return self._flow.blocks(requests, self._score_one, known, on_send, on_tokens)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
        journal: Journal | None = None,
    ) -> Iterator[Sequence[tuple[int, GenerateResult]]]:
        """Yield blocks of ``(index, GenerateResult)`` as calls finish; ``journal`` as in :meth:`score`.

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

        def known(request: GenerateRequest) -> bool:
            # The first call, alone, finds out which fields the server takes and whether the model reasons.
            return self._asker.traits(self._endpoint(request.prompt)).answered

        if self._batch is not None:
            make = partial(self._batches, requests, journal)
            return self._flow.batched(
                requests, self._generate_one, known, on_send, on_tokens, make, self._endpoint_of
            )
        return self._flow.blocks(requests, self._generate_one, known, on_send, on_tokens)

    def _check_labels(self, requests: Sequence[ScoreRequest]) -> None:
        for index, request in enumerate(requests):
            cores = [candidate.strip() for candidate in request.candidates]
            if not cores or not all(cores) or len(set(cores)) < len(cores):
                raise InputError(
                    f"requests[{index}]: candidates={list(request.candidates)!r} must be one or more labels "
                    "that differ by more than the white space around them."
                )
            prompt_fields(request.prompt, self._endpoint(request.prompt))

    def _endpoint(self, prompt: Rendered) -> Endpoint:
        if self._api == "auto":
            return "completions" if isinstance(prompt, str) else "chat"
        return self._api

    def _endpoint_of(self, request: ScoreRequest | GenerateRequest) -> Endpoint:
        return self._endpoint(request.prompt)

    def _batches(
        self, requests: Sequence[_Request], journal: Journal | None, announce: OnSend
    ) -> Batches[_Request, Any]:
        assert self._batch is not None
        notes = journal if journal is not None else Forgetful([str(k) for k in range(len(requests))])
        return Batches(
            self._connection, self._asker, self._batch, notes, requests, self._endpoint_of, announce
        )

    # -- single requests

    async def _score_one(self, request: ScoreRequest, call: Call, cache_key: str | None) -> ScoreResult:
        try:
            return await self._asker.score(request, self._endpoint(request.prompt), call, cache_key)
        except (CallFailedError, UnreadableAnswerError) as error:
            return failed(request, self._connection.clean(str(error)), call)  # type: ignore[no-any-return]

    async def _generate_one(
        self, request: GenerateRequest, call: Call, cache_key: str | None
    ) -> GenerateResult:
        try:
            return await self._asker.generate(request, self._endpoint(request.prompt), call, cache_key)
        except (CallFailedError, UnreadableAnswerError) as error:
            return failed(request, self._connection.clean(str(error)), call)  # type: ignore[no-any-return]

    def _note(self, results: Iterator[ScoreResult | GenerateResult]) -> BackendError | None:
        """Remember who answered; one name answered by two models is said, or ends the run."""
        before = set(self._models)
        for result in results:
            if result.model_returned is not None:
                self._models[result.model_returned] += 1
            if result.fingerprint is not None:
                self._fingerprints[result.fingerprint] += 1
        if len(self._models) < 2 or set(self._models) == before or self._model_change == "ignore":
            return None
        message = (
            f"The model {self._model!r} was answered by {sorted(self._models)} in one run; "
            "their answers are not comparable."
        )
        if self._model_change == "error":
            return BackendError(message, hint="Name one dated model instead of an alias.")
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None
