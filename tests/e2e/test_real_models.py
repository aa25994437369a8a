"""The whole command on real models, and a dataset the project has never seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
fit_coalitions = 26
judge_coalitions = 6
[attribution]
proxy_coalitions = 26
[compress]
max_evaluations = 4
"""
    )
    return folder


def run(folder: Path, command: str = "run", **environment: str) -> dict[str, Any]:
    command_line = [
        sys.executable,
        "-c",
        "from proxyprompt.cli import main; main()",
        command,
        str(folder / "config.toml"),
    ]
    done = subprocess.run(
        [*command_line, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    body: dict[str, Any] = json.loads(done.stdout)
    return body


def within(estimate: dict[str, Any], spent: list[dict[str, Any]]) -> None:
    """Calls and tokens of every stage lie within what was said before."""
    bounds = {(s["stage"], s["role"], s["model"]): s for s in estimate["stages"]}
    assert spent
    for row in spent:
        if row["calls"]:
            said = bounds[row["stage"], row["role"], row["model"]]
            for name in ("calls", "prompt_tokens", "completion_tokens"):
                assert said[name]["low"] <= row[name] <= said[name]["high"], (row, said)
    assert {"tokenizer" in how for how in estimate["counting"].values()} == {True}


def test_the_command_works_on_unseen_data_and_the_second_run_loads_and_buys_nothing(
    dataset: Path, tmp_path: Path
) -> None:
    estimate = run(dataset, "estimate")
    assert not (dataset / "proxyprompt-out").exists()
    first = run(dataset)
    within(estimate, first["spent"])
    assert len(first["original_prompt"]["demonstrations"]) == 10
    assert sum(s["bought_now"] for s in first["spent"] if s["role"] == "target") > 0
    # The prompt's length as Gemma's tokenizer counts it: ten demonstrations of about twelve tokens, and a query.
    assert 100 < first["summary"]["before"]["tokens"] < 250
    assert "Restaurant reviews" in (dataset / "proxyprompt-out" / "report.html").read_text()

    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    second = run(dataset, PYTHONPATH=path)
    rest = run(dataset, "estimate")
    assert rest["run"] == estimate["run"]
    assert rest["calls"]["target"]["low"] == 0
    assert rest["calls"]["target"]["high"] < estimate["calls"]["target"]["high"]
    assert sum(s["bought_now"] for s in second["spent"]) == 0
    assert second["kept"] == first["kept"]
    assert second["attribution"] == first["attribution"]


def test_verify_mode_on_real_models_measures_within_its_estimate_and_keeps_the_two_apart(
    dataset: Path, tmp_path: Path
) -> None:
    for name in ("demos.jsonl", "queries.jsonl"):
        (tmp_path / name).write_text((dataset / name).read_text())
    config = (dataset / "config.toml").read_text()
    config = config.replace(
        "tau = 0.6\ndelta = 0.4\nfit_coalitions = 26\njudge_coalitions = 6", 'method = "off"'
    )
    config = config.replace("[attribution]", '[attribution]\nverify = "harmful"\nverify_level = 0.3')
    (tmp_path / "config.toml").write_text(config.replace("max_evaluations = 4", "max_evaluations = 2"))
    estimate = run(tmp_path, "estimate")
    body = run(tmp_path)
    within(estimate, body["spent"])
    found, calls = body["verification"], {(r["stage"], r["role"]): r["calls"] for r in body["spent"]}
    assert ("screen", "target") not in calls
    # Eight queries: a coalition each, and one call more for each demonstration measured; equal prompts are asked once.
    assert (
        8 * len(found["order"])
        <= calls["verify", "target"]
        <= 8 * (1 + len(found["order"]))
        == found["target_calls"]
    )
    assert 4 <= len(found["order"]) <= 10
    measured = [v is not None for v in found["measured"]]
    assert sorted(found["order"]) == [i for i, yes in enumerate(measured) if yes]
    assert measured == [v is None for v in found["expected"]]
    assert [d["source"] == "measured" for d in body["summary"]["demonstrations"]] == measured
    assert (
        "What the proxy proposed and the target measured"
        in (tmp_path / "proxyprompt-out" / "report.html").read_text()
    )
    again = run(tmp_path)
    assert sum(s["bought_now"] for s in again["spent"]) == 0
    assert again["verification"] == found
