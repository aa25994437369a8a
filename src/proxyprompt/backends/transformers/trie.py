"""The token trie of a batch, laid out so that it can be computed in passes of any size.

Sorting the token paths of a batch puts its trie in *preorder*: the nodes a path adds to the trie are the
tokens after its longest common prefix with the path before it. Preorder has the property the engine lives
on: whatever the nodes between two cuts, every ancestor of theirs that lies before the first cut is on **one**
path, the path to the first node after that cut. So the trie can be cut anywhere, a pass needs no more context
than one path, and the memory held between passes is one path, however many prompts there are.

The depth of each node is all that is needed: the ancestor of a node at depth ``d`` is the last node before it
whose depth is ``d``, and node ``i`` is an ancestor of node ``j > i`` exactly when no node in ``(i, j]`` is as
shallow as ``i``.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

__all__ = ["Pass", "Tile", "Trie", "build_trie"]


@dataclass(frozen=True, slots=True)
class Tile:
    """A run of rows of one pass that attend to the same context.

    Attributes
    ----------
    start, stop : int
        Rows of the pass.
    n_held : int
        How many leading tokens of the path held from earlier passes are in the context.
    rows : ndarray of int64, shape (n_context - n_held,)
        Earlier rows of the same pass that continue the context.
    visible : ndarray of bool, shape (stop - start, n_context + stop - start)
        Which keys each row may see: the context by depth, then the tile's own rows.
    """

    start: int
    stop: int
    n_held: int
    rows: IntArray
    visible: BoolArray


@dataclass(frozen=True, slots=True)
class Pass:
    """Consecutive nodes of the trie, computed in one forward.

    Attributes
    ----------
    start, stop : int
        Preorder indices of the nodes.
    tokens, depths : ndarray of int64, shape (stop - start,)
        Token ids, and positions in their prompts.
    tiles : tuple of Tile
    n_keep : int
        Leading tokens of the held path that the next pass still needs.
    keep_rows : ndarray of int64
        Rows of this pass to append to those.
    heads : ndarray of int64, shape (n_heads,)
        Rows whose next-token distribution is read.
    reads : slice
        Reads of this pass, in the trie's arrays.
    finished : ndarray of int64
        Owners whose last read is in this pass.
    """

    start: int
    stop: int
    tokens: IntArray
    depths: IntArray
    tiles: tuple[Tile, ...]
    n_keep: int
    keep_rows: IntArray
    heads: IntArray
    reads: slice
    finished: IntArray


@dataclass(frozen=True, slots=True)
class Trie:
    """A batch's distinct prefixes in preorder, and what is to be read from them.

    Attributes
    ----------
    tokens, depths : ndarray of int64, shape (n_nodes,)
    segments : ndarray of int64, shape (n_paths + 1,)
        Where the nodes that each sorted path added begin.
    read_node, read_target, read_owner, read_slot : ndarray of int64, shape (n_reads,)
        Sorted by node.
    last_node : ndarray of int64, shape (n_owners,)
        The node of each owner's last read.
    """

    tokens: IntArray
    depths: IntArray
    segments: IntArray
    read_node: IntArray
    read_target: IntArray
    read_owner: IntArray
    read_slot: IntArray
    last_node: IntArray

    @property
    def n_nodes(self) -> int:
        """Distinct prefixes: the tokens that the network has to read."""
        return int(self.tokens.size)

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return int(self.depths.max()) + 1 if self.n_nodes else 0

    def passes(self, max_rows: int, max_heads: int, tile_rows: int) -> Iterator[Pass]:
        """Cut the trie into passes.

        Parameters
        ----------
        max_rows : int
            Most nodes in a pass, at least 1.
        max_heads : int
            Most rows of a pass whose next-token distribution is read, at least 1.
        tile_rows : int
            Most rows that share a context; more waste less time on small kernels and more on masked keys.

        Yields
        ------
        Pass
            In preorder; together they hold every node exactly once.
        """
        head_nodes = np.unique(self.read_node)
        by_end = np.argsort(self.last_node, kind="stable")
        ends = self.last_node[by_end]
        path = np.zeros(self.longest, dtype=np.int64)
        start = 0
        while start < self.n_nodes:
            stop = min(start + max_rows, self.n_nodes)
            first_head = int(np.searchsorted(head_nodes, start))
            if first_head + max_heads < head_nodes.size:
                stop = min(stop, int(head_nodes[first_head + max_heads]))
            tiles = tuple(self._tiles(start, stop, tile_rows, path))
            kept = path[: self.depths[stop]] if stop < self.n_nodes else path[:0]
            n_keep = int(np.searchsorted(kept, start))
            last_head = int(np.searchsorted(head_nodes, stop))
            reads = slice(*np.searchsorted(self.read_node, (start, stop)).tolist())
            done = slice(*np.searchsorted(ends, (start, stop)).tolist())
            yield Pass(
                start=start,
                stop=stop,
                tokens=self.tokens[start:stop],
                depths=self.depths[start:stop],
                tiles=tiles,
                n_keep=n_keep,
                keep_rows=kept[n_keep:] - start,
                heads=head_nodes[first_head:last_head] - start,
                reads=reads,
                finished=by_end[done],
            )
            start = stop

    def _tiles(self, start: int, stop: int, tile_rows: int, path: IntArray) -> Iterator[Tile]:
        for first in range(start, stop, tile_rows):
            last = min(first + tile_rows, stop)
            depths = self.depths[first:last]
            context = path[: depths[0]].copy()
            n_held = int(np.searchsorted(context, start))
            yield Tile(first - start, last - start, n_held, context[n_held:] - start, _visible(depths))
            # Of repeated depths numpy keeps the last assignment, which is the ancestor for what follows.
            path[depths] = np.arange(first, last)


def _visible(depths: IntArray) -> BoolArray:
    """Which of (context by depth, own rows) each row of a tile descends from; its own row included."""
    rows = depths.size
    shallowest = np.minimum.accumulate(depths)
    context = np.arange(depths[0])[None, :] < shallowest[:, None]
    after = np.arange(rows)[None, :] > np.arange(rows)[:, None]
    lowest_since = np.minimum.accumulate(np.where(after, depths[None, :], np.iinfo(np.int64).max), axis=1)
    descends = after & (lowest_since > depths[:, None])
    return np.concatenate([context, descends.T | np.eye(rows, dtype=bool)], axis=1)


def build_trie(paths: Sequence[IntArray], reads: IntArray, n_owners: int) -> Trie:
    """Sort token paths into a trie.

    Parameters
    ----------
    paths : sequence of ndarray of int64
        Token ids, at least one each; repeated paths and paths that are prefixes of others cost nothing.
    reads : ndarray of int64, shape (n_reads, 5)
        Log-probabilities wanted, one row each: index into ``paths``, depth of the node to read at, token
        whose log-probability is read, owner (a request), slot (one of its candidates).
    n_owners : int
        Number of owners; each needs at least one read.

    Returns
    -------
    Trie
    """
    # Big-endian bytes compare like the token ids they hold.
    keys = [path.astype(">u4").tobytes() for path in paths]
    order = sorted(range(len(paths)), key=keys.__getitem__)
    reads = reads[np.argsort(reads[:, 0], kind="stable")]
    bounds = np.searchsorted(reads[:, 0], np.arange(len(paths) + 1))
    nodes = np.zeros(len(reads), dtype=np.int64)
    longest = max((path.size for path in paths), default=0)
    node_at = np.zeros(longest, dtype=np.int64)
    tokens: list[IntArray] = []
    depths: list[IntArray] = []
    segments = [0]
    before = np.zeros(0, dtype=np.int64)
    for index in order:
        path = paths[index]
        shared = _common_prefix(before, path)
        added = path.size - shared
        node_at[shared : path.size] = np.arange(segments[-1], segments[-1] + added)
        tokens.append(path[shared:])
        depths.append(np.arange(shared, path.size))
        segments.append(segments[-1] + added)
        mine = slice(bounds[index], bounds[index + 1])
        nodes[mine] = node_at[reads[mine, 1]]
        before = path
    by_node = np.argsort(nodes, kind="stable")
    nodes, reads = nodes[by_node], reads[by_node]
    last_node = np.full(n_owners, -1, dtype=np.int64)
    np.maximum.at(last_node, reads[:, 3], nodes)
    empty = np.zeros(0, dtype=np.int64)
    return Trie(
        tokens=np.concatenate([empty, *tokens]),
        depths=np.concatenate([empty, *depths]),
        segments=np.asarray(segments, dtype=np.int64),
        read_node=nodes,
        read_target=reads[:, 2],
        read_owner=reads[:, 3],
        read_slot=reads[:, 4],
        last_node=last_node,
    )


def _common_prefix(left: IntArray, right: IntArray) -> int:
    size = min(left.size, right.size)
    different = np.flatnonzero(left[:size] != right[:size])
    return int(different[0]) if different.size else size
