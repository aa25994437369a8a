"""Exact log-probabilities of a trie's reads, one pass at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from proxyprompt._require import require
from proxyprompt.errors import BackendError

from .attention import IMPLEMENTATION, PassPlan, PathStore, UnsupportedModel
from .trie import IntArray, Pass, Trie, build_trie

__all__ = ["Block", "Limits", "Step", "TrieEngine", "Values", "check_engine", "choose_limits", "read_rows"]

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a pass may be.

    Attributes
    ----------
    rows : int
        Tokens computed in one forward.
    heads : int
        Rows of one forward whose next-token distribution is computed.
    tile_rows : int
        Rows that share one context.
    """

    rows: int
    heads: int
    tile_rows: int


@dataclass(frozen=True, slots=True)
class Block:
    """What one piece of work gave.

    Attributes
    ----------
    n_tokens : int
        Tokens the network read.
    reads : slice
        Reads answered, in the trie's arrays.
    values : ndarray of float64, shape (n_reads,)
        Natural-log probabilities of those reads.
    finished : ndarray of int64
        Owners that have all their reads now.
    """

    n_tokens: int
    reads: slice
    values: Values
    finished: IntArray


@dataclass(slots=True)
class Step:
    """One computed pass: logits of its heads, the path before it, and its own keys and values."""

    pass_: Pass
    logits: Any
    store: PathStore
    plan: PassPlan


