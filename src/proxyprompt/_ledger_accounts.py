"""Sums and rows inside one transaction of the ledger: what is set aside, what is taken, what still fits."""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

from ._ledger_calls import ROLES, STATES, TAKEN_OVER, change, insertion, set_aside
from ._ledger_owners import AHEAD, owner
from ._ledger_rows import PICO, CallRole, Leaving, Limits
from ._ledger_schema import USAGE_COLUMNS, rebuild_sums
from .errors import BudgetExceededError, InputError, LedgerError, ProxyPromptError

__all__ = [
    "amounts_of",
    "check_fit",
    "check_room",
    "chunks",
    "enter",
    "leave",
    "mark",
    "sums_by_model",
    "taken",
]

_ENTER = insertion(
    ("id", "key", "estimate", "allowance", "run", "stage", "role", "model", "state", "host", "pid", "born", "created_at",
     "currency")
)  # fmt: skip
_Sum: TypeAlias = tuple[str, str, int, int, int]
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
    rows = _sums(connection, run, planned=planned)
    of_target = [row for row in rows if row[0] == "target"]
    calls, tokens = sum(row[2] for row in of_target), sum(row[3] for row in of_target)
    _room("max_calls", limits.max_calls, calls, len(amounts), run)
    _room("max_tokens", limits.max_tokens, tokens, sum(one[0] for one in amounts), run)
    if limits.picos is None:
        return
    foreign = _foreign(rows, limits.currency)
    if foreign:  # or what says so is damaged
        rows = _sums(connection, run, planned=planned, anew=True)
        foreign = _foreign(rows, limits.currency)
    named = sorted({*foreign, currency})
    if named != [limits.currency]:
        raise InputError(
            f"max_money is in {limits.currency}, but calls of run {run!r} are priced in {', '.join(named) or 'nothing'}.",
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


def _foreign(rows: Sequence[_Sum], currency: str) -> set[str]:
    return {row[1] for row in rows if row[1] != currency and row[4]}


def _sums(connection: sqlite3.Connection, run: str, *, planned: bool, anew: bool = False) -> list[_Sum]:
    """Role, currency, calls, tokens and money that count in a run; sums that are damaged are made anew from the calls."""
    query = "SELECT role, state, currency, calls, tokens, money FROM spent WHERE run = ?"
    rows = connection.execute(query, (run,)).fetchall()
    calls = "SELECT 1 FROM attempt WHERE run = ? LIMIT 1"
    damaged = not _agree(rows) or (not rows and connection.execute(calls, (run,)).fetchone())
    if damaged or anew:
        set_aside(connection)
        rebuild_sums(connection)
        before, rows = rows, connection.execute(query, (run,)).fetchall()
        damaged = damaged or _not_zero(before) != _not_zero(rows)
    if damaged:
        warnings.warn(
            f"The sums by which limits are checked were damaged for run {run!r}; they were made anew from the calls. Check"
            " the disk.",
            RuntimeWarning,
            stacklevel=2,
        )
    return [
        (role, currency, *amounts)
        for role, state, currency, *amounts in rows
        if role and (planned or state != "reserved")
    ]


def _not_zero(rows: Sequence[Any]) -> set[Any]:
    return {row for row in rows if any(row[3:])}


def _agree(rows: Sequence[Sequence[Any]]) -> bool:
    """Whether a run's sums are those of its total, under names that there are; see ``_ledger_schema``."""
    calls = tokens = money = 0
    totals = []
    try:
        for role, state, _, *amounts in rows:
            if not role:
                totals.append(amounts)
                continue
            if role not in ROLES or state not in STATES:
                return False
            calls, tokens, money = calls + amounts[0], tokens + amounts[1], money + amounts[2]
    except TypeError:  # a flipped bit can change the type of a column
        return False
    return totals == ([[calls, tokens, money]] if rows else [])


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


def leave(connection: sqlite3.Connection, leaving: Leaving, where: Path) -> bool:
    """Inside a transaction: mark these calls as sent, all or none; whether they fitted."""
    # Each statement gives up the interpreter, which a busy event loop is slow to hand back: none that is not needed.
    may_not_fit = leaving.limits is not None and leaving.limits.any
    if may_not_fit:
        connection.execute("SAVEPOINT leaving")
    given = leaving.tokens is not None or leaving.money is not None
    amounts = amounts_of(len(leaving.ids), leaving.tokens, leaving.money, "ids")
    limits, ahead = leaving.limits, leaving.ahead
    try:
        mark(connection, leaving.ids, (), amounts, limits, given=given, where=where, ahead=ahead)
    except ProxyPromptError:
        if may_not_fit:
            connection.execute("ROLLBACK TO leaving")
        return False
    finally:
        if may_not_fit:
            connection.execute("RELEASE leaving")
    return True


def sums_by_model(connection: sqlite3.Connection, filters: Mapping[str, str | None]) -> list[tuple[Any, ...]]:
    """Model, state, calls, the five counts of tokens, currency and money of the attempts that match what is given."""
    given = {name: value for name, value in filters.items() if value is not None}
    where = " AND ".join(f"{name} = ?" for name in given) or "1"
    sums = ", ".join(f"sum({column})" for column in USAGE_COLUMNS.split(", "))
    query = f"""SELECT model, state, count(*), {sums}, currency,
        sum(CASE WHEN state IN ('done', 'failed', '{TAKEN_OVER}') THEN cost WHEN state = 'reserved' THEN 0
        ELSE allowance END)
        FROM attempt WHERE {where} GROUP BY model, state, currency ORDER BY model"""
    return connection.execute(query, list(given.values())).fetchall()
