"""Every answer that was paid for, durable before the next one is bought.

One SQLite file. A call goes ``reserved`` (counted against the limits) -> ``sent`` (may be billed from here
on) -> ``done`` or ``failed``; if its process dies after sending, it becomes ``unknown`` and still counts as
spent. Nothing expires and nothing is evicted. A row that does not match its own hash is set aside and never
served. After ``kill -9`` every call whose :meth:`Ledger.record` returned is still there; at most the calls
in flight are lost, and those are listed as ``unknown``.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sqlite3
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ._ledger_file import RESPONSE_COLUMNS, SCHEMA, LedgerFile, drop_attempts
from ._request_keys import RequestKeys, raw_key, request_key
from .backends.base import Usage
from .errors import BudgetExceededError, InputError, LedgerCorruptError, LedgerError

__all__ = [
    "Answer",
    "CallRole",
    "Failure",
    "Ledger",
    "Limits",
    "RequestKeys",
    "RunSummary",
    "StoredResponse",
    "Totals",
    "request_key",
]

CallRole: TypeAlias = Literal["target", "proxy"]

_CHUNK = 900  # SQLite before 3.32 takes at most 999 parameters


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may spend on its target, over all processes and resumptions that share the ledger.

    Parameters
    ----------
    max_calls : int, optional
        Calls done, under way or of unknown outcome.
    max_tokens : int, optional
        Prompt plus completion tokens: as reported for finished calls, as estimated for the others.
    """

    max_calls: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_calls", "max_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise InputError(
                    f"{name}={value!r} must be a whole number of at least 0, or None.",
                    hint="Leave it out for no limit.",
                )


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A verified row; ``request`` is the canonical request text if it was kept, else ``None``."""

    key: str
    body: str
    usage: Usage
    model_returned: str | None
    created_at: float
    request: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful call to be recorded; ``request`` is stored only if given."""

    attempt: int
    key: str
    body: str
    usage: Usage = field(default_factory=Usage)
    model_returned: str | None = None
    request: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that brought no answer; it will be asked again."""

    attempt: int
    error: str
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class Totals:
    """Calls by outcome and tokens; ``open`` are reserved or sent by a process that is still at work."""

    done: int = 0
    failed: int = 0
    unknown: int = 0
    open: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    by_model: Mapping[str, Totals] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run: when it first and last touched the ledger (seconds since 1970) and what it did."""

    run: str
    started_at: float
    last_at: float
    totals: Totals


# --- rows ---------------------------------------------------------------------------------------------


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")


def _counts(usage: Usage) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens


def _printable(error: str) -> str:
    # Error texts may quote a broken answer; SQLite refuses the lone surrogates in it.
    return error.encode("utf-8", "backslashreplace").decode()[:2000]


def _row_hash(row: Sequence[Any]) -> bytes:
    """Hash of all columns but the hash; lengths first, so that no byte can wander between columns."""
    key, body, prompt, completion, cached, model, _, schema, created, request = row
    lengths = [-1 if part is None else len(part) for part in (key, body, model, request)]
    numbers = f"{schema!r} {prompt!r} {completion!r} {cached!r} {created!r} {lengths}|"
    digest = hashlib.sha256(numbers.encode())
    for part in (key, body, model, request):
        digest.update(part or b"")
    return digest.digest()


def _intact(row: Sequence[Any]) -> bool:
    try:
        return bool(_row_hash(row) == row[6])
    except (TypeError, ValueError):  # a flipped bit can change the type of a column
        return False


def _stored(row: Sequence[Any]) -> StoredResponse:
    key, body, prompt, completion, cached, model, _, _, created, request = row
    return StoredResponse(
        key.hex(),
        body.decode("utf-8", "surrogatepass"),
        Usage(prompt, completion, cached),
        None if model is None else model.decode("utf-8", "surrogatepass"),
        created,
        None if request is None else request.decode("utf-8", "surrogatepass"),
    )


# --- the ledger ---------------------------------------------------------------------------------------


