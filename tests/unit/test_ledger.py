"""The ledger: keys, durability of rows, damage, concurrency, permissions, limits."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyprompt import _ledger_file
from proxyprompt.backends.base import GenerateRequest, Message, ScoreRequest, Usage
from proxyprompt.errors import BudgetExceededError, InputError, LedgerCorruptError, LedgerError
from proxyprompt.ledger import Answer, Failure, Ledger, Limits, RequestKeys, request_key

IDENTITY = {"provider": "p", "model": "m", "nested": {"dtype": "float32"}}


def key_number(number: int) -> str:
    return request_key(IDENTITY, "score", ScoreRequest(f"prompt {number}", ("a",)), {})


def buy(ledger: Ledger, numbers: range, run: str = "r", size: int = 40) -> dict[str, str]:
    keys = [key_number(number) for number in numbers]
    ids = ledger.reserve(keys, run=run, stage="s", role="target", model="m")
    ledger.mark_sent(ids)
    bodies = {key: f'{{"value":"{key[:8] * (size // 8)}"}}' for key in keys}
    ledger.record(
        [
            Answer(i, key, bodies[key], Usage(10, 2, 1), "m-1", f"request of {key}")
            for i, key in zip(ids, keys, strict=True)
        ]
    )
    return bodies


# --- keys ---------------------------------------------------------------------------------------------

CHAT = (Message("user", "a"), Message("assistant", "b"))


def test_every_part_of_a_request_changes_its_key() -> None:
    score, text = ScoreRequest("a", ("x", "yz")), GenerateRequest("a")
    keys = [
        request_key(IDENTITY, "score", score, {}),
        request_key({**IDENTITY, "model": "n"}, "score", score, {}),
        request_key({**IDENTITY, "nested": {"dtype": "bfloat16"}}, "score", score, {}),
        request_key({**IDENTITY, "revision": None}, "score", score, {}),
        request_key(IDENTITY, "score", score, {"seed": 0}),
        request_key(IDENTITY, "score", score, {"seed": 1}),
        request_key(IDENTITY, "score", score, {"seed": "1"}),
        request_key(IDENTITY, "score", score, {"seed": True}),
        request_key(IDENTITY, "score", score, {}, 1),
        request_key(IDENTITY, "score", ScoreRequest("b", score.candidates), {}),
        request_key(IDENTITY, "score", ScoreRequest("a ", score.candidates), {}),
        request_key(IDENTITY, "score", ScoreRequest("a", ("xy", "z")), {}),
        request_key(IDENTITY, "score", ScoreRequest("a", ("yz", "x")), {}),
        request_key(IDENTITY, "score", ScoreRequest("a", ("x", "yz", "")), {}),
        request_key(IDENTITY, "score", ScoreRequest("a", ("xyz",)), {}),
        request_key(IDENTITY, "score", ScoreRequest((Message("user", "a"),), score.candidates), {}),
        request_key(IDENTITY, "score", ScoreRequest((Message("system", "a"),), score.candidates), {}),
        request_key(IDENTITY, "score", ScoreRequest(CHAT, score.candidates), {}),
        request_key(IDENTITY, "score", ScoreRequest(CHAT[::-1], score.candidates), {}),
        request_key(IDENTITY, "score", ScoreRequest((Message("user", "ab"),), score.candidates), {}),
        request_key(IDENTITY, "score", ScoreRequest((), score.candidates), {}),
        request_key(IDENTITY, "score", ScoreRequest("", score.candidates), {}),
        request_key(IDENTITY, "generate", text, {}),
        request_key(IDENTITY, "generate", GenerateRequest("a", 65), {}),
        request_key(IDENTITY, "generate", GenerateRequest("a", 64, ("\n",)), {}),
        request_key(IDENTITY, "generate", GenerateRequest("a", 64, ("\\n",)), {}),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(bytes.fromhex(key)) == 32 for key in keys)


def test_a_key_does_not_depend_on_the_order_of_a_mapping() -> None:
    request = ScoreRequest("a", ("x",))
    backwards = dict(reversed(IDENTITY.items()))
    assert request_key(IDENTITY, "score", request, {}) == request_key(backwards, "score", request, {})


def test_the_key_is_the_hash_of_its_document_and_stable_between_releases() -> None:
    request = ScoreRequest((Message("user", "é"),), (" x",))
    assert RequestKeys({"model": "m"}, "score", {}).document(request) == (
        '{"identity":{"model":"m"},"kind":"score","parameters":{},"repeat":0,'
        '"request":{"candidates":[" x"],"prompt":{"chat":[["user","é"]]}},"schema":1}'
    )
    # A change here makes every answer that anybody has paid for unreachable.
    assert request_key({"model": "m"}, "score", request, {}) == (
        "fdad4922e3e464a956959460a868981f34cb08109ef5a324df020ae8a3c92b9a"
    )


def test_all_parts_of_a_turn_are_in_the_key() -> None:
    assert [item.name for item in dataclasses.fields(Message)] == ["role", "content", "name"]


# Characters that break naive encodings: quotes, brackets, separators, an astral character and its two halves.
TEXT = st.text(alphabet=list('a",[]{}:\\ \x00\n😀\ud83d\ude00'), max_size=4)
PROMPT = st.one_of(
    TEXT,
    st.lists(
        st.builds(Message, st.sampled_from(["user", "assistant"]), TEXT, st.none() | TEXT), max_size=2
    ).map(tuple),
)
REQUEST = st.one_of(
    st.tuples(st.just("score"), st.builds(ScoreRequest, PROMPT, st.lists(TEXT, max_size=2).map(tuple))),
    st.tuples(
        st.just("generate"),
        st.builds(GenerateRequest, PROMPT, st.integers(1, 2), st.lists(TEXT, max_size=2).map(tuple)),
    ),
)
WHOLE = st.tuples(
    st.dictionaries(TEXT, TEXT, max_size=2),
    REQUEST,
    st.dictionaries(TEXT, TEXT, max_size=2),
    st.integers(0, 1),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(WHOLE, min_size=2, max_size=12))
def test_different_requests_never_share_a_key(wholes: list[tuple]) -> None:  # type: ignore[type-arg]
    keys = {}
    for identity, (kind, request), parameters, repeat in wholes:
        key = request_key(identity, kind, request, parameters, repeat)
        whole = (identity, kind, request, parameters, repeat)
        assert keys.setdefault(key, whole) == whole


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"a": float("nan")}, "no NaN"),
        ({"a": object()}, "JSON values"),
        ({1: "a"}, "keys must be text"),
        ({"a": {True: 1}}, "keys must be text"),
    ],
)
def test_an_identity_that_is_not_json_is_refused(identity: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=message):
        request_key(identity, "score", ScoreRequest("a", ("x",)), {})


def test_a_request_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(InputError, match="must be a GenerateRequest"):
        request_key({}, "generate", ScoreRequest("a", ("x",)), {})
    with pytest.raises(InputError, match="kind='other'"):
        request_key({}, "other", ScoreRequest("a", ("x",)), {})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="text or a tuple"):
        request_key({}, "score", ScoreRequest([Message("user", "a")], ("x",)), {})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="repeat=-1"):
        request_key({}, "score", ScoreRequest("a", ("x",)), {}, -1)


# --- rows ---------------------------------------------------------------------------------------------


def test_what_is_recorded_comes_back_from_a_new_ledger_object(tmp_path: Path) -> None:
    key = key_number(0)
    body, model, request = '{"text":"é😀\ud83d"}', "m\udc80", 'prompt\x00 "é" \ud800'
    with Ledger(tmp_path / "l.db") as ledger:
        (attempt,) = ledger.reserve([key], run="r", stage="s", role="target", model="m")
        ledger.mark_sent([attempt])
        ledger.record([Answer(attempt, key, body, Usage(7, 8, 9), model, request)])
    with Ledger(tmp_path / "l.db", create=False) as ledger:
        found = ledger.lookup([key, key_number(1)], strict=True)
    assert list(found) == [key]
    row = found[key]
    assert (row.body, row.usage, row.model_returned, row.request) == (body, Usage(7, 8, 9), model, request)


def test_lookup_takes_more_keys_than_one_query_can(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        bodies = buy(ledger, range(2000))
        found = ledger.lookup([*bodies, key_number(2001)])
    assert {key: row.body for key, row in found.items()} == bodies


def test_totals_follow_the_states_and_filters(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        buy(ledger, range(3), run="one")
        ids = ledger.reserve(
            [key_number(n) for n in range(10, 15)], run="two", stage="t", role="proxy", model="n"
        )
        ledger.mark_sent(ids[:3])
        ledger.record([], [Failure(ids[0], "boom \ud800", Usage(5, 0, 0))])
        ledger.fail([ids[1]], "again")
        two = ledger.totals(run="two")
        assert (two.done, two.failed, two.unknown, two.open, two.prompt_tokens) == (0, 2, 0, 3, 5)
        ledger.release(ids)
        two = ledger.totals(role="proxy", stage="t")
        assert (two.failed, two.unknown, two.open) == (2, 1, 0)
        everything = ledger.totals()
        assert (everything.done, everything.prompt_tokens, everything.cached_tokens) == (3, 35, 3)
        assert everything.by_model["m"].completion_tokens == 6
        assert everything.by_model["n"].unknown == 1
        assert [(one.run, one.totals.done) for one in ledger.runs()] == [("one", 3), ("two", 0)]
        assert ledger.totals(run="none").done == 0


def test_the_first_answer_to_a_key_stays_and_the_second_call_is_counted(tmp_path: Path) -> None:
    key = key_number(0)
    with Ledger(tmp_path / "l.db") as ledger:
        ids = ledger.reserve([key, key], run="r", stage="s", role="target", model="m")
        ledger.mark_sent(ids)
        ledger.record([Answer(ids[0], key, "first"), Answer(ids[1], key, "second")])
        assert ledger.lookup([key])[key].body == "first"
        assert ledger.totals().done == 2


def test_sending_twice_or_without_a_reservation_is_refused_before_it_happens(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        ids = ledger.reserve([key_number(0), key_number(1)], run="r", stage="s", role="target", model="m")
        ledger.mark_sent(ids[:1])
        with pytest.raises(LedgerError, match="Only 1 of the 2 attempts"):
            ledger.mark_sent(ids)
        ledger.release(ids)
        # Ids are not used twice, so a straggler cannot touch a later attempt.
        assert ledger.reserve([key_number(2)], run="r", stage="s", role="target", model="m")[0] > ids[1]
        with pytest.raises(LedgerError, match="no matching attempt"):
            ledger.record([Answer(ids[1], key_number(1), "late")])
        assert ledger.lookup([key_number(1)])[key_number(1)].body == "late"


def test_a_malformed_key_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger, pytest.raises(InputError, match="64 hexadecimal"):
        ledger.lookup(["abc"])


# --- damage -------------------------------------------------------------------------------------------


def flip(content: bytearray, position: int, rng: random.Random) -> None:
    content[position] ^= 1 << rng.randrange(8)


def test_flipped_bits_in_any_part_of_a_row_are_never_served(tmp_path: Path) -> None:
    path, rng = tmp_path / "l.db", random.Random(1)
    with Ledger(path) as ledger:
        bodies = buy(ledger, range(100), size=160)
    clean = path.read_bytes()
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT body, sha256, request FROM response").fetchall()
    connection.close()
    for part in ("body", "request", "sha256", "model_returned"):
        content = bytearray(clean)
        for body, digest, request in rows:
            # "m-1" is the same in every row, but stands just before the hash of its row
            needle = {"body": body, "request": request}.get(part, digest)
            start, length = (
                (clean.index(digest) - 3, 3)
                if part == "model_returned"
                else (clean.index(needle), len(needle))
            )
            flip(content, start + rng.randrange(length), rng)
        path.write_bytes(content)
        with Ledger(path) as ledger:
            with pytest.warns(RuntimeWarning, match="set aside") as caught:
                found = ledger.lookup(bodies)
            assert found == {}, part
            assert (ledger.quarantined, len(caught)) == (100, 1)
            assert ledger.lookup(bodies) == {}
            buy(ledger, range(100), size=160)
            assert {key: row.body for key, row in ledger.lookup(bodies).items()} == bodies
        path.write_bytes(clean)


def test_flipped_bits_anywhere_in_the_file_are_never_served(tmp_path: Path) -> None:
    path, rng = tmp_path / "l.db", random.Random(2)
    with Ledger(path) as ledger:
        bodies = buy(ledger, range(60), size=400)
    clean = path.read_bytes()
    outcomes = {"refused": 0, "absent": 0, "intact": 0}
    for _ in range(250):
        content = bytearray(clean)
        flip(content, rng.randrange(len(content)), rng)
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                with Ledger(path) as ledger:
                    found = {key: row.body for key, row in ledger.lookup(bodies).items()}
                    lost = [number for number in range(60) if key_number(number) not in found]
                    for number in lost:
                        buy(ledger, range(number, number + 1), size=400)
                    again = {key: row.body for key, row in ledger.lookup(bodies).items()}
            except LedgerError:
                outcomes["refused"] += 1
            else:
                assert all(bodies[key] == body for key, body in found.items())
                assert again == bodies
                outcomes["absent" if lost else "intact"] += 1
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    assert outcomes["absent"] > 30, outcomes


@pytest.mark.parametrize("where", ["table", "index", "table and index", "table and body"])
def test_flipped_keys_are_not_served_and_can_be_bought_anew(tmp_path: Path, where: str) -> None:
    path, rng = tmp_path / "l.db", random.Random(3)
    with Ledger(path) as ledger:
        bodies = buy(ledger, range(20))
        with ledger._file.use("written", write=True) as connection:
            connection.execute("DELETE FROM attempt")  # the third place where the keys stand
    content = bytearray(path.read_bytes())
    for key, body in bodies.items():
        in_table = content.index(body.encode()) - 32
        first = content.index(bytes.fromhex(key))
        in_index = first if first != in_table else content.index(bytes.fromhex(key), in_table + 1)
        if "table" in where:
            flip(content, in_table + rng.randrange(32), rng)
        if "index" in where:
            flip(content, in_index + rng.randrange(4, 32), rng)  # keeps the index in order
        if "body" in where:
            flip(content, in_table + 32 + rng.randrange(len(body)), rng)
    path.write_bytes(content)
    with Ledger(path) as ledger, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = ledger.lookup(bodies)
        # With the index intact, the right row may still be found by its right key.
        assert found == {} or (where == "table" and len(found) == 20)
        assert all(row.body == bodies[key] for key, row in found.items())
        buy(ledger, range(20))
        assert {key: row.body for key, row in ledger.lookup(bodies, strict=True).items()} == bodies


def test_swapped_rows_are_not_served(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    with Ledger(path) as ledger:
        bodies = buy(ledger, range(2))
    with sqlite3.connect(path) as connection:
        one, two = connection.execute("SELECT body FROM response ORDER BY rowid").fetchall()
        connection.execute("UPDATE response SET body = ? WHERE rowid = 1", two)
        connection.execute("UPDATE response SET body = ? WHERE rowid = 2", one)
    connection.close()
    with Ledger(path) as ledger, pytest.raises(LedgerCorruptError, match="2 stored responses"):
        ledger.lookup(bodies, strict=True)


# --- opening ------------------------------------------------------------------------------------------


def modes(folder: Path) -> dict[str, int]:
    return {one.name: stat.S_IMODE(one.stat().st_mode) for one in folder.iterdir()}


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_files_are_for_the_owner_only(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = tmp_path / "new" / "deep" / "l.db"
        with Ledger(path) as ledger:
            buy(ledger, range(1))
            assert set(modes(path.parent)) == {"l.db", "l.db-wal", "l.db-shm", "l.db.lock"}
            assert set(modes(path.parent).values()) == {0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
        given_folder = tmp_path / "given"
        given_folder.mkdir(mode=0o755)
        shutil.copy(path, given_folder / "l.db")
        (given_folder / "l.db").chmod(0o644)
        with Ledger(given_folder / "l.db") as ledger:
            buy(ledger, range(1, 2))
            assert set(modes(given_folder).values()) == {0o600}
        assert stat.S_IMODE(given_folder.stat().st_mode) == 0o755
    finally:
        os.umask(before)


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder of a user for whom permissions count, who we are inside; root ignores them."""
    folder = Path(tempfile.mkdtemp())
    try:
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o700)
        shutil.rmtree(folder)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_folder_or_file_without_permission_is_a_ledger_error() -> None:
    with unprivileged() as folder:
        path = folder / "l.db"
        Ledger(path).close()
        path.chmod(0o000)
        with pytest.raises(LedgerError, match=r"could not be opened.*Check that"):
            Ledger(path)
        path.chmod(0o600)
        folder.chmod(0o500)
        with pytest.raises(LedgerError, match="could not be opened"):
            Ledger(path)
        with pytest.raises(LedgerError, match="could not be opened"):
            Ledger(folder / "other.db")
        with pytest.raises(LedgerError, match="could not be opened"):
            Ledger(folder / "sub" / "other.db")


