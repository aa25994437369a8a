"""Configurations: every mistake is named before any model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from proxyprompt.backends.base import keeps_journal
from proxyprompt.config import RunConfig, _ledger, config_from_mapping, load_config
from proxyprompt.errors import ConfigError, DataError, ModelSpecError, ProxyPromptError
from proxyprompt.task import LabelTask, TextTask

GOOD = """
title = "t"
[prompt]
demonstration_template = "M: {input}\\nT: {output}"
demonstrations = "demos.jsonl"
[queries]
file = "queries.jsonl"
[task]
labels = ["a", "b"]
[target]
model = "embedded:gemma-3-270m"
[[proxies]]
model = "embedded:smollm2-135m"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    demos = [{"id": f"d{i}", "input": f"demo {i}", "label": "ab"[i % 2]} for i in range(6)]
    queries = [{"id": f"q{i}", "input": f"query {i}", "label": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "demos.jsonl").write_text("\n".join(map(json.dumps, demos)))
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    return tmp_path


def load(folder: Path, text: str = GOOD) -> RunConfig:
    path = folder / "c.toml"
    path.write_text(text)
    return load_config(path)


def edit(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def served(option: str) -> str:
    """A target behind an API, with one option."""
    return edit('embedded:gemma-3-270m"', f'openai:m"\nbase_url = "http://127.0.0.1:1/v1"\n{option}')


def test_all_options_of_a_served_model_are_taken(folder: Path) -> None:
    options = """
        api = "chat"
        top_logprobs = 5
        evidence = ["logprobs", "texts"]
        repeats = 3
        reasoning_tokens = 100
        parameters = {reasoning_effort = "none"}
        concurrency = 9
        rpm = 60
        tpm = 1e5
        timeout = 5
        max_tries = 2
        max_wait = 60
        paid_retries = 0
        model_change = "error"
        batch = true
        batch_size = 10
        batch_poll = 1.5
        batch_wait = 60
        allow_http = true
    """
    target = load(folder, served(options)).target
    assert target.identity["repeats"] == 3
    assert target.identity["parameters"] == {"reasoning_effort": "none"}
    assert keeps_journal(target)


def test_a_good_config_names_everything_and_loads_nothing(folder: Path) -> None:
    config = load(folder)
    assert config.prompt.n_units == 6
    assert {k: len(v) for k, v in config.splits.items()} == {"explain": 10, "select": 10, "sealed": 20}
    assert config.target.name == "embedded:gemma-3-270m"
    assert [p.name for p in config.proxies] == ["embedded:smollm2-135m"]
    assert config.task == LabelTask(("a", "b"))
    assert config.output == folder / "proxyprompt-out"


def test_reading_a_config_imports_no_model_library(folder: Path) -> None:
    (folder / "c.toml").write_text(GOOD)
    code = (
        "import sys; from proxyprompt.config import load_config; load_config(sys.argv[1]);"
        "bad = {'torch', 'transformers', 'openai', 'jinja2'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "c.toml")], check=True)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("title = ", ConfigError, "malformed TOML"),
        (GOOD + "\n[sceening]\n", ConfigError, "unknown key 'sceening'"),
        (edit("[task]", "[task]\nlabls = 1"), ConfigError, "unknown keys"),
        (edit('labels = ["a", "b"]', 'labels = ["a"]'), ConfigError, "at least two"),
        (edit('labels = ["a", "b"]', 'labels = ["a", "c"]'), DataError, "the label 'b' is not allowed"),
        (edit("embedded:gemma-3-270m", "embedded:gemma-9"), ModelSpecError, "gemma-9"),
        (edit("embedded:gemma-3-270m", "gpt-4"), ModelSpecError, "not understood"),
        (edit("embedded:gemma-3-270m", "hf:./nowhere"), ModelSpecError, "no such folder"),
        (edit("embedded:gemma-3-270m", "replay:none.jsonl"), ModelSpecError, "no such file"),
        (edit("demos.jsonl", "nope.jsonl"), DataError, "no such file"),
        (edit("{output}", "{outputs}"), ProxyPromptError, "exactly one"),
        (edit("{input}", "{title}"), DataError, "needs a field 'title'"),
        (
            edit("[queries]", "[queries]\nsizes = {explain = 30, select = 30, sealed = 30}"),
            DataError,
            "asks for 90",
        ),
        (edit("[queries]", "[queries]\nsizes = {test = 3}"), ConfigError, "sizes"),
        (edit('file = "queries.jsonl"', ""), ConfigError, "either file"),
        (edit('title = "t"', "tau = 1.5"), ConfigError, "tau: got 1.5"),
        (edit('title = "t"', "confidence = 1.0"), ConfigError, "confidence"),
        (edit('title = "t"', "seed = -1"), ConfigError, "seed"),
        (GOOD + "\n[compress]\nkeep = ['zz']", ConfigError, "'zz'"),
        (GOOD + "\n[report]\ntext = 'some'", ConfigError, "report.text"),
        (GOOD + '\n[[proxies]]\nmodel = "embedded:smollm2-135m"', ConfigError, "twice"),
        (edit('[target]\nmodel = "embedded:gemma-3-270m"', "[target]"), ConfigError, "target: no model"),
        (
            edit('model = "embedded:gemma-3-270m"', 'model = "embedded:gemma-3-270m"\ncolour = 1'),
            ModelSpecError,
            "colour",
        ),
        (served("repeats = 0"), ModelSpecError, "repeats=0 must be an integer from 1 to 100"),
        (
            served("evidence = ['guess']"),
            ModelSpecError,
            "must name one or more of logprobs, decisions, texts",
        ),
        (served("batch = 'yes'"), ModelSpecError, "batch='yes' must be true or false"),
        (served("parameters = {n = 2}"), ModelSpecError, "parameters: n are set by the backend"),
        (served("api_key = 'sk-1'"), ModelSpecError, "unknown options"),
        (
            edit("embedded:gemma-3-270m", 'openai:m"\nbase_url = "http://10.0.0.9/v1'),
            ModelSpecError,
            "allow_http",
        ),
        (edit("[task]", "[task]\nkind = 'rank'"), ConfigError, "task.kind"),
        (edit("[prompt]", "[prompt]\nstyle = 'xml'"), ProxyPromptError, "style"),
    ],
)
def test_mistakes_are_named(folder: Path, text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        load(folder, text)


def test_a_missing_key_for_a_remote_model_is_said_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ModelSpecError, match="OPENAI_API_KEY is not set"):
        load(folder, edit("embedded:gemma-3-270m", "openai:some-model"))


def test_duplicate_ids_and_overlapping_splits(folder: Path) -> None:
    row = json.dumps({"id": "q0", "input": "query 0", "label": "a"})
    (folder / "one.jsonl").write_text(row)
    text = edit(
        'file = "queries.jsonl"', 'explain = "one.jsonl"\nselect = "queries.jsonl"\nsealed = "queries.jsonl"'
    )
    with pytest.raises(DataError, match="splits must not overlap"):
        load(folder, text)
    (folder / "queries.jsonl").write_text(row + "\n" + row)
    with pytest.raises(DataError, match="used at"):
        load(folder)


def test_labels_come_from_the_rows_when_none_are_named(folder: Path) -> None:
    no_labels = edit('labels = ["a", "b"]', "")
    assert load(folder, no_labels).task == LabelTask(("a", "b"))
    rows = [{"id": f"x{i}", "input": f"x {i}", "label": "p", "choices": ["p", f"r{i}"]} for i in range(40)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "demos.jsonl").write_text(
        "\n".join(json.dumps({**r, "id": f"d{r['id']}", "input": "d" + r["input"]}) for r in rows[:4])
    )
    assert load(folder, no_labels).task == LabelTask(None)


def test_text_tasks(folder: Path) -> None:
    text = edit('labels = ["a", "b"]', 'kind = "text"\nmetric = "token_f1"\nmax_tokens = 5')
    task = load(folder, text).task
    assert isinstance(task, TextTask)
    assert task.metric == "token_f1"


def test_queries_that_repeat_a_demonstration_are_noted(folder: Path) -> None:
    rows = [{"id": f"q{i}", "input": f"demo {i}", "label": "a"} for i in range(3)]
    more = [{"id": f"r{i}", "input": f"r {i}", "label": "a"} for i in range(9)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows + more)))
    assert "3 queries have the text of a demonstration" in load(folder).notes[0]


