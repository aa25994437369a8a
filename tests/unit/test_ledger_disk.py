"""When what is written is on the disk, who waits for it, and what happens when the disk refuses."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from proxyprompt import _ledger_sync
from proxyprompt._ledger_calls import change, learn_seal
from proxyprompt._ledger_owners import birth_of
from proxyprompt.backends.base import ScoreRequest, ScoreResult, announce_soon, may_leave
from proxyprompt.errors import LedgerError
from proxyprompt.ledger import Answer, Leaving, Ledger, request_key
from proxyprompt.metering import Meter

COMMON: Any = {"run": "r", "stage": "s", "role": "target", "model": "m"}


def keys_of(n: int) -> list[str]:
    return [request_key({}, "score", ScoreRequest(str(i), ()), {}) for i in range(n)]


class Disk:
    """Stands between the ledger and the disk: counts, holds flushes up, refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushes = 0
        self.open = threading.Event()
        self.open.set()
        self.broken = False
        real = _ledger_sync._flush_to_disk

        def flush(handle: int) -> None:
            assert self.open.wait(20)
            self.flushes += 1
            if self.broken:
                raise OSError(5, "Input/output error")
            real(handle)

        monkeypatch.setattr(_ledger_sync, "_flush_to_disk", flush)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def ledger(tmp_path: Path, disk: Disk) -> Iterator[Ledger]:
    with Ledger(tmp_path / "l.db") as one:
        disk.flushes = 0
        yield one


def test_who_waits_for_the_disk(ledger: Ledger, disk: Disk) -> None:
    first, second, third = keys_of(3)
    ids = ledger.reserve([first, second], **COMMON)
    ids += list(ledger.claim([third], **COMMON).attempts.values())
    assert disk.flushes == 0  # nothing of it may leave before it is marked as sent
    ledger.mark_sent(ids)
    assert disk.flushes == 1
    ledger.record([Answer(ids[0], first, "{}")])
    assert disk.flushes == 2
    ticket, _ = ledger.write([Answer(ids[1], second, "{}")])
    assert (disk.flushes, ledger.on_disk(ticket)) == (2, False)
    assert second in ledger.lookup([second])  # handed on: so it is on the disk now
    assert (disk.flushes, ledger.on_disk(ticket)) == (3, True)


def test_writing_goes_on_while_the_disk_is_busy_and_one_flush_serves_all(ledger: Ledger, disk: Disk) -> None:
    ids = ledger.reserve(keys_of(32), **COMMON)
    disk.open.clear()
    with ThreadPoolExecutor(32) as pool:
        waiting = [pool.submit(ledger.mark_sent, [number]) for number in ids]
        deadline = time.monotonic() + 20
        while ledger.totals().open and _states(ledger).get("sent", 0) < 32:
            assert time.monotonic() < deadline, "a write waits for the disk"
            time.sleep(0.002)
        assert not any(one.done() for one in waiting)
        disk.open.set()
        for one in waiting:
            one.result(20)
    assert disk.flushes <= 2  # the one that was held up, and one for all who came after it had begun


def _states(ledger: Ledger) -> dict[str, int]:
    with ledger._file.use("read") as connection:
        return dict(connection.execute("SELECT state, count(*) FROM attempt GROUP BY state").fetchall())


def test_after_a_flush_that_failed_nothing_is_taken_to_be_on_the_disk(ledger: Ledger, disk: Disk) -> None:
    """The kernel may forget the pages and report success the next time."""
    _, second = ledger.reserve(keys_of(2), **COMMON)
    ticket, _ = ledger.write(())
    disk.broken = True
    ledger.flush_soon(ticket)
    with pytest.raises(LedgerError, match="could not be flushed to the disk"):
        ledger.wait_for_disk(ticket)
    disk.broken = False
    with pytest.raises(LedgerError, match="Input/output error"):
        ledger.mark_sent([second])
    with pytest.raises(LedgerError, match="could not be flushed"):
        ledger.on_disk(ticket)


def test_another_connections_new_log_is_flushed_and_not_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(_ledger_sync, "_flush_to_disk", lambda handle: seen.append(os.fstat(handle).st_ino))
    with Ledger(tmp_path / "l.db") as ledger:
        ids = ledger.reserve(keys_of(2), **COMMON)
        ledger.mark_sent(ids[:1])
        with ledger.rewriting():  # folds the log in and begins a new one
            pass
        before = seen[-1]
        ledger.mark_sent(ids[1:])
        assert seen[-1] == (tmp_path / "l.db-wal").stat().st_ino != before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_child_flushes_for_itself(ledger: Ledger, disk: Disk) -> None:
    ids = ledger.reserve(keys_of(2), **COMMON)
    ticket, _ = ledger.write(())
    ledger.flush_soon(ticket)  # the thread stays with the parent
    child = os.fork()
    if not child:
        status = 1
        try:
            mine = ledger.reserve(keys_of(3)[2:], **COMMON)
            ledger.mark_sent(mine)
            again, _ = ledger.write((), left=mine)
            ledger.flush_soon(again)
            ledger.wait_for_disk(again)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ledger.mark_sent(ids)
    assert _states(ledger)["sent"] >= 2


