"""Every answer that was paid for, durable before the next one is bought.

One SQLite file. A call goes ``reserved`` (counted against the limits) -> ``sent`` (may be billed from here on)
-> ``done`` or ``failed``; if its process dies after sending, it becomes ``unknown`` and still counts as
spent. Nothing expires and nothing is evicted. A row that does not match its own hash is set aside and never
served. After ``kill -9`` every call whose :meth:`Ledger.record` returned is still there; at most the calls
in flight are lost, and those are listed as ``unknown``.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .backends.base import GenerateRequest, Message, ScoreRequest, Usage
from .errors import BudgetExceededError, InputError, LedgerCorruptError, LedgerError

try:
    import fcntl
except ImportError:  # Windows: no presence lock, see _join
    fcntl = None  # type: ignore[assignment]

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
Kind: TypeAlias = Literal["score", "generate"]

SCHEMA = 1
_APPLICATION_ID = 0x50504C31
_BUSY_SECONDS = 60.0
_CHUNK = 900  # SQLite before 3.32 takes at most 999 parameters

# SQLite 3.7.0 to 3.51.2 can corrupt the file when one connection checkpoints or restarts the WAL while
# another writes. There we never checkpoint while anybody else has the file open: no automatic checkpoints;
# the WAL is folded in only by closing the last connection and by _fold_wal, both of which SQLite itself does
# under its exclusive lock on the database file, which it cannot get while another connection exists.
_WAL_RESET_DEFECT = (3, 7, 0) <= sqlite3.sqlite_version_info < (3, 51, 3)
_FOLD_BYTES = 64 * 2**20

_RESPONSE_COLUMNS = """key BLOB NOT NULL {primary}, body BLOB NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, model_returned BLOB,
    sha256 BLOB NOT NULL, schema INTEGER NOT NULL, created_at REAL NOT NULL, request BLOB"""
_RESPONSE_NAMES = (
    "key, body, prompt_tokens, completion_tokens, cached_tokens, model_returned, sha256, schema, created_at, request"
)
_DDL = (
    """CREATE TABLE attempt (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, run TEXT NOT NULL,
    stage TEXT NOT NULL, role TEXT NOT NULL CHECK (role IN ('target', 'proxy')), model TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'sent', 'done', 'failed', 'unknown')),
    host TEXT NOT NULL, pid INTEGER NOT NULL, created_at REAL NOT NULL, finished_at REAL, error TEXT,
    estimate INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX attempt_run ON attempt (run, role)",
    f"CREATE TABLE response ({_RESPONSE_COLUMNS.format(primary='PRIMARY KEY')})",
    f"CREATE TABLE quarantine (set_aside_at REAL NOT NULL, {_RESPONSE_COLUMNS.format(primary='')})",
)


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


# --- keys ---------------------------------------------------------------------------------------------

