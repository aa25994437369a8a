"""The approximate mode: demonstrations read once, coalitions made by hiding what they leave out.

A batch's prompts are all the *same* whole prompt, each with some units hidden. The text up to the end of the
last unit is read once, as in the whole prompt. What follows (the query and the candidates) is computed
once per coalition, at its place in the whole prompt, with the keys and values of hidden units masked. So the
units that stay still carry, in their keys and values, traces of the hidden ones before them, and positions do
not close up: the values are those of another model, a proxy of the proxy.

Laid out as a trie in which every coalition is a branch of the common trunk, this runs on the exact engine with
nothing but narrower masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from proxyprompt.backends.base import ScoreRequest, UnitMask
from proxyprompt.errors import InputError

from .tokens import Batch, EncodedRequest, TextTokenizer, batch_trie, make_batch
from .trie import BoolArray, IntArray, Pass, Tile, Trie

__all__ = ["MaskedRequest", "MaskedTrie", "mask_requests", "masked_trie"]


@dataclass(frozen=True, slots=True)
class MaskedRequest:
    """A request of which some tokens are hidden.

    Attributes
    ----------
    whole : EncodedRequest
        The whole prompt and its candidates.
    n_trunk : int
        Tokens up to the end of the last unit.
    hidden : ndarray of bool, shape (n_trunk,)
        Tokens that what follows the trunk may not see.
    """

    whole: EncodedRequest
    n_trunk: int
    hidden: BoolArray

    @property
    def n_visible(self) -> int:
        """Tokens of the prompt that are not hidden."""
        return self.whole.n_prompt - int(self.hidden.sum())

    @property
    def n_naive(self) -> int:
        """Tokens that one pass per candidate would read if the hidden ones were left out."""
        return self.whole.n_naive - int(self.hidden.sum()) * len(self.whole.tails)


def masked_batch(
    tokenizer: TextTokenizer, requests: Sequence[ScoreRequest], encoded: Sequence[EncodedRequest]
) -> Batch:
    """The batch of masked requests; ``encoded`` holds their whole prompts.

    Raises
    ------
    InputError
        As :func:`mask_requests`.
    """
    if not requests:
        return make_batch([])
    masked = mask_requests(tokenizer, requests, encoded)
    return Batch(
        masked_trie(masked),
        tuple(item.n_visible for item in masked),
        tuple(len(item.whole.tails) for item in masked),
        sum(item.n_naive for item in masked),
    )


def mask_requests(
    tokenizer: TextTokenizer, requests: Sequence[ScoreRequest], encoded: Sequence[EncodedRequest]
) -> list[MaskedRequest]:
    """Find the tokens of each request's hidden units.

    A token that reaches over the end of a unit counts to what follows it.

    Raises
    ------
    InputError
        For a request without units, of chat turns, or without a query behind its units.
    """
    places: dict[tuple[int, tuple[tuple[int, int], ...]], IntArray] = {}
    masked = []
    for index, (request, whole) in enumerate(zip(requests, encoded, strict=True)):
        text, mask = _check(request, index)
        # Requests that differ in their masks alone share one EncodedRequest.
        key = (id(whole), mask.spans)
        if key not in places:
            ends = tokenizer.ends(text)
            places[key] = np.searchsorted(ends, np.asarray(mask.spans), side="right")
        masked.append(_hide(whole, places[key], mask.kept, index))
    return masked


def _check(request: ScoreRequest, index: int) -> tuple[str, UnitMask]:
    text, mask = request.prompt, request.mask
    if mask is None:
        raise InputError(
            f"requests[{index}].mask is missing; the approximate mode has to know the prompt's units.",
            hint="Ask through PromptValueFunction, or give the whole prompt and a UnitMask.",
        )
    if not isinstance(text, str):
        raise InputError(
            f"requests[{index}].prompt is a list of chat turns; the approximate mode takes text only.",
            hint="Render the prompt in completion style, or leave approximate out.",
        )
    edges = [0, *(edge for span in mask.spans for edge in span), len(text)]
    if not mask.spans or edges != sorted(edges) or len(mask.spans) != len(mask.kept):
        raise InputError(
            f"requests[{index}].mask: {len(mask.spans)} spans and {len(mask.kept)} marks for a prompt of"
            f" {len(text)} characters; as many of both are needed, at least one, in order and inside the prompt.",
            hint="FewShotPrompt.unit_mask(coalition) makes one.",
        )
    return text, mask


def _hide(whole: EncodedRequest, places: IntArray, kept: Sequence[bool], index: int) -> MaskedRequest:
    """Hide the units that do not stay; ``places``, shape (n_units, 2), holds their first and last token + 1."""
    n_trunk = int(places[-1, 1])
    if not 0 < n_trunk < whole.body.size:
        raise InputError(
            f"requests[{index}]: nothing of the prompt stands behind its last unit.",
            hint="The approximate mode needs a query behind the demonstrations.",
        )
    hidden = np.zeros(n_trunk, dtype=bool)
    for (begin, end), stays in zip(places.tolist(), kept, strict=True):
        hidden[begin:end] = not stays
    return MaskedRequest(whole, n_trunk, hidden)


@dataclass(frozen=True)
class MaskedTrie(Trie):
    """A trie whose branches may not see all of their ancestors.

    Attributes
    ----------
    branch : ndarray of int64, shape (n_nodes,)
        Row of ``hidden`` that holds for a node.
    hidden : ndarray of bool, shape (n_branches, longest)
        Which ancestors, by depth, are hidden.
    """

    branch: IntArray
    hidden: BoolArray

    def passes(self, max_rows: int, max_heads: int, tile_rows: int) -> Iterator[Pass]:
        """As :meth:`.trie.Trie.passes`, hidden ancestors being invisible."""
        for pass_ in Trie.passes(self, max_rows, max_heads, tile_rows):
            yield replace(pass_, tiles=tuple(self._narrow(pass_.start, tile) for tile in pass_.tiles))

    def _narrow(self, first: int, tile: Tile) -> Tile:
        rows = slice(first + tile.start, first + tile.stop)
        depths = self.depths[rows]
        keys = np.concatenate([np.arange(tile.visible.shape[1] - depths.size), depths])
        return replace(tile, visible=tile.visible & ~self.hidden[np.ix_(self.branch[rows], keys)])


def masked_trie(requests: Sequence[MaskedRequest]) -> MaskedTrie:
    """Lay out a batch: each distinct trunk once, each coalition a branch of it."""
    trunks: dict[bytes, dict[bytes, list[int]]] = {}
    for owner, request in enumerate(requests):
        branches = trunks.setdefault(request.whole.body[: request.n_trunk].tobytes(), {})
        branches.setdefault(request.hidden.tobytes(), []).append(owner)
    parts: list[tuple[IntArray, IntArray, IntArray]] = []
    reads: list[IntArray] = []
    hidden: list[BoolArray] = [np.zeros(0, dtype=bool)]
    last_node = np.zeros(len(requests), dtype=np.int64)
    n_nodes = 0
    for trunk, branches in trunks.items():
        tokens = np.frombuffer(trunk, dtype=np.int64)
        parts.append((tokens, np.arange(tokens.size, dtype=np.int64), np.zeros_like(tokens)))
        n_nodes += tokens.size
        for owners in branches.values():
            n_trunk = requests[owners[0]].n_trunk
            branch = batch_trie([_behind(requests[owner]) for owner in owners])
            parts.append(
                (branch.tokens, branch.depths + n_trunk, np.full(branch.n_nodes, len(hidden), dtype=np.int64))
            )
            mine = np.asarray(owners)
            reads.append(
                np.stack(
                    [
                        branch.read_node + n_nodes,
                        branch.read_target,
                        mine[branch.read_owner],
                        branch.read_slot,
                    ]
                )
            )
            last_node[mine] = branch.last_node + n_nodes
            hidden.append(requests[owners[0]].hidden)
            n_nodes += branch.n_nodes
    depths = np.concatenate([depths for _, depths, _ in parts])
    rows = np.zeros((len(hidden), int(depths.max()) + 1), dtype=bool)
    for row, mask in zip(rows, hidden, strict=True):
        row[: mask.size] = mask
    node, target, owner, slot = np.concatenate(reads, axis=1)
    return MaskedTrie(
        tokens=np.concatenate([tokens for tokens, _, _ in parts]),
        depths=depths,
        segments=np.cumsum([0, *(tokens.size for tokens, _, _ in parts)]),
        read_node=node,
        read_target=target,
        read_owner=owner,
        read_slot=slot,
        last_node=last_node,
        branch=np.concatenate([which for _, _, which in parts]),
        hidden=rows,
    )


def _behind(request: MaskedRequest) -> EncodedRequest:
    whole = request.whole
    return EncodedRequest(whole.n_prompt, whole.body[request.n_trunk :], whole.tails)
