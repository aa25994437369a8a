"""What the target itself answers to a demonstration's input: doubts before cleaning, proposals after it.

A label that the target contradicts is not yet wrong: the target errs too. So a contradiction alone removes nothing and
changes nothing. Before cleaning it widens the list of suspects; after cleaning it can make a *proposal* to relabel, if
the target contradicts the label more strongly than it contradicts the references of labelled queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxyprompt.errors import DataError, InputError
from proxyprompt.prompt import FewShotPrompt, Query
from proxyprompt.task import LabelTask, Task
from proxyprompt.value_function import Values

__all__ = ["Proposal", "Relabeling", "contradiction", "own_queries", "propose_relabels", "zero_shot_doubts"]

Ask: TypeAlias = Callable[[Sequence[Query], NDArray[np.bool_]], Values]
"""Ask the target for coalitions of the whole prompt, on the queries given."""

_FOLDS = 8
_FLOOR = 1e-12


@dataclass(frozen=True)
class Proposal:
    """The target contradicts one label.

    Attributes
    ----------
    unit : int
    label : str
        As the demonstration has it.
    answer : str
        What the target answers, the demonstration being out of the prompt.
    probability : float
        The target's, of ``answer`` among the allowed labels.
    p_value : float
        Share of labelled queries whose right answer the target contradicts at least as strongly,
        ``(1 + number) / (1 + n)``.
    """

    unit: int
    label: str
    answer: str
    probability: float
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "label": self.label,
            "answer": self.answer,
            "probability": self.probability,
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class Relabeling:
    """Labels that the target contradicts, for a person to look at; nothing is changed.

    Attributes
    ----------
    proposals : tuple of Proposal
        In the prompt's order.
    level : float
        Share of the proposals that is expected to be wrong, at most (false discovery rate).
    n_queries : int
        Labelled queries that calibrated.
    contradicted : int
        Demonstrations that the target gives another label, proposed or not.
    agreement : float
        Share of the labelled queries that the target answers right.
    """

    proposals: tuple[Proposal, ...]
    level: float
    n_queries: int
    contradicted: int
    agreement: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form, proposals by index of the demonstration."""
        return {
            "level": self.level,
            "n_queries": self.n_queries,
            "contradicted": self.contradicted,
            "agreement": self.agreement,
            "proposals": [{"unit": p.unit, **p.to_dict()} for p in self.proposals],
        }


def own_queries(prompt: FewShotPrompt, task: Task) -> tuple[Query, ...] | None:
    """Each demonstration's input as a query whose reference is its own label.

    Returns
    -------
    tuple of Query, or None
        ``None`` where that cannot be asked: a text task, or a query template with fields that
        demonstrations do not have.
    """
    if not isinstance(task, LabelTask):
        return None
    queries = tuple(Query(f"own:{d.id}", d.inputs, d.output, d.choices) for d in prompt.demonstrations)
    try:
        for query in queries:
            prompt.render([False] * prompt.n_units, query)
    except DataError:
        return None
    return queries


def zero_shot_doubts(queries: Sequence[Query], ask: Ask) -> tuple[int, ...]:
    """Units whose label the target contradicts when it sees no demonstration at all.

    Parameters
    ----------
    queries : sequence of Query
        From :func:`own_queries`; one short call each.
    ask : callable

    Returns
    -------
    tuple of int
        A missing answer doubts nothing.
    """
    values = ask(queries, np.zeros((1, len(queries)), dtype=np.bool_))
    return tuple(int(i) for i in np.flatnonzero(values.performance[0] == 0.0))


def contradiction(probabilities: NDArray[np.float64], reference: NDArray[np.int64]) -> NDArray[np.float64]:
    """How strongly a model contradicts a label: log odds of its best other label against it.

    Parameters
    ----------
    probabilities : float (n, n_labels)
    reference : int (n,)

    Returns
    -------
    float (n,)
        Above 0: another label is more probable. NaN where the answer is missing.
    """
    rows = np.arange(len(probabilities))
    own = probabilities[rows, reference]
    others = probabilities.copy()
    others[rows, reference] = -1.0
    with np.errstate(invalid="ignore"):
        out: NDArray[np.float64] = np.log(np.maximum(others.max(axis=1), _FLOOR) / np.maximum(own, _FLOOR))
    out[np.isnan(probabilities).all(axis=1)] = np.nan
    return out


