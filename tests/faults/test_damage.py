"""Damage on disk: no flipped bit, lost page or old log ever turns into an answer that nobody gave."""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from proxyprompt.errors import BackendError, LedgerCorruptError, LedgerError
from proxyprompt.ledger import Ledger
from proxyprompt.ledger_care import verify
from proxyprompt.metering import Meter

from .harness import Silent, Workshop, key_of, request_of, same

LAST = 40


@pytest.fixture
def closed(shop: Workshop, memory: Path) -> Path:
    """A folder with a finished ledger: everything in one file."""
    assert shop.start(memory / "good" / "l.db", memory / "notes", 0, LAST).wait() == 0
    return memory / "good"


@pytest.fixture
def abandoned(shop: Workshop, memory: Path) -> Path:
    """A folder with a killed process's ledger: most of it in the log."""
    child = shop.start(memory / "killed" / "l.db", memory / "notes", 0, LAST, when=1, only="unclosed")
    assert child.wait() == -9
    assert (memory / "killed" / "l.db-wal").stat().st_size > 50_000
    return memory / "killed"


def _read(path: Path) -> str:
    """Ask for everything; returns what came of it. A wrong value fails the test."""
    served = 0
    try:
        with warnings.catch_warnings(), Ledger(path, create=False) as ledger:
            warnings.simplefilter("ignore", RuntimeWarning)
            for number in range(LAST):
                meter = Meter(Silent(), ledger, role="proxy", run="check", patience=20)  # type: ignore[arg-type]
                started = time.monotonic()
                try:
                    [result] = meter.score([request_of(number)], stage="s")
                except BackendError:
                    # Not there: it would be bought anew, and at once.
                    assert time.monotonic() - started < 10, "waited for somebody who is not there"
                    continue
                assert same(result, number), f"a wrong answer to {number} was served"
                served += 1
            intact = ledger.lookup([key_of(number) for number in range(LAST)])
            # A damaged index hides good rows until the first damaged row has it rebuilt.
            assert len(intact) >= served, "reading lost what was there"
            ledger.totals()
            ledger.runs()
    except LedgerError as error:
        return type(error).__name__ if str(path) in str(error) else f"an error without a path: {error}"
    return "all served" if served == LAST else "the damaged rows asked anew"


def _often(
    folder: Path, damage: Callable[[Path, random.Random], None], times: int, tally: Counter[str]
) -> None:
    rng = random.Random(3)
    for _ in range(times):
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        damage(copy, rng)
        outcome = _read(copy / "l.db")
        assert "without a path" not in outcome
        tally[outcome] += 1
        tally["injected"] += 1
        shutil.rmtree(copy)


