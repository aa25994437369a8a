"""One request to one model: what to send, what the server turned out to take, and what its answer says.

What a server can do is found out by asking it and remembered here, by endpoint: whether it gives log-probabilities,
what it calls the limit on tokens, which fields it refuses. A question asked to find out is a question answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxyprompt.errors import BackendError

from ._openai_connection import Call, CallFailedError, Connection, UnsupportedError
from ._openai_labels import (
    SharedBeginningError,
    UnreadableAnswerError,
    label_tokens,
    positions_needed,
    read_decision,
    read_labels,
    read_texts,
)
from ._openai_wire import (
    Answer,
    Endpoint,
    decision_fields,
    prompt_fields,
    read_answer,
    read_decision_answer,
)
from .base import Evidence, GenerateRequest, GenerateResult, Rendered, ScoreRequest, ScoreResult, Usage

_WITHHELD = "the answer was withheld (finish_reason 'content_filter')"


@dataclass
class Traits:
    """What one endpoint was found to do; ``refused`` are fields that it does not take."""

    answered: bool = False
    evidence: Evidence | None = None
    refused: set[str] = field(default_factory=set)
    reasons: bool = False
    room: dict[tuple[str, ...], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Manner:
    """How the user wants to be answered; see :class:`~proxyprompt.backends.openai.OpenAIBackend`."""

    model: str
    top_logprobs: int
    evidence: tuple[Evidence, ...]
    repeats: int
    reasoning_tokens: int
    parameters: Mapping[str, Any]


class NoLogprobsError(CallFailedError):
    """The server gives no log-probabilities; ``answer`` is its text, if it gave one."""

    def __init__(self, message: str, answer: Answer | None = None) -> None:
        super().__init__(message)
        self.answer = answer


class Asker:
    """Asks one model at one server.

    Parameters
    ----------
    connection : Connection
    manner : Manner
    """

    def __init__(self, connection: Connection, manner: Manner) -> None:
        self._connection = connection
        self.manner = manner
        self._traits: dict[Endpoint, Traits] = {}

    def traits(self, endpoint: Endpoint) -> Traits:
        """What is known of an endpoint."""
        return self._traits.setdefault(endpoint, Traits())

    # -- what is sent

    def fields(
        self,
        prompt: Rendered,
        endpoint: Endpoint,
        limit: int,
        *,
        cache_key: str | None = None,
        call: Call | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """The body of a request, as far as the endpoint is known to take it; ``call``: announced with or without room."""
        traits = self.traits(endpoint)
        roomy = traits.reasons if call is None else call.roomy
        limit += self.manner.reasoning_tokens if roomy else 0
        body = {
            "model": self.manner.model,
            **prompt_fields(prompt, endpoint),
            **self.manner.parameters,
            **more,
        }
        body["max_completion_tokens" if "max_tokens" in traits.refused else "max_tokens"] = limit
        if cache_key is not None and endpoint == "chat":
            body["prompt_cache_key"] = cache_key
        return {name: value for name, value in body.items() if name not in traits.refused}

    def score_fields(
        self, request: ScoreRequest, endpoint: Endpoint, evidence: Evidence, cache_key: str | None = None
    ) -> dict[str, Any]:
        """The body of a request for labels that stands on its own, without a second one to follow."""
        limit = label_tokens(request.candidates)
        if evidence == "decisions":
            return {"model": self.manner.model, **decision_fields(request.prompt, request.candidates)}
        more: dict[str, Any] = {"temperature": 0}
        if evidence == "logprobs":
            more |= self._logprobs(endpoint)
        elif self.manner.repeats > 1:
            more = {"temperature": 1, "n": self.manner.repeats}
        return self.fields(request.prompt, endpoint, limit, cache_key=cache_key, **more)

    def text_fields(
        self,
        request: GenerateRequest,
        endpoint: Endpoint,
        cache_key: str | None = None,
        call: Call | None = None,
    ) -> dict[str, Any]:
        """The body of a request for text."""
        stop = {"stop": list(request.stop)} if request.stop else {}
        return self.fields(
            request.prompt,
            endpoint,
            request.max_tokens,
            cache_key=cache_key,
            call=call,
            temperature=0,
            **stop,
        )

    def _logprobs(self, endpoint: Endpoint) -> dict[str, Any]:
        if endpoint == "completions":
            return {"logprobs": self.manner.top_logprobs}
        return {"logprobs": True, "top_logprobs": self.manner.top_logprobs}

    async def _send(self, endpoint: Endpoint, call: Call, body: Callable[[], dict[str, Any]]) -> Answer:
        """Send what ``body()`` makes; without a field that the server refuses, again and for good."""
        traits = self.traits(endpoint)
        while True:
            fields = body()
            try:
                answer = read_answer(await self._connection.post(endpoint, fields, call), endpoint)
            except UnsupportedError as error:
                # A refusal costs nothing, so what follows is the same announced call.
                # Another call may have found the same out meanwhile; this one was sent before that.
                if error.field == "logprobs" or error.field not in fields:
                    raise
                traits.refused.add(error.field)
            except UnreadableAnswerError as error:
                call.usage += error.usage or Usage()
                call.uncertain += error.uncertain
                raise
            else:
                traits.answered = True
                _settle(call, answer.usage)
                call.model, call.fingerprint = answer.model or call.model, answer.fingerprint
                self._connection.pace.correct(
                    answer.usage.prompt_tokens + answer.usage.completion_tokens - call.expected
                )
                return answer

    async def _again(self, call: Call, endpoint: Endpoint) -> None:
        """One more call for the same request: it costs money, so it is announced."""
        call.roomy = self.traits(endpoint).reasons
        await self._connection.in_thread(call.announce)
        self._connection.pace.take(call.expected)

    # -- labels

    async def score(
        self, request: ScoreRequest, endpoint: Endpoint, call: Call, cache_key: str | None
    ) -> ScoreResult:
        """Values of the labels by the first kind of evidence that the server gives."""
        traits = self.traits(endpoint)
        wanted = self.manner.evidence if traits.evidence is None else (traits.evidence,)
        answer: Answer | None = None
        for number, evidence in enumerate(wanted):
            last = number + 1 == len(wanted)
            try:
                if evidence == "logprobs":
                    return await self._by_logprobs(request, endpoint, call, cache_key)
                if evidence == "decisions":
                    if answer is not None:
                        await self._again(call, endpoint)
                    return await self._by_decision(request, endpoint, call)
                return await self._by_texts(request, endpoint, call, cache_key, answer)
            except NoLogprobsError as error:
                if traits.evidence is not None or last:
                    raise self._hopeless(error, traits) from None
                answer = error.answer
            except UnsupportedError as error:
                if error.field != "decisions" or traits.evidence is not None or last:
                    raise self._hopeless(error, traits) from None
        raise AssertionError(wanted)

    def _hopeless(self, error: CallFailedError, traits: Traits) -> Exception:
        if traits.evidence is not None or not isinstance(error, NoLogprobsError | UnsupportedError):
            return error
        if isinstance(error, UnsupportedError) and error.field not in ("logprobs", "decisions"):
            return error
        return BackendError(
            f"{self.manner.model!r} at {self._connection.public_url} gives none of evidence={self.manner.evidence}: "
            f"{self._connection.clean(str(error))}",
            hint="Add 'texts' to evidence to count labels in answers.",
        )

    async def _by_logprobs(
        self, request: ScoreRequest, endpoint: Endpoint, call: Call, cache_key: str | None
    ) -> ScoreResult:
        traits, candidates = self.traits(endpoint), request.candidates
        known = traits.evidence == "logprobs"
        # Room for a whole label until it is known, so that finding out costs no call of its own.
        most = label_tokens(candidates)
        limit = traits.room.get(candidates, most) if known else most
        while True:
            answer, greedy = await self._for_logprobs(request, endpoint, call, cache_key, limit)
            path = answer.first.path or ()
            traits.evidence = "logprobs"
            traits.room[candidates] = max(traits.room.get(candidates, 1), positions_needed(path, candidates))
            try:
                values, censored = read_labels(path, candidates, greedy=greedy)
            except SharedBeginningError:
                # The tokens that tell the labels apart were not asked for.
                if limit >= most or len(path) < limit:
                    raise
                limit = traits.room[candidates] = most
                await self._again(call, endpoint)
            else:
                return ScoreResult(
                    values,
                    censored,
                    call.usage,
                    None,
                    answer.model,
                    call.uncertain,
                    fingerprint=answer.fingerprint,
                )

    async def _for_logprobs(
        self, request: ScoreRequest, endpoint: Endpoint, call: Call, cache_key: str | None, limit: int
    ) -> tuple[Answer, bool]:
        """An answer with log-probabilities, and whether its tokens are the likeliest ones."""
        known = self.traits(endpoint).evidence == "logprobs"
        temperature = 0 if known or self.manner.repeats == 1 else 1  # the text of a first answer may be used

        def body() -> dict[str, Any]:
            more = self._logprobs(endpoint)
            return self.fields(
                request.prompt,
                endpoint,
                limit,
                cache_key=cache_key,
                call=call,
                temperature=temperature,
                **more,
            )

        try:
            answer = await self._send(endpoint, call, body)
        except UnsupportedError as error:
            if error.field != "logprobs":
                raise
            raise NoLogprobsError(str(error)) from None
        if answer.first.path is not None:
            return answer, temperature == 0 and "temperature" not in self.traits(endpoint).refused
        if answer.first.finish == "content_filter":
            raise UnreadableAnswerError(_WITHHELD)
        if known:
            # Its text is not used: values on two scales must not be mixed in one experiment.
            raise UnreadableAnswerError("no log-probabilities this time, unlike before")
        if not answer.first.text and answer.first.finish == "stop":
            # The model ended at once, so there was no token to give a log-probability of.
            raise UnreadableAnswerError("the answer is empty")
        if answer.first.thought:
            raise NoLogprobsError("the model reasons first, and the log-probabilities are of that", answer)
        raise NoLogprobsError("status 200, but no log-probabilities", answer)

    async def _by_decision(self, request: ScoreRequest, endpoint: Endpoint, call: Call) -> ScoreResult:
        if not self._connection.has_decisions:
            raise UnsupportedError(
                "decisions", "the installed openai package knows no decisions endpoint (3.26 does)"
            )
        if not 2 <= len(request.candidates) <= 255:
            raise UnsupportedError(
                "decisions", f"a decision takes 2 to 255 labels, not {len(request.candidates)}"
            )
        if not isinstance(request.prompt, str) and any(turn.name is not None for turn in request.prompt):
            raise UnsupportedError("decisions", "a decision takes no names of speakers")
        body = {"model": self.manner.model, **decision_fields(request.prompt, request.candidates)}
        reply = await self._connection.post("decisions", body, call)
        self.traits(endpoint).evidence = "decisions"
        try:
            stated, usage, model = read_decision_answer(reply)
        except UnreadableAnswerError as error:
            call.usage += error.usage or Usage()
            raise
        _settle(call, usage)
        values, censored = read_decision(stated, request.candidates)
        return ScoreResult(values, censored, call.usage, None, model, call.uncertain, "decisions")

    async def _by_texts(
        self,
        request: ScoreRequest,
        endpoint: Endpoint,
        call: Call,
        cache_key: str | None,
        answer: Answer | None,
    ) -> ScoreResult:
        traits, wanted = self.traits(endpoint), self.manner.repeats
        limit, failed = label_tokens(request.candidates), 0
        texts: list[str | None] = []
        sent = 0 if answer is None else 1
        while len(texts) + failed < wanted:
            if answer is None:
                if sent:
                    await self._again(call, endpoint)
                sent += 1
                left = wanted - len(texts) - failed
                # Several samples of one prompt: by one call where the server makes them, else by as many calls.
                many = {"n": left} if left > 1 else {}
                temperature = 0 if wanted == 1 else 1
                try:
                    answer = await self._send(
                        endpoint,
                        call,
                        lambda many=many, temperature=temperature: self.fields(  # type: ignore[misc]
                            request.prompt,
                            endpoint,
                            limit,
                            cache_key=cache_key,
                            call=call,
                            temperature=temperature,
                            **many,
                        ),
                    )
                except (CallFailedError, UnreadableAnswerError):
                    failed += 1
                    if failed * 2 > wanted or not texts:
                        raise
                    continue
                if many and len(answer.choices) == 1:
                    traits.refused.add("n")
            traits.evidence = "texts"  # not before: a refusal may have been read wrongly
            if self._reasoned_it_all_away(answer, endpoint, call):
                answer = None
                continue
            texts.extend(choice.text for choice in answer.choices)
            answer = None
        values, samples = read_texts(texts, request.candidates)
        return ScoreResult(
            *values, call.usage, None, call.model, call.uncertain, "texts", samples, call.fingerprint
        )

    def _reasoned_it_all_away(self, answer: Answer, endpoint: Endpoint, call: Call) -> bool:
        """Whether the tokens were spent before any text came; from then on there is room for reasoning."""
        if endpoint != "chat":
            return False
        unseen = all(not choice.text for choice in answer.choices)
        cut = any(choice.finish == "length" for choice in answer.choices)
        if answer.usage.reasoning_tokens or answer.first.thought or (unseen and cut):
            self.traits(endpoint).reasons = True
        if not (unseen and cut):
            return False
        # What counts is the room that this call had: others in flight may have found out that it is needed.
        if call.roomy or not self.manner.reasoning_tokens:
            raise UnreadableAnswerError(
                f"no text within the limit (reasoning_tokens={self.manner.reasoning_tokens}); raise reasoning_tokens"
            )
        return True

    # -- texts

    async def generate(
        self, request: GenerateRequest, endpoint: Endpoint, call: Call, cache_key: str | None
    ) -> GenerateResult:
        """A text, cut before any stop text."""
        while True:
            answer = await self._send(
                endpoint, call, lambda: self.text_fields(request, endpoint, cache_key, call)
            )
            if not self._reasoned_it_all_away(answer, endpoint, call):
                return self.read_text(request, answer, call)
            await self._again(call, endpoint)

    @staticmethod
    def read_text(request: GenerateRequest, answer: Answer, call: Call) -> GenerateResult:
        """What an answer says to a request for text."""
        text, finish = answer.first.text, answer.first.finish
        if text is None or (not text and finish == "length"):
            reason = f"the answer holds no text (finish_reason {finish!r})"
            if answer.first.refusal:
                reason = f"the model refused: {answer.first.refusal[:80]!r}"
            return GenerateResult(None, call.usage, reason, answer.model, call.uncertain, answer.fingerprint)
        for mark in filter(None, request.stop):
            text = text.split(mark, 1)[0]  # some servers leave the stop text in
        return GenerateResult(text, call.usage, None, answer.model, call.uncertain, answer.fingerprint)


def _settle(call: Call, usage: Usage) -> None:
    """Add what an answer used; one that does not say it leaves open what was billed."""
    call.usage += usage
    if usage != Usage():
        call.unsettled -= 1


def read_score(
    request: ScoreRequest,
    endpoint: Endpoint,
    evidence: Evidence,
    body: Mapping[str, Any],
    *,
    greedy: bool = True,
) -> ScoreResult:
    """What one response says to a request that was made by :meth:`Asker.score_fields`."""
    if evidence == "decisions":
        stated, usage, model = read_decision_answer(body)
        values = read_decision(stated, request.candidates)
        return ScoreResult(*values, usage, None, model, 0, "decisions")
    answer = read_answer(body, endpoint)
    try:
        if evidence == "logprobs":
            if answer.first.path is None:
                if answer.first.finish == "content_filter":
                    raise UnreadableAnswerError(_WITHHELD)
                raise UnreadableAnswerError("no log-probabilities this time, unlike before")
            values, samples = read_labels(answer.first.path, request.candidates, greedy=greedy), 0
        else:
            values, samples = read_texts([choice.text for choice in answer.choices], request.candidates)
    except UnreadableAnswerError as error:
        raise type(error)(str(error), answer.usage) from None
    return ScoreResult(*values, answer.usage, None, answer.model, 0, evidence, samples, answer.fingerprint)


def failed_score(request: ScoreRequest, reason: str, call: Call) -> ScoreResult:
    """A result without values."""
    count = len(request.candidates)
    return ScoreResult((None,) * count, (False,) * count, call.usage, reason, call.model, call.uncertain)


def failed(request: ScoreRequest | GenerateRequest, reason: str, call: Call) -> Any:
    """The result of a request that got no answer."""
    if isinstance(request, ScoreRequest):
        return failed_score(request, reason, call)
    return GenerateResult(None, call.usage, reason, call.model, call.uncertain)


def checked_evidence(given: str | Sequence[str]) -> tuple[Evidence, ...]:
    """The kinds of evidence in order of preference."""
    from proxyprompt.errors import InputError

    wanted = (given,) if isinstance(given, str) else tuple(given)
    known = ("logprobs", "decisions", "texts")
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(known):
        raise InputError(f"evidence={given!r} must name one or more of {', '.join(known)}, each once.")
    return wanted  # type: ignore[return-value]
