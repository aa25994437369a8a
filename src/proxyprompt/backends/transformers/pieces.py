"""Tokenising prompts piece by piece where that provably gives what tokenising them whole gives.

The prompts of a batch are made of the same few demonstrations over and over. They may be cut where a line begins
with an ASCII letter if

* no token of the vocabulary holds a line feed followed by such a letter, so that no merge crosses the cut,
* the text is split into words by one of the known patterns, all of which end a word at the cut and look no
  further than the letter behind it, and
* nothing is put in front of a text except special tokens, and no added token reaches over white space to its
  left.

Then a piece, followed by one more letter, has the same tokens in every text. Any other tokenizer is given whole
texts.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["cut", "may_cut"]

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
    description = json.loads(raw.to_str())
    model = description["model"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        return False
    if any(token["lstrip"] or token["single_word"] for token in description["added_tokens"]):
        return False
    if not _normalizer_is_local(description["normalizer"]) or not _splits_lines(description["pre_tokenizer"]):
        return False
    return not any(_JOINED.search(token) for token in raw.get_vocab(with_added_tokens=True))


def _normalizer_is_local(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None or normalizer["type"] in ("NFC", "NFKC"):
        return True
    return normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "}


def _splits_lines(splitter: dict[str, Any] | None) -> bool:
    if splitter is None:
        return True
    kind = splitter["type"]
    if kind == "Sequence":
        return all(_splits_lines(part) for part in splitter["pretokenizers"])
    if kind == "ByteLevel":
        return not splitter["add_prefix_space"]
    if kind == "Split":
        pattern = splitter["pattern"]
        return pattern == {"String": " "} or pattern.get("Regex") in _PATTERNS
    return bool(kind == "Digits")
