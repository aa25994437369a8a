"""64 callers at once, in threads and processes, against one budget: not a call too many, and none refused early."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from proxyprompt.ledger import Ledger

from .harness import Workshop, numbers
from .worker import answer_to

CALLS = 160
"""What the callers ask for in all; each one its own."""


def _race(shop: Workshop, folder: Path, processes: int, limits: dict[str, Any]) -> tuple[list[int], int]:
    """Run 64 callers; returns the numbers that were answered, and how many calls were refused."""
    each = CALLS // processes
    children = [
        shop.start(
            folder / "l.db",
            folder / "notes",
            k * each,
            (k + 1) * each,
            threads=64 // processes,
            pause=0.01,
            seed=100 * k,
            limits=limits,
        )
        for k in range(processes)
    ]
    got: list[int] = []
    refused = 0
    for child in children:
        assert child.wait() == 0, child.told()
        answered, no = child.told()["results"]
        got += answered
        refused += no
    return got, refused


@pytest.mark.parametrize("processes", [1, 8])
def test_calls(shop: Workshop, memory: Path, processes: int, tally: Counter[str], long: bool) -> None:
    for trial, cap in enumerate((0, 1, 7, 63, 64, 65, 159, 160, 161) * (20 if long else 1)):
        folder = memory / str(trial)
        got, refused = _race(shop, folder, processes, {"max_calls": cap})
        bill = numbers(folder / "notes" / "bill")
        assert len(bill) == len(got) == min(cap, CALLS)
        assert sorted(bill) == sorted(got)
        assert len(got) + refused == CALLS
        with Ledger(folder / "l.db") as ledger:
            assert ledger.totals().done == len(got)
        tally["races"] += 1
        tally["calls refused"] += refused
        tally["overspent"] += max(0, len(bill) - cap)
        shutil.rmtree(folder)


@pytest.mark.parametrize("processes", [1, 8])
def test_tokens(shop: Workshop, memory: Path, processes: int, tally: Counter[str], long: bool) -> None:
    """Tokens of a call are known when it is done; until then its upper bound is set aside."""
    usage = {n: answer_to(n).usage.prompt_tokens + answer_to(n).usage.completion_tokens for n in range(CALLS)}
    for trial, cap in enumerate((0, 400, 5_000, 20_000, 60_000) * (20 if long else 1)):
        folder = memory / str(trial)
        got, refused = _race(shop, folder, processes, {"max_tokens": cap})
        spent = sum(usage[number] for number in numbers(folder / "notes" / "bill"))
        assert spent <= cap
        assert len(got) + refused == CALLS
        tally["races"] += 1
        tally["calls refused"] += refused
        tally["overspent"] += max(0, spent - cap)
        shutil.rmtree(folder)
