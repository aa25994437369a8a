"""Recorded outputs as a backend: an experiment that can be repeated without a model, a key or a network.

A recording is a JSON Lines file (plain or gzip), one object a line. A scoring line::

    {"prompt": "Review: dull\\nLabel:", "candidates": [" good", " bad"], "logprobs": [-3.1, -0.05],
     "censored": [false, false], "usage": {"prompt_tokens": 9, "completion_tokens": 1}, "model": "m-1"}

and a generation line::

    {"prompt": [{"role": "user", "content": "Capital of France?"}], "max_tokens": 8, "stop": ["\\n"],
     "text": "Paris"}

``censored``, ``usage``, ``model`` and ``stop`` may be left out; values that do not come from log-probabilities name their
``evidence`` and ``samples``. In place of a log-probability, ``null`` is a
missing one and ``"-inf"`` that of the impossible.

Files of leave-one-out scores, in which several models were asked the same prompts with each segment left out, are read by
:func:`load_leave_one_out`, and become such recordings with :func:`leave_one_out_recordings`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from proxyprompt.errors import DataError, InputError, RecordingMissingError

from ._leave_one_out import (
    LeaveOneOutCase,
    LeaveOneOutScores,
    leave_one_out_recordings,
    load_leave_one_out,
)
from ._recordings import Scored, as_line, parse_line
from .base import (
    GenerateRequest,
    GenerateResult,
    OnSend,
    OnTokens,
    Rendered,
    ScoreRequest,
    ScoreResult,
)

__all__ = [
    "LeaveOneOutCase",
    "LeaveOneOutScores",
    "ReplayBackend",
    "leave_one_out_recordings",
    "load_leave_one_out",
    "write_recordings",
]

_BLOCK = 64
_Request = TypeVar("_Request", ScoreRequest, GenerateRequest)
_Result = TypeVar("_Result", ScoreResult, GenerateResult)


class ReplayBackend:
    """Serve recorded answers from a file; the whole file is read and checked on construction.

    Parameters
    ----------
    path : str or path
        A JSON Lines file, plain or gzip; see the module's description of the format.
    model : str, optional
        Serve only the lines whose ``model`` is this. Needed when a file holds several models.
    name : str, optional
        Name shown to people; ``replay:FILENAME`` by default.

    Raises
    ------
    DataError
        If the file cannot be read, is empty, or a line breaks the format (the message gives its number), or
        two lines answer the same request differently.
    InputError
        If ``model`` is not in the file, or is not given and the file holds several.

    Notes
    -----
    A scoring line serves every request for the same prompt whose candidates are among its own, in any order:
    an identical set is preferred, then the smallest set that holds them all, then the earlier line.
    A generation line serves the same prompt, ``max_tokens`` and ``stop``. A request without a recording
    raises :class:`~proxyprompt.errors.RecordingMissingError`, after the answers before it are yielded.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "answers.jsonl"
    >>> _ = file.write_text('{"prompt": "Sky:", "candidates": [" red", " blue"], "logprobs": [-4, -0.1]}')
    >>> [[(index, result)]] = ReplayBackend(file).score([ScoreRequest("Sky:", (" blue", " red"))])
    >>> result.logprobs
    (-0.1, -4.0)
    """

    deterministic = True

    def __init__(
        self, path: str | os.PathLike[str], *, model: str | None = None, name: str | None = None
    ) -> None:
        self._path = Path(path)
        content = _read(self._path)
        digest = hashlib.sha256(content).hexdigest()
        scored, generated = _load(_unzipped(content, self._path), self._path, model)
        self._scored = scored
        self._generated = generated
        self._model = model
        self._name = f"replay:{self._path.name}" if name is None else name
        self._identity = {"provider": "replay", "sha256": digest, "model": model}

    def __repr__(self) -> str:
        return f"ReplayBackend({str(self._path)!r}, model={self._model!r}, recordings={len(self)})"

    def __len__(self) -> int:
        return sum(map(len, self._scored.values())) + len(self._generated)

    @property
    def name(self) -> str:
        """Name shown to people."""
        return self._name

    @property
    def identity(self) -> Mapping[str, Any]:
        """SHA-256 of the file as it lies on disk, and the model chosen from it."""
        return dict(self._identity)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, ScoreResult]]]:
        """Yield blocks of ``(index, ScoreResult)`` in order.

        Raises
        ------
        RecordingMissingError
            If a request has no recording.
        """
        return _blocks(requests, self._find_scores, on_send, on_tokens)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, GenerateResult]]]:
        """Yield blocks of ``(index, GenerateResult)`` in order.

        Raises
        ------
        RecordingMissingError
            If a request has no recording.
        """
        return _blocks(requests, self._find_text, on_send, on_tokens)

    def _find_scores(self, request: ScoreRequest) -> ScoreResult:
        wanted = frozenset(request.candidates)
        serving = [pair for pair in self._scored.get(request.prompt, ()) if wanted <= set(pair[0].candidates)]
        if not serving:
            raise self._missing(request.prompt, f"candidates {list(request.candidates)!r}")
        recorded, result = min(serving, key=lambda pair: len(pair[0].candidates))
        order = [recorded.candidates.index(candidate) for candidate in request.candidates]
        return replace(
            result,
            logprobs=tuple(result.logprobs[k] for k in order),
            censored=tuple(result.censored[k] for k in order),
        )

    def _find_text(self, request: GenerateRequest) -> GenerateResult:
        found = self._generated.get(request)
        if found is None:
            raise self._missing(
                request.prompt, f"max_tokens={request.max_tokens}, stop={list(request.stop)!r}"
            )
        return found

    def _missing(self, prompt: Rendered, asked: str) -> RecordingMissingError:
        text = prompt if isinstance(prompt, str) else (prompt[-1].content if prompt else "")
        kind = "text" if isinstance(prompt, str) else f"{len(prompt)} chat turns"
        return RecordingMissingError(
            f"No recording in {self._path} for the prompt ({kind}) that ends in {text[-80:]!r} with {asked}; "
            f"the file holds {len(self)} recordings{f' of model {self._model!r}' if self._model else ''}.",
            hint="Record this request too, or check that the prompt is rendered as it was when recorded.",
        )


def write_recordings(
    path: str | os.PathLike[str],
    pairs: Iterable[tuple[ScoreRequest, ScoreResult] | tuple[GenerateRequest, GenerateResult]],
) -> int:
    """Write answered requests as a file for :class:`ReplayBackend`.

    Parameters
    ----------
    path : str or path
        Where to write; gzip if the name ends in ``.gz``. An existing file is replaced in one step.
    pairs : iterable of (request, result)
        Answered requests; ``model_returned`` becomes ``model``.

    Returns
    -------
    int
        Number of recordings written.

    Raises
    ------
    InputError
        If a result carries an error: a recording holds answers only.

    Notes
    -----
    The file is readable by its owner only (mode 0600), since prompts may be confidential. The same pairs give
    the same bytes.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "one.jsonl"
    >>> write_recordings(file, [(ScoreRequest("Sky:", (" blue",)), ScoreResult((-0.1,), (False,)))])
    1
    >>> len(ReplayBackend(file))
    1
    """
    target = Path(path)
    lines = [json.dumps(as_line(*pair), ensure_ascii=False, allow_nan=False) for pair in pairs]
    content = "".join(line + "\n" for line in lines).encode()
    if target.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    # mkstemp creates with mode 0600, so the text is never readable by others, not even while it is written.
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return len(lines)


def _blocks(
    requests: Sequence[_Request],
    find: Callable[[_Request], _Result],
    on_send: OnSend | None,
    on_tokens: OnTokens | None,
) -> Iterator[Sequence[tuple[int, _Result]]]:
    for start in range(0, len(requests), _BLOCK):
        indices = range(start, min(start + _BLOCK, len(requests)))
        if on_send is not None:
            on_send(tuple(indices))
        block: list[tuple[int, _Result]] = []
        failure: RecordingMissingError | None = None
        for index in indices:
            try:
                block.append((index, find(requests[index])))
            except RecordingMissingError as error:
                failure = error
                break
        if on_tokens is not None:
            on_tokens(sum(r.usage.prompt_tokens + r.usage.completion_tokens for _, r in block))
        if block:
            yield block
        if failure is not None:
            raise failure


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"The recordings {path} cannot be read: {error.strerror}.",
            hint="Give the path of a JSON Lines file.",
        ) from error


def _unzipped(content: bytes, path: Path) -> str:
    try:
        # By the magic number, not by the name: a copied file may have lost its suffix.
        return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"The recordings {path} are not UTF-8 text or gzip of it: {error}.") from error


def _load(
    text: str, path: Path, model: str | None
) -> tuple[dict[Rendered, list[Scored]], dict[GenerateRequest, GenerateResult]]:
    models: set[str | None] = set()
    scored: dict[Rendered, list[Scored]] = {}
    generated: dict[GenerateRequest, GenerateResult] = {}
    seen: dict[Any, tuple[int, Any]] = {}
    # Not splitlines(): it also breaks at characters such as U+2028 that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        request, result = parse_line(line, where)
        models.add(result.model_returned)
        if model is not None and result.model_returned != model:
            continue
        key, value = _comparable(request, result)
        first = seen.setdefault(key, (number, value))
        if first[1] != value:
            raise DataError(f"{where}: the same request was answered differently on line {first[0]}.")
        if first[0] != number:
            continue
        if isinstance(request, ScoreRequest):
            scored.setdefault(request.prompt, []).append((request, cast(ScoreResult, result)))
        else:
            generated[request] = cast(GenerateResult, result)
    if not models:
        raise DataError(f"The recordings {path} hold no line.", hint="Make them with write_recordings().")
    named = sorted(repr(each) for each in models)
    if model is None and len(models) > 1:
        raise InputError(
            f"{path} holds several models: {', '.join(named)}.", hint="Choose one with model=NAME."
        )
    if model is not None and model not in models:
        raise InputError(f"model={model!r} is not in {path}, which holds {', '.join(named)}.")
    return scored, generated


def _comparable(
    request: ScoreRequest | GenerateRequest, result: ScoreResult | GenerateResult
) -> tuple[Any, Any]:
    if isinstance(request, ScoreRequest):
        answer = cast(ScoreResult, result)
        values = dict(
            zip(request.candidates, zip(answer.logprobs, answer.censored, strict=True), strict=True)
        )
        return (request.prompt, frozenset(request.candidates), result.model_returned), values
    return (request, result.model_returned), cast(GenerateResult, result).text
