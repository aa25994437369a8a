"""What durability costs: wall time of the same calls with and without a ledger, side by side in one run.

A server in a process of its own answers on loopback after a fixed time. The real backend asks it through the meter, with
a warm connection pool and its pace fully grown; arms alternate. A call takes its place from the moment it is announced
until its answer is on the disk, so with a ledger fewer calls are on the wire; a third arm has one place in sixteen
more. A second table takes the backend away: threads that each mark a call as sent, wait, and record the answer, so that
only the ledger's own waiting is left.

    python benchmarks/ledger/run.py            # about six minutes; writes results.json and results.md beside itself
"""

from __future__ import annotations

import asyncio
import json
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
from importlib import metadata
from pathlib import Path
from typing import Any

from proxyprompt import Ledger
from proxyprompt._version import __version__
from proxyprompt.backends.base import ScoreRequest, Usage
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.ledger import Answer, request_key
from proxyprompt.metering import Meter

HERE = Path(__file__).parent
CASES = [(16, 100, 20), (16, 300, 10), (16, 1000, 5), (64, 300, 8)]
REPEATS = 3
BODY = json.dumps(
    {
        "id": "x", "object": "text_completion", "created": 1, "model": "m",
        "choices": [
            {"index": 0, "text": " a", "finish_reason": "length", "logprobs": {
                "tokens": [" a"], "token_logprobs": [-0.1], "text_offset": [0],
                "top_logprobs": [{" a": -0.1, " b": -2.4}]}}
        ],
        "usage": {"prompt_tokens": 300, "completion_tokens": 1, "total_tokens": 301},
    }
).encode()  # fmt: skip


async def _serve(seconds: float, port: Any) -> None:
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
                    % len(BODY)
                )
                writer.write(head + BODY)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=256)
    port.value = server.sockets[0].getsockname()[1]
    await server.serve_forever()


def _server(seconds: float, port: Any) -> None:
    asyncio.run(_serve(seconds, port))


class Commits:
    """Counts the commits of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.n = 0
        with ledger._file.use("read") as connection:
            connection.set_trace_callback(self._see)

    def _see(self, statement: str) -> None:
        self.n += statement == "COMMIT"


def _requests(n: int, what: str) -> list[ScoreRequest]:
    return [ScoreRequest(f"{what} {i} " + "few-shot prompt " * 75, (" a", " b")) for i in range(n)]


def through_the_backend(calls_in_flight: int, milliseconds: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Wall seconds of both arms, alternating."""
    port = multiprocessing.Value("i", 0)
    process = multiprocessing.Process(target=_server, args=(milliseconds / 1000, port), daemon=True)
    process.start()
    while not port.value:
        time.sleep(0.01)
    url, n = f"http://127.0.0.1:{port.value}/v1", calls_in_flight * rounds
    more = calls_in_flight + calls_in_flight // 16
    backends = {n: OpenAIBackend("m", base_url=url, concurrency=n) for n in (calls_in_flight, more)}
    arms = ("without", "with", "one more")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    commits = []
    try:
        for width, backend in backends.items():
            backend._pace._limit = float(width)  # it grows by one call a round
            Meter(backend, None, role="target", run="r").score(_requests(2 * width, "warm"), stage="s")
        for repeat in range(REPEATS):
            for arm in arms[repeat % 3 :] + arms[: repeat % 3]:
                backend = backends[more if arm == "one more" else calls_in_flight]
                requests = _requests(n, f"{repeat} {arm}")
                path = folder / f"{calls_in_flight}-{milliseconds}-{repeat}-{arm}.db"
                ledger = Ledger(path) if arm != "without" else None
                counter = Commits(ledger) if ledger is not None else None
                started = time.perf_counter()
                results = Meter(backend, ledger, role="target", run="r").score(requests, stage="s")
                seconds[arm].append(time.perf_counter() - started)
                assert all(result.error is None for result in results)
                if ledger is not None and counter is not None:
                    commits.append(counter.n)
                    assert ledger.totals().done == n
                    ledger.close()
    finally:
        process.terminate()
        process.join()
    return _row(calls_in_flight, milliseconds, n, seconds, commits)


