"""The one place where backends meet the ledger: ask a batch, buy only what is not recorded yet.

Each block that a backend yields is durable before the backend is asked for the next one, so whatever
interrupts a batch, everything answered so far is kept and the same batch asked again buys only the rest.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, SupportsIndex, TypeAlias, TypeVar

from ._journal import LedgerJournal, MemoryJournal, identity_hash
from .backends.base import (
    Backend,
    GenerateRequest,
    GenerateResult,
    Generator,
    Journal,
    OnTokens,
    Planner,
    Rendered,
    Scorer,
    ScoreRequest,
    ScoreResult,
    Usage,
    keeps_journal,
    masks_units,
)
from .errors import BackendError, InputError, LedgerCorruptError, LedgerError
from .ledger import Answer, CallRole, Failure, Ledger, Limits, RequestKeys

__all__ = ["Meter", "MeterStats", "Progress", "StageStats"]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of requests answered so far and the number asked for."""


@dataclass(frozen=True, slots=True)
class StageStats:
    """What was asked and what it took; ``requested = deduplicated + reused + bought + failed``.

    ``deduplicated`` counts repetitions within a batch, ``reused`` answers found in the ledger, ``seconds``
    the time spent waiting for the backend.
    """

    requested: int = 0
    deduplicated: int = 0
    reused: int = 0
    bought: int = 0
    failed: int = 0
    prompt_tokens_bought: int = 0
    completion_tokens_bought: int = 0
    prompt_tokens_reused: int = 0
    completion_tokens_reused: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class MeterStats(StageStats):
    """The sum over all stages, and each stage by name."""

    by_stage: Mapping[str, StageStats] = field(default_factory=dict)


# --- results as JSON ----------------------------------------------------------------------------------

Q = TypeVar("Q", bound=ScoreRequest | GenerateRequest)
A = TypeVar("A", bound=ScoreResult | GenerateResult)


def _encode_score(request: ScoreRequest, result: ScoreResult) -> str:
    expected = len(request.candidates)
    if len(result.logprobs) != expected or len(result.censored) not in (0, expected):
        raise ValueError(
            f"{len(result.logprobs)} logprobs and {len(result.censored)} marks for {expected} candidates"
        )
    values: list[float | str | None] = []
    for value in result.logprobs:
        if value is None:
            values.append(None)
        elif math.isnan(value) or value == math.inf:
            raise ValueError(f"a log-probability of {value}; a missing one must be None")
        else:
            # JSON has no infinity; a probability that underflows to zero is a legitimate answer.
            values.append(float(value) if value > -math.inf else "-inf")
    body: dict[str, Any] = {"logprobs": values, "censored": [bool(mark) for mark in result.censored]}
    if result.evidence != "logprobs":
        body |= {"evidence": result.evidence, "samples": result.samples}
    if result.fingerprint is not None:
        body["fingerprint"] = result.fingerprint
    return json.dumps(body, allow_nan=False, separators=(",", ":"))


def _decode_score(body: str, usage: Usage, model: str | None) -> ScoreResult:
    data = json.loads(body)
    values = tuple(-math.inf if value == "-inf" else value for value in data["logprobs"])
    return ScoreResult(
        values,
        tuple(data["censored"]),
        usage,
        model_returned=model,
        evidence=data.get("evidence", "logprobs"),
        samples=data.get("samples", 0),
        fingerprint=data.get("fingerprint"),
    )


def _encode_text(request: GenerateRequest, result: GenerateResult) -> str:
    if result.text is not None and not isinstance(result.text, str):
        raise ValueError(f"a text of type {type(result.text).__name__}")
    # ASCII escapes would join two lone surrogates into one character on the way back.
    body = {"text": result.text}
    if result.fingerprint is not None:
        body["fingerprint"] = result.fingerprint
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def _decode_text(body: str, usage: Usage, model: str | None) -> GenerateResult:
    data = json.loads(body)
    return GenerateResult(data["text"], usage, model_returned=model, fingerprint=data.get("fingerprint"))


@dataclass(frozen=True)
class _Kind(Generic[Q, A]):
    name: Literal["score", "generate"]
    encode: Callable[[Q, A], str]
    decode: Callable[[str, Usage, str | None], A]


_SCORE = _Kind("score", _encode_score, _decode_score)
_GENERATE = _Kind("generate", _encode_text, _decode_text)


# --- buying -------------------------------------------------------------------------------------------


