"""Looking after a ledger: what is in it, whether it is sound, a copy as text, and the removal of what is asked for.

Nothing here runs by itself: a ledger loses a row only when somebody says so.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from ._ledger_calls import DAMAGED, TAKEN_OVER
from ._ledger_rows import PICO, intact
from ._ledger_schema import RESPONSE_COLUMNS, SUMS, USAGE_COLUMNS, rebuild_sums
from .errors import InputError, LedgerCorruptError
from .ledger import Ledger

__all__ = ["Damage", "Pruned", "Verification", "backups", "export_rows", "prune", "show", "verify"]


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong: in which table, which row (0: none in particular), and what."""

    table: str
    row: int
    problem: str


@dataclass(frozen=True)
class Verification:
    """Outcome of :func:`verify`.

    Attributes
    ----------
    answers, calls, quarantined : int
        Rows looked at; damaged answers and calls that were set aside earlier.
    damage : tuple of Damage
    """

    answers: int
    calls: int
    quarantined: int
    damage: tuple[Damage, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong now."""
        return not self.damage


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` removed, or would remove."""

    calls: int
    answers: int
    quarantined: int


_TOTAL_SUMS = (
    "SELECT run, calls || ' ' || tokens || ' ' || money FROM spent WHERE role = '' AND (calls OR tokens OR money)",
    """SELECT run, sum(calls) || ' ' || sum(tokens) || ' ' || sum(money) FROM spent WHERE role != '' GROUP BY run
    HAVING sum(calls) OR sum(tokens) OR sum(money)""",
)
"""Each run's total as it stands, and as the sums give it."""


def verify(ledger: Ledger) -> Verification:
    """Check every row against its hash, every answer against its key, the sums of the calls, and the file's structure.

    Parameters
    ----------
    ledger : Ledger

    Returns
    -------
    Verification
        Nothing is changed: a damaged answer is set aside when it is next asked for, a damaged call when calls are counted.
    """
    damage: list[Damage] = []
    with ledger.transaction() as connection:
        for (text,) in connection.execute("PRAGMA integrity_check"):
            if text != "ok":
                damage.append(Damage("file", 0, str(text)))
        answers = 0
        for rowid, *row in connection.execute(f"SELECT rowid, {RESPONSE_COLUMNS} FROM response"):
            answers += 1
            problem = _problem(ledger, row)
            if problem:
                damage.append(Damage("response", rowid, problem))
        broken = connection.execute(f"SELECT id FROM attempt WHERE {DAMAGED}").fetchall()
        damage += [Damage("attempt", number, "does not match its own hash") for (number,) in broken]
        set_aside = connection.execute("SELECT count(*) FROM attempt_quarantine").fetchone()[0]
        kept = """SELECT run, role, state, currency, calls, tokens, money FROM spent
            WHERE role != '' AND (calls OR tokens OR money)"""
        counted = {row[:4]: row[4:] for row in connection.execute(SUMS) if any(row[4:])}
        sums = {row[:4]: row[4:] for row in connection.execute(kept)}
        # Calls that are set aside are still in the sums, and what is damaged cannot be added up.
        least = set_aside and all(
            all(map(operator.le, numbers, sums.get(name, (0, 0, 0)))) for name, numbers in counted.items()
        )
        totals = dict(connection.execute(_TOTAL_SUMS[0])) == dict(connection.execute(_TOTAL_SUMS[1]))
        if not totals or (not broken and not least and sums != counted):
            damage.append(Damage("spent", 0, "the sums of calls, tokens and money do not match the calls"))
        calls = connection.execute("SELECT count(*) FROM attempt").fetchone()[0]
        quarantined = set_aside + connection.execute("SELECT count(*) FROM quarantine").fetchone()[0]
    return Verification(answers, calls, quarantined, tuple(damage))


def _problem(ledger: Ledger, row: Sequence[Any]) -> str:
    if not intact(row):
        return "does not match its own hash"
    try:
        stored = ledger.open_row(row)
    except LedgerCorruptError:
        return "cannot be decrypted: altered, or moved from another row"
    if stored.request is not None:
        digest = hashlib.sha256(stored.request.encode("utf-8", "surrogatepass")).hexdigest()
        if ledger.stored_name(digest) != row[0]:
            return "is not the answer to the request that is stored with it"
    return ""


def show(ledger: Ledger, wanted: str) -> list[dict[str, Any]]:
    """Answers and calls whose key begins with ``wanted``, or calls of the run of that name; see :func:`export_rows`."""
    return [row for row in export_rows(ledger) if row["key"].startswith(wanted) or row.get("run") == wanted]


def export_rows(ledger: Ledger, *, run: str | None = None) -> Iterator[dict[str, Any]]:
    """Everything in the ledger as plain data, answers first; decrypted if it is encrypted.

    Parameters
    ----------
    ledger : Ledger
    run : str, optional
        Only this run's calls, and their answers.

    Yields
    ------
    dict
        ``kind`` is ``"answer"`` or ``"call"``. Keys stand as they do in the file. Names of machines and numbers of
        processes are left out. A row that is damaged is left out; :func:`verify` names it.
    """
    ledger.check_calls()
    where, values = ("", ()) if run is None else (" WHERE run = ?", (run,))
    with ledger.transaction() as connection:
        answers = connection.execute(
            f"SELECT {RESPONSE_COLUMNS} FROM response"
            + ("" if run is None else f" WHERE key IN (SELECT key FROM attempt{where})")
            + " ORDER BY rowid",
            values,
        ).fetchall()
        calls = connection.execute(
            f"""SELECT key, run, stage, role, model, state, created_at, finished_at, error, {USAGE_COLUMNS}, cost,
            allowance, currency FROM attempt{where} ORDER BY id""",
            values,
        ).fetchall()
    for row in answers:
        if not _problem(ledger, row):
            stored = ledger.open_row(row)
            yield {
                "kind": "answer",
                "key": row[0].hex(),
                "answer": json.loads(stored.body),
                "usage": _usage(row[2:5], row[10:]),
                "model_returned": stored.model_returned,
                "created_at": stored.created_at,
                "request": None if stored.request is None else json.loads(stored.request),
            }
    for (
        key,
        *about,
        created,
        finished,
        error,
        prompt,
        out,
        cached,
        write,
        thought,
        cost,
        most,
        currency,
    ) in calls:
        amount = cost if about[4] in ("done", "failed", TAKEN_OVER) else most
        yield {
            "kind": "call",
            "key": key.hex(),
            **dict(zip(("run", "stage", "role", "model", "state"), about, strict=True)),
            "created_at": created,
            "finished_at": finished,
            "error": ledger.open_error(error, key),
            "usage": _usage((prompt, out, cached), (write, thought)),
            "money": str(Decimal(amount) / PICO) if currency else None,
            "currency": currency or None,
        }


def _usage(first: Sequence[int], later: Sequence[int]) -> dict[str, int]:
    return dict(zip(USAGE_COLUMNS.split(", "), (*first, *later), strict=True))


def backups(ledger: Ledger) -> list[Path]:
    """Copies that were made before a migration; they hold what was in the ledger then."""
    return sorted(ledger.path.parent.glob(f"{ledger.path.name}.schema-*.backup*"))


def prune(
    ledger: Ledger,
    *,
    runs: Sequence[str] = (),
    before: float | None = None,
    quarantine: bool = False,
    dry: bool = False,
) -> Pruned:
    """Remove calls, the answers that no remaining call refers to, and their traces in the file.

    Parameters
    ----------
    ledger : Ledger
        Nobody else may have it open.
    runs : sequence of str
        All calls of these runs.
    before : float, optional
        All calls older than this, in seconds since 1970, and notes of batches that nobody has collected since.
    quarantine : bool
        What was set aside as damaged. Limits no longer count the damaged calls then.
    dry : bool
        Only count.

    Returns
    -------
    Pruned

    Raises
    ------
    InputError
        If nothing is named, or a run does not exist.
    LedgerError
        If another process has the ledger open.

    Notes
    -----
    Freed pages are overwritten and the file is written anew. Backups before a migration, copies made by others and
    what a disk keeps of deleted files are not touched. A run that is removed starts its limits anew, and its use of
    queries is forgotten.
    """
    if not runs and before is None and not quarantine:
        raise InputError("Nothing was named to be removed.", hint="Name runs, a date, or the quarantine.")
    conditions: list[str] = []
    values: list[Any] = []
    known = {one.run for one in ledger.runs()}
    for run in runs:
        if run not in known:
            raise InputError(
                f"There is no run {run!r} in {ledger.path}.", hint="See: proxyprompt ledger list"
            )
        conditions.append("run = ?")
        values.append(run)
    if before is not None:
        conditions.append("created_at < ?")
        values.append(before)
    where = " OR ".join(conditions) or "0"
    kept = f"SELECT key FROM attempt WHERE NOT ({where})"
    with ledger.rewriting(dry=dry) as connection:

        def count(query: str, given: Sequence[Any] = ()) -> int:
            return int(connection.execute(query, given).fetchone()[0])

        found = Pruned(
            count(f"SELECT count(*) FROM attempt WHERE {where}", values),
            count(f"SELECT count(*) FROM response WHERE key NOT IN ({kept})", values) if conditions else 0,
            count("SELECT (SELECT count(*) FROM quarantine) + (SELECT count(*) FROM attempt_quarantine)")
            if quarantine
            else 0,
        )
        if dry:
            return found
        if conditions:
            gone = [
                row[0]
                for row in connection.execute(f"SELECT DISTINCT run FROM attempt WHERE {where}", values)
            ]
            connection.execute(f"DELETE FROM response WHERE key NOT IN ({kept})", values)
            connection.execute(f"DELETE FROM attempt WHERE {where}", values)
            connection.execute(f"DELETE FROM attempt_quarantine WHERE {where}", values)
            left = {row[0] for row in connection.execute("SELECT DISTINCT run FROM attempt")}
            names = {
                row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
            if before is not None and "journal" in names:
                # Batches that nobody has collected; providers keep what they answered for some weeks only.
                connection.execute("DELETE FROM journal WHERE written_at < ?", (before,))
            for table in {"query_use", "spent"} & names:
                # Both are lists of runs; a run that still has calls keeps its rows.
                connection.executemany(
                    f"DELETE FROM {table} WHERE run = ?", [(r,) for r in gone if r not in left]
                )
        if quarantine:
            connection.execute("DELETE FROM quarantine")
            if connection.execute("DELETE FROM attempt_quarantine").rowcount:
                rebuild_sums(connection)
    return found
