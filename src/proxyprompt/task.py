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

from .errors import DataError, InputError
from .prompt import Demonstration, Query

__all__ = ["LabelTask", "Task", "TextTask", "exact_match", "token_f1"]

Metric: TypeAlias = Callable[[str, Sequence[str]], float]
"""``metric(output, references) -> score`` in [0, 1]; higher is better."""

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
    """

    metric: str | Metric = "exact_match"
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    kind: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        if isinstance(self.metric, str) and self.metric not in ("exact_match", "token_f1", "embedding"):
            raise InputError(
                f"metric: got {self.metric!r}; allowed: exact_match, token_f1, embedding, or a callable."
            )
        if self.max_tokens < 1:
            raise InputError(f"max_tokens: got {self.max_tokens}; at least 1.")

    @property
    def right_or_wrong(self) -> bool:
        """Whether every score is 0 or 1."""
        return self.metric == "exact_match"

    @property
    def metric_name(self) -> str:
        """Name for reports."""
        return (
            self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "user metric")
        )

    def score(self, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Score each output against its accepted answers; every score in [0, 1], higher is better.

        Raises
        ------
        InputError
            If a user metric returns something outside [0, 1].
        """
        if self.metric == "embedding":
            from .embedding import similarity_to_references

            return similarity_to_references(outputs, references)
        functions: dict[str, Metric] = {"exact_match": exact_match, "token_f1": token_f1}
        metric = functions[self.metric] if isinstance(self.metric, str) else self.metric
        scores = [float(metric(o, r)) for o, r in zip(outputs, references, strict=True)]
        for score in scores:
            if not 0.0 <= score <= 1.0:
                raise InputError(f"metric: {self.metric_name} returned {score}; scores lie in [0, 1].")
        return scores

    def validate(self, demonstrations: Iterable[Demonstration], queries: Iterable[Query]) -> None:
        """Every query needs a reference that is not empty."""
        del demonstrations
        for query in queries:
            if not query.reference.strip() and not any(r.strip() for r in query.references):
                raise DataError(
                    f"query {query.id!r}: the reference is empty; a text task needs an answer to score against."
                )


Task: TypeAlias = LabelTask | TextTask


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: the usual normal form of short answers (SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _tokens(text: str) -> list[str]:
    # The multiple-choice answer "A" is an article too; it must not vanish.
    return normalize_answer(text).split() or text.lower().split()


def exact_match(output: str, references: Sequence[str]) -> float:
    """1.0 if the normalised output equals one normalised reference, else 0.0."""
    return float(any(_tokens(output) == _tokens(reference) for reference in references))


def token_f1(output: str, references: Sequence[str]) -> float:
    """Largest harmonic mean of token precision and recall over the references, in [0, 1]."""
    return max((_f1(_tokens(output), _tokens(reference)) for reference in references), default=0.0)


def _f1(output: list[str], reference: list[str]) -> float:
    common = sum((Counter(output) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(output), common / len(reference)
    return 2 * precision * recall / (precision + recall)
