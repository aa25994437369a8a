"""The README does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dspy
import dspy_scripted as s
import pytest

HERE = Path(__file__).parents[1]


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {
        "metric": s.right,
        "compiled": s.program(),
        "trainset": s.TRAIN[:20],
        "valset": s.VAL[:90],
    }
    with dspy.context(lm=s.Scripted(s.harmed_by("nothing harms"))):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    assert len(names["again"].demos) == len(names["pruned"].demos) < 4
    assert "certified at 95% confidence" in capsys.readouterr().out


def test_the_readme_shows_what_the_example_printed() -> None:
    printed = re.findall(r"```\n(8 demonstrations.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert printed
    assert printed[0] in (HERE / "examples" / "output.md").read_text()
