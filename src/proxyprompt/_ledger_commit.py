"""Many threads, one transaction: those who come together share it."""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from ._ledger_calls import interrupted
from .errors import ProxyPromptError

__all__ = ["CommitQueue", "Job"]

T = TypeVar("T")
Job: TypeAlias = Callable[[sqlite3.Connection], T]

_MOST_JOBS = 512


@dataclass(eq=False)
class _Waiting:
    """A piece of writing that waits for its commit."""

    work: Job[Any]
    result: Any = None
    error: BaseException | None = None
    done: bool = False
    ticket: int = 0


class CommitQueue:
    """Group commit without a thread of its own.

    While one thread leads and writes, the others queue up; when it is done, those whose work it took along go
    their way at once, and one of the rest leads with the whole queue. Each piece stands in a savepoint, so that an
    error of one leaves the others as they are.

    Parameters
    ----------
    use : callable
        ``use(action)`` lends the connection, and rolls back on leaving what is not committed.
    explained : callable
        Turns an error of SQLite into one of ours.
    lock : RLock
        Held while the connection is in use.
    ticket : callable
        Names the commit that comes next; see :class:`~proxyprompt._ledger_sync.DiskSync`.
    """

    def __init__(
        self,
        use: Callable[[str], AbstractContextManager[sqlite3.Connection]],
        explained: Callable[[str, Exception], ProxyPromptError],
        lock: threading.RLock,
        ticket: Callable[[], int],
    ) -> None:
        self._use = use
        self._explained = explained
        self._lock = lock
        self._ticket = ticket
        self._queue: deque[_Waiting] = deque()

    def forget(self) -> None:
        """Drop what waits: after a fork its threads do not exist."""
        self._queue.clear()

    def run(self, action: str, work: Job[T]) -> tuple[T, int]:
        """Run ``work`` in a transaction and return what it returns, or raise what it raises; and the commit's ticket."""
        mine = _Waiting(work)
        self._queue.append(mine)
        try:
            while not mine.done:
                # A lock entered by "with": no Ctrl-C can come between taking it and the promise to give it back, as it
                # can where a flag says that somebody commits.
                with self._lock:
                    # Those who waited here find that the one before them committed for all.
                    if not mine.done:
                        self._commit_queue(action)
        finally:
            if not mine.done:  # interrupted while waiting
                with suppress(ValueError):
                    self._queue.remove(mine)
        if mine.error is not None:
            raise mine.error
        return mine.result, mine.ticket

    def _commit_queue(self, action: str) -> None:
        jobs = [self._queue.popleft() for _ in range(min(len(self._queue), _MOST_JOBS))]
        committing = committed = False
        try:
            with self._use(action) as connection:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    for job in jobs:
                        self._run_job(connection, job, action, alone=len(jobs) == 1)
                    ticket = self._ticket()
                    for job in jobs:
                        job.ticket = ticket
                    committing = True
                    connection.execute("COMMIT")
                    committed = True
                except KeyboardInterrupt:
                    # It may have come just after the commit.
                    committed = committing and not connection.in_transaction
                    raise
        except ProxyPromptError as error:
            for job in jobs:
                # An error object of its own for each thread, as each adds its own traceback.
                job.error, job.done = type(error)(error.message, hint=error.hint), True
                job.error.__cause__ = error.__cause__
            return
        except BaseException:
            if not committed:
                self._queue.extendleft(reversed(jobs))
            raise
        finally:
            if committed:
                for job in jobs:
                    job.done = True

    def _run_job(self, connection: sqlite3.Connection, job: _Waiting, action: str, *, alone: bool) -> None:
        job.error = job.result = None
        if not alone:
            connection.execute("SAVEPOINT job")
        try:
            job.result = job.work(connection)
        except Exception as error:
            if interrupted(error):
                raise KeyboardInterrupt from None
            # A full disk and the like end the transaction for all.
            if alone or not connection.in_transaction:
                raise
            foreign = isinstance(error, sqlite3.Error | UnicodeDecodeError)
            job.error = self._explained(action, error) if foreign else error
            connection.execute("ROLLBACK TO job")
        if not alone:
            connection.execute("RELEASE job")
