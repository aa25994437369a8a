"""What durability costs: wall time of the same calls with and without a ledger, side by side in one run.

A server in a process of its own answers on loopback after a fixed time. The real backend asks it through the meter, with
a warm connection pool and its pace fully grown. Three arms take turns with the same backend, the same calls and the same
number in flight: no ledger; a ledger that never waits for the disk (it would not survive a power cut); the ledger as it
is. Ratios are of runs next to each other in time; intervals are t intervals of their logarithms. A second table takes
the backend away: threads that each mark a call as sent, wait, and record the answer, so that every call waits for the
disk twice.

The command is run ahead of other work on the machine (``chrt -r 1``) where there is some: an arm that waits for a processor
measures that.

    python benchmarks/ledger/run.py            # about ten minutes; writes results.json and results.md beside itself
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import multiprocessing
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from proxyprompt import Ledger, _ledger_sync
from proxyprompt._version import __version__
from proxyprompt.backends.base import ScoreRequest, Usage
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.ledger import Answer, request_key
from proxyprompt.metering import Meter

HERE = Path(__file__).parent
CASES = [(16, 100, 16), (16, 300, 10), (16, 1000, 4), (64, 300, 10), (64, 1000, 4)]
SLOW_DISK = [(16, 100, 16), (16, 300, 10), (64, 300, 10)]
SLOW_SECONDS = 0.01
THREADS = [(16, 300, 8), (64, 300, 8)]
REPEATS = 6
T_975 = 2.571  # of Student's t with REPEATS - 1 degrees of freedom
ARMS = ("none", "unflushed", "durable")
BODY = json.dumps(
    {
        "id": "x-%08d", "object": "text_completion", "created": 1, "model": "m",
        "choices": [
            {"index": 0, "text": " a", "finish_reason": "length", "logprobs": {
                "tokens": [" a"], "token_logprobs": [-0.1], "text_offset": [0],
                "top_logprobs": [{" a": -0.1, " b": -2.4}]}}
        ],
        "usage": {"prompt_tokens": 300, "completion_tokens": 1, "total_tokens": 301},
    }
).encode()  # fmt: skip


async def _serve(seconds: float, port: Any) -> None:
    numbers = itertools.count()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                )
                await reader.readexactly(length)
                await asyncio.sleep(seconds)
                head = (
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                    % len(BODY % 0)
                )
                writer.write(head + BODY % next(numbers))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=256)
    port.value = server.sockets[0].getsockname()[1]
    await server.serve_forever()


def _server(seconds: float, port: Any) -> None:
    asyncio.run(_serve(seconds, port))


class Counts:
    """Counts the transactions of a ledger and its flushes; ``flush=False`` leaves these out, ``longer`` lengthens them."""

    def __init__(self, ledger: Ledger | None, *, flush: bool = True, longer: float = 0.0) -> None:
        self.transactions = self.flushes = 0
        self._flush, self._longer = flush, longer
        if ledger is not None:
            with ledger._file.use("read") as connection:
                connection.set_trace_callback(self._see)

    def _see(self, statement: str) -> None:
        self.transactions += statement == "COMMIT"

    def __enter__(self) -> Counts:
        self._real = _ledger_sync._flush_to_disk
        _ledger_sync._flush_to_disk = self._count
        return self

    def __exit__(self, *_: object) -> None:
        _ledger_sync._flush_to_disk = self._real

    def _count(self, handle: int) -> None:
        self.flushes += 1
        if self._flush:
            self._real(handle)
            time.sleep(self._longer)


class Load:
    """Share of the processors that other work takes, between two looks; ``pids`` are ours."""

    def __init__(self, *pids: int) -> None:
        self._pids = ("self", *pids)
        self._before = self._look()

    def _look(self) -> tuple[int, int, int]:
        numbers = [int(part) for part in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        own = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += int(fields[11]) + int(fields[12])
        return sum(numbers), sum(numbers) - numbers[3] - numbers[4], own

    def elsewhere(self) -> float | None:
        """Share of all processor time, 0 to 1."""
        total, busy, own = (now - then for now, then in zip(self._look(), self._before, strict=True))
        return round(max(0, busy - own) / max(1, total), 3)


def _requests(n: int, what: str) -> list[ScoreRequest]:
    return [ScoreRequest(f"{what} {i} " + "few-shot prompt " * 75, (" a", " b")) for i in range(n)]


def through_the_backend(
    calls_in_flight: int, milliseconds: int, rounds: int, folder: Path, longer: float = 0.0
) -> dict[str, Any]:
    """Wall seconds of the arms, taking turns."""
    port = multiprocessing.Value("i", 0)
    process = multiprocessing.Process(target=_server, args=(milliseconds / 1000, port), daemon=True)
    process.start()
    while not port.value:
        time.sleep(0.01)
    url, n = f"http://127.0.0.1:{port.value}/v1", calls_in_flight * rounds
    backend = OpenAIBackend("m", base_url=url, concurrency=calls_in_flight)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    counted: list[Counts] = []
    try:
        backend._pace._limit = float(calls_in_flight)  # it grows by one call a round
        Meter(backend, None, role="target", run="r").score(_requests(2 * calls_in_flight, "warm"), stage="s")
        assert process.pid is not None
        load = Load(process.pid)
        for repeat in range(REPEATS):
            for arm in ARMS[repeat % 3 :] + ARMS[: repeat % 3]:
                requests = _requests(n, f"{repeat} {arm}")
                path = folder / f"{longer}-{calls_in_flight}-{milliseconds}-{repeat}-{arm}.db"
                ledger = None if arm == "none" else Ledger(path)
                meter = Meter(backend, ledger, role="target", run="r")
                with Counts(ledger, flush=arm == "durable", longer=longer) as counts:
                    started = time.perf_counter()
                    results = meter.score(requests, stage="s")
                    seconds[arm].append(time.perf_counter() - started)
                errors = {result.error for result in results}
                assert errors == {None}, errors
                if arm == "durable":
                    counted.append(counts)
                if ledger is not None:
                    assert ledger.totals().done == n
                    ledger.close()
        elsewhere = load.elsewhere()
    finally:
        process.terminate()
        process.join()
    return _row(calls_in_flight, milliseconds, n, seconds, counted, elsewhere)


def by_threads(callers: int, milliseconds: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The same with threads that only sleep and wait for the disk twice a call: the ledger's own share."""
    n = callers * rounds
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    counted: list[Counts] = []
    load = Load()
    for repeat in range(REPEATS):
        keys = [request_key({}, "score", request, {}) for request in _requests(n, f"{repeat}")]
        for arm in ARMS[repeat % 3 :] + ARMS[: repeat % 3]:
            ledger = (
                None if arm == "none" else Ledger(folder / f"t{callers}-{milliseconds}-{repeat}-{arm}.db")
            )
            ids = [0] * n
            if ledger is not None:
                ids = ledger.reserve(keys, run="r", stage="s", role="target", model="m")

            def caller(
                me: int, ledger: Ledger | None = ledger, ids: list[int] = ids, keys: list[str] = keys
            ) -> None:
                for i in range(me, n, callers):
                    if ledger is not None:
                        ledger.mark_sent([ids[i]])
                    time.sleep(milliseconds / 1000)
                    if ledger is not None:
                        ledger.record(
                            [Answer(ids[i], keys[i], BODY.decode(), Usage(300, 1), "m", "x" * 1200)]
                        )

            with Counts(ledger, flush=arm == "durable") as counts:
                started = time.perf_counter()
                with ThreadPoolExecutor(callers) as pool:
                    list(pool.map(caller, range(callers)))
                seconds[arm].append(time.perf_counter() - started)
            if arm == "durable":
                counted.append(counts)
            if ledger is not None:
                assert ledger.totals().done == n
                ledger.close()
    return _row(callers, milliseconds, n, seconds, counted, load.elsewhere())


