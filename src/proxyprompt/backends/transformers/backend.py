"""A causal language model on this machine as a scorer and a generator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from proxyprompt.backends.base import (
    GenerateRequest,
    GenerateResult,
    OnSend,
    OnTokens,
    Plan,
    Rendered,
    ScoreRequest,
    ScoreResult,
    Usage,
)
from proxyprompt.errors import BackendError, InputError

from . import identity as files
from .engine import TrieEngine, choose_limits
from .generation import Growing, grow
from .loading import Device, Dtype, load_model, pick_device
from .masked import masked_batch
from .plain import PlainEngine, choose_engine, grow_plainly
from .threads import choose_threads, import_torch, use_threads
from .tokens import Batch, EncodedRequest, TextTokenizer, encode_requests, make_batch
from .trie import IntArray

__all__ = ["TransformersBackend"]

ENGINE_VERSION = 1
APPROXIMATION = "masked-demonstrations-1"
_DTYPES = ("float32", "bfloat16", "auto")
_DEVICES = ("auto", "cpu", "cuda")
_TEXTS_AT_ONCE = 16


class TransformersBackend:
    """Any causal language model from a local folder or a hub id.

    Nothing is loaded until it is needed: :attr:`identity` reads small parts of the model's files, counting
    tokens loads the tokenizer, scoring loads the weights.

    Parameters
    ----------
    model : str or path
        Folder with ``config.json``, a tokenizer and ``*.safetensors``, or a hub id such as
        ``"Qwen/Qwen2.5-0.5B-Instruct"``.
    dtype : {"float32", "bfloat16", "auto"}
        Number type of the weights; ``"auto"`` takes the one they were saved in. On a CPU ``"float32"`` is
        exact, and faster where the processor has no bf16 units.
    device : {"auto", "cpu", "cuda"}
        ``"auto"`` takes CUDA where there is one.
    chat_template : bool, optional
        Whether prompts of chat turns are rendered with the model's template. ``None`` renders them where the
        model has one, ``True`` also insists that it has one, ``False`` refuses chat turns.
    revision : str, optional
        Commit, tag or branch of a hub id.
    max_batch_tokens : int, optional
        Most tokens computed in one forward; by default chosen for the device.
    memory_budget : int, optional
        Bytes for everything besides the weights; by default a quarter of the free memory.
    threads : int, optional
        CPU threads; by default a measurement at load decides between one and all cores.
    approximate : bool
        Read the whole prompt's demonstrations once, and make coalitions by hiding demonstrations from the
        attention of what follows them (see Notes). A different model for every purpose: its name ends in
        ``~masked``, its answers are recorded apart, and it has to pass the screen by itself.
    name : str, optional
        What to call the backend; by default ``transformers:`` and the model's name.

    Raises
    ------
    InputError
        If an argument breaks its rule.

    Notes
    -----
    *Score.* Prompt and candidate are tokenised together, once for each candidate. Let ``start`` be the
    smallest, over the candidates of a request, of the number of leading tokens that the tokenised prompt and
    the tokenised prompt-and-candidate have in common. The log-probability of a candidate is the sum, over its
    token positions from ``start`` on, of the log-softmax over the whole vocabulary. So tokens that merge
    across the boundary are scored as the model would read them, and all candidates of a request are
    conditioned on the same tokens.

    *Special tokens.* Text gets the tokenizer's own (a beginning-of-text token where it has one), without any
    it would put at the end; a rendered chat prompt gets none, since the template wrote them.

    *Sharing.* Every distinct prefix of a batch is computed once. What the model reads is the batch's token
    trie less each candidate's last token, which is predicted and never read; :meth:`plan` counts just that.
    Architectures whose attention needs more than positions and sliding windows are found out by a small
    measurement at load and run without sharing; :attr:`shares_prefixes` tells.
    """

    deterministic = True

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: Dtype = "float32",
        device: Device = "auto",
        chat_template: bool | None = None,
        revision: str | None = None,
        max_batch_tokens: int | None = None,
        memory_budget: int | None = None,
        threads: int | None = None,
        approximate: bool = False,
        name: str | None = None,
    ) -> None:
        if not isinstance(approximate, bool):
            raise InputError(f"approximate: {approximate!r} is neither true nor false.", hint="Leave it out.")
        if dtype not in _DTYPES:
            raise InputError(f"dtype: {dtype!r} is not one of {_DTYPES}.", hint="Take 'float32' on a CPU.")
        if device not in _DEVICES:
            raise InputError(f"device: {device!r} is not one of {_DEVICES}.", hint="Take 'auto'.")
        for key, value in (
            ("max_batch_tokens", max_batch_tokens),
            ("memory_budget", memory_budget),
            ("threads", threads),
        ):
            if value is not None and value < 1:
                raise InputError(f"{key}: {value!r} must be at least 1.", hint="Leave it out.")
        self._source = os.fspath(model)
        self._dtype, self._device, self._revision = dtype, device, revision
        self._chat_template = chat_template
        self._max_batch_tokens, self._memory_budget = max_batch_tokens, memory_budget
        self._threads = threads
        self._approximate = approximate
        self._name = name
        self._known: dict[ScoreRequest, EncodedRequest] = {}

    @property
    def name(self) -> str:
        """What a person calls the model."""
        folder = Path(self._source).expanduser()
        label = folder.resolve().name if folder.is_dir() else self._source
        return (self._name or f"transformers:{label}") + ("~masked" if self._approximate else "")

    @property
    def masks_units(self) -> bool:
        """Whether requests come as whole prompts with a :class:`~proxyprompt.backends.base.UnitMask`."""
        return self._approximate

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What decides the answers: hash of the model's files, number type, template rule, engine version.

        The device, the thread count and the sizes of passes are left out: they move log-probabilities by
        rounding only.

        Raises
        ------
        BackendError
            If the model is not there or is not a causal language model.
        """
        return {
            "provider": "transformers",
            **self._describe(),
            "dtype": self._dtype_name(),
            "chat_template": self._chat_template,
            "engine": ENGINE_VERSION,
            **({"approximate": APPROXIMATION} if self._approximate else {}),
        }

    @cached_property
    def shares_prefixes(self) -> bool:
        """Whether the model runs on the trie engine; loads the weights."""
        return isinstance(self._engine, TrieEngine)

    def count_tokens(self, prompt: Rendered) -> int:
        """Tokens of one rendered prompt, special tokens included; loads the tokenizer only."""
        text, special = self._tokenizer.text(prompt, "prompt")
        return int(self._tokenizer.encode([text], special=special)[0].size)

    def plan(self, requests: Sequence[ScoreRequest]) -> Plan:
        """Count the tokens that :meth:`score` would compute; loads the tokenizer only.

        Raises
        ------
        InputError, BackendError
            As :meth:`score`.
        """
        encoded = self._encode(requests)
        self._known = {_unmasked(request): item for request, item in zip(requests, encoded, strict=True)}
        batch = self._batch(requests, encoded)
        return Plan(len(requests), batch.trie.n_nodes, batch.n_naive)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, ScoreResult]]]:
        """Yield log-probabilities in blocks; see :class:`~proxyprompt.backends.base.Scorer`.

        Requests are checked and tokenised at the call; weights are loaded and blocks computed when the
        iterator is asked for them.

        Raises
        ------
        InputError
            If a request has no candidates, equal ones or one that adds no token.
        BackendError
            If a prompt is longer than the model's context, or the model cannot be loaded.
        """
        batch = self._batch(requests, self._encode(requests))
        return self._score(batch, on_send, on_tokens)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, GenerateResult]]]:
        """Yield greedy continuations in blocks; see :class:`~proxyprompt.backends.base.Generator`.

        A text ends at the model's end-of-text token, before the first of its stop strings, or at
        ``max_tokens``.

        Raises
        ------
        InputError
            If ``max_tokens`` is below 1.
        BackendError
            If a prompt and its continuation are longer than the model's context.
        """
        if self._approximate:
            raise InputError(
                f"approximate: {self.name} scores given answers only and writes no text.",
                hint="Leave approximate out for tasks that generate.",
            )
        growing = self._start_texts(requests)
        return self._generate(growing, on_send, on_tokens)

    # What embedded models replace.

    def _resolve(self) -> files.ModelFiles:
        return files.resolve(self._source, self._revision)

    def _describe(self) -> dict[str, Any]:
        files.read_config(self._files.folder)
        label = None if self._files.commit is None else self._source
        return {"model": label, "commit": self._files.commit, "sha256": files.hash_folder(self._files.folder)}

    def _load_tokenizer(self) -> TextTokenizer:
        files.read_config(self._files.folder)  # refuses what must not be loaded
        return TextTokenizer.from_folder(self._files.folder)

    # Parts, each made when first needed.

    @cached_property
    def _files(self) -> files.ModelFiles:
        return self._resolve()

    @cached_property
    def _config(self) -> dict[str, Any]:
        return files.read_config(self._files.folder)

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        tokenizer = self._load_tokenizer()
        if self._chat_template is False:
            tokenizer.template = None
        if self._chat_template is True and tokenizer.template is None:
            raise BackendError(
                f"chat_template: {self.name} has no chat template.",
                hint="Leave chat_template out and use completion style.",
            )
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        files.read_config(self._files.folder)
        return load_model(self._files.folder, self._dtype_name(), pick_device(self._device))

    @cached_property
    def _engine(self) -> TrieEngine | PlainEngine:
        with self._computing():
            return choose_engine(self._model)

    @cached_property
    def _thread_count(self) -> int:
        return self._threads or choose_threads(import_torch())

    def _computing(self) -> AbstractContextManager[None]:
        return use_threads(import_torch(), self._thread_count)

    def _dtype_name(self) -> str:
        return files.stored_dtype(self._config) if self._dtype == "auto" else self._dtype

    def _budget(self) -> int:
        return self._memory_budget or _free_memory(self._model.device) // 4

    # The work.

    def _encode(self, requests: Sequence[ScoreRequest]) -> list[EncodedRequest]:
        masked = [index for index, request in enumerate(requests) if request.mask is not None]
        if masked and not self._approximate:
            raise InputError(
                f"requests[{masked[0]}].mask: only the approximate mode hides units of a prompt.",
                hint="Give approximate=True, or render the units away.",
            )
        encoded = encode_requests(self._tokenizer, [_unmasked(r) for r in requests], self._known)
        for index, item in enumerate(encoded):
            self._check_length(item.n_read, f"requests[{index}]: the prompt with its longest candidate")
        return encoded

    def _batch(self, requests: Sequence[ScoreRequest], encoded: Sequence[EncodedRequest]) -> Batch:
        if self._approximate:
            return masked_batch(self._tokenizer, requests, encoded)
        return make_batch(encoded)

    def _check_length(self, tokens: int, what: str) -> None:
        limit = files.context_limit(self._config)
        if limit is not None and tokens > limit:
            raise BackendError(
                f"{what} has {tokens} tokens; {self.name} reads at most {limit}.",
                hint="Use fewer or shorter demonstrations, or a model with a longer context.",
            )

    def _score(
        self, batch: Batch, on_send: OnSend | None, on_tokens: OnTokens | None
    ) -> Iterator[Sequence[tuple[int, ScoreResult]]]:
        trie = batch.trie
        if not batch.n_prompt:
            return
        engine = self._engine
        if self._approximate and not self.shares_prefixes:
            raise BackendError(
                f"approximate: the attention of {self.name} cannot be masked.",
                hint="Leave approximate out; the model then runs exactly, prompt by prompt.",
            )
        limits = choose_limits(self._model, trie.longest, self._max_batch_tokens, self._budget())
        first = np.cumsum([0, *batch.n_candidates])
        sums = np.zeros(first[-1])
        for block in engine.run(trie, limits, _announce(on_send), self._computing):
            np.add.at(sums, first[trie.read_owner[block.reads]] + trie.read_slot[block.reads], block.values)
            if on_tokens is not None:
                on_tokens(block.n_tokens)
            if block.finished.size:
                yield [
                    (owner, _score_result(sums[first[owner] : first[owner + 1]], batch.n_prompt[owner]))
                    for owner in block.finished.tolist()
                ]

    def _start_texts(self, requests: Sequence[GenerateRequest]) -> list[Growing]:
        growing = []
        for index, request in enumerate(requests):
            if request.max_tokens < 1:
                raise InputError(
                    f"requests[{index}].max_tokens: {request.max_tokens} must be at least 1.",
                    hint="Ask for at least one token.",
                )
            text, special = self._tokenizer.text(request.prompt, f"requests[{index}]")
            ids = self._tokenizer.encode([text], special=special)[0]
            if not ids.size:
                raise InputError(f"requests[{index}].prompt is empty.", hint="Give some text to continue.")
            self._check_length(
                int(ids.size) + request.max_tokens - 1, f"requests[{index}]: the prompt with max_tokens"
            )
            growing.append(Growing(ids, request.max_tokens, request.stop))
        return growing

    def _generate(
        self, growing: Sequence[Growing], on_send: OnSend | None, on_tokens: OnTokens | None
    ) -> Iterator[Sequence[tuple[int, GenerateResult]]]:
        order = sorted(range(len(growing)), key=lambda index: growing[index].prompt.tolist())
        if not order:
            return
        at_once = _TEXTS_AT_ONCE if self.shares_prefixes else 1
        announce = _announce(on_send)
        for begin in range(0, len(order), at_once):
            mine = order[begin : begin + at_once]
            announce(np.asarray(mine))
            batch = [growing[index] for index in mine]
            self._grow(batch, on_tokens or _ignore)
            yield [(index, _generate_result(growing[index])) for index in mine]

    def _grow(self, batch: Sequence[Growing], on_tokens: OnTokens) -> None:
        if not self.shares_prefixes:
            for text in batch:
                grow_plainly(self._model, self._tokenizer, text, self._computing, on_tokens)
            return
        longest = max(int(text.prompt.size) for text in batch)
        limits = choose_limits(self._model, longest, self._max_batch_tokens, self._budget())
        grow(self._model, self._tokenizer, batch, limits, self._computing, on_tokens)


def _unmasked(request: ScoreRequest) -> ScoreRequest:
    return request if request.mask is None else replace(request, mask=None)


def _score_result(sums: np.ndarray[Any, np.dtype[np.float64]], n_prompt: int) -> ScoreResult:
    usage = Usage(prompt_tokens=n_prompt)
    if not np.isfinite(sums).all():
        nothing = (None,) * sums.size
        return ScoreResult(nothing, (False,) * sums.size, usage, error="the model gave non-finite numbers")
    return ScoreResult(tuple(sums.tolist()), (False,) * sums.size, usage)


def _generate_result(text: Growing) -> GenerateResult:
    return GenerateResult(text.text, Usage(int(text.prompt.size), len(text.ids)))


def _announce(on_send: OnSend | None) -> Callable[[IntArray], None]:
    def announce(owners: IntArray) -> None:
        if on_send is not None and owners.size:
            on_send(owners.tolist())

    return announce


def _ignore(_: int) -> None:
    return None


def _free_memory(device: Any) -> int:
    if device.type == "cuda":
        return int(import_torch().cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30
