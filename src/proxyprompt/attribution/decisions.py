"""Decisions that attributions are for, and the comparisons of units that each of them rests on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from proxyprompt.coalitions import FloatArray
from proxyprompt.errors import InputError

__all__ = ["Below", "BottomK", "Decision", "FullRanking", "TopK"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Decision(ABC):
    """What the attributions are for: which comparisons of units have to come out right.

    Parameters
    ----------
    tie : float
        Width of indifference, in units of the value function, 0 or more: an order that is wrong by no more than this
        does no harm. With 0, two units that are truly equal are never settled before the budget is gone.
    """

    tie: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.tie) and self.tie >= 0):
            raise InputError(f"tie={self.tie}: a finite number of 0 or more is needed.", hint="0 is strict.")

    @abstractmethod
    def answer(self, mean: FloatArray) -> IntArray:
        """Units that the decision names, given the attributions ``mean`` of shape (n_units,)."""

    @abstractmethod
    def comparisons(self, mean: FloatArray) -> tuple[IntArray, IntArray]:
        """Units that the answer puts above, and those it puts below; ``n_units`` stands for the threshold."""

    def n_possible(self, n_units: int) -> int:
        """Comparisons that some outcome could need; the level is shared among all of them."""
        return n_units * (n_units - 1) // 2

    @property
    def threshold(self) -> float:
        """Value that units are compared with, where they are not compared with each other."""
        return 0.0

    def check(self, n_units: int) -> None:
        """Raise InputError when the decision is not one about so many units."""
        if self.n_possible(n_units) < 1:
            raise InputError(
                f"n_units={n_units}: there is nothing to compare.", hint="Pass two units or more."
            )


@dataclass(frozen=True)
class _Some(Decision):
    k: int

    def check(self, n_units: int) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int | np.integer) or not 1 <= self.k < n_units:
            raise InputError(
                f"k={self.k!r}: an integer from 1 to {n_units - 1} is needed for {n_units} units.",
                hint="FullRanking() compares all units.",
            )


@dataclass(frozen=True)
class TopK(_Some):
    """Which ``k`` units have the largest attributions, the largest first.

    Parameters
    ----------
    k : int
        From 1 to ``n_units - 1``.
    tie : float
        See :class:`Decision`. Settled means: no unit outside exceeds one inside by more than ``tie``.

    Examples
    --------
    >>> TopK(2).answer(np.array([0.1, 0.5, -0.2, 0.3])).tolist()
    [1, 3]
    """

    def answer(self, mean: FloatArray) -> IntArray:
        """The ``k`` units, the largest first."""
        return np.argsort(-mean, kind="stable")[: self.k].astype(np.int64)

    def comparisons(self, mean: FloatArray) -> tuple[IntArray, IntArray]:
        """Each of the ``k`` above each other unit."""
        inside = self.answer(mean)
        outside = np.setdiff1d(np.arange(len(mean)), inside)
        return np.repeat(inside, len(outside)), np.tile(outside, len(inside))


@dataclass(frozen=True)
class BottomK(_Some):
    """Which ``k`` units go first when the prompt is cut: those with the smallest attributions, the smallest first.

    Parameters
    ----------
    k : int
        From 1 to ``n_units - 1``.
    tie : float
        See :class:`Decision`. Settled means: no unit inside exceeds one outside by more than ``tie``.

    Examples
    --------
    >>> BottomK(2).answer(np.array([0.1, 0.5, -0.2, 0.3])).tolist()
    [2, 0]
    """

    def answer(self, mean: FloatArray) -> IntArray:
        """The ``k`` units, the smallest first."""
        return np.argsort(mean, kind="stable")[: self.k].astype(np.int64)

    def comparisons(self, mean: FloatArray) -> tuple[IntArray, IntArray]:
        """Each other unit above each of the ``k``."""
        inside = self.answer(mean)
        outside = np.setdiff1d(np.arange(len(mean)), inside)
        return np.tile(outside, len(inside)), np.repeat(inside, len(outside))


@dataclass(frozen=True)
class FullRanking(Decision):
    """All units, in ascending order of attribution: the order in which a prompt is cut.

    Parameters
    ----------
    tie : float
        See :class:`Decision`. Settled means: no unit exceeds a later one by more than ``tie``.

    Examples
    --------
    >>> FullRanking().answer(np.array([0.1, 0.5, -0.2])).tolist()
    [2, 0, 1]
    """

    def answer(self, mean: FloatArray) -> IntArray:
        """All units, the smallest first."""
        return np.argsort(mean, kind="stable").astype(np.int64)

    def comparisons(self, mean: FloatArray) -> tuple[IntArray, IntArray]:
        """Every pair."""
        order = self.answer(mean)
        below, above = np.triu_indices(len(order), k=1)
        return order[above], order[below]


@dataclass(frozen=True)
class Below(Decision):
    """Which units are below a value; below 0 is what cleaning a prompt needs.

    Parameters
    ----------
    value : float
        In units of the value function.
    tie : float
        See :class:`Decision`. Settled means: no unit is on the wrong side of ``value`` by more than ``tie``.

    Examples
    --------
    >>> Below().answer(np.array([0.1, 0.5, -0.2])).tolist()
    [2]
    """

    value: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not np.isfinite(self.value):
            raise InputError(f"value={self.value}: a finite number is needed.", hint="0 is usual.")

    @property
    def threshold(self) -> float:
        """``value``."""
        return self.value

    def answer(self, mean: FloatArray) -> IntArray:
        """The units below, the smallest first."""
        order = np.argsort(mean, kind="stable").astype(np.int64)
        return order[mean[order] < self.value]

    def comparisons(self, mean: FloatArray) -> tuple[IntArray, IntArray]:
        """Each unit with the threshold."""
        units, edge = np.arange(len(mean)), np.full(len(mean), len(mean))
        below = mean < self.value
        return np.where(below, edge, units), np.where(below, units, edge)

    def n_possible(self, n_units: int) -> int:
        """One comparison a unit."""
        return n_units