class Ledger:
    """Open, or create, the ledger at ``path``; safe for several threads and processes at once.

    Parameters
    ----------
    path : str or path
        The database file. Missing folders are created for the owner only (0700); the file and its companions
        (``-wal``, ``-shm``, ``.lock``) are readable and writable by the owner only (0600).
    create : bool
        Whether a missing file may be created.

    Attributes
    ----------
    path : Path
    quarantined : int
        Damaged rows that this object has set aside.

    Raises
    ------
    LedgerError
        If the file is missing (with ``create=False``), is no ledger, was written by a newer version, or
        cannot be read and written.

    Notes
    -----
    Needs a local disk: SQLite's write-ahead log does not work over a network file system. One connection per
    process, shared by its threads under a lock: SQLite admits one writer at a time anyway, and before a fork
    every connection must be closed (see ``_ledger_file``).
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self._file = LedgerFile(path, create=create)
        self.quarantined = 0
        self._warned = False

    @property
    def path(self) -> Path:
        """Where the database file is."""
        return self._file.path

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection for one durable transaction, to modules that keep a table of their own beside the calls."""
        with self._file.use("written", write=True) as connection:
            yield connection

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
        wanted = {raw_key(key) for key in keys}
        pending = list(wanted)
        found: dict[str, StoredResponse] = {}
        suspects: list[int] = []
        with self._file.use("read") as connection:
            for start in range(0, len(pending), _CHUNK):
                chunk = pending[start : start + _CHUNK]
                marks = ",".join("?" * len(chunk))
                query = f"SELECT rowid, {RESPONSE_COLUMNS} FROM response WHERE key IN ({marks})"
                for rowid, *row in connection.execute(query, chunk):
                    if row[0] in wanted and _intact(row):
                        found.setdefault(row[0].hex(), _stored(row))
                    else:
                        suspects.append(rowid)
        if suspects:
            self._report(self._set_aside(suspects), strict)
        return found

    def totals(
        self, run: str | None = None, role: CallRole | None = None, stage: str | None = None
    ) -> Totals:
        """Count calls and tokens of the attempts that match all the given filters."""
        filters = {"run": run, "role": role, "stage": stage}
        given = {name: value for name, value in filters.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in given) or "1"
        query = f"""SELECT model, state, count(*), sum(prompt_tokens), sum(completion_tokens),
            sum(cached_tokens) FROM attempt WHERE {where} GROUP BY model, state ORDER BY model"""
        with self._file.use("read") as connection:
            rows = connection.execute(query, list(given.values())).fetchall()
        models = dict.fromkeys(row[0] for row in rows)
        by_model = {model: _sum_states([row[1:] for row in rows if row[0] == model]) for model in models}
        return _sum_states([row[1:] for row in rows], by_model)

    def runs(self) -> list[RunSummary]:
        """Summarise every run, oldest first."""
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
    ) -> list[int]:
        """Enter calls that are about to be made, all or none.

        Parameters
        ----------
        keys : sequence of str
            One per call.
        run, stage, role, model : str
            What the calls are for; ``totals`` and limits filter by them.
        limits : Limits, optional
            Checked in the same transaction over all calls of ``run`` with the role ``"target"``.
        tokens : sequence of int, optional
            Expected tokens of each call; they count until the call is finished.

        Returns
        -------
        list of int
            Attempt ids, in the order of ``keys``.

        Raises
        ------
        BudgetExceededError
            If a limit would be passed; nothing is entered.
        InputError
            If limits are given for a proxy, or ``tokens`` and ``keys`` differ in length.
        """
        estimates = [0] * len(keys) if tokens is None else list(tokens)
        if len(estimates) != len(keys):
            raise InputError(f"tokens has {len(estimates)} entries, keys has {len(keys)}; give one per key.")
        if limits is not None and role != "target":
            raise InputError(f"limits={limits!r} with role={role!r}: limits bound the target only.")
        owner = (run, stage, role, model, "reserved", socket.gethostname(), os.getpid(), time.time())
        raw = [raw_key(key) for key in keys]
        with self._file.use("written", write=True) as connection:
            if limits is not None:
                self._check(connection, limits, run, len(keys), sum(estimates))
            last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'attempt'").fetchone()
            first = (last[0] if last else 0) + 1
            ids = list(range(first, first + len(keys)))
            connection.executemany(
                """INSERT INTO attempt
                (id, key, run, stage, role, model, state, host, pid, created_at, estimate)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                [(i, key, *owner, estimate) for i, key, estimate in zip(ids, raw, estimates, strict=True)],
            )
        return ids

    def mark_sent(self, ids: Sequence[int]) -> None:
        """Note, durably, that these calls leave now; from here on they count as spent.

        Raises
        ------
        LedgerError
            If one of them is not reserved; then none is marked and none may be sent.
        """
        with self._file.use("written", write=True) as connection:
            query = "UPDATE attempt SET state = 'sent' WHERE id = ? AND state = 'reserved'"
            marked = connection.executemany(query, [(i,) for i in ids]).rowcount if ids else 0
            if marked != len(ids):
                raise LedgerError(
                    f"Only {marked} of the {len(ids)} attempts to send are reserved in {self.path}.",
                    hint="Send each attempt once, after reserve() and before release().",
                )

    def record(self, answers: Sequence[Answer], failures: Sequence[Failure] = ()) -> None:
        """Store finished calls in one transaction; when this returns they survive ``kill -9``.

        Parameters
        ----------
        answers : sequence of Answer
            If a key is already answered, the first answer stays; the call is counted all the same.
        failures : sequence of Failure

        Raises
        ------
        LedgerError
            If nothing could be stored, or an id belongs to no such call; answers are kept in the second case.
        """
        now = time.time()
        rows, done = [], []
        for one in answers:
            usage = _counts(one.usage)
            raw = raw_key(one.key)
            row = [raw, _bytes(one.body), *usage, _bytes(one.model_returned), b"", SCHEMA, now]
            row.append(_bytes(one.request))
            row[6] = _row_hash(row)
            rows.append(row)
            done.append((now, *usage, one.attempt, raw))
        lost = [(now, _printable(one.error), *_counts(one.usage), one.attempt) for one in failures]
        marks = ",".join("?" * len(RESPONSE_COLUMNS.split(",")))
        columns = "finished_at = ?, {} prompt_tokens = ?, completion_tokens = ?, cached_tokens = ?"
        touched = 0
        with self._file.use("written", write=True) as connection:
            absent = "WHERE NOT EXISTS (SELECT 1 FROM response WHERE key = ?)"
            insert = f"INSERT INTO response ({RESPONSE_COLUMNS}) SELECT {marks} {absent}"
            connection.executemany(insert, [(*row, row[0]) for row in rows])
            if done:
                query = f"UPDATE attempt SET state = 'done', {columns.format('')} WHERE id = ? AND key = ?"
                touched += connection.executemany(query, done).rowcount
            if lost:
                query = f"UPDATE attempt SET state = 'failed', {columns.format('error = ?,')} WHERE id = ?"
                touched += connection.executemany(query, lost).rowcount
        if touched != len(done) + len(lost):
            # The answers themselves are kept: they are paid for whatever went wrong with the bookkeeping.
            raise LedgerError(
                f"{len(done) + len(lost) - touched} recorded calls have no matching attempt in {self.path}.",
                hint="Pass the ids that reserve() returned, each with its own key.",
            )
        self._file.fold_wal()

    def fail(self, ids: Sequence[int], error: str) -> None:
        """Note that these calls brought no answer; they do not count against the limits."""
        self.record((), [Failure(i, error) for i in ids])

    def release(self, ids: Sequence[int]) -> None:
        """Give up calls: those not sent vanish, those sent become ``unknown``, finished ones stay."""
        with self._file.use("written", write=True) as connection:
            drop_attempts(connection, "id = ?", [(i,) for i in ids])

    # -- inside a transaction

    @staticmethod
    def _check(connection: sqlite3.Connection, limits: Limits, run: str, calls: int, tokens: int) -> None:
        query = """SELECT count(*), coalesce(sum(CASE state WHEN 'done' THEN prompt_tokens + completion_tokens
            ELSE estimate END), 0) FROM attempt WHERE run = ? AND role = 'target' AND state != 'failed'"""
        spent_calls, spent_tokens = connection.execute(query, (run,)).fetchone()
        for name, limit, spent, asked in (
            ("max_calls", limits.max_calls, spent_calls, calls),
            ("max_tokens", limits.max_tokens, spent_tokens, tokens),
        ):
            # Calls of unknown size still need room for one token.
            if limit is not None and calls and spent + max(asked, 1) > limit:
                raise BudgetExceededError(
                    f"{name}={limit}: run {run!r} has spent or reserved {spent} and asks for {asked} more; "
                    "nothing was sent.",
                    hint=f"Raise {name} to {spent + asked} or more, or ask for less; all answers are kept.",
                )

    # -- damage

    def _set_aside(self, rowids: list[int]) -> int:
        moved = 0
        with self._file.use("repaired", write=True) as connection:
            # If the damage is in the index or in a key, the two disagree, and a row deleted by its damaged
            # key would leave an entry behind that hides the answer bought in its place.
            connection.execute("REINDEX response")
            for rowid in rowids:
                # Checked again: another process may have set it aside and bought it anew.
                query = f"SELECT {RESPONSE_COLUMNS} FROM response WHERE rowid = ?"
                row = connection.execute(query, (rowid,)).fetchone()
                if row is None or _intact(row):
                    continue
                connection.execute(
                    f"""INSERT INTO quarantine (set_aside_at, {RESPONSE_COLUMNS})
                    SELECT ?, {RESPONSE_COLUMNS} FROM response WHERE rowid = ?""",
                    (time.time(), rowid),
                )
                connection.execute("DELETE FROM response WHERE rowid = ?", (rowid,))
                moved += 1
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


def _sum_states(rows: Sequence[Sequence[Any]], by_model: Mapping[str, Totals] | None = None) -> Totals:
    states: dict[str, int] = {}
    for state, count, *_ in rows:
        states[state] = states.get(state, 0) + count
    prompt, completion, cached = (sum(row[column] for row in rows) for column in (2, 3, 4))
    still_open = states.get("reserved", 0) + states.get("sent", 0)
    outcome = (states.get("done", 0), states.get("failed", 0), states.get("unknown", 0), still_open)
    return Totals(*outcome, prompt, completion, cached, by_model or {})
