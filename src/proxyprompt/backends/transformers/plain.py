"""The slow engine: every prompt in full, for architectures that the trie engine does not know.

Same reads, same values, no sharing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .attention import IMPLEMENTATION, register
from .engine import Block, Limits, TrieEngine, check_engine, read_rows
from .generation import Growing, end_tokens
from .threads import import_torch
from .tokens import TextTokenizer
from .trie import IntArray, Trie

__all__ = ["PlainEngine", "choose_engine", "grow_plainly"]


def choose_engine(model: Any) -> TrieEngine | PlainEngine:
    """The trie engine if the model passes its check, otherwise the plain one; sets the model's attention."""
    register()
    original = model.config._attn_implementation
    if getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(IMPLEMENTATION)
    if not check_engine(model):
        return TrieEngine(model)
    model.set_attn_implementation(original)
    return PlainEngine(model)


def grow_plainly(
    model: Any,
    tokenizer: TextTokenizer,
    text: Growing,
    context: Callable[[], Any],
    on_tokens: Callable[[int], None],
) -> None:
    """Continue one text greedily, in place, with transformers' own cache."""
    torch = import_torch()
    ends = end_tokens(model)
    ids, cache = text.prompt, None
    while True:
        with context(), torch.inference_mode():
            tokens = torch.as_tensor(ids, device=model.device).view(1, -1)
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        on_tokens(int(ids.size))
        cache = output.past_key_values
        token = int(output.logits[0, -1].argmax())
        if text.add(token, ends, tokenizer):
            return
        ids = np.array([token])


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
                values = read_rows(torch, logits, trie.depths[trie.read_node[reads]], trie.read_target[reads])
            del logits
            self.tokens_computed += size
            yield Block(size, reads, values, finished)
            start = stop


def _ends_of_paths(trie: Trie) -> Iterator[int]:
    deeper = np.zeros(trie.n_nodes, dtype=bool)
    deeper[:-1] = trie.depths[1:] > trie.depths[:-1]
    yield from (np.flatnonzero(~deeper) + 1).tolist()
