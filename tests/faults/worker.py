"""Forks children that buy a batch through the meter and may be told where to die; run as a script.

Reads one job per line from stdin and answers one line each. Everything is imported before the first fork, so a
child starts in milliseconds and thousands of them can be killed in minutes. The shipped code holds no hooks:
the child hands ``sqlite3.connect`` a connection class of its own and wraps a few functions of ``os``.
"""

from __future__ import annotations

import codecs
import importlib
import json
import os
import random
import resource
import signal
import sqlite3
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from proxyprompt.backends.base import ScoreRequest, ScoreResult, Usage, announce_soon, may_leave
from proxyprompt.errors import BudgetExceededError, ProxyPromptError
from proxyprompt.ledger import Ledger, Limits
from proxyprompt.metering import Meter

IDENTITY = {"model": "fake"}
FILLER = "The driver was late and nobody told me why. " * 40
"""Makes a row about as long as a few-shot prompt (1.8 kB)."""

_open, _write = os.open, os.write


def request_of(number: int) -> ScoreRequest:
    """The request that asks for ``number``."""
    return ScoreRequest(f"{number} {FILLER}", ("a", "b"))


def answer_to(number: int) -> ScoreResult:
    """The one right answer to it."""
    usage = Usage(400 + number % 13, 1, number % 5)
    return ScoreResult((-(number + 1) / 7, -1e-3 * number), (False, number % 3 == 0), usage, None, "fake-1")


