"""The games on which every library must give the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from proxyprompt.coalitions import BoolArray, FloatArray, enumerate_coalitions
from proxyprompt.testing import AdditiveGame, AirportGame, GloveGame, UnanimityGame


class TableGame:
    """A value function that is a table of all ``2**n`` coalitions, with the forms in which libraries want it."""

    def __init__(self, values: FloatArray, n_units: int) -> None:
        self.values = values
        self.n_units = n_units
        self.all = enumerate_coalitions(n_units)
        self._place = 1 << np.arange(n_units)

    def __call__(self, coalitions: BoolArray) -> FloatArray:
        """(n_coalitions, n_queries)."""
        return self.values[np.asarray(coalitions, dtype=bool) @ self._place]

    @property
    def n_queries(self) -> int:
        return self.values.shape[1]

    def of(self, query: int) -> Callable[[BoolArray], FloatArray]:
        """The game of one query: (n_coalitions,)."""
        return lambda rows: self(np.asarray(rows))[:, query]


def table(game: Callable[[BoolArray], FloatArray], n_units: int) -> TableGame:
    return TableGame(np.asarray(game(enumerate_coalitions(n_units)), dtype=float), n_units)


def random_table(n_units: int, n_queries: int = 3) -> TableGame:
    """No structure at all: every coalition has a value of its own."""
    return TableGame(np.random.default_rng(n_units).normal(size=(2**n_units, n_queries)), n_units)


def _redundant() -> TableGame:
    """Two copies (0, 1), a synergy (2, 3), a harmful unit (4) and one without effect (5)."""
    terms = [((0,), 1.0), ((1,), 1.0), ((0, 1), -1.0), ((2, 3), 0.7), ((4,), -0.4)]
    return table(UnanimityGame(6, terms, base=[0.1, -0.3, 2.0]), 6)


GAMES: dict[str, Callable[[], TableGame]] = {
    "additive": lambda: table(AdditiveGame(np.random.default_rng(1).normal(size=(3, 5)), base=0.5), 5),
    "redundant": _redundant,
    "glove": lambda: table(GloveGame(4), 5),
    "airport": lambda: table(AirportGame([1.0, 3.0, 3.0, 4.5, 7.0, 7.5]), 6),
    "random-5": lambda: random_table(5),
    "random-8": lambda: random_table(8, 2),
}
