"""A run against a real server, through the real SDK, killed or interrupted: the provider's bill is in the books."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from proxyprompt.ledger import Ledger

from .harness import BLOCK, Workshop
from .proxy import PASS, Fault, FaultProxy

LAST = 60


def _slowly(exchange: object) -> None:
    time.sleep(0.01)
    PASS.act(exchange)  # type: ignore[arg-type]


SLOW = Fault("slow", _slowly, billed=True, told=True)


@pytest.mark.parametrize("sign", ["SIGKILL", "SIGINT"])
def test_stopped_at_random_moments(
    remote_shop: Workshop, proxy: FaultProxy, tmp_path: Path, sign: str, tally: Counter[str], long: bool
) -> None:
    rng = random.Random(21)
    proxy.plan = lambda request, arrival: SLOW
    whole = tmp_path / "whole"
    child = remote_shop.start(whole / "l.db", whole / "notes", 0, LAST, url=proxy.url)
    assert child.wait() == 0, child.told()
    undisturbed = child.told()["results"]
    assert all(error is None for _, _, error, _ in undisturbed)
    wanted, round_ = 120 if long else 8, 0
    while tally["stops"] < wanted:
        folder, stops = tmp_path / str(round_), 0
        proxy.bill.clear()
        while True:
            child = remote_shop.start(folder / "l.db", folder / "notes", 0, LAST, url=proxy.url)
            time.sleep(0.05 + rng.random() * 0.3)
            child.signal(signal.Signals[sign])
            status = child.wait()
            if status == 0:
                break
            assert status == (-signal.SIGKILL if sign == "SIGKILL" else 130), child.told()
            stops += 1
            _books_cover_the_bill(folder / "l.db", proxy, stops)
        assert child.told()["results"] == undisturbed
        _books_cover_the_bill(folder / "l.db", proxy, stops)
        assert len(proxy.bill) - LAST <= stops * BLOCK, "more than the calls in flight were bought again"
        tally["stops"] += stops
        tally["calls on the bill"] += len(proxy.bill)
        tally["bought again"] += len(proxy.bill) - LAST
        shutil.rmtree(folder)
        round_ += 1


def _books_cover_the_bill(path: Path, proxy: FaultProxy, stops: int) -> None:
    deadline = time.monotonic() + 10
    while proxy.running:  # calls of the dead process that the server is still at work on
        assert time.monotonic() < deadline
        time.sleep(0.002)
    with Ledger(path) as ledger:
        totals = ledger.totals()
    assert totals.open == 0
    assert totals.failed == 0
    assert totals.unknown <= stops * BLOCK
    assert len(proxy.bill) <= totals.done + totals.unknown
