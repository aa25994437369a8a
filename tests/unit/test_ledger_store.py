"""Store modes: no text in the file where none may be, and answers found all the same; older files brought up to date."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from proxyprompt._ledger_rows import row_hash
from proxyprompt._query_use import note_use, refuse_used
from proxyprompt.backends.base import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult, Usage
from proxyprompt.errors import DataError, InputError, LedgerCorruptError, LedgerError, MissingDependencyError
from proxyprompt.ledger import Answer, Failure, Ledger, request_key
from proxyprompt.ledger_care import verify
from proxyprompt.metering import Meter
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query

SECRET_TEXT = "Patient Zsófia Quux asks about Xanthoplex"
LABEL = "Zebrafinch"


class Model:
    """Scores and writes; what it writes holds the prompt."""

    name = "m"
    identity: ClassVar = {"model": "m"}

    def __init__(self) -> None:
        self.calls = 0

    def score(self, requests: Sequence[ScoreRequest], *, on_send: Any = None, on_tokens: Any = None) -> Any:
        for index, _ in enumerate(requests):
            on_send([index])
            self.calls += 1
            if index == 2:
                result = ScoreResult((None, None), (), Usage(), f"cannot read {SECRET_TEXT!r}", uncertain=1)
            else:
                result = ScoreResult((-0.25, float("-inf")), (False, True), Usage(9, 1))
            yield [(index, result)]

    def generate(
        self, requests: Sequence[GenerateRequest], *, on_send: Any = None, on_tokens: Any = None
    ) -> Any:
        for index, request in enumerate(requests):
            on_send([index])
            self.calls += 1
            yield [(index, GenerateResult(f"You said: {request.prompt}", Usage(9, 9)))]


@pytest.fixture(autouse=True)
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXYPROMPT_LEDGER_KEY", "ab" * 32)


def files(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("l.db*")))


def requests_of(n: int) -> list[ScoreRequest]:
    return [ScoreRequest(f"{SECRET_TEXT} {i}", (f" {LABEL}", " other")) for i in range(n)]


def plain_traces() -> list[bytes]:
    """The text, and the hash under which a ledger that keeps texts files it."""
    key = request_key(Model.identity, "score", requests_of(1)[0], {})
    words = [word for word in SECRET_TEXT.split() if len(word) > 3]
    return [*(w.encode() for w in [*words, LABEL]), bytes.fromhex(key), key.encode()]


@pytest.mark.parametrize("mode", ["hash", "encrypted"])
@pytest.mark.parametrize("role", ["target", "proxy"])
def test_no_text_and_no_plain_hash_is_in_the_file_and_all_is_found_again(
    tmp_path: Path, mode: Any, role: Any
) -> None:
    path, model = tmp_path / "l.db", Model()
    prompt = FewShotPrompt((Demonstration("d", {"input": SECRET_TEXT}, LABEL),), "", "{input} {output}")
    queries = [Query("q", {"input": SECRET_TEXT}, LABEL)]
    with Ledger(path, store=mode) as ledger:
        meter = Meter(model, ledger, role=role, run="r")
        first = meter.score(requests_of(4), stage="s")
        note_use(ledger, "r", "select", prompt, queries)
        while_open = files(tmp_path)
    closed = files(tmp_path)
    for trace in plain_traces():
        assert trace not in while_open
        assert trace not in closed
    assert len(closed) > 4096
    with Ledger(path) as ledger:
        assert ledger.store == mode
        again = Meter(model, ledger, role=role, run="r").score(requests_of(4)[:2], stage="s")
        assert again == first[:2]
        assert model.calls == 4
        assert verify(ledger).sound
        with pytest.raises(DataError, match="cannot certify"):
            refuse_used(ledger, "other", prompt, queries)


def test_the_full_mode_would_fail_that_search(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        Meter(Model(), ledger, role="target", run="r").score(requests_of(4), stage="s")
    content = files(tmp_path)
    assert sum(trace in content for trace in plain_traces()) >= 4


def test_encrypted_texts_and_errors_come_back(tmp_path: Path) -> None:
    path, model = tmp_path / "l.db", Model()
    request = GenerateRequest(SECRET_TEXT)
    with Ledger(path, store="encrypted") as ledger:
        meter = Meter(model, ledger, role="target", run="r")
        first = meter.generate([request], stage="s")
        (attempt,) = ledger.reserve(["cd" * 32], run="r", stage="s", role="target", model="m")
        ledger.record([], [Failure(attempt, f"no: {SECRET_TEXT}")])
    assert SECRET_TEXT.encode()[:7] not in files(tmp_path)
    with Ledger(path) as ledger:
        assert Meter(model, ledger, role="target", run="r").generate([request], stage="s") == first
        key = request_key(model.identity, "generate", request, {})
        row = ledger.lookup([key])[key]
        assert json.loads(row.request or "")["request"]["prompt"]["text"] == SECRET_TEXT
        with ledger.transaction() as connection:
            error, name = connection.execute(
                "SELECT error, key FROM attempt WHERE state = 'failed'"
            ).fetchone()
        assert ledger.open_error(error, name) == f"no: {SECRET_TEXT}"


def test_generated_text_is_refused_before_it_is_paid_for(tmp_path: Path) -> None:
    model = Model()
    with Ledger(tmp_path / "l.db", store="hash") as ledger:
        with pytest.raises(InputError, match="keeps numbers only"):
            Meter(model, ledger, role="target", run="r").generate([GenerateRequest("x")], stage="s")
        (attempt,) = ledger.reserve(["cd" * 32], run="r", stage="s", role="target", model="m")
        for body in (
            '{"text":"hello"}',
            "hello",
            '{"logprobs":["a"]}',
            '["x"]',
            '{"logprobs":[0],"evidence":"hello"}',
            '{"logprobs":[0],"evidence":["texts"]}',
        ):
            with pytest.raises(InputError, match="holds text"):
                ledger.record([Answer(attempt, "cd" * 32, body)])
    assert model.calls == 0


@pytest.mark.parametrize(
    ("mark", "kept"), [("fp_a2b.c-9:1", True), (f"it said {SECRET_TEXT}", False), ("x" * 65, False)]
)
def test_numbers_only_keeps_the_means_and_a_name_of_the_server_but_no_words(
    tmp_path: Path, mark: str, kept: bool
) -> None:
    class Server(Model):
        def score(self, requests: Sequence[ScoreRequest], **options: Any) -> Any:
            options["on_send"]([0])
            yield [
                (
                    0,
                    ScoreResult(
                        (-0.5, None), (True, True), Usage(9, 1), evidence="texts", samples=4, fingerprint=mark
                    ),
                )
            ]

    with Ledger(tmp_path / "l.db", store="hash") as ledger:
        meter = Meter(Server(), ledger, role="target", run="r")
        meter.score(requests_of(1), stage="s")
        [again] = meter.score(requests_of(1), stage="s")
        assert ledger.totals().done == 1
    assert (again.evidence, again.samples, again.logprobs) == ("texts", 4, (-0.5, None))
    assert again.fingerprint == (mark if kept else None)
    assert b"Xanthoplex" not in files(tmp_path)


def test_a_row_moved_to_another_key_is_not_served_even_with_its_hash_mended(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    keys = [f"{n:02x}" * 32 for n in range(2)]
    with Ledger(path, store="encrypted") as ledger:
        ids = ledger.reserve(keys, run="r", stage="s", role="target", model="m")
        ledger.record([Answer(i, key, f'{{"text":"{key}"}}') for i, key in zip(ids, keys, strict=True)])
        columns = "key, body, prompt_tokens, completion_tokens, cached_tokens, model_returned, sha256, schema, created_at"
        with ledger.transaction() as connection:
            rows = [
                list(r)
                for r in connection.execute(f"SELECT {columns}, request, 0, 0 FROM response ORDER BY rowid")
            ]
            rows[0][1] = rows[1][1]
            connection.execute(
                "UPDATE response SET body = ?, sha256 = ? WHERE rowid = 1", (rows[0][1], row_hash(rows[0]))
            )
        found = verify(ledger)
        assert [(d.row, "decrypted" in d.problem) for d in found.damage] == [(1, True)]
        with pytest.raises(LedgerCorruptError, match="1 stored responses"):
            ledger.lookup(keys, strict=True)
        assert list(ledger.lookup(keys)) == keys[1:]


# --- secrets --------------------------------------------------------------------------------------------


def test_another_secret_is_refused_and_the_secret_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "l.db"
    Ledger(path, store="hash").close()
    monkeypatch.setenv("PROXYPROMPT_LEDGER_KEY", "cd" * 32)
    with pytest.raises(LedgerError, match="another secret") as caught:
        Ledger(path)
    assert "cdcd" not in str(caught.value)
    monkeypatch.setenv("PROXYPROMPT_LEDGER_KEY", "nearly-a-key-" + "ab" * 20)
    with pytest.raises(LedgerError, match="64 hexadecimal digits") as caught:
        Ledger(path)
    assert "nearly" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_key_file_is_made_private_and_refused_when_it_is_not(tmp_path: Path) -> None:
    path, key = tmp_path / "l.db", tmp_path / "keys" / "k"
    Ledger(path, store="hash", key_file=key).close()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    before = key.read_text()
    assert len(before.strip()) == 64
    assert before.strip().encode() not in files(tmp_path)
    with Ledger(path, key_file=key) as ledger:
        assert ledger.store == "hash"
    assert key.read_text() == before
    key.chmod(0o640)
    with pytest.raises(LedgerError, match="open to others"):
        Ledger(path, key_file=key)
    key.rename(tmp_path / "other")
    with pytest.raises(LedgerError, match="is missing"):
        Ledger(path, key_file=key)  # never made anew for a file that has one
    key.symlink_to(tmp_path / "other")
    with pytest.raises(LedgerError, match="could not be read"):
        Ledger(path, key_file=key)


def test_a_mode_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    Ledger(path).close()
    with pytest.raises(LedgerError, match="store = 'full'; 'hash' was asked for"):
        Ledger(path, store="hash")
    with pytest.raises(InputError, match="store='secret'"):
        Ledger(path, store="secret")
    with Ledger(path, store="full") as ledger, ledger.transaction() as connection:
        connection.execute(
            "UPDATE meta SET value = 'full' WHERE name = 'store'"
        )  # text in place of bytes: damage
    with pytest.raises(LedgerCorruptError, match="does not say what it keeps"):
        Ledger(path)


def test_without_cryptography_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingDependencyError, match=r"proxyprompt-core\[encrypted\]"):
        Ledger(tmp_path / "l.db", store="encrypted")


# --- migration ------------------------------------------------------------------------------------------

# The first schema as it was released; a fixture, so it is never changed with the code.
SCHEMA_1 = (
    """CREATE TABLE attempt (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, run TEXT NOT NULL,
    stage TEXT NOT NULL, role TEXT NOT NULL CHECK (role IN ('target', 'proxy')), model TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'sent', 'done', 'failed', 'unknown')),
    host TEXT NOT NULL, pid INTEGER NOT NULL, created_at REAL NOT NULL, finished_at REAL, error TEXT,
    estimate INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX attempt_run ON attempt (run, role)",
    """CREATE TABLE response (key BLOB NOT NULL, body BLOB NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    model_returned BLOB, sha256 BLOB NOT NULL, schema INTEGER NOT NULL, created_at REAL NOT NULL,
    request BLOB)""",
    "CREATE INDEX response_key ON response (key)",
    """CREATE TABLE quarantine (set_aside_at REAL NOT NULL, key, body, prompt_tokens, completion_tokens, cached_tokens,
    model_returned, sha256, schema, created_at, request)""",
    """CREATE TABLE query_use (run TEXT NOT NULL, purpose TEXT NOT NULL, demonstrations TEXT NOT NULL,
    queries TEXT NOT NULL, created_at REAL NOT NULL, PRIMARY KEY (run, purpose))""",
)
STATES = ("done", "done", "failed", "unknown", "done")


