"""The part of one batch that has to be bought: its calls, announced, answered, recorded."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Literal, SupportsIndex, TypeVar

from ._ledger_rows import split
from .backends.base import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult, Usage
from .errors import BackendError, LedgerError
from .ledger import Answer, Failure, Leaving, Ledger, Limits

__all__ = ["GENERATE", "SCORE", "Kind", "Purchase", "Terms"]

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
class Kind(Generic[Q, A]):
    """What scoring and generating differ in: how an answer is stored."""

    name: Literal["score", "generate"]
    encode: Callable[[Q, A], str]
    decode: Callable[[str, Usage, str | None], A]


SCORE = Kind("score", _encode_score, _decode_score)
GENERATE = Kind("generate", _encode_text, _decode_text)


# --- buying -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """What calls may take, and what they took.

    Attributes
    ----------
    limits : Limits or None
    most : callable or None
        Most tokens and money (in units of :data:`~proxyprompt.ledger.PICO`) of one call; ``None``: nothing is set aside.
    cost : callable
        Money of a finished call, ``None`` where it cannot be told.
    """

    limits: Limits | None = None
    most: Callable[[Any], tuple[int, int]] | None = None
    cost: Callable[[Usage], int | None] = lambda usage: None


class Announcer:
    """What a backend gets as ``on_send``: called for what leaves now, ``soon`` for what leaves next."""

    def __init__(self, purchase: Purchase[Any, Any]) -> None:
        self._purchase = purchase

    def __call__(self, indices: Sequence[int]) -> None:
        """These requests leave now."""
        self._purchase.on_send(indices)

    def soon(self, indices: Sequence[int]) -> None:
        """These leave after the block that comes next, in this order."""
        self._purchase.soon(indices)

    def unsent(self, indices: Sequence[int]) -> None:
        """These were announced and did not leave."""
        self._purchase.unsent(indices)

    def ready(self, index: int) -> bool:
        """Whether a request could leave now without waiting for the disk."""
        return self._purchase.ready(index)


@dataclass(frozen=True)
class _Mark:
    """When a call that has not left was marked as sent, and whether the ledger knows that it has not left."""

    ticket: int
    ahead: bool


class Purchase(Generic[Q, A]):
    """Calls that are reserved; what is announced, and what has come back so far."""

    def __init__(
        self,
        kind: Kind[Q, A],
        name: str,
        requests: Sequence[Q],
        keys: Sequence[str],
        ids: Sequence[int],
        ledger: Ledger | None,
        document: Callable[[Q], str] | None,
        terms: Terms = Terms(),
    ) -> None:
        self._kind = kind
        self._name = name
        self.requests = requests
        self._keys = keys
        self._attempts = [[number] for number in ids]
        self._ledger = ledger
        self._document = document
        self._terms = terms
        self._lock = threading.Lock()
        self._sent: set[int] = set()
        self._soon: list[int] = []
        self._foresighted = False  # whether the backend says what leaves next
        self._ahead: dict[int, _Mark] = {}  # marked as sent before they are announced
        self._unsent: set[int] = set()
        self._open = True
        self.results: dict[int, A] = {}

    def on_send(self, indices: Sequence[int]) -> None:
        """Mark requests as sent; a backend may call this from its own threads, and again for one more call."""
        named = list(dict.fromkeys(self._require(index) for index in indices))
        with self._lock:
            self._refuse_closed()
            first = [index for index in named if index not in self._sent]
            again = [index for index in named if index in self._sent]
            self._sent.update(first)
            marked = [(index, self._ahead.pop(index)) for index in first if index in self._ahead]
            first = [index for index in first if index not in dict(marked)]
        if self._ledger is None:
            return
        if marked:
            self._leave_marked(self._ledger, marked)
        if not (first or again):
            return
        # Outside the lock: threads that announce at the same moment share one write to the disk.
        tokens, money = self._most([*first, *again])
        try:
            more = self._ledger.mark_sent(
                [self._attempts[index][0] for index in first],
                tokens=tokens,
                money=money,
                limits=self._terms.limits,
                again=[self._attempts[index][0] for index in again],
            )
        except BaseException:
            with self._lock:
                self._sent.difference_update(first)
            raise
        with self._lock:
            for index, number in zip(again, more, strict=True):
                self._attempts[index].append(number)
            self._refuse_closed()
        self._mark_soon(self._ledger)

    def _leave_marked(self, ledger: Ledger, marked: Sequence[tuple[int, _Mark]]) -> None:
        """Send what is marked: written at once for the books of a killed process, the mark itself on the disk."""
        flagged = [self._attempts[index][0] for index, mark in marked if mark.ahead]
        if flagged:
            ledger.write((), left=flagged)
        ledger.wait_for_disk(max(mark.ticket for _, mark in marked))
        with self._lock:
            self._refuse_closed()

    def _mark_soon(self, ledger: Ledger) -> None:
        """Mark what comes after a first announcement, so that it need not wait for the disk."""
        with self._lock:
            soon, self._soon = [index for index in self._soon if index not in self._sent], []
        if not soon:
            return
        ticket, marked = ledger.write((), leaving=[self._leaving(soon, ahead=True)])
        if marked:
            with self._lock:
                self._ahead.update(dict.fromkeys(soon, _Mark(ticket, True)))
            ledger.flush_soon(ticket)

    def _leaving(self, indices: Sequence[int], *, ahead: bool) -> Leaving:
        ids = [self._attempts[index][0] for index in indices]
        return Leaving(ids, *self._most(indices), self._terms.limits, ahead)

    def ready(self, index: int) -> bool:
        """Whether it is marked and the mark on the disk."""
        if self._ledger is None:
            return True
        with self._lock:
            mark = self._ahead.get(index)
        return mark is not None and self._ledger.on_disk(mark.ticket)

    def on_disk(self, ticket: int) -> bool:
        """Whether a block that was taken is on the disk."""
        return self._ledger is None or self._ledger.on_disk(ticket)

    def wait_for_disk(self, ticket: int) -> None:
        """Return when a block that was taken is on the disk."""
        if self._ledger is not None:
            self._ledger.wait_for_disk(ticket)

    def soon(self, indices: Sequence[int]) -> None:
        """Remember what leaves after the next block; see :func:`~proxyprompt.backends.base.announce_soon`."""
        named = list(dict.fromkeys(self._require(index) for index in indices))
        with self._lock:
            self._soon = [index for index in named if index not in self._sent]
            self._foresighted = True

    def unsent(self, indices: Sequence[int]) -> None:
        """Remember what was announced and did not leave; see :func:`~proxyprompt.backends.base.announce_unsent`."""
        named = [self._require(index) for index in indices]
        with self._lock:
            # A second call for the same request may only follow on one that was made.
            self._unsent.update(index for index in named if len(self._attempts[index]) == 1)

    def _most(self, indices: Sequence[int]) -> tuple[list[int] | None, list[int] | None]:
        """Most tokens and money of each request, if anything is set aside."""
        if self._terms.most is None:
            return None, None
        most = [self._terms.most(self.requests[index]) for index in indices]
        return [one[0] for one in most], [one[1] for one in most]

    def _refuse_closed(self) -> None:
        if not self._open:
            # A thread that outlives its batch must not spend: its attempts are already given up.
            raise BackendError(f"The batch is over; {self._name} must not send any more of it.")

    def take(self, block: Iterable[tuple[int, A]]) -> tuple[list[tuple[int, A, bool]], int]:
        """Write a block down; its new results, whether each one is an answer, and a ticket for :meth:`on_disk`.

        Until it is on the disk it survives the death of the process, but is not to be handed on. A backend that does not
        say what leaves next has to wait for the disk in any case; then this waits.
        """
        answers: list[Answer] = []
        failures: list[Failure] = []
        taken: dict[int, tuple[A, bool]] = {}
        problem: BackendError | None = None
        for named, raw in block:
            try:
                index, result = self._require(named), _plausible(raw)
                if index in self.results or index in taken:
                    raise BackendError(f"{self._name} answered request {index} twice.", hint=_REPORT)
                known, lost = self._outcome(index, result)
                if result.error is None:
                    answer = self._answer(index, result, known)
                    # What is returned is what a later run will read back, to the last type.
                    taken[index] = (self._kind.decode(answer.body, answer.usage, answer.model_returned), True)
                    answers.append(answer)
                else:
                    taken[index] = (result, False)
                    failures += self._failures(known, result)
                reason = result.error or "no answer; asked again"
                failures += [Failure(number, reason, uncertain=True) for number in lost]
            except BackendError as error:
                problem = error  # what came before it in the block is paid for: record that first
                break
        ticket = 0
        if self._ledger is not None and taken:
            with self._lock:
                soon, self._soon = [] if problem is not None else self._soon, []
            ticket = self._write(self._ledger, answers, failures, soon[: len(taken)], soon[len(taken) :])
        self.results.update((index, result) for index, (result, _) in taken.items())
        if problem is not None:
            raise problem
        return [(index, result, good) for index, (result, good) in taken.items()], ticket

    def _write(
        self,
        ledger: Ledger,
        answers: Sequence[Answer],
        failures: Sequence[Failure],
        now: Sequence[int],
        later: Sequence[int],
    ) -> int:
        """Results, what takes their places ``now``, and marks for what comes ``later``, in one transaction.

        Only as many leave now as have come back, so that after the death of the process no more calls are of unknown
        outcome than were in flight.
        """
        with self._lock:
            marks = dict(self._ahead)
        going = [index for index in now if index in marks and marks[index].ahead]
        groups = [
            (mine, ahead)
            for group, ahead in ((now, False), (later, True))
            if (mine := [index for index in group if index not in marks])
        ]
        leaving = [self._leaving(mine, ahead=ahead) for mine, ahead in groups]
        left = [self._attempts[index][0] for index in going]
        ticket, marked = ledger.write(answers, failures, leaving=leaving, left=left)
        with self._lock:
            for mine, ahead in groups[:marked]:
                self._ahead.update(dict.fromkeys(mine, _Mark(ticket, ahead)))
            self._ahead.update((index, _Mark(marks[index].ticket, False)) for index in going)
            foresighted = self._foresighted
        if foresighted:
            ledger.flush_soon(ticket)
        else:
            ledger.wait_for_disk(ticket)
        return ticket

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
            left = [n for index, ids in enumerate(self._attempts) if index not in self.results for n in ids]
            unsent = [self._attempts[index][0] for index in {*self._ahead, *self._unsent}]
        if self._ledger is not None and left:
            # On the way out of another error: that one matters more, and opening the ledger again repairs it.
            with suppress(LedgerError):
                if unsent:
                    self._ledger.withdraw(unsent)
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

    def _outcome(self, index: int, result: A) -> tuple[list[int], list[int]]:
        """Attempts whose bill is known, the answering one first, and those that may have been billed."""
        if self._ledger is None:
            return [0], []
        with self._lock:
            ids = self._attempts[index][::-1]
        if not 0 <= result.uncertain <= len(ids) - (result.error is None):
            raise BackendError(
                f"{self._name} says that {result.uncertain} of {len(ids)} announced calls for request {index} may have"
                " been billed.",
                hint=_REPORT,
            )
        known = len(ids) - result.uncertain
        return ids[:known], ids[known:]

    def _answer(self, index: int, result: A, known: Sequence[int]) -> Answer:
        request = self.requests[index]
        try:
            body = self._kind.encode(request, result)
        except (TypeError, ValueError) as error:
            raise BackendError(
                f"{self._name} gave an invalid answer to request {index}: {error}.", hint=_REPORT
            ) from error
        text = None if self._document is None else self._document(request)
        cost = self._terms.cost(result.usage)
        first, *extra = known
        return Answer(
            first, self._keys[index], body, result.usage, result.model_returned, text, cost, tuple(extra)
        )

    def _failures(self, known: Sequence[int], result: A) -> list[Failure]:
        """Calls without an answer: what they report as used was billed, and else nothing was."""
        if not known:
            return []
        cost = self._terms.cost(result.usage) if result.usage != Usage() else 0
        shares = split(result.usage, cost or 0, len(known))
        return [
            Failure(number, result.error or "", usage, share or 0)
            for number, (usage, share) in zip(known, shares, strict=True)
        ]


def _plausible(result: A) -> A:
    """The result, without a usage that cannot be one: what was set aside for the call counts then."""
    usage = result.usage
    parts = (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        usage.cache_write_tokens,
        usage.reasoning_tokens,
    )
    if all(
        isinstance(part, int) and not isinstance(part, bool) and 0 <= part < _MOST_TOKENS for part in parts
    ):
        return result
    cleaned: A = dataclasses.replace(result, usage=Usage())
    return cleaned


_MOST_TOKENS = 2**27
"""No model reads or writes as much; what a server invents must not grow into sums that SQLite cannot hold."""

_REPORT = "This is a defect of the backend; every answer before it is kept."
