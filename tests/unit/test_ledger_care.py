"""Looking after a ledger, from the command line: nothing lost unasked, nothing left when asked, nothing hostile shown."""

from __future__ import annotations

import json
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxyprompt._journal import LedgerJournal
from proxyprompt._ledger_calls import change, learn_seal
from proxyprompt.backends.base import ScoreRequest, Usage
from proxyprompt.cli import main
from proxyprompt.errors import InputError, LedgerError
from proxyprompt.ledger import PICO, Answer, Failure, Ledger, RequestKeys
from proxyprompt.ledger_care import prune, verify

KEYS = RequestKeys({"model": "m"}, "score", {})
HOSTILE = "gp\x1b]52;c;cm0gLXJm\x07t\u202e\x9b31m"


def fill(path: Path, run: str = "one", first: int = 0, n: int = 3, model: str = "m") -> list[str]:
    requests = [ScoreRequest(f"prompt number {first + k} of {run}", ("a",)) for k in range(n)]
    keys = [KEYS.key(r) for r in requests]
    with Ledger(path) as ledger:
        ids = ledger.reserve(
            keys, run=run, stage="s", role="target", model=model, money=[5 * PICO] * n, currency="USD"
        )
        ledger.mark_sent(ids)
        ledger.record(
            [
                Answer(
                    i,
                    key,
                    '{"logprobs":[-1.0],"censored":[false]}',
                    Usage(10, 1),
                    "m-1",
                    KEYS.document(r),
                    PICO // 4,
                )
                for i, key, r in zip(ids, keys, requests, strict=True)
            ]
        )
    return keys


def call(*arguments: str, **more: str) -> Result:
    return CliRunner().invoke(main, ["ledger", *arguments], **more)  # type: ignore[arg-type]


def files(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("l.db*")))


def test_list_gives_calls_tokens_and_money(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path)
    fill(path, "two", first=10, model=HOSTILE)
    done = call("list", str(tmp_path))  # the folder of a run will do
    assert done.exit_code == 0, done.output
    assert "m: 3 done; 30 + 3 tokens; 0.750000 USD" in done.stdout
    assert not set("\x1b\x07\x9b\u202e") & set(done.stdout)
    body = json.loads(call("list", str(path), "--json").stdout)
    assert [run["run"] for run in body["runs"]] == ["one", "two"]
    assert body["all"]["money"] == {"USD": "1.50"}
    assert body["runs"][1]["models"][HOSTILE]["done"] == 3


