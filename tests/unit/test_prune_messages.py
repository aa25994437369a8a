"""prune_messages is the pipeline for chat messages: the caller's own turns come back, fewer of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxyprompt import PrunedMessages, Settings, TextTask, prune_messages
from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.errors import DataError, InputError

SHOTS = [
    ("helps 1", "yes"), ("harms 2", "no"), ("helps 3", "no"), ("harms 4", "yes"), ("helps 5", "yes"), ("helps 6", "no"),
]  # fmt: skip
MESSAGES: list[dict[str, Any]] = [
    {"role": "developer", "content": "Yes or no?"},
    *(
        {"role": role, "name": f"example_{role}", "content": content}
        for text, answer in SHOTS
        for role, content in (("user", f"Text: {text}"), ("assistant", answer))
    ),
    {"role": "user", "content": "Text: anything"},
]
QUERIES = [(f"query {i}", ("yes", "no")[i % 2]) for i in range(160)]


def answer(request: ScoreRequest) -> list[float]:
    """The right answer wins by what the demonstrations in the prompt add up to."""
    assert not isinstance(request.prompt, str)
    text = " ".join(turn.content for turn in request.prompt)
    margin = 0.4 + 0.5 * text.count("helps") - 1.5 * text.count("harms")
    right = int(request.prompt[-1].content.split()[-1]) % 2 if request.prompt[-1].content[-1].isdigit() else 0
    values = [-np.logaddexp(0, -margin), -np.logaddexp(0, margin)]
    return [float(v) for v in (values if right == 0 else values[::-1])]


def prune(tmp_path: Path, **more: Any) -> PrunedMessages:
    given: dict[str, Any] = {
        "target": ScriptedBackend(score=answer),
        "labels": ("yes", "no"),
        "user_template": "Text: {input}",
        "settings": Settings(relabel="off", clean_prior="off", fit_coalitions=40),
        "ledger": tmp_path / "ledger.db",
        "rng": np.random.default_rng(0),
    }
    return prune_messages(more.pop("messages", MESSAGES), more.pop("queries", QUERIES), **(given | more))


def test_the_callers_turns_come_back_without_what_harms(tmp_path: Path) -> None:
    before = copy.deepcopy(MESSAGES)
    found = prune(tmp_path)
    assert before == MESSAGES
    assert found.artifact.certified
    shown = [turn["content"] for turn in found.messages]
    assert not any("harms" in text for text in shown)
    assert shown[0] == "Yes or no?"
    assert shown[-1] == "Text: anything"
    assert all(any(turn is mine for mine in MESSAGES) for turn in found.messages)
    kept = [i for turn in found.messages[1:-1:2] for i, mine in enumerate(MESSAGES) if mine is turn]
    assert found.artifact.kept == tuple(f"demo-{(i + 1) // 2}" for i in kept)


def test_rows_and_pairs_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"id": f"query-{i + 1}", "input": text, "label": label} for i, (text, label) in enumerate(QUERIES)
    ]
    first, second = prune(tmp_path), prune(tmp_path, queries=rows)
    assert first.result.run == second.result.run
    assert first.messages == second.messages


@pytest.mark.parametrize(
    ("more", "error", "reason"),
    [
        ({"labels": None}, InputError, "labels and task: exactly one"),
        ({"task": TextTask()}, InputError, "labels and task: exactly one"),
        ({"queries": [("a", "yes", "more")]}, DataError, r"queries\[0\]: got"),
        ({"queries": [3]}, DataError, r"queries\[0\]: got 3"),
        ({"user_template": "T{a}: {b}"}, DataError, "cannot fill the 2 slots"),
        ({"messages": MESSAGES[:1] + MESSAGES[-1:]}, InputError, "no demonstrations were recognised"),
        ({"target": "nothing"}, InputError, "not understood"),
    ],
)
def test_what_is_refused_before_anything_is_sent(
    tmp_path: Path, more: dict[str, Any], error: type[Exception], reason: str
) -> None:
    def never(request: object) -> list[float]:
        raise AssertionError("something was sent")

    with pytest.raises(error, match=reason):
        prune(tmp_path, **({"target": ScriptedBackend(score=never)} | more))