def test_what_is_no_ledger_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to look at " * 50)
    with pytest.raises(LedgerError, match="is not a ledger"):
        Ledger(text)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    before = other.read_bytes()
    with pytest.raises(LedgerError, match="SQLite file but not a ledger"):
        Ledger(other)
    assert other.read_bytes() == before
    with pytest.raises(LedgerError, match=r"no ledger at .*create=True"):
        Ledger(tmp_path / "missing.db", create=False)
    with pytest.raises(LedgerError):
        Ledger(tmp_path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    Ledger(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 5")
    connection.close()
    with pytest.raises(LedgerError, match=r"schema 5; this version reads up to 4.*pip install -U"):
        Ledger(path)


def test_a_closed_ledger_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.db")
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="is closed"):
        ledger.totals()


def test_the_write_ahead_log_is_folded_in_at_close_and_when_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ledger_file, "_WAL_RESET_DEFECT", True)
    monkeypatch.setattr(_ledger_file, "_FOLD_BYTES", 200_000)
    path = tmp_path / "l.db"
    wal = tmp_path / "l.db-wal"
    with Ledger(path) as ledger, Ledger(path) as second:
        bodies = buy(ledger, range(200), size=2000)
        assert wal.stat().st_size > 400_000  # the second one has it open: not touched
        second.close()
        bodies |= buy(ledger, range(200, 700), size=2000)
        assert not wal.exists() or wal.stat().st_size < 200_000
        bodies |= buy(ledger, range(700, 710))
        assert wal.stat().st_size < 200_000
    assert not wal.exists()
    with Ledger(path) as ledger:
        assert {key: row.body for key, row in ledger.lookup(bodies, strict=True).items()} == bodies


