"""Sums and rows inside one transaction of the ledger: what is set aside, what is taken, what still fits."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from ._ledger_calls import change, insertion
from ._ledger_owners import AHEAD, owner
from ._ledger_rows import PICO, CallRole, Limits
from .errors import BudgetExceededError, InputError, LedgerError

__all__ = ["amounts_of", "check_fit", "check_room", "chunks", "enter", "mark", "taken"]

_ENTER = insertion(
    ("id", "key", "estimate", "allowance", "run", "stage", "role", "model", "state", "host", "pid", "born", "created_at",
     "currency")
)  # fmt: skip
_CHUNK = 900  # SQLite before 3.32 takes at most 999 parameters


def chunks(values: Sequence[Any]) -> Iterator[tuple[Sequence[Any], str]]:
    """Pieces short enough for one statement, with their question marks."""
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        yield chunk, ",".join("?" * len(chunk))


def amounts_of(
    n: int, tokens: Sequence[int] | None, money: Sequence[int] | None, what: str
) -> list[tuple[int, int]]:
    """Tokens and money set aside for each call."""
    for name, given in (("tokens", tokens), ("money", money)):
        if given is not None and len(given) != n:
            raise InputError(f"{name} has {len(given)} entries, {what} has {n}; give one per key.")
    return [(int(a), int(b)) for a, b in zip(tokens or [0] * n, money or [0] * n, strict=True)]


def check_fit(limits: Limits | None, role: CallRole) -> None:
    if limits is not None and role != "target" and (limits.max_calls, limits.max_tokens) != (None, None):
        raise InputError(
            f"limits={limits!r} with role={role!r}: limits bound the target only, but for money."
        )


def enter(
    connection: sqlite3.Connection,
    rows: Sequence[tuple[bytes, tuple[int, int]]],
    common: Sequence[str],
    state: str,
    currency: str,
) -> list[int]:
    last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'attempt'").fetchone()
    first = (last[0] if last else 0) + 1
    host, pid, born = owner()
    same = (*common, state, host, pid, born, time.time(), currency)
    connection.executemany(
        _ENTER,
        [(first + n, key, *amount, *same) for n, (key, amount) in enumerate(rows)],
    )
    return list(range(first, first + len(rows)))


def taken(connection: sqlite3.Connection, names: Sequence[bytes]) -> set[bytes]:
    """Keys that are answered, or that somebody is asking."""
    found: set[bytes] = set()
    for chunk, marks in chunks(names):
        # The index on open attempts serves only a query that repeats its condition.
        query = f"SELECT key, state FROM attempt WHERE state IN ('reserved', 'sent') AND key IN ({marks})"
        rows = connection.execute(query, chunk).fetchall()
        if any(state not in ("reserved", "sent") for _, state in rows):
            # The index is damaged; what it calls open would be waited for, though nobody is asking it.
            connection.execute("REINDEX attempt")
            rows = connection.execute(query, chunk).fetchall()
        found.update(key for key, _ in rows)
        found.update(
            row[0] for row in connection.execute(f"SELECT key FROM response WHERE key IN ({marks})", chunk)
        )
    return found


def check_room(
    connection: sqlite3.Connection,
    limits: Limits | None,
    run: str,
    amounts: Sequence[tuple[int, int]],
    currency: str,
    *,
    planned: bool,
) -> None:
    """Whether calls with these amounts fit; ``planned``: with those that are reserved and not sent."""
    if limits is None or not limits.any or not amounts:
        return
    count = "" if planned else " AND state != 'reserved'"
    query = f"SELECT role, currency, sum(calls), sum(tokens), sum(money) FROM spent WHERE run = ?{count} GROUP BY 1, 2"
    rows = connection.execute(query, (run,)).fetchall()
    of_target = [row for row in rows if row[0] == "target"]
    calls, tokens = (sum(row[n] for row in of_target) for n in (2, 3))
    _room("max_calls", limits.max_calls, calls, len(amounts), run)
    _room("max_tokens", limits.max_tokens, tokens, sum(one[0] for one in amounts), run)
    if limits.picos is None:
        return
    foreign = sorted({row[1] for row in rows if row[1] != limits.currency and row[4]} | {currency})
    if foreign != [limits.currency]:
        raise InputError(
            f"max_money is in {limits.currency}, but calls of run {run!r} are priced in {', '.join(foreign) or 'nothing'}.",
            hint="Give the limit in the currency of the price.",
        )
    spent, asked = sum(row[4] for row in rows), sum(one[1] for one in amounts)
    if spent + asked > limits.picos:
        money = [f"{Decimal(amount) / PICO:f} {limits.currency}" for amount in (spent, asked, spent + asked)]
        raise BudgetExceededError(
            f"max_money={limits.max_money} {limits.currency}: run {run!r} has spent or set aside {money[0]} and asks"
            f" for up to {money[1]} more; it was not sent.",
            hint=f"Raise the limit to {money[2]} or more, or ask for less; all answers are kept.",
        )


def _room(name: str, limit: int | None, spent: int, asked: int, run: str) -> None:
    # Calls of unknown size still need room for one token.
    if limit is not None and spent + max(asked, 1) > limit:
        raise BudgetExceededError(
            f"{name}={limit}: run {run!r} has spent or reserved {spent} and asks for {asked} more; "
            "nothing was sent.",
            hint=f"Raise {name} to {spent + asked} or more, or ask for less; all answers are kept.",
        )


def mark(
    connection: sqlite3.Connection,
    ids: Sequence[int],
    again: Sequence[int],
    amounts: Sequence[tuple[int, int]],
    limits: Limits | None,
    *,
    given: bool,
    where: Path,
    ahead: bool = False,
) -> list[int]:
    """Mark attempts as sent, with these amounts if they are ``given``, and enter repetitions; see ``Ledger.mark_sent``."""
    query = "SELECT run, stage, role, model, currency, key FROM attempt WHERE id = ?"
    first = ids[:1] if limits is not None and limits.any else ()
    rows = [connection.execute(query, (number,)).fetchone() for number in (*first, *again)]
    if rows and rows[0] is not None:
        check_room(connection, limits, rows[0][0], amounts, rows[0][4], planned=False)
    sets = {"state": "'sent'"} | ({"estimate": "?2", "allowance": "?3"} if given else {})
    sets |= {"error": f"'{AHEAD}'"} if ahead else {}
    values = [(n, *(amount if given else ())) for n, amount in zip(ids, amounts, strict=False)]
    query = change("id = ?1 AND state = 'reserved'", **sets)
    marked = connection.executemany(query, values).rowcount if values else 0
    if marked != len(ids) or None in rows:
        raise LedgerError(
            f"Only {marked} of the {len(ids)} attempts to send are reserved in {where}.",
            hint="Send each attempt once, after reserve() and before release().",
        )
    more = []
    for row, amount in zip(rows[len(first) :], amounts[len(ids) :], strict=True):
        more += enter(connection, [(row[5], amount)], row[:4], "sent", row[4])
    return more
