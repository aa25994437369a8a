"""What the model is asked, and how an answer is scored.

Two kinds. A :class:`LabelTask` chooses among given answers, a :class:`TextTask` scores a generated text.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import DataError, InputError
from .prompt import Demonstration, Query

__all__ = ["LabelTask", "Task", "TextTask", "exact_match", "similarity_to_full", "token_f1"]

Metric: TypeAlias = Callable[[str, Sequence[str]], float]
"""``metric(output, references) -> score`` in [0, 1]; higher is better."""

_BatchMetric: TypeAlias = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class LabelTask:
    """Choose one of several answers.

    Parameters
    ----------
    labels : tuple of str, optional
        The answers allowed for every query. ``None``: each query brings its own ``choices``
        (multiple choice).
    """

    labels: tuple[str, ...] | None = None
    kind: ClassVar[str] = "label"
    right_or_wrong: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(self.labels) < 2:
            raise InputError(f"labels: {list(self.labels)!r}; at least two are needed to choose from.")
        twice = sorted(k for k, n in Counter(self.labels).items() if n > 1)
        if twice:
            raise InputError(f"labels: {twice} given twice; each label once.")
        if any(not label.strip() for label in self.labels):
            raise InputError("labels: an empty label cannot be scored; give every label a text.")

    def answers(self, item: Query | Demonstration) -> tuple[str, ...]:
        """The answers allowed for a query or demonstration."""
        if self.labels is not None:
            return self.labels
        if item.choices is None or len(item.choices) < 2:
            raise DataError(
                f"{item.id!r}: no choices, and the task names no labels.",
                hint="Give the task labels, or every query at least two choices.",
            )
        return item.choices

    def validate(self, demonstrations: Iterable[Demonstration], queries: Iterable[Query]) -> None:
        """Check every reference and every shown answer against the allowed ones.

        Raises
        ------
        DataError
            Naming the row, the value and what is allowed.
        """
        for demo in demonstrations:
            self._check(f"demonstration {demo.id!r}", demo.output, self.answers(demo))
        for query in queries:
            self._check(f"query {query.id!r}", query.reference, self.answers(query))

    @staticmethod
    def _check(what: str, value: str, allowed: Sequence[str]) -> None:
        if value not in allowed:
            shown = ", ".join(repr(a) for a in allowed[:8]) + (", ..." if len(allowed) > 8 else "")
            raise DataError(
                f"{what}: the label {value!r} is not allowed; allowed: {shown}.",
                hint="Correct the row, or add the label to the task.",
            )


@dataclass(frozen=True)
class TextTask:
    """Generate a text at temperature 0 and score it against the accepted answers.

    Parameters
    ----------
    metric : {"exact_match", "token_f1", "embedding"} or callable
        A callable gets ``(output, references)`` and returns a score in [0, 1].
    max_tokens : int
        Cap on new tokens.
    stop : tuple of str
        The output is cut before the first of these.
    binary : bool
        Says that a metric of your own gives 0 or 1 only, so that the exact certificate applies; another score is an
        error then. The named metrics know it of themselves.

    Raises
    ------
    InputError
        When the metric is not known, the cap is below 1, or a stop string is empty.
    """

    metric: str | Metric = "exact_match"
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    binary: bool = False
    kind: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise InputError(
                f"stop: got the text {self.stop!r}; a sequence of texts is needed.",
                hint=f"Write ({self.stop!r},).",
            )
        object.__setattr__(self, "stop", tuple(self.stop))
        if "" in self.stop:
            raise InputError(f"stop: {self.stop!r} holds an empty text, which stands everywhere.")
        if isinstance(self.metric, str) and self.metric not in _METRICS:
            raise InputError(f"metric: got {self.metric!r}; allowed: {', '.join(_METRICS)}, or a callable.")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens: got {self.max_tokens}; at least 1.")
        if self.binary and self.metric in ("token_f1", "embedding"):
            raise InputError(f"binary: the metric {self.metric!r} also gives scores between 0 and 1.")

    @property
    def right_or_wrong(self) -> bool:
        """Whether every score is 0 or 1."""
        return self.metric == "exact_match" or self.binary

    @property
    def metric_name(self) -> str:
        """Name for reports."""
        return (
            self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "user metric")
        )

    def score(self, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Score each output against its accepted answers; every score in [0, 1], higher is better.

        Parameters
        ----------
        outputs : sequence of str, length n
        references : sequence of sequences of str, length n

        Raises
        ------
        InputError
            If a user metric returns something that is no number in [0, 1].
        """
        if isinstance(self.metric, str):
            return _METRICS[self.metric](outputs, references)
        return [self._checked(self.metric(o, r)) for o, r in zip(outputs, references, strict=True)]

    def validate(self, demonstrations: Iterable[Demonstration], queries: Iterable[Query]) -> None:
        """No accepted answer of a query may be empty.

        Raises
        ------
        DataError
            Naming the query.
        """
        del demonstrations
        for query in queries:
            if not all(answer.strip() for answer in (query.reference, *query.references)):
                raise DataError(
                    f"query {query.id!r}: an accepted answer is empty, which would make silence right.",
                    hint="Give the answer, or leave it out of references.",
                )

    def _checked(self, score: float) -> float:
        try:
            number = float(score)
        except (TypeError, ValueError) as error:
            raise InputError(f"metric: {self.metric_name} returned {score!r}, which is no number.") from error
        if not 0.0 <= number <= 1.0:
            raise InputError(f"metric: {self.metric_name} returned {number}; scores lie in [0, 1].")
        if self.binary and number not in (0.0, 1.0):
            raise InputError(
                f"metric: {self.metric_name} returned {number}; with binary=True it gives 0 or 1.",
                hint="Leave binary out.",
            )
        return number


