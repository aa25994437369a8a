"""Greedy continuation: prompts are read through the trie, then all of them grow one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .engine import Limits, Step, TrieEngine
from .threads import import_torch
from .tokens import TextTokenizer
from .trie import IntArray, build_trie

__all__ = ["Growing", "end_tokens", "grow"]


@dataclass(slots=True)
class Growing:
    """One continuation in the making.

    Attributes
    ----------
    prompt : ndarray of int64
        Token ids.
    max_tokens : int
    stop : tuple of str
    ids : list of int
        Tokens made so far.
    text : str
        What they read, cut before a stop string.
    """

    prompt: IntArray
    max_tokens: int
    stop: tuple[str, ...]
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def add(self, token: int, ends: frozenset[int], tokenizer: TextTokenizer) -> bool:
        """Take one more token; true when the continuation is complete."""
        if token in ends:
            return True
        self.ids.append(token)
        self.text = tokenizer.decode(self.ids, self.prompt[-8:].tolist())
        found = [at for at in (self.text.find(stop) for stop in self.stop if stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found) or len(self.ids) >= self.max_tokens


def end_tokens(model: Any) -> frozenset[int]:
    """Ids that end a text, from the model's generation settings or its configuration."""
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True)):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, (list, tuple)) else [ids])
    return frozenset()


class _Caches:
    """Keys and values of several texts, side by side; the attention of one new token each.

    Tensors have shape (n_texts, n_kv_heads, room, head_size) per layer.
    """

    def __init__(self, torch: Any, n_texts: int, room: int) -> None:
        self._torch, self._n_texts, self._room = torch, n_texts, room
        self.layers: dict[int, tuple[Any, Any]] = {}
        self.lengths = np.zeros(n_texts, dtype=np.int64)

    def fill(self, text: int, step: Step, row: int) -> None:
        """Copy the path that ends at ``row`` of a computed pass."""
        pass_ = step.pass_
        tile = next(tile for tile in pass_.tiles if tile.start <= row < tile.stop)
        seen = np.flatnonzero(tile.visible[row - tile.start])
        n_context = tile.visible.shape[1] - (tile.stop - tile.start)
        n_held = int((seen < tile.n_held).sum())
        inside = seen[(seen >= tile.n_held) & (seen < n_context)] - tile.n_held
        rows = np.concatenate([tile.rows[inside], seen[seen >= n_context] - n_context + tile.start])
        size = n_held + rows.size
        for layer, fresh in step.plan.fresh.items():
            held = step.store.layers.get(layer)
            for which, own in enumerate(fresh):
                target = self._layer(layer, fresh)[which][text]
                if held is not None:
                    target[:, :n_held] = held[which][0, :, :n_held]
                target[:, n_held:size] = own[0].index_select(
                    1, self._torch.as_tensor(rows, device=own.device)
                )
        self.lengths[text] = size

    def _layer(self, layer: int, like: tuple[Any, Any]) -> tuple[Any, Any]:
        if layer not in self.layers:
            key, value = (
                tensor.new_zeros(self._n_texts, tensor.shape[1], self._room, tensor.shape[3])
                for tensor in like
            )
            self.layers[layer] = (key, value)
        return self.layers[layer]

    def select(self, keep: Sequence[int]) -> None:
        """Forget all texts but ``keep``."""
        index = list(keep)
        self.layers = {layer: (k[index], v[index]) for layer, (k, v) in self.layers.items()}
        self.lengths = self.lengths[index]

    def attend(self, layer: int, query: Any, key: Any, value: Any, scaling: Any, window: int | None) -> Any:
        """Write the new token's key and value and attend; called by every layer."""
        torch = self._torch
        keys, values = self.layers[layer]
        texts, heads = query.shape[:2]
        kv_heads = key.shape[1]
        at = torch.as_tensor(self.lengths, device=key.device)
        every = torch.arange(texts, device=key.device)
        keys[every, :, at] = key[:, :, 0]
        values[every, :, at] = value[:, :, 0]
        used = int(self.lengths.max()) + 1
        back = at[:, None] - torch.arange(used, device=key.device)[None, :]
        visible = back >= 0 if window is None else (back >= 0) & (back < window)
        result = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(texts, kv_heads, heads // kv_heads, query.shape[3]),
            keys[:, :, :used],
            values[:, :, :used],
            attn_mask=visible[:, None, None, :],
            scale=scaling,
        )
        return result.reshape(texts, heads, 1, value.shape[3]).transpose(1, 2)


def grow(
    model: Any,
    tokenizer: TextTokenizer,
    batch: Sequence[Growing],
    limits: Limits,
    context: Callable[[], Any],
    on_tokens: Callable[[int], None],
) -> None:
    """Continue every text of ``batch`` greedily, in place.

    Parameters
    ----------
    model
        With the trie engine's attention.
    tokenizer : TextTokenizer
    batch : sequence of Growing
    limits : Limits
    context : callable
        Returns a context manager to hold around each forward.
    on_tokens : callable
        Told how many tokens were computed.
    """
    torch = import_torch()
    ends = end_tokens(model)
    room = max(int(text.prompt.size) + text.max_tokens for text in batch)
    caches = _Caches(torch, len(batch), room)
    last = np.zeros(len(batch), dtype=np.int64)
    reads = np.array([(i, text.prompt.size - 1, 0, i, 0) for i, text in enumerate(batch)], dtype=np.int64)
    trie = build_trie([text.prompt for text in batch], reads, len(batch))
    for step in TrieEngine(model).steps(trie, limits, lambda _: None, context):
        pass_ = step.pass_
        nodes = trie.read_node[pass_.reads] - pass_.start
        with context(), torch.inference_mode():
            best = step.logits.argmax(-1).cpu().numpy() if pass_.heads.size else np.zeros(0, dtype=np.int64)
            for row, owner in zip(nodes.tolist(), trie.read_owner[pass_.reads].tolist(), strict=True):
                caches.fill(owner, step, row)
                last[owner] = best[np.searchsorted(pass_.heads, row)]
        step.logits = None
        on_tokens(pass_.stop - pass_.start)
    active = list(range(len(batch)))
    while True:
        keep = [
            place
            for place, text in enumerate(active)
            if not batch[text].add(int(last[place]), ends, tokenizer)
        ]
        if not keep:
            return
        with context(), torch.inference_mode():
            if len(keep) < len(active):
                caches.select(keep)
            active = [active[place] for place in keep]
            last = _one_token(model, torch, caches, last[keep])
        on_tokens(len(active))


def _one_token(model: Any, torch: Any, caches: _Caches, tokens: IntArray) -> IntArray:
    texts = tokens.size
    output = model(
        input_ids=torch.as_tensor(tokens, device=model.device).view(texts, 1),
        position_ids=torch.as_tensor(caches.lengths, device=model.device).view(texts, 1),
        attention_mask=torch.zeros(texts, 1, 1, 1, dtype=model.dtype, device=model.device),
        use_cache=False,
        proxyprompt_plan=caches,
    )
    caches.lengths += 1
    best: IntArray = output.logits[:, -1].argmax(-1).cpu().numpy()
    return best
