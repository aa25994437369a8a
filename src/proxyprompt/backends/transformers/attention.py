"""Attention of packed trie rows over one shared path, for models built on transformers' attention interface.

A model calls the registered function in every layer with the queries, keys and values of all rows of a pass.
The function keeps the keys and values of the current path itself, so that neither transformers' caches nor
their masks are involved: positions, windows and ancestry decide what a row sees.

Called without a plan it is transformers' own scaled-dot-product attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from proxyprompt._require import require

from .trie import Pass

__all__ = ["IMPLEMENTATION", "PassPlan", "PathStore", "UnsupportedModel", "register"]

IMPLEMENTATION = "proxyprompt_trie"
_REFUSED = ("softcap", "position_bias", "s_aux", "cache")


class UnsupportedModel(Exception):
    """The architecture asks its attention for something that the trie engine does not do."""


def register() -> None:
    """Make the attention function known to transformers under :data:`IMPLEMENTATION`."""
    interface = require("transformers.modeling_utils", "transformers").AttentionInterface
    masks = require("transformers.masking_utils", "transformers")
    interface.register(IMPLEMENTATION, _attend)
    masks.AttentionMaskInterface.register(IMPLEMENTATION, masks.sdpa_mask)


def _attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
) -> tuple[Any, None]:
    plan = kwargs.pop("proxyprompt_plan", None)
    if plan is None:
        sdpa = require("transformers.integrations.sdpa_attention", "transformers")
        result: tuple[Any, None] = sdpa.sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return result
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused:
        raise UnsupportedModel(f"attention with {', '.join(refused)}")
    return plan.attend(
        module.layer_idx, query, key, value, kwargs.get("scaling"), kwargs.get("sliding_window")
    ), None


class PathStore:
    """Keys and values of one path, per layer, kept from pass to pass.

    Tensors have shape (1, n_kv_heads, n_tokens, head_size), one pair per layer; nothing is cut off at a
    sliding window, since rows of later passes branch off anywhere.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Any, Any]] = {}
        self.n_tokens = 0
        self.peak_tokens = 0

    def keep(self, n_keep: int, rows: Any, fresh: dict[int, tuple[Any, Any]]) -> None:
        """Cut the path back to ``n_keep`` tokens and append ``rows`` of the ``fresh`` keys and values."""
        torch = require("torch", "transformers")
        for layer, pair in fresh.items():
            held = self.layers.get(layer)
            joined = []
            for which, tensor in enumerate(pair):
                new = tensor.index_select(2, rows)
                joined.append(new if held is None else torch.cat([held[which][:, :, :n_keep], new], dim=2))
            self.layers[layer] = (joined[0], joined[1])
        self.n_tokens = n_keep + int(rows.numel())
        self.peak_tokens = max(self.peak_tokens, self.n_tokens)


class PassPlan:
    """Attention for one pass of a trie: which tile sees what, as tensors.

    Parameters
    ----------
    pass_ : Pass
    store : PathStore
        Keys and values of the path held from earlier passes; read only here.
    device, dtype
        Where the masks go.
    """

    def __init__(self, pass_: Pass, store: PathStore, device: Any, dtype: Any) -> None:
        torch = require("torch", "transformers")
        self.fresh: dict[int, tuple[Any, Any]] = {}
        self.windows: dict[int, int | None] = {}
        self._torch, self._store, self._pass = torch, store, pass_
        self._device, self._dtype = device, dtype
        self._rows = [torch.as_tensor(tile.rows, device=device) for tile in pass_.tiles]
        self._masks: dict[tuple[int | None, int], list[tuple[int, Any]]] = {}

    def attend(self, layer: int, query: Any, key: Any, value: Any, scaling: Any, window: int | None) -> Any:
        """Attention output of all rows, shape (1, n_rows, n_heads, value_size).

        ``query`` has shape (1, n_heads, n_rows, head_size); ``key`` and ``value`` have n_kv_heads.
        """
        self.fresh[layer] = (key, value)
        self.windows[layer] = window
        heads, kv_heads = query.shape[1], key.shape[1]
        group = heads // kv_heads
        out = query.new_empty(1, query.shape[2], heads, value.shape[3])
        held = self._store.layers.get(layer)
        sdpa = self._torch.nn.functional.scaled_dot_product_attention
        for tile, rows, (first, mask) in zip(
            self._pass.tiles, self._rows, self._masks_for(window, group), strict=True
        ):
            span = slice(tile.start, tile.stop)
            keys, values = (
                self._context(None if held is None else held[which], tensor, rows, tile.n_held, first, span)
                for which, tensor in enumerate((key, value))
            )
            n_rows = tile.stop - tile.start
            # Heads that share keys are stacked as rows, so that the context is never repeated per head.
            stacked = query[:, :, span].reshape(1, kv_heads, group * n_rows, query.shape[3])
            result = sdpa(stacked, keys, values, attn_mask=mask, scale=scaling)
            out[:, span] = result.view(1, heads, n_rows, value.shape[3]).transpose(1, 2)
        return out

    def _context(self, held: Any, fresh: Any, rows: Any, n_held: int, first: int, span: slice) -> Any:
        parts = []
        if first < n_held:
            parts.append(held[:, :, first:n_held])
        skipped = max(0, first - n_held)
        if skipped < rows.numel():
            parts.append(fresh.index_select(2, rows[skipped:]))
        parts.append(fresh[:, :, span])
        return self._torch.cat(parts, dim=2)

    def _masks_for(self, window: int | None, group: int) -> list[tuple[int, Any]]:
        deepest = int(self._pass.depths.max())
        if window is not None and window > deepest:
            window = None
        if (window, group) not in self._masks:
            self._masks[window, group] = self._build_masks(window, group)
        return self._masks[window, group]

    def _build_masks(self, window: int | None, group: int) -> list[tuple[int, Any]]:
        """Per tile the first context token any row sees, and the additive mask from there on."""
        masks = []
        for tile in self._pass.tiles:
            depths = self._pass.depths[tile.start : tile.stop]
            visible, first = tile.visible, 0
            n_context = visible.shape[1] - depths.size
            if window is not None:
                key_depths = np.concatenate([np.arange(n_context), depths])
                visible = visible & (depths[:, None] - key_depths[None, :] < window)
                first = min(n_context, max(0, int(depths.min()) - window + 1))
            allowed = self._torch.as_tensor(visible[:, first:], device=self._device)
            mask = self._torch.zeros(allowed.shape, dtype=self._dtype, device=self._device)
            mask.masked_fill_(~allowed, -np.inf)
            masks.append((first, mask.repeat(group, 1)))
        return masks
