"""The sentence encoder of text scores, on the real packaged model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from proxyprompt.embedding import SentenceEncoder, default_encoder, similarity_to_references
from proxyprompt.errors import BackendError
from proxyprompt.task import TextTask


def test_rows_have_length_one_and_do_not_depend_on_the_batch() -> None:
    texts = ["a short text", "another one that is a good deal longer than the first", "x"]
    together = default_encoder().encode(texts)
    alone = np.vstack([default_encoder().encode([t]) for t in texts])
    assert together.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_similarity_follows_meaning() -> None:
    same, near, far = similarity_to_references(
        ["the cat sat on the mat"] * 3,
        [["the cat sat on the mat"], ["a cat is sitting on a rug"], ["tax law of 1913"]],
    )
    assert same == pytest.approx(1.0, abs=1e-5)
    assert same > near > far >= 0.0


def test_similarities_are_the_published_ones_of_sentence_transformers() -> None:
    """The matrix in that library's introduction to this model, to the four digits printed there."""
    weather = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = default_encoder().encode(weather)
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, published, atol=6e-5)
    scores = [similarity_to_references([a], [[b]])[0] for a in weather for b in weather]
    np.testing.assert_allclose(np.reshape(scores, (3, 3)), published, atol=6e-5)


def test_the_encoder_is_the_mean_over_all_tokens_of_a_text_as_the_models_own_settings_say() -> None:
    """Text by text, without padding, pooled by hand; the folder's settings say mean, normalised, 256 tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = default_encoder().folder
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [k for k, on in pooling.items() if on is True] == ["pooling_mode_mean_tokens"]
    assert [m["type"].split(".")[-1] for m in json.loads((folder / "modules.json").read_text())] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["naïve café", "東京", "a longer text, with Upper Case and 3.14 numbers", "word " * 400]
    for text, ours in zip(texts, default_encoder().encode(texts), strict=True):
        ids = tokenizer(text).input_ids
        ids = ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
        with torch.inference_mode():
            rows = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().numpy()
        pooled = sum(rows) / len(rows)
        np.testing.assert_allclose(ours, pooled / np.sqrt(pooled @ pooled), atol=1e-6)
    assert len(tokenizer(texts[-1]).input_ids) > limit


def test_blank_texts_are_like_nothing_but_each_other() -> None:
    outputs, references = ["", " ", "x", "", "x"], [["x"], ["a tax form"], ["", " "], [" \n"], []]
    assert similarity_to_references(outputs, references) == [0.0, 0.0, 0.0, 1.0, 0.0]


def test_one_letter_answers_score_one_against_themselves() -> None:
    """Tokenizers of words that drop single letters would give 0 here."""
    assert similarity_to_references(["A", " A\n"], [["A"], ["A"]]) == [1.0, 1.0]
    assert similarity_to_references(["A"], [["B"]])[0] < 1.0


def test_a_negative_cosine_scores_zero() -> None:
    pair = ("the economics of medieval wool", "kernel panic in line 3")
    a, b = default_encoder().encode(pair)
    assert float(a @ b) < -0.04
    assert similarity_to_references(pair[:1], [pair[1:]]) == [0.0]


def test_the_best_reference_counts_and_text_tasks_use_it() -> None:
    assert TextTask("embedding").score(["blue"], [["a tax form", "blue"]]) == [1.0]
    assert similarity_to_references([], []) == []


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"config\.json"):
        SentenceEncoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackendError, match="could not be loaded"):
        SentenceEncoder(tmp_path)


def test_loading_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    SentenceEncoder()
    assert capfd.readouterr() == ("", "")
