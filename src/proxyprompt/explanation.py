"""Explain single queries: which of a query's words, sentences or documents decide the model's answer.

Each query has units of its own (:mod:`proxyprompt.units`), so each gets an attribution of its own. The pipeline works on
demonstrations, which all queries share; it does not use this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from .attribution import Attribution, Design, Explainer
from .coalitions import BoolArray, FloatArray
from .errors import InconclusiveError, InputError
from .fidelity import label_fidelity, score_fidelity
from .metering import Meter
from .prompt import Query, Unit
from .task import Task, TextTask, similarity_to_full
from .units import QueryUnits
from .value_function import PromptValueFunction, Values, evaluate_together

__all__ = ["QueryExplanation", "explain_queries"]

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class QueryExplanation:
    """What the units of one query do to one model's answer.

    Attributes
    ----------
    query : Query
    units : tuple of Unit, length n_units
        What the attributions are about, in order.
    predicted : str or None
        The model's label for the whole query; None for a text task.
    prediction : Attribution
        Credit of each unit for what the model answers, right or wrong: for the probability of the predicted label,
        or for the similarity of a generated text to the one for the whole query, by the task's metric [PE 4.1.2].
    utility : Attribution
        Credit of each unit for the quality of the answer: the log-probability of the reference in nats, right or wrong
        for a model that only answers, or the score of a generated text.
    by_label : mapping of str to Attribution
        Credit for the probability of each label; empty for a text task.
    design : Design
        Coalitions the attributions were fitted on.
    held_out : ndarray of bool, shape (n_judge, n_units)
        Coalitions to judge surrogates on; none is in the design.
    values : Values
        What the model did on the rows of ``design`` and then of ``held_out``, for this one query.
    answers : ndarray of float64, shape (n_rows, n_labels)
        Probability of each label on the same rows; for a text task one column, the similarity that ``prediction`` is
        about. NaN: missing.
    explainer : Explainer
    """

    query: Query
    units: tuple[Unit, ...]
    predicted: str | None
    prediction: Attribution
    utility: Attribution
    by_label: Mapping[str, Attribution]
    design: Design = field(repr=False)
    held_out: BoolArray = field(repr=False)
    values: Values = field(repr=False)
    answers: FloatArray = field(repr=False)
    explainer: Explainer

    def fidelity_to(self, judged: QueryExplanation) -> float:
        """Fidelity of this explanation's surrogates to the model that ``judged`` explains [PE 4.2].

        Of a target's explanation to itself it is ``q_oracle``; of a proxy's to the target's, ``q_proxy``.

        Parameters
        ----------
        judged : QueryExplanation
            Of the same units, coalitions and held-out coalitions: made with an equal ``rng``.

        Returns
        -------
        float
            Labels: share of the held-out coalitions on which the surrogates' label is the model's. Text: share of
            them on which the similarity falls on the same side of the midpoint
            (:class:`~proxyprompt.fidelity.ScoreFidelity`). NaN where nothing can be compared.

        Raises
        ------
        InputError
            If the two explanations are not of the same coalitions, or nothing was held out.
        """
        same = (
            self.query == judged.query
            and list(self.by_label) == list(judged.by_label)
            and np.array_equal(self.design.coalitions, judged.design.coalitions)
            and np.array_equal(self.held_out, judged.held_out)
        )
        if not same:
            raise InputError(
                f"judged: explains query {judged.query.id!r} in another way than this one does {self.query.id!r}.",
                hint="Explain both models with the same units, task, budget and judge, and generators of equal seed.",
            )
        if not len(self.held_out):
            raise InputError(
                "judged: no coalition was held out to judge on.", hint="Pass judge to explain_queries."
            )
        m, design = self.design.n_coalitions, self.design
        fitted, theirs = self.answers[:m], judged.answers
        if self.by_label:
            labels = judged.values.predictions[m:]
            return float(
                label_fidelity(design, fitted[:, None], self.held_out, labels, explainer=self.explainer)[0]
            )
        result = score_fidelity(
            design,
            fitted,
            self.held_out,
            theirs[m:],
            judged_base=theirs[design.empty_row],
            judged_full=theirs[design.full_row],
            explainer=self.explainer,
        )
        return float(result.side_agreement[0])


def explain_queries(
    units: Sequence[QueryUnits],
    task: Task,
    meter: Meter,
    *,
    explainer: Explainer,
    budget: int,
    rng: np.random.Generator,
    judge: int = 0,
    stage: str = "explain",
    progress: Progress | None = None,
) -> tuple[QueryExplanation, ...]:
    """Explain queries one by one, with all calls in one batch.

    Parameters
    ----------
    units : sequence of QueryUnits, length n_queries
        Each query with its units, e.g. ``[QueryWords(prompt, query) for query in queries]``.
    task : LabelTask or TextTask
    meter : Meter
        The model, with its ledger.
    explainer : Explainer
    budget : int
        Largest number of coalitions per query that surrogates are fitted on.
    rng : numpy.random.Generator
        The only source of chance. Two models explained with generators of equal seed see equal coalitions.
    judge : int
        Coalitions per query that are evaluated too but held out of every fit, for
        :meth:`QueryExplanation.fidelity_to`.
    stage : str
        Name under which calls are recorded.
    progress : callable, optional
        ``progress(done, total)`` over model calls.

    Returns
    -------
    tuple of QueryExplanation
        In the order of ``units``.

    Raises
    ------
    InputError
        Naming the query, if the budget is too small for its units, or fewer than ``judge`` coalitions are left.
    InconclusiveError
        Naming the queries, if too many of their values are missing. What was answered is in the ledger.

    Examples
    --------
    >>> from proxyprompt.attribution import KernelSHAP
    >>> from proxyprompt.backends.scripted import ScriptedBackend
    >>> from proxyprompt.prompt import FewShotPrompt
    >>> from proxyprompt.task import LabelTask
    >>> from proxyprompt.units import QueryWords
    >>> model = ScriptedBackend(lambda r: [-0.1, -2.4] if "awful" in r.prompt else [-1.6, -0.2])
    >>> prompt = FewShotPrompt((), "", "Review: {input}\\nMood: {output}")
    >>> query = Query("q", {"input": "an awful little film"}, "bad")
    >>> (found,) = explain_queries([QueryWords(prompt, query)], LabelTask(("bad", "good")),
    ...     Meter(model, None, role="target", run="r"), explainer=KernelSHAP(), budget=16,
    ...     rng=np.random.default_rng(0))
    >>> found.predicted, {unit.text: round(v, 2) for unit, v in zip(found.units, found.prediction.mean.tolist())}
    ('bad', {'an': 0.0, 'awful': 0.71, 'little': 0.0, 'film': 0.0})
    """
    if judge < 0:
        raise InputError(f"judge: got {judge}; 0 or more coalitions.")
    drawn = [_draw(own, explainer, budget, judge, rng) for own in units]
    values = evaluate_together(
        [PromptValueFunction(own, task, (own.query,), meter, stage, progress) for own in units],
        [np.vstack([design.coalitions, held_out]) for design, held_out in drawn],
    )
    found: list[QueryExplanation] = []
    failed: dict[str, str] = {}
    for own, (design, held_out), seen in zip(units, drawn, values, strict=True):
        try:
            found.append(_fit(own, task, explainer, design, held_out, seen))
        except InconclusiveError as error:
            failed[own.query.id] = seen.missing[0][2] if seen.missing else error.message
    if failed:
        name, why = next(iter(failed.items()))
        raise InconclusiveError(
            f"{len(failed)} of {len(units)} queries lack too many values: {', '.join(map(repr, failed))};"
            f" for {name!r}: {why}.",
            hint="Run again, which asks only for what is missing, or leave these queries out.",
        )
    return tuple(found)


def _draw(
    units: QueryUnits, explainer: Explainer, budget: int, judge: int, rng: np.random.Generator
) -> tuple[Design, BoolArray]:
    n = units.n_units
    try:
        design = explainer.design(n, budget, rng=rng)
        none: BoolArray = np.zeros((0, n), dtype=np.bool_)
        return design, explainer.held_out(n, judge, rng=rng, exclude=design.coalitions) if judge else none
    except InputError as error:
        raise InputError(
            f"query {units.query.id!r} with {n} units: {error.message}", hint=error.hint
        ) from error


def _fit(
    units: QueryUnits, task: Task, explainer: Explainer, design: Design, held_out: BoolArray, values: Values
) -> QueryExplanation:
    m = design.n_coalitions
    by_label: dict[str, Attribution] = {}
    predicted = None
    if isinstance(task, TextTask):
        answers = similarity_to_full(values.outputs, values.outputs[design.full_row], metric=task.metric)
        prediction = explainer.fit(design, answers[:m])
    else:
        labels = task.answers(units.query)
        answers = _probabilities(values)
        by_label = {label: explainer.fit(design, answers[:m, [i]]) for i, label in enumerate(labels)}
        predicted = labels[int(values.predictions[design.full_row, 0])]
        prediction = by_label[predicted]
    return QueryExplanation(
        query=units.query,
        units=units.units,
        predicted=predicted,
        prediction=prediction,
        utility=explainer.fit(design, values.utility[:m]),
        by_label=by_label,
        design=design,
        held_out=held_out,
        values=values,
        answers=answers,
        explainer=explainer,
    )


def _probabilities(values: Values) -> FloatArray:
    assert values.probabilities is not None, "a label task has them"
    return values.probabilities[:, 0]
