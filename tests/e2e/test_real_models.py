"""The whole command on real models, and a dataset the project has never seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Written for this test: other words, other labels and another template than the demo.
TEXTS = {
    "praise": [
        "a lovely evening from start to finish", "the cook deserves every star", "we will come back with friends",
        "warm bread, kind people, perfect soup", "best dumplings in town by far", "I smiled all through dinner",
        "fresh fish and a wonderful view", "the cake alone is worth the trip", "quick, friendly and delicious",
        "a small place with a big heart", "everything tasted home made and good", "such a charming little bar",
        "my parents loved every single dish", "great value and generous plates", "the coffee here is superb",
        "what a treat, thank you so much", "clean tables and cheerful staff", "I dream of that pasta still",
    ],
    "complaint": [
        "the soup was cold and so was the waiter", "an hour of waiting for dry chicken", "never again, simply awful",
        "the floor was dirty and the music loud", "overpriced and without any taste", "my steak was burnt to coal",
        "rude service ruined the whole night", "the fish smelled bad, we left", "stale bread and sour wine",
        "they forgot our order and laughed", "a sad, greasy and tiny portion", "the worst pizza I have ever had",
        "bland food in an ugly room", "I felt sick the entire next day", "the bill was wrong, twice",
        "flies on the table, no thanks", "we waited, complained and went home hungry", "the salad was old and limp",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unseen")
    rows = [
        {"id": f"r{i}-{label}", "input": text, "label": label, "choices": sorted(TEXTS), "meta": {"n": i}}
        for i in range(18)
        for label, texts in TEXTS.items()
        for text in [texts[i]]
    ]
    demos, queries = rows[:10], rows[10:]
    demos[-1]["label"] = demos[-3]["label"] = "praise"
    (folder / "demos.jsonl").write_text("\n".join(map(json.dumps, demos)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (folder / "config.toml").write_text(
        """
title = "Restaurant reviews"
tau = 0.8
confidence = 0.8
[prompt]
instruction = "Praise or complaint?"
demonstration_template = "Guest: {input}\\nKind: {output}"
demonstrations = "demos.jsonl"
[queries]
file = "queries.jsonl"
sizes = {explain = 8, select = 8, sealed = 10}
[target]
model = "embedded:gemma-3-270m"
threads = 1
[[proxies]]
model = "embedded:smollm2-135m"
threads = 1
[screening]
tau = 0.6
delta = 0.4
fit_coalitions = 24
judge_coalitions = 6
[attribution]
proxy_coalitions = 24
[compress]
max_evaluations = 4
"""
    )
    return folder


def run(folder: Path, *more: str) -> dict[str, object]:
    command = [sys.executable, "-c", "from proxyprompt.cli import main; main()", "run", str(folder / "config.toml")]
    done = subprocess.run(
        [*command, "--json", *more], capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_the_command_works_on_unseen_data_and_the_second_run_buys_nothing(dataset: Path) -> None:
    first = run(dataset)
    prompt = first["original_prompt"]
    assert len(prompt["demonstrations"]) == 10  # type: ignore[index,arg-type]
    stages = first["spent"]
    assert sum(s["bought_now"] for s in stages if s["role"] == "target") > 0  # type: ignore[union-attr,index]
    summary = first["summary"]
    assert summary["before"]["performance"]["value"] > 0.5  # type: ignore[index]
    page = (dataset / "proxyprompt-out" / "report.html").read_text()
    assert "Restaurant reviews" in page

    start = time.monotonic()
    second = run(dataset)
    assert sum(s["bought_now"] for s in second["spent"]) == 0  # type: ignore[union-attr,index]
    assert second["kept"] == first["kept"]
    assert second["attribution"] == first["attribution"]
    # Not a benchmark: loading either model takes longer than this bound on any machine of ours.
    assert time.monotonic() - start < 60