def test_what_the_screen_decides_on_is_a_setting(folder: Path) -> None:
    assert load(folder).settings.screening_on is None
    assert load(folder, GOOD + '[screening]\non = "fidelity"\n').settings.screening_on == "fidelity"
    for section, message in (
        ('on = "labels"', "allowed: attribution"),
        ('method = "paper"\non = "attribution"', "fidelities"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(folder, f"{GOOD}[screening]\n{section}\n")


@pytest.mark.parametrize(("old", "new"), [("target_calls", "max_calls"), ("target_tokens", "max_tokens")])
def test_the_old_names_of_budgets_say_the_new_ones(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[budget\] {old} is now called {new}.*Write {new} ="):
        config_from_mapping({"budget": {old: 5}}, folder=tmp_path)


@pytest.mark.parametrize(
    ("ledger", "message"),
    [
        ({"store": "secret"}, "ledger.store: got 'secret'; allowed: full, hash, encrypted"),
        ({"key_file": "k"}, "with store = 'hash' or 'encrypted'"),
        ({"store": "full", "key_file": "k"}, "with store = 'hash' or 'encrypted'"),
    ],
)
def test_the_ledger_s_section_is_checked(tmp_path: Path, ledger: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ledger(ledger, tmp_path, "c", LabelTask(("a", "b")))
    assert _ledger({"store": "hash", "key_file": "k"}, tmp_path, "c", LabelTask(("a", "b"))) == (
        "hash",
        tmp_path / "k",
    )


def test_a_text_task_does_not_fit_a_ledger_of_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keeps numbers only.*encrypted"):
        _ledger({"store": "hash"}, tmp_path, "c", TextTask())