def propose_relabels(
    prompt: FewShotPrompt,
    task: LabelTask,
    queries: Sequence[Query],
    kept: NDArray[np.bool_],
    ask: Ask,
    *,
    rng: np.random.Generator,
    level: float = 0.2,
) -> Relabeling:
    """Labels that the target contradicts more strongly than it contradicts right ones.

    Parameters
    ----------
    prompt : FewShotPrompt
    task : LabelTask
    queries : sequence of Query
        Labelled queries that say how often, and how strongly, the target contradicts a right label.
    kept : bool (n_units,)
        The cleaned prompt, which answers.
    ask : callable
    rng : numpy.random.Generator
        Deals the queries to the prompts.
    level : float
        Share of the proposals that may be expected to be wrong.

    Returns
    -------
    Relabeling

    Raises
    ------
    InputError
        When ``level`` is out of range, or demonstrations cannot be asked (see :func:`own_queries`).

    Notes
    -----
    Demonstrations are asked in up to eight interleaved groups, each with a prompt that lacks its own group, so that no
    demonstration is asked while the prompt shows its label; those that are not kept are asked with the cleaned prompt.
    Each query is asked with the prompt of a random demonstration that has its label: a prompt that lacks one of a label
    leans against that label, and a query must meet the same. The p value is conformal [1]_: for a demonstration whose
    label is right and that is drawn like the queries of its label, its rank among them is uniform; it is 1 where the
    target does not contradict. Benjamini and Hochberg's procedure at ``level`` over all demonstrations makes the proposals.
    A target that is poor at the task contradicts many references strongly, so that no demonstration stands out
    and none is proposed. With ``q`` queries and ``n`` demonstrations a single proposal needs ``q >= n / level - 1``.
    A model that gives no probabilities contradicts all wrong answers equally; it proposes only where nearly all
    its answers are right.

    References
    ----------
    .. [1] Bates, Candes, Lei, Romano & Sesia (2023), "Testing for outliers with conformal p-values", Annals of
       Statistics 51, 149-178.
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"level: got {level!r}; it lies in (0, 1).")
    own = own_queries(prompt, task)
    if own is None:
        raise InputError("prompt: its demonstrations cannot be asked as queries.")
    n, answers = prompt.n_units, [task.answers(q).index(q.reference) for q in (*own, *queries)]
    strength = np.full(n + len(queries), np.nan)
    best, sure = np.full(n, -1), np.full(n, np.nan)
    groups = [np.flatnonzero(~kept), *(np.flatnonzero(kept)[g::_FOLDS] for g in range(_FOLDS))]
    place = _deal([q.reference for q in own], [q.reference for q in queries], rng)
    for group in groups:
        if not len(group):
            continue
        row = kept.copy()
        row[group] = False
        asked = np.r_[group, n + np.flatnonzero(np.isin(place, group))]
        values = ask([own[i] if i < n else queries[i - n] for i in asked], row[None, :])
        assert values.probabilities is not None
        p = values.probabilities[0]
        strength[asked] = contradiction(p, np.array([answers[i] for i in asked]))
        best[group] = values.predictions[0, : len(group)]
        sure[group] = np.nan_to_num(p[: len(group)], nan=-1.0).max(axis=1)
    calibrating = strength[n:][~np.isnan(strength[n:])]
    strength = strength[:n]
    above = (calibrating[None, :] >= strength[:, None]).sum(axis=1)
    contradicted = strength > 0
    ranks = np.where(contradicted, (1 + above) / (1 + len(calibrating)), 1.0)
    proposed = np.flatnonzero(_benjamini_hochberg(ranks, level))
    return Relabeling(
        proposals=tuple(
            Proposal(
                int(i), own[i].reference, task.answers(own[i])[int(best[i])], float(sure[i]), float(ranks[i])
            )
            for i in proposed
        ),
        level=level,
        n_queries=len(calibrating),
        contradicted=int(contradicted.sum()),
        agreement=float((calibrating <= 0).mean()) if len(calibrating) else float("nan"),
    )


def _deal(shown: Sequence[str], wanted: Sequence[str], rng: np.random.Generator) -> NDArray[np.int64]:
    """For each query a random demonstration with its label, or any where there is none."""
    labels = np.array(shown, dtype=object)
    same = [np.flatnonzero(labels == answer) for answer in wanted]
    return np.array([rng.choice(own if len(own) else len(labels)) for own in same], dtype=np.int64)


def _benjamini_hochberg(p: NDArray[np.float64], level: float) -> NDArray[np.bool_]:
    order = np.argsort(p, kind="stable")
    good = np.flatnonzero(p[order] <= level * np.arange(1, len(p) + 1) / len(p))
    out = np.zeros(len(p), dtype=np.bool_)
    if len(good):
        out[order[: good[-1] + 1]] = True
    return out