def test_show_finds_by_key_and_by_run(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    key = fill(path)[1]
    with Ledger(path) as ledger:
        (attempt,) = ledger.reserve(["ab" * 32], run="bad", stage="s", role="target", model="m")
        ledger.record([], [Failure(attempt, f"HTTP 500: {HOSTILE}")])
    rows = json.loads(call("show", str(path), key[:12], "--json").stdout)
    assert [row["kind"] for row in rows] == ["answer", "call"]
    assert rows[0]["answer"]["logprobs"] == [-1.0]
    assert rows[0]["request"]["request"]["prompt"]["text"] == "prompt number 1 of one"
    shown = call("show", str(path), "bad")
    assert "HTTP 500" in shown.stdout
    assert not set("\x1b\x07\x9b\u202e") & set(shown.stdout)
    missing = call("show", str(path), "zz")
    assert (missing.exit_code, "has the key or the run 'zz'" in missing.stderr) == (2, True)


def test_export_is_private_complete_and_names_no_machine(tmp_path: Path) -> None:
    import socket

    path, out = tmp_path / "l.db", tmp_path / "copies" / "all.jsonl"
    fill(path)
    fill(path, "two", first=10)
    done = call("export", str(path), "--out", str(out))
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["answer"] * 6 + ["call"] * 6
    assert {row["money"] for row in rows[6:]} == {"0.25"}
    assert f'"{socket.gethostname()}"' not in out.read_text()
    one = [json.loads(line) for line in call("export", str(path), "--run", "two").stdout.splitlines()]
    assert len(one) == 6
    assert {row["run"] for row in one if row["kind"] == "call"} == {"two"}


def test_verify_finds_every_kind_of_damage_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    fill(path, n=6)
    assert call("verify", str(path)).exit_code == 0
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE response SET body = replace(body, '1', '2') WHERE rowid = 2")
        connection.execute("UPDATE spent SET money = money - 1")
    connection.close()
    before = path.read_bytes()
    done = call("verify", str(path), "--json")
    assert done.exit_code == 6
    body = json.loads(done.stdout)
    assert [(d["table"], d["row"]) for d in body["damage"]] == [("response", 2), ("spent", 0)]
    assert (body["sound"], body["answers"], body["calls"]) == (False, 6, 6)
    assert "does not match its own hash" in call("verify", str(path)).stdout
    assert path.read_bytes() == before


def test_verify_finds_an_answer_that_was_filed_under_another_request(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    keys = fill(path)
    with Ledger(path) as ledger:
        (attempt,) = ledger.reserve(["ab" * 32], run="r", stage="s", role="target", model="m")
        ledger.record([Answer(attempt, "ab" * 32, "{}", request=KEYS.document(ScoreRequest("x", ())))])
        assert [d.row for d in verify(ledger).damage] == [len(keys) + 1]


def test_prune_asks_first_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    one, two = fill(path), fill(path, "two", first=10)
    shared = fill(path, "two", first=20, n=1)
    with Ledger(path) as ledger:
        ledger.reserve(shared, run="one", stage="s", role="target", model="m")  # given up at the next opening
        ids = ledger.reserve(shared, run="three", stage="s", role="target", model="m")
        ledger.record([Answer(ids[0], shared[0], "{}")])
    no = call("prune", str(path), "--run", "two", input="n\n")
    assert (no.exit_code, "Remove 4 calls, 3 answers" in no.stderr) == (1, True)
    assert b"of two" in files(tmp_path)
    yes = call("prune", str(path), "--run", "two", "--yes", "--json")
    assert json.loads(yes.stdout) == {"calls": 4, "answers": 3, "quarantined": 0, "backups": []}
    with Ledger(path) as ledger:
        assert set(ledger.lookup([*one, *two, *shared])) == {*one, *shared}  # what another run uses stays
        assert [run.run for run in ledger.runs()] == ["one", "three"]
        assert verify(ledger).sound
        content = files(tmp_path)
    assert content.count(b"of two") == content.count(b"number 20 of two")
    assert b"of one" in content


def test_prune_by_day_quarantine_and_backup(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    keys = fill(path)
    (tmp_path / "l.db.schema-1.backup").write_text("old texts")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE response SET body = 'x' WHERE rowid = 1")
        learn_seal(connection)
        connection.execute(change("id = 2", created_at="1e9"))
    connection.close()
    with Ledger(path) as ledger, pytest.warns(RuntimeWarning, match="set aside"):
        ledger.lookup(keys)
    done = call("prune", str(path), "--before", "2002-01-01", "--quarantine", "--yes")
    assert "Removed 1 calls, 1 answers, 1 rows set aside, 0 backups" in done.stdout
    assert "still holds" in done.stderr
    assert call("prune", str(path), "--backups", "--yes").exit_code == 0
    assert not list(tmp_path.glob("*.backup*"))
    with Ledger(path) as ledger:
        assert set(ledger.lookup(keys)) == {keys[2]}


def test_prune_refuses_without_a_name_with_a_wrong_one_and_while_others_work(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    fill(path)
    assert call("prune", str(path), "--yes").exit_code == 2
    assert "no run 'nine'" in call("prune", str(path), "--run", "nine", "--yes").stderr
    assert "YYYY-MM-DD" in call("prune", str(path), "--before", "soon", "--yes").stderr
    code = (
        "import sys, proxyprompt.ledger as l\n"
        "with l.Ledger(sys.argv[1]):\n"
        "    print('open', flush=True); sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    refused = call("prune", str(path), "--run", "one", "--yes")
    child.communicate("")
    assert (refused.exit_code, "is open elsewhere" in refused.stderr) == (6, True)
    with Ledger(path) as ledger:
        assert ledger.totals().done == 3
        with Ledger(path), pytest.raises(LedgerError, match="open elsewhere"):
            prune(ledger, runs=["one"])
        with pytest.raises(InputError, match="Nothing was named"):
            prune(ledger)


def test_what_is_no_ledger_ends_with_the_ledgers_code(tmp_path: Path) -> None:
    done = call("list", str(tmp_path / "none.db"))
    assert done.exit_code == 6
    assert "There is no ledger" in done.stderr
    assert not (tmp_path / "none.db").exists()


def test_pruning_by_date_drops_notes_of_old_batches_only(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        journal = LedgerJournal(ledger, "o", [])
        journal.write("old", "{}")
        journal.write("new", "{}")
        with ledger.transaction() as connection:
            connection.execute("UPDATE journal SET written_at = 5 WHERE name = 'old'")
        prune(ledger, runs=[], before=6)
        assert list(journal.read()) == ["new"]
