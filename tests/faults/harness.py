"""The test's side of ``worker.py``: start and kill children, and compare the ledger with the outside world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxyprompt.backends.base import ScoreResult
from proxyprompt.errors import BackendError
from proxyprompt.ledger import Ledger, request_key
from proxyprompt.metering import Meter

from .worker import IDENTITY, answer_to, request_of

BLOCK = 4
"""Calls in flight in one child."""

RESERVE = 2
"""Calls that a child which says what leaves next has marked ahead."""


class Workshop:
    """One worker process, and the children it forks; ``modules`` are imported before the first fork."""

    def __init__(self, *modules: str) -> None:
        script = Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _say(self, line: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, ledger: Path, notes: Path, first: int, last: int, **options: Any) -> Child:
        """Fork a child that buys ``first`` to ``last``; see ``worker.run`` for the options."""
        notes.mkdir(parents=True, exist_ok=True)
        job = {"ledger": str(ledger), "notes": str(notes), "first": first, "last": last, "block": BLOCK}
        job |= {"pause": 0.0, "seed": 0, "order": 0, "when": 0, "sign": "SIGKILL", "only": "", "limits": None}
        job |= {"file_limit": 0, "descriptors": 0, "nobody": False, "threads": 0, "url": "", "reserve": 0}
        assert options.keys() <= job.keys()
        return Child(self, self._say(job | options), notes)

    def wait(self, pid: int) -> int:
        return self._say({"wait": pid})

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@dataclass
class Child:
    """A process that buys."""

    shop: Workshop
    pid: int
    notes: Path

    def wait(self) -> int:
        """Exit status; minus the signal if it was killed."""
        return self.shop.wait(self.pid)

    def signal(self, sign: int) -> None:
        os.kill(self.pid, sign)

    def told(self) -> dict[str, Any]:
        """What it wrote on its way out."""
        told: dict[str, Any] = json.loads((self.notes / f"out-{self.pid}").read_text())
        return told


def numbers(path: Path) -> list[int]:
    """The entries of the bill, or of the list of acknowledged answers."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


KEYS: list[str] = []


def key_of(number: int) -> str:
    while len(KEYS) <= number:
        KEYS.append(request_key(IDENTITY, "score", request_of(len(KEYS)), {}))
    return KEYS[number]


def same(result: ScoreResult, number: int) -> bool:
    """Whether a result is, to the last bit, the answer to ``number``."""
    right = answer_to(number)
    return (result.logprobs, result.censored, result.usage, result.model_returned, result.error) == (
        right.logprobs,
        right.censored,
        right.usage,
        right.model_returned,
        None,
    )


class Silent:
    """Stands for the provider where nothing may be bought."""

    name, identity = "fake", IDENTITY

    def score(self, requests: Any, *, on_send: Any = None, on_tokens: Any = None) -> Any:
        raise BackendError("nothing may be bought here")


@dataclass(frozen=True)
class Books:
    """What :func:`check` found."""

    found: frozenset[int]
    unknown: int
    billed: int


def check(ledger_path: Path, notes: Path, last: int, *, bought_twice: bool = False) -> Books:
    """Hold the ledger against the bill and the list of acknowledged answers.

    ``bought_twice`` allows that two processes bought the same answer at once.
    """
    acknowledged, billed = numbers(notes / "acknowledged"), Counter(numbers(notes / "bill"))
    with Ledger(ledger_path) as ledger:
        stored = ledger.lookup([key_of(number) for number in range(last)], strict=True)
        found = frozenset(number for number in range(last) if key_of(number) in stored)
        totals = ledger.totals()
        served = Meter(Silent(), ledger, role="proxy", run="check").score(  # type: ignore[arg-type]
            [request_of(number) for number in sorted(found)], stage="check"
        )
    for number, result in zip(sorted(found), served, strict=True):
        assert same(result, number), f"a wrong answer to {number} was served"
    assert set(acknowledged) <= found, "an acknowledged answer is lost"
    if not bought_twice:
        assert len(acknowledged) == len(set(acknowledged)), "an acknowledged call was made again"
        assert totals.done == len(found), "a key was answered twice"
    assert totals.open == 0
    assert found <= set(billed), "an answer that nobody gave"
    # The books may list calls that died before they reached the bill, never the other way round.
    assert sum(billed.values()) <= totals.done + totals.unknown
    return Books(found, totals.unknown, sum(billed.values()))


def expected(first: int, last: int) -> list[Any]:
    """What an undisturbed child returns, as JSON."""
    rows = [[n, list(answer_to(n).logprobs), list(answer_to(n).censored)] for n in range(first, last)]
    return rows


def complete(shop: Workshop, ledger: Path, notes: Path, last: int) -> None:
    """Resume to the end: same values as undisturbed, bought once more only what was in flight."""
    child = shop.start(ledger, notes, 0, last)
    assert child.wait() == 0, child.told()
    assert child.told()["results"] == expected(0, last)


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    """Poll; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
