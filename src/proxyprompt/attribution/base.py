"""What every estimator takes and returns: Design in, Attribution out.

An explanation technique has three steps, kept apart: ``design`` chooses coalitions, somebody evaluates
them, ``fit`` turns the values into an attribution. This module holds the two shapes that pass between
them, the abstract class that joins them, and the rules for missing values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxyprompt.coalitions import (
    BoolArray,
    FloatArray,
    check_coalitions,
    check_n_units,
    uniform_coalitions,
)
from proxyprompt.errors import ArtifactError, InconclusiveError, InputError

__all__ = ["Attribution", "Design", "Explainer", "ValueArrayFunction"]

ValueArrayFunction = Callable[[BoolArray], ArrayLike]
"""Boolean (n_coalitions, n_units) to float (n_coalitions, n_queries); NaN is missing."""


@dataclass(frozen=True, eq=False)
class Design:
    """Coalitions to evaluate, and what a regression needs to know about them.

    Parameters
    ----------
    coalitions : ndarray of bool, shape (n_coalitions, n_units)
        Must hold the empty and the full coalition.
    weights : ndarray of float64, shape (n_coalitions,)
        Non-negative regression weights; their meaning is the explainer's. Rows of weight 0 are not
        regressed on.
    exact : bool
        True when the fit has no error from the choice of coalitions.

    Raises
    ------
    InputError
        When a shape or dtype is wrong, or the empty or the full coalition is absent.
    """

    coalitions: BoolArray
    weights: FloatArray
    exact: bool

    def __post_init__(self) -> None:
        coalitions = check_coalitions(self.coalitions)
        weights = np.asarray(self.weights, dtype=np.float64)
        if weights.shape != (len(coalitions),) or not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise InputError(
                f"weights of shape {weights.shape} for {len(coalitions)} coalitions: one finite, "
                "non-negative weight a coalition is needed.",
                hint="Use the design as its explainer made it.",
            )
        if coalitions.any(axis=1).all() or not coalitions.all(axis=1).any():
            raise InputError(
                "coalitions lack the empty or the full coalition; both are always evaluated.",
                hint="Add a row of False and a row of True.",
            )
        object.__setattr__(self, "coalitions", frozen(coalitions))
        object.__setattr__(self, "weights", frozen(weights))

    @property
    def n_coalitions(self) -> int:
        """Number of rows, which is the number of values a query costs."""
        return len(self.coalitions)

    @property
    def n_units(self) -> int:
        """Number of units."""
        return int(self.coalitions.shape[1])

    @property
    def empty_row(self) -> int:
        """Index of the row that keeps nothing."""
        return int(np.argmin(self.coalitions.any(axis=1)))

    @property
    def full_row(self) -> int:
        """Index of the row that keeps everything."""
        return int(np.argmax(self.coalitions.all(axis=1)))


@dataclass(frozen=True, eq=False)
class Attribution:
    """Signed credit per unit, with its standard errors and the per-query matrix behind it.

    Parameters
    ----------
    values : ndarray of float64, shape (n_queries, n_units)
        Credit of each unit for each query that was kept, in units of the value function; higher means
        the unit raises the value.
    mean : ndarray of float64, shape (n_units,)
        Mean of ``values`` over queries.
    standard_error : ndarray of float64, shape (n_units,)
        Of ``mean``: ``sqrt(se_queries**2 + se_coalitions**2)``.
    se_queries : ndarray of float64, shape (n_units,)
        Because the queries are a sample: ``sqrt(var(values, ddof=1) / n_queries)``. Zero for a single
        query; the attribution then speaks of that query only.
    se_coalitions : ndarray of float64, shape (n_units,)
        Because the coalitions are a sample; zero when ``exact``. The formula is the explainer's.
    base_values, full_values : ndarray of float64, shape (n_queries,)
        v(empty) and v(full).
    intercept : ndarray of float64, shape (n_queries,)
        Constant of the additive surrogate used by :meth:`predict`.
    n_coalitions : int
        Coalitions evaluated for each query.
    exact : bool
        True when no coalition was sampled.
    method : str
        Name of the explainer.
    settings : mapping
        What else is needed to repeat it; JSON-safe.
    dropped_queries : ndarray of int64, shape (n_dropped,)
        Indices, into the queries handed in, of those dropped for missing values; ``values`` lists the
        others in order.
    df_coalitions : float
        Degrees of freedom of ``se_coalitions``; infinite when ``exact``.

    Notes
    -----
    All queries share one set of coalitions, so the error of the mean has two parts: with ``D`` the
    drawn coalitions, ``Var(mean) = E[Var(mean | D)] + Var(E[mean | D])``. Given ``D`` the queries are
    independent, which gives ``se_queries``; the second part is the error that all of them share, which
    no number of queries averages out, and is estimated by ``se_coalitions``.
    """

    values: FloatArray
    mean: FloatArray
    standard_error: FloatArray
    se_queries: FloatArray
    se_coalitions: FloatArray
    base_values: FloatArray
    full_values: FloatArray
    intercept: FloatArray
    n_coalitions: int
    exact: bool
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    dropped_queries: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    df_coalitions: float = float("inf")

    _FLOATS: ClassVar[tuple[str, ...]] = (
        *("values", "mean", "standard_error", "se_queries", "se_coalitions"),
        *("base_values", "full_values", "intercept"),
    )

    def __post_init__(self) -> None:
        for name in self._FLOATS:
            array = np.asarray(getattr(self, name), dtype=np.float64)
            if not np.isfinite(array).all():
                raise InputError(f"{name} holds NaN or infinity.", hint="Attributions are finite numbers.")
            object.__setattr__(self, name, frozen(array))
        if self.values.ndim != 2:
            raise InputError(
                f"values has shape {self.values.shape}: (n_queries, n_units) is needed.", hint="Reshape it."
            )
        n_queries, n_units = self.values.shape
        for name in self._FLOATS[1:]:
            wanted = (n_units,) if name in self._FLOATS[1:5] else (n_queries,)
            if getattr(self, name).shape != wanted:
                raise InputError(
                    f"{name} has shape {getattr(self, name).shape}, {wanted} is needed.", hint="Reshape it."
                )
        object.__setattr__(self, "dropped_queries", frozen(np.asarray(self.dropped_queries, dtype=np.int64)))
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    @property
    def n_queries(self) -> int:
        """Number of queries kept."""
        return int(self.values.shape[0])

    @property
    def n_units(self) -> int:
        """Number of units."""
        return int(self.values.shape[1])

    def ranking(self) -> NDArray[np.int64]:
        """Units in ascending order of ``mean``: the first to remove comes first.

        Returns
        -------
        ndarray of int64, shape (n_units,)
            Unit indices; units of equal mean are in order of their index.
        """
        return np.argsort(self.mean, kind="stable").astype(np.int64)

    def upper_bound(self, level: float = 0.95) -> FloatArray:
        """One-sided upper confidence bound of ``mean``.

        Parameters
        ----------
        level : float
            Confidence of each single bound, strictly between 0 and 1. Not corrected for looking at
            several units.

        Returns
        -------
        ndarray of float64, shape (n_units,)
            ``mean + t * standard_error``, with Student's t and the Welch-Satterthwaite degrees of
            freedom of the two variance parts (``n_queries - 1`` and ``df_coalitions``).

        Raises
        ------
        InputError
            When ``level`` is not strictly between 0 and 1.
        """
        return self.mean + self._half_width(level)

    def lower_bound(self, level: float = 0.95) -> FloatArray:
        """One-sided lower confidence bound of ``mean``; see :meth:`upper_bound`."""
        return self.mean - self._half_width(level)

    def p_values(self) -> FloatArray:
        """One-sided p-values of "the unit does not lower the value", ``mean >= 0``, one a unit, uncorrected.

        Returns
        -------
        ndarray of float64, shape (n_units,)
            Small where the mean is below 0 with confidence; the same law as :meth:`upper_bound`. A unit whose
            credit never varies has 0 below zero and 1 otherwise.
        """
        from scipy.special import stdtr

        moving = self.standard_error > 0
        z = np.divide(self.mean, self.standard_error, out=np.zeros(self.n_units), where=moving)
        p: FloatArray = np.where(
            moving, stdtr(self._degrees_of_freedom(), z), (self.mean >= 0).astype(np.float64)
        )
        return p

    def predict(self, coalitions: ArrayLike) -> FloatArray:
        """Values that the additive surrogate ``intercept + coalitions @ values.T`` gives.

        Parameters
        ----------
        coalitions : array_like of bool, shape (n_coalitions, n_units)
            Unseen coalitions of the prompt that was explained.

        Returns
        -------
        ndarray of float64, shape (n_coalitions, n_queries)
            In units of the value function; queries that were dropped have no column.

        Raises
        ------
        InputError
            When the coalitions are not boolean or have another number of units.
        """
        rows = check_coalitions(coalitions)
        if rows.shape[1] != self.n_units:
            raise InputError(
                f"coalitions has {rows.shape[1]} units, the attribution {self.n_units}.",
                hint="Pass coalitions of the prompt that was explained.",
            )
        return self.intercept + rows @ self.values.T

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe dictionary; :meth:`from_dict` is its inverse.

        Returns
        -------
        dict
            Lists, numbers, strings and booleans only; no NaN and no infinity (infinite degrees of
            freedom are written as None).
        """
        data: dict[str, Any] = {name: getattr(self, name).tolist() for name in self._FLOATS}
        return data | {
            "n_coalitions": int(self.n_coalitions),
            "exact": bool(self.exact),
            "method": self.method,
            "settings": dict(self.settings),
            "dropped_queries": self.dropped_queries.tolist(),
            "df_coalitions": None if np.isinf(self.df_coalitions) else float(self.df_coalitions),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Attribution:
        """Rebuild what :meth:`to_dict` wrote.

        Raises
        ------
        ArtifactError
            When a field is absent or unknown.
        """
        fields = dict(data)
        expected = {*cls._FLOATS, "n_coalitions", "exact", "method", "settings", "dropped_queries"}
        expected.add("df_coalitions")
        if set(fields) != expected:
            odd = sorted(set(fields) ^ expected)
            raise ArtifactError(f"Attribution: fields {odd} are absent or unknown.", hint="Save it again.")
        if fields["df_coalitions"] is None:
            fields["df_coalitions"] = float("inf")
        return cls(**fields)

    def _half_width(self, level: float) -> FloatArray:
        if not 0 < level < 1:
            raise InputError(f"level={level}: strictly between 0 and 1.", hint="0.95 is usual.")
        from scipy.special import stdtrit

        width: FloatArray = stdtrit(self._degrees_of_freedom(), level) * self.standard_error
        return width

    def _degrees_of_freedom(self) -> FloatArray:
        """Welch-Satterthwaite, of the two variance parts."""
        queries, coalitions = self.se_queries**2, self.se_coalitions**2
        total = queries + coalitions
        spread = queries**2 / max(self.n_queries - 1, 1) + coalitions**2 / self.df_coalitions
        df: FloatArray = np.divide(total**2, spread, out=np.full(self.n_units, 1e9), where=spread > 0)
        return df


class Explainer(ABC):
    """An explanation technique: chooses coalitions, and turns their values into an Attribution.

    Parameters
    ----------
    max_missing : float
        Largest share of a query's values that may be missing before the query is dropped.
    max_dropped : float
        Largest share of queries that may be dropped before the answer is refused.

    Notes
    -----
    NaN is *missing*; it is never read as a number. A query whose v(empty) or v(full) is missing, or
    more than ``max_missing`` of whose values are, is dropped and listed in ``dropped_queries``.
    Otherwise its missing rows are left out of its own regression.
    """

    method: ClassVar[str]

    def __init__(self, *, max_missing: float = 0.05, max_dropped: float = 0.20) -> None:
        for name, share in (("max_missing", max_missing), ("max_dropped", max_dropped)):
            if not 0 <= share < 1:
                raise InputError(f"{name}={share}: a share in [0, 1) is needed.", hint="0.05 is usual.")
        self.max_missing = max_missing
        self.max_dropped = max_dropped

    @abstractmethod
    def design(self, n_units: int, budget: int, *, rng: np.random.Generator) -> Design:
        """Choose at most ``budget`` coalitions of ``n_units`` units."""

    @abstractmethod
    def fit(self, design: Design, values: ArrayLike) -> Attribution:
        """Attribute ``values``, shape (n_coalitions, n_queries), to the units of ``design``."""

    def held_out(self, n_units: int, n: int, *, rng: np.random.Generator, exclude: BoolArray) -> BoolArray:
        """Draw coalitions to judge the surrogate on, from the neighbourhood it is meant for [PE 4.2].

        Uniform over coalitions unless the technique has a neighbourhood of its own.

        Parameters
        ----------
        n_units, n : int
        rng : numpy.random.Generator
        exclude : ndarray of bool, shape (n_excluded, n_units)
            Coalitions that were fitted on.

        Returns
        -------
        ndarray of bool, shape (n, n_units)
        """
        return uniform_coalitions(n_units, n, rng=rng, exclude=exclude)

    def attribute(
        self, value_function: ValueArrayFunction, n_units: int, *, budget: int, rng: np.random.Generator
    ) -> Attribution:
        """Design, evaluate, fit.

        Parameters
        ----------
        value_function : callable
            Boolean (n_coalitions, n_units) to float (n_coalitions, n_queries); called once.
        n_units : int
            Number of units, at least 1.
        budget : int
            Largest number of coalitions to evaluate.
        rng : numpy.random.Generator
            The only source of chance.

        Returns
        -------
        Attribution

        Raises
        ------
        InputError
            When the budget is too small or the values have a wrong shape.
        InconclusiveError
            When too many queries have missing values.
        """
        design = self.design(check_n_units(n_units), budget, rng=rng)
        return self.fit(design, value_function(design.coalitions))

    def _complete_enough(
        self, design: Design, values: ArrayLike, *, all_rows: bool = False
    ) -> tuple[FloatArray, NDArray[np.int64], NDArray[np.int64]]:
        """Return (values of the kept queries, kept indices, dropped indices)."""
        array = check_values(values, design.n_coalitions)
        missing = np.isnan(array)
        drop = missing[design.empty_row] | missing[design.full_row]
        drop |= missing.any(axis=0) if all_rows else missing.mean(axis=0) > self.max_missing
        refuse_if_too_many(int(drop.sum()), array.shape[1], self.max_dropped)
        return array[:, ~drop], np.flatnonzero(~drop), np.flatnonzero(drop)


def check_values(values: ArrayLike, n_coalitions: int) -> FloatArray:
    """Return ``values`` as float64 (n_coalitions, n_queries), or raise InputError."""
    raw = np.asarray(values)
    if raw.dtype.kind not in "fiub":
        raise InputError(
            f"values has dtype {raw.dtype}: numbers are needed.", hint="Missing values are NaN, not None."
        )
    if raw.ndim != 2 or raw.shape[0] != n_coalitions or raw.shape[1] < 1:
        raise InputError(
            f"values has shape {raw.shape}: ({n_coalitions}, n_queries) is needed, a row per coalition.",
            hint="Do not reduce values over queries before attributing them.",
        )
    array = raw.astype(np.float64)
    if np.isinf(array).any():
        raise InputError(
            f"values holds {int(np.isinf(array).sum())} infinite entries.",
            hint="Bound log-probabilities from below, and mark failed calls with NaN.",
        )
    return array


def refuse_if_too_many(n_dropped: int, n_queries: int, max_dropped: float) -> None:
    """Raise InconclusiveError when the share of dropped queries passes ``max_dropped``, or all are."""
    if n_dropped > max_dropped * n_queries or n_dropped == n_queries:
        raise InconclusiveError(
            f"{n_dropped} of {n_queries} queries were dropped for missing values; at most "
            f"{max_dropped:.0%} may be.",
            hint="Repeat the failed calls, or choose a value function the model can answer.",
        )


def summarize(
    values: FloatArray, se_coalitions: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return mean, standard_error, se_queries and se_coalitions of per-query ``values``."""
    n_queries = len(values)
    spread = values.var(axis=0, ddof=1) if n_queries > 1 else np.zeros(values.shape[1])
    se_queries: FloatArray = np.sqrt(spread / n_queries)
    return values.mean(axis=0), np.hypot(se_queries, se_coalitions), se_queries, se_coalitions


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that cannot be written to."""
    copy = np.array(array)
    copy.setflags(write=False)
    return copy
