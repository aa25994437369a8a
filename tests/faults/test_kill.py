"""kill -9 before and after every write, and at random moments: what was acknowledged stays, nothing is bought twice.

The children come from ``worker.py``. Each writes a line to a *bill* for every request that leaves, as a provider
would, and a line to a list of *acknowledged* answers when the meter comes back for the next block. Neither can
be undone by its death.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

from .harness import BLOCK, RESERVE, Child, Workshop, check, complete, expected


def _after_kill(shop: Workshop, folder: Path, last: int, died: int) -> None:
    """Resume what a kill left behind and compare with an undisturbed run."""
    books = check(folder / "l.db", folder / "notes", last)
    assert books.billed - len(books.found) <= died * BLOCK, "more than the calls in flight were lost"
    assert books.unknown <= died * BLOCK, "more calls are of unknown outcome than were in flight"
    complete(shop, folder / "l.db", folder / "notes", last)
    books = check(folder / "l.db", folder / "notes", last)
    assert len(books.found) == last
    assert books.billed - last <= died * BLOCK, "more than the calls in flight were bought again"


def _kill_everywhere(
    shop: Workshop, root: Path, template: Path | None, tally: Counter[str], step: int, reserve: int = 0
) -> None:
    """Kill one child at its first point, the next one at its second, ... until one survives."""
    last, died_before = 3 * BLOCK, 0 if template is None else 1
    when = 1
    while True:
        folder = root / str(when)
        if template is None:
            folder.mkdir()
        else:
            shutil.copytree(template, folder)
        child = shop.start(folder / "l.db", folder / "notes", 0, last, when=when, reserve=reserve)
        status = child.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL, child.told()
        tally["kills"] += 1
        tally[f"at {(folder / 'notes' / 'points').read_text().split(chr(10))[0]}"] += 1
        _after_kill(shop, folder, last, died_before + 1)
        shutil.rmtree(folder)
        when += step
    assert when > 40, "the child hardly passed any point"


def test_killed_at_every_point_of_a_new_ledger(shop: Workshop, memory: Path, tally: Counter[str]) -> None:
    _kill_everywhere(shop, memory, None, tally, 1)


def test_killed_at_every_point_with_calls_marked_ahead(
    shop: Workshop, memory: Path, tally: Counter[str], long: bool
) -> None:
    """What is marked and has not left is no loss: after a kill no more calls are unknown than were in flight."""
    _kill_everywhere(shop, memory, None, tally, 1 if long else 3, RESERVE)
    assert tally["at before fdatasync"]
    assert tally["at after fdatasync"]


def test_killed_at_every_point_of_a_resumed_ledger(shop: Workshop, memory: Path, tally: Counter[str]) -> None:
    """The first child dies with calls in flight; the second one dies somewhere while it repairs and goes on."""
    first = memory / "first"
    child = shop.start(first / "l.db", first / "notes", 0, 3 * BLOCK, when=2, only="answered")
    assert child.wait() == -signal.SIGKILL
    (first / "notes" / "points").unlink()
    _kill_everywhere(shop, memory, first, tally, 1)


def test_torn_writes(shop: Workshop, memory: Path, tally: Counter[str], long: bool) -> None:
    """A commit that nobody was told of yet reaches the disk in part, or with garbage at its end.

    A killed process leaves its pages to the kernel, so this stands in for a write that was under way when the
    machine stopped. It says nothing about disks that acknowledge a sync and lose it.
    """
    rng = random.Random(11)
    last = 3 * BLOCK
    real = 0
    for commit in range(2, 20):
        sizes: dict[str, int] = {}
        for moment in ("before", "after"):
            folder = memory / f"{commit}-{moment}"
            child = shop.start(
                folder / "l.db", folder / "notes", 0, last, when=commit, only=f"{moment} COMMIT"
            )
            if child.wait() == -signal.SIGKILL:
                sizes[moment] = (folder / "l.db-wal").stat().st_size
        if not sizes:
            break
        if sizes["before"] == sizes["after"]:
            continue  # it had nothing to write
        real += 1
        for trial in range(40 if long else 4):
            torn = memory / f"{commit}-torn"
            shutil.copytree(memory / f"{commit}-after", torn)
            keep = rng.randint(sizes["before"], sizes["after"] - 1)
            with (torn / "l.db-wal").open("r+b") as file:
                file.truncate(keep)
                if trial % 2:
                    file.seek(keep)
                    file.write(rng.randbytes(sizes["after"] - keep))
            tally["torn commits"] += 1
            _after_kill(shop, torn, last, 1)
            shutil.rmtree(torn)
    assert real >= 4


def test_killed_before_the_file_was_closed(shop: Workshop, tmp_path: Path) -> None:
    child = shop.start(tmp_path / "l.db", tmp_path / "notes", 0, 20, when=1, only="unclosed")
    assert child.wait() == -signal.SIGKILL
    assert len(check(tmp_path / "l.db", tmp_path / "notes", 20).found) == 20


def test_killed_at_random_moments(shop: Workshop, memory: Path, tally: Counter[str], long: bool) -> None:
    """One process after another; each goes on where the last one died."""
    rng = random.Random(5)
    kills, round_, last = 0, 0, 60 * BLOCK
    while kills < (600 if long else 40):
        folder, died = memory / str(round_), 0
        reserve = RESERVE * (round_ % 2)
        pause = 0.001 if reserve else 0.004
        while True:
            child = shop.start(
                folder / "l.db", folder / "notes", 0, last, pause=pause, seed=kills, reserve=reserve
            )
            time.sleep(rng.random() * 0.12)
            child.signal(signal.SIGKILL)
            if child.wait() == 0:
                break
            died += 1
            books = check(folder / "l.db", folder / "notes", last)
            assert books.billed - len(books.found) <= died * BLOCK
            assert books.unknown <= died * BLOCK
        kills += died
        tally["kills"] += died
        tally["answers at stake"] += last
        _after_kill(shop, folder, last, died)
        shutil.rmtree(folder)
        round_ += 1


def test_eight_processes_killed_at_random(
    shop: Workshop, memory: Path, tally: Counter[str], long: bool
) -> None:
    """Eight at a time on one ledger and one plan, each in its own order; the dead are replaced at once."""
    rng = random.Random(6)
    last, wanted, round_ = 100 * BLOCK, 600 if long else 40, 0
    while tally["kills"] < wanted:
        folder = memory / str(round_)
        children: list[Child] = []
        died = 0
        finished = False  # some child came to the end of the plan
        while not finished:
            while len(children) < 8:
                order = rng.randrange(1 << 30)
                children.append(
                    shop.start(
                        folder / "l.db", folder / "notes", 0, last, pause=0.02, order=order, seed=order
                    )
                )
            time.sleep(0.01 + rng.random() * 0.05)
            victim = children.pop(rng.randrange(8))
            victim.signal(signal.SIGKILL)
            finished = victim.wait() == 0
            died += not finished
        for child in children:  # the survivors finish the plan, whatever the dead had begun
            assert child.wait() == 0, child.told()
            assert child.told()["results"] == expected(0, last)
        books = check(folder / "l.db", folder / "notes", last, bought_twice=True)
        assert len(books.found) == last
        assert books.billed - last <= died * BLOCK, (
            "more than the calls in flight of the dead was bought again"
        )
        tally["kills"] += died
        tally["answers at stake"] += last
        tally["bought more than once"] += books.billed - last
        shutil.rmtree(folder)
        round_ += 1
