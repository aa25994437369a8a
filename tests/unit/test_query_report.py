"""What verify_queries found, as a page, as Markdown and from the command line: measured and estimated look different."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from proxyprompt import config as configs
from proxyprompt.attribution.verified import StoppingRule, Verification
from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.cli import main
from proxyprompt.errors import InputError
from proxyprompt.prompt import Query, Unit
from proxyprompt.report import render_queries_html, render_queries_markdown
from proxyprompt.verifying import QueryVerification, VerifiedQueries

HOSTILE = "<script>alert(1)</script> [x](http://evil.example) \u202e"


def found() -> VerifiedQueries:
    units = tuple(
        Unit("sentence", f"s{i}", text) for i, text in enumerate(("One.", HOSTILE, "Three.", "Four."))
    )
    result = Verification(
        np.array([0.2, -1.5, 0.9, 0.0]), np.array([np.nan, 0.8, 0.1, np.nan]), (1, 2), 1, "settled", 3, 0.05
    )
    query = QueryVerification(Query("q1", {"input": "x"}, "yes"), units, "yes", True, result, False)
    return VerifiedQueries((query,), StoppingRule(0.5, 0.9, 0.1, 24), 0.05, 4)


def test_the_page_fills_what_was_measured_and_leaves_the_rest_hollow() -> None:
    page = render_queries_html(found().to_dict())
    assert page.count('class="mark-measured') == 2 + 2  # two units, and two in the legend
    assert page.count('class="mark-estimated') == 2 + 1
    assert page.count("not measured </span>") == 2
    assert page.count('class="badge good">decides') == 1
    assert "<script" not in page
    assert "[U+202E]" in page
    assert "24 fully measured queries" in page


def test_the_table_says_not_measured_and_escapes() -> None:
    text = render_queries_markdown(found().to_dict())
    assert text.count("not measured") == 2
    assert "| 1 | &lt;script&gt;" in text
    assert "| decides |" in text
    with pytest.raises(InputError, match="not the result of verify_queries"):
        render_queries_markdown({"queries": [{}]})


def score(request: ScoreRequest) -> list[float]:
    """Yes, where the last query has the word; a proxy's doubt is in its name alone."""
    query = str(request.prompt).rsplit("\n\n", 1)[-1]
    return [-0.1, -2.4] if "awful" in query else [-2.4, -0.1]


def test_the_command_names_the_sentence_and_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"r{i}", "input": f"text {i}", "label": ("bad", "good")[i % 2]} for i in range(24)]
    (tmp_path / "demos.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows[4:])))
    new = [
        {"id": "a", "input": "A film. It was awful. I left.", "label": "bad"},
        {"id": "b", "input": "Only one sentence", "label": "good"},
    ]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, new)))
    (tmp_path / "c.toml").write_text(
        '[prompt]\ndemonstrations = "demos.jsonl"\n[queries]\nfile = "queries.jsonl"\n'
        '[target]\nmodel = "embedded:gemma-3-270m"\n[[proxies]]\nmodel = "embedded:smollm2-135m"\n'
    )
    models = iter([ScriptedBackend(score=score, name="target"), ScriptedBackend(score=score, name="proxy")])
    monkeypatch.setattr(configs, "_model", lambda *_: next(models))
    done = CliRunner().invoke(main, ["queries", str(tmp_path / "c.toml"), str(tmp_path / "new.jsonl")])
    assert done.exit_code == 0, done.output
    assert "| 1 | It was awful. |" in done.output
    assert "decides" in done.output
    assert "1 query;" in done.output
    folder = tmp_path / "proxyprompt-out"
    assert "It was awful." in (folder / "queries.html").read_text()
    assert (folder / "queries.md").stat().st_mode & 0o777 == 0o600
