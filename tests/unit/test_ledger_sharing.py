"""Several at once: shared commits, one purchase for two that ask the same, and limits that nobody passes."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from proxyprompt import _ledger_file
from proxyprompt._ledger_commit import _Waiting
from proxyprompt.backends.base import Message, ScoreRequest, ScoreResult, Usage
from proxyprompt.errors import BudgetExceededError, InputError, LedgerError
from proxyprompt.ledger import PICO, Answer, Ledger, Limits, request_key
from proxyprompt.metering import Meter
from proxyprompt.money import call_bound, call_cost
from proxyprompt.prices import FREE, Price, Rates, own_price

CENT = PICO // 100


def key_of(number: int) -> str:
    return request_key({}, "score", ScoreRequest(str(number), ()), {})


def common(run: str = "r") -> dict[str, Any]:
    return {"run": run, "stage": "s", "role": "target", "model": "m"}


# --- shared commits -------------------------------------------------------------------------------------


def commits_of(ledger: Ledger) -> list[str]:
    seen: list[str] = []
    with ledger._file.use("read") as connection:
        connection.set_trace_callback(lambda s: seen.append(s) if s == "COMMIT" else None)
    return seen


def test_threads_that_write_at_the_same_moment_share_commits(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        ids = ledger.reserve([key_of(n) for n in range(64)], **common())
        commits = commits_of(ledger)
        gate = threading.Event()

        def send(number: int) -> None:
            gate.wait()
            ledger.mark_sent([ids[number]])

        with ThreadPoolExecutor(64) as pool:
            with ledger.transaction():  # the disk is busy while they come
                waiting = [pool.submit(send, n) for n in range(64)]
                gate.set()
                while len(ledger._file._commits._queue) < 64:
                    time.sleep(0.001)
            for one in waiting:
                one.result()
        assert len(commits) == 2  # the transaction's own, and one for all
        with Ledger(tmp_path / "l.db") as other, other.transaction() as connection:
            assert connection.execute("SELECT count(*) FROM attempt WHERE state = 'sent'").fetchone() == (64,)


def test_an_error_of_one_leaves_the_others_of_the_same_commit_as_they_are(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        limits = Limits(max_calls=5)
        outcomes: list[Any] = [None] * 12

        def reserve(number: int) -> None:
            try:
                outcomes[number] = ledger.reserve([key_of(number)], limits=limits, **common())
            except BudgetExceededError as error:
                outcomes[number] = error

        threads = [threading.Thread(target=reserve, args=(n,)) for n in range(12)]
        with ledger.transaction():
            for thread in threads:
                thread.start()
            while len(ledger._file._commits._queue) < 12:
                time.sleep(0.001)
        for thread in threads:
            thread.join()
        good = [one for one in outcomes if isinstance(one, list)]
        bad = {id(one) for one in outcomes if isinstance(one, BudgetExceededError)}
        assert (len(good), len(bad)) == (5, 7)  # each thread has an error object of its own
        assert ledger.totals().open == 5


@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_an_interrupted_leader_leaves_the_work_of_others_done_or_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        commits = ledger._file._commits
        mine = commits._run_job

        def interrupted(connection: sqlite3.Connection, *rest: Any, **more: Any) -> None:
            mine(connection, *rest, **more)
            if moment == "after the commit":
                connection.execute("COMMIT")
            raise KeyboardInterrupt

        def count(connection: sqlite3.Connection) -> int:
            return int(connection.execute("UPDATE meta SET value = value || 'x' WHERE name = 'n'").rowcount)

        with ledger.transaction() as connection:
            connection.execute("INSERT INTO meta VALUES ('n', '')")
        other = _Waiting(count)
        commits._queue.append(other)
        monkeypatch.setattr(commits, "_run_job", interrupted)
        with pytest.raises(KeyboardInterrupt):
            commits.run("written", count)
        monkeypatch.undo()
        assert list(commits._queue) == [other]  # ours is gone, the other's waits
        commits._commit_queue("written")
        assert (other.done, other.result) == (True, 1)


# --- single flight --------------------------------------------------------------------------------------


class Slow:
    """Answers each request after a moment, and counts how often each was asked."""

    name, identity = "slow", {"model": "slow"}

    def __init__(self, asked: Counter[str], seconds: float = 0.02, fails: bool = False) -> None:
        self.asked, self.seconds, self.fails = asked, seconds, fails

    def score(self, requests: Sequence[ScoreRequest], *, on_send: Any = None, on_tokens: Any = None) -> Any:
        for index, request in enumerate(requests):
            on_send([index])
            self.asked[str(request.prompt)] += 1
            time.sleep(self.seconds)
            error = "no" if self.fails else None
            yield [(index, ScoreResult((None,) if error else (-1.0,), (), Usage(5, 1), error))]


def test_two_meters_that_ask_the_same_buy_it_once(tmp_path: Path) -> None:
    asked: Counter[str] = Counter()
    requests = [ScoreRequest(f"p{n}", ("a",)) for n in range(12)]
    orders = [requests, requests[::-1], requests[4:] + requests[:4]]
    with Ledger(tmp_path / "l.db") as ledger:
        meters = [Meter(Slow(asked), ledger, role="target", run=f"r{n}") for n in range(3)]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda n: meters[n].score(orders[n], stage="s"), range(3)))
        assert set(asked.values()) == {1}
        assert [len(one) for one in found] == [12] * 3
        assert ledger.totals().done == 12
        assert sum(meter.stats.bought for meter in meters) == 12
        for meter in meters:
            stats = meter.stats
            assert stats.requested == stats.deduplicated + stats.reused + stats.bought + stats.failed


def test_what_the_other_did_not_get_is_asked_here(tmp_path: Path) -> None:
    asked: Counter[str] = Counter()
    requests = [ScoreRequest("p", ("a",))]
    with Ledger(tmp_path / "l.db") as ledger, ThreadPoolExecutor(2) as pool:
        bad = Meter(Slow(asked, 0.2, fails=True), ledger, role="target", run="r")
        good = Meter(Slow(asked), ledger, role="target", run="r")
        first = pool.submit(bad.score, requests, stage="s")
        while not asked:
            time.sleep(0.005)
        assert good.score(requests, stage="s")[0].error is None
        assert first.result()[0].error == "no"
        assert asked == {"p": 2}


def test_a_dead_process_is_not_waited_for_nor_a_living_one_for_ever(tmp_path: Path) -> None:
    path, asked = tmp_path / "l.db", Counter[str]()
    code = (
        "import os, sys, proxyprompt.ledger as l\n"
        "ledger = l.Ledger(sys.argv[1])\n"
        "ids = ledger.reserve([sys.argv[2]], run='dead', stage='s', role='target', model='m')\n"
        "ledger.mark_sent(ids)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    requests = [ScoreRequest("p", ("a",))]
    key = request_key(Slow.identity, "score", requests[0], {})
    with Ledger(path) as ledger:
        subprocess.run([sys.executable, "-c", code, str(path), key], check=False)
        started = time.monotonic()
        Meter(Slow(asked), ledger, role="target", run="r").score(requests, stage="s")
        assert time.monotonic() - started < 5
        assert (ledger.totals(run="dead").unknown, asked["p"]) == (1, 1)
        other = [ScoreRequest("q", ("a",))]
        ledger.reserve([request_key(Slow.identity, "score", other[0], {})], **common("held"))
        meter = Meter(Slow(asked), ledger, role="target", run="r", patience=0.3)
        meter.score(other, stage="s")
        assert asked["q"] == 1


PROCESS = """
import json, sys, time
from proxyprompt.backends.base import ScoreRequest, ScoreResult, Usage
from proxyprompt.ledger import Ledger
from proxyprompt.metering import Meter

