"""Power cuts: of the write-ahead log only what was flushed is left, and what came after it in part or not at all.

A killed process leaves its pages to the kernel, which is why a cut has to be acted: the child notes how long the log was
when each flush began, and after its death the log is cut anywhere behind that. The rows that it left open are given
to another boot of the machine, as after a real one.
"""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest

from proxyprompt._ledger_calls import change, learn_seal
from proxyprompt.ledger import Ledger

from .harness import BLOCK, RESERVE, Workshop, key_of, numbers

LAST = 20 * BLOCK


def _cut(folder: Path, rng: random.Random) -> bool:
    """Take from the log what no flush covered; whether there was anything to take."""
    flushed = max(numbers(folder / "notes" / "flushed"))
    wal = folder / "l.db-wal"
    if not wal.exists():  # it had come to its end and closed the file
        return False
    size = wal.stat().st_size
    keep = rng.choice([flushed, rng.randint(flushed, size)])
    with wal.open("r+b") as file:
        file.truncate(keep)
        if rng.random() < 0.5:  # the file had grown, its pages had not arrived
            file.truncate(size)
    (folder / "l.db-shm").unlink(missing_ok=True)  # memory
    with sqlite3.connect(folder / "l.db") as connection:
        learn_seal(connection)
        connection.execute(change("state IN ('reserved', 'sent')", born="'another-boot'"))
    connection.close()
    return keep < size


@pytest.mark.parametrize("reserve", [0, RESERVE])
def test_the_power_goes_at_random_moments(
    shop: Workshop, tmp_path: Path, tally: Counter[str], long: bool, reserve: int
) -> None:
    """On a real disk. What was sent is in the books, what was handed on is there, and few calls are bought again."""
    rng = random.Random(31 + reserve)
    round_ = took = 0
    while took < (150 if long else 12):
        folder, cuts, handed = tmp_path / str(round_), 0, 0
        round_ += 1
        while True:
            options = {"seed": round_, "reserve": reserve}
            if rng.random() < 0.5:
                # Answers faster than any disk, and the end right after one of them.
                when = rng.randint(1, LAST)
                child = shop.start(
                    folder / "l.db", folder / "notes", 0, LAST, when=when, only="answered", **options
                )
            else:
                child = shop.start(folder / "l.db", folder / "notes", 0, LAST, pause=0.002, **options)
                time.sleep(0.03 + rng.random() * 0.1)
                child.signal(signal.SIGKILL)
            if child.wait() == 0:
                break
            if not numbers(folder / "notes" / "flushed"):
                continue  # it had sent nothing
            took += _cut(folder, rng)
            cuts += 1
            billed = Counter(numbers(folder / "notes" / "bill"))
            handed = max(numbers(folder / "notes" / "handed"), default=0)
            with Ledger(folder / "l.db") as ledger:
                stored = ledger.lookup([key_of(number) for number in range(LAST)], strict=True)
                totals = ledger.totals()
                with ledger.transaction() as connection:
                    query = (
                        "SELECT key, count(*) FROM attempt WHERE state IN ('done', 'unknown') GROUP BY key"
                    )
                    known = dict(connection.execute(query).fetchall())
            assert totals.open == 0
            assert handed <= len(stored), "an answer that was handed on is gone"
            for number, times in billed.items():
                books = known.get(bytes.fromhex(key_of(number)), 0)
                assert times <= books, "a call was sent that the books do not know"
            # In flight, waiting for the flush, marked ahead: a flush lasts as long as a few answers here.
            assert totals.unknown <= cuts * (2 * BLOCK + reserve)
            if not reserve:
                assert set(numbers(folder / "notes" / "acknowledged")) <= {
                    number for number in range(LAST) if key_of(number) in stored
                }
            (folder / "notes" / "flushed").unlink()
        assert child.told()["results"], "the survivor did not finish"
        tally["cuts"] += cuts
        tally["bought again"] += len(numbers(folder / "notes" / "bill")) - LAST
        shutil.rmtree(folder)
    tally["cuts that took something"] += took
