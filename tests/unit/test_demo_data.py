"""What the demo ships is what it says it is."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

from proxyprompt.config import RunConfig
from proxyprompt.demo import corrected_prompt, demo_config

ROWS = [
    json.loads(line)
    for line in (files("proxyprompt") / "demo_data" / "demonstrations.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
    if line
]


def config() -> RunConfig:
    return demo_config(Path("unused"))


def test_enough_demonstrations_of_every_kind() -> None:
    kinds = Counter(row["note"].split(" ")[0] for row in ROWS)
    assert len(ROWS) >= 24
    assert kinds["near-copy"] >= 4
    assert kinds["mislabelled"] >= 4


def test_enough_queries_in_disjoint_balanced_splits() -> None:
    splits = config().splits  # Splits refuses an overlap
    assert sum(len(q) for q in splits.values()) >= 240
    labels = config().task.labels  # type: ignore[union-attr]
    for queries in splits.values():
        counts = Counter(q.reference for q in queries)
        assert set(counts) == set(labels)
        assert max(counts.values()) <= 2 * min(counts.values())


def test_no_query_repeats_a_demonstration() -> None:
    assert config().notes == ()

    def words(text: str) -> frozenset[str]:
        return frozenset(text.lower().replace(",", "").replace(".", "").replace("?", "").split())

    demos = [words(row["input"]) for row in ROWS]
    for queries in config().splits.values():
        for query in queries:
            own = words(query.inputs["input"])
            assert max(len(own & d) / len(own | d) for d in demos) < 0.75, query.id


def test_correcting_changes_the_mislabelled_ones_only() -> None:
    prompt = config().prompt
    changed = {
        a.id
        for a, b in zip(prompt.demonstrations, corrected_prompt(prompt).demonstrations, strict=True)
        if a != b
    }
    assert changed == {row["id"] for row in ROWS if row["note"].startswith("mislabelled")}