class Slow:
    name, identity = "slow", {"model": "slow"}
    def score(self, requests, *, on_send=None, on_tokens=None):
        for index, request in enumerate(requests):
            on_send([index])
            print(request.prompt, flush=True)
            time.sleep(0.005)
            yield [(index, ScoreResult((-1.0,), (), Usage(5, 1)))]

me = int(sys.argv[2])
requests = [ScoreRequest(str((n + 7 * me) % 40), ("a",)) for n in range(40)]
with Ledger(sys.argv[1]) as ledger:
    for start in range(0, 40, 8):
        Meter(Slow(), ledger, role="target", run="r").score(requests[start:start + 8], stage="s")
"""


def test_four_processes_on_one_plan_buy_each_call_once(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "l.db"), str(n)], stdout=subprocess.PIPE, text=True
        )
        for n in range(4)
    ]
    bought = Counter(line for child in children for line in child.communicate(timeout=60)[0].split())
    assert [child.returncode for child in children] == [0] * 4
    assert bought == {str(n): 1 for n in range(40)}


# --- limits on money ------------------------------------------------------------------------------------


def test_a_limit_on_money_counts_what_is_done_sent_and_unknown(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        limits = Limits(max_money=Decimal("0.10"))
        keys = [key_of(n) for n in range(20)]
        ids = ledger.reserve(keys[:4], money=[2 * CENT] * 4, currency="USD", limits=limits, **common())
        ledger.mark_sent(ids[:3])
        ledger.record([Answer(ids[0], keys[0], "{}", Usage(5, 5), cost=CENT)])  # cheaper than feared
        ledger.fail(ids[1:2], "refused")  # not billed
        ledger.release(ids[2:])  # one unknown at two cents, one given back
        assert ledger.totals().money == {"USD": Decimal("0.03")}
        with pytest.raises(
            BudgetExceededError, match=r"has spent or set aside 0\.03 USD and asks for up to 0\.08 USD more"
        ):
            ledger.reserve(keys[4:8], money=[2 * CENT] * 4, currency="USD", limits=limits, **common())
        ids = ledger.reserve(keys[4:11], money=[CENT] * 7, currency="USD", limits=limits, **common())
        # Planned calls hold no claim against those that leave, but what leaves is checked at its own bound.
        ledger.mark_sent(ids[:2], money=[3 * CENT] * 2, limits=limits)
        with pytest.raises(BudgetExceededError, match="it was not sent"):
            ledger.mark_sent(ids[2:3], money=[2 * CENT], limits=limits)
        assert ledger.totals().money == {"USD": Decimal("0.09")}


def test_money_of_proxies_counts_with_that_of_the_target(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        limits = Limits(max_money=Decimal("0.05"))
        proxy = {**common(), "role": "proxy"}
        ledger.reserve([key_of(1)], money=[3 * CENT], currency="USD", limits=limits, **proxy)
        with pytest.raises(BudgetExceededError):
            ledger.reserve([key_of(2)], money=[3 * CENT], currency="USD", limits=limits, **common())


def test_money_in_another_currency_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        ledger.reserve([key_of(1)], money=[CENT], currency="EUR", **common())
        with pytest.raises(InputError, match="max_money is in USD, but calls of run 'r' are priced in EUR"):
            ledger.reserve([key_of(2)], money=[CENT], currency="USD", limits=Limits(max_money=1), **common())
        backend = Slow(Counter())
        with pytest.raises(InputError, match="slow has no price"):
            Meter(backend, ledger, role="target", run="x", limits=Limits(max_money=1))
        euros = own_price(input=1, output=1, currency="EUR")
        with pytest.raises(InputError, match="is in USD, but the price of slow is in EUR"):
            Meter(backend, ledger, role="target", run="x", limits=Limits(max_money=1), price=euros)
        with pytest.raises(InputError, match="says nothing of completion tokens"):
            Meter(
                backend, ledger, role="target", run="x", limits=Limits(max_money=1), price=own_price(input=1)
            )
        free = Meter(
            backend, ledger, role="proxy", run="x", limits=Limits(max_money=0, currency="EUR"), price=FREE
        )
        assert free.score([ScoreRequest("p", ("a",))], stage="s")[0].error is None


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "3", True, 10**7])
def test_a_limit_on_money_is_an_amount(value: Any) -> None:
    with pytest.raises(InputError, match="max_money="):
        Limits(max_money=value)


class Shop(BaseHTTPRequestHandler):
    """A provider that bills a cent for every call, answered or not."""

    bill: ClassVar[Counter[str]] = Counter()
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        with self.lock:
            self.bill[prompt] += 1
        time.sleep(0.005)
        self.send_response(200)
        self.end_headers()
        # Of every seventh the connection breaks before the answer: billed, and the caller cannot know.
        if int(prompt) % 7:
            self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


BUYER = """
import http.client, json, sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from proxyprompt.backends.base import ScoreRequest, ScoreResult, Usage
from proxyprompt.errors import BudgetExceededError
from proxyprompt.ledger import Ledger, Limits
from proxyprompt.metering import Meter
from proxyprompt.prices import own_price