Task: TypeAlias = LabelTask | TextTask


def similarity_to_full(
    outputs: Sequence[Sequence[str | None]],
    full_outputs: Sequence[str | None],
    *,
    metric: str | Metric = "embedding",
) -> NDArray[np.float64]:
    """What a model predicts on each coalition, as the similarity to its own output on the full prompt.

    Fidelity and screening judge generated text by this value, whatever the references say [PE 4.1.2].

    Parameters
    ----------
    outputs : sequence of sequences of str or None, shape (n_coalitions, n_queries)
        The model's texts; None is missing.
    full_outputs : sequence of str or None, length n_queries
        The same model's texts on the full prompt.
    metric : {"embedding", "exact_match", "token_f1"} or callable
        As for :class:`TextTask`; the text on the full prompt takes the place of the references.

    Returns
    -------
    ndarray of float64, shape (n_coalitions, n_queries)
        In [0, 1]; 1 where the output is that of the full prompt, NaN where either text is missing.

    Raises
    ------
    InputError
        When a row has another number of queries, or the metric breaks its rule.

    Examples
    --------
    >>> similarity_to_full([["Paris", None], ["Rome", "4"]], ["Paris", "4"], metric="exact_match").tolist()
    [[1.0, nan], [0.0, 1.0]]
    """
    odd = [row for row, texts in enumerate(outputs) if len(texts) != len(full_outputs)]
    if odd:
        raise InputError(
            f"outputs: row {odd[0]} has {len(outputs[odd[0]])} queries, full_outputs {len(full_outputs)}.",
            hint="Give one text, or None, a coalition and query.",
        )
    pairs = {
        (row, query): (text, full)
        for row, texts in enumerate(outputs)
        for query, (text, full) in enumerate(zip(texts, full_outputs, strict=True))
        if text is not None and full is not None
    }
    values = np.full((len(outputs), len(full_outputs)), np.nan)
    scores = TextTask(metric).score([text for text, _ in pairs.values()], [(f,) for _, f in pairs.values()])
    for place, score in zip(pairs, scores, strict=True):
        values[place] = score
    return values


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces: the normal form of SQuAD's answers [1]_.

    References
    ----------
    .. [1] Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016; evaluation
       script of version 1.1.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(output: str, references: Sequence[str]) -> float:
    """1.0 if the normalised output equals one normalised reference, else 0.0.

    Parameters
    ----------
    output : str
    references : sequence of str
        Accepted answers; without any the score is 0.

    Notes
    -----
    SQuAD's definition, its quirks included: the decimal point is punctuation, so that "1.5" equals "15"
    (give numeric answers a metric of their own), and accents, composed or not, are told apart.

    **Departure.** An answer of which nothing is left ("A", "the", "+") is compared as it is written in lower
    case. With SQuAD every such answer equals every other, and equals silence.

    Examples
    --------
    >>> exact_match("The Eiffel Tower.", ["Eiffel tower"]), exact_match("A", ["The"])
    (1.0, 0.0)
    """
    return float(any(_tokens(output) == _tokens(reference) for reference in references))


def token_f1(output: str, references: Sequence[str]) -> float:
    """Largest harmonic mean of token precision and recall over the references, in [0, 1].

    Parameters
    ----------
    output : str
    references : sequence of str
        Accepted answers; without any the score is 0.

    Notes
    -----
    SQuAD's definition on the tokens of the normal form, with the departure of :func:`exact_match`; a token
    counts as often as it stands in both. An empty output scores 0 against anything but an empty reference.

    Examples
    --------
    >>> round(token_f1("the big red dog", ["a red dog"]), 3)
    0.8
    """
    return max((_f1(_tokens(output), _tokens(reference)) for reference in references), default=0.0)


def _tokens(text: str) -> list[str]:
    return normalize_answer(text).split() or text.lower().split()


def _f1(output: list[str], reference: list[str]) -> float:
    if not output or not reference:
        return float(output == reference)
    common = sum((Counter(output) & Counter(reference)).values())
    return 2 * common / (len(output) + len(reference))


def _one_by_one(metric: Metric) -> _BatchMetric:
    def score(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        return [metric(o, r) for o, r in zip(outputs, references, strict=True)]

    return score


def _embedding(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    from .embedding import similarity_to_references

    return similarity_to_references(outputs, references)


_METRICS: dict[str, _BatchMetric] = {
    "exact_match": _one_by_one(exact_match),
    "token_f1": _one_by_one(token_f1),
    "embedding": _embedding,
}