def by_threads(callers: int, milliseconds: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The same with threads that only sleep: the ledger's own share."""
    n, seconds, commits = callers * rounds, {"without": [], "with": []}, []  # type: ignore[var-annotated]
    for repeat in range(REPEATS):
        for arm in ("without", "with") if repeat % 2 == 0 else ("with", "without"):
            ledger = Ledger(folder / f"t{callers}-{milliseconds}-{repeat}.db") if arm == "with" else None
            keys = [request_key({}, "score", request, {}) for request in _requests(n, f"{repeat}")]
            ids = [0] * n
            counter = None
            if ledger is not None:
                counter = Commits(ledger)
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

            started = time.perf_counter()
            with ThreadPoolExecutor(callers) as pool:
                list(pool.map(caller, range(callers)))
            seconds[arm].append(time.perf_counter() - started)
            if ledger is not None and counter is not None:
                commits.append(counter.n)
                assert ledger.totals().done == n
                ledger.close()
    return _row(callers, milliseconds, n, seconds, commits)


def _row(
    width: int, milliseconds: int, n: int, seconds: dict[str, list[float]], commits: list[int]
) -> dict[str, Any]:
    without, with_ledger = (statistics.median(seconds[arm]) for arm in ("without", "with"))
    return {
        "in_flight": width,
        "latency_ms": milliseconds,
        "calls": n,
        "seconds": {arm: [round(x, 3) for x in values] for arm, values in seconds.items()},
        "overhead": round(with_ledger / without - 1, 4),
        "overhead_of_the_best": round(min(seconds["with"]) / min(seconds["without"]) - 1, 4),
        "overhead_with_one_more": (
            round(statistics.median(seconds["one more"]) / without - 1, 4) if "one more" in seconds else None
        ),
        "milliseconds_per_call_of_a_slot": round(1000 * (with_ledger - without) * width / n, 2),
        "commits_per_call": round(statistics.median(commits) / n, 2),
    }


def _commit_milliseconds(folder: Path) -> float:
    with Ledger(folder / "one.db") as ledger:
        times = []
        for i in range(200):
            started = time.perf_counter()
            ledger.reserve([f"{i:064x}"], run="r", stage="s", role="target", model="m")
            times.append(time.perf_counter() - started)
    return round(1000 * statistics.median(times), 2)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| in flight | answer after | calls | without, s | with, s | durability costs | best of both arms |"
        " one place in 16 more | commits per call |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        arms = [f"{statistics.median(row['seconds'][arm]):.2f}" for arm in ("without", "with")]
        more = row["overhead_with_one_more"]
        lines.append(
            f"| {row['in_flight']} | {row['latency_ms']} ms | {row['calls']} | {arms[0]} | {arms[1]} |"
            f" {row['overhead']:+.1%} | {row['overhead_of_the_best']:+.1%} |"
            f" {'' if more is None else f'{more:+.1%}'} | {row['commits_per_call']} |"
        )
    return lines


def main() -> None:
    """Measure, print, write."""
    os.environ.setdefault("OPENAI_API_KEY", "none")
    measure: list[tuple[str, Callable[[int, int, int, Path], dict[str, Any]]]] = [
        ("backend", through_the_backend),
        ("threads", by_threads),
    ]
    results: dict[str, Any] = {
        "command": "python benchmarks/ledger/run.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {
            "proxyprompt-core": __version__,
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "openai": metadata.version("openai"),
        },
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["commit_ms"] = _commit_milliseconds(folder)
        for kind, function in measure:
            results[kind] = []
            for case in CASES:
                results[kind].append(function(*case, folder))
                print(kind, results[kind][-1], flush=True)
        results["load_average"] = round(os.getloadavg()[0], 2)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text = [
        "# What durability costs",
        "",
        f"`{results['command']}`, {results['date']}, {versions}; {results['hardware']}; load average"
        f" {results['load_average']} at the end (other work ran on the machine).",
        f"One durable commit took {results['commit_ms']} ms.",
        "",
        f"Medians of {REPEATS} runs of each arm, alternating; every single time is in `results.json`.",
        "",
        "The OpenAI backend, through the meter:",
        "",
        *_table(results["backend"]),
        "",
        "A call waits for the disk between its answer and the next call of its place: about one commit through the backend"
        " (the next call is marked in the commit that stores the answer), two by threads. The cost in per cent is that wait"
        " divided by the time of an answer: it shrinks as answers take longer. While other work keeps the machine busy, the"
        " arms of the first table scatter by more than what they are to show; the second table is steadier.",
        "",
        "Threads that mark, wait and record, without backend and network:",
        "",
        *_table(results["threads"]),
        "",
    ]
    (HERE / "results.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
