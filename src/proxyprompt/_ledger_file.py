"""The file under the ledger: opening, locking, schema, permissions, forks, and SQLite's pitfalls."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ._ledger_calls import interrupted, learn_seal
from ._ledger_commit import CommitQueue, Job
from ._ledger_owners import settle_dead
from ._ledger_schema import APPLICATION_ID, SCHEMA, create_tables, migrate, pragma
from ._ledger_sync import DiskSync
from .errors import LedgerCorruptError, LedgerError

try:
    import fcntl
except ImportError:  # Windows: no presence lock, see _join
    fcntl = None  # type: ignore[assignment]

__all__ = ["LedgerFile"]

_BUSY_SECONDS = 60.0

# SQLite 3.7.0 to 3.51.2 can corrupt the file when one connection checkpoints or restarts the WAL while
# another writes. There we never checkpoint while anybody else has the file open: no automatic checkpoints;
# the WAL is folded in only by closing the last connection and by fold_wal, both of which SQLite itself does
# under its exclusive lock on the database file, which it cannot get while another connection exists.
_WAL_RESET_DEFECT = (3, 7, 0) <= sqlite3.sqlite_version_info < (3, 51, 3)
_FOLD_BYTES = 64 * 2**20

# On macOS a plain sync stays in the drive's cache, hence fullfsync.
_PRAGMAS = ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = FULL", "fullfsync = ON")
# Once the file is open, commits are flushed by DiskSync, and by SQLite only when the log is folded in.
_WRITING = ("synchronous = NORMAL", "checkpoint_fullfsync = ON")
_SPARE_BYTES = 4 * 2**20
_SPACE_SECONDS = 0.1

T = TypeVar("T")


class LedgerFile:
    """One process's hold on the database file; see :class:`proxyprompt.ledger.Ledger` for the promises."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        create: bool,
        first_meta: Callable[[], Mapping[str, bytes]] = dict,
    ) -> None:
        self.path = Path(path).expanduser().absolute()
        self._create = create
        self._first_meta = first_meta
        self._lock = threading.RLock()
        self._wal = self.path.with_name(self.path.name + "-wal")
        self.disk = DiskSync(self._wal, lambda error: self._explained("flushed to the disk", error))
        self._commits = CommitQueue(self.use, self._explained, self._lock, self.disk.ticket)
        self._connection: sqlite3.Connection | None = None
        self._presence: int | None = None
        self._closed = False
        self._fold_at = _FOLD_BYTES
        self._space, self._space_until = False, 0.0
        _LIVE.add(self)
        with self.use("opened"):
            pass

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            if self._connection is not None:
                with suppress(LedgerError):  # what somebody waited for is on the disk already
                    self.disk.through(self.disk.last)
            self._closed = True
            self._disconnect()
            self._leave()

    def commit(self, action: str, work: Job[T]) -> T:
        """Run ``work`` in a durable transaction, shared with what other threads want written just then."""
        result, ticket = self._commits.run(action, work)
        self.disk.through(ticket)
        return result

    def write(self, action: str, work: Job[T]) -> tuple[T, int]:
        """Like :meth:`commit`, but safe from the death of the process only; the ticket says to ``disk`` what is meant."""
        result, ticket = self._commits.run(action, work)
        self.disk.made(ticket)
        return result, ticket

    def has_space(self) -> bool:
        """Whether :meth:`require_space` would go on, by a look a moment ago."""
        now = time.monotonic()
        if now >= self._space_until:
            try:
                self._space = self._free() >= _SPARE_BYTES
            except LedgerError:
                self._space = False
            self._space_until = now + _SPACE_SECONDS
        return self._space

    def _free(self) -> int:
        if not hasattr(os, "statvfs"):
            return _SPARE_BYTES
        try:
            state = os.statvfs(self.path.parent)
        except OSError as error:
            raise self._explained("written", error) from error
        return state.f_bavail * state.f_frsize

    def require_space(self) -> None:
        """Refuse to go on when what is in flight might find no room on the disk.

        Raises
        ------
        LedgerError
            With less than 4 MB left.
        """
        free = self._free()
        if free < _SPARE_BYTES:
            raise LedgerError(
                f"The ledger {self.path} could not be written: only {free:,} bytes are left on its disk, and answers in"
                f" flight need room; nothing was sent (at least {_SPARE_BYTES:,} are wanted).",
                hint="Make space, or move the ledger to another disk; everything answered so far is kept.",
            )

    @contextmanager
    def use(self, action: str, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """Lend the connection to one thread; with ``write``, in one transaction, durable on leaving."""
        with self._lock:
            if self._closed:
                raise LedgerError(
                    f"The ledger {self.path} is closed.", hint="Open it again with Ledger(path)."
                )
            try:
                if self._connection is None:
                    self._connect()
                connection = self._connection
                assert connection is not None
                if write:
                    connection.execute("BEGIN IMMEDIATE")
                yield connection
                if write:
                    ticket = self.disk.ticket()
                    connection.execute("COMMIT")
                    self.disk.through(ticket)
            except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
                if interrupted(error):
                    raise KeyboardInterrupt from None
                raise self._explained(action, error) from error
            finally:
                if self._connection is not None and self._connection.in_transaction:
                    with suppress(sqlite3.Error):
                        self._connection.rollback()

    @contextmanager
    def alone(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection for one transaction that removes rows, and rewrite the file after it.

        Raises
        ------
        LedgerError
            If somebody else has the file open.
        """
        with self._lock, self.use("rewritten") as connection:
            if fcntl is not None:
                try:
                    fcntl.flock(self._presence, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
                except BlockingIOError as error:
                    raise LedgerError(
                        f"The ledger {self.path} is open elsewhere; nothing is removed from it now.",
                        hint="Let the other process finish, and try again.",
                    ) from error
            try:
                connection.execute("PRAGMA secure_delete = ON")
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
                connection.execute("VACUUM")
                # The log holds pages from before; without it the file is whole.
                connection.execute("PRAGMA journal_mode = DELETE")
                self._enter_wal(connection)
            finally:
                if fcntl is not None:
                    fcntl.flock(self._presence, fcntl.LOCK_SH)  # type: ignore[arg-type]

    def _explained(self, action: str, error: Exception) -> LedgerError:
        # sqlite3 stumbles over SQLite's own message when that quotes a damaged schema.
        text = "malformed schema" if isinstance(error, UnicodeDecodeError) else str(error)
        if "not a database" in text:
            return LedgerError(f"{self.path} is not a ledger: {text}.", hint="Give another path.")
        if "malformed" in text:
            return LedgerCorruptError(
                f"The ledger {self.path} could not be {action}: {text}.",
                hint="Copy the file and its -wal first, then save what is readable with sqlite3's .recover.",
            )
        hint = f"Check that {self.path.parent} is a local folder that you may write to, with space left."
        if "locked" in text:
            hint = "Another process has kept it busy; let that process finish and try again."
        return LedgerError(f"The ledger {self.path} could not be {action}: {text}.", hint=hint)

    def _connect(self) -> None:
        self._make_file()
        joining = self._presence is None
        alone = joining and self._join()
        try:
            connection = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection = connection
            # A damaged row may claim to be text; undecodable text must fail its hash, not the whole query.
            connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            learn_seal(connection)
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            self._adopt(connection, others=joining and not alone and fcntl is not None)
            if joining:
                self._recover(connection, alone)
            for pragma in _WRITING:
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            self._disconnect()
            if joining:
                self._leave()
            raise
        if alone:
            fcntl.flock(self._presence, fcntl.LOCK_SH)  # type: ignore[arg-type]

    def _make_file(self) -> None:
        if not self._create and not self.path.exists():
            raise LedgerError(
                f"There is no ledger at {self.path}.", hint="Check the path, or pass create=True."
            )
        for folder in reversed([one for one in self.path.parents if not one.exists()]):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._refuse_traps()
        # Never open and close an existing database file by ourselves: closing any descriptor of it drops the
        # POSIX locks that SQLite holds on it in this process.
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))

    def _refuse_traps(self) -> None:
        """Whoever may write to the folder could put another file in the ledger's place, or a link to one of ours."""
        if os.name != "posix":
            return
        folder = os.stat(self.path.parent)
        mine = (os.geteuid(), 0)
        # A group of one's own (many systems give everybody one, and let it write) is no other.
        shared = folder.st_mode & 0o002 or (folder.st_mode & 0o020 and folder.st_gid != os.getegid())
        if shared or (folder.st_uid not in mine and os.geteuid() != 0):
            raise LedgerError(
                f"The folder {self.path.parent} can be written by others (mode {folder.st_mode & 0o7777:04o}, owner"
                f" {folder.st_uid}); prompts and budgets are not safe there.",
                hint=f"Run chmod go-w {self.path.parent}, or keep the ledger in a folder of its own.",
            )
        for suffix in ("", "-wal", "-shm", "-journal", ".lock"):
            path = self.path.with_name(self.path.name + suffix)
            with suppress(FileNotFoundError):
                state = os.lstat(path)
                if not stat.S_ISREG(state.st_mode) or (state.st_uid not in mine and os.geteuid() != 0):
                    what = "a symbolic link" if stat.S_ISLNK(state.st_mode) else "not a file of your own"
                    raise LedgerError(
                        f"{path} is {what}; a ledger is not opened through it.",
                        hint="Name the file itself.",
                    )

    def _adopt(self, connection: sqlite3.Connection, *, others: bool) -> None:
        ours = pragma(connection, "application_id") == APPLICATION_ID
        if not ours and (pragma(connection, "schema_version") or not self._create):
            raise LedgerError(f"{self.path} is an SQLite file but not a ledger.", hint="Give another path.")
        found = pragma(connection, "user_version")
        if ours and found > SCHEMA:
            raise LedgerError(
                f"{self.path} has schema {found}; this version reads up to {SCHEMA}.",
                hint="Upgrade with: pip install -U proxyprompt-core",
            )
        if ours and found < SCHEMA and others:
            # It would go on with statements that do not fit any more, with calls in flight.
            raise LedgerError(
                f"{self.path} has schema {found}, and a process of an earlier version has it open; it is not changed now.",
                hint="Let that process finish, and try again.",
            )
        self._restrict("")
        self._enter_wal(connection)
        connection.execute(f"PRAGMA wal_autocheckpoint = {0 if _WAL_RESET_DEFECT else 1000}")
        if ours and found < SCHEMA:
            self._back_up(connection, found)
        if not ours or found < SCHEMA:
            connection.execute("BEGIN IMMEDIATE")
            # Another process may have been faster.
            if pragma(connection, "application_id") != APPLICATION_ID:
                create_tables(connection)
                rows = list(self._first_meta().items())
                connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            elif pragma(connection, "user_version") < SCHEMA:
                migrate(connection)
                connection.execute("INSERT OR IGNORE INTO meta VALUES ('store', CAST('full' AS BLOB))")
            connection.execute("COMMIT")
        for suffix in ("-wal", "-shm", ".lock"):
            self._restrict(suffix)

    def _back_up(self, connection: sqlite3.Connection, found: int) -> None:
        """A copy of an older file, made whole before anything in it is changed."""
        names = (f"{self.path.name}.schema-{found}.backup{n or ''}" for n in range(1000))
        backup = next(one for one in map(self.path.with_name, names) if not one.exists())
        temporary = self.path.with_name(f".{backup.name}.{os.getpid()}")
        try:
            temporary.unlink(missing_ok=True)
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            connection.execute("VACUUM INTO ?", (str(temporary),))
            handle = os.open(temporary, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
            os.replace(temporary, backup)
        finally:
            temporary.unlink(missing_ok=True)

    def _restrict(self, suffix: str) -> None:
        path = self.path.with_name(self.path.name + suffix)
        with suppress(FileNotFoundError):
            if os.name == "posix" and path.stat().st_mode & 0o777 != 0o600:
                path.chmod(0o600)

    @staticmethod
    def _enter_wal(connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            except sqlite3.OperationalError as error:
                # Changing the mode does not wait for the busy timeout when two processes create the file.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                continue
            if mode != "wal":
                raise sqlite3.OperationalError("the write-ahead log is not available here")
            return

    def fold_wal(self) -> None:
        """Fold a large WAL in, if nobody else has the file open (see _WAL_RESET_DEFECT)."""
        if not _WAL_RESET_DEFECT:
            return
        try:
            if os.stat(self._wal).st_size < self._fold_at:
                return
        except FileNotFoundError:
            return
        with self.use("folded") as connection:
            connection.execute("PRAGMA busy_timeout = 0")
            try:
                # Leaving WAL mode takes SQLite's exclusive lock first, which fails if there are others.
                connection.execute("PRAGMA journal_mode = DELETE")
                self._fold_at = _FOLD_BYTES
            except sqlite3.OperationalError:
                self._fold_at *= 2
            finally:
                connection.execute(f"PRAGMA busy_timeout = {int(_BUSY_SECONDS * 1000)}")
                self._enter_wal(connection)

    def _disconnect(self) -> None:
        self.disk.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def _join(self) -> bool:
        """Take the presence lock; return whether nobody else holds it (then held exclusively)."""
        if fcntl is None:
            return False
        # flock belongs to the open file, so it is gone the moment a process dies, whatever its pid, container
        # or boot; and two ledger objects in one process exclude each other too.
        path = self.path.with_name(self.path.name + ".lock")
        self._presence = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            deadline = time.monotonic() + _BUSY_SECONDS
            while True:
                try:
                    fcntl.flock(self._presence, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return False
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        self._leave()
                        raise
                    time.sleep(0.005)
        return True

    def _leave(self) -> None:
        presence, self._presence = self._presence, None
        if presence is not None:
            os.close(presence)

    def _recover(self, connection: sqlite3.Connection, alone: bool) -> None:
        if connection.execute("SELECT 1 FROM attempt WHERE state IN ('reserved', 'sent')").fetchone():
            connection.execute("BEGIN IMMEDIATE")
            settle_dead(connection, alone=alone)
            connection.execute("COMMIT")


# SQLite keeps the locks of a process in its memory, and a forked child would inherit that memory without the
# locks: its own connection would then trust locks that it does not hold, and could lose data. So no
# connection may be open across a fork. Parent and child reconnect at their next call.
_LIVE: weakref.WeakSet[LedgerFile] = weakref.WeakSet()
_FORKING: list[LedgerFile] = []
_FORK_LOCK = threading.Lock()


def _before_fork() -> None:
    _FORK_LOCK.acquire()
    for one in list(_LIVE):
        one._lock.acquire()
        _FORKING.append(one)
        one._disconnect()


def _after_fork_in_parent() -> None:
    while _FORKING:
        _FORKING.pop()._lock.release()
    _FORK_LOCK.release()


def _after_fork_in_child() -> None:
    for one in _FORKING:
        # Closes the child's copy only: the parent's lock lives on, and the child joins under its own name.
        one._leave()
        one._commits.forget()  # of threads that the child does not have
        one.disk.forget()
    _after_fork_in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
    )
