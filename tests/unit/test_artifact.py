"""The stored result is versioned, checked, private."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from proxyprompt.artifact import Artifact
from proxyprompt.errors import ArtifactError

BODY = {
    "kind": "proxyprompt-artifact",
    "schema": 1,
    "original_prompt": {
        "instruction": "i",
        "demonstrations": [
            {"id": "a", "inputs": {"input": "x"}, "output": "y"},
            {"id": "b", "inputs": {"input": "z"}, "output": "y"},
        ],
    },
    "kept": ["b"],
    "removed": ["a"],
    "certificate": {"decision": "certified"},
    "summary": {},
}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "artifact.json"
    Artifact(BODY).save(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    back = Artifact.load(path)
    assert back == Artifact(BODY)
    assert [d.id for d in back.prompt.demonstrations] == ["b"]
    assert back.certified


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "not a ProxyPrompt artifact"),
        ({"schema": 2}, "schema 2; this version reads 1"),
        ({"kept": ["a", "b"]}, "do not add up"),
        ({"original_prompt": {"demonstrations": 3}}, "not readable"),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "artifact.json"
    path.write_text(json.dumps({**BODY, **change}))
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        Artifact.load(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="not valid JSON"):
        Artifact.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ArtifactError, match="kind is 'list'"):
        Artifact.load(tmp_path / "x.json")
