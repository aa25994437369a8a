"""The example and the README run as they stand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from planted_chain import LABELS, chat_prompt, planted, queries

HERE = Path(__file__).parent.parent


def test_the_example_saves_tokens_on_a_real_model(base_url: str, tmp_path: Path, capsys: Any) -> None:
    spec = importlib.util.spec_from_file_location("reviews", HERE / "examples" / "reviews.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.main(base_url, "smollm2", tmp_path)
    printed = capsys.readouterr().out
    summary = result.artifact.summary
    assert f"{summary['before']['tokens']:.0f} -> {summary['after']['tokens']:.0f}" in printed
    assert result.certified
    assert summary["after"]["tokens"] < summary["before"]["tokens"]
    saved = 1000 * summary["cost"]["money"]["saved_per_thousand_calls"]
    assert saved > 0
    assert f"saved in a million calls: {saved:.2f} USD" in printed
    assert (tmp_path / "artifact.json").exists()


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    names: dict[str, Any] = {
        "chain": chat_prompt() | planted(),
        "prompt": chat_prompt(),
        "model": planted(),
        "queries": queries(60),
    }
    first = blocks[0].replace('["good", "bad"]', str(list(LABELS)))
    exec(compile(first, "README.md", "exec"), names)
    names["chain"] = chat_prompt() | planted()
    exec(compile(blocks[1], "README.md", "exec"), names)
    assert names["fixed"] is not None
