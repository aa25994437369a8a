"""Prompts that somebody else's program renders and sends: a LangChain chain, a DSPy program.

The program stays the only one that decides what its model sees. A :class:`ProgramPrompt` asks it to render a coalition of
its demonstrations for a query and remembers what came out; a :class:`ProgramBackend` is given such a rendering and
runs the program on the coalition and query it came from. Everything between (ledger, screening, attribution,
optimizers, certificate) works as for any other prompt.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from .backends._openai_labels import UnreadableAnswerError, read_labels, read_texts
from .backends._openai_wire import logprob_path
from .backends.base import (
    GenerateRequest,
    GenerateResult,
    OnSend,
    OnTokens,
    Rendered,
    ScoreRequest,
    ScoreResult,
    Usage,
)
from .errors import InputError
from .prompt import FewShotPrompt, Query

__all__ = [
    "Call",
    "ProgramBackend",
    "ProgramPrompt",
    "Renderings",
    "ScoringProgramBackend",
    "run_blocks",
    "score_from_logprobs",
    "score_from_text",
]

R = TypeVar("R", ScoreResult, GenerateResult)


@dataclass(frozen=True)
class Call:
    """One run of a program: which demonstrations it shows, and the query.

    Parameters
    ----------
    kept : tuple of str
        Ids of the demonstrations, in the order in which they stand in the prompt.
    query : Query
    """

    kept: tuple[str, ...]
    query: Query


class Renderings:
    """What a program sends for each call, and back again.

    Parameters
    ----------
    render : callable
        ``render(call) -> str or tuple of Message``: exactly what the program would send to its model, or, where that
        depends on the model's own answers (several steps), a text that names everything that decides the run.
        Two calls may render alike only if the program runs alike on them.

    Notes
    -----
    Kept in memory: one digest a rendering. Safe for threads.
    """

    def __init__(self, render: Callable[[Call], Rendered]) -> None:
        self._render = render
        self._calls: dict[bytes, Call] = {}
        self._lock = threading.Lock()

    def render(self, call: Call) -> Rendered:
        """Render a call, and remember where the rendering came from."""
        rendered = self._render(call)
        with self._lock:
            self._calls.setdefault(_digest(rendered), call)
        return rendered

    def call(self, rendered: Rendered) -> Call:
        """The call that was rendered to this.

        Raises
        ------
        InputError
            If it was not rendered here: it must not be sent on a guess.
        """
        with self._lock:
            found = self._calls.get(_digest(rendered))
        if found is None:
            raise InputError(
                "prompt: this text was not rendered by the program that shall answer it.",
                hint="Give the backend and the prompt the same Renderings.",
            )
        return found


def _digest(rendered: Rendered) -> bytes:
    plain = rendered if isinstance(rendered, str) else [[turn.role, turn.content] for turn in rendered]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class ProgramPrompt(FewShotPrompt):
    """A few-shot prompt whose text is made by a program, not by templates.

    Parameters
    ----------
    renderings : Renderings
        Makes the text of a coalition and a query.

    Notes
    -----
    ``demonstration_template`` is only what reports show; give it the fields of the demonstrations. Subsets and orders
    keep the program. :meth:`FewShotPrompt.from_dict` of :meth:`to_dict` is a plain prompt without it.
    """

    renderings: Renderings | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.renderings is None:
            raise InputError("renderings: a ProgramPrompt needs the program that renders it.")

    def render(
        self, coalition: Sequence[bool] | None, query: Query, *, instruction: str | None = None
    ) -> Rendered:
        """What the program sends for the demonstrations of the coalition and a query."""
        if instruction is not None:
            raise InputError(
                "instruction: the text of this prompt is made by a program and cannot be replaced."
            )
        keep = [True] * self.n_units if coalition is None else list(coalition)
        if len(keep) != self.n_units:
            raise InputError(
                f"coalition: {len(keep)} entries for {self.n_units} demonstrations; one each is needed."
            )
        kept = tuple(d.id for d, k in zip(self.demonstrations, keep, strict=True) if k)
        assert self.renderings is not None  # __post_init__
        return self.renderings.render(Call(kept, query))


def run_blocks(
    concurrency: int, n: int, run: Callable[[int], R], on_send: OnSend | None, on_tokens: OnTokens | None
) -> Iterator[Sequence[tuple[int, R]]]:
    """Run ``run(0), ..., run(n - 1)`` in threads, at most ``concurrency`` at a time, and yield what is finished.

    Each index is announced to ``on_send`` before it runs, and nothing new is begun while the caller holds a block. After a
    failure what is under way is still delivered; then the first exception is raised.
    """
    todo = iter(range(n))
    flying: dict[Future[R], int] = {}
    failure: BaseException | None = None
    pool = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="proxyprompt-program")
    try:
        while True:
            while failure is None and len(flying) < concurrency:
                index = next(todo, None)
                if index is None:
                    break
                try:
                    if on_send is not None:
                        on_send([index])
                except Exception as error:  # what is in flight is paid: deliver it, then raise
                    failure = error
                    break
                flying[pool.submit(run, index)] = index
            if not flying:
                break
            block: list[tuple[int, R]] = []
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                index = flying.pop(future)
                try:
                    block.append((index, future.result()))
                except Exception as error:
                    failure = failure or error
            if block:
                if on_tokens is not None:
                    on_tokens(sum(r.usage.prompt_tokens + r.usage.completion_tokens for _, r in block))
                yield block
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class ProgramBackend:
    """A program as a model that gives text; :class:`ScoringProgramBackend` for one that gives log-probabilities too.

    Parameters
    ----------
    name : str
        Shown to people.
    identity : mapping
        Everything that decides the program's answers besides demonstrations and query: its structure, its model, every
        parameter; JSON values, no secrets. Part of every ledger key.
    renderings : Renderings
        Those of the prompt.
    generate : callable
        ``generate(call, request) -> GenerateResult``: run the program. Called from several threads. What it raises stops
        the run; a call that failed is a result with ``error``.
    concurrency : int
        Most runs at a time.
    """

    def __init__(
        self,
        name: str,
        identity: Mapping[str, Any],
        renderings: Renderings,
        *,
        generate: Callable[[Call, GenerateRequest], GenerateResult],
        concurrency: int = 4,
    ) -> None:
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise InputError(f"concurrency: got {concurrency!r}; a whole number, at least 1.")
        self._name, self._identity, self._renderings = name, dict(identity), renderings
        self._generate = generate
        self._concurrency = concurrency

    @property
    def name(self) -> str:
        """Name shown to people."""
        return self._name

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the answers besides the request."""
        return dict(self._identity)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, GenerateResult]]]:
        """Run the program once a request; blocks come as runs finish."""
        calls = [self._renderings.call(request.prompt) for request in requests]

        def run(index: int) -> GenerateResult:
            return self._generate(calls[index], requests[index])

        return run_blocks(self._concurrency, len(calls), run, on_send, on_tokens)