def old_ledger(path: Path) -> dict[str, str]:
    """A ledger of the first schema with five calls; returns its answers by key."""
    asked = [f"asked {n}" for n in range(5)]
    bodies = {
        hashlib.sha256(text.encode()).hexdigest(): json.dumps({"text": f"answer {n} é"})
        for n, text in enumerate(asked)
    }
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        for statement in SCHEMA_1:
            connection.execute(statement)
        for n, (key, body) in enumerate(bodies.items()):
            texts = [bytes.fromhex(key), body.encode(), b"m-1", asked[n].encode()]
            row = [texts[0], texts[1], 10 + n, 2, 1, b"m-1", 1, 1700000000.5 + n, texts[3]]
            # The hash as the first schema had it.
            numbers = f"1 {10 + n} 2 1 {row[7]!r} {[len(text) for text in texts]}|"
            digest = hashlib.sha256(numbers.encode() + b"".join(texts)).digest()
            if STATES[n] == "done":
                connection.execute(
                    "INSERT INTO response VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row[:6], digest, *row[6:])
                )
            connection.execute(
                """INSERT INTO attempt (key, run, stage, role, model, state, host, pid, created_at, estimate,
                prompt_tokens, completion_tokens) VALUES (?, 'old', 's', 'target', 'm', ?, 'h', 1, ?, 30, ?, ?)""",
                (row[0], STATES[n], row[7], *((10 + n, 2) if STATES[n] == "done" else (0, 0))),
            )
        connection.execute("INSERT INTO query_use VALUES ('old', 'select', '[]', '[]', 1.0)")
        connection.execute("PRAGMA application_id = 1347439665")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    path.chmod(0o600)
    return {key: body for (key, body), state in zip(bodies.items(), STATES, strict=True) if state == "done"}


