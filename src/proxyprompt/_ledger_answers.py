"""Stored answers: finding those that match their hash, storing new ones with the calls that brought them."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._ledger_accounts import chunks
from ._ledger_calls import change
from ._ledger_rows import (
    Answer,
    Failure,
    StoredResponse,
    as_bytes,
    as_text,
    counts,
    intact,
    printable,
    row_hash,
    split,
)
from ._ledger_schema import RESPONSE_COLUMNS, SCHEMA, USAGE_COLUMNS
from ._ledger_vault import Vault
from ._request_keys import raw_key
from .backends.base import Usage
from .errors import LedgerCorruptError

__all__ = ["Finished", "find", "finished", "set_aside", "store", "stored"]

_FINISHED = {
    "state": "'done'",
    "finished_at": "?1",
    **{column: f"?{n}" for n, column in enumerate(USAGE_COLUMNS.split(", "), start=2)},
    "cost": "coalesce(?7, allowance)",
}


def stored(vault: Vault, key: str, row: Sequence[Any]) -> StoredResponse:
    """A row of the table ``response``, opened; the error tells that it cannot be decrypted."""
    name, body, prompt, completion, cached, model, _, _, created, request, *more = row
    opened = as_text(vault.open(body, name, "body"))
    assert opened is not None
    asked = as_text(vault.open(request, name, "request"))
    usage = Usage(prompt, completion, cached, *more)
    return StoredResponse(key, opened, usage, as_text(model), created, asked)


def find(
    connection: sqlite3.Connection, vault: Vault, wanted: Mapping[bytes, str]
) -> tuple[dict[str, StoredResponse], list[int]]:
    """Sound answers by key, and the row numbers of damaged ones, among those whose stored names are wanted."""
    found: dict[str, StoredResponse] = {}
    suspects: list[int] = []
    for chunk, marks in chunks(list(wanted)):
        query = f"SELECT rowid, {RESPONSE_COLUMNS} FROM response WHERE key IN ({marks})"
        for rowid, *row in connection.execute(query, chunk):
            key = wanted.get(row[0])
            if key is not None and intact(row):
                try:
                    found.setdefault(key, stored(vault, key, row))
                    continue
                except LedgerCorruptError:  # an attacker can mend the hash, but not the seal
                    pass
            suspects.append(rowid)
    return found, suspects


def set_aside(connection: sqlite3.Connection, vault: Vault, rowids: Sequence[int]) -> int:
    """Inside a transaction: move those of these rows that are damaged to the quarantine; how many they were."""
    moved = 0
    # If the damage is in the index or in a key, the two disagree, and a row deleted by its damaged
    # key would leave an entry behind that hides the answer bought in its place.
    connection.execute("REINDEX response")
    for rowid in rowids:
        # Checked again: another process may have set it aside and bought it anew.
        query = f"SELECT {RESPONSE_COLUMNS} FROM response WHERE rowid = ?"
        row = connection.execute(query, (rowid,)).fetchone()
        if row is None or (intact(row) and _opens(vault, row)):
            continue
        connection.execute(
            f"""INSERT INTO quarantine (set_aside_at, {RESPONSE_COLUMNS})
            SELECT ?, {RESPONSE_COLUMNS} FROM response WHERE rowid = ?""",
            (time.time(), rowid),
        )
        connection.execute("DELETE FROM response WHERE rowid = ?", (rowid,))
        moved += 1
    return moved


def _opens(vault: Vault, row: Sequence[Any]) -> bool:
    try:
        stored(vault, "", row)
    except LedgerCorruptError:
        return False
    return True


@dataclass(frozen=True)
class Finished:
    """Answers and failures as values of SQL, sealed and hashed outside the transaction."""

    rows: list[list[Any]]
    done: list[tuple[Any, ...]]
    repeated: list[tuple[Any, ...]]
    lost: list[tuple[str, Failure, tuple[Any, ...]]]

    @property
    def n_calls(self) -> int:
        """How many attempts they finish."""
        return len(self.done) + len(self.repeated) + len(self.lost)


def finished(vault: Vault, answers: Sequence[Answer], failures: Sequence[Failure]) -> Finished:
    """What :func:`store` writes; its time is now."""
    now = time.time()
    these = Finished([], [], [], [])
    for one in answers:
        (usage, cost), *shares = split(one.usage, one.cost, 1 + len(one.extra))
        these.repeated.extend((now, *counts(u), c, n) for (u, c), n in zip(shares, one.extra, strict=True))
        name = vault.name(raw_key(one.key))
        body = vault.seal(as_bytes(one.body), name, "body")
        request = vault.seal(as_bytes(one.request), name, "request")
        used, later = counts(one.usage)[:3], counts(one.usage)[3:]
        row = [name, body, *used, as_bytes(one.model_returned), b"", SCHEMA, now, request, *later]
        row[6] = row_hash(row)
        these.rows.append(row)
        these.done.append((now, *counts(usage), cost, one.attempt, name))
    for lost in failures:
        state = "unknown" if lost.uncertain else "failed"
        these.lost.append((state, lost, (now, *counts(lost.usage), lost.cost, lost.attempt)))
    return these


def store(connection: sqlite3.Connection, vault: Vault, these: Finished) -> int:
    """Inside a transaction: store answers (the first of a key stays) and finish their calls; how many calls were found."""
    marks = ",".join("?" * len(RESPONSE_COLUMNS.split(",")))
    absent = "WHERE NOT EXISTS (SELECT 1 FROM response WHERE key = ?)"
    insert = f"INSERT INTO response ({RESPONSE_COLUMNS}) SELECT {marks} {absent}"
    if these.rows:
        connection.executemany(insert, [(*row, row[0]) for row in these.rows])
    touched = 0
    if these.done:
        query = change("id = ?8 AND key = ?9", **_FINISHED)
        touched += connection.executemany(query, these.done).rowcount
    if these.repeated:
        touched += connection.executemany(change("id = ?8", **_FINISHED), these.repeated).rowcount
    for state, one, numbers in these.lost:
        found = connection.execute("SELECT key FROM attempt WHERE id = ?", (one.attempt,)).fetchone()
        error = vault.seal_error(printable(one.error), found[0]) if found else None
        query = change("id = ?8", **_FINISHED | {"cost": "?7", "state": "?9", "error": "?10"})
        touched += connection.execute(query, (*numbers, state, error)).rowcount
    return touched