class ScoringProgramBackend(ProgramBackend):
    """A program that gives the log-probability of each allowed answer, or, as a label-only model, names one.

    Parameters
    ----------
    score : callable
        ``score(call, request) -> ScoreResult``; the label-only form is that of
        :class:`~proxyprompt.backends.base.ScoreResult`.
    """

    def __init__(
        self,
        name: str,
        identity: Mapping[str, Any],
        renderings: Renderings,
        *,
        generate: Callable[[Call, GenerateRequest], GenerateResult],
        score: Callable[[Call, ScoreRequest], ScoreResult],
        concurrency: int = 4,
    ) -> None:
        super().__init__(name, identity, renderings, generate=generate, concurrency=concurrency)
        self._score = score

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, ScoreResult]]]:
        """Run the program once a request; blocks come as runs finish."""
        calls = [self._renderings.call(request.prompt) for request in requests]

        def run(index: int) -> ScoreResult:
            return self._score(calls[index], requests[index])

        return run_blocks(self._concurrency, len(calls), run, on_send, on_tokens)


def score_from_logprobs(
    logprobs: object,
    candidates: Sequence[str],
    *,
    usage: Usage | None = None,
    model_returned: str | None = None,
) -> ScoreResult | None:
    """Read the labels' log-probabilities from what the OpenAI interface calls ``logprobs``.

    Parameters
    ----------
    logprobs : object
        The JSON value of a choice's ``logprobs``, in any server's dialect.
    candidates : sequence of str
    usage : Usage, optional
    model_returned : str, optional

    Returns
    -------
    ScoreResult or None
        With ``error`` where labels cannot be told apart; ``None`` where the server sent no log-probabilities at all.
        The rules are those of :class:`~proxyprompt.backends.openai.OpenAIBackend`.
    """
    path = logprob_path(logprobs)
    if path is None:
        return None
    return _read(lambda: read_labels(path, candidates), candidates, usage, model_returned)


def score_from_text(
    text: str | None,
    candidates: Sequence[str],
    *,
    usage: Usage | None = None,
    model_returned: str | None = None,
) -> ScoreResult:
    """The label that a text begins with: the longest, whole words, any case.

    Returns
    -------
    ScoreResult
        Label-only; with ``error`` if the text begins with no label.

    Examples
    --------
    >>> score_from_text("Yes, it is.", ("yes", "no")).logprobs
    (0.0, None)
    """

    def read() -> tuple[tuple[float | None, ...], tuple[bool, ...]]:
        return read_texts([text], candidates)[0]

    result = _read(read, candidates, usage, model_returned)
    return result if result.error else replace(result, evidence="texts", samples=1)


def _read(
    read: Callable[[], tuple[tuple[float | None, ...], tuple[bool, ...]]],
    candidates: Sequence[str],
    usage: Usage | None,
    model: str | None,
) -> ScoreResult:
    paid = usage or Usage()
    try:
        values, censored = read()
    except UnreadableAnswerError as error:
        none = (None,) * len(candidates)
        return ScoreResult(none, (False,) * len(candidates), paid, str(error), model)
    return ScoreResult(values, censored, paid, model_returned=model)