def _flip(name: str) -> Callable[[Path, random.Random], None]:
    def flip(folder: Path, rng: random.Random) -> None:
        data = bytearray((folder / name).read_bytes())
        at = rng.randrange(len(data) * 8)
        data[at // 8] ^= 1 << at % 8
        (folder / name).write_bytes(data)

    return flip


def _zero_a_page(folder: Path, rng: random.Random) -> None:
    with (folder / "l.db").open("r+b") as file:
        pages = file.seek(0, 2) // 4096
        file.seek(4096 * rng.randrange(pages))
        file.write(bytes(4096))


def _swap_pages(folder: Path, rng: random.Random) -> None:
    data = (folder / "l.db").read_bytes()
    pages = [data[k : k + 4096] for k in range(0, len(data), 4096)]
    a, b = rng.sample(range(1, len(pages)), 2)
    pages[a], pages[b] = pages[b], pages[a]
    (folder / "l.db").write_bytes(b"".join(pages))


def _truncate(folder: Path, rng: random.Random) -> None:
    with (folder / "l.db").open("r+b") as file:
        file.truncate(rng.randrange(file.seek(0, 2)))


def _swap_answers(folder: Path, rng: random.Random) -> None:
    """Two answers change places, hashes and all but their keys."""
    one, other = (bytes.fromhex(key_of(number)) for number in rng.sample(range(LAST), 2))
    columns = [
        c for c in ("body", "prompt_tokens", "model_returned", "sha256", "created_at") if rng.random() < 0.9
    ]
    columns = columns or ["body"]
    with sqlite3.connect(folder / "l.db") as connection:
        query = f"SELECT {', '.join(columns)} FROM response WHERE key = ?"
        rows = [connection.execute(query, (key,)).fetchone() for key in (one, other)]
        for key, row in zip((other, one), rows, strict=True):
            marks = ", ".join(f"{column} = ?" for column in columns)
            connection.execute(f"UPDATE response SET {marks} WHERE key = ?", (*row, key))
    connection.close()


def _books(path: Path) -> object:
    """Totals of all calls, or None where the ledger says that something is wrong with them."""
    try:
        with warnings.catch_warnings(), Ledger(path, create=False) as ledger:
            warnings.simplefilter("ignore", RuntimeWarning)
            found = ledger.totals(), [(one.run, one.totals) for one in ledger.runs()]
            return None if ledger.quarantined or not verify(ledger).sound else found
    except LedgerError:
        return None


def test_one_bit_of_the_books(closed: Path, tally: Counter[str], long: bool) -> None:
    """Flips in the pages that hold calls and their sums: counted as they were, or said to be damaged."""
    truth = _books(closed / "l.db")
    assert truth is not None
    with sqlite3.connect(closed / "l.db") as connection:
        root, size = connection.execute(
            "SELECT rootpage, (SELECT page_size FROM pragma_page_size) FROM sqlite_master WHERE name = 'attempt'"
        ).fetchone()
        marks = [bytes(row[0]) for row in connection.execute("SELECT sha256 FROM attempt")]
    connection.close()
    whole = (closed / "l.db").read_bytes()
    pages = sorted({whole.index(mark) // size for mark in marks} | {root - 1})
    rng = random.Random(4)
    for _ in range(2000 if long else 150):
        data = bytearray(whole)
        at = rng.choice(pages) * size * 8 + rng.randrange(size * 8)
        data[at // 8] ^= 1 << at % 8
        copy = closed.with_name("books")
        copy.mkdir(mode=0o700)
        (copy / "l.db").write_bytes(data)
        found = _books(copy / "l.db")
        assert found in (None, truth), "calls, tokens or money changed unnoticed"
        tally["noticed" if found is None else "no matter"] += 1
        tally["injected"] += 1
        shutil.rmtree(copy)
    assert tally["noticed"] > tally["injected"] / 5


def _parts(path: Path) -> tuple[int, list[str]]:
    """The last number given to a call, and the names of the table of calls, its indexes and triggers."""
    with sqlite3.connect(path) as connection:
        names = connection.execute(
            "SELECT name FROM sqlite_master WHERE tbl_name = 'attempt' ORDER BY 1"
        ).fetchall()
        [(last,)] = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'attempt'").fetchall()
    connection.close()
    return last, [name for (name,) in names]


def test_one_bit_of_the_number_of_a_call(closed: Path, tally: Counter[str], long: bool) -> None:
    """Its row then stands where no search finds it; it is set aside all the same, and the others are as they were."""
    with Ledger(closed / "l.db", create=False) as ledger:
        truth = ledger.totals()
    last, names = _parts(closed / "l.db")
    with sqlite3.connect(closed / "l.db") as connection:
        places = connection.execute("SELECT id, sha256 FROM attempt").fetchall()
        tokens = dict(connection.execute("SELECT id, prompt_tokens FROM attempt"))
        size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.close()
    whole = (closed / "l.db").read_bytes()
    # A row of a page: its length in two bytes, its number in one, the length of the list of types, then the types.
    heads = []
    for start in {whole.index(mark) // size * size for _, mark in places}:
        n_rows = int.from_bytes(whole[start + 3 : start + 5])
        heads += [
            start + int.from_bytes(whole[start + k : start + k + 2]) for k in range(8, 8 + 2 * n_rows, 2)
        ]
    assert sorted(whole[head + 2] for head in heads) == [number for number, _ in places]
    for head in heads if long else heads[::5]:
        for bit in range(16):
            data = bytearray(whole)
            data[head + 2 + bit // 8] ^= 1 << bit % 8
            copy = closed.with_name("numbers")
            copy.mkdir(mode=0o700)
            (copy / "l.db").write_bytes(data)
            tally["injected"] += 1
            with warnings.catch_warnings(), Ledger(copy / "l.db", create=False) as ledger:
                warnings.simplefilter("ignore", RuntimeWarning)
                try:
                    left = ledger.totals()
                except LedgerCorruptError:  # the list of types may now be longer than the row
                    assert bit > 6
                    tally["LedgerCorruptError"] += 1
                    shutil.rmtree(copy)
                    continue
                assert ledger.quarantined == 1
                assert left.done + left.failed + left.unknown == truth.done + truth.failed + truth.unknown - 1
                assert truth.prompt_tokens - left.prompt_tokens == tokens[whole[head + 2]]
                problems = [one.problem for one in verify(ledger).damage if one.table in ("file", "attempt")]
                assert problems == []
                numbers = ledger.reserve([key_of(0)], run="r", stage="s", role="proxy", model="m")
                assert numbers == [last + 1]
                ledger.mark_sent(numbers)
                assert ledger.totals(run="r").open == 1
            assert _parts(copy / "l.db") == (last + 1, names)
            tally["set aside"] += 1
            shutil.rmtree(copy)


def test_one_bit_of_the_file(closed: Path, tally: Counter[str], long: bool) -> None:
    _often(closed, _flip("l.db"), 4000 if long else 200, tally)
    assert tally["the damaged rows asked anew"] > tally["injected"] / 10


def test_one_bit_of_the_log(abandoned: Path, tally: Counter[str], long: bool) -> None:
    _often(abandoned, _flip("l.db-wal"), 1200 if long else 60, tally)


@pytest.mark.parametrize("damage", [_zero_a_page, _swap_pages, _truncate, _swap_answers])
def test_whole_pages_and_rows(
    closed: Path, damage: Callable[[Path, random.Random], None], tally: Counter[str], long: bool
) -> None:
    _often(closed, damage, 200 if long else 15, tally)
    if damage is _swap_answers:
        assert tally["all served"] == 0


def test_a_log_that_is_gone_or_older(abandoned: Path, closed: Path, tally: Counter[str], long: bool) -> None:
    other = _flip("l.db-wal")

    def damage(folder: Path, rng: random.Random) -> None:
        log = folder / "l.db-wal"
        match rng.randrange(3):
            case 0:
                log.unlink()
            case 1:
                log.write_bytes(log.read_bytes()[: rng.randrange(log.stat().st_size)])
            case _:  # the log of another file
                shutil.copy(closed / "l.db", folder / "l.db")
                other(folder, rng)

    _often(abandoned, damage, 200 if long else 20, tally)