def choose_limits(model: Any, longest: int, max_batch_tokens: int | None, memory_budget: int) -> Limits:
    """Fit a pass into a memory budget.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    longest : int
        Tokens of the longest path.
    max_batch_tokens : int or None
        Upper limit on the rows of a pass; the default was measured (see Notes).
    memory_budget : int
        Bytes for everything besides the weights: the held path, one pass's activations, its masks and the
        next-token distributions.

    Raises
    ------
    BackendError
        If not even a pass of 16 rows fits.

    Notes
    -----
    On a CPU matrix products reach their full rate at 64 rows, and 256 rows were the fastest pass: larger
    temporaries leave the caches (0.80 of the matrix rate at 256 rows, 0.65 at 1024; one core, fp32). On a GPU
    thousands of rows are needed.
    """
    config = model.config.get_text_config(decoder=True)
    cuda = model.device.type == "cuda"
    size = model.dtype.itemsize
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_size = int(getattr(config, "head_dim", None) or hidden // heads)
    wide = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    per_key = 2 * layers * kv_heads * head_size * size
    # The pass's own keys and values of all layers live until the path is extended; the path is copied once
    # while that happens, one layer at a time.
    per_row = per_key + size * (8 * hidden + 4 * wide + 6 * heads * head_size)
    per_head = int(config.vocab_size) * (8 + size)
    tile_rows = 512 if cuda else 128
    fixed = longest * (per_key + 4 * per_key // layers + 2 * size * heads * tile_rows // kv_heads)
    rows = max_batch_tokens or (8192 if cuda else 256)
    room = memory_budget - fixed
    while rows > 16 and rows * per_row + min(rows, 32) * per_head > room:
        rows //= 2
    if rows * per_row + min(rows, 32) * per_head > room and max_batch_tokens is None:
        needed = (fixed + 16 * (per_row + per_head)) / 2**20
        raise BackendError(
            f"memory_budget: {memory_budget / 2**20:.0f} MiB is too little for prompts of {longest} tokens.",
            hint=f"Allow at least {needed:.0f} MiB, shorten the prompts or take a smaller model.",
        )
    return Limits(max(1, rows), max(1, min(rows, (room - rows * per_row) // per_head)), tile_rows)


class TrieEngine:
    """Runs the passes of a trie through a model whose attention is :data:`~.attention.IMPLEMENTATION`.

    Attributes
    ----------
    tokens_computed : int
        Rows given to the network so far.
    peak_held_tokens : int
        Most path tokens whose keys and values were held between passes.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._torch = require("torch", "transformers")
        self.tokens_computed = 0
        self.peak_held_tokens = 0
        self.windows: dict[int, int | None] = {}

    def run(
        self, trie: Trie, limits: Limits, before: Callable[[IntArray], None], context: Callable[[], Any]
    ) -> Iterator[Block]:
        """Compute a trie's reads pass by pass; a pass starts only when it is asked for.

        Parameters
        ----------
        trie : Trie
        limits : Limits
        before : callable
            Called with the owners that a pass will finish, before it is computed.
        context : callable
            Returns a context manager to hold around each pass (thread counts).
        """
        for step in self.steps(trie, limits, before, context):
            pass_ = step.pass_
            row = np.searchsorted(pass_.heads, trie.read_node[pass_.reads] - pass_.start)
            with context(), self._torch.inference_mode():
                values = read_rows(self._torch, step.logits, row, trie.read_target[pass_.reads])
            # The next-token distributions are the largest thing a pass makes; let them go before yielding.
            step.logits = None
            yield Block(pass_.stop - pass_.start, pass_.reads, values, pass_.finished)

    def steps(
        self, trie: Trie, limits: Limits, before: Callable[[IntArray], None], context: Callable[[], Any]
    ) -> Iterator[Step]:
        """Compute a trie pass by pass and hand out what each pass made."""
        store = PathStore()
        torch = self._torch
        for pass_ in trie.passes(limits.rows, limits.heads, limits.tile_rows):
            before(pass_.finished)
            with context(), torch.inference_mode():
                plan = PassPlan(pass_, store, self._model.device, self._model.dtype)
                step = Step(pass_, self._within_memory(pass_, plan), store, plan)
            self.tokens_computed += pass_.stop - pass_.start
            self.windows.update(plan.windows)
            yield step
            with torch.inference_mode():
                rows = torch.as_tensor(pass_.keep_rows, device=self._model.device)
                store.keep(pass_.n_keep, rows, plan.fresh)
            self.peak_held_tokens = max(self.peak_held_tokens, store.n_tokens)

    def _within_memory(self, pass_: Pass, plan: PassPlan) -> Any:
        try:
            return self._forward(pass_, plan)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise BackendError(
                f"Memory ran out while computing {pass_.stop - pass_.start} tokens at once.",
                hint="Set a smaller max_batch_tokens or memory_budget, or close other programs.",
            ) from error

    def _forward(self, pass_: Pass, plan: PassPlan) -> Any:
        """Logits of the rows that are read, shape (n_heads, vocabulary)."""
        torch, device = self._torch, self._model.device
        rows = pass_.stop - pass_.start
        # A ready-made 4-D mask is handed through by every model and read by none: the plan decides.
        unused = torch.zeros(1, 1, 1, 1, dtype=self._model.dtype, device=device)
        output = self._model(
            input_ids=torch.as_tensor(pass_.tokens, device=device).view(1, rows),
            position_ids=torch.as_tensor(pass_.depths, device=device).view(1, rows),
            attention_mask=unused,
            use_cache=False,
            logits_to_keep=torch.as_tensor(pass_.heads, device=device),
            proxyprompt_plan=plan,
        )
        return output.logits[0]


def read_rows(torch: Any, logits: Any, rows: IntArray, targets: IntArray) -> Values:
    """Natural-log probability of ``targets[i]`` after row ``rows[i]`` of ``logits``, over the vocabulary."""
    if not rows.size:
        return np.zeros(0)
    logits = logits.float()
    total = torch.logsumexp(logits, dim=-1)
    at = torch.as_tensor(rows, device=logits.device)
    picked = logits[at, torch.as_tensor(targets, device=logits.device)]
    values: Values = (picked - total[at]).double().cpu().numpy()
    # Rounding can leave a sure token a hair above probability one.
    return np.minimum(values, 0.0)


def check_engine(model: Any) -> str:
    """Say why a model cannot run on the trie engine, or return the empty string.

    The check is a measurement: a small trie is computed both ways, the model's attention being set to
    :data:`~.attention.IMPLEMENTATION`. Layers that need more than positions and
    windows (recurrent states, biases by distance, attention sinks) cannot pass it unnoticed.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))}"
    if model.config._attn_implementation != IMPLEMENTATION:
        return "no attention interface"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "no logits_to_keep"
    return _measure(model, int(config.vocab_size))


def _measure(model: Any, vocabulary: int) -> str:
    torch = require("torch", "transformers")
    paths = [np.asarray(path) % vocabulary for path in _PROBE]
    reads = np.array([(i, path.size - 1, 7 % vocabulary, i, 0) for i, path in enumerate(paths)])
    trie = build_trie(paths, reads, len(paths))
    engine = TrieEngine(model)
    got = np.zeros(len(paths))
    try:
        for block in engine.run(trie, Limits(5, 5, 3), lambda _: None, torch.no_grad):
            got[trie.read_owner[block.reads]] = block.values
    except (UnsupportedModel, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        return str(error) or type(error).__name__
    if len(engine.windows) != int(model.config.get_text_config(decoder=True).num_hidden_layers):
        return "layers that bypass the attention interface"
    expected = []
    with torch.inference_mode():
        for path in paths:
            ids = torch.as_tensor(path, device=model.device).view(1, -1)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            expected.append(float(logits.log_softmax(-1)[7 % vocabulary]))
    worst = float(np.abs(got - np.asarray(expected)).max())
    allowed = 1e-4 if model.dtype.itemsize >= 4 else 0.25
    return "" if worst <= allowed else f"a difference of {worst:.2g} nats from a plain forward"


_PROBE: Sequence[Sequence[int]] = (
    (11, 23, 5, 42, 17, 8, 31, 64),
    (11, 23, 5, 42, 90, 3, 77),
    (11, 23, 5, 42, 90, 12, 55, 6, 41),
    (11, 23, 19),
)