_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _plain(value: Any, name: str) -> Any:
    # json.dumps would turn the keys 1 and "1" into the same text, hence the refusal of other keys.
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(
                    f"{name} has the key {key!r}; keys must be text.", hint="Convert the keys with str()."
                )
        return {key: _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    return value


def _json(value: Any, name: str) -> str:
    try:
        return _ENCODER.encode(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be part of a request key: {error}. It must hold JSON values only, no NaN or infinity.",
            hint="Convert it to text, numbers, lists and mappings with text keys.",
        ) from error


class RequestKeys:
    """Makes the keys of many requests to one model.

    Parameters
    ----------
    identity : mapping
        Everything that decides the answers besides the request, as the backend states it.
    kind : {"score", "generate"}
    parameters : mapping
        Anything else that is sent along.
    repeat : int
        0, or 1, 2, ... to ask the same thing again.
    """

    def __init__(
        self, identity: Mapping[str, Any], kind: Kind, parameters: Mapping[str, Any], repeat: int = 0
    ) -> None:
        self._type = {"score": ScoreRequest, "generate": GenerateRequest}.get(kind)
        if self._type is None:
            raise InputError(f"kind={kind!r} must be 'score' or 'generate'.")
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 0:
            raise InputError(f"repeat={repeat!r} must be a whole number of at least 0.")
        # Taken from the class, so that a field added to a request later enters the key by itself.
        self._names = [item.name for item in fields(self._type) if item.name != "prompt"]
        head = {
            "identity": _plain(identity, "identity"),
            "kind": kind,
            "parameters": _plain(parameters, "parameters"),
            "repeat": repeat,
        }
        # Everything but the request is encoded once; "request" and "schema" sort after the names above,
        # so the joined text is the canonical JSON of the whole.
        self._head = _json(head, "identity or parameters")[:-1] + ',"request":'
        self._tail = f',"schema":{SCHEMA}}}'

    def document(self, request: ScoreRequest | GenerateRequest) -> str:
        """Canonical JSON of the request; the key is its hash."""
        if type(request) is not self._type:
            raise InputError(f"request={type(request).__name__} must be a {getattr(self._type, '__name__', '')}.")
        prompt = request.prompt
        body: dict[str, Any] = {name: getattr(request, name) for name in self._names}
        if isinstance(prompt, str):
            body["prompt"] = {"text": prompt}
        elif isinstance(prompt, tuple) and all(isinstance(turn, Message) for turn in prompt):
            body["prompt"] = {"chat": [[turn.role, turn.content] for turn in prompt]}
        else:
            raise InputError(f"request.prompt={prompt!r:.80} must be text or a tuple of Message.")
        return self._head + _json(body, "request") + self._tail

    def key(self, request: ScoreRequest | GenerateRequest) -> str:
        """64 hexadecimal digits."""
        return _key_of(self.document(request))


def _key_of(document: str) -> str:
    # Unescaped UTF-8 with surrogates passed through is one-to-one on Python text. ASCII escapes are not:
    # an astral character and the two lone surrogates of the same code units escape to the same text.
    return hashlib.sha256(document.encode("utf-8", "surrogatepass")).hexdigest()


def request_key(
    identity: Mapping[str, Any],
    kind: Kind,
    request: ScoreRequest | GenerateRequest,
    parameters: Mapping[str, Any],
    repeat: int = 0,
) -> str:
    """Name a request by the SHA-256 of everything that decides its answer.

    Parameters
    ----------
    identity, kind, parameters, repeat
        See :class:`RequestKeys`.
    request : ScoreRequest or GenerateRequest

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    InputError
        If something is not a JSON value, or the request does not fit ``kind``.

    Examples
    --------
    >>> request = ScoreRequest("2 + 2 =", (" 4", " 5"))
    >>> key = request_key({"model": "m"}, "score", request, {})
    >>> len(key), key == request_key({"model": "n"}, "score", request, {})
    (64, False)
    """
    return RequestKeys(identity, kind, parameters, repeat).key(request)


def _raw(key: str) -> bytes:
    try:
        raw = bytes.fromhex(key)
    except (TypeError, ValueError):
        raw = b""
    if len(raw) != 32:
        raise InputError(f"key={key!r:.80} must be 64 hexadecimal digits.", hint="Make keys with request_key().")
    return raw


# --- rows ---------------------------------------------------------------------------------------------


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")


def _row_hash(row: Sequence[Any]) -> bytes:
    """Hash of all columns but the hash; lengths first, so that no byte can wander between columns."""
    key, body, prompt, completion, cached, model, _, schema, created, request = row
    lengths = [-1 if part is None else len(part) for part in (key, body, model, request)]
    digest = hashlib.sha256(f"{schema!r} {prompt!r} {completion!r} {cached!r} {created!r} {lengths}|".encode())
    for part in (key, body, model, request):
        digest.update(part or b"")
    return digest.digest()


def _intact(row: Sequence[Any]) -> bool:
    try:
        return _row_hash(row) == row[6]
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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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
        If the file is missing (with ``create=False``), is no ledger, was written by a newer version, or cannot
        be read and written.

    Notes
    -----
    Needs a local disk: SQLite's write-ahead log does not work over a network file system. One connection per
    process, shared by its threads under a lock: SQLite admits one writer at a time anyway, and before a fork
    every connection must be closed (see ``_before_fork``).
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self.path = Path(path).expanduser().absolute()
        self.quarantined = 0
        self._create = create
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._presence: int | None = None
        self._closed = False
        self._warned = False
        self._fold_at = _FOLD_BYTES
        with self._use("opened"):
            pass
        _LIVE.add(self)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            self._closed = True
            self._disconnect()
            self._leave()

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
        wanted = {_raw(key) for key in keys}
        pending = list(wanted)
        found: dict[str, StoredResponse] = {}
        suspects: list[int] = []
        with self._use("read") as connection:
            for start in range(0, len(pending), _CHUNK):
                chunk = pending[start : start + _CHUNK]
                marks = ",".join("?" * len(chunk))
                query = f"SELECT rowid, {_RESPONSE_NAMES} FROM response WHERE key IN ({marks})"
                for rowid, *row in connection.execute(query, chunk):
                    if row[0] in wanted and _intact(row):
                        found[row[0].hex()] = _stored(row)
                    else:
                        suspects.append(rowid)
        if suspects:
            self._report(self._set_aside(suspects), strict)
        return found

    def totals(self, run: str | None = None, role: CallRole | None = None, stage: str | None = None) -> Totals:
        """Count calls and tokens of the attempts that match all the given filters."""
        filters = {"run": run, "role": role, "stage": stage}
        given = {name: value for name, value in filters.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in given) or "1"
        query = f"""SELECT model, state, count(*), sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens)
            FROM attempt WHERE {where} GROUP BY model, state ORDER BY model"""
        with self._use("read") as connection:
            rows = connection.execute(query, list(given.values())).fetchall()
        models = dict.fromkeys(row[0] for row in rows)
        by_model = {model: _sum_states([row[1:] for row in rows if row[0] == model]) for model in models}
        return _sum_states([row[1:] for row in rows], by_model)

    def runs(self) -> list[RunSummary]:
        """Summarise every run, oldest first."""
        query = """SELECT run, min(created_at), max(coalesce(finished_at, created_at)) FROM attempt
            GROUP BY run ORDER BY 2, 1"""
        with self._use("read") as connection:
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
            raise InputError(f"limits={limits!r} were given with role={role!r}; limits bound the target only.")
        owner = (run, stage, role, model, "reserved", socket.gethostname(), os.getpid(), time.time())
        raw = [_raw(key) for key in keys]
        with self._use("written", write=True) as connection:
            if limits is not None:
                self._check(connection, limits, run, len(keys), sum(estimates))
            last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'attempt'").fetchone()
            first = (last[0] if last else 0) + 1
            ids = list(range(first, first + len(keys)))
            connection.executemany(
                """INSERT INTO attempt (id, key, run, stage, role, model, state, host, pid, created_at, estimate)
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
        with self._use("written", write=True) as connection:
            query = "UPDATE attempt SET state = 'sent' WHERE id = ? AND state = 'reserved'"
            marked = connection.executemany(query, [(i,) for i in ids]).rowcount if ids else 0
            if marked != len(ids):
                raise LedgerError(
                    f"Only {marked} of the {len(ids)} attempts to send are reserved in {self.path}.",
                    hint="Send each attempt once, after reserve() and before release().",
                )

    def record(self, answers: Sequence[Answer], failures: Sequence[Failure] = ()) -> None:
        """Store finished calls in one transaction; when this returns they survive ``kill -9``.

        If a key is already answered, the first answer stays; the call is counted all the same.
        """
        now = time.time()
        rows, done = [], []
        for one in answers:
            usage = (one.usage.prompt_tokens, one.usage.completion_tokens, one.usage.cached_tokens)
            raw = _raw(one.key)
            row = [raw, _bytes(one.body), *usage, _bytes(one.model_returned), b"", SCHEMA, now, _bytes(one.request)]
            row[6] = _row_hash(row)
            rows.append(row)
            done.append((now, *usage, one.attempt, raw))
        lost = [
            # Error texts may quote a broken answer; lone surrogates would be refused by SQLite.
            (now, one.error.encode("utf-8", "backslashreplace").decode()[:2000], one.usage.prompt_tokens)
            + (one.usage.completion_tokens, one.usage.cached_tokens, one.attempt)
            for one in failures
        ]
        marks = ",".join("?" * len(_RESPONSE_NAMES.split(",")))
        columns = "finished_at = ?, {} prompt_tokens = ?, completion_tokens = ?, cached_tokens = ?"
        touched = 0
        with self._use("written", write=True) as connection:
            insert = f"INSERT INTO response ({_RESPONSE_NAMES}) VALUES ({marks}) ON CONFLICT (key) DO NOTHING"
            connection.executemany(insert, rows)
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
        self._fold_wal()

    def fail(self, ids: Sequence[int], error: str) -> None:
        """Note that these calls brought no answer; they do not count against the limits."""
        self.record((), [Failure(i, error) for i in ids])

    def release(self, ids: Sequence[int]) -> None:
        """Give up calls: those not sent vanish, those sent become ``unknown``, finished ones stay."""
        with self._use("written", write=True) as connection:
            self._drop(connection, "id = ?", [(i,) for i in ids])

    # -- inside a transaction

    def _check(self, connection: sqlite3.Connection, limits: Limits, run: str, calls: int, tokens: int) -> None:
        query = """SELECT count(*), coalesce(sum(CASE state WHEN 'done' THEN prompt_tokens + completion_tokens
            ELSE estimate END), 0) FROM attempt WHERE run = ? AND role = 'target' AND state != 'failed'"""
        spent_calls, spent_tokens = connection.execute(query, (run,)).fetchone()
        for name, limit, spent, asked in (
            ("max_calls", limits.max_calls, spent_calls, calls),
            ("max_tokens", limits.max_tokens, spent_tokens, tokens),
        ):
            if limit is not None and asked and spent + asked > limit:
                raise BudgetExceededError(
                    f"{name}={limit}: run {run!r} has spent or reserved {spent} and asks for {asked} more; "
                    "nothing was sent.",
                    hint=f"Raise {name} to at least {spent + asked}, or ask for less; recorded calls are kept.",
                )

    @staticmethod
    def _drop(connection: sqlite3.Connection, where: str, values: list[tuple[Any, ...]]) -> None:
        connection.executemany(f"DELETE FROM attempt WHERE state = 'reserved' AND {where}", values)
        query = f"UPDATE attempt SET state = 'unknown', finished_at = ? WHERE state = 'sent' AND {where}"
        connection.executemany(query, [(time.time(), *value) for value in values])

    # -- damage

    def _set_aside(self, rowids: list[int]) -> int:
        try:
            moved = self._move(rowids)
        except LedgerCorruptError:
            moved = -1
        if moved < len(rowids):
            # The index on key and the table disagree; only then does a row fail here or prove intact.
            with self._use("repaired", write=True) as connection:
                connection.execute("REINDEX response")
            moved = max(moved, 0) + self._move(rowids)
        return moved

    def _move(self, rowids: list[int]) -> int:
        moved = 0
        with self._use("repaired", write=True) as connection:
            for rowid in rowids:
                # By rowid, and checked again: another process may have set it aside and bought it anew.
                row = connection.execute(f"SELECT {_RESPONSE_NAMES} FROM response WHERE rowid = ?", (rowid,)).fetchone()
                if row is None or _intact(row):
                    continue
                connection.execute(
                    f"""INSERT INTO quarantine (set_aside_at, {_RESPONSE_NAMES})
                    SELECT ?, {_RESPONSE_NAMES} FROM response WHERE rowid = ?""",
                    (time.time(), rowid),
                )
                connection.execute("DELETE FROM response WHERE rowid = ?", (rowid,))
                moved += 1
        return moved

    def _report(self, moved: int, strict: bool) -> None:
        self.quarantined += moved
        message = f"{moved} stored responses in {self.path} do not match their own hash and were set aside"
        if strict:
            raise LedgerCorruptError(f"{message}.", hint="They are kept in the table 'quarantine'; ask them again.")
        if moved and not self._warned:
            self._warned = True
            warnings.warn(f"{message}; they will be asked again. Check the disk.", RuntimeWarning, stacklevel=3)

    # -- connection

    @contextmanager
    def _use(self, action: str, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._closed:
                raise LedgerError(f"The ledger {self.path} is closed.", hint="Open it again with Ledger(path).")
            try:
                if self._connection is None:
                    self._connect()
                connection = self._connection
                assert connection is not None
                if write:
                    connection.execute("BEGIN IMMEDIATE")
                yield connection
                if write:
                    connection.execute("COMMIT")
            except (sqlite3.Error, OSError) as error:
                raise self._explained(action, error) from error
            finally:
                if self._connection is not None and self._connection.in_transaction:
                    with suppress(sqlite3.Error):
                        self._connection.rollback()

    def _explained(self, action: str, error: Exception) -> LedgerError:
        text = str(error)
        if "not a database" in text:
            return LedgerError(f"{self.path} is not a ledger: {text}.", hint="Give another path.")
        if "malformed" in text:
            return LedgerCorruptError(
                f"The ledger {self.path} could not be {action}: {text}.",
                hint="Keep a copy of the file and its -wal, then save what is readable with sqlite3's .recover.",
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
            for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = FULL", "fullfsync = ON"):
                connection.execute(f"PRAGMA {pragma}")
            self._adopt(connection)
            if joining:
                self._recover(connection, alone)
        except BaseException:
            self._disconnect()
            if joining:
                self._leave()
            raise
        if alone:
            fcntl.flock(self._presence, fcntl.LOCK_SH)  # type: ignore[arg-type]

    def _make_file(self) -> None:
        if not self._create and not self.path.exists():
            raise LedgerError(f"There is no ledger at {self.path}.", hint="Check the path, or pass create=True.")
        for folder in reversed([one for one in self.path.parents if not one.exists()]):
            folder.mkdir(mode=0o700, exist_ok=True)
        # Never open and close an existing database file by ourselves: closing any descriptor of it drops the
        # POSIX locks that SQLite holds on it in this process.
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))

    def _adopt(self, connection: sqlite3.Connection) -> None:
        def pragma(name: str) -> int:
            return int(connection.execute(f"PRAGMA {name}").fetchone()[0])

        ours = pragma("application_id") == _APPLICATION_ID
        if not ours and (pragma("schema_version") or not self._create):
            raise LedgerError(f"{self.path} is an SQLite file but not a ledger.", hint="Give another path.")
        if ours and pragma("user_version") > SCHEMA:
            raise LedgerError(
                f"{self.path} has schema {pragma('user_version')}; this version reads up to {SCHEMA}.",
                hint="Upgrade with: pip install -U proxyprompt-core",
            )
        self._restrict("")
        self._enter_wal(connection)
        connection.execute(f"PRAGMA wal_autocheckpoint = {0 if _WAL_RESET_DEFECT else 1000}")
        if not ours:
            connection.execute("BEGIN IMMEDIATE")
            if pragma("application_id") != _APPLICATION_ID:
                for statement in _DDL:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA}")
            connection.execute("COMMIT")
        for suffix in ("-wal", "-shm", ".lock"):
            self._restrict(suffix)

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

    def _fold_wal(self) -> None:
        """Fold a large WAL in, if nobody else has the file open (see _WAL_RESET_DEFECT)."""
        wal = self.path.with_name(self.path.name + "-wal")
        if not _WAL_RESET_DEFECT or not wal.exists() or wal.stat().st_size < self._fold_at:
            return
        with self._use("folded") as connection:
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
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    # -- who else is there

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
        query = "SELECT DISTINCT host, pid FROM attempt WHERE state IN ('reserved', 'sent')"
        owners = connection.execute(query).fetchall()
        if not alone:
            # Windows has no harmless signal 0; there rows of dead processes stay as they are.
            here = socket.gethostname() if os.name == "posix" else None
            owners = [(host, pid) for host, pid in owners if host == here and not _alive(pid)]
        if owners:
            connection.execute("BEGIN IMMEDIATE")
            self._drop(connection, "host = ? AND pid = ?", owners)
            connection.execute("COMMIT")


def _sum_states(rows: Sequence[Sequence[Any]], by_model: Mapping[str, Totals] | None = None) -> Totals:
    states: dict[str, int] = {}
    for state, count, *_ in rows:
        states[state] = states.get(state, 0) + count
    prompt, completion, cached = (sum(row[column] for row in rows) for column in (2, 3, 4))
    still_open = states.get("reserved", 0) + states.get("sent", 0)
    outcome = (states.get("done", 0), states.get("failed", 0), states.get("unknown", 0), still_open)
    return Totals(*outcome, prompt, completion, cached, by_model or {})


# SQLite keeps the locks of a process in its memory, and a forked child would inherit that memory without the
# locks: its own connection would then trust locks that it does not hold, and could lose data. So no
# connection may be open across a fork. Parent and child reconnect at their next call.
_LIVE: weakref.WeakSet[Ledger] = weakref.WeakSet()
_FORKING: list[Ledger] = []
_FORK_LOCK = threading.Lock()


def _before_fork() -> None:
    _FORK_LOCK.acquire()
    for ledger in list(_LIVE):
        ledger._lock.acquire()
        _FORKING.append(ledger)
        ledger._disconnect()


def _after_fork_in_parent() -> None:
    while _FORKING:
        _FORKING.pop()._lock.release()
    _FORK_LOCK.release()


def _after_fork_in_child() -> None:
    for ledger in _FORKING:
        # Closes the child's copy only: the parent's lock lives on, and the child joins under its own name.
        ledger._leave()
    _after_fork_in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
    )