def check_migrated(path: Path, bodies: dict[str, str]) -> None:
    with Ledger(path, create=False) as ledger:
        found = ledger.lookup(bodies, strict=True)
        assert {key: row.body for key, row in found.items()} == bodies
        assert {row.request for row in found.values()} == {"asked 0", "asked 1", "asked 4"}
        assert verify(ledger).sound
        totals = ledger.totals(run="old")
        assert (totals.done, totals.failed, totals.unknown) == (3, 1, 1)
        assert totals.prompt_tokens == 10 + 11 + 14
        assert ledger.store == "full"


def test_a_file_of_the_first_schema_is_backed_up_and_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    bodies = old_ledger(path)
    check_migrated(path, bodies)
    check_migrated(path, bodies)
    (backup,) = tmp_path.glob("l.db.schema-1.backup*")
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    with sqlite3.connect(backup) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM response").fetchone() == (3,)
    connection.close()


def test_earlier_calls_count_against_a_limit_on_money_that_comes_later(tmp_path: Path) -> None:
    old_ledger(tmp_path / "l.db")
    with Ledger(tmp_path / "l.db") as ledger:
        ledger.price_earlier("old", "target", "m", "USD", lambda u: 1000 * u.prompt_tokens)
        money = ledger.totals(run="old").money["USD"]
    # three finished calls, and the unknown one at what its estimate may cost
    assert money * 10**12 == 1000 * (10 + 11 + 14 + 30)


KILLER = """
import os, signal, sys
from proxyprompt import _ledger_file
from proxyprompt.ledger import Ledger
import sqlite3
count, when = 0, int(sys.argv[2])
def traced(statement):
    global count
    count += 1
    if count == when:
        os.kill(os.getpid(), signal.SIGKILL)
real = sqlite3.connect
def connect(*args, **kwargs):
    connection = real(*args, **kwargs)
    connection.set_trace_callback(traced)
    return connection
_ledger_file.sqlite3.connect = connect
Ledger(sys.argv[1]).close()
print(count)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_killed_at_every_statement_of_the_migration(tmp_path: Path) -> None:
    done = False
    for when in range(1, 200, 3):
        path = tmp_path / str(when) / "l.db"
        path.parent.mkdir(mode=0o700)
        bodies = old_ledger(path)
        run = subprocess.run(
            [sys.executable, "-c", KILLER, str(path), str(when)], capture_output=True, text=True
        )
        check_migrated(path, bodies)
        if run.returncode == 0:
            done = True
            break
        assert run.returncode == -signal.SIGKILL, run.stderr
    assert done
    assert when > 30
