"""The noise floor of a real model that samples its answers, over a real server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from llama import llama_server
from numpy.typing import NDArray

from proxyprompt._screening_noise import measure_noise
from proxyprompt.backends.base import is_deterministic
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.ledger import Ledger
from proxyprompt.metering import Meter
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.task import LabelTask
from proxyprompt.value_function import PromptValueFunction, Values

SHOTS = {"a dull film": "bad", "a great film": "good", "I slept through it": "bad", "a joy": "good"}
REVIEWS = ["truly wonderful and moving", "a boring waste of time", "it was a film", "I saw it on a Monday"]


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    yield from llama_server()


def test_sampled_labels_have_a_floor_and_log_probabilities_nearly_none(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    demonstrations = [Demonstration(f"d{i}", {"input": x}, y) for i, (x, y) in enumerate(SHOTS.items())]
    prompt = FewShotPrompt(tuple(demonstrations), "", "Review: {input}\nIt is {output}")
    queries = [Query(f"q{i}", {"input": x}, "good") for i, x in enumerate(REVIEWS)]
    found = {}
    # Of sixteen texts at least one names a label; half of this model's first words name none.
    for evidence, repeats in (("texts", 16), ("logprobs", 1)):
        backend = OpenAIBackend("smol", base_url=llama, evidence=evidence, repeats=repeats, concurrency=1)
        assert not is_deterministic(backend)
        with Ledger(tmp_path / f"{evidence}.db") as ledger:
            for turn in range(2):
                meter = Meter(backend, ledger, role="target", run="r")

                def again(
                    asked: Sequence[Query], rows: NDArray[np.bool_], repeat: int, meter: Meter = meter
                ) -> Values:
                    return PromptValueFunction(
                        prompt, LabelTask(("good", "bad")), asked, meter, repeat=repeat
                    ).evaluate(rows)

                noise = measure_noise(again, queries, 4, 2)
                assert noise is not None
                assert found.setdefault(evidence, noise.to_dict()) == noise.to_dict()
                assert meter.stats.bought == (0 if turn else 3 * len(queries))
    # Sixteen samples at temperature 1 of a label that is not certain; log-probabilities of one prompt hardly move.
    assert found["texts"]["spread"] > 0.05
    assert found["logprobs"]["spread"] < 0.02
    assert found["texts"]["flips"] is not None
