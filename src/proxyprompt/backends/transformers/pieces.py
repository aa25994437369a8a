"""Tokenising prompts piece by piece where that provably gives what tokenising them whole gives.

The prompts of a batch are made of the same few demonstrations over and over. They may be cut where a line
begins with an ASCII letter if

* no token of the vocabulary holds a line feed followed by such a letter, so that no merge crosses the cut,
* the text is split into words by one of the known patterns, all of which end a word at the cut and look no
  further than the letter behind it, and
* nothing is put in front of a text except special tokens, and no added token reaches over white space to its
  left.

Then a piece, followed by one more letter, has the same tokens in every text. Any other tokenizer is given
whole texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .trie import IntArray

__all__ = ["PieceEncoder", "cut", "may_cut"]

_SENTINEL = "A"
_MOST_KNOWN = 200_000

_LINE_START = re.compile(r"(?<=\n)(?=[A-Za-z])")
_JOINED = re.compile(r"(?:\n|Ċ)[A-Za-z]")
# Word patterns of Llama 3 and of Qwen 2; that of GPT-2 is built into the byte-level splitter.
_PATTERNS = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)


def cut(text: str) -> list[str]:
    """Cut a text at every line that begins with an ASCII letter; the pieces add up to the text."""
    return _LINE_START.split(text)


def may_cut(raw: Any) -> bool:
    """Whether a ``tokenizers.Tokenizer`` keeps the conditions above."""
    model = raw.model
    if type(model).__name__ != "BPE" or model.dropout or model.continuing_subword_prefix:
        return False
    if any(token.lstrip or token.single_word for token in raw.get_added_tokens_decoder().values()):
        return False
    if not _normalizer_is_local(_settings(raw.normalizer)) or not _splits_lines(_settings(raw.pre_tokenizer)):
        return False
    vocabulary: dict[str, int] = raw.get_vocab(with_added_tokens=True)
    return not any(map(_JOINED.search, vocabulary))


def _settings(component: Any) -> dict[str, Any] | None:
    if component is None:
        return None
    settings: dict[str, Any] = json.loads(component.__getstate__())
    return settings


def _normalizer_is_local(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None or normalizer["type"] in ("NFC", "NFKC"):
        return True
    return bool(normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "})


def _splits_lines(splitter: dict[str, Any] | None) -> bool:
    if splitter is None:
        return True
    kind = splitter["type"]
    if kind == "Sequence":
        return all(map(_splits_lines, splitter["pretokenizers"]))
    if kind == "ByteLevel":
        return not splitter["add_prefix_space"]
    if kind == "Split":
        pattern = splitter["pattern"]
        return bool(pattern == {"String": " "} or pattern.get("Regex") in _PATTERNS)
    return bool(kind == "Digits")


class PieceEncoder:
    """Token ids of texts, each distinct piece being tokenised once.

    Parameters
    ----------
    raw : tokenizers.Tokenizer
        One that :func:`may_cut`.
    n_after : int
        Special tokens it puts behind a text; they are left out.
    """

    def __init__(self, raw: Any, n_after: int) -> None:
        self._raw, self._n_after = raw, n_after
        self._known: dict[_Piece, IntArray] = {}
        self._n_sentinel = len(raw.encode(_SENTINEL, add_special_tokens=False).ids)

    def encode(self, texts: Sequence[str], *, special: bool) -> list[IntArray]:
        """Token ids of each text, shape (n_tokens,) each."""
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        pieces = [_pieces(text, special) for text in texts]
        self._learn({piece for text in pieces for piece in text} - self._known.keys())
        result: list[IntArray] = []
        head: list[_Piece] = []
        joined = np.zeros(0, dtype=np.int64)
        for text in pieces:
            # Candidates of one prompt follow one another, and differ in their last piece.
            if text[:-1] != head:
                head = text[:-1]
                joined = np.concatenate([self._known[piece] for piece in head] or [joined[:0]])
            result.append(np.concatenate([joined, self._known[text[-1]]]))
        return result

    def _learn(self, pieces: set[_Piece]) -> None:
        for special in (True, False):
            mine = [piece for piece in pieces if piece.special == special]
            texts = [piece.text if piece.last else piece.text + _SENTINEL for piece in mine]
            encodings = self._raw.encode_batch_fast(texts, add_special_tokens=special)
            for piece, encoding in zip(mine, encodings, strict=True):
                ids = np.asarray(encoding.ids, dtype=np.int64)
                drop = (self._n_after if special else 0) + (0 if piece.last else self._n_sentinel)
                self._known[piece] = ids[: ids.size - drop]


class _Piece(NamedTuple):
    text: str
    special: bool
    last: bool


def _pieces(text: str, special: bool) -> list[_Piece]:
    parts = cut(text)
    return [_Piece(part, special and not at, at == len(parts) - 1) for at, part in enumerate(parts)]