# --- several at once ----------------------------------------------------------------------------------


def test_four_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    code = (
        "import sys, proxyprompt.ledger as l\n"
        "from proxyprompt.backends.base import ScoreRequest\n"
        "me = int(sys.argv[2])\n"
        "with l.Ledger(sys.argv[1]) as ledger:\n"
        "    for n in [*range(me * 30, me * 30 + 30), *range(1000, 1010)]:\n"
        "        key = l.request_key({}, 'score', ScoreRequest(str(n), ()), {})\n"
        "        ids = ledger.reserve([key], run=str(me), stage='s', role='target', model='m')\n"
        "        ledger.mark_sent(ids)\n"
        "        ledger.record([l.Answer(ids[0], key, str(n))])\n"
    )
    # They create the file at the same moment, too.
    children = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    with Ledger(path) as ledger:
        totals = ledger.totals()
        assert (totals.done, totals.open, totals.unknown) == (160, 0, 0)
        numbers = [*range(120), *range(1000, 1010)]
        keys = {request_key({}, "score", ScoreRequest(str(n), ()), {}): str(n) for n in numbers}
        assert {key: row.body for key, row in ledger.lookup(keys, strict=True).items()} == keys


def test_eight_threads_share_one_ledger_and_never_overspend(tmp_path: Path) -> None:
    limits, sent = Limits(max_calls=25), []
    with Ledger(tmp_path / "l.db") as ledger:

        def work(me: int) -> None:
            for n in range(10):
                key = key_number(me * 10 + n)
                with suppress(BudgetExceededError):
                    ids = ledger.reserve([key], run="r", stage="s", role="target", model="m", limits=limits)
                    ledger.mark_sent(ids)
                    sent.append(key)
                    ledger.record([Answer(ids[0], key, "x")])

        threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(sent) == 25
        assert ledger.totals().done == 25


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nothing_is_lost_when_parent_and_child_write_after_a_fork(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    wrote, closed = os.pipe(), os.pipe()
    ledger = Ledger(path)
    buy(ledger, range(5))
    (mine,) = ledger.reserve([key_number(100)], run="r", stage="s", role="target", model="m")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns if a plugin has a thread
        pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            buy(ledger, range(10, 11))
            os.write(wrote[1], b"x")
            os.read(closed[0], 1)
            for n in range(11, 20):
                buy(ledger, range(n, n + 1))
            code = 0
        os._exit(code)
    os.read(wrote[0], 1)
    # The child opened the file while we held a reservation: it must not have released it.
    ledger.mark_sent([mine])
    ledger.record([Answer(mine, key_number(100), "x")])
    # With inherited locks this would be taken for the last connection and delete the child's log.
    ledger.close()
    os.write(closed[1], b"x")
    assert os.waitpid(pid, 0)[1] == 0
    with Ledger(path) as ledger:
        assert len(ledger.lookup([key_number(n) for n in [*range(5), *range(10, 20), 100]])) == 16
    for end in (*wrote, *closed):
        os.close(end)


def test_attempts_of_the_dead_are_settled_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    code = (
        "import os, sys, proxyprompt.ledger as l\n"
        "ledger = l.Ledger(sys.argv[1])\n"
        "ids = ledger.reserve(['ab' * 32] * 5, run='dead', stage='s', role='target', model='m')\n"
        "ledger.mark_sent(ids[:2])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    for alone in (True, False):
        living = None if alone else Ledger(path)
        if living is not None:
            living.reserve(["cd" * 32], run="living", stage="s", role="target", model="m")
        subprocess.run([sys.executable, "-c", code, str(path)], check=False)
        with Ledger(path) as ledger:
            dead = ledger.totals(run="dead")
            assert (dead.unknown, dead.open) == (2 if alone else 4, 0)
            assert ledger.totals(run="living").open == (0 if alone else 1)
        if living is not None:
            living.close()
    # The last process is alive (it is this one), but nobody has the file open: the reservation is void.
    with Ledger(path) as ledger:
        assert ledger.totals(run="living").open == 0


# --- limits -------------------------------------------------------------------------------------------


def test_limits_count_what_is_done_open_and_unknown_but_not_what_failed(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        buy(ledger, range(3))
        common = {"run": "r", "stage": "s", "role": "target", "model": "m"}
        ids = ledger.reserve([key_number(n) for n in range(10, 14)], **common)
        ledger.mark_sent(ids[:2])
        ledger.fail(ids[:1], "no answer")
        ledger.release(ids[1:3])  # one unknown, one gone; one stays reserved: 3 + 1 + 1 spent
        ledger.reserve([key_number(50)], run="other", stage="s", role="target", model="m")
        ledger.reserve([key_number(51)], run="r", stage="s", role="proxy", model="m")
        keys = [key_number(20), key_number(21)]
        message = r"max_calls=6: run 'r' has spent or reserved 5 and asks for 2 more; nothing was sent.*to 7"
        with pytest.raises(BudgetExceededError, match=message):
            ledger.reserve(keys, limits=Limits(max_calls=6), **common)
        assert ledger.totals(run="r", role="target").open == 1
        assert len(ledger.reserve(keys, limits=Limits(max_calls=7), **common)) == 2
        with pytest.raises(BudgetExceededError):
            ledger.reserve(keys[:1], limits=Limits(max_calls=0), **common)
        assert ledger.reserve([], limits=Limits(max_calls=0), **common) == []


def test_token_limits_take_reported_tokens_and_estimates(tmp_path: Path) -> None:
    common = {"run": "r", "stage": "s", "role": "target", "model": "m"}
    with Ledger(tmp_path / "l.db") as ledger:
        buy(ledger, range(3))  # 12 tokens each
        ledger.reserve([key_number(10)], tokens=[30], limits=Limits(max_tokens=66), **common)
        with pytest.raises(BudgetExceededError, match="max_tokens=66: run 'r' has spent or reserved 66"):
            ledger.reserve([key_number(11)], limits=Limits(max_tokens=66), **common)
        with pytest.raises(BudgetExceededError, match="asks for 5 more"):
            ledger.reserve([key_number(11)], tokens=[5], limits=Limits(max_tokens=70), **common)
        with pytest.raises(InputError, match="give one per key"):
            ledger.reserve([key_number(11)], tokens=[1, 2], **common)


@pytest.mark.parametrize("value", [-1, 1.5, True, "3"])
def test_limits_are_whole_numbers(value: object) -> None:
    with pytest.raises(InputError, match="max_calls="):
        Limits(max_calls=value)  # type: ignore[arg-type]


def test_limits_do_not_fit_a_proxy(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger, pytest.raises(InputError, match="limits bound the target"):
        ledger.reserve([], run="r", stage="s", role="proxy", model="m", limits=Limits(max_calls=1))