path, port, me, callers, each, cap = sys.argv[1], *map(int, sys.argv[2:6]), Decimal(sys.argv[6])
# A hundred tokens of prompt are a cent, the answer is free: every call costs exactly one cent.
PRICE = own_price(input=100, output=0)

class Backend:
    name, identity = "shop", {"model": "shop", "base_url": "https://example.org"}
    def most_completion_tokens(self, request):
        return 1
    def plan(self, requests): ...
    def count_tokens(self, prompt):
        return 100
    def score(self, requests, *, on_send=None, on_tokens=None):
        for index, request in enumerate(requests):
            on_send([index])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("POST", "/", json.dumps({"prompt": request.prompt}))
            answer = connection.getresponse().read()
            connection.close()
            if answer:
                yield [(index, ScoreResult((-1.0,), (), Usage(100, 1)))]
            else:
                yield [(index, ScoreResult((None,), (), Usage(), "cut off", uncertain=1))]

with Ledger(path) as ledger:
    def buy(caller):
        meter = Meter(Backend(), ledger, role="target", run="r", limits=Limits(max_money=cap), price=PRICE)
        for n in range(each):
            number = (me * callers + caller) * each + n
            try:
                meter.score([ScoreRequest(str(number), ("a",))], stage="s")
            except BudgetExceededError:
                return
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(buy, range(callers)))
"""


@pytest.mark.parametrize("cap", ["0.01", "0.25", "1.00", "2.37"])
def test_four_processes_with_64_callers_never_overspend_and_the_bills_agree(tmp_path: Path, cap: str) -> None:
    handler = type("OneShop", (Shop,), {"bill": Counter(), "lock": threading.Lock()})
    # 64 callers at once are more than the five that may wait by default.
    roomy = type("Roomy", (ThreadingHTTPServer,), {"request_queue_size": 128})
    server = roomy(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        path = tmp_path / "l.db"
        # 4 processes, 16 callers each, 4 calls each: 256 cents are wanted.
        numbers = [[str(server.server_port), str(me), "16", "4", cap] for me in range(4)]
        children = [subprocess.Popen([sys.executable, "-c", BUYER, str(path), *one]) for one in numbers]
        assert [child.wait(100) for child in children] == [0] * 4
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    billed = Decimal(sum(handler.bill.values())) / 100
    with Ledger(path) as ledger:
        totals = ledger.totals(run="r")
        assert totals.money == {"USD": billed}
        assert (totals.open, totals.done + totals.unknown) == (0, sum(handler.bill.values()))
    assert billed == min(Decimal(cap), Decimal("2.56"))
    assert set(handler.bill.values()) == {1}


# --- what a call costs ----------------------------------------------------------------------------------


def test_the_price_of_a_call_is_never_below_its_bill_and_its_bound_never_below_its_price() -> None:
    low = Rates(Decimal(3), Decimal(15), Decimal("0.3"), Decimal("3.75"))
    high = Rates(Decimal(6), Decimal(20), Decimal("0.6"), Decimal("7.5"))
    price = Price(low, batch=Rates(Decimal("1.5"), Decimal("7.5")), tiers=((1000, high, None),))
    usage = Usage(1000, 10, 400, 100)
    assert call_cost(usage, price) == (
        500 * 3 + 100 * Decimal("3.75") + 400 * Decimal("0.3") + 150
    ) / Decimal(10**6)
    # nothing is said to be written: all that was not read may have been
    assert call_cost(Usage(1000, 10, 400), price) == (600 * Decimal("3.75") + 120 + 150) / Decimal(10**6)
    assert call_cost(Usage(1001, 0, 0, 1), price) == (1000 * 6 + Decimal("7.5")) / Decimal(10**6)
    assert call_cost(Usage(1000, 10), price, batch=True) == (1500 + 75) / Decimal(10**6)
    assert call_cost(Usage(), price) is None
    assert call_cost(Usage(), FREE) == 0
    assert call_cost(Usage(5, 5), own_price(input=1)) is None
    for prompt in (1, 999, 1000, 1001, 5000):
        for cached in (0, prompt // 2, prompt):
            cost = call_cost(Usage(prompt, 7, cached), price)
            assert cost is not None
            assert cost <= call_bound(prompt, 7, price)
    assert call_bound(1001, 0, price) == 1001 * Decimal("7.5") / 10**6


def test_chat_prompts_and_odd_characters_are_bounded() -> None:
    from proxyprompt._token_bounds import least_tokens, likely_tokens, most_tokens

    for text in ("", "abc", "\ufdfa" * 5, "\ud800", "e\u0301", "日本語"):
        raw = len(text.encode("utf-8", "surrogatepass"))
        assert most_tokens(text) >= raw
        assert least_tokens(text) <= likely_tokens(text) <= most_tokens(text)
        chat = (Message("system", text), Message("user", text))
        assert most_tokens(chat) >= 2 * raw + 256
    assert most_tokens("\ufdfa") >= 33  # one ligature of 3 bytes, normalised to 18 characters


# --- traps ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_links_and_folders_of_others_are_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    Ledger(home / "real.db").close()
    (home / "l.db").symlink_to(home / "real.db")
    with pytest.raises(LedgerError, match=r"l\.db is a symbolic link"):
        Ledger(home / "l.db")
    (home / "l.db").unlink()
    victim = home / "victim"
    victim.write_text("mine")
    for suffix in ("-wal", ".lock"):
        (home / f"l.db{suffix}").symlink_to(victim)
        with pytest.raises(LedgerError, match="symbolic link"):
            Ledger(home / "l.db")
        (home / f"l.db{suffix}").unlink()
    assert victim.read_text() == "mine"
    assert not (home / "l.db").exists()
    home.chmod(0o777)
    with pytest.raises(LedgerError, match=r"can be written by others \(mode 0777.*chmod go-w"):
        Ledger(home / "real.db")
    home.chmod(0o1777)
    with pytest.raises(LedgerError, match="can be written by others"):
        Ledger(home / "l.db")
    home.chmod(0o755)
    Ledger(home / "real.db").close()


def test_a_disk_that_is_nearly_full_stops_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        ids = ledger.reserve([key_of(0), key_of(1)], **common())
        ledger.mark_sent(ids[:1])
        monkeypatch.setattr(_ledger_file, "_SPARE_BYTES", 2**80)
        with pytest.raises(LedgerError, match="nothing was sent"):
            ledger.mark_sent(ids[1:])
        with pytest.raises(LedgerError, match="Make space"):
            ledger.reserve([key_of(2)], **common())
        ledger.record([Answer(ids[0], key_of(0), "{}")])  # what is paid for still finds its room
        assert ledger.totals().done == 1


def test_a_full_database_loses_no_earlier_answer_and_sends_nothing_more(tmp_path: Path) -> None:
    asked: Counter[str] = Counter()
    with Ledger(tmp_path / "l.db") as ledger:
        with ledger._file.use("read") as connection:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {pages + 12}")
        meter = Meter(Slow(asked, 0.0), ledger, role="target", run="r")
        requests = [[ScoreRequest(f"{n} " + "x" * 900, ("a",))] for n in range(500)]
        with pytest.raises(LedgerError, match="full"):
            [meter.score(one, stage="s") for one in requests]
        # The answer that found no room is the only one missing.
        assert 0 <= len(asked) - ledger.totals().done <= 1
        assert len(asked) < 500
