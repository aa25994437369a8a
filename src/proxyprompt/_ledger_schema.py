"""Tables of the ledger, and how older files become newer ones."""

from __future__ import annotations

import sqlite3

from ._ledger_calls import CALL_COLUMNS, DAMAGED, TAKEN_OVER, image

__all__ = [
    "APPLICATION_ID",
    "RESPONSE_COLUMNS",
    "SCHEMA",
    "SUMS",
    "USAGE_COLUMNS",
    "create_tables",
    "migrate",
    "pragma",
    "rebuild_sums",
]

SCHEMA = 4
APPLICATION_ID = 0x50504C31

_FIRST_COLUMNS = (
    "key, body, prompt_tokens, completion_tokens, cached_tokens, "
    "model_returned, sha256, schema, created_at, request"
)
RESPONSE_COLUMNS = f"{_FIRST_COLUMNS}, cache_write_tokens, reasoning_tokens"
"""In the order in which rows are read, written and hashed."""
USAGE_COLUMNS = "prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens"
"""Of an attempt, in the order of :class:`~proxyprompt.backends.base.Usage`."""

_FIRST = (
    """CREATE TABLE attempt (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, run TEXT NOT NULL,
    stage TEXT NOT NULL, role TEXT NOT NULL CHECK (role IN ('target', 'proxy')), model TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'sent', 'done', 'failed', 'unknown')),
    host TEXT NOT NULL, pid INTEGER NOT NULL, created_at REAL NOT NULL, finished_at REAL, error TEXT,
    estimate INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX attempt_run ON attempt (run, role)",
    """CREATE TABLE response (key BLOB NOT NULL, body BLOB NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    model_returned BLOB, sha256 BLOB NOT NULL, schema INTEGER NOT NULL, created_at REAL NOT NULL,
    request BLOB)""",
    # Not unique, although keys are: a damaged key must never stand in the way of rebuilding the index.
    "CREATE INDEX response_key ON response (key)",
    # No types and no rules: a damaged row may hold anything.
    f"CREATE TABLE quarantine (set_aside_at REAL NOT NULL, {_FIRST_COLUMNS})",
)


def counted(row: str) -> tuple[str, str, str]:
    """Calls, tokens and money of an attempt that count against limits, as SQL over the columns of ``row``.

    A failure that reports tokens was billed. What was taken over counts where it is collected. Where a call ended without
    any report, or has not ended, what was set aside for it counts.
    """
    used = f"{row}prompt_tokens + {row}completion_tokens"
    # Not with IN, for which SQLite makes a table each time that a trigger asks.
    ended = f"({row}state = 'failed' OR {row}state = '{TAKEN_OVER}')"
    done = f"{row}state = 'done'"
    return (
        f"(NOT {ended} OR {used} > 0)",
        f"(CASE WHEN ({done} OR {row}state = 'failed') AND {used} > 0 THEN {used}"
        f" WHEN {ended} THEN 0 ELSE {row}estimate END)",
        f"(CASE WHEN {done} OR {ended} THEN {row}cost ELSE {row}allowance END)",
    )


def _add(row: str, sign: str) -> str:
    calls, tokens, money = counted(f"{row}.")
    return f"""INSERT INTO spent VALUES ({row}.run, {row}.role, {row}.state, {row}.currency,
        {sign}{calls}, {sign}{tokens}, {sign}{money})
        ON CONFLICT (run, role, state, currency) DO UPDATE SET calls = calls + excluded.calls,
        tokens = tokens + excluded.tokens, money = money + excluded.money;"""


_CALLS, _TOKENS, _MONEY = counted("")
SUMS = f"""SELECT run, role, state, currency, sum{_CALLS}, sum{_TOKENS}, sum{_MONEY} FROM attempt
    GROUP BY run, role, state, currency"""
"""What the table ``spent`` must hold, apart from rows of zeros and, since schema 4, each run's total."""

_TRIGGERS = (
    f"CREATE TRIGGER attempt_in AFTER INSERT ON attempt BEGIN {_add('new', '')} END",
    f"CREATE TRIGGER attempt_on AFTER UPDATE ON attempt BEGIN {_add('old', '-')} {_add('new', '')} END",
    f"CREATE TRIGGER attempt_out AFTER DELETE ON attempt BEGIN {_add('old', '-')} END",
)
_OPEN = "CREATE INDEX attempt_open ON attempt (key) WHERE state IN ('reserved', 'sent')"

_SECOND = (
    "ALTER TABLE attempt ADD COLUMN born TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE attempt ADD COLUMN allowance INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE attempt ADD COLUMN cost INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE attempt ADD COLUMN currency TEXT NOT NULL DEFAULT ''",
    *(
        f"ALTER TABLE {table} ADD COLUMN {column} INTEGER NOT NULL DEFAULT 0"
        for table in ("attempt", "response", "quarantine")
        for column in ("cache_write_tokens", "reasoning_tokens")
    ),
    _OPEN,
    # Sums of the attempts, so that a limit is checked in the same time however long the run.
    """CREATE TABLE spent (run TEXT NOT NULL, role TEXT NOT NULL, state TEXT NOT NULL, currency TEXT NOT NULL,
    calls INTEGER NOT NULL, tokens INTEGER NOT NULL, money INTEGER NOT NULL,
    PRIMARY KEY (run, role, state, currency)) WITHOUT ROWID""",
    f"INSERT INTO spent {SUMS}",
    *_TRIGGERS,
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
)

_CALLS_LIST = ", ".join(CALL_COLUMNS)
_CONTINUED = "continued by a later process, which counts it"
_THIRD = (
    # A hash for each call, and a state of its own for what another process goes on with.
    f"""CREATE TABLE attempt_3 (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, run TEXT NOT NULL,
    stage TEXT NOT NULL, role TEXT NOT NULL CHECK (role IN ('target', 'proxy')), model TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'sent', 'done', 'failed', 'unknown', '{TAKEN_OVER}')),
    host TEXT NOT NULL, pid INTEGER NOT NULL, born TEXT NOT NULL, created_at REAL NOT NULL, finished_at REAL, error,
    estimate INTEGER NOT NULL, allowance INTEGER NOT NULL, cost INTEGER NOT NULL, currency TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    cache_write_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL, sha256 BLOB NOT NULL)""",
    f"INSERT INTO attempt_3 SELECT {_CALLS_LIST}, x'' FROM attempt",
    f"""UPDATE attempt_3 SET state = '{TAKEN_OVER}', error = NULL
    WHERE state = 'failed' AND error = '{_CONTINUED}'""",
    f"UPDATE attempt_3 SET sha256 = seal({image()})",
    # Numbers of calls are never used again.
    "DELETE FROM sqlite_sequence WHERE name = 'attempt_3'",
    "INSERT INTO sqlite_sequence SELECT 'attempt_3', seq FROM sqlite_sequence WHERE name = 'attempt'",
    "DROP TABLE attempt",
    "ALTER TABLE attempt_3 RENAME TO attempt",
    "CREATE INDEX attempt_run ON attempt (run, role)",
    _OPEN,
    "DELETE FROM spent",
    f"INSERT INTO spent {SUMS}",
    *_TRIGGERS,
    f"CREATE TABLE attempt_quarantine (set_aside_at REAL NOT NULL, {_CALLS_LIST})",
)


def _total(run: str, *amounts: str) -> str:
    return f"""INSERT INTO spent VALUES ({run}, '', '', '', {", ".join(amounts)})
        ON CONFLICT (run, role, state, currency) DO UPDATE SET calls = calls + excluded.calls,
        tokens = tokens + excluded.tokens, money = money + excluded.money;"""


_NEW, _OLD = counted("new."), counted("old.")
_TOTALS = """INSERT INTO spent SELECT run, '', '', '', sum(calls), sum(tokens), sum(money) FROM spent
    WHERE role != '' GROUP BY run"""
# What is not among these changes no sum. A call never changes its run.
_COUNTED_COLUMNS = "run, role, state, currency, estimate, allowance, cost, prompt_tokens, completion_tokens"
_FOURTH = (
    # Each run's sums are entered a second time, as one row over all of them: a flipped bit makes the two disagree.
    *(f"DROP TRIGGER {name}" for name in ("attempt_in", "attempt_on", "attempt_out")),
    # Where a call is damaged, or was, the sums know more than the calls.
    f"""DELETE FROM spent WHERE NOT EXISTS (SELECT 1 FROM attempt_quarantine)
    AND NOT EXISTS (SELECT 1 FROM attempt WHERE {DAMAGED})""",
    f"INSERT OR IGNORE INTO spent {SUMS}",
    _TOTALS,
    f"CREATE TRIGGER attempt_in AFTER INSERT ON attempt BEGIN {_add('new', '')} {_total('new.run', *_NEW)} END",
    f"""CREATE TRIGGER attempt_on AFTER UPDATE OF {_COUNTED_COLUMNS} ON attempt BEGIN {_add("old", "-")} {_add("new", "")}
    {_total("new.run", *(f"{new} - {old}" for new, old in zip(_NEW, _OLD, strict=True)))} END""",
    f"""CREATE TRIGGER attempt_out AFTER DELETE ON attempt BEGIN {_add("old", "-")}
    {_total("old.run", *(f"-{old}" for old in _OLD))} END""",
)

_STEPS = {1: _FIRST, 2: _SECOND, 3: _THIRD, 4: _FOURTH}
"""Statements that lead from the schema before to this one. A released step is never changed."""


def pragma(connection: sqlite3.Connection, name: str) -> int:
    """A pragma that is a number."""
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def create_tables(connection: sqlite3.Connection) -> None:
    """Inside a transaction: make an empty file a ledger."""
    migrate(connection)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def migrate(connection: sqlite3.Connection) -> None:
    """Inside a transaction: all steps that are missing."""
    found = pragma(connection, "user_version")
    for number in range(found + 1, SCHEMA + 1):
        for statement in _STEPS[number]:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA}")


