"""Requests sent as provider batches: half the price, up to a day later, and collected by whichever process comes.

What is under way is written to a :class:`~proxyprompt.backends.base.Journal` *before* it is sent, with the keys of the
requests as ``custom_id``. A process that finds a batch there waits for it instead of sending again, also when the one
that sent it died between the provider's acceptance and its own note: batches carry the job's name in their metadata.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from proxyprompt.errors import BackendError, RetryableBackendError

from ._openai_account import OVER, STOPPED, content, is_gone, list_batches, retrieve
from ._openai_asking import Asker, failed, read_score
from ._openai_connection import Call, Connection
from ._openai_jobs import Job, positions, read_jobs
from ._openai_labels import UnreadableAnswerError, read_texts
from ._openai_replies import Refusal, read_replies
from ._openai_wire import PATHS, Endpoint, read_answer
from .base import (
    GenerateRequest,
    GenerateResult,
    Journal,
    OnSend,
    ScoreRequest,
    ScoreResult,
    Usage,
)

_TAG = "proxyprompt"
_MOST_BYTES = 190_000_000
_LONG_PAST = 40 * 86_400.0
"""Seconds after which a batch that the server does not know is given up: providers keep results for 30 days."""

_Request = TypeVar("_Request", ScoreRequest, GenerateRequest)
_Result = TypeVar("_Result", ScoreResult, GenerateResult)


@dataclass(frozen=True)
class BatchTerms:
    """How batches are sent and waited for.

    Parameters
    ----------
    size : int
        Most requests in one batch.
    poll : float
        Seconds between two looks at a batch.
    wait : float or None
        Seconds after which this process stops waiting; the batch goes on, and a later run collects it.
    rounds : int
        How often requests that expired or met an overloaded server are sent in all.
    """

    size: int = 50_000
    poll: float = 30.0
    wait: float | None = None
    rounds: int = 3


class Batches(Generic[_Request, _Result]):
    """Sends and collects the batches of one call of ``score`` or ``generate``.

    Parameters
    ----------
    connection : Connection
    asker : Asker
    terms : BatchTerms
    journal : Journal
    requests : sequence
    endpoint : callable
        Of a request.
    announce : callable
        ``on_send``.
    """

    def __init__(
        self,
        connection: Connection,
        asker: Asker,
        terms: BatchTerms,
        journal: Journal,
        requests: Sequence[_Request],
        endpoint: Callable[[_Request], Endpoint],
        announce: OnSend,
    ) -> None:
        self._connection = connection
        self._asker = asker
        self._terms = terms
        self._journal = journal
        self._requests: Sequence[_Request] = requests
        self._endpoint: Callable[[_Request], Endpoint] = endpoint
        self._announce = announce
        self._index = positions(journal)
        self._jobs: dict[str, Job] = {}
        self._sent: dict[int, int] = {}
        self._lost: dict[int, int] = {}

    def resume(self) -> set[int]:
        """Take up the jobs of the journal that concern this call; gives the indices they cover."""
        covered: set[int] = set()
        for job in read_jobs(self._journal):
            mine = [self._index[key] for key in job.left() if key in self._index]
            if not mine:
                continue  # however old it seems: a clock may have been wrong, and what was paid for is not forgotten
            if job.batch is None:
                # Its sender died on the way; the provider may have accepted it all the same.
                job.batch = self._find(job)
                if job.batch is None:
                    self._journal.write(job.name, None)
                    continue
                job.save(self._journal)
            self._jobs[job.name] = job
            covered.update(mine)
        if covered:
            # They are on their way again in this process's books.
            self._announce(sorted(covered))
        return covered

    def send(self, indices: Sequence[int]) -> Iterator[list[tuple[int, _Result]]]:
        """Submit requests, as few batches as their limits allow; yields those of a batch that was refused, and raises."""
        by_endpoint: dict[Endpoint, list[int]] = {}
        for index in indices:
            by_endpoint.setdefault(self._endpoint(self._requests[index]), []).append(index)
        for endpoint, members in by_endpoint.items():
            chunk: list[int] = []
            lines: list[bytes] = []
            size = 0
            for index in members:
                new = self._lines(endpoint, index)
                if chunk and (
                    len(lines) + len(new) > self._terms.size or size + sum(map(len, new)) > _MOST_BYTES
                ):
                    yield from self._submit(endpoint, chunk, lines)
                    chunk, lines, size = [], [], 0
                chunk.append(index)
                lines += new
                size += sum(map(len, new))
            if chunk:
                yield from self._submit(endpoint, chunk, lines)

    def collect(self) -> Iterator[list[tuple[int, _Result]]]:
        """Wait for all batches, yield the results of each when it is over, send again what expired."""
        started = time.monotonic()
        gone: BackendError | None = None
        while self._jobs:
            again: list[int] = []
            block: list[tuple[int, _Result]]
            unanswered: list[int]
            for job in list(self._jobs.values()):
                try:
                    status = self._status(job)
                    over = status.status in OVER
                    refused = status.status == "failed" and not status.output_file_id
                    block, unanswered = self._results(job, status) if over and not refused else ([], [])
                except BackendError as error:
                    if not is_gone(error):
                        raise
                    # The others are collected first.
                    gone = gone or self._gone(job, error)
                    del self._jobs[job.name]
                    continue
                if not over:
                    continue
                if refused:
                    self._journal.write(job.name, None)
                    refusal = self._refused(job, status)
                    mine = [self._index[key] for key in job.left() if key in self._index]
                    yield [(index, self._failed(index, refusal.message)) for index in mine]
                    raise refusal
                if block:
                    yield block
                # The caller has made them durable by now.
                del self._jobs[job.name]
                handled = {*(index for index, _ in block), *unanswered}
                job.delivered += [key for key in job.left() if self._index.get(key) in handled]
                if job.left():
                    job.save(self._journal)
                else:
                    self._journal.write(job.name, None)
                again += unanswered
            if again:
                yield from self.send(again)
                continue
            if self._jobs:
                self._pause(started)
        if gone is not None:
            raise gone

    def _pause(self, started: float) -> None:
        wait = self._terms.wait
        if wait is not None and time.monotonic() - started >= wait:
            names = ", ".join(str(job.batch) for job in self._jobs.values())
            count = sum(len(job.left()) for job in self._jobs.values())
            raise RetryableBackendError(
                f"{count} requests are still under way in {len(self._jobs)} batches ({names}).",
                hint="Run again later: they are collected then, and nothing is sent twice.",
            )
        time.sleep(self._terms.poll)

    # -- one batch

    def _copies(self, endpoint: Endpoint) -> int:
        """Lines per request: several where the server makes one sample per call only."""
        traits = self._asker.traits(endpoint)
        texts = traits.evidence == "texts" and self._asker.manner.repeats > 1
        return self._asker.manner.repeats if texts and "n" in traits.refused else 1

    def _job(self, endpoint: Endpoint, keys: list[str]) -> Job:
        score = bool(self._requests) and isinstance(self._requests[0], ScoreRequest)
        return Job(
            name=uuid.uuid4().hex,
            endpoint=endpoint,
            kind="score" if score else "generate",
            keys=keys,
            evidence=self._asker.traits(endpoint).evidence if score else None,
            copies=self._copies(endpoint) if score else 1,
            created=time.time(),
            greedy="temperature" not in self._asker.traits(endpoint).refused,
        )

    def _lines(self, endpoint: Endpoint, index: int) -> list[bytes]:
        request, key = self._requests[index], self._journal.keys[index]
        job = self._job(endpoint, [key])
        if isinstance(request, ScoreRequest):
            body = self._asker.score_fields(request, endpoint, job.evidence or "texts")
        else:
            body = self._asker.text_fields(request, endpoint)
        return [
            json.dumps(
                {"custom_id": name, "method": "POST", "url": "/v1" + PATHS[endpoint], "body": body},
                separators=(",", ":"),
            ).encode()
            + b"\n"
            for name in job.custom_ids(key)
        ]

    def _submit(
        self, endpoint: Endpoint, indices: Sequence[int], lines: Sequence[bytes]
    ) -> Iterator[list[tuple[int, _Result]]]:
        job = self._job(endpoint, [self._journal.keys[index] for index in indices])
        for _ in range(job.copies):
            self._announce(indices)
        for index in indices:
            self._sent[index] = self._sent.get(index, 0) + 1
        job.save(self._journal)
        upload = (f"{job.name}.jsonl", b"".join(lines), "application/jsonl")
        try:
            job.file = self._do(lambda client: client.files.create(file=upload, purpose="batch"))
        except BackendError as error:
            # A file is no batch: whatever became of it, nothing is billed.
            yield self._unsent(job, indices, error)
            raise
        job.save(self._journal)

        def create(client: Any) -> Any:
            return client.batches.create(
                input_file_id=job.file,
                endpoint="/v1" + PATHS[endpoint],
                completion_window="24h",
                metadata={_TAG: job.name},
            )

        # A creation that got no answer may have happened: it is looked for before it is repeated.
        try:
            job.batch = self._do(create, otherwise=lambda: self._find(job))
        except RetryableBackendError:
            raise  # it may be there all the same; a later run looks for it
        except BackendError as error:
            yield self._unsent(job, indices, error)
            raise
        job.save(self._journal)
        self._jobs[job.name] = job

    def _unsent(self, job: Job, indices: Sequence[int], error: BackendError) -> list[tuple[int, _Result]]:
        """Results of requests whose batch was certainly not made."""
        self._journal.write(job.name, None)
        return [(index, self._failed(index, error.message)) for index in indices]

    def _do(self, work: Callable[[Any], Any], otherwise: Callable[[], str | None] | None = None) -> str:
        """Make something, and give its id; ``otherwise`` finds it where the answer was lost."""
        found: list[str] = []

        def check() -> bool:
            name = otherwise() if otherwise is not None else None
            found.extend([name] if name is not None else [])
            return bool(found)

        result = self._connection.manage(work, check if otherwise is not None else None)
        name = found[0] if found else getattr(result, "id", None)
        if not isinstance(name, str) or not name:
            raise RetryableBackendError("The server made a file or a batch without a name.")
        return name

    def _find(self, job: Job) -> str | None:
        """The id of the batch that carries a job's name or file, among the newest ones of the account."""
        after: str | None = None
        for _ in range(20):
            more = {"after": after} if after else {}
            page = self._connection.manage(partial(list_batches, more))
            for batch in page.data:
                # Some providers keep no metadata; the file of a job is used once.
                tagged = (getattr(batch, "metadata", None) or {}).get(_TAG) == job.name
                if tagged or (job.file is not None and getattr(batch, "input_file_id", None) == job.file):
                    return str(batch.id)
            if not page.data or not getattr(page, "has_more", False):
                return None
            after = page.data[-1].id
        return None

    def _status(self, job: Job) -> Any:
        status = self._connection.manage(partial(retrieve, str(job.batch)))
        if not isinstance(getattr(status, "status", None), str):
            raise RetryableBackendError(f"The server said nothing readable of the batch {job.batch}.")
        return status

    def _gone(self, job: Job, error: BackendError) -> BackendError:
        """What to say of a batch, or of its results, that the server does not know.

        The entry stays: with another key the server may know it, and dropped it would be bought again.
        """
        when = time.strftime("%Y-%m-%d", time.gmtime(job.created))
        hint = (
            "Use the key and the project that sent it. If it is gone for good, `proxyprompt batches CONFIG --cancel`, or "
            "cancel_batches() of the Meter, forgets it; its requests are then sent again."
        )
        if time.time() - job.created > _LONG_PAST:
            self._journal.write(job.name, None)
            hint = "It is too old to be kept anywhere: run again, and its requests are sent again."
        return BackendError(
            f"The batch {job.batch} of {when}, with {len(job.left())} requests to collect, is gone: {error.message}",
            hint=hint,
        )

    def _refused(self, job: Job, status: Any) -> BackendError:
        told = [getattr(item, "message", item) for item in getattr(status.errors, "data", None) or []]
        reason = self._connection.clean("; ".join(map(str, told[:3])) or "no reason given")
        return BackendError(
            f"The provider refused the batch {job.batch} of {len(job.keys)} requests: {reason}.",
            hint="Nothing of it was billed. If it was too large for the account's queue, lower batch_size.",
        )

    def _results(self, job: Job, status: Any) -> tuple[list[tuple[int, _Result]], list[int]]:
        """What a batch that is over brought, and which requests are worth sending again."""
        files = [file for file in (status.output_file_id, status.error_file_id) if file]
        replies = read_replies([self._connection.manage(partial(content, file)).content for file in files])
        complete = status.status == "completed"
        block: list[tuple[int, _Result]] = []
        again: list[int] = []
        for key in job.left():
            index = self._index.get(key)
            if index is None:
                continue
            names = job.custom_ids(key)
            answered, refusal = replies.answers_of(names), replies.refusal_of(names)
            lost = replies.unaccounted(names, complete=complete)
            self._lost[index] = self._lost.get(index, 0) + lost
            if answered:
                block.append((index, self._counted(index, self._read(job, index, answered))))
            elif status.status not in STOPPED and self._worth_sending(index, refusal, lost):
                again.append(index)
            else:
                reason = f"the batch {job.batch} is {status.status} without an answer to it"
                block.append((index, self._failed(index, refusal.reason if refusal else reason)))
        return block, again

    def _worth_sending(self, index: int, refusal: Refusal | None, lost: int) -> bool:
        """Whether to send a request again; one that may have been billed not more often than is allowed."""
        if refusal is not None and not refusal.passes:
            return False
        if lost and self._lost[index] > self._connection.patience.paid_retries:
            return False
        return self._sent.get(index, 1) < self._terms.rounds

    def _counted(self, index: int, result: Any) -> Any:
        """A result with what was lost on the way to it."""
        return replace(result, uncertain=result.uncertain + self._lost.get(index, 0))

    def _failed(self, index: int, reason: str) -> Any:
        result = failed(self._requests[index], self._connection.clean(reason), Call(_nothing, _NEVER))
        return self._counted(index, result)

    def _read(self, job: Job, index: int, bodies: Sequence[Mapping[str, Any]]) -> Any:
        request = self._requests[index]
        usage = Usage()
        try:
            if isinstance(request, GenerateRequest):
                answer = read_answer(bodies[0], job.endpoint)
                call = Call(_nothing, _NEVER, usage=answer.usage)
                return Asker.read_text(request, answer, call)
            if job.copies == 1:
                return read_score(
                    request, job.endpoint, job.evidence or "texts", bodies[0], greedy=job.greedy
                )
            answers = [read_answer(body, job.endpoint) for body in bodies]
            usage = sum((answer.usage for answer in answers), Usage())
            values, samples = read_texts([c.text for a in answers for c in a.choices], request.candidates)
            last = answers[-1]
            return ScoreResult(*values, usage, None, last.model, 0, "texts", samples, last.fingerprint)
        except UnreadableAnswerError as error:
            call = Call(_nothing, _NEVER, usage=error.usage or usage, uncertain=error.uncertain)
            return failed(request, self._connection.clean(str(error)), call)


_NEVER = threading.Event()


def _nothing() -> None:
    """Nobody to tell."""
