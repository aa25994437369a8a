"""Pairwise interactions: what two units are worth together beyond what each is worth by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxyprompt.coalitions import BoolArray, FloatArray, check_coalitions
from proxyprompt.errors import ArtifactError, InputError

from ._order_two import pair_values
from .base import frozen

__all__ = ["Interactions"]


@dataclass(frozen=True, eq=False)
class Interactions:
    """Interaction of every pair of units, and the order-2 surrogate that they make with the main effects.

    Parameters
    ----------
    values : ndarray of float64, shape (n_queries, n_pairs)
        Interaction of each pair ``i < j`` in the order of ``np.triu_indices(n_units, 1)``, in units of the value
        function. Negative: each is worth less when the other is there (copies). Positive: each needs the other.
    main_effects : ndarray of float64, shape (n_queries, n_units)
        First-order values that belong to the index: weighted Banzhaf for ``faith-banzhaf``, Shapley otherwise.
    intercept : ndarray of float64, shape (n_queries,)
        The surrogate's value of the empty coalition.
    se_pairs : ndarray of float64, shape (n_pairs,)
        Standard error of the mean over queries because the coalitions are a sample; zero when ``exact``.
    base_values, full_values : ndarray of float64, shape (n_queries,)
        v(empty) and v(full).
    centre : float
        The point about which main effects are taken: ``keep`` for ``faith-banzhaf``, one half otherwise.
    index : {"faith-banzhaf", "faith-shap", "sii"}
    n_coalitions : int
        Coalitions evaluated for each query.
    exact : bool
        True when no coalition was sampled.
    shrinkage : float
        Share of an interaction that the estimate retains on average, in [0, 1]; 1 when pairs were not penalised.
    df_coalitions : float
        Degrees of freedom of ``se_pairs``; infinite when ``exact``.
    settings : mapping
        What else is needed to repeat it; JSON-safe.
    dropped_queries : ndarray of int64, shape (n_dropped,)
        Indices, into the queries handed in, of those dropped for missing values.
    """

    values: FloatArray
    main_effects: FloatArray
    intercept: FloatArray
    se_pairs: FloatArray
    base_values: FloatArray
    full_values: FloatArray
    centre: float
    index: str
    n_coalitions: int
    exact: bool
    shrinkage: float = 1.0
    df_coalitions: float = float("inf")
    settings: Mapping[str, Any] = field(default_factory=dict)
    dropped_queries: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    _FLOATS: ClassVar[tuple[str, ...]] = (
        *("values", "main_effects", "intercept", "se_pairs", "base_values", "full_values"),
    )
    _OTHERS: ClassVar[tuple[str, ...]] = (
        *("centre", "index", "n_coalitions", "exact", "shrinkage", "df_coalitions", "settings"),
        "dropped_queries",
    )

    def __post_init__(self) -> None:
        for name in self._FLOATS:
            array = np.asarray(getattr(self, name), dtype=np.float64)
            if not np.isfinite(array).all():
                raise InputError(f"{name} holds NaN or infinity.", hint="Interactions are finite numbers.")
            object.__setattr__(self, name, frozen(array))
        if self.main_effects.ndim != 2:
            raise InputError(
                f"main_effects has shape {self.main_effects.shape}: (n_queries, n_units) is needed.",
                hint="Reshape it.",
            )
        n_queries, n_units = self.main_effects.shape
        n_pairs = n_units * (n_units - 1) // 2
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(self._FLOATS[2:], (n_queries,))
        for name, shape in (wanted | {"values": (n_queries, n_pairs), "se_pairs": (n_pairs,)}).items():
            if getattr(self, name).shape != shape:
                raise InputError(
                    f"{name} has shape {getattr(self, name).shape}, {shape} is needed.", hint="Reshape it."
                )
        object.__setattr__(self, "dropped_queries", frozen(np.asarray(self.dropped_queries, dtype=np.int64)))
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    @property
    def n_queries(self) -> int:
        """Number of queries kept."""
        return int(self.main_effects.shape[0])

    @property
    def n_units(self) -> int:
        """Number of units."""
        return int(self.main_effects.shape[1])

    @property
    def mean(self) -> FloatArray:
        """Mean interaction over queries, shape (n_units, n_units), symmetric with a zero diagonal."""
        return self._square(self.values.mean(axis=0))

    @property
    def se_queries(self) -> FloatArray:
        """Standard error of ``mean`` because the queries are a sample; zero for a single query."""
        if self.n_queries == 1:
            return np.zeros((self.n_units, self.n_units))
        return self._square(np.sqrt(self.values.var(axis=0, ddof=1) / self.n_queries))

    @property
    def se_coalitions(self) -> FloatArray:
        """Standard error of ``mean`` because the coalitions are a sample, shape (n_units, n_units)."""
        return self._square(self.se_pairs)

    @property
    def standard_error(self) -> FloatArray:
        """Standard error of ``mean``, both parts together, shape (n_units, n_units)."""
        both: FloatArray = np.hypot(self.se_queries, self.se_coalitions)
        return both

    @property
    def singles(self) -> FloatArray:
        """Linear coefficients of the surrogate ``intercept + sum singles z + sum interactions z z``.

        Returns
        -------
        ndarray of float64, shape (n_queries, n_units)
            A unit's worth to the surrogate when it is the only one kept.
        """
        i, j = np.triu_indices(self.n_units, 1)
        ends = np.zeros((len(i), self.n_units))
        ends[np.arange(len(i)), i] = ends[np.arange(len(i)), j] = 1.0
        singles: FloatArray = self.main_effects - self.centre * (self.values @ ends)
        return singles

    def predict(self, coalitions: ArrayLike) -> FloatArray:
        """Values that the order-2 surrogate gives.

        Parameters
        ----------
        coalitions : array_like of bool, shape (n_coalitions, n_units)

        Returns
        -------
        ndarray of float64, shape (n_coalitions, n_queries)
            In units of the value function; the surrogate of the mean value is its mean over columns.

        Raises
        ------
        InputError
            When the coalitions are not boolean or have another number of units.
        """
        rows = self._rows(coalitions)
        return self.intercept + rows @ self.singles.T + pair_values(rows.astype(np.float64), self.values.T)

    def marginal(self, kept: ArrayLike) -> FloatArray:
        """What each unit is worth to the mean surrogate, given which units are kept.

        Of two near-copies each is worth little while the other is kept, and its whole worth once the other is gone:
        a compressor asks again after each removal.

        Parameters
        ----------
        kept : array_like of bool, shape (n_units,)

        Returns
        -------
        ndarray of float64, shape (n_units,)
            For a kept unit what its removal would cost; for another one what adding it would bring.

        Raises
        ------
        InputError
            When ``kept`` is not boolean or has another number of units.
        """
        row = self._rows(np.asarray(kept)[None])[0]
        worth: FloatArray = self.singles.mean(axis=0) + self.mean @ row
        return worth

    def redundant(self, level: float = 0.95) -> list[tuple[int, int]]:
        """Pairs that stand in for each other: both useful, and the interaction below 0 with confidence.

        Parameters
        ----------
        level : float
            Confidence that no listed pair has an interaction of 0 or more, strictly between 0 and 1; Bonferroni
            over all pairs.

        Returns
        -------
        list of (int, int)
            The most negative first.

        Raises
        ------
        InputError
            When ``level`` is not strictly between 0 and 1.
        """
        if not 0 < level < 1:
            raise InputError(f"level={level}: strictly between 0 and 1.", hint="0.95 is usual.")
        from scipy.special import stdtrit

        i, j = np.triu_indices(self.n_units, 1)
        queries, coalitions = self.se_queries[i, j] ** 2, self.se_pairs**2
        spread = queries**2 / max(self.n_queries - 1, 1) + coalitions**2 / self.df_coalitions
        total = queries + coalitions
        df = np.divide(total**2, spread, out=np.full(len(i), 1e9), where=spread > 0)
        mean, main = self.values.mean(axis=0), self.main_effects.mean(axis=0)
        rounding = 1e-9 * np.abs(main).max()
        below = mean + stdtrit(df, 1 - (1 - level) / len(i)) * np.sqrt(total) < -rounding
        chosen = np.flatnonzero(below & (main[i] > 0) & (main[j] > 0))
        return [(int(i[p]), int(j[p])) for p in chosen[np.argsort(mean[chosen], kind="stable")]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe dictionary; :meth:`from_dict` is its inverse.

        Returns
        -------
        dict
            Lists, numbers, strings and booleans only; infinite degrees of freedom are written as None.
        """
        data: dict[str, Any] = {name: getattr(self, name).tolist() for name in self._FLOATS}
        data |= {name: getattr(self, name) for name in self._OTHERS}
        return data | {
            "settings": dict(self.settings),
            "dropped_queries": self.dropped_queries.tolist(),
            "df_coalitions": None if np.isinf(self.df_coalitions) else float(self.df_coalitions),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Interactions:
        """Rebuild what :meth:`to_dict` wrote.

        Raises
        ------
        ArtifactError
            When a field is absent or unknown.
        """
        fields = dict(data)
        odd = sorted(set(fields) ^ {*cls._FLOATS, *cls._OTHERS})
        if odd:
            raise ArtifactError(f"Interactions: fields {odd} are absent or unknown.", hint="Save it again.")
        if fields["df_coalitions"] is None:
            fields["df_coalitions"] = float("inf")
        return cls(**fields)

    def _square(self, pairs: FloatArray) -> FloatArray:
        square = np.zeros((self.n_units, self.n_units))
        square[np.triu_indices(self.n_units, 1)] = pairs
        return square + square.T

    def _rows(self, coalitions: ArrayLike) -> BoolArray:
        rows = check_coalitions(coalitions)
        if rows.shape[1] != self.n_units:
            raise InputError(
                f"coalitions has {rows.shape[1]} units, the interactions {self.n_units}.",
                hint="Pass coalitions of the prompt that was explained.",
            )
        return rows