def _ratio(above: list[float], below: list[float]) -> dict[str, float]:
    logs = [math.log(a / b) for a, b in zip(above, below, strict=True)]
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    ends = (mean, mean - T_975 * error, mean + T_975 * error)
    return dict(zip(("mean", "low", "high"), (round(math.exp(end) - 1, 4) for end in ends), strict=True))


def _row(
    width: int,
    milliseconds: int,
    n: int,
    seconds: dict[str, list[float]],
    counted: list[Counts],
    elsewhere: float | None,
) -> dict[str, Any]:
    return {
        "in_flight": width,
        "latency_ms": milliseconds,
        "calls": n,
        "seconds": {arm: [round(x, 3) for x in values] for arm, values in seconds.items()},
        "durable_to_none": _ratio(seconds["durable"], seconds["none"]),
        "unflushed_to_none": _ratio(seconds["unflushed"], seconds["none"]),
        "best_of_both": round(min(seconds["durable"]) / min(seconds["none"]) - 1, 4),
        "transactions_per_call": round(statistics.median(one.transactions for one in counted) / n, 2),
        "flushes_per_call": round(statistics.median(one.flushes for one in counted) / n, 2),
        "processors_busy_elsewhere": elsewhere,
        "load_average": round(os.getloadavg()[0], 2),
    }


