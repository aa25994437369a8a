"""Rows of the table ``attempt``: each carries a hash of all its columns, checked whenever it is read or changed."""

from __future__ import annotations

import functools
import hashlib
import sqlite3
import time
from collections.abc import Mapping, Sequence

__all__ = [
    "CALL_COLUMNS",
    "DAMAGED",
    "ROLES",
    "STATES",
    "TAKEN_OVER",
    "change",
    "image",
    "insertion",
    "interrupted",
    "learn_seal",
    "removal",
    "set_aside",
]

TAKEN_OVER = "taken over"
"""State of a call that a later process found under way at the provider, and counts as its own."""

ROLES = ("target", "proxy")
STATES = ("reserved", "sent", "done", "failed", "unknown", TAKEN_OVER)

CALL_COLUMNS = (
    "id", "key", "run", "stage", "role", "model", "state", "host", "pid", "born", "created_at", "finished_at", "error",
    "estimate", "allowance", "cost", "currency", "prompt_tokens", "completion_tokens", "cached_tokens",
    "cache_write_tokens", "reasoning_tokens",
)  # fmt: skip
"""All but the hash, in the order in which they are hashed."""
_WHOLE = frozenset({"id", "pid", *CALL_COLUMNS[13:16], *CALL_COLUMNS[17:]})
"""Whole numbers: tokens and money."""


def learn_seal(connection: sqlite3.Connection) -> None:
    """Teach a connection the function ``seal``: SHA-256 of a blob."""
    connection.create_function("seal", 1, lambda data: hashlib.sha256(data).digest(), deterministic=True)


def interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C came while SQLite was in ``seal``: it makes an error of its own of that; nothing else fails there."""
    return isinstance(error, sqlite3.OperationalError) and "user-defined function raised" in str(error)


def image(values: Mapping[str, str] | None = None) -> str:
    """SQL of all columns as one blob, with expressions in place of some.

    Numbers as they print, the rest as literals, which tell their type; a blob, because damaged text is not always UTF-8.
    One ``printf``, because joining with ``||`` takes half as long again.
    """
    given = {column: column for column in CALL_COLUMNS} | dict(values or {})
    parts = [given[c] if c in _WHOLE else f"quote({given[c]})" for c in CALL_COLUMNS]
    return f"CAST(printf('{'|'.join(['%s'] * len(parts))}', {', '.join(parts)}) AS BLOB)"


DAMAGED = f"sha256 IS NOT seal({image()})"
"""Condition on rows that do not match their hash."""


@functools.cache
def change(where: str, **values: str) -> str:
    """SQL that sets columns of sound rows to expressions, which may hold numbered parameters, and their hash.

    A damaged row stays as it is: it would be sound ever after, and its sums would be changed by what it never held.
    """
    sets = ", ".join(f"{column} = {value}" for column, value in values.items())
    return f"UPDATE attempt SET {sets}, sha256 = seal({image(values)}) WHERE {where} AND sha256 = seal({image()})"


def removal(where: str) -> str:
    """SQL that removes sound rows: with a damaged one, what it never held would be taken from the sums."""
    return f"DELETE FROM attempt WHERE {where} AND sha256 = seal({image()})"


def insertion(columns: Sequence[str]) -> str:
    """SQL that enters a row with these columns as parameters, in order, and the others empty."""
    values = dict.fromkeys(CALL_COLUMNS, "0") | {"finished_at": "NULL", "error": "NULL"}
    values |= {column: f"?{number}" for number, column in enumerate(columns, start=1)}
    listed = ", ".join(values[column] for column in CALL_COLUMNS)
    return f"INSERT INTO attempt ({', '.join(CALL_COLUMNS)}, sha256) VALUES ({listed}, seal({image(values)}))"


def set_aside(connection: sqlite3.Connection, where: str = "1") -> int:
    """Inside a transaction: move damaged rows to the quarantine. What they counted against limits stays counted.

    The sums were made when the rows were sound, so they are kept; the rows themselves prove nothing any more.
    """
    if not connection.execute(f"SELECT 1 FROM attempt WHERE ({where}) AND {DAMAGED} LIMIT 1").fetchone():
        return 0
    sums = connection.execute("SELECT * FROM spent").fetchall()
    columns = ", ".join(CALL_COLUMNS)
    # All of them, wherever the index says they are: in what was found the two may disagree.
    copy = f"INSERT INTO attempt_quarantine SELECT ?, {columns} FROM attempt NOT INDEXED WHERE {DAMAGED}"
    moved = connection.execute(copy, (time.time(),)).rowcount
    _keep_sound(connection)
    connection.execute("DELETE FROM spent")
    connection.executemany("INSERT INTO spent VALUES (?, ?, ?, ?, ?, ?, ?)", sums)
    return moved


def _keep_sound(connection: sqlite3.Connection) -> None:
    """Make the table, its indexes and triggers anew, without the damaged rows.

    Deleting them is not enough. A row of damaged number stands where no search finds it, not even the one for its deletion,
    and sends searches for sound ones astray; a row of damaged key leaves an entry of the index behind.
    """
    [(table,), *others] = connection.execute(
        "SELECT sql FROM sqlite_master WHERE tbl_name = 'attempt' AND sql IS NOT NULL ORDER BY type != 'table'"
    ).fetchall()
    last = connection.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'attempt'").fetchone()[0]
    connection.execute("ALTER TABLE attempt RENAME TO attempt_old")
    connection.execute(table)
    connection.execute(f"INSERT INTO attempt SELECT * FROM attempt_old NOT INDEXED WHERE NOT ({DAMAGED})")
    connection.execute("DROP TABLE attempt_old")
    for (statement,) in others:
        connection.execute(statement)
    # Numbers of calls are never used again.
    connection.execute("DELETE FROM sqlite_sequence WHERE name = 'attempt'")
    connection.execute(
        "INSERT INTO sqlite_sequence SELECT 'attempt', max(coalesce(?, 0), coalesce(max(id), 0)) FROM attempt",
        (last,),
    )
