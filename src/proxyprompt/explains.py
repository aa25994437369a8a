"""Did this output happen because of what the explanation says? Conformal checks of new outputs.

An explanation of a prompt predicts what its coalitions do to the value of a query. A new query either behaves so, within
the error that other queries show, or it is an anomaly: an output that came about in another way, and worth a look
([ARC]: an explanation should tell whether one given output happened because of it). How often a query that is like the
others is called an anomaly is bounded exactly, by split conformal prediction, whatever the errors look like.

A surrogate that is exact on the coalitions it was fitted on (KernelSHAP reproduces ``v(full)``) has no error there to
learn from. So a query is never judged by its own surrogate: expectations come from some queries, the size of the error from
others.

[ARC]: Alignment Research Center, *Can we efficiently explain model behaviors?*
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .artifact import Artifact
from .attribution.base import Attribution, check_values, frozen
from .backends.base import Backend
from .coalitions import BoolArray, FloatArray, check_coalitions
from .errors import InconclusiveError, InputError
from .ledger import Ledger
from .metering import Meter
from .prompt import FewShotPrompt, Query
from .task import Task
from .value_function import PromptValueFunction

__all__ = ["OutputCheck", "OutputVerdict", "calibrate_check", "check_queries", "explains"]


@dataclass(frozen=True)
class OutputVerdict:
    """Whether one output is what the explanation predicts.

    Attributes
    ----------
    query : str
    verdict : {"explained", "anomaly"}
    p_value : float
        Share of calibration queries, this one included, that deviate at least as much; small is odd.
    level : float
        Largest chance of calling a query an anomaly that is like the others.
    score, threshold : float
        Deviation of this output, and the one above which it is an anomaly; in units of the usual error.
    expected, observed : tuple of float
        What was compared, by row of :attr:`OutputCheck.rows`: the value of the whole prompt, or, when there are further
        rows, how much each of those changes it (then the whole prompt's own entry is 0).
    """

    query: str
    verdict: str
    p_value: float
    level: float
    score: float
    threshold: float
    expected: tuple[float, ...]
    observed: tuple[float, ...]

    @property
    def explained(self) -> bool:
        """True unless it is an anomaly."""
        return self.verdict == "explained"


@dataclass(frozen=True, eq=False)
class OutputCheck:
    """A calibrated explanation, ready to be asked about new outputs; made by :func:`calibrate_check`.

    Attributes
    ----------
    rows : ndarray of bool, shape (n_rows, n_units)
        Coalitions to evaluate for a new query; the first is the whole prompt.
    expected, scale : ndarray of float64, shape (n_rows,)
        What the explanation predicts and the standard deviation of its errors, as in :class:`OutputVerdict`.
    scores : ndarray of float64, shape (n_calibration,)
        Deviations of the calibration queries, ascending.
    level : float
    """

    rows: BoolArray
    expected: FloatArray
    scale: FloatArray
    scores: FloatArray
    level: float

    def explains(self, query: str, output: ArrayLike) -> OutputVerdict:
        """Judge one output.

        Parameters
        ----------
        query : str
            Its id, for the record.
        output : array_like of float, shape (n_rows,) or scalar for one row
            Value of the new query on each of ``rows``, by the value function that was explained; e.g.
            ``PromptValueFunction(prompt, task, [query], meter)(check.rows)[:, 0]``.

        Returns
        -------
        OutputVerdict

        Raises
        ------
        InputError
            When there is not one value a row.
        InconclusiveError
            When a value is missing (NaN).

        Notes
        -----
        ``p = (1 + #{calibration scores at or above}) / (n + 1)``, and an anomaly is ``p <= level``. If the new query is
        exchangeable with the calibration queries, the chance of that is at most ``level``. Two queries that are checked
        share the calibration; over many queries the rate of alarms is near ``level`` on average only.
        """
        values = np.atleast_1d(np.asarray(output, dtype=np.float64))
        if values.shape != (len(self.rows),):
            raise InputError(
                f"output has shape {values.shape}: {len(self.rows)} values are needed, one a row of the check.",
                hint="Evaluate check.rows for this query.",
            )
        if np.isnan(values).any():
            raise InconclusiveError(
                f"Query {query!r}: a value is missing, so its output cannot be judged.", hint="Ask again."
            )
        observed = _compared(values[:, None])[:, 0]
        score = float(_scores(observed[:, None], self.expected, self.scale)[0])
        n = len(self.scores)
        p = (1 + int((self.scores >= score).sum())) / (n + 1)
        place = n - int(self.level * (n + 1) + 1e-9)
        return OutputVerdict(
            query=query,
            verdict="anomaly" if p <= self.level + 1e-12 else "explained",
            p_value=p,
            level=self.level,
            score=score,
            threshold=float(self.scores[place]) if place < n else float("inf"),
            expected=tuple(self.expected.tolist()),
            observed=tuple(observed.tolist()),
        )

    @classmethod
    def from_artifact(
        cls, artifact: Artifact, *, rng: np.random.Generator, level: float = 0.05, zero_shot: bool = True
    ) -> OutputCheck:
        """From a stored result: its queries' values with the whole prompt and with no demonstration.

        Parameters
        ----------
        artifact : Artifact
            Whose attributions are the target's own.
        rng, level
            As for :func:`calibrate_check`.
        zero_shot : bool
            Whether to compare what the demonstrations change (two calls a new query), rather than the value alone
            (one call).

        Raises
        ------
        InputError
            When a proxy explained: then the stored values are the proxy's; or too few queries are stored.
        """
        stored: Mapping[str, Any] = artifact.body["attribution"]
        if stored["role"] == "proxy":
            raise InputError(
                f"The artifact's explanation is by the proxy {stored['model']!r}; it holds no values of the target.",
                hint="Use calibrate_check with the target's values on a few coalitions.",
            )
        about = ("unit_ids", "query_ids", "role", "model", "why", "source")
        known = Attribution.__dataclass_fields__
        attribution = Attribution.from_dict(
            {k: v for k, v in stored.items() if k not in about and k in known}
        )
        ends = np.array([[True], [False]][: 1 + zero_shot]).repeat(attribution.n_units, axis=1)
        values = np.array([attribution.full_values, attribution.base_values][: 1 + zero_shot])
        return calibrate_check(attribution, ends, values, rng=rng, level=level)


def calibrate_check(
    attribution: Attribution,
    rows: ArrayLike,
    values: ArrayLike,
    *,
    rng: np.random.Generator,
    level: float = 0.05,
    others: bool = False,
) -> OutputCheck:
    """Learn, from queries at hand, how far outputs stray from what an explanation predicts.

    Parameters
    ----------
    attribution : Attribution
        The explanation; its additive surrogates, averaged over queries, predict.
    rows : array_like of bool, shape (n_rows, n_units)
        Coalitions that new queries will be asked: the whole prompt first. Alone, it compares the value of the output.
        With more (the empty prompt, or a few probes), it compares what leaving units out changes, and so
        whether the output depends on them as the explanation says.
    values : array_like of float, shape (n_rows, n_queries)
        The explained value function on these rows, for the queries of the attribution in its order; queries with a missing
        value (NaN) are left out. They need not be values that the attribution was fitted on.
    rng : numpy.random.Generator
        Splits the queries.
    level : float
        Wanted false-alarm rate.
    others : bool
        The values are of queries that the attribution was not fitted on: all of them calibrate, and none is spent on
        the expectation.

    Returns
    -------
    OutputCheck

    Raises
    ------
    InputError
        When shapes do not fit, the first row is not the whole prompt, or there are too few queries for the level: at
        least ``1 / level - 1`` calibrate, and 8 more make the expectation (5 of ``others``).

    Notes
    -----
    Split conformal prediction (Vovk et al. 2005; Lei et al. 2018). One part of the queries gives the expectation: the
    mean surrogate of these queries, plus its mean error on them, which takes the bias of an additive
    surrogate, and the standard deviation of the errors. The other part gives the scores, root mean squares of the
    standardised errors. Nothing of the second part enters the first, so a new query and the calibration queries are
    treated alike. With ``others`` the surrogate is that of all explained queries; bias and scale come from the
    first part of the values given.

    Examples
    --------
    >>> from proxyprompt.attribution import WeightedBanzhaf
    >>> rng = np.random.default_rng(0)
    >>> weights = np.array([2.0, -1.0, 0.5, 0.0]) + 0.1 * rng.normal(size=(60, 4))
    >>> game = lambda rows: rows @ weights.T
    >>> found = WeightedBanzhaf().attribute(game, 4, budget=16, rng=rng)
    >>> probes = np.array([[True] * 4, [False, True, True, True], [True, False, True, True]])
    >>> check = calibrate_check(found, probes, game(probes), rng=rng)
    >>> check.explains("usual", [1.5, -0.5, 2.5]).verdict, check.explains("ignores unit 0", [1.5, 1.5, 2.5]).verdict
    ('explained', 'anomaly')
    """
    matrix = check_coalitions(rows, "rows")
    if matrix.shape[1] != attribution.n_units or not len(matrix) or not matrix[0].all():
        raise InputError(
            f"rows has shape {matrix.shape}: the whole prompt of {attribution.n_units} units first, then others.",
            hint="Begin with a row of True.",
        )
    measured = check_values(values, len(matrix))
    if not others and measured.shape[1] != attribution.n_queries:
        raise InputError(
            f"values has {measured.shape[1]} queries, the attribution {attribution.n_queries}.",
            hint="Give the explained queries in their order, or others=True.",
        )
    if not 0 < level < 1:
        raise InputError(f"level={level}: strictly between 0 and 1.", hint="0.05 is usual.")
    complete = np.flatnonzero(~np.isnan(measured).any(axis=0))
    spare, needed = (5 if others else 8), ceil(1 / level - 1 - 1e-9)
    if len(complete) < needed + spare:
        raise InputError(
            f"values: {len(complete)} complete queries; a level of {level:g} needs {needed} to calibrate and {spare} more.",
            hint="Give more queries, or a larger level.",
        )
    order = rng.permutation(complete)
    n_learn = min(max(spare, len(order) // 2), len(order) - needed)
    learn, calibrate = order[:n_learn], order[n_learn:]
    observed = _compared(measured)
    used = slice(None) if others else learn
    slopes, constant = attribution.values[used].mean(axis=0), float(attribution.intercept[used].mean())
    predicted = _compared((constant + matrix @ slopes)[:, None])[:, 0]
    errors = observed[:, learn] - predicted[:, None]
    expected = predicted + errors.mean(axis=1)
    scale = errors.std(axis=1, ddof=1)
    scores = np.sort(_scores(observed[:, calibrate], expected, scale))
    return OutputCheck(frozen(matrix), frozen(expected), frozen(scale), frozen(scores), level)


def explains(
    artifact: Artifact, query: str, output: ArrayLike, *, level: float = 0.05, seed: int = 0
) -> OutputVerdict:
    """Is a new output what a stored explanation predicts, within its error, or an anomaly?

    Parameters
    ----------
    artifact : Artifact
        A stored result that the target explained itself.
    query : str
        Id of the new query, for the record.
    output : float or (float, float)
        The value of the new query with the whole prompt, as the artifact's attributions have it (log-probability of the
        reference label in nats, or the score of a text); with a second number, its value without demonstrations: then
        what the demonstrations change is judged.
    level : float
        Largest chance that a query like those explained is called an anomaly.
    seed : int
        Splits the stored queries; the same for all outputs that are judged by one check.

    Returns
    -------
    OutputVerdict

    Raises
    ------
    InputError
        When a proxy explained, too few queries are stored for the level, or ``output`` is not one or two numbers.
    InconclusiveError
        When a value is missing (NaN).

    Notes
    -----
    For many outputs, make the check once: :meth:`OutputCheck.from_artifact`. On the command line: ``proxyprompt explains``.
    """
    values = np.atleast_1d(np.asarray(output, dtype=np.float64))
    if values.shape not in ((1,), (2,)):
        raise InputError(
            f"output has shape {values.shape}: one value, or the values with the whole prompt and without any"
            " demonstration.",
            hint="Evaluate check.rows for this query.",
        )
    check = OutputCheck.from_artifact(
        artifact, rng=np.random.default_rng(seed), level=level, zero_shot=len(values) == 2
    )
    return check.explains(query, values)


def check_queries(
    artifact: str | os.PathLike[str],
    prompt: FewShotPrompt,
    task: Task,
    queries: Sequence[Query],
    target: Backend,
    ledger: Ledger,
    *,
    level: float = 0.05,
) -> tuple[OutputVerdict, ...]:
    """Ask the target for new queries, with all demonstrations and with none, and judge its outputs.

    Parameters
    ----------
    artifact : path
        Of a finished run, whose target explained itself.
    prompt : FewShotPrompt
        The original prompt of that run.
    task : Task
    queries : sequence of Query
        With references, as values are about them.
    target : Backend
    ledger : Ledger
        Where the calls are recorded.
    level : float
        False-alarm rate.

    Raises
    ------
    InputError
        When the artifact is about another prompt or target, or holds no values of the target.
    InconclusiveError
        When an answer is missing.
    """
    stored = Artifact.load(Path(artifact))
    if stored.body["target"] != target.name or stored.body["original_prompt"] != prompt.to_dict():
        raise InputError(
            f"{artifact}: the artifact is about another prompt, or another target ({stored.body['target']!r}) than"
            f" {target.name!r}.",
            hint="Use the configuration of the run that wrote it.",
        )
    task.validate(prompt.demonstrations, queries)
    check = OutputCheck.from_artifact(stored, rng=np.random.default_rng(0), level=level)
    meter = Meter(target, ledger, role="target", run="explains")
    values = PromptValueFunction(prompt, task, queries, meter, "explains").evaluate(check.rows)
    values.require_complete("the outputs to judge", share=0.0)
    return tuple(check.explains(q.id, values.utility[:, k]) for k, q in enumerate(queries))


def _compared(values: FloatArray) -> FloatArray:
    """The value itself where there is one row, else what the other rows change."""
    return values if len(values) == 1 else values - values[:1]


def _scores(observed: FloatArray, expected: FloatArray, scale: FloatArray) -> FloatArray:
    """Root mean square of standardised errors; a row without spread counts only where it is missed."""
    rows = slice(None) if len(expected) == 1 else slice(1, None)
    error = np.abs(observed[rows] - expected[rows, None])
    size = scale[rows, None]
    tiny = 1e-9 * (1 + np.abs(expected[rows, None]))
    standard = np.where(
        size > tiny, error / np.where(size > tiny, size, 1.0), np.where(error > tiny, 1e9, 0.0)
    )
    score: FloatArray = np.sqrt((standard**2).mean(axis=0))
    return score