class _Purchase(Generic[Q, A]):
    """The part of one batch that is not recorded: its attempts, and what has come back so far."""

    def __init__(
        self,
        kind: _Kind[Q, A],
        name: str,
        requests: Sequence[Q],
        keys: Sequence[str],
        ids: Sequence[int],
        ledger: Ledger | None,
        document: Callable[[Q], str] | None,
    ) -> None:
        self._kind = kind
        self._name = name
        self.requests = requests
        self._keys = keys
        self._ids = ids
        self._ledger = ledger
        self._document = document
        self._lock = threading.Lock()
        self._sent: set[int] = set()
        self._open = True
        self.results: dict[int, A] = {}

    def on_send(self, indices: Sequence[int]) -> None:
        """Mark requests as sent; a backend may call this from its own threads, before each retry too."""
        with self._lock:
            if not self._open:
                # A thread that outlives its batch must not spend: its attempts are already given up.
                raise BackendError(f"The batch is over; {self._name} must not send any more of it.")
            named = dict.fromkeys(self._require(index) for index in indices)
            new = [index for index in named if index not in self._sent]
            if self._ledger is not None and new:
                self._ledger.mark_sent([self._ids[index] for index in new])
            self._sent.update(new)

    def take(self, block: Iterable[tuple[int, A]]) -> list[tuple[int, A, bool]]:
        """Make a block durable; return its new results and whether each one is an answer."""
        answers: list[Answer] = []
        failures: list[Failure] = []
        taken: dict[int, tuple[A, bool]] = {}
        problem: BackendError | None = None
        for named, result in block:
            try:
                index = self._require(named)
                if index in self.results or index in taken:
                    raise BackendError(f"{self._name} answered request {index} twice.", hint=_REPORT)
                if result.error is None:
                    answer = self._answer(index, result)
                    # What is returned is what a later run will read back, to the last type.
                    taken[index] = (self._kind.decode(answer.body, answer.usage, answer.model_returned), True)
                    answers.append(answer)
                else:
                    taken[index] = (result, False)
                    failures.append(Failure(self._id(index), result.error, result.usage))
            except BackendError as error:
                problem = error  # what came before it in the block is paid for: record that first
                break
        if self._ledger is not None and taken:
            self._ledger.record(answers, failures)
        self.results.update((index, result) for index, (result, _) in taken.items())
        if problem is not None:
            raise problem
        return [(index, result, good) for index, (result, good) in taken.items()]

    def finish(self) -> None:
        """Check that nothing was left out."""
        missing = [index for index in range(len(self.requests)) if index not in self.results]
        if missing:
            raise BackendError(
                f"{self._name} answered {len(self.results)} of {len(self.requests)} requests; "
                f"the first one missing is number {missing[0]}.",
                hint=_REPORT,
            )

    def abandon(self) -> None:
        """Refuse further sends; give up what has no result yet."""
        with self._lock:
            self._open = False
        left = [number for index, number in enumerate(self._ids) if index not in self.results]
        if self._ledger is not None and left:
            # On the way out of another error: that one matters more, and opening the ledger again repairs it.
            with suppress(LedgerError):
                self._ledger.release(left)

    def _require(self, index: SupportsIndex) -> int:
        # NumPy integers are welcome: backends sort their batches.
        try:
            number = operator.index(index)
        except TypeError:
            number = -1
        if not 0 <= number < len(self.requests):
            raise BackendError(
                f"{self._name} named request {index!r} of a batch of {len(self.requests)}.", hint=_REPORT
            )
        return number

    def _id(self, index: int) -> int:
        return self._ids[index] if self._ledger is not None else 0

    def _answer(self, index: int, result: A) -> Answer:
        request = self.requests[index]
        try:
            body = self._kind.encode(request, result)
        except (TypeError, ValueError) as error:
            raise BackendError(
                f"{self._name} gave an invalid answer to request {index}: {error}.", hint=_REPORT
            ) from error
        text = None if self._document is None else self._document(request)
        return Answer(self._id(index), self._keys[index], body, result.usage, result.model_returned, text)


_REPORT = "This is a defect of the backend; every answer before it is kept."


