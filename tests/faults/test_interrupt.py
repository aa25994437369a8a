"""Ctrl-C at every point and at random moments: what was paid is kept, and the resumed run is the undisturbed one."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

from .harness import BLOCK, Workshop, check, complete


def test_at_every_point(shop: Workshop, memory: Path, tally: Counter[str]) -> None:
    last, when = 3 * BLOCK, 1
    while True:
        folder = memory / str(when)
        child = shop.start(folder / "l.db", folder / "notes", 0, last, when=when, sign="SIGINT")
        status = child.wait()
        if status == 0 and child.told()["points"] < when:
            break
        assert status == 130, child.told()
        tally["interrupts"] += 1
        books = check(folder / "l.db", folder / "notes", last)
        assert books.billed - len(books.found) <= BLOCK
        complete(shop, folder / "l.db", folder / "notes", last)
        books = check(folder / "l.db", folder / "notes", last)
        assert len(books.found) == last
        assert books.billed - last <= BLOCK
        shutil.rmtree(folder)
        when += 1
    assert when > 30


def test_at_random_moments(shop: Workshop, memory: Path, tally: Counter[str], long: bool) -> None:
    """One, or a second one while the first is being obeyed."""
    rng = random.Random(9)
    last, round_ = 40 * BLOCK, 0
    while tally["interrupts"] < (400 if long else 30):
        folder, stopped = memory / str(round_), 0
        while True:
            child = shop.start(
                folder / "l.db", folder / "notes", 0, last, pause=0.004, seed=tally["interrupts"]
            )
            time.sleep(0.01 + rng.random() * 0.06)
            child.signal(signal.SIGINT)
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.003)
                child.signal(signal.SIGINT)
            status = child.wait()
            if status == 0:
                break
            assert status in (5, 130), child.told()
            stopped += 1
            books = check(folder / "l.db", folder / "notes", last)
            assert books.billed - len(books.found) <= stopped * BLOCK
        tally["interrupts"] += stopped
        complete(shop, folder / "l.db", folder / "notes", last)
        assert len(check(folder / "l.db", folder / "notes", last).found) == last
        shutil.rmtree(folder)
        round_ += 1
