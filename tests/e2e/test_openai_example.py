"""The worked example of the OpenAI client runs as a user would run it, against a real model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama import llama_server

from proxyprompt import Artifact

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "integrations" / "openai-client" / "examples" / "prune_and_wrap.py"


@pytest.fixture
def llama() -> Iterator[str]:
    """Base URL of a real server."""
    yield from llama_server(alias="smollm2")


def test_the_example_saves_tokens_and_money(llama: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "smollm2"],
        cwd=tmp_path,
        env={
            **os.environ,
            "OPENAI_BASE_URL": llama,
            "OPENAI_API_KEY": "none",
            "PYTHONPATH": str(ROOT / "src"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    artifact = Artifact.load(tmp_path / "artifact.json")
    assert artifact.certified
    assert artifact.removed
    assert "20 of 20 calls pruned" in done.stdout
    tokens = [int(n) for n in re.findall(r"(\d+) prompt tokens a call", done.stdout)]
    money = [float(n) for n in re.findall(r"\$([\d.]+) a million calls", done.stdout)]
    assert tokens[1] < tokens[0]
    assert money[1] < money[0]
    # What the wrapper says it saved is what the server counted, up to the rounding of means.
    saved = re.search(r"pruned, (\d+) tokens saved", done.stdout)
    assert saved is not None
    assert int(saved.group(1)) == pytest.approx(20 * (tokens[0] - tokens[1]), abs=60)
