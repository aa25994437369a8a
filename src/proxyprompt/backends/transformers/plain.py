"""The slow engine: every prompt in full, for architectures that the trie engine does not know.

Same reads, same values, no sharing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .engine import Block, Limits, read_rows
from .threads import import_torch
from .trie import IntArray, Trie

__all__ = ["PlainEngine"]


class PlainEngine:
    """Runs each path of a trie that no other path continues through a plain forward."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._torch = import_torch()
        self.tokens_computed = 0
        self.peak_held_tokens = 0

    def run(
        self, trie: Trie, limits: Limits, before: Callable[[IntArray], None], context: Callable[[], Any]
    ) -> Iterator[Block]:
        """As :meth:`.engine.TrieEngine.run`; ``limits`` are not used."""
        torch = self._torch
        at_depth = np.zeros(trie.longest, dtype=np.int64)
        by_end = np.argsort(trie.last_node, kind="stable")
        ends = trie.last_node[by_end]
        start = 0
        for stop in _ends_of_paths(trie):
            new = np.arange(start, stop)
            at_depth[trie.depths[new]] = trie.tokens[new]
            size = int(trie.depths[stop - 1]) + 1
            finished = by_end[slice(*np.searchsorted(ends, (start, stop)).tolist())]
            reads = slice(*np.searchsorted(trie.read_node, (start, stop)).tolist())
            before(finished)
            with context(), torch.inference_mode():
                ids = torch.as_tensor(at_depth[:size], device=self._model.device).view(1, size)
                logits = self._model(input_ids=ids, use_cache=False).logits[0]
                values = read_rows(
                    torch, logits, trie.depths[trie.read_node[reads]], trie.read_target[reads]
                )
            del logits
            self.tokens_computed += size
            yield Block(size, reads, values, finished)
            start = stop


def _ends_of_paths(trie: Trie) -> Iterator[int]:
    deeper = np.zeros(trie.n_nodes, dtype=bool)
    deeper[:-1] = trie.depths[1:] > trie.depths[:-1]
    yield from (np.flatnonzero(~deeper) + 1).tolist()
