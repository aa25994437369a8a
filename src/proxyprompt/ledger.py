"""Every call durable before it leaves, every answer before it is used.

One SQLite file. A call goes ``reserved`` (planned, counted against the limits) -> ``sent`` (its money set aside; may
be billed from here on) -> ``done`` or ``failed``; if its process dies after sending, it becomes ``unknown`` and still
counts as spent. Nothing expires and nothing is evicted. A row that does not match its own hash is set aside and never
served. After ``kill -9``, and after a power cut, every call whose :meth:`Ledger.record` returned is still there; at most
the calls in flight are lost, and those are listed as ``unknown``.
"""

from __future__ import annotations

import os
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ._ledger_accounts import (
    amounts_of,
    check_fit,
    check_room,
    enter,
    leave,
    mark,
    sums_by_model,
    taken,
)
from ._ledger_answers import find, finished, store, stored
from ._ledger_answers import set_aside as set_aside_answers
from ._ledger_calls import DAMAGED, change, removal, set_aside
from ._ledger_file import LedgerFile
from ._ledger_owners import AHEAD, drop_attempts, settle_dead
from ._ledger_rows import (
    PICO,
    Answer,
    CallRole,
    Claim,
    Failure,
    Leaving,
    Limits,
    RunSummary,
    StoredResponse,
    Totals,
    sum_models,
)
from ._ledger_schema import USAGE_COLUMNS
from ._ledger_vault import MODES, StoreMode, Vault, read_secret
from ._request_keys import RequestKeys, raw_key, request_key
from .backends.base import Usage
from .errors import InputError, LedgerCorruptError, LedgerError

__all__ = [
    "PICO",
    "Answer",
    "CallRole",
    "Claim",
    "Failure",
    "Leaving",
    "Ledger",
    "Limits",
    "RequestKeys",
    "RunSummary",
    "StoreMode",
    "StoredResponse",
    "Totals",
    "request_key",
]


