"""The sentence encoder of text scores, on the real packaged model."""

from __future__ import annotations

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


def test_one_letter_answers_score_one_against_themselves() -> None:
    """Tokenizers of words that drop single letters would give 0 here."""
    assert similarity_to_references(["A"], [["A"]])[0] == pytest.approx(1.0, abs=1e-5)


def test_the_best_reference_counts_and_text_tasks_use_it() -> None:
    scores = TextTask("embedding").score(["blue"], [["a tax form", "blue"]])
    assert scores[0] == pytest.approx(1.0, abs=1e-5)
    assert similarity_to_references([], []) == []


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"config\.json"):
        SentenceEncoder(tmp_path)