def rebuild_sums(connection: sqlite3.Connection) -> None:
    """Inside a transaction: make the sums anew from the calls; damaged ones that were set aside count as they stand.

    A damaged call may be counted for more than it was, never for nothing: limits are there to hold.
    """
    used = " + ".join(f"max({column}, 0)" for column in ("prompt_tokens", "completion_tokens"))
    whole = " AND ".join(f"typeof({column}) = 'integer'" for column in ("estimate", "allowance", "cost"))
    connection.execute("DELETE FROM spent")
    connection.execute(f"INSERT INTO spent {SUMS}")
    connection.execute(
        f"""INSERT INTO spent SELECT CAST(run AS TEXT), 'target', 'unknown', CAST(currency AS TEXT), count(*),
        sum(min(max(estimate, {used}), {_MOST})), sum(min(max(allowance, cost, 0), {_MOST}))
        FROM attempt_quarantine WHERE run IS NOT NULL AND currency IS NOT NULL AND {whole} GROUP BY 1, 4
        ON CONFLICT (run, role, state, currency) DO UPDATE SET calls = calls + excluded.calls,
        tokens = tokens + excluded.tokens, money = money + excluded.money"""
    )
    connection.execute(_TOTALS)


_MOST = 10**15
"""In a damaged call any number may stand; a sum of such numbers has to stay one that SQLite can hold."""