def _flush_milliseconds(folder: Path) -> float:
    with Ledger(folder / "one.db") as ledger:
        ids = ledger.reserve([f"{i:064x}" for i in range(200)], run="r", stage="s", role="target", model="m")
        times = []
        for number in ids:
            started = time.perf_counter()
            ledger.mark_sent([number])
            times.append(time.perf_counter() - started)
    return round(1000 * statistics.median(times), 2)


def _per_cent(ratio: dict[str, float]) -> str:
    return f"{ratio['mean']:+.1%} ({ratio['low']:+.1%} to {ratio['high']:+.1%})"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| in flight | answer after | calls | no ledger, s | durable, s | **durable to none** | best to best |"
        " never waiting for the disk, to none | flushes per call | processors busy elsewhere |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        arms = [f"{statistics.median(row['seconds'][arm]):.2f}" for arm in ("none", "durable")]
        lines.append(
            f"| {row['in_flight']} | {row['latency_ms']} ms | {row['calls']} | {arms[0]} | {arms[1]} |"
            f" {_per_cent(row['durable_to_none'])} | {row['best_of_both']:+.1%} |"
            f" {_per_cent(row['unflushed_to_none'])} | {row['flushes_per_call']} |"
            f" {row['processors_busy_elsewhere']:.0%} |"
        )
    return lines


def main() -> None:
    """Measure, print, write."""
    os.environ.setdefault("OPENAI_API_KEY", "none")
    measure: list[tuple[str, Callable[[int, int, int, Path], dict[str, Any]], list[tuple[int, int, int]]]] = [
        ("backend", through_the_backend, CASES),
        ("slow_disk", partial(through_the_backend, longer=SLOW_SECONDS), SLOW_DISK),
        ("threads", by_threads, THREADS),
    ]
    first = hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) == os.SCHED_RR
    results: dict[str, Any] = {
        "command": "python benchmarks/ledger/run.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {
            "proxyprompt-core": __version__,
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "openai": metadata.version("openai"),
        },
        "scheduled_first": first,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["flush_ms"] = _flush_milliseconds(folder)
        for kind, function, cases in measure:
            results[kind] = []
            for case in cases:
                results[kind].append(function(*case, folder))
                print(kind, results[kind][-1], flush=True)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write(results)


def write(results: dict[str, Any]) -> None:
    """The tables."""
    loads = [row["load_average"] for kind in ("backend", "slow_disk", "threads") for row in results[kind]]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text = [
        "# What durability costs",
        "",
        f"`{results['command']}`, {results['date']}, {versions}; {results['hardware']}"
        + (", ahead of other work (`chrt -r 1`)." if results["scheduled_first"] else "."),
        f"Load average {min(loads)} to {max(loads)}.",
        f"Marking one call as sent, with its wait for the disk, took {results['flush_ms']} ms.",
        "",
        f"{REPEATS} runs of each arm, taking turns; seconds are medians, ratios are geometric means of pairs with 95 %"
        " intervals; every single time is in `results.json`.",
        "",
        "The OpenAI backend, through the meter:",
        "",
        *_table(results["backend"]),
        "",
        "An answer is written before the next call leaves, and flushed while calls are under way; the next call was marked"
        " on the disk earlier. So the disk is waited for at the beginning and at the end of a batch, and in between only"
        " when more answers come at once than calls are marked ahead. What the arm that never waits for the disk costs is"
        " not the disk's share. `results_busy.md` is the same on a machine whose processors were busy with other work.",
        "",
        f"The same with {1000 * SLOW_SECONDS:g} ms more for each flush, as on a slow or busy disk:",
        "",
        *_table(results["slow_disk"]),
        "",
        "Threads that mark, wait and record, without backend and network; each call waits for the disk twice:",
        "",
        *_table(results["threads"]),
        "",
    ]
    (HERE / "results.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
