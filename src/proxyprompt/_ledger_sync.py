"""When what is written is on the disk: one flush for all who wait, beside the writing and not in its way.

SQLite could flush in each commit, but would hold up every other write until the disk has answered. Here a commit only
hands its pages to the kernel, where the death of the process cannot reach them. The flush that outlasts a power cut
follows; it covers all commits before it began, and others go on writing meanwhile.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from .errors import ProxyPromptError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["DiskSync"]

_IDLE_SECONDS = 1.0
"""A thread that has had nothing to flush for so long ends; the next wish starts another one."""

_CLOCK_STEP = 0.1
"""Times of files come from a coarser clock than ours."""


class DiskSync:
    """Tickets for commits, and waiting until a ticket is on the disk.

    Parameters
    ----------
    path : Path
        The write-ahead log.
    explained : callable
        Turns an error of the system into one of ours.

    Notes
    -----
    A ticket is drawn before its commit and used after it. After a flush that failed nothing can be trusted to be on the
    disk (the kernel may drop the pages and succeed the next time), so from then on every wait fails.
    """

    def __init__(self, path: Path, explained: Callable[[OSError], ProxyPromptError]) -> None:
        self._path = path
        self._explained = explained
        self._handle: int | None = None
        self._tickets = 0
        self._checked = 0.0
        self._begun = self._finished = 0  # flushes
        self.forget()

    def forget(self) -> None:
        """Start anew: after a fork neither the thread nor those who wait exist."""
        # Plain locks, entered by "with" only: no Ctrl-C can come between taking one and the promise to give it back.
        self._state, self._disk = threading.Lock(), threading.Lock()
        self._wishes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._committed = self._synced = self._tickets
        self._failed: OSError | None = None
        self._thread: threading.Thread | None = None
        self._close_handle()

    def ticket(self) -> int:
        """For the commit that comes next; drawn by whoever holds the connection, so that tickets are in its order."""
        self._tickets += 1
        return self._tickets

    @property
    def last(self) -> int:
        """Of the tickets drawn so far; its commit has been made if nobody holds the connection."""
        return self._tickets

    def reached(self, ticket: float) -> bool:
        """Whether a commit is on the disk; raises if it cannot be known to be."""
        if ticket <= self._synced:
            return True
        if self._failed is not None:
            raise self._explained(self._failed) from self._failed
        return False

    def made(self, ticket: int) -> None:
        """A commit has been made: flushes that begin from now on cover it."""
        with self._state:
            self._committed = max(self._committed, ticket)

    def soon(self, ticket: int) -> None:
        """Have a commit flushed by a thread, without waiting for it."""
        with self._state:
            self._committed = max(self._committed, ticket)
            self._wishes.put(ticket)
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name="proxyprompt-ledger", daemon=True)
                with suppress(RuntimeError):  # no more threads; whoever waits flushes
                    thread.start()
                    self._thread = thread

    def through(self, ticket: int) -> None:
        """Return when a commit, which has been made, is on the disk.

        Raises
        ------
        LedgerError
            If a flush has failed.
        """
        self.made(ticket)
        self._flush_until(lambda: self.reached(ticket))

    def catch_up(self) -> None:
        """Return when whatever can be read of the log by now, also of other processes, is on the disk."""
        try:
            state = os.stat(self._path)
        except OSError:
            return  # no log: all of it is in the database
        quiet = self._committed <= self._synced and state.st_mtime < self._checked - _CLOCK_STEP
        if quiet or not state.st_size:
            return
        next_one = self._begun + 1  # one under way may have begun before
        self._flush_until(lambda: self._finished >= next_one or self.reached(math.inf))

    def close(self) -> None:
        """Give the file back; a flush under way is waited for."""
        with self._disk:
            self._close_handle()

    def _serve(self) -> None:
        while True:
            try:
                wanted = self._wishes.get(timeout=_IDLE_SECONDS)
                self._flush_until(partial(self.reached, wanted))
            except queue.Empty:
                pass
            except ProxyPromptError:  # those who wait hear of it
                break
            else:
                continue
            with self._state:
                if self._wishes.empty():
                    self._thread = None
                    return
        with self._state:
            self._thread = None

    def _flush_until(self, enough: Callable[[], bool]) -> None:
        """Wait for flushes of others, or make them, until it is enough."""
        while not enough():
            with self._disk:
                # Those who waited here find that the one before them flushed for all.
                if not enough():
                    self._flush()

    def _flush(self) -> None:
        covered = self._committed
        self._begun += 1
        number, began = self._begun, time.time()
        try:
            handle = self._opened()
            if handle is not None:
                _flush_to_disk(handle)
        except OSError as error:
            self._failed = error
            return
        self._synced, self._checked = max(self._synced, covered), began
        self._finished = number

    def _opened(self) -> int | None:
        """The log as it is now: another connection may have folded it in, flushed, and begun a new one."""
        try:
            now = os.stat(self._path)
        except FileNotFoundError:
            return None
        if self._handle is not None:
            held = os.fstat(self._handle)
            if (held.st_dev, held.st_ino) == (now.st_dev, now.st_ino):
                return self._handle
            self._close_handle()
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._handle = os.open(self._path, flags)
        except FileNotFoundError:
            return None
        return self._handle

    def _close_handle(self) -> None:
        # SQLite keeps no locks on the log, so that closing a descriptor of it drops none.
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(OSError):
                os.close(handle)


def _flush_to_disk(handle: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where a plain sync stays in the drive's cache
        fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(handle)
    else:
        os.fsync(handle)
