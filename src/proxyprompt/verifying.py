"""Which unit of a query decides: proxies propose, the target measures, and stops when the next is not worth a call.

The user's side of :mod:`proxyprompt.attribution.verified`: real prompts, real models, all queries in step, so that every
round is one batch. What the target measured and what proxies estimated stay apart in every result.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .attribution import Explainer
from .attribution.verified import (
    StoppingRule,
    Verification,
    calibrate_stopping,
    noise_floor,
    propose,
)
from .coalitions import FloatArray
from .errors import InconclusiveError, InputError
from .explanation import QueryExplanation, explain_queries
from .metering import Meter
from .prompt import Query, Unit
from .task import Task, TextTask, similarity_to_full
from .units import QueryUnits
from .value_function import PromptValueFunction, Values, evaluate_together

__all__ = ["QueryVerification", "VerifiedQueries", "verify_queries"]


@dataclass(frozen=True, eq=False)
class QueryVerification:
    """One query: what proxies estimated, and what the target was asked and said.

    Attributes
    ----------
    query : Query
    units : tuple of Unit
    predicted : str or None
        The target's label for the whole query; None for a text task.
    agree : bool
        Whether the proxies (by their mean) predict the same.
    result : Verification
        ``estimated`` in the proxies' standardised scale, ``measured`` in the target's: what leaving the unit out takes
        from the probability of ``predicted``, or from the similarity to the whole query's text.
    taught : bool
        Whether this query was measured in full to learn when to stop.
    """

    query: Query
    units: tuple[Unit, ...]
    predicted: str | None
    agree: bool
    result: Verification
    taught: bool

    @property
    def best(self) -> Unit | None:
        """The unit with the largest measured effect; ``None`` where none passes the noise floor, or on abstention."""
        return None if self.result.best is None else self.units[self.result.best]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; ``measured`` is None where nothing was measured."""
        return {
            "query": self.query.id,
            "units": [{"kind": u.kind, "id": u.id, "text": u.text} for u in self.units],
            "predicted": self.predicted,
            "agree": self.agree,
            "taught": self.taught,
            **self.result.to_dict(),
        }


@dataclass(frozen=True, eq=False)
class VerifiedQueries:
    """All queries, the rule that said when to stop, and what it cost.

    Attributes
    ----------
    queries : tuple of QueryVerification
    rule : StoppingRule or None
        ``None`` when a fixed number of units was measured.
    floor : float
        Effects up to this size are noise, from the repeats of the whole queries.
    target_calls : int
        Repeats and taught queries included.
    """

    queries: tuple[QueryVerification, ...]
    rule: StoppingRule | None
    floor: float
    target_calls: int

    @property
    def oracle_calls(self) -> int:
        """Calls that measuring every unit of every query takes."""
        return sum(q.result.oracle_calls for q in self.queries)

    @property
    def oracle_share(self) -> float:
        """Target calls as a share of the oracle's."""
        return self.target_calls / self.oracle_calls

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "queries": [q.to_dict() for q in self.queries],
            "rule": self.rule.to_dict() if self.rule else None,
            "floor": self.floor,
            "target_calls": self.target_calls,
            "oracle_calls": self.oracle_calls,
        }


