"""Games whose Shapley values are known in closed form, to test estimators against.

Each game is a value function on arrays: boolean ``(n_coalitions, n_units)`` in, float
``(n_coalitions, n_queries)`` out. It counts what it was asked (``evaluations`` coalitions in ``calls``
calls) and knows the answer (``shapley_values``, shape ``(n_queries, n_units)``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .coalitions import BoolArray, FloatArray, check_coalitions
from .errors import InputError

__all__ = ["AdditiveGame", "AirportGame", "Game", "GloveGame", "UnanimityGame"]


class Game(ABC):
    """A value function with known Shapley values that counts its evaluations.

    Parameters
    ----------
    shapley_values : ndarray of float64, shape (n_queries, n_units)

    Attributes
    ----------
    evaluations : int
        Coalitions evaluated so far.
    calls : int
        Calls made so far.
    """

    def __init__(self, shapley_values: FloatArray) -> None:
        self.shapley_values = shapley_values
        self.evaluations = 0
        self.calls = 0

    @property
    def n_queries(self) -> int:
        """Number of columns of the values."""
        return int(self.shapley_values.shape[0])

    @property
    def n_units(self) -> int:
        """Number of players."""
        return int(self.shapley_values.shape[1])

    def __call__(self, coalitions: ArrayLike) -> FloatArray:
        """Evaluate, shape (n_coalitions, n_queries).

        Raises
        ------
        InputError
            When the coalitions are not boolean or have another number of units.
        """
        rows = check_coalitions(coalitions)
        if rows.shape[1] != self.n_units:
            raise InputError(
                f"coalitions has {rows.shape[1]} units, the game {self.n_units}.", hint="Match them."
            )
        self.calls += 1
        self.evaluations += len(rows)
        return self._values(rows)

    @abstractmethod
    def _values(self, rows: BoolArray) -> FloatArray: ...


class AdditiveGame(Game):
    """Each unit adds its own contribution: ``v(S) = base + sum of contributions in S``.

    Parameters
    ----------
    contributions : array_like of float, shape (n_queries, n_units)
        Also the Shapley values.
    base : array_like of float, shape (n_queries,) or scalar
        v(empty).

    Examples
    --------
    >>> AdditiveGame([[1.0, 2.0]])([[True, False], [True, True]]).tolist()
    [[1.0], [3.0]]
    """

    def __init__(self, contributions: ArrayLike, base: ArrayLike = 0.0) -> None:
        super().__init__(np.atleast_2d(np.asarray(contributions, dtype=np.float64)))
        self.base = np.broadcast_to(np.asarray(base, dtype=np.float64), (self.n_queries,))

    def _values(self, rows: BoolArray) -> FloatArray:
        values: FloatArray = self.base + rows @ self.shapley_values.T
        return values


class UnanimityGame(Game):
    """A sum of unanimity games: each term pays its coefficient once all its units are kept.

    Parameters
    ----------
    n_units : int
        Number of units.
    terms : sequence of (units, coefficients)
        Units of the term (a non-empty sequence of indices), and what it pays: a number, or one number
        a query.
    base : array_like of float, shape (n_queries,) or scalar
        v(empty).

    Notes
    -----
    Every game is such a sum. Each term is shared equally by its units.

    Examples
    --------
    >>> UnanimityGame(3, [((0, 1), 1.0), ((2,), 0.5)]).shapley_values.tolist()
    [[0.5, 0.5, 0.5]]
    """

    def __init__(
        self, n_units: int, terms: Sequence[tuple[Sequence[int], ArrayLike]], base: ArrayLike = 0.0
    ) -> None:
        if any(len(units) == 0 for units, _ in terms):
            raise InputError("terms holds a term without units.", hint="Use base for a constant.")
        self.members = np.zeros((len(terms), n_units), dtype=bool)
        for row, (units, _) in zip(self.members, terms, strict=True):
            row[list(units)] = True
        paid = [np.atleast_1d(np.asarray(pay, dtype=np.float64)) for _, pay in terms]
        self.base = np.atleast_1d(np.asarray(base, dtype=np.float64))
        n_queries = max(len(column) for column in [*paid, self.base])
        self.payments = np.array([np.broadcast_to(column, n_queries) for column in paid])
        shares = self.members / self.members.sum(axis=1, keepdims=True)
        super().__init__(self.payments.T @ shares)

    def _values(self, rows: BoolArray) -> FloatArray:
        present = (~rows).astype(np.float64) @ self.members.T.astype(np.float64) == 0
        values: FloatArray = self.base + present @ self.payments
        return values


class GloveGame(Game):
    """One left glove (unit 0) and ``n_right`` right gloves: a pair is worth 1.

    Parameters
    ----------
    n_right : int
        Right gloves, at least 1.

    Notes
    -----
    The left glove gets ``n_right / (n_right + 1)``, each right one ``1 / (n_right (n_right + 1))``: the
    right gloves are copies of each other, and leave-one-out gives them nothing.

    Examples
    --------
    >>> GloveGame(1).shapley_values.tolist()
    [[0.5, 0.5]]
    """

    def __init__(self, n_right: int) -> None:
        if n_right < 1:
            raise InputError(f"n_right={n_right}: at least 1 right glove is needed.", hint="Pass 1 or more.")
        right = 1.0 / (n_right * (n_right + 1))
        super().__init__(np.array([[n_right / (n_right + 1), *[right] * n_right]]))

    def _values(self, rows: BoolArray) -> FloatArray:
        return (rows[:, 0] & rows[:, 1:].any(axis=1)).astype(np.float64)[:, None]


class AirportGame(Game):
    """The value of a coalition is the largest cost in it.

    Parameters
    ----------
    costs : array_like of float, shape (n_units,)
        Non-negative.

    Notes
    -----
    Each step between successive costs is shared by the units that reach it (Littlechild & Owen, "A
    Simple Expression for the Shapley Value in a Special Case", 1973).

    Examples
    --------
    >>> AirportGame([1.0, 3.0]).shapley_values.tolist()
    [[0.5, 2.5]]
    """

    def __init__(self, costs: ArrayLike) -> None:
        self.costs = np.asarray(costs, dtype=np.float64)
        if self.costs.ndim != 1 or not (self.costs >= 0).all():
            raise InputError("costs must be a list of non-negative numbers.", hint="One cost a unit.")
        order = np.argsort(self.costs, kind="stable")
        steps = np.diff(self.costs[order], prepend=0.0)
        shapley = np.empty(len(order))
        shapley[order] = np.cumsum(steps / np.arange(len(order), 0, -1))
        super().__init__(shapley[None, :])

    def _values(self, rows: BoolArray) -> FloatArray:
        values: FloatArray = np.where(rows, self.costs, 0.0).max(axis=1)[:, None]
        return values
