"""What the command line prints holds no terminal command, whatever the data are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from proxyprompt.cli import main

from .payloads import ESCAPES, INVISIBLE

TEXTS = [*ESCAPES, *(f"pay{chr(c)}pal" for c in INVISIBLE if not 0xD800 <= c < 0xE000)]
LABELS = ("yes", "no")


def write(folder: Path, text: str, *, demo_id: str = "d0", query_id: str = "q0", label: str = "yes") -> Path:
    demos = [{"id": demo_id, "input": "x", "label": label}, {"id": "d1", "input": "y", "label": "no"}]
    rows = [{"id": f"q{i}", "input": f"query {i}", "label": LABELS[i % 2]} for i in range(1, 90)]
    rows.append({"id": query_id, "input": text, "label": "yes"})
    (folder / "demos.jsonl").write_text("\n".join(map(json.dumps, demos)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # JSON's escapes of strings are TOML's too, but for pairs of surrogates.
    title = "".join(f"\\U{ord(c):08x}" for c in text)
    (folder / "config.toml").write_text(
        f"""title = "{title}"
output = "out"
[prompt]
demonstrations = "demos.jsonl"
[queries]
file = "queries.jsonl"
[task]
labels = ["yes", "no"]
[target]
model = "openai:m"
base_url = "http://127.0.0.1:9/v1"
"""
    )
    return folder / "config.toml"


@pytest.mark.parametrize("place", ["title", "label", "demonstration id", "query id", "model"])
def test_no_text_reaches_the_terminal_as_a_command(tmp_path: Path, place: str) -> None:
    for text in TEXTS if place == "title" else TEXTS[::5]:
        config = write(
            tmp_path,
            text,
            demo_id=f"{text}d1" if place == "demonstration id" else "d0",
            query_id=f"{text}q" if place == "query id" else "q0",
            label=text if place == "label" else "yes",
        )
        if place == "demonstration id":  # twice, so that it is named
            rows = (tmp_path / "demos.jsonl").read_text()
            (tmp_path / "demos.jsonl").write_text(f"{rows}\n{rows}")
        if place == "query id":
            rows = (tmp_path / "queries.jsonl").read_text()
            (tmp_path / "queries.jsonl").write_text(f"{rows}\n{rows}")
        if place == "model":
            raw = config.read_text().replace(
                '"openai:m"', '"' + "".join(f"\\U{ord(c):08x}" for c in text) + '"'
            )
            config.write_text(raw)
        done = CliRunner().invoke(main, ["run", str(config), "--check"])
        assert done.exit_code == (0 if place == "title" else 2), done.output
        assert done.output.strip()
        assert not [c for c in done.output if not c.isprintable() and c not in "\n\t"], (text, done.output)