def verify_queries(
    units: Sequence[QueryUnits],
    task: Task,
    target: Meter,
    proxies: Sequence[Meter],
    *,
    explainer: Explainer,
    budget: int,
    rng: np.random.Generator,
    learn: int = 0,
    precision: float = 0.9,
    level: float = 0.1,
    top: int = 2,
    on_disagreement: Literal["measure_all", "follow", "abstain"] = "measure_all",
    repeats: int = 1,
    stage: str = "verify",
) -> VerifiedQueries:
    """Find the unit that decides each query, with few calls of the target.

    Parameters
    ----------
    units : sequence of QueryUnits
        Each query with its units, e.g. ``[QuerySentences(prompt, query) for query in queries]``.
    task : LabelTask or TextTask
    target, proxies : Meter
        Several proxies propose together, by the mean of their standardised attributions.
    explainer : Explainer
        How proxies are explained, e.g. ``LeaveOneOut()``.
    budget : int
        Coalitions per query and proxy.
    rng : numpy.random.Generator
        The only source of chance.
    learn : int
        So many queries, drawn at random, are measured in full, and teach when the others may stop
        (:func:`~proxyprompt.attribution.verified.calibrate_stopping`, at ``precision`` and ``level``); 22 are the least
        that can teach anything at the defaults. 0: the ``top`` strongest units of each query are measured.
    top : int
        Units measured when nothing is learnt.
    on_disagreement : {"measure_all", "follow", "abstain"}
        What happens where proxies and target predict differently.
    repeats : int
        How often the whole query is asked of the target again, to see its noise; 0 takes it as exact.
    stage : str
        Name under which calls are recorded.

    Returns
    -------
    VerifiedQueries

    Raises
    ------
    InputError
        Without proxies, or when ``learn`` or ``repeats`` is out of range.
    InconclusiveError
        When the target gave no answer for a whole query, or a proxy too few.

    Notes
    -----
    The rule is learnt on queries that are treated as it will treat the others: on all of them with ``"follow"``, else on
    those where the models agree.
    """
    _check(units, proxies, learn, repeats)
    seed = int(rng.integers(2**63))
    explained = [
        explain_queries(
            units,
            task,
            proxy,
            explainer=explainer,
            budget=budget,
            rng=np.random.default_rng(seed),
            stage=stage,
        )
        for proxy in proxies
    ]
    asked = _Target(units, task, target, stage)
    floor = asked.noise(repeats)
    labels = [asked.predicted(k) for k in range(len(units))]
    guesses = _proposals(explained, labels)
    agree = [_same(task, [e[k] for e in explained], asked.whole[k], labels[k]) for k in range(len(units))]
    teachers = set(rng.permutation(len(units))[:learn].tolist())
    found: dict[int, Verification] = {}
    if teachers:
        everything = {k: propose(guesses[k], top=len(guesses[k]), floor=floor) for k in teachers}
        found |= asked.drive(everything)
    rule = None
    if learn:
        used = [k for k in sorted(teachers) if agree[k] or on_disagreement == "follow"]
        rule = calibrate_stopping(
            [guesses[k] for k in used], [found[k].measured for k in used], precision=precision, level=level
        )
    others = {
        k: propose(
            guesses[k], agree=agree[k], top=top, on_disagreement=on_disagreement, stop=rule, floor=floor
        )
        for k in range(len(units))
        if k not in teachers
    }
    found |= asked.drive(others)
    results = tuple(
        QueryVerification(own.query, own.units, labels[k], agree[k], found[k], k in teachers)
        for k, own in enumerate(units)
    )
    calls = sum(r.result.target_calls for r in results) + repeats * len(units)
    return VerifiedQueries(results, rule, floor, calls)


