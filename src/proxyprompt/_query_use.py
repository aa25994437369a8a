"""Which queries served which purpose, kept with the ledger: a query that helped to choose cannot certify.

Rows of a table beside the calls, one for each run and purpose, written before the first query of that purpose is asked.
Queries and demonstrations are there as hashes of their contents, keyed ones unless the ledger keeps texts anyway.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import DataError
from .ledger import Ledger
from .prompt import Demonstration, FewShotPrompt, Query

__all__ = ["QueryUse", "earlier_looks", "note_use", "query_key", "refuse_used"]

_TABLE = """CREATE TABLE IF NOT EXISTS query_use (run TEXT NOT NULL, purpose TEXT NOT NULL,
    demonstrations TEXT NOT NULL, queries TEXT NOT NULL, created_at REAL NOT NULL, PRIMARY KEY (run, purpose))"""


@dataclass(frozen=True)
class QueryUse:
    """Queries that one run used for one purpose, and the prompt that they were used for.

    Attributes
    ----------
    run : str
    purpose : {"explain", "select", "sealed"}
    demonstrations, queries : frozenset of str
        Keys of contents.
    """

    run: str
    purpose: str
    demonstrations: frozenset[str]
    queries: frozenset[str]


def query_key(query: Query | Demonstration) -> str:
    """Hash of what is asked: fields and choices, without id and answer.

    Examples
    --------
    >>> query_key(Query("a", {"input": "x"}, "yes")) == query_key(Query("b", {"input": "x"}, "no"))
    True
    """
    body = json.dumps([sorted(query.inputs.items()), query.choices], ensure_ascii=True)
    return hashlib.sha256(body.encode()).hexdigest()[:32]


def note_use(ledger: Ledger, run: str, purpose: str, prompt: FewShotPrompt, queries: Sequence[Query]) -> None:
    """Record, durably, that a run is about to use queries for a purpose; a repetition changes nothing."""
    row = (
        run,
        purpose,
        json.dumps(sorted(_hidden(ledger, _demonstrations(prompt)))),
        json.dumps(sorted(_hidden(ledger, map(query_key, queries)))),
        time.time(),
    )
    with ledger.transaction() as connection:
        connection.execute(_TABLE)
        connection.execute("INSERT OR IGNORE INTO query_use VALUES (?, ?, ?, ?, ?)", row)


def refuse_used(ledger: Ledger, run: str, prompt: FewShotPrompt, sealed: Sequence[Query]) -> None:
    """Refuse sealed queries that chose something, in another run, for this prompt or one it was cut from.

    Raises
    ------
    DataError
        With their number and that run.
    """
    mine, keys = _hidden(ledger, _demonstrations(prompt)), _hidden(ledger, map(query_key, sealed))
    for use in _others(ledger, run):
        known = keys & use.queries
        if use.purpose != "sealed" and known and mine <= use.demonstrations:
            raise DataError(
                f"queries: {len(known)} of the {len(keys)} sealed queries served to {use.purpose} in an earlier run"
                f" ({use.run}) of this prompt, or of one that it was cut from; they cannot certify.",
                hint="Seal queries that no run has used, or keep the splits as they were.",
            )


def earlier_looks(ledger: Ledger, run: str, prompt: FewShotPrompt, sealed: Sequence[Query]) -> int:
    """Other runs that tested a prompt of the same demonstrations, or fewer, or more, on some of these queries."""
    mine, keys = _hidden(ledger, _demonstrations(prompt)), _hidden(ledger, map(query_key, sealed))
    return len(
        {
            use.run
            for use in _others(ledger, run)
            if use.purpose == "sealed"
            and keys & use.queries
            and (mine <= use.demonstrations or use.demonstrations <= mine)
        }
    )


def _demonstrations(prompt: FewShotPrompt) -> frozenset[str]:
    return frozenset(query_key(d) for d in prompt.demonstrations)


def _hidden(ledger: Ledger, keys: Iterable[str]) -> frozenset[str]:
    """Keys as they may stand in the file: texts are short, and a plain hash of one could be found by trying."""
    return frozenset(ledger.conceal(key) for key in keys)


def _others(ledger: Ledger, run: str) -> Iterable[QueryUse]:
    with ledger.transaction() as connection:
        connection.execute(_TABLE)
        rows = connection.execute(
            "SELECT run, purpose, demonstrations, queries FROM query_use WHERE run != ? ORDER BY created_at, run",
            (run,),
        ).fetchall()
    return [QueryUse(r, p, frozenset(json.loads(d)), frozenset(json.loads(q))) for r, p, d, q in rows]
