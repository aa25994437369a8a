"""What is under way at a provider, written down so that another process can go on with it.

A table beside the calls, one row per entry: what the backend wrote. It names requests as the ledger does, and holds nothing
of what was asked or answered.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ._ledger_calls import TAKEN_OVER, change
from .ledger import Ledger

__all__ = ["LedgerJournal", "MemoryJournal", "identity_hash"]

_TABLE = """CREATE TABLE IF NOT EXISTS journal (owner TEXT NOT NULL, name TEXT NOT NULL, entry TEXT NOT NULL,
    written_at REAL NOT NULL, PRIMARY KEY (owner, name))"""


def identity_hash(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of a backend's identity."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:16]


class MemoryJournal:
    """A :class:`~proxyprompt.backends.base.Journal` for one process: nothing can be resumed from it."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = keys
        self._entries: dict[str, str] = {}

    def read(self) -> Mapping[str, str]:
        """All entries by name."""
        return dict(self._entries)

    def write(self, name: str, entry: str | None) -> None:
        """Set or remove one entry."""
        if entry is None:
            self._entries.pop(name, None)
        else:
            self._entries[name] = entry


class LedgerJournal:
    """A :class:`~proxyprompt.backends.base.Journal` in the ledger's file.

    Parameters
    ----------
    ledger : Ledger
    owner : str
        Whose entries these are: one model at one address.
    keys : sequence of str
        Ledger keys of the batch.

    Attributes
    ----------
    keys : sequence of str
        Their names in the file, which the backend writes down: keyed hashes unless the ledger keeps texts, as a plain hash
        of a short text could be found by trying.
    former_keys : sequence of str
        Their names in entries that the second schema wrote to such a ledger; none where they are the same.
    """

    def __init__(self, ledger: Ledger, owner: str, keys: Sequence[str]) -> None:
        self.keys: Sequence[str] = [ledger.stored_name(key).hex() for key in keys]
        self.former_keys: Sequence[str] = () if ledger.store == "full" else tuple(keys)
        self._ledger = ledger
        self._owner = owner
        with ledger.transaction() as connection:
            connection.execute(_TABLE)

    def read(self) -> Mapping[str, str]:
        """All entries by name, oldest first."""
        query = "SELECT name, entry FROM journal WHERE owner = ? ORDER BY written_at, name"
        with self._ledger.transaction() as connection:
            return dict(connection.execute(query, (self._owner,)).fetchall())

    def write(self, name: str, entry: str | None) -> None:
        """Make one entry durable, or remove it."""
        with self._ledger.transaction() as connection:
            if entry is None:
                query = "DELETE FROM journal WHERE owner = ? AND name = ?"
                connection.execute(query, (self._owner, name))
            else:
                query = "INSERT OR REPLACE INTO journal (owner, name, entry, written_at) VALUES (?, ?, ?, ?)"
                connection.execute(query, (self._owner, name, entry, time.time()))

    def take_over(self, indices: Sequence[int]) -> None:
        """Close what earlier, dead processes sent of these requests: it is still under way, and counted anew here."""
        query = change("key = ?1 AND state = 'unknown'", state=f"'{TAKEN_OVER}'")
        with self._ledger.transaction() as connection:
            connection.executemany(query, [(bytes.fromhex(self.keys[i]),) for i in indices])