class _Target:
    """The target's answers to whole queries, and the effects of leaving units out."""

    def __init__(self, units: Sequence[QueryUnits], task: Task, meter: Meter, stage: str) -> None:
        self.units, self.task, self.meter, self.stage = units, task, meter, stage
        everything = [np.ones((1, own.n_units), dtype=np.bool_) for own in units]
        self.whole = self._evaluate(range(len(units)), everything)
        silent = [own.query.id for own, v in zip(units, self.whole, strict=True) if np.isnan(v.utility).any()]
        if silent:
            raise InconclusiveError(
                f"The target gave no answer for {len(silent)} of {len(units)} queries: {', '.join(map(repr, silent))}.",
                hint="Run again, which asks only for what is missing, or leave these queries out.",
            )

    def _evaluate(
        self, which: Sequence[int], rows: Sequence[NDArray[np.bool_]], repeat: int = 0
    ) -> list[Values]:
        return evaluate_together(
            [
                PromptValueFunction(
                    self.units[k], self.task, (self.units[k].query,), self.meter, self.stage, repeat=repeat
                )
                for k in which
            ],
            list(rows),
        )

    def predicted(self, k: int) -> str | None:
        if isinstance(self.task, TextTask):
            return None
        return self.task.answers(self.units[k].query)[int(self.whole[k].predictions[0, 0])]

    def _value(self, k: int, values: Values) -> FloatArray:
        """Probability of what the target said of the whole query; for texts, similarity to that text."""
        if isinstance(self.task, TextTask):
            return similarity_to_full(values.outputs, self.whole[k].outputs[0], metric=self.task.metric)[:, 0]
        assert values.probabilities is not None
        found: FloatArray = values.probabilities[:, 0, int(self.whole[k].predictions[0, 0])]
        return found

    def noise(self, repeats: int) -> float:
        if not repeats:
            return 0.0
        rows = [np.ones((1, own.n_units), dtype=np.bool_) for own in self.units]
        every = [
            self.whole,
            *(self._evaluate(range(len(self.units)), rows, r) for r in range(1, repeats + 1)),
        ]
        return noise_floor([[self._value(k, v)[0] for k, v in enumerate(values)] for values in every])

    def drive(
        self, steps: dict[int, Generator[tuple[int, ...], ArrayLike | None, Verification]]
    ) -> dict[int, Verification]:
        """Run all queries in step: each round asks the next units of every query that is not done, in one batch."""
        found: dict[int, Verification] = {}
        answers: dict[int, FloatArray | None] = dict.fromkeys(steps)
        while answers:
            wanted: dict[int, tuple[int, ...]] = {}
            for k, answer in answers.items():
                try:
                    wanted[k] = steps[k].send(answer)
                except StopIteration as end:
                    found[k] = end.value
            rows = [
                ~np.eye(self.units[k].n_units, dtype=np.bool_)[list(which)] for k, which in wanted.items()
            ]
            values = self._evaluate(list(wanted), rows)
            answers = {
                k: self._value(k, self.whole[k])[0] - self._value(k, v)
                for k, v in zip(wanted, values, strict=True)
            }
        return found


def _proposals(
    explained: Sequence[Sequence[QueryExplanation]], labels: Sequence[str | None]
) -> list[FloatArray]:
    """Per query, the mean over proxies of attributions in units of each proxy's typical size."""
    by_proxy = []
    for of_proxy in explained:
        values = [
            (e.prediction if label is None else e.by_label[label]).mean
            for e, label in zip(of_proxy, labels, strict=True)
        ]
        size = float(np.sqrt(np.mean(np.concatenate(values) ** 2)))
        by_proxy.append([v / size if size > 0 else v for v in values])
    return [np.mean(of_query, axis=0) for of_query in zip(*by_proxy, strict=True)]


def _same(task: Task, by_proxy: Sequence[QueryExplanation], whole: Values, label: str | None) -> bool:
    """Whether the proxies' mean predicts what the target does: its label, or right where it is right."""
    if label is None:
        scores = [float(e.values.performance[e.design.full_row, 0]) for e in by_proxy]
        return bool(abs(np.mean(scores) - float(whole.performance[0, 0])) < 0.5)
    assert not isinstance(task, TextTask)
    names = task.answers(by_proxy[0].query)
    mean = np.mean([e.answers[e.design.full_row] for e in by_proxy], axis=0)
    return bool(np.isfinite(mean).all() and names[int(mean.argmax())] == label)


def _check(units: Sequence[QueryUnits], proxies: Sequence[Meter], learn: int, repeats: int) -> None:
    if not proxies:
        raise InputError("proxies: none given; without one nothing is proposed.", hint="Use explain_queries.")
    if not units:
        raise InputError("units: none given.", hint="Pass each query with its units.")
    if not 0 <= learn <= len(units):
        raise InputError(
            f"learn={learn}: from 0 to the {len(units)} queries.", hint="22 are the least that teach."
        )
    if repeats < 0:
        raise InputError(f"repeats={repeats}: 0 or more.", hint="1 is usual for a remote target.")