class Eager:
    """Two calls in flight, two marked ahead; answers faster than the disk."""

    name, identity = "eager", {"model": "eager"}

    def __init__(self, left: list[int]) -> None:
        self.left = left

    def score(self, requests: Any, *, on_send: Any = None, on_tokens: Any = None) -> Iterator[Any]:
        announce_soon(on_send, [2, 3])
        on_send([0, 1])
        self.left += [0, 1]
        for index in range(len(requests)):
            announce_soon(on_send, list(range(len(self.left), min(len(self.left) + 3, len(requests)))))
            yield [(index, ScoreResult((-1.0,), (False,)))]
            following = len(self.left)
            if following < len(requests):
                on_send([following])
                self.left.append(following)


def test_what_is_marked_ahead_leaves_while_the_disk_is_busy_and_nothing_else_does(
    ledger: Ledger, disk: Disk
) -> None:
    handed: list[int] = []
    left: list[int] = []
    requests = [ScoreRequest(str(n), ("a",)) for n in range(8)]

    class Watched(Eager):
        def score(self, requests: Any, *, on_send: Any = None, on_tokens: Any = None) -> Iterator[Any]:
            blocks = super().score(requests, on_send=on_send, on_tokens=on_tokens)
            first = next(blocks)
            deadline = time.monotonic() + 20
            while not (may_leave(on_send, 2) and may_leave(on_send, 3)):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            disk.open.clear()
            yield first
            yield from blocks

    meter = Meter(Watched(left), ledger, role="target", run="r")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(meter.score, requests, stage="s", progress=lambda done, _: handed.append(done))
        try:
            deadline = time.monotonic() + 20
            while _states(ledger).get("done", 0) < 3:
                assert time.monotonic() < deadline, "a call that was marked on the disk waits for it"
                time.sleep(0.002)
            time.sleep(0.1)
            # Three answers are written and two more calls have left; the next one is marked, but not on the disk.
            assert left == [0, 1, 2, 3]
            assert handed == [0], "an answer was handed on before it was on the disk"
            assert not future.done()
        finally:
            disk.open.set()
        assert len(future.result(20)) == 8
    assert handed[-1] == 8
    assert ledger.totals().done == 8
    assert _states(ledger) == {"done": 8}


def test_what_is_marked_ahead_counts_by_who_died(tmp_path: Path) -> None:
    """Given up: never made. Its process gone: never made. The machine gone: nobody knows, so it is spent."""
    path = tmp_path / "l.db"
    with Ledger(path) as ledger:
        ids = ledger.reserve(keys_of(4), **COMMON)
        ticket, marked = ledger.write((), leaving=[Leaving(ids[:3], ahead=True)])
        assert marked == 1
        ledger.wait_for_disk(ticket)
        ledger.release(ids[:1])
        assert _states(ledger) == {"sent": 2, "reserved": 1}
        ledger.write((), left=ids[1:2])  # this one leaves
        copies = []
        for name, boot in (("killed", birth_of(os.getpid()).split("/")[0]), ("cut", "another")):
            copies.append(tmp_path / f"{name}.db")
            with ledger._file.use("read") as connection:
                connection.execute("VACUUM INTO ?", (str(copies[-1]),))
            with sqlite3.connect(copies[-1]) as other:
                learn_seal(other)
                other.execute(change("id > 0", pid="999999999", born=f"'{boot}/1'"))
            other.close()
    for copy, left in zip(copies, ({"unknown": 1}, {"unknown": 2}), strict=True):
        with Ledger(copy) as ledger:
            assert _states(ledger) == left


def test_calls_of_another_container_are_left_alone(tmp_path: Path) -> None:
    """Of the same host's name, but with process numbers of its own: whoever looks from here finds nobody."""
    path = tmp_path / "l.db"
    with Ledger(path) as theirs, Ledger(path) as ours:
        ids = theirs.reserve(keys_of(3), **COMMON)
        theirs.write((), leaving=[Leaving(ids[:1], ahead=True)])
        boot, ticks, _ = birth_of(os.getpid()).split("/")
        with theirs.transaction() as connection:
            connection.execute(change("id > 0", pid="999999999", born=f"'{boot}/{ticks}/1'"))
        claim = ours.claim(keys_of(3), **COMMON)
        assert (dict(claim.attempts), claim.held) == ({}, (0, 1, 2))
        theirs.write((), left=ids[:1])
        theirs.mark_sent(ids[1:])
    # Alone, nobody can be at work any more.
    with Ledger(path) as ledger:
        assert _states(ledger) == {"unknown": 3}


def test_a_call_whose_mark_is_gone_does_not_leave(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        ids = ledger.reserve(keys_of(2), **COMMON)
        ledger.write((), leaving=[Leaving(ids, ahead=True)])
        ledger.release(ids[:1])
        with pytest.raises(LedgerError, match="no matching attempt"):
            ledger.write((), left=ids)
