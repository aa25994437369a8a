"""kill -9 at chosen and at random moments: what was acknowledged is there, and nothing is bought twice.

A child asks a batch through the meter. Its fake backend writes a line to a *bill* for every request that
leaves, as a provider would, and a line to a list of *acknowledged* keys when the meter comes back for the
next block. Both are synced to disk, so they survive the child.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from proxyprompt.backends.base import ScoreRequest
from proxyprompt.ledger import Ledger, request_key

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")

TOTAL, BLOCK = 240, 4

CHILD = """
import json, os, signal, sys, time
from proxyprompt import _ledger_file
from proxyprompt.backends.base import ScoreRequest, ScoreResult, Usage
from proxyprompt.ledger import Ledger, request_key
from proxyprompt.metering import Meter

folder, first, last, block, point, when, pause = sys.argv[1:]
first, last, block, when, pause = int(first), int(last), int(block), int(when), float(pause)
IDENTITY = {"model": "fake"}
reached = 0


def here(name):
    global reached
    if name == point:
        reached += 1
        if reached == when:
            os.kill(os.getpid(), signal.SIGKILL)


def note(name, keys):
    file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, "".join(key + "\\n" for key in keys).encode())
    os.fsync(file)
    os.close(file)


def traced(statement):
    # SQLite calls this before it runs the statement.
    here({"BEGIN IMMEDIATE": "begin", "COMMIT": "commit"}.get(statement, ""))
    if statement.startswith("INSERT INTO response"):
        here("insert")


class Backend:
    name, identity = "fake", IDENTITY

    def score(self, requests, *, on_send=None, on_tokens=None):
        keys = [request_key(IDENTITY, "score", one, {}) for one in requests]
        for start in range(0, len(requests), block):
            chunk = range(start, min(start + block, len(requests)))
            on_send(chunk)
            here("sent")
            note("bill", [keys[i] for i in chunk])
            time.sleep(pause)
            here("answered")
            yield [(i, ScoreResult((-float(requests[i].prompt),), (), Usage(5, 1))) for i in chunk]
            here("recorded")
            note("acknowledged", [keys[i] for i in chunk])
            here("acknowledged")


fold = _ledger_file.LedgerFile.fold_wal
_ledger_file.LedgerFile.fold_wal = lambda self: (here("durable"), fold(self))
with Ledger(os.path.join(folder, "l.db")) as ledger:
    ledger._file._connection.set_trace_callback(traced)
    meter = Meter(Backend(), ledger, role="target", run="r")
    results = meter.score([ScoreRequest(str(n), ("a",)) for n in range(first, last)], stage="s")
    here("unclosed")
print(json.dumps([one.logprobs[0] for one in results]))
"""


def start(
    folder: Path, first: int, last: int, point: str = "", when: int = 0, pause: float = 0.0
) -> subprocess.Popen[str]:
    arguments = [str(folder), *map(str, (first, last, BLOCK)), point, str(when), str(pause)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def key_of(number: int) -> str:
    return request_key({"model": "fake"}, "score", ScoreRequest(str(number), ("a",)), {})


def check(folder: Path) -> int:
    """Compare the ledger with the outside world; return the number of answers."""
    acknowledged, billed = lines(folder / "acknowledged"), Counter(lines(folder / "bill"))
    with Ledger(folder / "l.db") as ledger:
        found = ledger.lookup([key_of(number) for number in range(TOTAL)], strict=True)
        totals = ledger.totals()
    assert len(acknowledged) == len(set(acknowledged)), "an acknowledged call was made again"
    assert set(acknowledged) <= set(found), "an acknowledged answer is lost"
    assert totals.open == 0
    assert totals.done == len(found), "a key was answered twice"
    # Every call on the bill is in the books. The books may list calls that died before they reached the bill.
    assert sum(billed.values()) <= totals.done + totals.unknown
    assert set(found) <= set(billed)
    return len(found)


def complete(folder: Path, first: int = 0, last: int = TOTAL) -> None:
    child = start(folder, first, last)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert json.loads(output) == [-float(number) for number in range(first, last)]


POINTS = ("sent", "answered", "recorded", "acknowledged", "durable", "begin", "commit", "insert")


def test_killed_at_every_kind_of_point_again_and_again(tmp_path: Path) -> None:
    rng = random.Random(5)
    before, unknown = 0, 0
    for point in POINTS * 4:
        child = start(tmp_path, 0, TOTAL, point, rng.randint(1, 4))
        child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL, point
        found = check(tmp_path)
        assert found >= before, point
        with Ledger(tmp_path / "l.db") as ledger:
            more = ledger.totals().unknown - unknown
            unknown += more
        assert more in (0, BLOCK), "more than the calls in flight were lost"
        before = found
    assert 0 < before < TOTAL
    complete(tmp_path)
    assert check(tmp_path) == TOTAL
    bill = len(lines(tmp_path / "bill"))
    complete(tmp_path)
    assert len(lines(tmp_path / "bill")) == bill, "the finished batch was bought again"


def test_killed_before_the_file_was_closed(tmp_path: Path) -> None:
    child = start(tmp_path, 0, 20, "unclosed", 1)
    child.communicate(timeout=60)
    assert check(tmp_path) == 20


def test_killed_at_random_moments_while_another_process_writes(tmp_path: Path) -> None:
    rng = random.Random(6)
    half = TOTAL // 2
    for _ in range(4):
        children = [
            start(tmp_path, 0, half, pause=0.005),
            start(tmp_path, half, TOTAL, pause=0.005),
        ]
        time.sleep(0.25 + rng.random() * 0.3)
        for child in children:
            child.kill()
            child.communicate(timeout=60)
        check(tmp_path)
    complete(tmp_path)
    assert check(tmp_path) == TOTAL