class Ledger:
    """Open, or create, the ledger at ``path``; safe for several threads and processes at once.

    Parameters
    ----------
    path : str or path
        The database file. Missing folders are created for the owner only (0700); the file and its companions
        (``-wal``, ``-shm``, ``.lock``) are readable and writable by the owner only (0600). A symbolic link, or a
        folder that others may write to, is refused.
    create : bool
        Whether a missing file may be created.
    store : {"full", "hash", "encrypted"}, optional
        What a new file keeps of prompts and answers; see :mod:`proxyprompt._ledger_vault`. Default: everything. An
        existing file keeps its mode; another one asked for is an error.
    key_file : path, optional
        File with the secret of ``"hash"`` and ``"encrypted"``; made, mode 0600, if it is missing and the ledger is
        new. Default: the environment variable ``PROXYPROMPT_LEDGER_KEY`` (64 hexadecimal digits), else
        ``ledger.key`` in the user's configuration folder.

    Attributes
    ----------
    path : Path
    store : str
        Mode of the file.
    quarantined : int
        Damaged rows that this object has set aside.

    Raises
    ------
    LedgerError
        If the file is missing (with ``create=False``), is no ledger, was written by a newer version, has another
        mode or secret, lies where others can replace it, or cannot be read and written.
    MissingDependencyError
        If the file is, or is to be, encrypted and the package ``cryptography`` is not installed.

    Notes
    -----
    Needs a local disk: SQLite's write-ahead log does not work over a network file system. One connection per
    process, shared by its threads: SQLite admits one writer at a time anyway, and threads that write at the same
    moment share one commit. A commit hands its pages to the kernel, so that they survive the process; one flush to the
    disk then serves all who wait, while others go on writing (see ``_ledger_sync``). Before a fork every connection
    must be closed (see ``_ledger_file``). A file of an older schema is copied to ``PATH.schema-N.backup`` and brought
    up to date in one transaction.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        create: bool = True,
        store: StoreMode | None = None,
        key_file: str | os.PathLike[str] | None = None,
    ) -> None:
        if store not in (None, *MODES):
            raise InputError(f"store={store!r} must be one of {', '.join(MODES)}.")

        def secret(new: bool) -> bytes:
            return read_secret(key_file, create=new)

        self.quarantined = 0
        self._warned = self._warned_of_calls = False
        self._checked: tuple[int, int] | None = None
        self._file = LedgerFile(
            path, create=create, first_meta=lambda: Vault.new(store or "full", secret).meta()
        )
        try:
            with self._file.use("read") as connection:
                meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
            self._vault = Vault.of_file(meta, secret, self.path)
            if store not in (None, self.store):
                raise LedgerError(
                    f"{self.path} keeps its calls with store = {self.store!r}; {store!r} was asked for.",
                    hint="Leave store as it is, or give another file: what a file holds is not rewritten.",
                )
        except BaseException:
            self._file.close()
            raise

    @property
    def path(self) -> Path:
        """Where the database file is."""
        return self._file.path

    @property
    def store(self) -> StoreMode:
        """What the file keeps of prompts and answers."""
        return self._vault.mode

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def stored_name(self, key: str) -> bytes:
        """How a key stands in the tables: its bytes, or a keyed hash of them unless ``store`` is full."""
        return self._vault.name(raw_key(key))

    def conceal(self, text: str) -> str:
        """A private hash as it may stand in a table beside the calls: a keyed hash of it unless ``store`` is full."""
        return self._vault.conceal(text)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection for one durable transaction, to modules that keep a table of their own beside the calls."""
        with self._file.use("written", write=True) as connection:
            yield connection

    @contextmanager
    def rewriting(self, *, dry: bool = False) -> Iterator[sqlite3.Connection]:
        """Lend the connection for removing rows: nobody else has the file open, and no trace stays in it.

        Raises
        ------
        LedgerError
            If another process, or another object of this one, has the file open (unless ``dry``).
        """
        if dry:
            with self._file.use("read") as connection:
                yield connection
            return
        with self._file.alone() as connection:
            yield connection

    def open_row(self, row: Sequence[Any]) -> StoredResponse:
        """A row of the table ``response`` that matches its hash; ``key`` is then the name that stands in the file.

        Raises
        ------
        LedgerCorruptError
            If it cannot be decrypted.
        """
        return stored(self._vault, row[0].hex(), row)

    def open_error(self, stored: str | bytes | None, name: bytes) -> str | None:
        """The error of an attempt; ``None`` too where it cannot be decrypted."""
        try:
            return self._vault.open_error(stored, name)
        except LedgerCorruptError:
            return None

    # -- reading

    def lookup(self, keys: Iterable[str], *, strict: bool = False) -> dict[str, StoredResponse]:
        """Find the stored responses of ``keys``; every row is checked against its hash.

        Parameters
        ----------
        keys : iterable of str
        strict : bool
            Raise if a row is damaged. Otherwise it counts as absent, with one warning per ledger object.

        Returns
        -------
        dict
            Only the keys that are there.

        Raises
        ------
        LedgerCorruptError
            With ``strict``, if a row does not match its hash; always, if the file itself is malformed.
        """
        wanted = {self._vault.name(raw_key(key)): key for key in keys}
        with self._file.use("read") as connection:
            found, suspects = find(connection, self._vault, wanted)
        if suspects:
            with self._file.use("repaired", write=True) as connection:
                moved = set_aside_answers(connection, self._vault, suspects)
            self._report(moved, strict)
        if found:
            # Somebody may have written it this very moment; what is handed on must not be gone after a power cut.
            self._file.disk.catch_up()
        return found

    def totals(
        self, run: str | None = None, role: CallRole | None = None, stage: str | None = None
    ) -> Totals:
        """Count calls, tokens and money of the attempts that match all the given filters; damaged ones are set aside."""
        self.check_calls()
        with self._file.use("read") as connection:
            rows = sums_by_model(connection, {"run": run, "role": role, "stage": stage})
        return sum_models(rows)

    def runs(self) -> list[RunSummary]:
        """Summarise every run, oldest first."""
        self.check_calls()
        query = """SELECT run, min(created_at), max(coalesce(finished_at, created_at)) FROM attempt
            GROUP BY run ORDER BY 2, 1"""
        with self._file.use("read") as connection:
            rows = connection.execute(query).fetchall()
        return [RunSummary(run, first, last, self.totals(run=run)) for run, first, last in rows]

    # -- buying

    def reserve(
        self,
        keys: Sequence[str],
        *,
        run: str,
        stage: str,
        role: CallRole,
        model: str,
        limits: Limits | None = None,
        tokens: Sequence[int] | None = None,
        money: Sequence[int] | None = None,
        currency: str = "",
    ) -> list[int]:
        """Enter calls that are about to be made, all or none; on the disk with the first that is marked as sent.

        Parameters
        ----------
        keys : sequence of str
            One per call.
        run, stage, role, model : str
            What the calls are for; ``totals`` and limits filter by them.
        limits : Limits, optional
            Checked in the same transaction over all calls of ``run``: calls and tokens over those of the target, money
            over all.
        tokens : sequence of int, optional
            Tokens set aside for each call; they count until the call is finished.
        money : sequence of int, optional
            Money set aside for each call, in units of :data:`PICO`.
        currency : str
            Of ``money``.

        Returns
        -------
        list of int
            Attempt ids, in the order of ``keys``.

        Raises
        ------
        BudgetExceededError
            If a limit would be passed; nothing is entered.
        InputError
            If calls or tokens are limited for a proxy, or ``tokens`` or ``money`` differ in length from ``keys``.
        """
        amounts = amounts_of(len(keys), tokens, money, "keys")
        check_fit(limits, role)
        raw = [self._vault.name(raw_key(key)) for key in keys]
        common = (run, stage, role, model)

        def work(connection: sqlite3.Connection) -> list[int]:
            check_room(connection, limits, run, amounts, currency, planned=True)
            return enter(connection, list(zip(raw, amounts, strict=True)), common, "reserved", currency)

        self._file.require_space()
        return self._file.write("written", work)[0]

    def claim(
        self,
        keys: Sequence[str],
        *,
        run: str,
        stage: str,
        role: CallRole,
        model: str,
        limits: Limits | None = None,
        tokens: Sequence[int] | None = None,
        money: Sequence[int] | None = None,
        currency: str = "",
    ) -> Claim:
        """Like :meth:`reserve`, but only what nobody has answered or is asking: two that want the same buy it once.

        Attempts of processes that have died are settled first. Whoever finds a key *held* waits, looks it up, and
        claims it again if it is still missing.
        """
        amounts = amounts_of(len(keys), tokens, money, "keys")
        check_fit(limits, role)
        raw = [self._vault.name(raw_key(key)) for key in keys]
        common = (run, stage, role, model)

        def work(connection: sqlite3.Connection) -> Claim:
            busy = taken(connection, raw)
            if busy:
                settle_dead(connection)
                busy = taken(connection, raw)
            free = [n for n, name in enumerate(raw) if name not in busy]
            check_room(connection, limits, run, [amounts[n] for n in free], currency, planned=True)
            rows = [(raw[n], amounts[n]) for n in free]
            ids = enter(connection, rows, common, "reserved", currency)
            held = tuple(n for n, name in enumerate(raw) if name in busy)
            return Claim(dict(zip(free, ids, strict=True)), held)

        self._file.require_space()
        return self._file.write("written", work)[0]

    def mark_sent(
        self,
        ids: Sequence[int],
        *,
        tokens: Sequence[int] | None = None,
        money: Sequence[int] | None = None,
        limits: Limits | None = None,
        again: Sequence[int] = (),
    ) -> list[int]:
        """Note, durably, that these calls leave now; from here on they count as spent.

        Parameters
        ----------
        ids : sequence of int
            Reserved attempts.
        tokens, money : sequence of int, optional
            Most that each call may take, in place of what :meth:`reserve` was told; first those of ``ids``, then
            those of ``again``.
        limits : Limits, optional
            Checked in the same transaction against what is settled or sent (calls only planned have no claim yet).
        again : sequence of int
            Attempts that were sent before and are repeated: each repetition is one more call.

        Returns
        -------
        list of int
            Ids of the repetitions, in the order of ``again``.

        Raises
        ------
        LedgerError
            If one of ``ids`` is not reserved, or one of ``again`` is not there; then none may be sent.
        BudgetExceededError
            If a limit would be passed; none may be sent.
        """
        given = tokens is not None or money is not None
        amounts = amounts_of(len(ids) + len(again), tokens, money, "ids and again")

        def work(connection: sqlite3.Connection) -> list[int]:
            return mark(connection, ids, again, amounts, limits, given=given, where=self.path)

        self._file.require_space()
        return self._file.commit("written", work)

    def record(
        self, answers: Sequence[Answer], failures: Sequence[Failure] = (), *, leaving: Leaving | None = None
    ) -> bool:
        """Store finished calls in one transaction; when this returns they are on the disk.

        Parameters
        ----------
        answers : sequence of Answer
            If a key is already answered, the first answer stays; the call is counted all the same.
        failures : sequence of Failure
        leaving : Leaving, optional
            Calls to mark as sent in the same transaction, as :meth:`mark_sent` would.

        Returns
        -------
        bool
            Whether the calls of ``leaving`` were marked. If they do not fit, or the disk is nearly full, they are left as
            they were, and :meth:`mark_sent` says why.

        Raises
        ------
        InputError
            If the file keeps numbers only and an answer holds text.
        LedgerError
            If nothing could be stored, or an id belongs to no such call; answers are kept in the second case.
        """
        ticket, left = self.write(answers, failures, leaving=() if leaving is None else (leaving,))
        self.wait_for_disk(ticket)
        return bool(left)

    def write(
        self,
        answers: Sequence[Answer],
        failures: Sequence[Failure] = (),
        *,
        leaving: Sequence[Leaving] = (),
        left: Sequence[int] = (),
    ) -> tuple[int, int]:
        """Like :meth:`record`, without waiting for the disk: what is written survives ``kill -9``, but no power cut yet.

        Nothing of it may be handed on, and nothing of ``leaving`` may leave, before :meth:`wait_for_disk`.

        Parameters
        ----------
        answers, failures
        leaving : sequence of Leaving
            Each is marked if it and those before it fit.
        left : sequence of int
            Calls marked ahead that leave now.

        Returns
        -------
        ticket : int
        n_left : int
            How many of ``leaving`` were marked.
        """
        these = finished(self._vault, answers, failures)
        with_space = bool(leaving) and self._file.has_space()

        def work(connection: sqlite3.Connection) -> tuple[int, int]:
            touched = store(connection, self._vault, these)
            if left:
                query = change("id = ?1 AND state = 'sent'", error="NULL")
                touched += connection.executemany(query, [(number,) for number in left]).rowcount
            marked = 0
            while with_space and marked < len(leaving) and leave(connection, leaving[marked], self.path):
                marked += 1
            return touched, marked

        (touched, marked), ticket = self._file.write("written", work)
        missing = these.n_calls + len(left) - touched
        if missing:
            # The answers themselves are kept: they are paid for whatever went wrong with the bookkeeping.
            self.wait_for_disk(ticket)
            raise LedgerError(
                f"{missing} recorded or leaving calls have no matching attempt in {self.path}.",
                hint="Pass the ids that reserve() returned, each with its own key.",
            )
        self._file.fold_wal()
        return ticket, marked

    def flush_soon(self, ticket: int) -> None:
        """Bring to the disk what was written, beside whatever else happens."""
        self._file.disk.soon(ticket)

    def on_disk(self, ticket: int) -> bool:
        """Whether what was written is on the disk.

        Raises
        ------
        LedgerError
            If the disk has refused.
        """
        return self._file.disk.reached(ticket)

    def wait_for_disk(self, ticket: int) -> None:
        """Return when what was written is on the disk; see :meth:`on_disk`."""
        self._file.disk.through(ticket)

    def withdraw(self, ids: Sequence[int]) -> None:
        """Take back calls that were marked as sent and certainly never left: they vanish."""
        query = removal("id = ? AND state = 'sent'")
        self._file.commit("written", lambda c: c.executemany(query, [(i,) for i in ids]))

    def fail(self, ids: Sequence[int], error: str) -> None:
        """Note that these calls brought no answer and were not billed; they do not count against the limits."""
        self.record((), [Failure(i, error) for i in ids])

    def release(self, ids: Sequence[int]) -> None:
        """Give up calls: those not sent vanish, those sent become ``unknown``, finished ones stay."""
        values = [(number,) for number in ids]

        def work(connection: sqlite3.Connection) -> None:
            query = removal(f"id = ? AND state = 'sent' AND error = '{AHEAD}'")
            connection.executemany(query, values)
            drop_attempts(connection, "id = ?", values)

        self._file.commit("written", work)

    def price_earlier(
        self, run: str, role: CallRole, model: str, currency: str, cost: Callable[[Usage], int]
    ) -> None:
        """Give the calls of a run that were recorded without a price one, so that a money limit counts them.

        Parameters
        ----------
        run, role, model : str
        currency : str
        cost : callable
            Price of a call's usage in units of :data:`PICO`. A call of unknown outcome, or answered without a usage,
            takes what the dearest finished call of these costs.
        """
        where = "run = ? AND role = ? AND model = ? AND currency = ''"
        these = (run, role, model)

        def work(connection: sqlite3.Connection) -> None:
            query = f"SELECT id, state, estimate, {USAGE_COLUMNS} FROM attempt WHERE {where}"
            rows = connection.execute(query, these).fetchall()
            costs = [
                (n, state == "done" and not any(used), cost(Usage(*used)), cost(Usage(most, most)))
                for n, state, most, *used in rows
            ]
            dearest = max((amount for *_, amount, _ in costs), default=0)
            connection.executemany(
                change("id = ?4", cost="?1", allowance="?2", currency="?3"),
                [
                    (max(dearest, most) if untold else amount, max(dearest, most), currency, n)
                    for n, untold, amount, most in costs
                ],
            )

        self._file.commit("written", work)

    # -- damage

    def check_calls(self) -> int:
        """Set aside calls that do not match their own hash; what they counted against limits stays counted.

        Returns
        -------
        int
            How many were found just now; they are also warned of, once per ledger object.
        """
        with self._file.use("read") as connection:
            seen = (connection.execute("PRAGMA data_version").fetchone()[0], connection.total_changes)
            if seen == self._checked:
                return 0
            if not connection.execute(f"SELECT 1 FROM attempt WHERE {DAMAGED} LIMIT 1").fetchone():
                self._checked = seen
                return 0
        with self._file.use("repaired", write=True) as connection:
            moved = set_aside(connection)
        self.quarantined += moved
        if moved and not self._warned_of_calls:
            self._warned_of_calls = True
            warnings.warn(
                f"{moved} calls in {self.path} do not match their own hash and were set aside; limits go on counting what"
                " they counted. Check the disk.",
                RuntimeWarning,
                stacklevel=3,
            )
        return moved

    def _report(self, moved: int, strict: bool) -> None:
        self.quarantined += moved
        message = f"{moved} stored responses in {self.path} do not match their own hash and were set aside"
        if strict:
            hint = "They are kept in the table 'quarantine'; ask them again."
            raise LedgerCorruptError(f"{message}.", hint=hint)
        if moved and not self._warned:
            self._warned = True
            warnings.warn(
                f"{message}; they count as not asked. Check the disk.", RuntimeWarning, stacklevel=3
            )
