"""Rows of calls and their sums: noticed when a bit of them flips; limits that hold all the same; schemas 3 and 4."""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proxyprompt import _ledger_calls
from proxyprompt._journal import LedgerJournal
from proxyprompt._ledger_calls import CALL_COLUMNS
from proxyprompt._ledger_schema import _STEPS
from proxyprompt.backends.base import Usage
from proxyprompt.errors import BudgetExceededError, LedgerError
from proxyprompt.ledger import PICO, Answer, Failure, Ledger, Limits
from proxyprompt.ledger_care import export_rows, prune, verify

N = 12


def key_of(number: int) -> str:
    return f"{number:064x}"


def fill(path: Path) -> list[int]:
    """Calls in every state, with tokens and money; the first half done."""
    with Ledger(path) as ledger:
        keys = [key_of(n) for n in range(N)]
        ids = ledger.reserve(
            keys, run="r", stage="s", role="target", model="m", currency="USD",
            tokens=[50] * N, money=[PICO] * N,
        )  # fmt: skip
        ledger.mark_sent(ids[: N - 1])
        half = N // 2
        ledger.record(
            [
                Answer(i, k, "{}", Usage(10, 2, 1), cost=PICO // 2)
                for i, k in zip(ids[:half], keys, strict=False)
            ],
            [Failure(ids[half], "no é", Usage(3, 0), 7), Failure(ids[half + 1], "lost", uncertain=True)],
        )
        ledger.release(ids)
    return ids


def flip(path: Path, row: int, column: str, rng: random.Random) -> bool:
    """Flip one bit of the value as it lies in the record; whether the value can be written back."""
    with sqlite3.connect(path) as connection:
        connection.text_factory = bytes
        query = f"SELECT CAST({column} AS BLOB), typeof({column}) FROM attempt WHERE id = ?"
        value, kind = connection.execute(query, (row,)).fetchone()
        if kind == b"null":
            return False
        if kind == b"integer":
            change: Any = int(value) ^ 1 << rng.randrange(40)
            sql = "?"
        else:
            data = bytearray(value)
            at = rng.randrange(8 * len(data)) if data else 0
            if not data:
                return False
            data[at // 8] ^= 1 << at % 8
            change, sql = (
                bytes(data),
                {b"text": "CAST(? AS TEXT)", b"real": "CAST(CAST(? AS TEXT) AS REAL)"}.get(kind, "?"),
            )
        connection.execute("DROP TRIGGER attempt_on")  # a disk does not count
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(f"UPDATE attempt SET {column} = {sql} WHERE id = ?", (change, row))
        changed = connection.execute(query, (row if column != "id" else change,)).fetchone()
    connection.close()
    return bool(changed != (value, kind))


@pytest.mark.parametrize("column", [*CALL_COLUMNS, "sha256"])
def test_a_flipped_bit_in_any_column_is_noticed(tmp_path: Path, column: str) -> None:
    rng = random.Random(column)
    for trial in range(6):
        path = tmp_path / f"{trial}.db"
        ids = fill(path)
        row = rng.choice(ids[: N - 1])
        with Ledger(path) as ledger:
            truth = ledger.totals()
            known = {r["key"]: r for r in export_rows(ledger) if r["kind"] == "call"}
        if not flip(path, row, column, rng):
            continue
        with Ledger(path) as ledger:
            found = verify(ledger)
            assert [d.table for d in found.damage if d.table == "attempt"] == ["attempt"]
            with pytest.warns(RuntimeWarning, match="1 calls in .* were set aside"):
                totals = ledger.totals(run="r")
            assert ledger.quarantined == 1
            assert totals.done + totals.failed + totals.unknown == N - 2
            assert truth.done + truth.failed + truth.unknown == N - 1
            for one in export_rows(ledger):
                assert one["kind"] != "call" or known[one["key"]] == one
            after = verify(ledger)
            assert (after.sound, after.quarantined, after.calls) == (True, 1, N - 2)
            # What it counted against a limit counts on.
            with pytest.raises(BudgetExceededError):
                ledger.reserve(
                    [key_of(99)], run="r", stage="s", role="target", model="m", limits=Limits(max_calls=N - 1)
                )
            prune(ledger, quarantine=True)
            assert verify(ledger).quarantined == 0
            assert verify(ledger).sound


@pytest.mark.parametrize("column", ["state", "allowance", "run", "key", "estimate"])
def test_a_damaged_call_under_way_is_not_mended_by_what_follows(tmp_path: Path, column: str) -> None:
    """Its answer is kept, the books say so, and its damaged amounts never reach the sums."""
    path = tmp_path / "l.db"
    with Ledger(path) as ledger:
        terms: dict[str, Any] = {"run": "r", "stage": "s", "role": "target", "model": "m", "currency": "USD"}
        [call] = ledger.reserve([key_of(0)], tokens=[50], money=[PICO], **terms)
        ledger.mark_sent([call])
        assert flip(path, call, column, random.Random(5))
        with pytest.raises(LedgerError, match="no matching attempt"):
            ledger.record([Answer(call, key_of(0), "{}", Usage(10, 2), cost=PICO // 2)])
        assert ledger.lookup([key_of(0)])
        ledger.release([call])
        limits = Limits(max_money=1)
        with pytest.raises(BudgetExceededError, match="has spent or set aside 1 USD"):
            ledger.reserve([key_of(1)], tokens=[50], money=[1], limits=limits, **terms)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with Ledger(path) as ledger:
            ledger.totals()
            assert verify(ledger).sound
            assert verify(ledger).quarantined == 1
            # Nobody waits for it.
            assert ledger.claim([key_of(2), key_of(0)], **terms).held == (1,)


@pytest.mark.parametrize("at", range(1, 9))
def test_ctrl_c_while_sqlite_asks_for_a_hash_is_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """SQLite turns what is raised there into an error of its own; nothing is written, and the same works again."""
    asked = 0

    def sha256(data: bytes) -> Any:
        nonlocal asked
        asked += 1
        if asked == at:
            raise KeyboardInterrupt
        return hashlib.sha256(data)

    def interruptible(work: Any) -> Any:
        monkeypatch.setattr(_ledger_calls, "hashlib", SimpleNamespace(sha256=sha256))
        try:
            return work()
        except KeyboardInterrupt:
            assert verify(ledger).sound
            return work()
        finally:
            monkeypatch.undo()

    with Ledger(tmp_path / "l.db") as ledger:
        keys = [key_of(0), key_of(1)]
        ids = interruptible(lambda: ledger.reserve(keys, run="r", stage="s", role="target", model="m"))
        interruptible(lambda: ledger.mark_sent(ids))
        interruptible(lambda: ledger.record([Answer(ids[0], keys[0], "{}")]))
        assert interruptible(ledger.totals).done == 1
        assert asked >= at
        assert (ledger.totals().open, ledger.quarantined) == (1, 0)


def test_a_damaged_call_of_somebody_else_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    terms: dict[str, Any] = {"run": "r", "stage": "s", "role": "target", "model": "m"}
    with Ledger(path) as one, Ledger(path) as other:
        [call] = one.reserve([key_of(0)], **terms)
        assert other.claim([key_of(0)], **terms).held == (0,)
        assert flip(path, call, "host", random.Random(1))
        assert list(other.claim([key_of(0)], **terms).attempts) == [0]
        with pytest.raises(LedgerError, match="Only 0 of the 1 attempts"):
            one.mark_sent([call])


def second_schema(path: Path) -> None:
    """A ledger of schema 2 with a call that a later process had continued."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        for statement in (*_STEPS[1], *_STEPS[2]):
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('store', CAST('full' AS BLOB))")
        for number, (state, error, cost, allowance) in enumerate(
            [
                ("done", None, 5, 9),
                ("failed", "continued by a later process, which counts it", 0, 9),
                ("failed", "HTTP 500", 0, 9),
                ("unknown", None, 0, 9),
            ]
        ):
            connection.execute(
                """INSERT INTO attempt (key, run, stage, role, model, state, host, pid, created_at, error, estimate,
                cost, allowance, currency, prompt_tokens)
                VALUES (?, 'r', 's', 'target', 'm', ?, 'h', 1, 5, ?, 30, ?, ?, 'USD', ?)""",
                (bytes.fromhex(key_of(number)), state, error, cost, allowance, 7 if state == "done" else 0),
            )
        connection.execute("DELETE FROM attempt WHERE id = 5")
        connection.execute("UPDATE sqlite_sequence SET seq = 40 WHERE name = 'attempt'")
        connection.execute("PRAGMA application_id = 1347439665")
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    path.chmod(0o600)


def test_calls_of_the_second_schema_get_their_hash(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    second_schema(path)
    for _ in range(2):
        with Ledger(path) as ledger:
            totals = ledger.totals(run="r")
            counts = (totals.done, totals.failed, totals.unknown, totals.taken_over, totals.open)
            assert counts == (1, 1, 1, 1, 0)
            assert totals.money["USD"] * PICO == 5 + 9
            assert (verify(ledger).sound, ledger.quarantined) == (True, 0)
    assert [p.name for p in tmp_path.glob("*.backup*")] == ["l.db.schema-2.backup"]
    with Ledger(path) as ledger:
        [number] = ledger.reserve([key_of(9)], run="r", stage="s", role="target", model="m")
        assert number == 41, "numbers of calls are not used again"


def test_what_is_taken_over_counts_where_it_is_collected(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    terms: dict[str, Any] = {"stage": "s", "role": "target", "model": "m", "currency": "USD"}
    with Ledger(path) as ledger:
        [first] = ledger.reserve([key_of(0)], run="r", tokens=[50], money=[PICO], **terms)
        ledger.mark_sent([first])
        ledger.release([first])
        assert ledger.totals().money == {"USD": 1}
        LedgerJournal(ledger, "o", [key_of(0)]).take_over([0])
        assert (ledger.totals().taken_over, ledger.totals().unknown, ledger.totals().money) == (1, 0, {})
        limits = Limits(max_calls=1, max_tokens=50, max_money=1)
        [again] = ledger.reserve([key_of(0)], run="r", tokens=[50], money=[PICO], limits=limits, **terms)
        ledger.mark_sent([again], limits=limits)
        ledger.record([Answer(again, key_of(0), "{}", Usage(10, 2), cost=PICO // 2)])
        totals = ledger.totals(run="r")
        assert (totals.done, totals.taken_over, totals.failed, totals.unknown) == (1, 1, 0, 0)
        assert (totals.prompt_tokens, totals.money) == (10, {"USD": PICO // 2 / PICO})
        assert [r["state"] for r in export_rows(ledger) if r["kind"] == "call"] == ["taken over", "done"]
        assert verify(ledger).sound


SUM_KEYS = [("target", "done", "USD"), ("target", "unknown", "USD"), ("", "", "")]
SUM_COLUMNS = ["run", "role", "state", "currency", "calls", "tokens", "money"]


@pytest.mark.parametrize(
    ("row", "column"),
    # Under what state and currency a total stands says nothing; the next call finds two totals then.
    [
        (row, column)
        for row in SUM_KEYS
        for column in SUM_COLUMNS
        if row[0] or column not in ("state", "currency")
    ],
)
def test_a_flipped_bit_in_the_sums_passes_no_limit(tmp_path: Path, row: tuple[str, ...], column: str) -> None:
    """Each limit refuses and admits what it did before the damage, the same process and another one."""
    rng = random.Random(f"{row}{column}")
    used = {"max_calls": 11, "max_tokens": 6 * 12 + 3 + 4 * 50, "max_money": 7 + 7 / PICO}
    if column == "currency" and row[0]:
        used = {"max_money": used["max_money"]}  # the others do not ask for it
    for name, amount in used.items():
        path = tmp_path / f"{name}.db"
        fill(path)
        with Ledger(path) as ledger:
            assert verify(ledger).sound
        flip_sum(path, row, column, rng)
        terms: dict[str, Any] = {"run": "r", "stage": "s", "role": "target", "model": "m", "currency": "USD"}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with Ledger(path) as ledger:
                assert not verify(ledger).sound
                one = {"tokens": [1], "money": [1]}
                with pytest.raises(BudgetExceededError):
                    ledger.reserve([key_of(50)], limits=Limits(**{name: amount}), **one, **terms)
                [call] = ledger.reserve([key_of(50)], limits=Limits(**{name: amount + 1}), **one, **terms)
                ledger.release([call])
                assert verify(ledger).sound
        assert [w for w in told if "made anew from the calls" in str(w.message)]


def test_lost_sums_are_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    fill(path)
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM spent")
    connection.close()
    with (
        Ledger(path) as ledger,
        pytest.warns(RuntimeWarning, match="made anew"),
        pytest.raises(BudgetExceededError),
    ):
        ledger.reserve(
            [key_of(50)], run="r", stage="s", role="target", model="m", limits=Limits(max_calls=11)
        )


def flip_sum(path: Path, row: tuple[str, ...], column: str, rng: random.Random) -> None:
    """Flip one bit of a sum."""
    where = "run = 'r' AND role = ? AND state = ? AND currency = ?"
    with sqlite3.connect(path) as connection:
        connection.text_factory = bytes
        [value] = connection.execute(f"SELECT {column} FROM spent WHERE {where}", row).fetchone()
        if isinstance(value, int):
            changed: Any = value ^ 1 << rng.randrange(40)
        else:
            data = bytearray(value or b"\0")
            data[-1] ^= 1 << rng.randrange(7)
            changed = bytes(data).decode()
        connection.execute(f"UPDATE spent SET {column} = ? WHERE {where}", (changed, *row))
    connection.close()


def test_sums_made_anew_count_calls_that_were_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    ids = fill(path)
    assert flip(path, ids[0], "stage", random.Random(3))
    with Ledger(path) as ledger, pytest.warns(RuntimeWarning, match="set aside"):
        ledger.totals()
    flip_sum(path, ("", "", ""), "calls", random.Random(3))
    terms: dict[str, Any] = {"run": "r", "stage": "s", "role": "target", "model": "m", "currency": "USD"}
    with Ledger(path) as ledger:
        with pytest.warns(RuntimeWarning, match="made anew"), pytest.raises(BudgetExceededError):
            ledger.reserve([key_of(50)], limits=Limits(max_calls=11), **terms)
        with pytest.warns(RuntimeWarning, match="made anew"):
            ledger.reserve([key_of(50)], limits=Limits(max_calls=12), **terms)
        assert verify(ledger).sound


@pytest.mark.parametrize("state", ["reserved", "sent"])
def test_giving_up_a_damaged_call_takes_nothing_from_the_sums(tmp_path: Path, state: str) -> None:
    path = tmp_path / "l.db"
    terms: dict[str, Any] = {"run": "r", "stage": "s", "role": "target", "model": "m", "currency": "USD"}
    with Ledger(path) as ledger:
        calls = ledger.reserve([key_of(0), key_of(1)], tokens=[50, 50], money=[PICO, PICO], **terms)
        ledger.mark_sent(calls if state == "sent" else calls[:1])
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TRIGGER attempt_on")
            connection.execute(
                "UPDATE attempt SET estimate = 1 << 40, allowance = 1 << 50 WHERE id = ?", calls[1:]
            )
        connection.close()
        if state == "sent":
            ledger.withdraw(calls[1:])
        else:
            ledger.release(calls[1:])
        for limits in (Limits(max_tokens=100), Limits(max_money=2)):
            with pytest.raises(BudgetExceededError):
                ledger.reserve([key_of(2)], tokens=[1], money=[1], limits=limits, **terms)


def test_sums_of_the_third_schema_get_their_totals(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    second_schema(path)
    with Ledger(path) as ledger:
        [call] = ledger.reserve([key_of(9)], run="q", stage="s", role="target", model="m")
        ledger.mark_sent([call])
        assert verify(ledger).sound
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT * FROM spent WHERE role = '' ORDER BY run").fetchall()
    connection.close()
    assert rows == [("q", "", "", "", 1, 0, 0), ("r", "", "", "", 2, 7 + 30, 5 + 9)]


@pytest.mark.skipif(sys.platform == "win32", reason="no lock tells who has the file open")
def test_a_file_that_an_earlier_version_works_with_is_not_migrated(tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / "l.db"
    second_schema(path)
    handle = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(handle, fcntl.LOCK_SH)
    try:
        with pytest.raises(LedgerError, match="schema 2, and a process of an earlier version has it open"):
            Ledger(path)
    finally:
        os.close(handle)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()
    assert not list(tmp_path.glob("*.backup*"))
    with Ledger(path) as ledger:
        assert verify(ledger).sound


def test_others_go_on_while_damaged_calls_are_set_aside(tmp_path: Path) -> None:
    """The table is made anew then, under the hands of whoever has the file open."""
    path = tmp_path / "l.db"
    ids = fill(path)
    with Ledger(path) as one, Ledger(path) as other:
        assert other.totals(run="r").done == N // 2
        [mine] = other.reserve([key_of(50)], run="r", stage="s", role="target", model="m")
        other.mark_sent([mine])
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE attempt SET model = 'n' WHERE id = ?", (ids[0],))
        connection.close()
        with pytest.warns(RuntimeWarning, match="1 calls in"):
            assert one.totals(run="r").done == N // 2 - 1
        other.record([Answer(mine, key_of(50), "{}", Usage(5, 1))])
        [later] = other.reserve([key_of(51)], run="r", stage="s", role="target", model="m")
        assert later == mine + 1
        assert one.totals(run="r").done == N // 2
        with pytest.raises(BudgetExceededError):
            other.reserve([key_of(52)], run="r", stage="s", role="target", model="m", limits=Limits(N))
