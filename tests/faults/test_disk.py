"""Disks that are full, closed to writing, or out of descriptors: a typed error *before* the next paid call."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .harness import BLOCK, Workshop, check, complete, numbers

LAST = 10 * BLOCK


def _stopped(shop: Workshop, folder: Path, notes: Path, **options: object) -> str:
    """Run a child that cannot write for long; return the name of its error ("" if it came to the end)."""
    child = shop.start(folder / "l.db", notes, 0, LAST, **options)
    status = child.wait()
    told = child.told()
    assert status in (0, 3), told
    if status == 3:
        assert told["error"] in ("LedgerError", "LedgerCorruptError"), told
        assert str(folder) in told["message"], "the message does not say which ledger"
    return str(told.get("error", ""))


def _nothing_lost(shop: Workshop, folder: Path, notes: Path) -> None:
    """With room again: all there, at most the block in flight bought again."""
    books = check(folder / "l.db", notes, LAST)
    assert books.billed - len(books.found) <= BLOCK, "it went on buying what it could not store"
    complete(shop, folder / "l.db", notes, LAST)
    assert len(numbers(notes / "bill")) <= LAST + BLOCK


def test_files_that_may_not_grow(shop: Workshop, memory: Path, tally: Counter[str], long: bool) -> None:
    """The limit strikes in the database, its log or its index, wherever it comes first."""
    whole = memory / "whole"
    assert _stopped(shop, whole, whole / "notes") == ""
    biggest = sum(path.stat().st_size for path in whole.iterdir() if path.is_file()) * 3
    rng = random.Random(7)
    for _ in range(200 if long else 15):
        folder, notes = memory / "small", memory / "small-notes"
        error = _stopped(shop, folder, notes, file_limit=rng.randint(1, 1 + biggest))
        tally["stopped" if error else "came to the end"] += 1
        _nothing_lost(shop, folder, notes)
        shutil.rmtree(folder)
        shutil.rmtree(notes)
    assert tally["stopped"] >= 5


@contextmanager
def _small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[], object] | None]:
    """Mount one where this user may; yields how to enlarge it, else ``None``."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k,mode=0700", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], capture_output=True).returncode == 0
    if not mounted:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up(shop: Workshop, tmp_path: Path, tally: Counter[str], long: bool) -> None:
    """A real small file system where one may be mounted, else ballast up to the file size limit."""
    for trial in range(60 if long else 6):
        folder, notes = tmp_path / f"disk-{trial}", tmp_path / f"notes-{trial}"
        size = 56 + 12 * (trial % 20)
        with _small_disk(folder, size) as enlarge:
            limit = 0 if enlarge else size * 1024
            error = _stopped(shop, folder, notes, file_limit=limit)
            tally["mounted" if enlarge else "limited"] += 1
            tally["stopped" if error else "came to the end"] += 1
            if enlarge:
                enlarge()
            _nothing_lost(shop, folder, notes)
    assert tally["stopped"] >= 3


def test_too_few_descriptors(shop: Workshop, tmp_path: Path, tally: Counter[str]) -> None:
    for descriptors in range(8, 18):  # the child itself needs seven
        folder, notes = tmp_path / str(descriptors), tmp_path / f"notes-{descriptors}"
        notes.mkdir()
        error = _stopped(shop, folder, notes, descriptors=descriptors)
        tally["stopped" if error else "came to the end"] += 1
        _nothing_lost(shop, folder, notes)
    assert tally["stopped"] >= 2
    assert tally["came to the end"] >= 1


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that a process without privileges can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("case", ["folder", "folder with a ledger", "file", "a folder in its place"])
def test_what_may_not_be_written_buys_nothing(
    shop: Workshop, public: Path, tmp_path: Path, case: str, tally: Counter[str]
) -> None:
    folder, notes = public / "ledgers", public / "notes"
    path = folder / "l.db"
    nobody = os.geteuid() == 0  # root may write anywhere
    before = 0
    if case in ("folder with a ledger", "file"):
        assert shop.start(path, notes, 0, BLOCK).wait() == 0
        before = BLOCK
    elif case == "folder":
        folder.mkdir()
    else:
        path.mkdir(parents=True)
    notes.mkdir(exist_ok=True)
    if nobody:
        for each in (folder, notes, *folder.iterdir(), *notes.iterdir()):
            os.chown(each, 65534, 65534)
    if case == "file":
        path.chmod(0o400)
    if case.startswith("folder"):
        folder.chmod(0o500)
    child = shop.start(path, notes, 0, LAST, nobody=nobody)
    assert child.wait() == 3, child.told()
    told = child.told()
    assert told["error"] == "LedgerError", told
    assert str(path) in told["message"]
    assert len(numbers(notes / "bill")) == before, "bought what could not be stored"
    tally[case] += 1
    folder.chmod(0o700)