class Notes:
    """Lists that the child's death cannot undo (the page cache outlives it): the bill, and what was acknowledged."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        names = ("bill", "acknowledged", "points", "flushed", "handed")
        # Opened at once: a child may be short of descriptors later.
        self._files = {name: _open(os.path.join(folder, name), flags, 0o666) for name in names}

    def add(self, name: str, lines: Sequence[object]) -> None:
        _write(self._files[name], "".join(f"{line}\n" for line in lines).encode())


class Points:
    """Counts the moments that a child passes; sends ``sign`` to itself at the ``when``-th (never if 0)."""

    def __init__(self, notes: Notes, when: int, sign: int, only: str) -> None:
        self.notes, self.when, self.sign, self.only = notes, when, sign, only
        self.passed = 0

    def pass_(self, name: str) -> None:
        if self.only and not name.startswith(self.only):
            return
        self.passed += 1
        if self.passed == self.when:
            self.notes.add("points", [name])
            os.kill(os.getpid(), self.sign)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.pass_(f"before {name}")
            result = function(*arguments, **options)
            self.pass_(f"after {name}")
            return result

        return wrapped

    def install(self) -> None:
        """Watch every statement that writes, and what touches files besides SQLite."""
        points = self

        class Watched(sqlite3.Connection):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                if points.sign == signal.SIGKILL:  # an exception cannot leave a trace callback
                    self.set_trace_callback(lambda sql: _writes(sql) and points.pass_(f"before {_head(sql)}"))

            def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
                result = super().execute(sql, *arguments)
                if _writes(sql):
                    points.pass_(f"after {_head(sql)}")
                return result

            def executemany(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
                result = super().executemany(sql, *arguments)
                points.pass_(f"after {_head(sql)}")
                return result

            def close(self) -> None:
                points.pass_("before close")
                super().close()
                points.pass_("after close")

        connect = sqlite3.connect
        sqlite3.connect = lambda *a, **o: connect(*a, **{"factory": Watched, **o})  # type: ignore[assignment]
        for name in ("open", "mkdir", "chmod", "replace", "rename", "unlink"):
            setattr(os, name, self.around(name, getattr(os, name)))
        flush = os.fdatasync

        def noted(handle: int) -> None:
            size = os.fstat(handle).st_size
            flush(handle)
            self.notes.add("flushed", [size])  # so much of the log outlasts a power cut

        os.fdatasync = self.around("fdatasync", noted)


def _writes(sql: str) -> bool:
    word = sql.lstrip().split(None, 1)[0].upper() if sql.strip() else ""
    return word not in ("SELECT", "WITH", "EXPLAIN", "") and not (word == "PRAGMA" and "=" not in sql)


def _head(sql: str) -> str:
    words = sql.replace("(", " ").split()
    return " ".join(words[:3] if words[0].upper() in ("INSERT", "DELETE", "CREATE", "PRAGMA") else words[:2])


class Provider:
    """Answers blocks of requests in order and writes every request that leaves on the bill."""

    name, identity = "fake", IDENTITY

    def __init__(
        self, notes: Notes, points: Points, block: int, pause: float, seed: int, reserve: int = 0
    ) -> None:
        self.notes, self.points, self.block, self.pause, self.reserve = notes, points, block, pause, reserve
        self.rng = random.Random(seed)

    def score(
        self, requests: Sequence[ScoreRequest], *, on_send: Any = None, on_tokens: Any = None
    ) -> Iterator[list[tuple[int, ScoreResult]]]:
        numbers = [int(request.prompt.split(None, 1)[0]) for request in requests]  # type: ignore[union-attr]
        if self.reserve:
            yield from self._one_by_one(numbers, on_send)
            return
        for start in range(0, len(requests), self.block):
            chunk = range(start, min(start + self.block, len(requests)))
            on_send(chunk)
            self.points.pass_("sent")
            self.notes.add("bill", [numbers[i] for i in chunk])
            time.sleep(self.pause * self.rng.random())
            self.points.pass_("answered")
            yield [(i, answer_to(numbers[i])) for i in chunk]
            self.points.pass_("recorded")
            self.notes.add("acknowledged", [numbers[i] for i in chunk])
            self.points.pass_("acknowledged")

    def _one_by_one(self, numbers: list[int], on_send: Any) -> Iterator[list[tuple[int, ScoreResult]]]:
        """``block`` in flight at any time; what leaves next is said beforehand, and a few more."""
        waiting, flying = deque(range(len(numbers))), deque[int]()
        while waiting or flying:
            while waiting and len(flying) < self.block:
                leaving = [waiting.popleft()]
                if not may_leave(on_send, leaving[0]):
                    leaving += [waiting.popleft() for _ in range(self.block - len(flying) - 1) if waiting]
                    announce_soon(on_send, list(waiting)[: self.reserve])
                on_send(leaving)
                self.points.pass_("sent")
                self.notes.add("bill", [numbers[i] for i in leaving])
                flying.extend(leaving)
            time.sleep(self.pause * self.rng.random())
            index = flying.popleft()
            self.points.pass_("answered")
            announce_soon(on_send, list(waiting)[: self.reserve + 1])
            yield [(index, answer_to(numbers[index]))]
            self.points.pass_("recorded")
            self.notes.add("acknowledged", [numbers[index]])
            self.points.pass_("acknowledged")


def buy(job: dict[str, Any], points: Points) -> list[Any]:
    """Ask for ``first`` to ``last`` and return the values."""
    backend = Provider(points.notes, points, job["block"], job["pause"], job["seed"], job["reserve"])
    limits = Limits(**job["limits"]) if job["limits"] else None
    with Ledger(job["ledger"]) as ledger:
        meter = Meter(backend, ledger, role="target", run="r", limits=limits)  # type: ignore[arg-type]
        numbers = list(range(job["first"], job["last"]))
        random.Random(job["order"]).shuffle(numbers)
        requests = [request_of(n) for n in numbers]
        scored = meter.score(requests, stage="s", progress=lambda done, _: points.notes.add("handed", [done]))
        results = dict(zip(numbers, scored, strict=True))
        points.pass_("unclosed")
    return [[n, results[n].logprobs, results[n].censored] for n in sorted(results)]


def callers(job: dict[str, Any], points: Points) -> list[Any]:
    """Many threads, each asking for one request at a time until the budget refuses; returns what each one got."""
    limits = Limits(**job["limits"])
    wanted = list(range(job["first"], job["last"]))
    lock = threading.Lock()
    got: list[int] = []
    refused: list[str] = []
    with Ledger(job["ledger"]) as ledger:

        def ask(which: int) -> None:
            backend = Provider(points.notes, points, 1, job["pause"], job["seed"] + which)
            meter = Meter(backend, ledger, role="target", run="r", limits=limits)  # type: ignore[arg-type]
            for number in wanted[which :: job["threads"]]:
                try:
                    [result] = meter.score([request_of(number)], stage="s")
                except BudgetExceededError as error:
                    with lock:
                        refused.append(str(error))
                    continue
                assert result == answer_to(number), result
                with lock:
                    got.append(number)

        with ThreadPoolExecutor(job["threads"]) as pool:
            for future in [pool.submit(ask, which) for which in range(job["threads"])]:
                future.result()
    return [sorted(got), len(refused)]


def review(number: int) -> ScoreRequest:
    """A short few-shot prompt for a real model."""
    shots = "Review: a great film\nSentiment: positive\n\nReview: a dull film\nSentiment: negative\n\n"
    return ScoreRequest(
        f"{shots}Review: film number {number} was fun\nSentiment:", (" positive", " negative")
    )


def remote(job: dict[str, Any], points: Points) -> list[Any]:
    """Ask the server at ``url`` for reviews ``first`` to ``last``."""
    from proxyprompt.backends.openai import OpenAIBackend

    backend = OpenAIBackend("smol", base_url=job["url"], concurrency=job["block"], timeout=20)
    limits = Limits(**job["limits"]) if job["limits"] else None
    with Ledger(job["ledger"]) as ledger:
        meter = Meter(backend, ledger, role="target", run="r", limits=limits)
        results = meter.score([review(n) for n in range(job["first"], job["last"])], stage="s")
        points.pass_("unclosed")
    return [[one.logprobs, one.censored, one.error, one.model_returned] for one in results]


def run(job: dict[str, Any]) -> int:
    """One child's life; returns its exit status."""
    notes = Notes(job["notes"])
    if job["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    if job["descriptors"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (job["descriptors"], job["descriptors"]))
    if job["nobody"]:
        os.setgid(65534)
        os.setuid(65534)
    points = Points(notes, job["when"], signal.Signals[job["sign"]], job["only"])
    points.install()
    status, told = 0, {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work = callers if job["threads"] else remote if job["url"] else buy
            told = {"results": work(job, points)}
    except KeyboardInterrupt:
        status = 130
    except ProxyPromptError as error:
        status, told = 3, {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        status, told = 4, {"error": type(error).__name__, "message": repr(error)}
    told["points"] = points.passed
    Path(job["notes"], f"out-{os.getpid()}").write_text(json.dumps(told))
    return status


def main() -> None:
    """Serve jobs until stdin ends: ``{"wait": pid}``, or the fields of a job."""
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if not child:
            status = 5
            try:
                os.close(0)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                status = run(job)
            finally:
                os._exit(status)
        print(child, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    codecs.lookup("ascii")  # read from disk at first use, where a child without rights may not look
    for module in sys.argv[1:]:
        importlib.import_module(module)
    main()
