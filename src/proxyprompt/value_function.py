"""Where prompt, task and backend meet: coalitions in, values out.

Values keep the shape ``(n_coalitions, n_queries)``; the mean over queries is a later, visible step. A value
that could not be had is NaN together with its reason, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from .backends.base import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult, masks_units
from .errors import InconclusiveError, InputError
from .metering import Meter
from .prompt import FewShotPrompt, Query, UnitPrompt
from .task import LabelTask, Task, TextTask

__all__ = ["PromptValueFunction", "ValueFunction", "Values", "evaluate_together"]

BoolMatrix: TypeAlias = NDArray[np.bool_]
FloatArray: TypeAlias = NDArray[np.float64]
Progress: TypeAlias = Callable[[int, int], None]
T = TypeVar("T")


class ValueFunction(Protocol):
    """Anything that maps coalitions to values."""

    def __call__(self, coalitions: BoolMatrix) -> FloatArray:
        """Boolean ``(n_coalitions, n_units)`` to float ``(n_coalitions, n_queries)``, NaN where missing."""
        ...


@dataclass(frozen=True)
class Values:
    """What a model did on every (coalition, query) pair; ``m`` coalitions, ``q`` queries.

    Attributes
    ----------
    coalitions : bool (m, n_units)
    utility : float (m, q)
        Quality of the output; higher is better. Nats of log-probability of the reference, normalised over
        the allowed labels (``scale="log-probability"``), or the share of its texts that are right
        (``scale="accuracy"``, for a model that only answers; 1 or 0 where it was asked once), or the score of a
        generated text (``scale="score"``). NaN: missing.
    performance : float (m, q)
        Right (1) or wrong (0) for labels, the score for text: what a certificate is about. NaN: missing.
    predictions : int (m, q)
        Index of the predicted label, -1 where missing (always -1 for text).
    probabilities : float (m, q, n_labels) or None
        Probability of each label among the allowed ones; 0 beyond a query's own labels, NaN where missing.
    prompt_tokens : int (m, q)
        Tokens of the rendered prompt as the model or provider counted them; 0 where not known.
    scale : str
    missing : tuple of (coalition index, query index, reason)
    outputs : tuple of tuple of str or None
        Generated texts, for text tasks.
    """

    coalitions: BoolMatrix
    utility: FloatArray
    performance: FloatArray
    predictions: NDArray[np.int64]
    probabilities: FloatArray | None
    prompt_tokens: NDArray[np.int64]
    scale: str
    missing: tuple[tuple[int, int, str], ...] = ()
    outputs: tuple[tuple[str | None, ...], ...] = ()

    def require_complete(self, what: str, *, share: float = 0.05) -> None:
        """Refuse to go on when more than ``share`` of the values are missing.

        Raises
        ------
        InconclusiveError
            With the share and the most frequent reason.
        """
        total = self.utility.size
        if total and len(self.missing) > share * total:
            reasons = [why for *_, why in self.missing]
            common = max(set(reasons), key=reasons.count)
            raise InconclusiveError(
                f"{what}: {len(self.missing)} of {total} values are missing (limit {share:.0%});"
                f" most often: {common}.",
                hint="Mend the cause and run again; what was answered is in the ledger and is not bought twice.",
            )


@dataclass
class PromptValueFunction:
    """Value function of one prompt on one set of queries, answered by one model.

    Parameters
    ----------
    prompt : UnitPrompt
        A :class:`~proxyprompt.prompt.FewShotPrompt`, whose units are its demonstrations, or another prompt made of
        units (:mod:`proxyprompt.units`). A backend that hides units from a model's attention takes the former only.
    task : LabelTask or TextTask
    queries : sequence of Query
    meter : Meter
        The model, with its ledger.
    stage : str
        Name under which calls are recorded.
    progress : callable, optional
        ``progress(done, total)`` over the model calls of a batch.
    repeat : int
        0, or 1, 2, ... to ask the same things again, as a remote model may answer differently.
    """

    prompt: UnitPrompt
    task: Task
    queries: Sequence[Query]
    meter: Meter
    stage: str = "evaluate"
    progress: Progress | None = field(default=None, repr=False)
    repeat: int = 0

    def __call__(self, coalitions: BoolMatrix) -> FloatArray:
        """Utility, shape ``(n_coalitions, n_queries)``."""
        return self.evaluate(coalitions).utility

    def evaluate(self, coalitions: BoolMatrix) -> Values:
        """Ask the model for every coalition and query.

        Equal requests (all-identical demonstrations, equal rows) are sent once.

        Raises
        ------
        InputError
            If the matrix is not boolean ``(n_coalitions, n_units)``, or the backend cannot leave out such units.
        """
        return evaluate_together([self], [coalitions])[0]

    def recorded(self, coalitions: BoolMatrix) -> BoolMatrix:
        """Which values are in the ledger, shape ``(n_coalitions, n_queries)``; asks nothing."""
        matrix = self._checked(coalitions)
        asked: list[ScoreRequest] | list[GenerateRequest]
        if isinstance(self.task, TextTask):
            asked = self._generate_requests(matrix, self.task)
        else:
            asked = self._score_requests(matrix, self.task)
        known = self.meter.recorded(asked, repeat=self.repeat)
        return np.array(known, dtype=np.bool_).reshape(len(matrix), len(self.queries))

    def _checked(self, coalitions: BoolMatrix) -> BoolMatrix:
        matrix = np.asarray(coalitions)
        if matrix.dtype != np.bool_ or matrix.ndim != 2 or matrix.shape[1] != self.prompt.n_units:
            raise InputError(
                f"coalitions: got {matrix.dtype} {matrix.shape}; a boolean matrix"
                f" (n_coalitions, {self.prompt.n_units}) is needed."
            )
        return matrix

    def _score_requests(self, matrix: BoolMatrix, task: LabelTask) -> list[ScoreRequest]:
        candidates = [
            tuple(self.prompt.candidate(a, query.choices) for a in task.answers(query))
            for query in self.queries
        ]
        if masks_units(self.meter.backend):
            prompt = self.prompt
            if not isinstance(prompt, FewShotPrompt):
                raise InputError(
                    f"The backend {self.meter.backend.name!r} hides demonstrations from the model's attention;"
                    f" the units of {type(prompt).__name__} it cannot leave out.",
                    hint="Open the model without approximate.",
                )
            whole = [prompt.render(None, query) for query in self.queries]
            masks = [prompt.unit_mask(row) for row in matrix.tolist()]
            return [
                ScoreRequest(text, own, mask)
                for mask in masks
                for text, own in zip(whole, candidates, strict=True)
            ]
        return [
            ScoreRequest(self.prompt.render(row, query), own)
            for row in matrix.tolist()
            for query, own in zip(self.queries, candidates, strict=True)
        ]

    def _generate_requests(self, matrix: BoolMatrix, task: TextTask) -> list[GenerateRequest]:
        return [
            GenerateRequest(self.prompt.render(row, query), task.max_tokens, task.stop)
            for row in matrix.tolist()
            for query in self.queries
        ]


def evaluate_together(
    functions: Sequence[PromptValueFunction], coalitions: Sequence[BoolMatrix]
) -> list[Values]:
    """Evaluate several value functions of one model in one batch.

    A local engine computes a prefix once per batch, so explanations that each have their own units (the words of
    one query) share the prompt before the query.

    Parameters
    ----------
    functions : sequence of PromptValueFunction, length n
        Of one meter, task, stage; the first one's ``progress`` is told of all calls.
    coalitions : sequence of ndarray of bool, length n
        One matrix ``(n_coalitions, n_units)`` per function.

    Returns
    -------
    list of Values, length n
        What ``function.evaluate(matrix)`` gives for each of them.

    Raises
    ------
    InputError
        If the lengths differ, the functions do not share meter, task and stage, or a matrix has a wrong shape.
    """
    if len(functions) != len(coalitions):
        raise InputError(
            f"coalitions: {len(coalitions)} matrices for {len(functions)} value functions; one each."
        )
    if not functions:
        return []
    first = functions[0]
    shared = (first.task, first.stage, first.repeat)
    if any(f.meter is not first.meter or (f.task, f.stage, f.repeat) != shared for f in functions):
        raise InputError(
            "functions: they do not share one meter, task, stage and repeat, as one batch has to."
        )
    matrices = [f._checked(matrix) for f, matrix in zip(functions, coalitions, strict=True)]
    pairs = list(zip(functions, matrices, strict=True))
    task = first.task
    if isinstance(task, TextTask):
        texts = [f._generate_requests(matrix, task) for f, matrix in pairs]
        generated = first.meter.generate(
            _flat(texts), stage=first.stage, progress=first.progress, repeat=first.repeat
        )
        return [
            _text_values(matrix, part, task, f.queries)
            for (f, matrix), part in zip(pairs, _parts(generated, texts), strict=True)
        ]
    asked = [f._score_requests(matrix, task) for f, matrix in pairs]
    scored = first.meter.score(_flat(asked), stage=first.stage, progress=first.progress, repeat=first.repeat)
    return [
        _label_values(
            matrix,
            part,
            [task.answers(query).index(query.reference) for query in f.queries],
            [len(task.answers(query)) for query in f.queries],
        )
        for (f, matrix), part in zip(pairs, _parts(scored, asked), strict=True)
    ]


def _flat(lists: Sequence[Sequence[T]]) -> list[T]:
    return [item for items in lists for item in items]


def _parts(results: Sequence[T], like: Sequence[Sequence[Any]]) -> list[Sequence[T]]:
    """Cut ``results`` into pieces as long as the lists of ``like``."""
    ends = np.cumsum([len(items) for items in like]).tolist()
    return [results[end - len(items) : end] for end, items in zip(ends, like, strict=True)]


def _text_values(
    matrix: BoolMatrix, results: Sequence[GenerateResult], task: TextTask, queries: Sequence[Query]
) -> Values:
    shape = (len(matrix), len(queries))
    score = np.full(shape, np.nan)
    tokens = np.zeros(shape, dtype=np.int64)
    missing: list[tuple[int, int, str]] = []
    references = [(q.reference, *q.references) for q in queries]
    answered = [k for k, r in enumerate(results) if r.text is not None]
    scores = task.score(
        [str(results[k].text) for k in answered], [references[k % len(queries)] for k in answered]
    )
    for k, value in zip(answered, scores, strict=True):
        score[divmod(k, len(queries))] = value
    for k, result in enumerate(results):
        i, j = divmod(k, len(queries))
        tokens[i, j] = result.usage.prompt_tokens
        if result.text is None:
            missing.append((i, j, result.error or "no text"))
    rows = [results[i * len(queries) : (i + 1) * len(queries)] for i in range(len(matrix))]
    return Values(
        coalitions=matrix,
        utility=score,
        performance=score.copy(),
        predictions=np.full(shape, -1, dtype=np.int64),
        probabilities=None,
        prompt_tokens=tokens,
        scale="score",
        missing=tuple(missing),
        outputs=tuple(tuple(r.text for r in row) for row in rows),
    )


def _label_values(
    matrix: BoolMatrix, results: Sequence[ScoreResult], reference: Sequence[int], n_labels: Sequence[int]
) -> Values:
    n_queries = len(reference)
    shape = (len(matrix), n_queries)
    width = max(n_labels, default=0)
    logprobs = np.full((*shape, width), np.nan)
    predictions = np.full(shape, -1, dtype=np.int64)
    tokens = np.zeros(shape, dtype=np.int64)
    missing: list[tuple[int, int, str]] = []
    label_only = False
    shares: dict[int, dict[int, float]] = {}
    for k, result in enumerate(results):
        i, j = divmod(k, n_queries)
        tokens[i, j] = result.usage.prompt_tokens
        known = [(value, c) for c, value in enumerate(result.logprobs) if value is not None]
        if result.error is not None or not known:
            missing.append((i, j, result.error or "no log-probability of any label"))
            continue
        sampled = result.evidence == "texts"
        if not sampled and len(known) == n_labels[j] and result.censored and all(result.censored):
            # Upper bounds alone name no winner: the model began with something that is no label.
            missing.append((i, j, "no label among the listed log-probabilities"))
            continue
        predictions[i, j] = max(known, key=lambda pair: (pair[0], -pair[1]))[1]
        label_only = label_only or sampled or len(known) < n_labels[j]
        if sampled:
            shares[k] = {c: math.exp(value) for value, c in known}
        for value, c in known:
            logprobs[i, j, c] = value
    with np.errstate(invalid="ignore", divide="ignore"):
        top = np.fmax.reduce(logprobs, axis=2, keepdims=True)
        normalised = logprobs - (top + np.log(np.nansum(np.exp(logprobs - top), axis=2, keepdims=True)))
    right = np.where(predictions < 0, np.nan, (predictions == np.asarray(reference)[None, :]).astype(float))
    if label_only:
        probabilities = np.where(
            predictions[:, :, None] < 0, np.nan, (predictions[:, :, None] == np.arange(width)).astype(float)
        )
        for k, share in shares.items():
            i, j = divmod(k, n_queries)
            probabilities[i, j] = [share.get(c, 0.0) for c in range(width)]
        # The share of right texts is an unbiased value; the logarithm of a share is not, nor is it finite.
        utility = np.take_along_axis(probabilities, np.asarray(reference)[None, :, None], axis=2)[:, :, 0]
    else:
        utility = np.take_along_axis(normalised, np.asarray(reference)[None, :, None], axis=2)[:, :, 0]
        own = np.arange(width)[None, None, :] < np.asarray(n_labels)[None, :, None]
        probabilities = np.where(own | (predictions[:, :, None] < 0), np.exp(normalised), 0.0)
    return Values(
        coalitions=matrix,
        utility=utility,
        performance=right,
        predictions=predictions,
        probabilities=probabilities,
        prompt_tokens=tokens,
        scale="accuracy" if label_only else "log-probability",
        missing=tuple(missing),
    )
