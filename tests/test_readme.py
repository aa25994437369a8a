"""What the README shows, runs: its Python on recorded answers, its configuration through the real reader."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

import proxyprompt
from proxyprompt.backends.base import Backend
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.config import _SECTIONS, config_from_mapping
from proxyprompt.settings import Settings

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    labels = ("praise", "complaint")
    rows = [{"id": f"q{i}", "input": f"text {i}", "label": labels[i % 2]} for i in range(300)]
    demos = [{"id": f"d{i}", "input": f"demo {i}", "label": labels[i % 2]} for i in range(8)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(map(json.dumps, demos)))
    (tmp_path / "prompt.json").write_text(json.dumps({"instruction": "Which?", "demonstrations": demos}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: object) -> list[float]:
        text = str(request.prompt)  # type: ignore[attr-defined]
        # The last line asked: a query, or the input of a demonstration whose label is looked into.
        odd = int(re.findall(r"(?:text|demo) (\d+)", text)[-1]) % 2
        margin = 0.2 * text.count("demo") * (-1 if odd else 1) + 1.0
        return [float(x) for x in -np.logaddexp(0, [-margin, margin])]

    def scripted(spec: str, **options: object) -> Backend:
        return ScriptedBackend(score=answer, name=spec)

    monkeypatch.setattr(proxyprompt.models, "open_model", scripted)
    code = block("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(compile(code, "README", "exec"), {})
    for name in ("artifact.json", "prompt.json", "report.html", "report.md"):
        assert (folder / "out" / name).is_file()


def test_the_configuration_is_accepted(folder: Path) -> None:
    raw = tomllib.loads(block("toml"))
    raw["target"]["model"] = "embedded:gemma-3-270m"  # no model folder is made here
    config = config_from_mapping(raw, folder=folder)
    assert config.prompt.n_units == 8
    assert {k: len(v) for k, v in config.splits.items()} == {"explain": 40, "select": 60, "sealed": 200}


def test_nothing_sends_a_user_to_the_wrong_package() -> None:
    assert not re.search(r"pip install ['\"]?proxyprompt(?!-core)", README)


def test_linked_files_exist() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / target).exists(), target


def test_every_option_of_shrinking_is_documented_with_its_default() -> None:
    page = (Path(__file__).parent.parent / "docs" / "shrinking.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (not set|`.*?`) \| (?:`(\w+)`)? ?\|", page, re.MULTILINE)
    settings = Settings()
    for key, shown, field in rows:
        value = getattr(settings, field or key)
        value = list(value) if isinstance(value, tuple) else value
        assert shown == ("not set" if value is None else f"`{json.dumps(value)}`"), key
    sections = ("clean", "compress", "certificate", "price", "caching")
    wanted = {"tau", "margin", "confidence"}.union(*(_SECTIONS[name] for name in sections))
    wanted |= {key for key in _SECTIONS["attribution"] if key.startswith("verify")}
    assert {key for key, _, _ in rows} == wanted


def test_the_names_for_the_openai_sdk_are_public() -> None:
    code = README.split("## In an application that calls the OpenAI SDK", 1)[1].split("```")[1]
    called = set(re.findall(r"(?<![.\w])([a-z_]+)\(", code))
    assert called == {"prune_messages", "wrap_openai"} <= set(proxyprompt.__all__)