class Meter:
    """Asks one backend, through the ledger.

    Parameters
    ----------
    backend : Scorer or Generator
    ledger : Ledger or None
        Without one nothing is kept and every batch is asked anew.
    role : {"target", "proxy"}
        Requests to a target are stored with their text, requests to a proxy only as hashes.
    run : str
        Name under which the calls are counted.
    limits : Limits, optional
        Bound the target's calls of this run; need a ledger.
    on_tokens : callable, optional
        Handed to the backend; called with the number of tokens computed since the last call.

    Notes
    -----
    Two processes that ask the same thing at the same moment may both buy it; both calls are counted, and the
    first answer stays. Where neither the backend can count tokens nor a call is finished, ``max_tokens``
    counts one token per three bytes of UTF-8, an estimate.
    """

    def __init__(
        self,
        backend: Backend,
        ledger: Ledger | None,
        *,
        role: CallRole,
        run: str,
        limits: Limits | None = None,
        on_tokens: OnTokens | None = None,
    ) -> None:
        if role not in ("target", "proxy"):
            raise InputError(f"role={role!r} must be 'target' or 'proxy'.")
        if limits is not None and (ledger is None or role != "target"):
            raise InputError(
                f"limits={limits!r} need role='target' and a ledger, which does the counting.",
                hint="Open one with Ledger(path), or leave the limits out.",
            )
        self.backend = backend
        self.ledger = ledger
        self.role = role
        self.run = run
        self._limits = limits
        self._on_tokens = on_tokens
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, Any]] = {}

    @property
    def stats(self) -> MeterStats:
        """What this meter has asked so far, overall and ``by_stage``."""
        with self._lock:
            stages = {stage: StageStats(**counts) for stage, counts in self._counts.items()}
        names = [item.name for item in fields(StageStats)]
        overall = {name: sum(getattr(one, name) for one in stages.values()) for name in names}
        return MeterStats(**overall, by_stage=stages)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        stage: str,
        progress: Progress | None = None,
        repeat: int = 0,
    ) -> list[ScoreResult]:
        """Give the log-probabilities of every request's candidates.

        Parameters
        ----------
        requests : sequence of ScoreRequest
        stage : str
            What the calls are for.
        progress : callable, optional
            Called as ``progress(done, total)``, in requests.
        repeat : int
            0, or 1, 2, ... to ask the same thing again, for example to measure the noise floor.

        Returns
        -------
        list of ScoreResult
            In the order of ``requests``. Results with ``error`` set are not stored: they are asked again
            next time.

        Raises
        ------
        BudgetExceededError
            If the requests that are not recorded pass a limit; nothing is sent.
        BackendError
            If the backend breaks its contract; answers before that are kept.
        LedgerError
            If an answer cannot be stored; nothing more is asked then.
        """
        if any(request.mask is not None for request in requests) and not masks_units(self.backend):
            raise InputError(
                f"The backend {self.backend.name!r} cannot hide units of a prompt.",
                hint="Leave mask out of the requests and render the units away.",
            )
        if not isinstance(self.backend, Scorer):
            raise InputError(f"The backend {self.backend.name!r} gives text only.", hint="Use generate().")
        return self._ask(_SCORE, self.backend.score, list(requests), stage, progress, repeat)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        stage: str,
        progress: Progress | None = None,
        repeat: int = 0,
    ) -> list[GenerateResult]:
        """Give a text for every request; see :meth:`score`."""
        if not isinstance(self.backend, Generator):
            raise InputError(f"The backend {self.backend.name!r} gives no text.", hint="Use score().")
        return self._ask(_GENERATE, self.backend.generate, list(requests), stage, progress, repeat)

    def _ask(
        self,
        kind: _Kind[Q, A],
        call: Callable[..., Iterator[Sequence[tuple[int, A]]]],
        requests: list[Q],
        stage: str,
        progress: Progress | None,
        repeat: int,
    ) -> list[A]:
        maker = RequestKeys(self.backend.identity, kind.name, {}, repeat)
        keys = [maker.key(request) for request in requests]
        copies = Counter(keys)
        results = self._recorded(kind, copies, stage)
        done = sum(copies[key] for key in results)
        self._count(stage, requested=len(keys), deduplicated=len(keys) - len(copies), reused=len(results))
        if progress is not None:
            progress(done, len(keys))
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in results}
        if missing:
            names, wanted = list(missing), list(missing.values())
            if keeps_journal(self.backend):
                call = functools.partial(call, journal=self._journal(names))
            ids = self._reserve(names, wanted, stage)
            # Proxies' prompts are rendered again at no cost; those of a target show what was paid for.
            document = maker.document if self.role == "target" else None
            purchase = _Purchase(kind, self.backend.name, wanted, names, ids, self.ledger, document)

            def accept(block: list[tuple[int, A, bool]]) -> None:
                nonlocal done
                self._count_bought(stage, block)
                for index, result, _ in block:
                    results[names[index]] = result
                    done += copies[names[index]]
                if progress is not None:
                    progress(done, len(keys))

            self._buy(purchase, call, stage, accept)
        return [results[key] for key in keys]

    def _buy(
        self,
        purchase: _Purchase[Q, A],
        call: Callable[..., Iterator[Sequence[tuple[int, A]]]],
        stage: str,
        accept: Callable[[list[tuple[int, A, bool]]], None],
    ) -> None:
        blocks: Iterator[Sequence[tuple[int, A]]] | None = None
        block: Sequence[tuple[int, A]] | None = None
        try:
            blocks = iter(call(purchase.requests, on_send=purchase.on_send, on_tokens=self._on_tokens))
            while True:
                started = time.perf_counter()
                try:
                    block = next(blocks, None)
                finally:
                    self._count(stage, seconds=time.perf_counter() - started)
                if block is None:
                    break
                accept(purchase.take(block))
                block = None
            purchase.finish()
        except KeyboardInterrupt:
            if block is not None:
                # Interrupted with a paid answer in hand; if it was stored already, it counts as given twice.
                with suppress(BackendError):
                    purchase.take(block)
            raise
        finally:
            try:
                close = getattr(blocks, "close", None)
                if close is not None:
                    close()
            finally:
                purchase.abandon()

    def _recorded(self, kind: _Kind[Q, A], keys: Iterable[str], stage: str) -> dict[str, A]:
        if self.ledger is None:
            return {}
        results: dict[str, A] = {}
        prompt = completion = 0
        for key, row in self.ledger.lookup(keys).items():
            try:
                results[key] = kind.decode(row.body, row.usage, row.model_returned)
            except (ValueError, KeyError, TypeError) as error:
                raise LedgerCorruptError(
                    f"The stored answer {key} in {self.ledger.path} is intact but not understood: {error!r}.",
                    hint="It was written by another version; use that one, or another ledger file.",
                ) from error
            prompt += row.usage.prompt_tokens
            completion += row.usage.completion_tokens
        self._count(stage, prompt_tokens_reused=prompt, completion_tokens_reused=completion)
        return results

    def _journal(self, keys: list[str]) -> Journal:
        """The backend's journal; what an earlier process left under way is taken over, not paid for twice."""
        if self.ledger is None:
            return MemoryJournal(keys)
        journal = LedgerJournal(
            self.ledger, f"{self.backend.name}@{identity_hash(self.backend.identity)}", keys
        )
        journal.take_over(self.backend.under_way(journal))  # type: ignore[attr-defined]
        return journal

    def _reserve(self, keys: list[str], requests: Sequence[Q], stage: str) -> list[int]:
        if self.ledger is None:
            return []
        tokens = None
        if self._limits is not None and self._limits.max_tokens is not None:
            tokens = [self._estimate(request) for request in requests]
        model = self.backend.name
        return self.ledger.reserve(
            keys, run=self.run, stage=stage, role=self.role, model=model, limits=self._limits, tokens=tokens
        )

    def _estimate(self, request: ScoreRequest | GenerateRequest) -> int:
        if isinstance(self.backend, Planner):
            prompt = self.backend.count_tokens(request.prompt)
        else:
            prompt = _rough_tokens(request.prompt)
        if isinstance(request, GenerateRequest):
            return prompt + request.max_tokens
        return prompt + max((_rough_tokens(candidate) for candidate in request.candidates), default=0)

    def _count_bought(self, stage: str, block: list[tuple[int, A, bool]]) -> None:
        self._count(
            stage,
            bought=sum(good for _, _, good in block),
            failed=sum(not good for _, _, good in block),
            prompt_tokens_bought=sum(result.usage.prompt_tokens for _, result, _ in block),
            completion_tokens_bought=sum(result.usage.completion_tokens for _, result, _ in block),
        )

    def _count(self, stage: str, **more: float) -> None:
        with self._lock:
            counts = self._counts.setdefault(stage, {})
            for name, amount in more.items():
                counts[name] = counts.get(name, 0) + amount


def _rough_tokens(prompt: Rendered) -> int:
    texts = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    return sum(len(text.encode("utf-8", "surrogatepass")) // 3 + 1 for text in texts)
