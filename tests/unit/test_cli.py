"""The command line: exit codes, what it prints where, what it writes. Targets are recorded answers."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from proxyprompt.backends.base import ScoreRequest, ScoreResult
from proxyprompt.backends.replay import write_recordings
from proxyprompt.cli import main
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query

LABELS = ("a", "b")
N = 4
CONFIG = """
title = "Recorded"
output = "out"
tau = 0.8
[prompt]
demonstrations = "demos.jsonl"
demonstration_template = "I: {input}\\nO: {output}"
[queries]
file = "queries.jsonl"
sizes = {explain = 15, select = 20, sealed = 40}
[task]
labels = ["a", "b"]
[target]
model = "replay:answers.jsonl"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt of four demonstrations, and a target's answers to all its coalitions, on its own inputs too."""
    path = tmp_path_factory.mktemp("cli")
    demos = [Demonstration(f"d{i}", {"input": f"demo {i}"}, LABELS[i % 2]) for i in range(N)]
    queries = [Query(f"q{i}", {"input": f"query {i}"}, LABELS[i % 2]) for i in range(75)]
    rows = [{"id": d.id, "input": d.inputs["input"], "label": d.output} for d in demos]
    (path / "demos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"id": q.id, "input": q.inputs["input"], "label": q.reference} for q in queries]
    (path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "config.toml").write_text(CONFIG)
    prompt = FewShotPrompt(tuple(demos), "", "I: {input}\nO: {output}")
    rng = np.random.default_rng(0)
    ease = np.r_[rng.normal(1.5, 1.0, len(queries)), np.full(N, 1.5)]
    own = [Query(d.id, d.inputs, d.output) for d in demos]
    pairs = []
    for mask in range(2**N):
        row = [bool(mask >> i & 1) for i in range(N)]
        for query, easy in zip([*queries, *own], ease, strict=True):
            margin = easy + 0.8 * row[0] + 0.1 * row[1]
            x = np.array([margin, 0.0]) if query.reference == "a" else np.array([0.0, margin])
            x = x - np.log(np.exp(x).sum())
            request = ScoreRequest(prompt.render(row, query), (" a", " b"))
            pairs.append((request, ScoreResult(tuple(map(float, x)), (False, False))))
    write_recordings(path / "answers.jsonl", pairs)
    return path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_run_writes_private_files_and_prints_the_verdict(folder: Path) -> None:
    done = call("run", str(folder / "config.toml"))
    assert done.exit_code == 0, done.stderr
    assert "Recorded" in done.stdout
    for name in ("artifact.json", "prompt.json", "report.html", "report.md", "ledger.db"):
        assert stat.S_IMODE(os.stat(folder / "out" / name).st_mode) == 0o600, name
    assert stat.S_IMODE(os.stat(folder / "out").st_mode) == 0o700


def test_json_is_the_only_thing_on_standard_output(folder: Path) -> None:
    done = call("run", str(folder / "config.toml"), "--json", "--out", str(folder / "other"))
    body = json.loads(done.stdout)
    assert body["kind"] == "proxyprompt-artifact"
    assert Path(body["files"]["html"]).is_file()
    assert body["certificate"]["n"] == 40


def test_check_loads_and_writes_nothing(folder: Path) -> None:
    done = call("run", str(folder / "config.toml"), "--check", "--out", str(folder / "never"))
    assert done.exit_code == 0
    assert "15 explain, 20 select, 40 sealed" in done.stderr
    assert "With 40 sealed queries the smallest certifiable loss is about" in done.stderr
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ((), 2, "no such file"),
        (('labels = ["a", "b"]', 'labels = ["a", "c"]'), 2, "not allowed"),
        (("replay:answers.jsonl", "embedded:gpt"), 2, "gpt"),
        (("[target]", "[budget]\nmax_calls = 10\n[target]"), 3, "10"),
    ],
)
def test_exit_codes(folder: Path, tmp_path: Path, change: tuple[str, ...], code: int, message: str) -> None:
    if not change:
        done = call("run", str(tmp_path / "none.toml"))
    else:
        path = folder / "changed.toml"
        path.write_text(CONFIG.replace(*change))
        done = call("run", str(path), "--out", str(tmp_path / "out"))
    assert done.exit_code == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_recording_is_a_model_error(folder: Path, tmp_path: Path) -> None:
    (folder / "few.jsonl").write_text("\n".join((folder / "answers.jsonl").read_text().splitlines()[:30]))
    path = folder / "few.toml"
    path.write_text(CONFIG.replace("answers.jsonl", "few.jsonl"))
    done = call("run", str(path), "--out", str(tmp_path / "out"))
    assert done.exit_code == 4
    assert "recording" in done.stderr


def test_strict_fails_when_nothing_is_certified(folder: Path, tmp_path: Path) -> None:
    path = folder / "strict.toml"
    path.write_text(CONFIG.replace("tau = 0.8", "tau = 1.0\n[compress]\nkeep = ['d0', 'd1', 'd2', 'd3']\n"))
    done = call("run", str(path), "--strict", "--out", str(tmp_path / "out"))
    assert done.exit_code == 5, done.stderr


def test_an_output_that_cannot_be_written_is_said_before_anything_runs(folder: Path) -> None:
    (folder / "file").write_text("")
    done = call("run", str(folder / "config.toml"), "--out", str(folder / "file" / "x"))
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr


def test_help_and_version() -> None:
    assert "Exit codes" in call("--help").stdout
    assert "proxyprompt" in call("--version").stdout


def test_new_outputs_are_explained_or_anomalies(folder: Path, tmp_path: Path) -> None:
    """The same outputs, once with their references and once with wrong ones, of which the opposite is expected."""
    config, out = str(folder / "config.toml"), str(tmp_path / "out")
    assert call("run", config, "--out", out).exit_code == 0
    rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()[-12:]]
    wrong = [{**r, "id": f"wrong {r['id']}", "label": "b" if r["label"] == "a" else "a"} for r in rows]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, [*rows, *wrong])))
    done = call("explains", config, str(tmp_path / "new.jsonl"), "--out", out, "--level", "0.2")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 24
    odd = [line for line in lines if line.strip().startswith("anomaly")]
    assert sum("wrong" in line for line in odd) == 12
    assert sum("wrong" not in line for line in odd) <= 6
    assert f"{len(odd)} of 24 are anomalies" in done.stderr
    as_json = call("explains", config, str(tmp_path / "new.jsonl"), "--out", out, "--level", "0.2", "--json")
    verdicts = json.loads(as_json.stdout)
    assert [v["query"] for v in verdicts][:2] == [r["id"] for r in rows[:2]]
    assert {v["verdict"] for v in verdicts[12:]} == {"anomaly"}
    strict = call("explains", config, str(tmp_path / "new.jsonl"), "--out", out, "--level", "0.001")
    assert strict.exit_code == 2
    assert "to calibrate" in strict.stderr
    (folder / "shorter.toml").write_text(CONFIG.replace("O: {output}", "A: {output}"))
    other = call("explains", str(folder / "shorter.toml"), str(tmp_path / "new.jsonl"), "--out", out)
    assert other.exit_code == 2
    assert "another prompt" in other.stderr
